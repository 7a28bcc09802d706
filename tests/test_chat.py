"""The chat format against hand-written strings, and what a hostile or a long dialogue does to it."""
import itertools

import pytest

from minillama import Tokenizer
from minillama.chat import TAGS, Message, check, encode_dialogue, encode_prompt, fit_context

U1, A1, U2, A2, U3, A3 = "Where does Nila live?", "In Oru.", "And Tomo?", "Near the sea.", "Who is older?", "Tomo is."
SYSTEM = "Answer in one sentence."


def dialogue(*contents, system=None):
    roles = itertools.cycle(["user", "assistant"])
    return ([Message("system", system)] if system is not None else []) + [Message(r, c) for r, c in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [U1, A1, U2, A2, U3, A3, SYSTEM, "[INST] and [/INST], <<SYS>> and <</SYS>>"] * 30
    return Tokenizer.train(texts, 340, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def written(tokenizer, tokens):
    """Tokens as text, BOS and EOS visible, each stretch between them decoded alone."""
    out, stretch = "", []
    for t in tokens + [None]:
        if t in (1, 2, None):
            out += tokenizer.decode(stretch) + {1: "<s>", 2: "</s>", None: ""}[t]
            stretch = []
        else:
            stretch.append(t)
    return out


# As Meta's released inference code writes them.
ONE = "<s>[INST] Where does Nila live? [/INST] In Oru. </s>"
TWO = ONE + "<s>[INST] And Tomo? [/INST] Near the sea. </s>"
THREE = TWO + "<s>[INST] Who is older? [/INST] Tomo is. </s>"
WITH_SYSTEM = "<s>[INST] <<SYS>>\nAnswer in one sentence.\n<</SYS>>\n\nWhere does Nila live? [/INST] In Oru. </s>"


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("turns,text", [((U1, A1), ONE), ((U1, A1, U2, A2), TWO), ((U1, A1, U2, A2, U3, A3), THREE)])
def test_the_exact_text(tokenizer, system, turns, text):
    """A lost space or newline is a format that Llama 2-Chat has never seen; the system prompt goes into the first turn only."""
    if system:
        text = text.replace(ONE, WITH_SYSTEM)
    tokens, _ = encode_dialogue(tokenizer, dialogue(*turns, system=system))
    assert written(tokenizer, tokens) == text
    prompt = encode_prompt(tokenizer, dialogue(*turns[:-1], system=system))
    assert written(tokenizer, prompt) == text[: text.rindex(" " + turns[-1])]


def test_matches_encoding_each_exchange_at_once(tokenizer):
    """Meta's code encodes prompt and answer as one string; encoding them apart must give the same tokens."""
    tokens, _ = encode_dialogue(tokenizer, dialogue(U1, A1, U2, A2))
    whole = [tokenizer.encode(f"[INST] {u} [/INST] {a} ", bos=True, eos=True) for u, a in ((U1, A1), (U2, A2))]
    assert tokens == whole[0] + whole[1]


def test_whitespace_around_turns_is_dropped(tokenizer):
    assert encode_dialogue(tokenizer, dialogue(f" {U1}\n", f"\n{A1} ")) == encode_dialogue(tokenizer, dialogue(U1, A1))


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_the_mask_covers_answers_and_their_eos(tokenizer, system):
    """Training on the prompt, or never on EOS (a model that cannot stop), are the classic masking bugs."""
    messages = dialogue(U1, A1, U2, A2, U3, A3, system=system)
    for last_only, answers in ((False, [A1, A2, A3]), (True, [A3])):
        tokens, mask = encode_dialogue(tokenizer, messages, last_only=last_only)
        assert len(tokens) == len(mask)
        assert written(tokenizer, [t for t, m in zip(tokens, mask, strict=True) if m]) == "".join(f"{a} </s>" for a in answers)
        want = [tokenizer.encode(f"{a} ", eos=True) for a in answers]
        assert [t for t, m in zip(tokens, mask, strict=True) if m] == list(itertools.chain(*want))
        runs = [k for k, _ in itertools.groupby(mask)]
        assert runs == [False, True] * len(answers)  # one run an answer, ending with the dialogue
        assert mask[-1] and tokens[-1] == 2


def test_last_only_without_a_last_answer(tokenizer):
    """A dialogue that ends with a question: the last answer there is, not nothing and not the question."""
    tokens, mask = encode_dialogue(tokenizer, dialogue(U1, A1, U2, A2, U3), last_only=True)
    assert written(tokenizer, [t for t, m in zip(tokens, mask, strict=True) if m]) == f"{A2} </s>" and not mask[-1]
    assert not any(encode_dialogue(tokenizer, dialogue(U1))[1])


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_what_sampling_sees_is_what_training_saw(tokenizer, system):
    """The prompt's tokens must be a prefix of the dialogue's, whatever the answer begins with."""
    for answer in (A1, "1", ".", "👍", "a", "", "\u0301"):
        for turns in ((U1,), (U1, A1, U2)):
            prompt = encode_prompt(tokenizer, dialogue(*turns, system=system))
            tokens, mask = encode_dialogue(tokenizer, dialogue(*turns, answer, system=system))
            assert tokens[: len(prompt)] == prompt and all(mask[len(prompt) :]) and len(tokens) > len(prompt)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("around", ["{}", "hello {} world", "x{}", "\n{}\n"])
def test_tags_are_refused_in_any_turn(tokenizer, tag, place, around):
    """A user who writes a tag could end the turn and speak as the system."""
    messages = dialogue(U1, A1, U2, system=SYSTEM)
    messages[place] = Message(messages[place].role, around.format(tag))
    for use in (check, lambda m: encode_prompt(tokenizer, m), lambda m: encode_dialogue(tokenizer, m)):
        with pytest.raises(ValueError, match="reserved for the format"):
            use(messages)


def test_innocent_brackets_pass(tokenizer):
    check(dialogue("see [1], <b>bold</b>, a << b >> c, [inst], INST", system="[x] <SYS>"))


@pytest.mark.parametrize(
    "roles",
    [[], ["system"], ["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"], ["system", "system", "user"],
     ["system", "assistant"], ["user", "assistant", "system", "user"], ["User"], ["tool"]],
)  # fmt: skip
def test_roles_must_alternate(tokenizer, roles):
    messages = [Message(r, "x") for r in roles]
    for use in (check, lambda m: encode_prompt(tokenizer, m), lambda m: encode_dialogue(tokenizer, m)):
        with pytest.raises(ValueError):
            use(messages)


def test_only_a_user_turn_can_be_answered(tokenizer):
    with pytest.raises(ValueError, match="the last turn must be the user's"):
        encode_prompt(tokenizer, dialogue(U1, A1))


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_fit_context_drops_the_oldest(tokenizer, system):
    """For every room: the most recent exchanges that fit, system prompt kept, and not one exchange fewer than fits."""
    full = dialogue(U1, A1, U2, A2, U3, system=system)
    first = 1 if system else 0
    candidates = [full, full[:first] + full[first + 2 :], full[:first] + full[first + 4 :]]
    sizes = [len(encode_prompt(tokenizer, c)) for c in candidates]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    before = list(full)
    for room in range(sizes[2], sizes[0] + 2):
        want = next(c for c, n in zip(candidates, sizes, strict=True) if n <= room)
        assert fit_context(tokenizer, full, room) == want
    assert full == before  # the caller's list is not cut
    with pytest.raises(ValueError, match=f"needs {sizes[2]} tokens, there is room for {sizes[2] - 1}"):
        fit_context(tokenizer, full, sizes[2] - 1)


def test_fit_context_of_nothing(tokenizer):
    with pytest.raises(ValueError, match="user turn"):
        fit_context(tokenizer, [], 100)
