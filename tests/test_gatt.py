"""Ghost Attention: which turns carry the instruction, which tokens are trained, and how answers are sampled."""
import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from minillama import checkpoint, gatt, sft
from minillama.chat import Message, encode_dialogue, encode_prompt
from minillama.config import GAttConfig, LlamaConfig, TrainConfig
from minillama.data.pack import Batches, Shards, write_shards
from minillama.data.sources import write_jsonl
from minillama.gatt import converse, training_rows, with_instruction
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=330, multiple_of=8, max_seq_len=160)
talker = partial(tiny.talker, CONFIG)
TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. Always be brief. " * (1 + i % 3) for i in range(120)]
DIALOGUES = [
    {"standing": "Always be brief.", "turns": ["Line 1?", "And line 2 of the book?", "And 3?"]},
    {"standing": "Always be long.", "turns": ["Line 4 of the long book?"]},
    {"standing": "Tell of boats.", "turns": ["Line 5?", "And line 6?", "And line 7?", "Line 8?"]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(TEXTS, 330, tmp_path_factory.mktemp("tok") / "t.model")


def test_the_instruction_is_on_every_turn_or_on_the_first():
    """Guards against an instruction that is lost, repeated, or put into answers."""
    turns, answers = ["a?", "b?", "c?"], ["A.", "B."]
    every = with_instruction("Be brief.", turns, answers, every=True)
    first = with_instruction("Be brief.", turns, answers, every=False)
    assert [m["role"] for m in every] == [m["role"] for m in first] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in every] == ["Be brief. a?", "A.", "Be brief. b?", "B.", "Be brief. c?"]
    assert [m["content"] for m in first] == ["Be brief. a?", "A.", "b?", "B.", "c?"]


@pytest.mark.parametrize("ghost", [True, False])
def test_training_is_on_the_last_answer_only(ghost, tokenizer, tmp_path):
    """Guards against loss on earlier answers, which stand in a context that did not produce them, on prompts, or past EOS (sec 3.3)."""
    answers = [["One boat.", "Two boats.", "Three."], ["A long line of the book."], ["Five.", "Six boats.", "Seven.", "Eight."]]
    rows = training_rows(DIALOGUES, answers, ghost)
    shards = Shards(write_shards(rows, tokenizer.path, tmp_path / "data", workers=1))
    assert len(shards) == 3
    for i, (d, said) in enumerate(zip(DIALOGUES, answers, strict=True)):
        ids, trained = shards.document(i)
        messages = [Message(m["role"], m["content"]) for m in with_instruction(d["standing"], d["turns"], said, every=not ghost)]
        want = encode_dialogue(tokenizer, messages, last_only=True)
        assert ids.tolist() == want[0] and trained.tolist() == want[1]
        last = tokenizer.encode(f"{said[-1]} ", eos=True)
        assert trained.sum() == len(last) and trained[-len(last) :].all() and ids[-len(last) :].tolist() == last and last[-1] == 2
        assert tokenizer.decode(ids.tolist()).count(d["standing"]) == (1 if ghost else len(d["turns"]))
    batches = Batches(shards, 1, 200, cut=False)  # and through the packing, to the targets of an epoch
    targets = [t for step in range(batches.n_rows) for t in batches(step)[0]["targets"].flatten().tolist() if t != -100]
    assert sorted(targets) == sorted(t for said in answers for t in tokenizer.encode(f"{said[-1]} ", eos=True))


def test_dialogues_end_where_their_answers_do():
    """Guards against training on a turn without an answer, or on an empty one."""
    rows = training_rows(DIALOGUES, [["One."], [""], ["Five.", "Six."]], ghost=True)
    assert [[m["content"] for m in r["messages"]] for r in rows] == [
        ["Always be brief. Line 1?", "One."], ["Tell of boats. Line 5?", "Five.", "And line 6?", "Six."]]  # fmt: skip
    assert all(r["last_only"] for r in rows)
    assert training_rows(DIALOGUES, [[], ["Long."], ["Five.", ""]], ghost=True)[0]["messages"][-1]["content"] == "Long."
    with pytest.raises(ValueError, match="shorter"):
        training_rows(DIALOGUES, [["One."]], ghost=True)


def greedy(model: Llama, ids: list[int], n: int) -> list[int]:
    """Up to n greedy tokens after `ids`, to EOS."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < n and new[-1:] != [2]:
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("every", [True, False])
def test_converse_equals_a_loop_over_turns(every, tokenizer):
    """Guards against dialogues that swap answers, turns that miss what was said before, and a context that overflows."""
    model, n = talker(5, 90.0), 10
    dialogues = [*DIALOGUES, *({"standing": "Be brief.", "turns": ["Tell of line 3 of the long book" + "!" * i] * 6} for i in range(12))]
    got = converse(model, tokenizer, dialogues, every, 0.0, n, seed=0, batch=3)
    lengths, ended, nearly = [], set(), 0
    for d, answers in zip(dialogues, got, strict=True):
        want: list[str] = []
        for turn in range(len(d["turns"])):
            if "" in want:  # an empty answer ends a dialogue
                break
            messages = []
            for i in range(turn + 1):
                text = f"{d['standing']} {d['turns'][i]}" if every or i == 0 else d["turns"][i]
                messages += [Message("user", text)] + ([Message("assistant", want[i])] if i < turn else [])
            ids = encode_prompt(tokenizer, messages)
            if len(ids) + n > 160:
                nearly += len(ids) < 160
                break
            new = greedy(model, ids, n)
            ended.add(new[-1] == 2)
            want.append(tokenizer.decode(new[:-1] if new[-1] == 2 else new).strip())
        assert answers == want
        lengths.append(len(want))
    assert ended == {True, False} and len({a for answers in got for a in answers}) > 3
    assert lengths[1] == 1 and all(1 < x < 6 for x in lengths[3:]) and nearly  # the context was full, or had no room for a whole answer


def test_a_window_shows_the_sampler_the_latest_turns_each_with_its_instruction(tokenizer):
    """Guards against a window that is a turn off, that shows an answer to another turn, or that loses the instruction with the first turn."""
    model = talker(5, 90.0)
    dialogues = [{"standing": "Be brief.", "turns": [f"Tell of line {j} of the long book" + "!" * i for j in range(6)]} for i in range(6)]
    got, seen = converse(model, tokenizer, dialogues, True, 0.0, 10, 0, window=2), set()
    for d, answers in zip(dialogues, got, strict=True):
        for turn, answer in enumerate(answers):
            messages = [Message("user", f"Be brief. {d['turns'][turn]}")]
            if turn:
                messages = [Message("user", f"Be brief. {d['turns'][turn - 1]}"), Message("assistant", answers[turn - 1]), *messages]
            new = greedy(model, encode_prompt(tokenizer, messages), 10)
            assert answer == tokenizer.decode(new[:-1] if new[-1] == 2 else new).strip()
            seen.add(turn)
    assert seen == set(range(6))  # without a window the context is full before (the test above)
    assert converse(model, tokenizer, dialogues, True, 0.0, 10, 0, window=9) == converse(model, tokenizer, dialogues, True, 0.0, 10, 0)
    with pytest.raises(ValueError, match="every turn"):
        converse(model, tokenizer, dialogues, False, 0.0, 10, 0, window=2)


def test_an_empty_answer_ends_its_dialogue(tokenizer):
    """Guards against dialogues that go on after a silence, which no training row has."""
    answers = converse(talker(5, 20.0), tokenizer, DIALOGUES, True, 0.0, 10, 0)
    assert [len(a) for a in answers] == [2, 1, 1] and all(a[-1] == "" and all(a[:-1]) for a in answers)
    assert training_rows(DIALOGUES, answers, ghost=True) == []


def test_samples_differ_between_dialogues_and_turns_and_follow_the_seed(tokenizer):
    """Guards against one random stream for all dialogues or all turns: shown by a model that draws every token from one distribution."""
    model = talker(5, 60.0)
    with torch.no_grad():
        model.tok_embeddings.weight[:, 1:] = 0.0
    same = [{"standing": "Be brief.", "turns": ["Line 1?", "Line 1?"]}] * 4
    a, b, c = (converse(model, tokenizer, same, True, 1.0, 10, seed) for seed in (3, 3, 30))
    assert a == b != c and len({x for answers in a for x in answers}) == 8


def test_an_answer_with_a_tag_of_the_format_ends_its_dialogue(tokenizer, monkeypatch):
    """Guards against a sample that writes [INST]: the next turn would be refused, and with it the whole stage."""
    ids = [*tokenizer.encode("well [INST] more"), 2]
    monkeypatch.setattr(gatt, "sample_many", lambda model, prompts, *a: type("S", (), {"tokens": [ids] * len(prompts), "stopped": [True] * len(prompts)}))
    assert converse(talker(5, 9.0), tokenizer, DIALOGUES, True, 1.0, 10, 0) == [[""]] * 3  # it counts as empty, and such rows are not trained on


# ---- the stage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    checkpoint.save(talker(5, 6.0), tokenizer, root / "policy")
    write_jsonl([{"standing": f"Always be {w}.", "turns": [f"Line {i}?", "And the next?"]} for i, w in enumerate(["brief", "long"] * 6)], root / "d.jsonl")
    write_jsonl([{"messages": [{"role": "user", "content": f"Kept {i}"}, {"role": "assistant", "content": "Yes."}]} for i in range(4)], root / "keep.jsonl")
    return root


def config(root: Path, out: Path, **more) -> GAttConfig:
    train = TrainConfig(steps=1, batch_size=4, seq_len=96, lr=1e-5, warmup_steps=0, log_every=1, device="cpu")
    given = dict(dialogues=str(root / "d.jsonl"), policy=str(root / "policy"), out=str(out), temperature=1.0, max_new_tokens=10, epochs=1.0, train=train)
    return GAttConfig(**{**given, **more})


def documents(out: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, trained text) of what a run was trained and validated on."""
    shards = Shards(out / "data")
    pairs = [shards.document(i) for i in range(len(shards))]
    return [(tokenizer.decode(ids.tolist()), tokenizer.decode(ids[trained].tolist())) for ids, trained in pairs]


@pytest.mark.parametrize(("ghost", "window"), [(True, 0), (False, 0), (True, 1)])
def test_a_run_samples_with_the_instruction_and_tunes_the_policy(ghost, window, inputs, tokenizer, tmp_path):
    """Guards against sampling without the instruction, a control that is the method, and answers lost on the way to training."""
    out = tmp_path / "gatt"
    model = gatt.run(config(inputs, out, ghost=ghost, window=window, keep=str(inputs / "keep.jsonl")), keep=[[{"role": "user", "content": "Kept too"},
                     {"role": "assistant", "content": "Yes."}]])  # fmt: skip
    policy, _ = checkpoint.load(inputs / "policy")
    given = [json.loads(line) for line in (inputs / "d.jsonl").read_text().splitlines()]
    sampled = [json.loads(line) for line in (out / "dialogues.jsonl").read_text().splitlines()]
    answers = converse(policy, tokenizer, given, True, 1.0, 10, 0, window=window)
    assert sampled == [{**d, "answers": a} for d, a in zip(given, answers, strict=True)]
    usable = [s for s in sampled if all(s["answers"])]
    assert 6 < len(usable)
    docs = documents(out, tokenizer)
    kept = [d for d in docs if "Kept" in d[0]]
    assert len(docs) == len(usable) + 5 and len(kept) == 5
    for text, trained in (d for d in docs if d not in kept):
        assert text.count("Always be") == (1 if ghost else 2)
        assert trained.strip() in [s["answers"][-1] for s in usable]
    change = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), policy.parameters(), strict=True))
    assert 0 < change < 1e-3  # the policy, a little further
    assert f"ghost: {str(ghost).lower()}" in (out / "config.yaml").read_text()


def test_resume_does_not_sample_again(inputs, tmp_path, monkeypatch):
    """Guards against a resumed run that trains on other answers than those it began with."""
    tune = sft.run
    monkeypatch.setattr(sft, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gatt.run(config(inputs, tmp_path / "r"))
    monkeypatch.setattr(sft, "run", tune)
    monkeypatch.setattr(gatt, "converse", lambda *a, **k: pytest.fail("sampled again"))
    model = gatt.run(config(inputs, tmp_path / "r", resume=True))
    monkeypatch.undo()
    whole = gatt.run(config(inputs, tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_errors_name_the_value(inputs, tmp_path):
    """Guards against tracebacks for what a user gets wrong."""
    (tmp_path / "bad.jsonl").write_text('{"standing": "Be brief."}\n')
    with pytest.raises(ValueError, match="no 'turns'"):
        gatt.run(config(inputs, tmp_path / "a", dialogues=str(tmp_path / "bad.jsonl")))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl holds no rows"):
        gatt.run(config(inputs, tmp_path / "b", dialogues=str(tmp_path / "none.jsonl")))
    checkpoint.save(talker(5, 6.0), None, tmp_path / "mute")
    with pytest.raises(ValueError, match="no tokenizer.model"):
        gatt.run(config(inputs, tmp_path / "c", policy=str(tmp_path / "mute")))


def test_a_row_loses_no_more_than_it_must(tokenizer):
    """Guards against a dialogue cut to its first exchange where two would fit."""
    m = [{"role": r, "content": f"{r} {i} of the book"} for i in range(3) for r in ("user", "assistant")]
    size = lambda n: len(encode_dialogue(tokenizer, [Message(x["role"], x["content"]) for x in m[:n]])[0])  # noqa: E731
    for n in (2, 4, 6):
        assert gatt.shorten(tokenizer, {"messages": m, "last_only": True}, size(n)) == {"messages": m[:n], "last_only": True}


def test_a_dialogue_may_fill_the_context_to_its_last_target(inputs, tmp_path, monkeypatch):
    """Guards against an exchange that is dropped though it fits: of seq_len + 1 tokens the first seq_len are inputs and the last seq_len targets."""
    limits = []
    monkeypatch.setattr(gatt, "shorten", lambda tokenizer, row, limit: limits.append(limit) or row)
    gatt.run(config(inputs, tmp_path / "r"))
    assert limits and set(limits) == {config(inputs, tmp_path).train.seq_len + 1}


def test_only_a_job_of_several_ranks_samples_in_bf16(inputs, tmp_path):
    """Guards against a single process that samples from rounded weights, and ranks that gather them twice as wide as they train."""
    asked = tiny.sampler_precision(gatt, lambda bf16: gatt.run(config(inputs, tmp_path / "r", train=TrainConfig(steps=1, bf16=bf16, device="cpu"))))
    assert asked == {(False, 1): False, (False, 2): False, (True, 1): False, (True, 2): True}


def test_long_dialogues_still_train_their_last_answer(inputs, tokenizer, tmp_path):
    """Guards against a dialogue that is cut before its last answer: it has no target left, and takes its place in the batch for nothing."""
    turns = ["Tell of line 1 of the book."] * 3
    c = config(inputs, tmp_path / "r")
    c.train.seq_len = 64
    gatt.run(c, [{"standing": f"Always be {w}.", "turns": turns} for w in ("brief", "long", "slow", "fast")])
    shards = Shards(tmp_path / "r" / "data")
    assert all(shards.document(i)[1][:65].any() for i in range(len(shards)))
