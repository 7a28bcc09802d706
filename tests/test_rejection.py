"""Rejection sampling: what is drawn, what is scored, what is chosen, and what the tuned model starts from."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny
import torch

from minillama import checkpoint, rejection, sft
from minillama.chat import Message, encode_prompt
from minillama.config import LlamaConfig, RejectConfig, TrainConfig
from minillama.data.pack import Shards
from minillama.data.sources import read_prompts, write_jsonl
from minillama.generate import sample
from minillama.model import Llama
from minillama.rejection import best_of, choose, draw, temperature_sweep
from minillama.reward import Gated, stack
from minillama.tokenizer import Tokenizer

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=330, multiple_of=8, max_seq_len=96)
talker = partial(tiny.talker, CONFIG)
save_reward = partial(tiny.save_reward, CONFIG)
TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 4) for i in range(120)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model, a policy, two reward models, and prompts of several lengths, in files."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(TEXTS, 330, root / "t.model")
    checkpoint.save(Llama(CONFIG).init_weights(1), tokenizer, root / "base")
    checkpoint.save(talker(2, 8.0), tokenizer, root / "policy")
    save_reward(root / "helpful", 3, tokenizer), save_reward(root / "safety", 4, tokenizer)
    rows = [{"messages": [{"role": "user", "content": f"Line {i}? " * (1 + i % 3)}], "safety": i % 2 == 1, "task": i} for i in range(8)]
    write_jsonl(rows, root / "prompts.jsonl")
    return root, tokenizer


def gated_reward(root: Path) -> Gated:
    return Gated(root / "helpful", root / "safety", gate=0.5)


# ---- prompts and samples ----------------------------------------------------------------------------------------------------


def test_prompts_lose_their_answer_and_keep_the_rest(tmp_path):
    """Guards against a gold answer that is left in the prompt, and against adversarial prompts whose mark is lost."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    write_jsonl([{"messages": turns, "safety": True, "task": 7}, {"messages": turns[:3]}, {"messages": turns[:1], "safety": False}], tmp_path / "p.jsonl")
    prompts = read_prompts(str(tmp_path / "p.jsonl"))
    assert [p["messages"] for p in prompts] == [turns[:3], turns[:3], turns[:1]]
    assert [p["safety"] for p in prompts] == [True, False, False] and prompts[0]["task"] == 7
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for name in ("none", "pairs"):
        with pytest.raises(ValueError, match=name):
            read_prompts(str(tmp_path / f"{name}.jsonl"))


def test_draw_scores_the_sampled_tokens(models):
    """Guards against samples that go to another prompt, rewards of re-encoded text or without EOS, and copies instead of K samples."""
    root, tokenizer = models
    policy, _ = checkpoint.load(root / "policy")
    reward, prompts, k = gated_reward(root), read_prompts(str(root / "prompts.jsonl")), 5
    got = draw(policy, tokenizer, prompts, reward, k, 1.0, 12, seed=6, batch=7)
    assert len(got) == 8 and all(len(row) == k for row in got)
    assert sum(len({s["answer"] for s in row}) for row in got) > 0.9 * 8 * k
    asked = [encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in p["messages"]]) for p in prompts]
    order = sorted((i for i in range(8) for _ in range(k)), key=lambda i: len(asked[i]))  # rows are numbered by length
    drawn = sample(policy, [asked[i] for i in order], 12, 1.0, 1.0, 6, [[2]], logprobs=False)
    left = {i: iter(got[i]) for i in range(8)}
    ended = 0
    for i, ids, stopped in zip(order, drawn.tokens, drawn.stopped, strict=True):
        s, row = next(left[i]), [(asked[i] + ids, len(asked[i]))]
        answer = tokenizer.decode(ids[:-1] if stopped else ids).strip()
        with torch.no_grad():
            h, r = (float(m.rewards(**stack(row))) for m in (reward.helpful, reward.safety))
        assert s["answer"] == answer and s["finished"] == (stopped and answer != "")
        assert (s["helpful"], s["safety"]) == pytest.approx((h, r), abs=1e-5)
        assert s["reward"] == pytest.approx(r if prompts[i]["safety"] or 1 / (1 + np.exp(-r)) < 0.5 else h, abs=1e-5)
        ended += stopped
    assert 10 < ended < 8 * k  # both kinds were seen


def test_unfinished_and_empty_answers_are_marked(models):
    """Guards against learning answers that were cut, or no answer at all."""
    root, tokenizer = models
    reward, prompts = Gated(root / "helpful"), read_prompts(str(root / "prompts.jsonl"))
    cut = draw(talker(2, 1e6), tokenizer, prompts, reward, 2, 1.0, 5, 0)
    empty = draw(talker(2, 1.0001), tokenizer, prompts, reward, 2, 1.0, 5, 0)
    assert not any(s["finished"] for row in cut + empty for s in row)
    assert all(s["answer"] == "" for row in empty for s in row) and sum(len(s["answer"]) > 1 for row in cut for s in row) > 12
    assert "safety" not in cut[0][0] and cut[0][0]["reward"] == cut[0][0]["helpful"]


def test_an_answer_with_a_tag_of_the_format_is_never_chosen(models, monkeypatch):
    """Guards against a sample that writes [INST]: the chat format refuses it, and the whole stage would end there."""
    root, tokenizer = models
    policy, _ = checkpoint.load(root / "policy")
    written = [[*tokenizer.encode(text), 2] for text in ("fine.", "well [INST] more [/INST]")]
    monkeypatch.setattr(rejection, "sample_many", lambda model, prompts, *a: type("S", (), {"tokens": written, "stopped": [True, True]}))
    (row,) = draw(policy, tokenizer, read_prompts(str(root / "prompts.jsonl"))[:1], Gated(root / "helpful"), 2, 1.0, 9, 0)
    assert [s["finished"] for s in row] == [True, False]


def test_choose_takes_the_best_that_ended():
    """Guards against the longest or the first, a random control that is not, and unfinished samples with a high reward."""
    samples = [{"reward": r, "finished": f} for r, f in ((1.0, True), (9.0, False), (3.0, True), (-2.0, True), (5.0, False))]
    assert choose(samples, "best", Random(0)) is samples[2]
    drawn = [samples.index(choose(samples, "random", Random(i))) for i in range(300)]
    assert set(drawn) == {0, 2, 3} and all(drawn.count(i) > 60 for i in (0, 2, 3))
    assert choose([s for s in samples if not s["finished"]], "best", Random(0)) is None
    assert choose([], "random", Random(0)) is None


def test_best_of_against_definitions():
    """Guards against a maximum over prompts instead of samples, and a mean in place of the median."""
    rewards = np.random.default_rng(0).normal(size=(30, 16))
    samples = [[{"reward": float(x)} for x in row] for row in rewards]
    table = best_of(samples, (1, 2, 3, 8, 16))
    for row in table:
        n = row["n"]
        medians = [(s[(n - 1) // 2] + s[n // 2]) / 2 for s in (sorted(r[:n]) for r in rewards.tolist())]
        assert row["median"] == pytest.approx(sum(medians) / 30) and row["prompts"] == 30
        assert row["max"] == pytest.approx(sum(max(r[:n]) for r in rewards.tolist()) / 30)
        s = sorted(x for r in rewards.tolist() for x in r[:n])
        assert row["overall"] == pytest.approx((s[15 * n - 1] + s[15 * n]) / 2)
    assert [r["max"] for r in table] == sorted(r["max"] for r in table) and table[-1]["max"] > table[0]["max"] + 1
    assert table[0]["max"] == table[0]["median"]
    # a seventh is bad, which pulls down the mean and not the median
    skewed = best_of([[{"reward": float(-9 if i % 7 == 0 else 1)} for i in range(p, p + 16)] for p in range(35)], (1, 16))
    assert skewed[1]["median"] - skewed[0]["median"] > 1 and skewed[1]["overall"] == skewed[0]["overall"] == 1


def test_the_temperature_sweep_draws_at_each_temperature(models):
    """Guards against a sweep that samples at one temperature: at 0 all samples are one, above it the best beats the median."""
    root, tokenizer = models
    policy, _ = checkpoint.load(root / "policy")
    reward, prompts = gated_reward(root), read_prompts(str(root / "prompts.jsonl"))
    table = temperature_sweep(policy, tokenizer, prompts, reward, (0.0, 0.7, 1.4), 4, 10, seed=3)
    assert [row["temperature"] for row in table] == [0.0, 0.7, 1.4] and all(row["n"] == 4 for row in table)
    assert table[0]["max"] == pytest.approx(table[0]["median"], abs=1e-6)
    for row in table[1:]:
        samples = draw(policy, tokenizer, prompts, reward, 4, row["temperature"], 10, 3)
        assert row["max"] == pytest.approx(np.mean([max(s["reward"] for s in r) for r in samples]), abs=1e-6)
        assert row["max"] > row["median"] + 0.1
    assert table[1]["max"] != table[2]["max"]


# ---- the stage --------------------------------------------------------------------------------------------------------------


def config(root: Path, out: Path, **more) -> RejectConfig:
    train = TrainConfig(steps=1, batch_size=4, seq_len=64, lr=1e-5, warmup_steps=0, log_every=1, device="cpu")
    given = dict(prompts=str(root / "prompts.jsonl"), policy=str(root / "policy"), init=str(root / "base"), helpful=str(root / "helpful"),
                 safety=str(root / "safety"), out=str(out), samples=4, max_new_tokens=12, epochs=1.0, train=train)  # fmt: skip
    return RejectConfig(**{**given, **more})


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def iteration(models, tmp_path_factory):
    """One iteration, with an earlier one's selection in its pool."""
    root, _ = models
    out = tmp_path_factory.mktemp("reject")
    earlier = [{"messages": [{"role": "user", "content": f"Earlier {i}"}, {"role": "assistant", "content": f"book {i}"}], "reward": 1.0} for i in range(5)]
    write_jsonl(earlier, out / "earlier.jsonl")
    return out / "run", rejection.run(config(root, out / "run", pool=[str(out / "earlier.jsonl")]))


def test_an_iteration_selects_the_best_sample_of_each_prompt(models, iteration):
    """Guards against a selection by another column, and prompts that lose their place."""
    root, _ = models
    out, _ = iteration
    prompts, samples, selected = read_prompts(str(root / "prompts.jsonl")), rows_of(out / "samples.jsonl"), rows_of(out / "selected.jsonl")
    assert [s["messages"] for s in samples] == [p["messages"] for p in prompts] and all(len(s["samples"]) == 4 for s in samples)
    want = []
    for p, row in zip(prompts, samples, strict=True):
        ended = [s for s in row["samples"] if s["finished"]]
        if ended:
            best = max(ended, key=lambda s: s["reward"])
            want.append({"messages": [*p["messages"], {"role": "assistant", "content": best["answer"]}], "reward": best["reward"]})
    assert selected == want and len(want) > 4
    assert any(max(r["samples"], key=lambda s: s["reward"]) is not max(r["samples"], key=lambda s: s["helpful"]) for r in samples)


def test_the_base_model_is_tuned_on_all_iterations(models, iteration):
    """Guards against tuning the policy further instead of the base model, and a pool that is not read."""
    root, tokenizer = models
    out, model = iteration
    base, _ = checkpoint.load(root / "base")
    policy, _ = checkpoint.load(root / "policy")
    far = lambda other: max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))  # noqa: E731
    assert 0 < far(base) < 1e-3 < 0.1 < far(policy)
    saved, _ = checkpoint.load(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    shards = Shards(out / "data")
    texts = [tokenizer.decode(shards.document(i)[0].tolist()) for i in range(len(shards))]
    assert len(texts) == len(rows_of(out / "selected.jsonl")) + 5
    assert sum("[INST] Earlier" in t for t in texts) == 5
    assert "samples: 4" in (out / "config.yaml").read_text()


def test_resume_does_not_sample_again(models, tmp_path, monkeypatch):
    """Guards against a resumed run that trains on other samples than those it began with."""
    root, _ = models
    tune = sft.run
    monkeypatch.setattr(sft, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rejection.run(config(root, tmp_path / "r"))
    before = (tmp_path / "r" / "selected.jsonl").read_bytes()
    monkeypatch.setattr(sft, "run", tune)
    monkeypatch.setattr(rejection, "draw", lambda *a, **k: pytest.fail("sampled again"))
    model = rejection.run(config(root, tmp_path / "r", resume=True))
    assert (tmp_path / "r" / "selected.jsonl").read_bytes() == before
    monkeypatch.undo()
    whole = rejection.run(config(root, tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("moment", ["drawing", "choosing", "selecting", "tuning"])
def test_kill_9_and_resume_gives_the_uninterrupted_weights(moment, models, tmp_path):
    """Guards against half a file of samples that counts as whole, and a resumed iteration that selects or learns something else: killed before the samples
    are there, between samples and selection, while the selection is written, and in a step of the tuning."""
    root, _ = models
    given = config(root, tmp_path / "out", epochs=2.0, train=TrainConfig(steps=1, batch_size=2, seq_len=64, lr=1e-4, warmup_steps=0, log_every=1, save_every=2,
                   device="cpu"))  # fmt: skip
    code = f"""
import importlib
import os
from minillama import rejection
from minillama.config import RejectConfig, TrainConfig
train = TrainConfig(**{ {k: v for k, v in vars(given.train).items() if k != "parallel"}!r})
config = RejectConfig(**{ {k: v for k, v in vars(given).items() if k != "train"}!r}, train=train)
where, name, after = {dict(drawing=("minillama.reward", "stack", 0), choosing=("minillama.rejection", "choose", 3), selecting=("os", "replace", 1),
                           tuning=("minillama.trainer", "append_metrics", 5))[moment]!r}
module, calls = importlib.import_module(where), []
real = getattr(module, name)
def deadly(*a, **k):
    calls.append(1)
    if len(calls) > after:
        os.kill(os.getpid(), 9)
    return real(*a, **k)
setattr(module, name, deadly)
rejection.run(config)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert process.returncode == -signal.SIGKILL, process.stderr
    files = ("samples.jsonl", "selected.jsonl", "checkpoint")
    there = tuple(name for name in files if (tmp_path / "out" / name).exists())
    assert there == files[: {"drawing": 0, "choosing": 1, "selecting": 1, "tuning": 3}[moment]]
    model = rejection.run(dataclasses.replace(given, resume=True))
    whole = rejection.run(dataclasses.replace(given, out=str(tmp_path / "whole")))
    for name in ("samples.jsonl", "selected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_the_random_control_is_as_good_as_any_sample(models, tmp_path, monkeypatch):
    """Guards against a control that also picks by reward."""
    root, _ = models
    monkeypatch.setattr(sft, "run", lambda config, items: items)
    rejection.run(config(root, tmp_path / "r", select="random", samples=8))
    places = []
    for samples, row in zip(rows_of(tmp_path / "r" / "samples.jsonl"), rows_of(tmp_path / "r" / "selected.jsonl"), strict=True):
        rewards = sorted(s["reward"] for s in samples["samples"] if s["finished"])
        places.append(rewards.index(row["reward"]) == len(rewards) - 1)
    assert sum(places) < len(places) - 2


def test_errors_name_the_value(models, tmp_path):
    """Guards against tracebacks for what a user gets wrong."""
    root, tokenizer = models
    for wrong, word in ((dict(select="worst"), "worst"), (dict(samples=0), "samples 0"), (dict(temperature=-1.0), "-1.0")):
        with pytest.raises(ValueError, match=word):
            RejectConfig(**wrong)
    other = Tokenizer.train([t.upper() for t in TEXTS], 330, tmp_path / "other.model")
    checkpoint.save(talker(2, 8.0), other, tmp_path / "foreign")
    with pytest.raises(ValueError, match="different tokenizers"):
        rejection.run(config(root, tmp_path / "a", policy=str(tmp_path / "foreign")))
    checkpoint.save(talker(2, 1e6), tokenizer, tmp_path / "endless")
    with pytest.raises(ValueError, match="ended within 3 tokens"):
        rejection.run(config(root, tmp_path / "b", policy=str(tmp_path / "endless"), max_new_tokens=3))
    with pytest.raises(ValueError, match="no reward model"):
        rejection.run(config(root, tmp_path / "c", helpful=str(root / "base")))


def test_a_finished_folder_is_not_overwritten(models, iteration, tmp_path):
    """Guards against a second run that replaces the first one's samples before it is refused."""
    root, _ = models
    out = Path(shutil.copytree(iteration[0], tmp_path / "run"))
    before = (out / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        rejection.run(config(root, out, samples=2))
    assert (out / "samples.jsonl").read_bytes() == before
