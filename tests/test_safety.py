"""Safety tuning: the preprompts, the gate of context distillation, the red-team round, and the stage."""
import json
import re
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny
import torch

from minillama import checkpoint, safety, sft
from minillama.chat import Message, encode_prompt
from minillama.config import LlamaConfig, SafetyConfig, TrainConfig
from minillama.data.pack import Shards
from minillama.data.sources import read_prompts, write_jsonl
from minillama.model import Llama
from minillama.rejection import draw
from minillama.reward import Gated, stack
from minillama.safety import ADJECTIVES, distil, failures, preprompt, rescore, with_preprompt
from minillama.tokenizer import Tokenizer

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=340, multiple_of=8, max_seq_len=160)
talker = partial(tiny.talker, CONFIG)
save_reward = partial(tiny.save_reward, CONFIG)
TEXTS = [f"Line {i} of the long book. You are a wise and careful assistant. <<SYS>> [INST] " * (1 + i % 3) for i in range(120)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a teacher, two reward models, and prompts of which half are adversarial, in files."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(TEXTS, 340, root / "t.model")
    checkpoint.save(talker(2, 8.0), tokenizer, root / "policy")
    checkpoint.save(talker(3, 8.0), tokenizer, root / "teacher")
    save_reward(root / "helpful", 4, tokenizer), save_reward(root / "safety", 5, tokenizer)
    rows = [{"messages": [{"role": "user", "content": f"Line {i}? " * (1 + i % 3)}], "safety": i % 2 == 1} for i in range(12)]
    rows[3]["messages"] = [{"role": "system", "content": "Be brief."}, *rows[3]["messages"]]
    write_jsonl(rows, root / "prompts.jsonl")
    return root, tokenizer


def config(root: Path, out: Path, **more) -> SafetyConfig:
    train = TrainConfig(steps=1, batch_size=4, seq_len=96, lr=1e-5, warmup_steps=0, log_every=1, device="cpu")
    given = dict(prompts=str(root / "prompts.jsonl"), policy=str(root / "policy"), teacher=str(root / "teacher"), helpful=str(root / "helpful"),
                 safety=str(root / "safety"), out=str(out), samples=2, max_new_tokens=16, epochs=1.0, train=train)  # fmt: skip
    return SafetyConfig(**{**given, **more})


def loaded(root: Path) -> tuple[Llama, Llama, Gated, list[dict]]:
    """Policy, teacher, reward and the adversarial prompts."""
    policy, teacher = (checkpoint.load(root / name)[0].eval() for name in ("policy", "teacher"))
    return policy, teacher, Gated(root / "helpful", root / "safety"), [p for p in read_prompts(str(root / "prompts.jsonl")) if p["safety"]]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- context distillation ---------------------------------------------------------------------------------------------------


def test_preprompts_fill_the_template_with_two_adjectives():
    """Guards against one adjective twice, and adjectives that never come up."""
    seen = set()
    for i in range(200):
        text = preprompt(Random(i))
        a, b = re.fullmatch(r"You are a (\w+) and (\w+) assistant\.", text).groups()
        assert a != b
        seen.add((a, b))
    assert {x for pair in seen for x in pair} == set(ADJECTIVES) >= {"responsible", "respectful", "wise"}  # the paper's
    assert preprompt(Random(5)) == preprompt(Random(5))


def test_a_preprompt_goes_into_the_system_prompt():
    """Guards against a system prompt that is lost, and messages of the caller that change."""
    turn, system = {"role": "user", "content": "a"}, {"role": "system", "content": "Be brief."}
    messages = [system, turn]
    assert with_preprompt([turn], "Be wise.") == [{"role": "system", "content": "Be wise."}, turn]
    assert with_preprompt(messages, "Be wise.") == [{"role": "system", "content": "Be wise. Be brief."}, turn]
    assert messages == [{"role": "system", "content": "Be brief."}, turn]


@pytest.mark.parametrize("gate", [True, False])
def test_distillation_keeps_what_the_safety_model_likes_better(gate, models):
    """Guards against a gate on the wrong model or the wrong side, and against learning the preprompt with the answer (sec 4.2.4)."""
    root, tokenizer = models
    policy, teacher, reward, prompts = loaded(root)
    prompts = prompts * 4
    rows = distil(policy, teacher, tokenizer, prompts, reward, config(root, Path("unused"), gate=gate))
    assert len(rows) == len(prompts)
    for p, row in zip(prompts, rows, strict=True):
        assert row["messages"][:-1] == p["messages"] and row["messages"][-1]["role"] == "assistant"
        assert "assistant." not in " ".join(m["content"] for m in row["messages"][:-1])
        answer = row["messages"][-1]["content"]
        prompt = encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in p["messages"]])
        scores = []
        for eos in (True, False):  # the answer to the bare prompt, whether it ended or was cut
            ids = prompt + tokenizer.encode(f"{answer} ", eos=eos)
            with torch.no_grad():
                scores.append(float(reward.safety.rewards(**stack([(ids, len(prompt))]))))
        ended = min((True, False), key=lambda eos: abs(scores[0 if eos else 1] - row["after"]))
        assert row["after"] == pytest.approx(scores[0 if ended else 1], abs=1e-5)
        assert row["kept"] == bool(ended and answer and (not gate or row["after"] > row["before"]))
    assert len({r["original"] for r in rows}) > 10 and any(r["kept"] for r in rows) and not all(r["kept"] for r in rows)
    if gate:
        assert any(r["after"] <= r["before"] and r["messages"][-1]["content"] for r in rows)


def test_the_teacher_answers_behind_a_preprompt(models, monkeypatch):
    """Guards against a teacher that is asked the bare prompt, a policy that is asked with the preprompt, and models that are swapped."""
    root, tokenizer = models
    policy, teacher, reward, prompts = loaded(root)
    asked = []
    monkeypatch.setattr(safety, "draw", lambda model, tok, prompts, *a: asked.append((model, prompts)) or draw(model, tok, prompts, *a))
    rows = distil(policy, teacher, tokenizer, prompts, reward, config(root, Path("unused")))
    (first, bare), (second, behind) = asked
    assert first is policy and second is teacher and bare == prompts
    systems = [p["messages"][0]["content"] for p in behind]
    assert all(p["messages"][0]["role"] == "system" and text.startswith("You are a ") for p, text in zip(behind, systems, strict=True))
    assert len(set(systems)) > 2 and sum(text.endswith("assistant. Be brief.") for text in systems) == 1
    said = draw(teacher, tokenizer, behind, reward, 1, 1.0, 16, 2)
    assert [r["messages"][-1]["content"] for r in rows] == [s["answer"] for (s,) in said]
    sampled = draw(policy, tokenizer, prompts, reward, 1, 1.0, 16, 1)
    assert [r["original"] for r in rows] == [s["answer"] for (s,) in sampled] and [r["before"] for r in rows] == [s["safety"] for (s,) in sampled]


def test_rescored_answers_must_fit(models):
    """Guards against an answer that is cut to the reward model's context and judged as another."""
    root, tokenizer = models
    _, _, reward, prompts = loaded(root)
    with pytest.raises(ValueError, match="max_seq_len 160"):
        rescore(tokenizer, prompts[:1], [{"answer": "of the long book " * 60, "finished": True}], reward)


def test_a_red_team_round_returns_the_worst(models):
    """Guards against the best answered prompts, or an order by helpfulness."""
    root, tokenizer = models
    policy, _, reward, prompts = loaded(root)
    samples = [row[0] for row in draw(policy, tokenizer, prompts, reward, 1, 1.0, 16, 7)]
    scores = [s["safety"] for s in samples]
    worst = failures(policy, tokenizer, prompts, reward, 3, 1.0, 16, 7)
    assert worst == [prompts[i] for i in np.argsort(scores)[:3]] and worst != [prompts[i] for i in np.argsort([s["helpful"] for s in samples])[:3]]
    assert len(failures(policy, tokenizer, prompts, reward, 99, 1.0, 16, 7)) == len(prompts)


# ---- the stage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory):
    root, _ = models
    out = tmp_path_factory.mktemp("safety")
    write_jsonl([{"messages": [{"role": "user", "content": f"Kept {i}"}, {"role": "assistant", "content": "Yes."}]} for i in range(4)], out / "keep.jsonl")
    return out / "run", safety.run(config(root, out / "run", keep=[str(out / "keep.jsonl")]))


def test_a_run_learns_the_best_of_both_models_and_what_was_distilled(models, tuned):
    """Guards against prompts without their best answer, distilled answers that the gate refused, and preprompts that reach training."""
    root, tokenizer = models
    policy, teacher, reward, adversarial = loaded(root)
    out, model = tuned
    prompts = read_prompts(str(root / "prompts.jsonl"))
    a, b = (draw(m, tokenizer, some, reward, 2, 1.0, 16, seed) for m, some, seed in ((policy, prompts, 0), (teacher, adversarial, 10)))
    want, lessons = [], iter(b)  # the teacher is not asked what is harmless
    for p, own in zip(prompts, a, strict=True):
        ended = [s for s in own + (next(lessons) if p["safety"] else []) if s["finished"]]
        if ended:
            best = max(ended, key=lambda s: s["reward"])
            want.append({"messages": [*p["messages"], {"role": "assistant", "content": best["answer"]}], "reward": best["reward"], "safety": p["safety"]})
    distilled = rows_of(out / "distilled.jsonl")
    assert [d["messages"][:-1] for d in distilled] == [p["messages"] for p in adversarial]
    want += [{"messages": d["messages"], "reward": d["after"], "safety": True} for d in distilled if d["kept"]]
    assert rows_of(out / "selected.jsonl") == want
    assert 0 < sum(d["kept"] for d in distilled) < len(distilled)
    shards = Shards(out / "data")
    texts = [tokenizer.decode(shards.document(i)[0].tolist()) for i in range(len(shards))]
    assert len(texts) == len(want) + 4 and sum("Kept" in t for t in texts) == 4
    assert not any("You are a" in t for t in texts) and any("Be brief." in t for t in texts)
    change = max(float((x - y).detach().abs().max()) for x, y in zip(model.parameters(), policy.parameters(), strict=True))
    assert 0 < change < 1e-3  # the policy, a little further
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), checkpoint.load(out)[0].parameters(), strict=True))


def test_a_round_learns_from_the_worst_attacks_only(models, tmp_path):
    root, tokenizer = models
    policy, _, reward, attacks = loaded(root)
    worst = failures(policy, tokenizer, attacks, reward, 2, 0.7, 16, 20)
    assert 0 < len(worst) < len(attacks)
    safety.run(config(root, tmp_path / "r", red_team=2, temperature=0.7))
    asked = lambda rows: [r["messages"][-2]["content"] for r in rows]  # noqa: E731
    wanted = [p["messages"][-1]["content"] for p in worst]
    rows = rows_of(tmp_path / "r" / "selected.jsonl")
    learned = [r for r in rows if r["safety"]]
    assert set(asked(learned)) <= set(wanted) and asked(rows_of(tmp_path / "r" / "distilled.jsonl")) == wanted
    assert learned and any(not r["safety"] for r in rows)  # the harmless ones stay
    with pytest.raises(ValueError, match="red_team must be 0 .* got -1"):
        safety.run(config(root, tmp_path / "n", red_team=-1))


def test_only_a_job_of_several_ranks_samples_in_bf16(models, tmp_path):
    """Guards against a single process that samples from rounded weights, and ranks that gather them twice as wide as they train."""
    train = partial(TrainConfig, steps=1, device="cpu")
    asked = tiny.sampler_precision(safety, lambda bf16: safety.run(config(models[0], tmp_path / "r", train=train(bf16=bf16))))
    assert asked == {(False, 1): False, (False, 2): False, (True, 1): False, (True, 2): True}


def test_without_distillation_only_the_samples_are_learned(models, tmp_path):
    """Guards against an ablation that still distils."""
    root, _ = models
    safety.run(config(root, tmp_path / "r", distil=False))
    assert not (tmp_path / "r" / "distilled.jsonl").exists()
    assert len(rows_of(tmp_path / "r" / "selected.jsonl")) <= 12


def test_resume_does_not_sample_again(models, tmp_path, monkeypatch):
    """Guards against a resumed run that trains on other answers than those it began with."""
    root, _ = models
    tune = sft.run
    monkeypatch.setattr(sft, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        safety.run(config(root, tmp_path / "r"))
    before = (tmp_path / "r" / "selected.jsonl").read_bytes()
    monkeypatch.setattr(sft, "run", tune)
    monkeypatch.setattr(safety, "draw", lambda *a, **k: pytest.fail("sampled again"))
    safety.run(config(root, tmp_path / "r", resume=True))
    assert (tmp_path / "r" / "selected.jsonl").read_bytes() == before


def test_errors_name_the_value(models, tmp_path):
    """Guards against tracebacks for what a user gets wrong."""
    root, tokenizer = models
    write_jsonl([{"messages": [{"role": "user", "content": "a"}]}], tmp_path / "mild.jsonl")
    with pytest.raises(ValueError, match="mild.jsonl has no adversarial prompt"):
        safety.run(config(root, tmp_path / "a", prompts=str(tmp_path / "mild.jsonl")))
    other = Tokenizer.train([t.upper() for t in TEXTS], 340, tmp_path / "other.model")
    checkpoint.save(talker(2, 8.0), other, tmp_path / "foreign")
    for role in ("policy", "teacher"):
        with pytest.raises(ValueError, match="foreign .* different tokenizers"):
            safety.run(config(root, tmp_path / role, **{role: str(tmp_path / "foreign")}))
    with pytest.raises(ValueError, match="no reward model"):
        safety.run(config(root, tmp_path / "b", safety=str(root / "policy")))


def test_a_safety_model_is_needed(models, tmp_path):
    """Guards against an error from deep inside after all samples were drawn."""
    root, _ = models
    with pytest.raises(ValueError, match="safety"):
        safety.run(config(root, tmp_path / "r", safety=""))
