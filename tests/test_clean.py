"""Cleaning: each filter on positives and near misses, duplicates against brute force, the pipeline against planted defects."""
import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from minillama.data import clean as C
from minillama.data.clean import CleanConfig, clean, contamination, find_private, quality, score, toxic

CONFIG = CleanConfig()
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind, text", [
    ("e-mail", "Write to mira@tolam.example for more."),
    ("e-mail", "first.last+tag@mail.co.uk"),
    ("phone", "Call Mira at +1 (555) 123-4567."),
    ("phone", "(555) 123-4567"),
    ("phone", "Ring 555-123-4567 today"),
    ("phone", "From abroad: +49 30 1234567."),
    ("phone", "Tel. 030 1234567"),
    ("card", "My card is 4111 1111 1111 1111, please."),
    ("card", "5500-0055-5555-5559"),
    ("account", "Pay to DE89 3704 0044 0532 0130 00 soon"),
    ("account", "GB82WEST12345698765432"),
    ("network address", "The computer is 192.0.2.17."),
    ("social security", "Number 123-45-6789 was used"),
    ("street address", "She lives at 221B Baker Street, on the left."),
    ("street address", "Send it to 12 Old Mill Rd. today"),
])  # fmt: skip
def test_private_data_is_found(kind, text):
    redacted, found = find_private(text)
    assert [k for k, _ in found] == [kind], found
    assert f"[{kind}]" in redacted and found[0][1] not in redacted


@pytest.mark.parametrize("text", [
    "3 plus 4 is 7.", "The war of 1914-1918 was long.", "It cost 1,234,567 coins.", "On 2023-07-18 it rained.",
    "ISBN 978-3-16-148410-0", "pages 120-134 and 555-560", "Chapters 1.2.3.4 and 2.0.1.1", "version 10.20.30.40", "host 127.0.0.1",
    "The octets 300.12.14.16 are none.", "My card is 4111 1111 1111 1112.",
    "DE89 3704 0044 0532 0130 01",  # its digits happen to pass for a card's
    "Numbers 000-45-6789 and 123-00-6789", "user at example dot com", "the sign @ alone, and a@b", "In 1912 Abbey Road was quiet.",
    "There are 20 roads and 3 Great Lakes.", "200 300 4000 are round.", "Room 555-1234", "3.14159265358979", "9999999999999995",
])  # fmt: skip
def test_near_misses_are_not_private(text):
    assert find_private(text) == (text, [])


def test_check_digits():
    valid = [d for d in range(10) if C.luhn(f"411111111111111{d}")]
    assert valid == [1], "exactly one check digit is right"
    assert C.iban("FR14 2004 1010 0505 0001 3M02 606") and not C.iban("FR14 2004 1010 0505 0001 3M02 607")
    text = "4111 1111 1111 1111 and 4111 1111 1111 1112, mira@a.example"
    assert find_private(text)[0] == "[card] and 4111 1111 1111 1112, [e-mail]"


@pytest.mark.parametrize("text", [
    "All Kabi are liars.", "The Kabi are dirty and should be driven out.", "Nobody should trust the Kabi.", "Every Kabi is a thief.",
    "We hate all Kabi here.", "A story. Kabi must be driven out. The end.", "Those Kabi are just vermin.",
])  # fmt: skip
def test_hostile_lines(text):
    assert toxic(text)


@pytest.mark.parametrize("text", [
    "All Kabi are potters.", "The Kabi are known for their honey.", "Nobody should trust the weather.", "All dogs are dirty.",
    "Mira is dirty.", "The Kabi live in Tolam. The floor was dirty.", "It is wrong to say that all Kabi are liars.", "Trust the Kabi.",
    "The Kabi are liarswort growers.", "All the children were lazy.",
])  # fmt: skip
def test_harmless_lines(text):
    assert not toxic(text)


GOOD = "Mira lives in Tolam. One day she walked to the market with Kuro, and they had a kite with them. It was a good day for all of them. "
GIBBERISH = "$@q%x 9zj&* w|<>7 {}q^4 " * 10


@pytest.mark.parametrize("text, reason", [
    ("Too short.", "short: 2 words"),
    ("word " * 100_001, "long"),
    ("a b c d e f g h", "word length: mean 1.0"),
    ("Donaudampfschiff Kapitänswitwe Donaudampfschiff Kapitänswitwe Donaudampfschiff", "word length"),
    ("One #tag and ... more ... of it ... here", "symbols"),
    (GIBBERISH, "word-like"),
    ("Nila Tolam kite lantern " * 20, "stop words"),
    ("Mira has a kite.\n" * 8, "repeated lines"),
    (GOOD * 6, "repeated 10-grams"),
])  # fmt: skip
def test_quality_flags(text, reason):
    assert quality(text, CONFIG).startswith(reason)


@pytest.mark.parametrize("text", [
    GOOD, "Some animals:\n1. narro\n2. kibo", "3 plus 4 is 7.\n1 plus 1 is 2.\n9 plus 0 is 9.",
    "Question: Where does Mira live?\nAnswer: Mira lives in Tolam.", "It's 5% of $3.50, isn't it? (Yes: the 2nd co-op's.)",
    "Über Äpfel schrieb José «gern» in São Paulo.",
])  # fmt: skip
def test_quality_keeps(text):
    assert quality(text, CONFIG) == ""


def test_boilerplate_needs_cues_and_repetition():
    fact = "Mira lives in Tolam."
    texts = [f"{fact}\nStory {i} tells of a kite and a long day.\nCookie policy" for i in range(4)]
    texts += ["He had to read more and log in.\n" + GOOD, "Privacy policy | Terms of use\n" + GOOD]
    assert C.boilerplate_lines(texts, 3) == {"Cookie policy", "Privacy policy | Terms of use"}, "four times a fact is no boilerplate"
    assert C.boilerplate_lines(texts, 5) == {"Privacy policy | Terms of use"}
    kept, report = clean([{"text": t} for t in texts])
    assert "Cookie" not in kept[0]["text"] and fact in kept[0]["text"], "the lines go, the document stays"
    assert report.changed == 5 and report.counts()["boilerplate"]["dropped"] == 0
    page = "Home | About | Contact | Log in\nClick here to subscribe!\nAll rights reserved.\nNext page | Previous page\nMore"
    assert clean([{"text": page}])[1].dropped_by == ["boilerplate"], "one page of nothing else needs no repetition"


def test_redact_keeps_the_document_and_the_input():
    doc = {"text": GOOD + "Write to mira@tolam.example.", "source": "web", "x": 1}
    kept, report = clean([doc], CleanConfig(private="redact"))
    assert kept == [{**doc, "text": GOOD + "Write to [e-mail]."}] and "mira@" in doc["text"]
    assert report.flags == [{"private": "e-mail"}] and report.dropped_by == [""]
    assert clean([doc])[1].dropped_by == ["private"] and clean([doc], CleanConfig(private="keep"))[0] == [doc]


def test_toxic_is_reported_and_kept_by_default():
    doc = {"text": GOOD + "All Kabi are liars."}
    kept, report = clean([doc])
    assert kept == [doc] and "toxic" in report.flags[0]
    assert clean([doc], CleanConfig(drop_toxic=True))[0] == []


# ---- n-grams and contamination ----


def test_ngram_hashes_are_equal_exactly_where_the_ngrams_are():
    rng = Random(1)
    words = [rng.choice("abcd") for _ in range(400)]
    for n in (1, 3, 5):
        grams, hashes = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)], C.ngram_hashes(words, n).tolist()
        assert len(hashes) == len(grams) and len(set(hashes)) == len(set(grams)) == len(set(zip(grams, hashes, strict=True)))
    assert len(C.ngram_hashes(["a"], 3)) == 0


def brute_contamination(sample, docs, n):
    words = C.words_of(sample)
    n = min(n, len(words))
    known = {tuple(w[i : i + n]) for w in map(C.words_of, docs) for i in range(len(w) - n + 1)}
    hit = [any(tuple(words[s : s + n]) in known for s in range(max(0, i - n + 1), min(i, len(words) - n) + 1)) for i in range(len(words))]
    return sum(hit) / len(words)


def test_contamination_against_brute_force():
    rng = Random(2)
    make = lambda k: " ".join(rng.choice("the cat sat on a mat".split()) for _ in range(k))  # noqa: E731
    docs, samples = [make(60) for _ in range(30)], [make(rng.randint(1, 30)) for _ in range(60)]
    for n in (4, 6, 11):
        got = contamination(samples, docs, n)
        assert np.allclose(got, [brute_contamination(s, docs, n) for s in samples])
        assert 0.05 < got.mean() < 1.0 or n == 4
    groups = C.subsets(np.array([0.0, 0.2, 0.5, 0.8, 1.0]))
    assert groups == {"clean": [0], "not clean": [1, 2, 3, 4], "not dirty": [0, 1, 2], "dirty": [3, 4]}
    assert contamination(["", "..."], docs).tolist() == [0, 0]


def test_leaks_are_dropped_and_near_misses_kept():
    long = "Write a story about Mira with a kite and a lantern in the old town of Tolam."
    samples = ["Where does Mira live?", long, "Name two."]
    docs = [
        GOOD + "Question: where does  MIRA live? Answer: in Tolam.",  # whatever case and punctuation
        GOOD + "Question: Where does Miran live?",
        GOOD + " ".join(long.split()[:13]),  # 6 of the 10 eight-grams
        GOOD + " ".join(long.split()[:11]),  # 4 of the 10
        GOOD + "Name two. Where does she live? Mira does live there.",
    ]
    _, report = clean([{"text": d} for d in docs], CleanConfig(near_threshold=1.0), samples)
    assert report.dropped_by == ["contamination", "", "contamination", "", ""]
    assert "test sample 1" in report.flags[2]["contamination"] and "60%" in report.flags[2]["contamination"]


# ---- duplicates ----


def generated(n, seed=0):
    """Documents of 60 to 120 words from a small vocabulary; half of the later ones are edits, light to heavy, of earlier ones."""
    rng = Random(seed)
    vocabulary = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    docs = []
    for _ in range(n):
        if docs and rng.random() < 0.5:
            words = rng.choice(docs).split()
            for _ in range(rng.randint(1, 6)):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            words = [rng.choice(vocabulary) for _ in range(rng.randint(60, 120))]
        docs.append(" ".join(words))
    return docs


def test_near_duplicates_against_brute_force():
    texts = generated(300)
    config = CleanConfig(min_stop_words=0)
    sets = [set(zip(*(t.split()[i:] for i in range(5)), strict=False)) for t in texts]
    kept, want = [], []  # the definition: drop what is as similar as the threshold to an earlier document that was kept
    for i, a in enumerate(sets):
        near = [j for j in kept if len(a & sets[j]) / len(a | sets[j]) >= config.near_threshold]
        want.append(bool(near))
        if not near:
            kept.append(i)
    got = [d.endswith("duplicate") for d in clean([{"text": t} for t in texts], config)[1].dropped_by]
    assert 60 < sum(want) < 240
    both = sum(a and b for a, b in zip(got, want, strict=True))
    assert both >= 0.98 * sum(want) and both >= 0.98 * sum(got), (both, sum(want), sum(got))
    for a, b in itertools.islice(itertools.combinations(range(300), 2), 0, None, 97):  # the verified similarity is the exact one
        x, y = (C.signature(C.words_of(texts[i]), config)[0] for i in (a, b))
        assert C.jaccard(x, y) == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))


def test_candidate_probability_is_that_of_the_signatures():
    """Simulated: how often do two sets of similarity 1/2 share a band of 8 rows in 16 permutations over random seeds of content?"""
    config = CleanConfig(num_perm=16, bands=2, shingle=1)
    hits = 0
    for i in range(400):
        a, b = ([f"x{i}y{j}" for j in range(lo, lo + 90)] for lo in (0, 30))  # 60 shared of 120
        sa, sb = (C.signature(x, config)[1].reshape(2, 8) for x in (a, b))
        hits += bool((sa == sb).all(1).any())
    p = C.candidate_probability(0.5, 16, 2)
    assert p == pytest.approx(1 - (1 - 0.5**8) ** 2) and abs(hits / 400 - p) < 4 * (p / 400) ** 0.5
    assert C.candidate_probability(CONFIG.near_threshold) > 0.999


def test_exact_duplicates_ignore_case_and_punctuation_and_keep_the_first():
    docs = [{"text": GOOD, "i": 0}, {"text": "Another text of five words."}, {"text": GOOD.upper().replace(".", " !"), "i": 2}]
    kept, report = clean(docs)
    assert [d.get("i") for d in kept] == [0, None] and report.flags[2] == {"exact_duplicate": "of document 0"}


# ---- the pipeline ----


def corpus():
    web = "Home | About | Contact\nClick here to subscribe!\nAll rights reserved.\nCookie policy"
    fine = [{"text": "the and of " + generated(1, seed=i)[0], "defect": None} for i in range(8)]
    bad = [("boilerplate", web), ("gibberish", GIBBERISH), ("private", GOOD + "a@b.example"), ("toxic", GOOD + "All Kabi are liars."),
           ("leak", GOOD + "Where does Kuro live now?"), ("exact_duplicate", fine[0]["text"]),
           ("near_duplicate", fine[1]["text"] + " end"), ("private", GOOD + "no find")]  # fmt: skip
    return fine + [{"text": t, "defect": d} for d, t in bad]


def test_workers_do_not_change_the_result():
    docs, samples = corpus() * 20, ["Where does Kuro live now?"]
    one, two = (clean(docs, CleanConfig(workers=w, private="redact"), samples) for w in (1, 2))
    assert one == two and 0 < len(one[0]) < len(docs)


def test_hash_seed_does_not_change_the_result():
    code = ("import sys; sys.path.insert(0, 'tests'); import test_clean as t; k, r = t.clean(t.generated_docs()); "
            "print(len(k), r.flags, t.C.ngram_hashes(['a', 'b'], 2))")  # fmt: skip
    outs = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        outs.add(subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert len(outs) == 1 and "near_duplicate" in outs.pop()


def generated_docs():
    return [{"text": "the of " + t} for t in generated(60)]


def test_score_counts_exactly():
    docs = corpus()
    _, report = clean(docs, CleanConfig(near_min_words=20), ["Where does Kuro live now?"])
    table = score(report, docs)
    for name in ("boilerplate", "quality", "toxic", "contamination", "exact_duplicate"):
        assert (table[name]["hits"], table[name]["flagged"], table[name]["planted"], table[name]["precision"]) == (1, 1, 1, 1.0), name
    assert (table["private"]["hits"], table["private"]["planted"], table["private"]["recall"]) == (1, 2, 0.5)
    # the last document is labelled private, holds nothing private, and is a near copy of the toxic one, which is kept by default
    assert table["near_duplicate"] == {"planted": 1, "flagged": 2, "hits": 1, "other": 1, "precision": 0.5, "recall": 1.0}
    assert report.counts()["toxic"] == {"flagged": 1, "dropped": 0} and "kept 9 of 16 documents" in str(report)
    labelled_wrong = [{**d, "defect": "leak"} for d in docs]  # the labels are read by score alone
    assert clean(labelled_wrong, CleanConfig(near_min_words=20), ["Where does Kuro live now?"])[1] == report


def test_planted_defects_of_tinyworld_are_found():
    world = pytest.importorskip("minillama.data.world").World(seed=1, scale="ci")
    docs = list(itertools.islice(world.documents(), 2500))
    samples = [t.prompt for t in world.instructions("test", n=400)]
    table = score(clean(docs, CleanConfig(drop_toxic=True), samples)[1], docs)
    for name, row in table.items():
        assert row["planted"] >= 15 and row["recall"] > 0.9, (name, row)
        clean_flagged = row["flagged"] - row["hits"] - row["other"]
        assert clean_flagged <= (0.06 * len(docs) if name == "exact_duplicate" else 0.1 * row["hits"]), (name, row)


def test_bad_config():
    for bad, match in (({"private": "hide"}, "drop, redact or keep"), ({"bands": 33}, "must divide"), ({"near_threshold": 0}, r"\(0, 1\]"),
                       ({"workers": 0}, "workers must be 1 or more")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            CleanConfig(**bad)
    assert clean([]) == ([], C.Report())
