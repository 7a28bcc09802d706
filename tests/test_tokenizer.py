"""The tokenizer: text comes back as it went in, whatever it is, and never turns into a special token."""
import random

import pytest

from minillama import Tokenizer

CORPUS = [
    "Nila lives in Oru. She has 3 dogs and 12 cats; the oldest is 14 years old.",
    "The baker asked: how many loaves are left? Two hundred and seven, said Tomo.",
    "naïve café, crème brûlée - “quotes” … 日本語 と かな, Привет мир",
    "  two  spaces   and\ttabs  ",
    "<s> is not a token </s> and neither is <unk> nor <0x41> nor [INST]",
] * 40  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(CORPUS, 420, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


NASTY = [
    "", " ", "  ", "   ", "a", " a", "a ", "  a  b  ", "\n", "\n\n", " \n ", "\r\n", "a\r\nb\rc\n", "\t", "\t a", "\x00", "a\x00b",
    "\x7f", "<s>", "</s>", " <s> ", "<unk>", "<pad>", "<0x41>", "<0x0A>", "<0xFF>", "[INST]", "<<SYS>>\n", "⁇", " ⁇ ", "\u200b", "a\u200bb",
    "\u200d", "e\u0301", "é", "\u0301", "ﬁ", "Å", "Å", "①", "　", "\xa0", "\u2028", "\u2029", "\x85", "\ufeff", "\ufeffa", "a\ufeff",
    "\ufffd",
    "\ufffe", "\uffff", "\ufdd0", "\U0001fffe", "\U0010ffff", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "日本語", "שלום", "مرحبا", "\u202eabc\u202c",
    "ไทย", "𝔘𝔫𝔦", "𓀀", "\U000e0041", "0123456789", "3.14", "a1b22c333", "\\n", "%s{}", "_", "__init__", "▂", "a" * 5000, " " * 500,
    "ab\n" * 300,
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=lambda t: ascii(t[:12]))
def test_round_trip_of_nasty_text(tokenizer, text):
    """Normalisation, stripped spaces, eaten control characters, byte fallback that is off."""
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_round_trip_of_every_character(tokenizer):
    """Every code point except surrogates and U+2581, between letters so that none hides at an edge, and every control character alone."""
    for start in range(0, 0x110000, 64):
        text = "".join("x" + chr(c) for c in range(start, start + 64) if not 0xD800 <= c < 0xE000 and c != 0x2581)
        assert tokenizer.decode(tokenizer.encode(text)) == text, hex(start)
    for c in range(0x300):
        assert tokenizer.decode(tokenizer.encode(chr(c))) == chr(c), hex(c)


def test_round_trip_of_random_text(tokenizer):
    """Thousands of random strings over mixed alphabets; every id in range, never BOS, EOS or unk."""
    rng = random.Random(0)
    planes = [(0, 0x80), (0x20, 0x7F), (0x300, 0x370), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    planes += [(0x1F300, 0x1FB00)]
    for _ in range(5000):
        chosen = rng.sample(planes, rng.randint(1, 3))
        draws = [(chr(rng.randrange(*rng.choice(chosen))), rng.choice(" \n<>s/"), rng.random() < 0.8) for _ in range(rng.randint(0, 30))]
        chars = [char if take else other for char, other, take in draws]
        text = "".join(chars).replace("\u2581", "")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, ascii(text)
        assert all(3 <= i < tokenizer.vocab_size for i in ids), ascii(text)


def test_the_one_exception(tokenizer):
    """U+2581 is SentencePiece's mark for a space: it comes back as one. The docstring says so; this notices if that changes."""
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_special_ids(tokenizer):
    """Llama's convention: unk 0, BOS 1, EOS 2, no pad; put there by request only, and without a trace in text."""
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, -1)
    plain = tokenizer.encode("Nila")
    assert tokenizer.encode("Nila", bos=True) == [1] + plain
    assert tokenizer.encode("Nila", bos=True, eos=True) == [1] + plain + [2] and len(plain) > 0
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]
    assert tokenizer.decode([1] + plain + [2] + tokenizer.encode("lives")) == "Nila lives"
    assert tokenizer.vocab_size == 420
    assert [tokenizer.piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a<s>b", " </s>", "<s></s>" * 3, "<0x41>", "<0x02>"])
def test_text_never_gives_a_special_token(tokenizer, text):
    """A user who types </s> must not end the turn, also when the training texts were full of it."""
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids) and len(ids) > 2
    assert 3 + 0x41 not in tokenizer.encode("<0x41>") and 3 + 0x02 not in ids


def test_dummy_prefix(tokenizer):
    """A space is put before the text and taken away again: "a" and " a" are different tokens and different texts."""
    a, space_a = tokenizer.encode("a"), tokenizer.encode(" a")
    assert a != space_a and tokenizer.decode(a) == "a" and tokenizer.decode(space_a) == " a"
    assert tokenizer.piece(a[0]).startswith("\u2581")


def test_digits_are_split(tokenizer):
    """Each digit is a token of its own (sec 2.2), though 12 and 207 are frequent in the training texts."""
    for text in ("12", "1234567890", "in 2023 there were 14,000"):
        pieces = [tokenizer.piece(i) for i in tokenizer.encode(text)]
        digits = [p for p in pieces if any(c.isdigit() for c in p) and not p.startswith("<0x")]
        assert len("".join(digits).strip("\u2581")) > 0 and all(sum(c.isdigit() for c in p) == 1 for p in digits)
    assert not [i for i in range(259, 420) if sum(c.isdigit() for c in tokenizer.piece(i)) > 1]


def test_compresses(tokenizer):
    """Bytes as the fallback of everything would pass every round trip: words seen in training must be few tokens."""
    text = "The baker asked: how many loaves are left?"
    assert len(tokenizer.encode(text)) < 0.7 * len(text)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\udc80"])
def test_lone_surrogates_are_refused(tokenizer, text, tmp_path):
    with pytest.raises(ValueError, match="lone surrogate U\\+D"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="lone surrogate U\\+D"):
        Tokenizer.train(CORPUS + [text], 400, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_decode_refuses_ids_out_of_range(tokenizer):
    for bad in (-1, 420, 10**6):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 420"):
            tokenizer.decode([5, bad])


def test_broken_bytes_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([3 + 0xF0, 3 + 0x9F]) == "\ufffd\ufffd"


def test_training_is_deterministic(tmp_path):
    """The same texts give the same bytes, from a list or an iterator, and the same vocabulary with any number of threads (the file
    also records that number)."""
    runs = [(CORPUS, 2), (iter(CORPUS), 2), (CORPUS, 1)]
    made = [Tokenizer.train(texts, 400, tmp_path / f"{i}.model", threads=n) for i, (texts, n) in enumerate(runs)]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    pieces = [[t.piece(i) for i in range(400)] for t in made]
    assert pieces[0] == pieces[2]
    other = Tokenizer.train([t for t in CORPUS if "baker" not in t], 350, tmp_path / "other.model")
    assert [other.piece(i) for i in range(350)] != pieces[0][:350]


def test_long_lines_are_learned_from(tmp_path):
    """The trainer drops lines over its limit without a word; a text without newlines must teach all the same."""
    t = Tokenizer.train(["the wizard of Quorn sang " * 8000], 300, tmp_path / "t.model")
    assert len(t.encode("wizard of Quorn")) <= 8


def test_bad_requests(tmp_path):
    """Errors name the value and the fix, and leave no file."""
    with pytest.raises(ValueError, match="(?s)cannot learn 20000 tokens.*<= [0-9]{3}"):
        Tokenizer.train(CORPUS, 20_000, tmp_path / "t.model")
    with pytest.raises(ValueError, match="vocab_size 259 is too small"):
        Tokenizer.train(CORPUS, 259, tmp_path / "t.model")
    for texts in ([], [""], [" \n "]):
        with pytest.raises(ValueError, match="no text"):
            Tokenizer.train(texts, 400, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="minillama tokenizer"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 1000, b"\x80\x02}q\x00.", b"{}"])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "foreign.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="foreign.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_cut_file_is_refused(tokenizer, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(tokenizer.path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.model"):
        Tokenizer(path)
