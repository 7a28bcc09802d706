"""Do the oracles have teeth? Every mutant is the alignment code with one real bug put in, and a check that must notice it.

A check is a function of a module: it holds on the module as it is and raises AssertionError on each of its mutants. A mutant is a substitution in the
module's source, run as a module of its own; the text that it replaces must occur exactly once, so that a mutant cannot go stale in silence. Most
of the bugs were seen in public trainers.
"""
import functools
import inspect
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import test_ppo as hand  # the definitions, one number at a time
import torch

from minillama import chat, gatt, ppo, rejection, reward, safety
from minillama import config as configs
from minillama.chat import Message, encode_dialogue, encode_prompt
from minillama.data import preferences
from minillama.data.preferences import Pair
from minillama.generate import Samples
from minillama.tokenizer import Tokenizer


@contextmanager
def mutate(module: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """`module` run once more with `new` in the place of `old`, under a name of its own; the real module is left as it is."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} times, not once: {old!r}"
    mutant = ModuleType(f"_mutant_of_{module.__name__.replace('.', '_')}")
    mutant.__package__, mutant.__file__ = module.__package__, module.__file__
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), f"<{mutant.__name__}>", "exec", dont_inherit=True), mutant.__dict__)
        yield mutant
    finally:
        del sys.modules[mutant.__name__]


@contextmanager
def replaced(module: ModuleType, **names) -> Iterator[None]:
    """Within it, names of a module stand for something else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setattr(module, name, value)
        yield


def close(a, b, atol=1e-6) -> None:
    a, b = (x.double() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@functools.cache
def stages() -> tuple[tempfile.TemporaryDirectory, Path]:
    """A policy and two reward models with their tokenizer, as stages write them; they go when the tests end."""
    folder = tempfile.TemporaryDirectory()
    return folder, hand.write_stages(Path(folder.name))


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(stages()[1] / "t.model")


def messages(*contents: str) -> list[dict]:
    return [{"role": role, "content": c} for role, c in zip(itertools.cycle(["user", "assistant"]), contents, strict=False)]


@torch.no_grad()
def last_score(model, ids: list[int]) -> float:
    """The head's number at the last of `ids`, alone and without padding."""
    return float(model.score(model.features(torch.tensor([ids]))[0, -1]))


# ---- PPO -----------------------------------------------------------------------------------------------------------------------


def check_whiten(m):
    mask, draw = hand.ragged(10)
    x = draw(3.0) + 2.0
    close(m.whiten(x, mask), hand.whiten_by_hand(x, mask))
    assert m.whiten(torch.full((4,), 3.0)).eq(0).all()


def check_answer_mask(m):
    mask = m.answer_mask(torch.tensor([3, 1, 5]), torch.tensor([7, 2, 9]), 9)
    assert [[t + 1 for t in hand.columns(mask, i)] for i in range(3)] == [[3, 4, 5, 6], [1], [5, 6, 7, 8]]


def check_token_rewards(m):
    mask, draw = hand.ragged(11)
    kl, score = draw(), torch.tensor([2.0, -3.0, 5.0, 0.5, -1.0, 4.0], dtype=torch.float64)
    close(m.token_rewards(score, kl, mask, 0.3), hand.rewards_by_hand(score, kl, mask, 0.3))


def check_gae(m):
    mask, draw = hand.ragged(12)
    rewards, values = draw() * mask, draw()
    for got, want in zip(m.gae(rewards, values, mask, 0.9, 0.6), hand.gae_by_hand(rewards, values, mask, 0.9, 0.6), strict=True):
        close(got, want)


def check_policy_loss(m):
    mask, logp, old, advantages = hand.far_ratios(13)
    for got, want in zip(m.policy_loss(logp, old, advantages, mask, 0.2), hand.policy_loss_by_hand(logp, old, advantages, mask, 0.2), strict=True):
        close(got, want)


def check_value_loss(m):
    mask, draw = hand.ragged(14)
    old = draw()
    values, returns = old + draw(1.0) * mask, draw(2.0)
    for clip in (0.0, 0.3):
        close(m.value_loss(values, old, returns, mask, clip), hand.value_loss_by_hand(values, old, returns, mask, clip))


def check_kl(m):
    rng = torch.Generator().manual_seed(1)
    pi, ref = ((torch.randn(6, generator=rng, dtype=torch.float64) * 2).log_softmax(0) for _ in range(2))
    want = sum(math.exp(a) * (a - b) for a, b in zip(pi.tolist(), ref.tolist(), strict=True))
    k1, k3 = m.kl_estimates(pi, ref)
    close((pi.exp() * k1).sum(), want), close((pi.exp() * k3).sum(), want)
    assert k3.min() >= 0


def check_score_range(m):
    x = torch.tensor([-300.0, -30.0, -2.0, 0.5, 30.0, 300.0])
    p = x.double().sigmoid().clamp(1e-4, 1 - 1e-4)
    close(m.logit_clamp(x), (p / (1 - p)).log(), atol=1e-4)


def check_rollout(m):
    roll, judge, parts = hand.roll_out(m)
    assert [ids[:s] for ids, s in hand.rows_of(roll)] == hand.PROMPTS and judge.is_safety == hand.SAFETY
    want, kl = hand.rollout_by_hand(parts, roll, judge.raw, hand.settings())
    hand.compare(roll, want)
    close(roll.metrics["kl"], kl.sum(1).mean(), atol=1e-4)


def check_detached(m):
    roll, _, _ = hand.roll_out(m)
    assert not any(getattr(roll, name).requires_grad for name in hand.FIELDS)


def check_sampler(m):
    assert hand.one_token_chi2(m) < 35


def check_shuffle(m):
    plain, shuffled = (hand.roll_out(m, shuffle_rewards=x, no_eos_penalty=0.0, beta=0.0, gamma=1.0, gae_lambda=1.0)[0].returns.sum(1) for x in (False, True))
    assert ((plain - shuffled).abs() > 1e-3).sum() >= 4


def check_update(m):
    (seen, mine), (want, by_hand) = hand.both_updates(m)
    hand.close(mine[0], by_hand[0]), hand.close(mine[2], by_hand[2])
    assert seen == {k: pytest.approx(v, abs=1e-4, rel=1e-4) for k, v in want.items()}


def check_critic_warm_up(m):
    (_, mine), (_, by_hand) = hand.both_updates(m, learn_policy=False)
    assert all(torch.equal(p, q) for p, q in zip(mine[0].parameters(), hand.models()[0].parameters(), strict=True))
    hand.close(mine[2], by_hand[2])


def check_critic(m):
    model = reward.RewardModel(hand.CONFIG).init_weights(5)
    critic = m.critic_from(model)
    x = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(critic.values(x), model.values(x))
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(p.requires_grad for name, p in critic.named_parameters() if not name.startswith("output"))


def run_ppo(m, folder, **more):
    """(records of training, records of evaluation, folder of the run) of a run of module m."""
    m.run(hand.run_config(stages()[1], folder, **more))
    lines = hand.records(folder)
    return [r for r in lines if "kl" in r], [r for r in lines if "kl" not in r], folder


def check_run(m):
    """The reference is where the policy began, the critic's warm-up leaves the policy alone, and two iterations and two are four."""
    with tempfile.TemporaryDirectory() as folder:
        trained, _, out = run_ppo(m, Path(folder) / "whole")
        assert trained[0]["kl"] == trained[1]["kl"] == 0 < min(trained[2]["kl_k3"], trained[3]["kl_k3"])
        run_ppo(m, Path(folder) / "parts", iterations=2)
        again, _, parts = run_ppo(m, Path(folder) / "parts", resume=True)
        assert trained == again and hand.same(hand.weights(parts), hand.weights(out))


def check_models(m):
    """Policy, reference, critic and reward model have weights of their own, and the reference takes no gradient."""
    seen, real = [], m.rollout
    with tempfile.TemporaryDirectory() as folder, replaced(m, rollout=lambda *a: seen.extend(a[:4]) or real(*a)):
        run_ppo(m, Path(folder) / "out", iterations=1)
    policy, reference, critic, gated = seen
    own = [{p.data_ptr() for p in model.parameters()} for model in (policy, reference, critic, gated.helpful, gated.safety)]
    assert all(not a & b for a, b in itertools.combinations(own, 2))
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


def asked_by(m, **more):
    """The batches of (prompt, answer) that a run of module m asks the reward models to score."""
    batches = []

    def record(self, rows, flags, *a):
        batches.append([(tuple(ids[:s]), tuple(ids[s:])) for ids, s in rows])
        return hand.GATED(self, rows, flags, *a)

    with tempfile.TemporaryDirectory() as folder, replaced(reward.Gated, __call__=record):
        run_ppo(m, Path(folder) / "out", **more)
    return batches


def check_prompts(m):
    """Held-out prompts are never trained on, and every epoch visits each of the others once."""
    _, *epochs, held = ([p for p, _ in batch] for batch in asked_by(m, iterations=2, batch_size=11, minibatch=11, critic_warmup=2))
    assert len(held) == 3 and all(len(set(e)) == 11 and not set(e) & set(held) for e in epochs)


def check_fresh_samples(m):
    """A policy that does not move still draws anew in every iteration."""
    with replaced(m, read_prompts=lambda _: [{"messages": messages("Tell line 5"), "safety": False}] * 14):
        _, first, second, _ = asked_by(m, iterations=2, batch_size=11, minibatch=11, critic_warmup=2)
    assert first != second


def check_best_is_kept(m):
    snapshots = []
    keep = lambda model: snapshots.append({k: v.clone() for k, v in model.state_dict().items()}) or {}  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        hand.scripted(patch, [5.0, -1.0, 2.0, 1.0, 1.5, 9.0, 9.0])
        config = hand.run_config(stages()[1], Path(folder) / "out", iterations=6, eval_every=1, patience=2, critic_warmup=0)
        best = m.run(config, evaluate=keep).state_dict()
        assert len(snapshots) == 5 and hand.same(best, snapshots[2]) and hand.same(hand.weights(Path(folder) / "out"), snapshots[2])


# ---- reward models -------------------------------------------------------------------------------------------------------------


def check_ranking_loss(m):
    chosen, rejected, margins = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.5, 0.5]), torch.tensor([0.0, 1.0, 2 / 3])
    want = [math.log(1 + math.exp(-(c - r - x))) for c, r, x in zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)]
    close(m.ranking_loss(chosen, rejected, margins), want)


def check_margins(m):
    """Table 27, and Meta's scale of strengths."""
    assert preferences.STRENGTHS[0].startswith("negligibly") and preferences.STRENGTHS[3].startswith("significantly")
    close(m.MARGINS["small"], [0, 1 / 3, 2 / 3, 1]), close(m.MARGINS["large"], [0, 1, 2, 3]), close(m.MARGINS["none"], [0, 0, 0, 0])


def check_reward_loss(m):
    """Sums over pairs of the ranking loss and, by their weights, of the mean of both sides' cross-entropies, where unknown labels count nothing, and of
    the chosen answer's negative log-likelihood."""
    r, safe = [1.5, -0.5, 0.3, -2.0, 0.8, 1.0], [1.0, 0.0, -1.0, 0.0, -1.0, 1.0]
    batch = {"tokens": None, "starts": None, "lengths": None, "margins": torch.tensor([1.0, 0.0, 1 / 3]), "safe": torch.tensor(safe)}
    nll = [0.2, 1.1, 0.4, 3.0, 5.0, 7.0]
    model = SimpleNamespace(rewards=lambda *a, text=False: (torch.tensor(r), torch.tensor(nll)) if text else torch.tensor(r))
    ranking = sum(math.log(1 + math.exp(-(r[i] - r[i + 3] - x))) for i, x in enumerate([1.0, 0.0, 1 / 3]))
    sure = lambda x, y: math.log(1 + math.exp(-x if y else x))  # noqa: E731
    labels = sum(sure(x, y) for x, y in zip(r, safe, strict=True) if y >= 0)
    for weight, text in ((0.0, 0.0), (0.7, 0.0), (0.7, 0.3)):
        total, n = m.reward_loss(weight, text)(model, batch)
        close(total, ranking + weight * labels / 2 + text * 1.7)
        assert int(n) == 3


def check_pairs(m):
    """Rows keep whole answers with their EOS, chosen ones first, each with its own margin and labels; what cannot be compared is left out."""
    t, long = tokenizer(), "Line 3 tells of 3 boats. " * 8
    pairs = [Pair(messages("Tell line 1"), f"Line {i} tells of boats.", f"Line {i} boats.", i, i % 2 == 0, None if i == 3 else i == 1) for i in range(4)]
    pairs += [Pair(messages("Tell"), "Line 1.", "Line 1."), Pair(messages("Tell"), long + "1", long + "2")]
    batches = m.PairBatches(pairs, t, 40, 4)
    assert batches.dropped == 2
    batch = batches.collate(batches.rows)
    for i in range(4):
        for row, answer, label in ((i, pairs[i].chosen, pairs[i].chosen_safe), (i + 4, pairs[i].rejected, pairs[i].rejected_safe)):
            n, s = int(batch["lengths"][row]), int(batch["starts"][row])
            ids = encode_dialogue(t, [Message("user", "Tell line 1"), Message("assistant", answer)])[0]
            assert batch["tokens"][row, :n].tolist() == ids and ids[s:] == t.encode(f"{answer} ", eos=True)
            assert batch["safe"][row] == (-1 if label is None else float(label))
    close(batch["margins"], [0, 1 / 3, 2 / 3, 1])


def check_encode(m):
    """The oldest exchanges go, never the question or the answer's end."""
    t, turns = tokenizer(), ["Tell line 1", "Line 1.", "Tell line 2", "Line 2.", "Tell line 3"]
    want = encode_dialogue(t, [Message(x["role"], x["content"]) for x in [*messages(*turns[2:]), {"role": "assistant", "content": "Boats."}]])[0]
    ids, start = m.encode(t, messages(*turns), "Boats.", len(want))
    assert ids == want and ids[start:] == t.encode("Boats. ", eos=True)
    assert m.encode(t, messages(*turns[4:]), [7, 8, 9], 40)[0][-3:] == [7, 8, 9]
    assert m.encode(t, messages(*turns[4:]), "Line 3 tells of 3 boats. " * 9, 40) is None
    assert m.encode(t, messages(*turns[4:]), "Boats.", 40, finished=False)[0][-1] != t.eos_id


def check_rewards(m):
    """The head's number at the last real token of each row, whatever stands behind it."""
    model = hand.build(m.RewardModel, 6)
    rows = [([1, 5, 9, 2], 3), ([1, 4, 7, 7, 8, 3, 2], 2), ([1, 6, 6], 2)]
    want = [last_score(model, ids) for ids, _ in rows]
    batch = m.stack(rows)
    close(model.rewards(**batch).detach(), want, atol=1e-5)
    close(model.values(batch["tokens"]).detach()[:, 1], [last_score(model, ids[:2]) for ids, _ in rows], atol=1e-5)
    logp = [model(torch.tensor([ids]))[0].log_softmax(-1) for ids, _ in rows]
    nll = [-sum(float(x[t - 1, ids[t]].detach()) for t in range(s, len(ids))) / (len(ids) - s) for x, (ids, s) in zip(logp, rows, strict=True)]
    both = model.rewards(**batch, text=True)
    close(both[0].detach(), want, atol=1e-5), close(both[1].detach(), nll, atol=1e-5)
    close(m.score(model, [rows[1], rows[0], rows[2]], batch=2), [want[1], want[0], want[2]], atol=1e-5)


def check_gate(m):
    helpful = torch.tensor([3.0, -1.0, 2.0, 0.5, 4.0, 1.0])
    raw = torch.tensor([-4.0, 2.0, -1.5, -1.8, 0.05, 0.3])  # sigmoid: 0.02, 0.88, 0.18, 0.14, 0.51, 0.57
    flags = torch.tensor([False, True, False, False, False, True])
    want = [s if f or 1 / (1 + math.exp(-s)) < 0.15 else h for h, s, f in zip(helpful.tolist(), raw.tolist(), flags.tolist(), strict=True)]
    assert want == pytest.approx([-4.0, 2.0, 2.0, -1.8, 4.0, 0.3])
    close(m.gated(helpful, raw, flags, 0.15), want)
    assert m.gated(helpful, None, flags).equal(helpful)


def check_gated(m):
    """Each model gives its own score, and the safety prompts' flags arrive."""
    one, two = hand.build(reward.RewardModel, 7), hand.build(reward.RewardModel, 8)
    both = m.Gated.__new__(m.Gated)
    both.helpful, both.safety, both.gate = one, two, 0.15
    rows, flags = [([1, 5, 9, 2], 3), ([1, 4, 7, 7, 8, 3, 2], 2), ([1, 6, 6], 2)], [False, True, False]
    out = both(rows, flags)
    for name, model in (("helpful", one), ("safety", two)):
        close(out[name], [last_score(model, ids) for ids, _ in rows], atol=1e-5)
    close(out["reward"], reward.gated(out["helpful"], out["safety"], torch.tensor(flags)))
    assert out["reward"][1] == out["safety"][1] != out["helpful"][1]


def check_accuracy(m):
    """The share of pairs whose chosen answer scores higher, a tie counting half."""
    pairs = [Pair(messages("Tell"), f"{i}", f"{i} boats", i % 4) for i in range(5)]
    values = {i: (a, b) for i, (a, b) in enumerate([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (3.0, -1.0), (0.5, 0.2)])}
    with replaced(m, score=lambda model, rows: torch.tensor([values[i // 2][i % 2] for i in range(len(rows))])):
        got = m.accuracy(SimpleNamespace(config=hand.RUN), tokenizer(), pairs)
    assert got["all"] == {"accuracy": pytest.approx(0.7), "n": 5} and got["negligibly better"] == {"accuracy": 1.0, "n": 2}
    assert got["slightly better"]["accuracy"] == 0.0 and got["better"]["accuracy"] == 0.5


def check_mixture(m):
    """All of a model's own pairs; as many others for helpfulness, and for safety a tenth of the whole (sec 3.2.2)."""
    pairs = [Pair(messages(f"{i}"), "a", "b", kind=kind) for kind, n in (("helpful", 30), ("safety", 18)) for i in range(n)]
    count = lambda kind: [sum(p.kind == k for p in m.mix(pairs, kind)) for k in ("helpful", "safety")]  # noqa: E731
    assert count("safety") == [2, 18] and count("helpful") == [30, 18]


# ---- the chat format's loss mask, Ghost Attention ------------------------------------------------------------------------------


def check_loss_mask(m):
    """Loss on every answer and its EOS, or on the last alone; nowhere on a prompt."""
    t, turns = tokenizer(), ["Tell line 1", "Line 1.", "Tell line 2", "Line 2 tells.", "Tell line 3", "Boats."]
    dialogue = [m.Message(x["role"], x["content"]) for x in messages(*turns)]
    for last_only, answers in ((False, turns[1::2]), (True, turns[5:])):
        ids, mask = m.encode_dialogue(t, dialogue, last_only)
        want = [(i, False) if a is None else (i, a in answers) for u, a in zip(turns[::2], turns[1::2], strict=True)
                for text, a in ((f"[INST] {u} [/INST]", None), (f"{a} ", a)) for i in t.encode(text, bos=a is None, eos=a is not None)]  # fmt: skip
        assert list(zip(ids, mask, strict=True)) == want
    assert m.encode_prompt(t, dialogue[:-1]) == ids[: len(ids) - len(t.encode("Boats. ", eos=True))]


TURNS = [{"standing": "Be brief.", "turns": ["Tell line 1", "Tell line 2"]}, {"standing": "Tell boats.", "turns": ["Line 3", "Line 4", "Line 5"]},
         {"standing": "Tell.", "turns": ["Line 6"]}]  # fmt: skip


def check_ghost_rows(m):
    """The instruction on the first turn alone, loss on the last answer alone; the control keeps it on every turn (sec 3.3)."""
    said = [["One.", "Two."], ["Three.", "Four."], [""]]
    rows = m.training_rows(TURNS, said, True)
    assert [r["messages"] for r in rows] == [messages("Be brief. Tell line 1", "One.", "Tell line 2", "Two."),
                                             messages("Tell boats. Line 3", "Three.", "Line 4", "Four.")]  # fmt: skip
    assert all(r["last_only"] is True for r in rows)
    assert m.training_rows(TURNS, said, False)[0]["messages"] == messages("Be brief. Tell line 1", "One.", "Be brief. Tell line 2", "Two.")


def check_converse(m):
    """Every turn is asked with the instruction in front and the model's own answers before it, each dialogue with its own."""
    t, texts = tokenizer(), {}

    def answer(model, prompts, n, temperature, seed, stop, batch=256):
        assert temperature == 0.6 and stop == [[t.eos_id]]
        out = [t.encode(f"Boats {len(texts) + i}.") for i in range(len(prompts))]
        ends = [i % 2 == 0 for i in range(len(prompts))]
        for p, ids in zip(prompts, out, strict=True):
            texts[tuple(p)] = t.decode(ids).strip()
        return Samples([ids + [t.eos_id] * e for ids, e in zip(out, ends, strict=True)], [[]] * len(out), ends)

    with replaced(m, sample_many=answer):
        got = m.converse(SimpleNamespace(config=SimpleNamespace(max_seq_len=200)), t, TURNS, True, 0.6, 9, 4)
    assert [len(a) for a in got] == [2, 3, 1] and len(texts) == 6
    for d, answers in zip(TURNS, got, strict=True):
        for k in range(len(answers)):
            dialogue = [x for u, a in zip(d["turns"], answers, strict=True) for x in (f"{d['standing']} {u}", a)][: 2 * k + 1]
            assert texts.get(tuple(encode_prompt(t, [Message(x["role"], x["content"]) for x in messages(*dialogue)]))) == answers[k]


def captured(m, config, prompts, **names):
    """(settings, items) that a stage hands to supervised fine-tuning, with other names of its module replaced."""
    seen = []
    with replaced(m, sft=SimpleNamespace(run=lambda c, items: seen.append((c, list(items)))), **names):
        m.run(config, prompts)
    return seen[0]


def check_ghost_run(m):
    """Sampling has the instruction on every turn, and training, of the policy that sampled, on the first."""
    asked = []
    with tempfile.TemporaryDirectory() as folder:
        config = configs.GAttConfig(policy=str(stages()[1] / "policy"), out=folder, train=configs.TrainConfig(device="cpu"))
        said = lambda model, t, d, every, *a, window: asked.append(every) or [["Yes."] * len(x["turns"]) for x in d]  # noqa: E731
        tuned, items = captured(m, config, TURNS, converse=said)
    assert asked == [True] and tuned.init == config.policy
    assert [x["content"] for x in items[0]["messages"]] == ["Be brief. Tell line 1", "Yes.", "Tell line 2", "Yes."] and items[0]["last_only"]


# ---- rejection sampling --------------------------------------------------------------------------------------------------------


def check_draw(m):
    """Sample j of prompt i is scored behind prompt i, EOS included, with prompt i's flag, and lands in row i; what did not end or is empty is marked."""
    t = tokenizer()
    prompts = [{"messages": messages(f"Tell line {i}"), "safety": i == 1} for i in range(3)]
    texts = ["Line 1.", "Boats.", "", "Line 4.", "Tells of 5.", "Line 6."]
    ends = [True, True, True, False, True, True]

    def sampled(model, asked, n, temperature, seed, stop, batch=256):
        assert (n, temperature, seed, stop) == (9, 1.3, 5, [[t.eos_id]])
        assert asked == [encode_prompt(t, [Message("user", f"Tell line {i // 2}")]) for i in range(6)]
        return Samples([t.encode(f"{x} ") + [t.eos_id] * e for x, e in zip(texts, ends, strict=True)], [[]] * 6, ends)

    def judged(rows, flags):
        assert flags == [False, False, True, True, False, False]
        for i, (ids, start) in enumerate(rows):
            assert ids[:start] == encode_prompt(t, [Message("user", f"Tell line {i // 2}")])
            assert ids[start:] == t.encode(f"{texts[i]} ") + [t.eos_id] * ends[i]
        return {"helpful": torch.arange(6.0), "safety": -torch.arange(6.0), "reward": torch.arange(6.0) * 10}

    with replaced(m, sample_many=sampled):
        got = m.draw(None, t, prompts, judged, 2, 1.3, 9, 5)
    assert [[s["answer"] for s in row] for row in got] == [texts[:2], texts[2:4], texts[4:]]
    assert [[s["finished"] for s in row] for row in got] == [[True, True], [False, False], [True, True]]
    assert [[s["reward"] for s in row] for row in got] == [[0, 10], [20, 30], [40, 50]] and got[1][1]["safety"] == -3


def check_choose(m):
    """The best by the gated reward among the samples that ended; the random control takes any of them."""
    sample = lambda r, ended=True, helpful=0.0: {"answer": str(r), "reward": r, "helpful": helpful, "finished": ended}  # noqa: E731
    row = [sample(-2.0, helpful=9.0), sample(1.5), sample(0.2), sample(7.0, ended=False), sample(-5.0)]
    assert m.choose(row, "best", Random(0)) is row[1] and m.choose([sample(3.0, ended=False)], "best", Random(0)) is None
    rng = Random(1)
    drawn = {m.choose(row, "random", rng)["reward"] for _ in range(60)}
    assert drawn == {-2.0, 1.5, 0.2, -5.0}


def check_best_of(m):
    rows = [[{"reward": x} for x in row] for row in ([1.0, 5.0, 2.0, 9.0], [0.0, -1.0, 4.0, -2.0])]
    got = m.best_of(rows, [1, 3, 4])
    assert [(r["n"], r["max"], r["median"], r["overall"]) for r in got] == [(1, 0.5, 0.5, 0.5), (3, 4.5, 1.0, 1.5), (4, 6.5, 1.5, 1.5)]


def check_reject_run(m):
    """The model that is tuned is `init`, not the sampler, on the chosen samples of this iteration and of the pool."""
    root = stages()[1]
    prompts = [{"messages": messages(f"Tell line {i}"), "safety": False} for i in range(3)]
    samples = [[{"answer": f"{i} {k}", "reward": float(k if i else -k), "helpful": 0.0, "finished": i != 2} for k in range(3)] for i in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "earlier.jsonl"
        pool.write_text(json.dumps({"messages": messages("Tell line 8", "Line 8.")}) + "\n")
        config = configs.RejectConfig(policy=str(root / "policy"), init="the base model", helpful=str(root / "helpful"), pool=[str(pool)],
                                      out=str(Path(folder) / "out"), train=configs.TrainConfig(device="cpu"))  # fmt: skip
        tuned, items = captured(m, config, prompts, draw=lambda *a: samples)
    assert tuned.init == "the base model"
    assert items == [messages("Tell line 0", "0 0"), messages("Tell line 1", "1 2"), messages("Tell line 8", "Line 8.")]


# ---- safety tuning -------------------------------------------------------------------------------------------------------------


@functools.cache
def reward_models():
    return SimpleNamespace(**{name: reward.load(stages()[1] / path)[0] for name, path in (("helpful", "helpful"), ("safety", "harmless"))})


PREPROMPT = "You are a {} and {} assistant."


def distilled(m, gate=True):
    """(rows, prompts, teacher's answers, the policy's samples) of a distillation with scripted samples."""
    models = reward_models()
    prompts = [{"messages": messages(f"Tell line {i}"), "safety": True} for i in range(4)]

    def bare(i, answer):
        ids = encode_dialogue(tokenizer(), [Message("user", f"Tell line {i}"), Message("assistant", answer)])[0]
        return ids if i != 2 else ids[:-1]  # the third did not end

    answers = [f"Line {i} tells." for i in range(4)]
    after = [last_score(models.safety, bare(i, a)) for i, a in enumerate(answers)]
    before = [after[0] - 1, after[1] + 1, after[2] - 1, after[3] - 1]
    own = [[{"answer": f"own {i}", "safety": b, "helpful": -b + 2 * after[i], "reward": b, "finished": True}] for i, b in enumerate(before)]
    new = [[{"answer": a, "safety": -9.0, "helpful": 0.0, "reward": -9.0, "finished": i != 2}] for i, a in enumerate(answers)]
    asked = {}

    def draw(model, t, prompts, reward, k, *a):
        asked[model] = [p["messages"] for p in prompts]
        return own if model == "policy" else new

    config = configs.SafetyConfig(gate=gate)
    with replaced(m, draw=draw):
        rows = m.distil("policy", "teacher", tokenizer(), prompts, models, config)
    return rows, asked, answers, before, after


def check_distil(m):
    """The teacher answers behind a preprompt; its answer is learned without it, if the safety model likes it better behind the bare prompt."""
    rows, asked, answers, before, after = distilled(m)
    assert asked["policy"] == [messages(f"Tell line {i}") for i in range(4)]
    assert all(x[0]["role"] == "system" and x[1:] == messages(f"Tell line {i}") for i, x in enumerate(asked["teacher"]))
    assert [r["messages"] for r in rows] == [messages(f"Tell line {i}", a) for i, a in enumerate(answers)]
    close([r["after"] for r in rows], after, atol=1e-4), close([r["before"] for r in rows], before, atol=1e-4)
    assert [r["original"] for r in rows] == [f"own {i}" for i in range(4)]
    assert [r["kept"] for r in rows] == [True, False, False, True]
    assert [r["kept"] for r in distilled(m, gate=False)[0]] == [True, True, False, True]


def check_preprompt(m):
    """Two different adjectives, and a system prompt that was there stays behind it."""
    drawn = {m.preprompt(Random(i)) for i in range(80)}
    assert drawn <= {PREPROMPT.format(a, b) for a, b in itertools.permutations(m.ADJECTIVES, 2)} and len(drawn) >= 15
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell"}
    assert m.with_preprompt([user], "Be safe.") == [{"role": "system", "content": "Be safe."}, user]
    assert m.with_preprompt([system, user], "Be safe.") == [{"role": "system", "content": "Be safe. Be brief."}, user]


def check_failures(m):
    scores = [0.5, -3.0, 2.0, -1.0]
    with replaced(m, draw=lambda *a: [[{"safety": s}] for s in scores]):
        got = m.failures(None, None, ["a", "b", "c", "d"], None, 2, 1.0, 9, 0)
    assert got == ["b", "d"]


def check_safety_run(m):
    """The best of the policy's samples by the gated reward, on adversarial prompts of the teacher's too, and of the distilled answers those that the gate
    let pass; the policy is tuned."""
    root = stages()[1]
    prompts = [{"messages": messages(f"Tell line {i}"), "safety": i == 0} for i in range(3)]
    calls = []

    def draw(model, t, asked, *a):
        calls.append(asked)
        best = 1 if len(calls) == 1 else 0  # the policy is best on prompt 1, the teacher on the others
        return [[{"answer": f"{len(calls)} {i}", "reward": 1.0 if (i == 1) == (best == 1) else -1.0, "safety": 0.0, "finished": True}]
                for i in range(len(asked))]  # fmt: skip

    def distil(policy, teacher, t, asked, *a):
        calls.append(asked)
        return [{"messages": messages("Tell line 0", f"distilled {k}"), "after": 1.0, "kept": k == 0} for k in range(2)]

    with tempfile.TemporaryDirectory() as folder:
        paths = dict(policy=root / "policy", teacher=root / "policy" / "checkpoint", helpful=root / "helpful", safety=root / "harmless", out=folder)
        config = configs.SafetyConfig(**{k: str(v) for k, v in paths.items()}, train=configs.TrainConfig(device="cpu"))
        tuned, items = captured(m, config, prompts, draw=draw, distil=distil)
    assert calls == [prompts, prompts[:1], prompts[:1]] and tuned.init == config.policy
    assert [x[-1]["content"] for x in items] == ["2 0", "1 1", "1 2", "distilled 0"]


# ---- the annotator -------------------------------------------------------------------------------------------------------------


def annotator(m, noise=0.0, slip=0.0):
    """An annotator whose gold standard reads an answer "quality/u" or "quality/s": how good it is, and whether it is unsafe."""
    a = m.Annotator.__new__(m.Annotator)
    a.gold = SimpleNamespace(
        violates=lambda x: x.endswith("u"), refuses=lambda x: x.startswith("R"),
        score=lambda task, x: SimpleNamespace(helpfulness=float(x.strip("Rus/")), parses=False, close=False),
    )  # fmt: skip
    a.rng, a.noise, a.slip = Random("mutants"), noise, slip
    return a


FACT = SimpleNamespace(kind="fact", args={}, prompt="Where?")
HARMFUL, HARMLESS = (SimpleNamespace(kind="hazard", args={"harmful": x}, prompt="How?") for x in (True, False))


def check_labels(m):
    """The better answer is chosen, the clearer the difference the stronger, each side with its own label."""
    a = annotator(m)
    for good, bad, strength in (("0.9/s", "0.85/s", 0), ("0.9/s", "0.7/s", 1), ("0.9/s", "0.5/s", 2), ("1.0/s", "0.2/s", 3), ("0.9/s", "0.4/u", 2)):
        for pair in (a.compare(FACT, good, bad), a.compare(FACT, bad, good)):
            assert pair and (pair.chosen, pair.rejected, pair.strength, pair.kind) == (good, bad, strength, "helpful")
            assert (pair.chosen_safe, pair.rejected_safe) == (True, not bad.endswith("u"))
    assert a.compare(FACT, "0.5/s", "0.5/s") is None and a.compare(FACT, "0.9/u", "0.2/s") is None  # the bin that the paper leaves out
    both = a.compare(FACT, "0.9/u", "0.2/u")
    assert (both.chosen, both.chosen_safe, both.rejected_safe) == ("0.9/u", False, False)
    assert a.compare(FACT, "0.9/s", "0.5/s").prompt_messages == messages("Where?")


def check_safety_labels(m):
    """On hazards a safe answer beats an unsafe one, clearly; to a harmful request a refusal beats an evasion, and to a harmless one the help does."""
    a = annotator(m)
    for task in (HARMFUL, HARMLESS):
        pair = a.compare(task, "1.0/u", "0.1/s")
        assert pair and (pair.chosen, pair.strength, pair.kind, pair.chosen_safe, pair.rejected_safe) == ("0.1/s", 3, "safety", True, False)
    assert a.compare(HARMFUL, "0.9/s", "R0.0/s").chosen == "R0.0/s" and a.compare(HARMLESS, "0.9/s", "R0.0/s").chosen == "0.9/s"


def check_errors_of_raters(m):
    """Noise turns pairs around as often as its normal distribution says, and a slip turns a label around."""
    a, n = annotator(m, noise=0.2), 2000
    wrong = sum(a.compare(FACT, "0.6/s", "0.5/s").chosen == "0.5/s" for _ in range(n)) / n
    assert wrong == pytest.approx(0.5 * math.erfc(0.5 / math.sqrt(2)), abs=0.04)  # P(normal < -0.5) = 0.309
    always, seldom = annotator(m, slip=1.0), annotator(m, slip=0.1)
    pair = always.compare(FACT, "0.9/s", "0.5/s")
    assert (pair.chosen_safe, pair.rejected_safe) == (False, False)
    turned = sum(annotated.chosen_safe is False for annotated in (seldom.compare(FACT, "0.9/u", "0.5/u") or Pair([], "", "") for _ in range(n)))
    assert turned == pytest.approx(0.81 * n, abs=0.05 * n)  # both labels as they are; the pairs with one slip are left out or have chosen_safe


# ---- the mutants ---------------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    module: ModuleType
    bug: str
    old: str
    new: str
    check: Callable[[ModuleType], None]


MUTANTS = [
    # PPO's mathematics
    Mutant(ppo, "whitening scales but does not centre", "return ((x - mean) / std", "return (x / std", check_whiten),
    Mutant(ppo, "whitening turned around", "return ((x - mean) / std", "return ((mean - x) / std", check_whiten),
    Mutant(ppo, "whitening by the variance", "mask).sqrt()\n    return", "mask)\n    return", check_whiten),
    Mutant(ppo, "whitening with the mean of the padding too", "mean = masked_mean(x, mask)", "mean = x.mean()", check_whiten),
    Mutant(ppo, "no floor of the standard deviation", "std.clamp(min=floor)", "std", check_whiten),
    Mutant(ppo, "padding is whitened too", "std.clamp(min=floor)) * mask", "std.clamp(min=floor))", check_whiten),
    Mutant(ppo, "a mean of rows' means", "(x * mask).sum() / mask.sum()", "((x * mask).sum(-1) / mask.sum(-1)).mean()", check_policy_loss),
    Mutant(ppo, "padding in the denominator", "(x * mask).sum() / mask.sum()", "(x * mask).sum() / mask.numel()", check_value_loss),
    Mutant(ppo, "the first token is no action", "t >= starts[:, None] - 1", "t >= starts[:, None]", check_answer_mask),
    Mutant(ppo, "the prompt's last token is an action", "t >= starts[:, None] - 1", "t >= starts[:, None] - 2", check_answer_mask),
    Mutant(ppo, "the whole prompt is action", "(t >= starts[:, None] - 1) & ", "", check_answer_mask),
    Mutant(ppo, "EOS is no action", "t < lengths[:, None] - 1", "t < lengths[:, None] - 2", check_answer_mask),
    Mutant(ppo, "a pad is an action", "t < lengths[:, None] - 1", "t < lengths[:, None]", check_answer_mask),
    Mutant(ppo, "a bonus for drifting", "rewards = -beta * kl", "rewards = beta * kl", check_token_rewards),
    Mutant(ppo, "a penalty on padding", "-beta * kl * mask", "-beta * kl", check_token_rewards),
    Mutant(ppo, "the score at the first action", "mask.long().cumsum(1).argmax(1)", "mask.long().argmax(1)", check_token_rewards),
    Mutant(ppo, "the score one slot late", "cumsum(1).argmax(1)", "cumsum(1).argmax(1).add(1).clamp(max=mask.shape[1] - 1)", check_token_rewards),
    Mutant(ppo, "the score twice", "last] += score", "last] += 2 * score", check_token_rewards),
    Mutant(ppo, "the score at every token", "-beta * kl * mask", "(score[:, None] - beta * kl) * mask", check_token_rewards),
    Mutant(ppo, "the score overwrites the penalty", "last] += score", "last] = score", check_token_rewards),
    Mutant(ppo, "gamma and lambda swapped", "gamma: float, lam: float) ->", "lam: float, gamma: float) ->", check_gae),
    Mutant(ppo, "a value after the end", "after_value = values[:, t] * mask[:, t]", "after_value = values[:, t]", check_gae),
    Mutant(ppo, "advantages leak from the padding", "after_advantage) * mask[:, t]", "after_advantage)", check_gae),
    Mutant(ppo, "time runs forward", "for t in reversed(range(rewards.shape[1]))", "for t in range(rewards.shape[1])", check_gae),
    Mutant(ppo, "one-step advantages", "(delta + gamma * lam * after_advantage)", "delta", check_gae),
    Mutant(ppo, "no baseline", "after_value - values[:, t]", "after_value", check_gae),
    Mutant(ppo, "returns from whitened advantages", "(advantages + values) * mask", "(whiten(advantages, mask) + values) * mask", check_gae),
    Mutant(ppo, "returns are the advantages", "(advantages + values) * mask", "advantages", check_gae),
    Mutant(ppo, "the smaller of the two losses", "torch.max(plain, clipped)", "torch.min(plain, clipped)", check_policy_loss),
    Mutant(ppo, "no clip of the ratio", "torch.max(plain, clipped)", "plain", check_policy_loss),
    Mutant(ppo, "the clipped loss whatever the plain one", "torch.max(plain, clipped)", "clipped", check_policy_loss),
    Mutant(ppo, "a clip from above only", "clamp(1 - clip, 1 + clip)", "clamp(max=1 + clip)", check_policy_loss),
    Mutant(ppo, "a clip from below only", "clamp(1 - clip, 1 + clip)", "clamp(min=1 - clip)", check_policy_loss),
    Mutant(ppo, "the ratio upside down", "(logp - old_logp)", "(old_logp - logp)", check_policy_loss),
    Mutant(ppo, "ascent for descent", "-advantages * ratio, -advantages * ratio.clamp", "advantages * ratio, advantages * ratio.clamp", check_policy_loss),
    Mutant(ppo, "clip fraction counts ratios out of bounds", "(clipped > plain)", "(clipped != plain)", check_policy_loss),
    Mutant(ppo, "the value clip is ignored", "if clip:", "if False:", check_value_loss),
    Mutant(ppo, "the value clip around the returns", "(old_values + (values - old_values).clamp", "(returns + (values - returns).clamp", check_value_loss),
    Mutant(ppo, "a value that runs away gains", "torch.max(error,", "torch.min(error,", check_value_loss),
    Mutant(ppo, "k1 with its sign flipped", "difference = logp - ref_logp", "difference = ref_logp - logp", check_kl),
    Mutant(ppo, "k3 with its ratio inverted", "torch.exp(-difference) - 1 + difference", "torch.exp(difference) - 1 - difference", check_kl),
    Mutant(ppo, "k2 in the place of k3", "torch.exp(-difference) - 1 + difference", "difference.square() / 2", check_kl),
    Mutant(ppo, "an infinite score", "return logits.clamp(-limit, limit)", "return torch.logit(torch.sigmoid(logits))", check_score_range),
    Mutant(ppo, "a probability in the place of a logit", "return logits.clamp(-limit, limit)", "return torch.sigmoid(logits)", check_score_range),
    # rollouts
    Mutant(ppo, "samples at another temperature", "config.max_new_tokens, 1.0, seed", "config.max_new_tokens, 0.7, seed", check_sampler),
    Mutant(ppo, "samples from a nucleus", "[[eos]], config.batch_size)", "[[eos]], config.batch_size, top_p=0.8)", check_sampler),
    Mutant(ppo, "stops at another token", "[[eos]], config", "[[eos + 1]], config", check_rollout),
    Mutant(ppo, "a bonus for endless answers", "- config.no_eos_penalty", "+ config.no_eos_penalty", check_rollout),
    Mutant(ppo, "a penalty for ending", "(~finished).float()", "finished.float()", check_rollout),
    Mutant(ppo, "a penalty on every answer", "(~finished).float()", "torch.ones(len(finished))", check_rollout),
    Mutant(ppo, "a score that is not whitened", "whiten(logit_clamp(raw))", "logit_clamp(raw)", check_rollout),
    Mutant(ppo, "the penalty is whitened away", "whiten(logit_clamp(raw)) - config.no_eos_penalty * (~finished).float()",
           "whiten(logit_clamp(raw) - config.no_eos_penalty * (~finished).float())", check_rollout),
    Mutant(ppo, "a KL penalty in units of the score", "mask, config.beta)", "mask, config.beta * float(score.std()))", check_rollout),
    Mutant(ppo, "no KL penalty", "mask, config.beta)", "mask, 0.0)", check_rollout),
    Mutant(ppo, "k3 in the reward", "score.to(device), k1,", "score.to(device), k3,", check_rollout),
    Mutant(ppo, "old log-probabilities of the reference", "log_probs(policy, t, where=m)", "log_probs(reference, t, where=m)", check_rollout),
    Mutant(ppo, "the policy is its own reference", "log_probs(reference, t, where=m)", "log_probs(policy, t, where=m)", check_rollout),
    Mutant(ppo, "values see the action", "critic.values(t)[:, :-1]", "critic.values(t)[:, 1:]", check_rollout),
    Mutant(ppo, "advantages are not whitened", "whiten(advantages, mask), returns", "advantages, returns", check_rollout),
    Mutant(ppo, "advantages are whitened with the padding", "whiten(advantages, mask), returns", "whiten(advantages), returns", check_rollout),
    Mutant(ppo, "the answer starts one token early", "rows = [(p + ids, len(p)) for", "rows = [(p + ids, len(p) - 1) for", check_rollout),
    Mutant(ppo, "safety prompts lose their mark", "rewards(rows, is_safety)", "rewards(rows, [False] * len(rows))", check_rollout),
    Mutant(ppo, "a mean for the KL of an answer", '"kl": float((k1 * mask).sum(1).mean())', '"kl": float(masked_mean(k1, mask))', check_rollout),
    Mutant(ppo, "gradients into advantages and old values", "@torch.no_grad()\ndef by_batch", "def by_batch", check_detached),
    Mutant(ppo, "the control shuffles nothing", "if config.shuffle_rewards:", "if False:", check_shuffle),
    # the update
    Mutant(ppo, "minibatches are misaligned", "getattr(self, f.name)[index]", 'getattr(self, f.name)[index if f.name != "advantages" else index.flip(0)]',
           check_update),
    Mutant(ppo, "micro-batches weigh alike", "share = b.mask.sum() / n_tokens", "share = len(index) / len(minibatch)", check_update),
    Mutant(ppo, "gradients grow with the number of micro-batches", "(share * mesh.data_ranks * loss).backward()", "loss.backward()", check_update),
    Mutant(ppo, "gradients pile up", "optimizer.zero_grad(set_to_none=True)", "pass", check_update),
    Mutant(ppo, "no limit on the gradient", "model.parameters(), config.grad_clip", "model.parameters(), 1e9", check_update),
    Mutant(ppo, "the ratio is always 1", "policy_loss(logp, b.logp,", "policy_loss(logp, logp.detach(),", check_update),
    Mutant(ppo, "log-probabilities of the token before", "F.pad(b.mask, (0, 1))", "F.pad(b.mask, (1, 0))", check_update),
    Mutant(ppo, "the critic learns from the state after", "critic.values(b.tokens)[:, :-1]", "critic.values(b.tokens)[:, 1:]", check_update),
    Mutant(ppo, "the value weight is ignored", "config.value_weight * value_loss", "value_loss", check_update),
    Mutant(ppo, "values are clipped around themselves", "value_loss(values, b.values,", "value_loss(values, values,", check_update),
    Mutant(ppo, "the critic learns advantages", "b.returns, b.mask", "b.advantages, b.mask", check_update),
    Mutant(ppo, "only the first minibatch is learned", "enumerate(minibatches)", "enumerate(minibatches[:1])", check_update),
    Mutant(ppo, "entropy of a row, not of an action", "entropy = -(all_logp.exp() * all_logp).sum(-1).mean()",
           "entropy = -(all_logp.exp() * all_logp).sum() / len(index)", check_update),
    Mutant(ppo, "log-probabilities a place too early", "masked_scatter(b.mask, all_logp", "masked_scatter(b.mask.roll(1, 1), all_logp", check_update),
    Mutant(ppo, "approximate KL over padding", "masked_mean(torch.exp(step) - 1 - step, b.mask)", "(torch.exp(step) - 1 - step).mean()", check_update),
    Mutant(ppo, "the policy moves in the critic's warm-up", "if model is critic or learn_policy", "if True", check_critic_warm_up),
    Mutant(ppo, "the critic waits for the policy", "if model is critic or learn_policy", "if learn_policy", check_critic_warm_up),
    Mutant(ppo, "the critic is the reward model", "copy.deepcopy(reward).train()", "reward.train()", check_critic),
    Mutant(ppo, "the reward model's head is dropped", "copy.deepcopy(reward).train()",
           "copy.deepcopy(reward).train()\n    nn.init.normal_(critic.score.weight)", check_critic),
    Mutant(ppo, "a critic that only learns its head", 'not name.startswith(("output"', 'not name.startswith(("layers", "output"', check_critic),
    # whole runs
    Mutant(ppo, "the reference is the policy", "reference.to(device).eval().requires_grad_(False)", "reference = policy", check_run),
    Mutant(ppo, "the reference is not frozen", ".eval().requires_grad_(False)", ".eval()", check_models),
    Mutant(ppo, "critic and policy share their layers", "critic_from(load_reward(c.helpful)[0], copied=False)).to(device)",
           "critic_from(load_reward(c.helpful)[0], copied=False)).to(device)\n    critic.layers = policy.layers", check_models),
    Mutant(ppo, "the reference is the resumed policy", "restore(critic, optimizers, policy, tensors)\n",
           "restore(critic, optimizers, policy, tensors)\n        reference.load_state_dict(policy.state_dict())\n", check_run),
    Mutant(ppo, "the critic is not restored", 'tensors.under("critic/").fill(critic.state_dict())', "pass", check_run),
    Mutant(ppo, "the policy's optimizer is not restored", 'restore_optimizer(optimizers[0], policy, tensors.under("policy_optimizer/"))', "pass", check_run),
    Mutant(ppo, "the critic's optimizer is not restored", 'restore_optimizer(optimizers[1], critic, tensors.under("critic_optimizer/"))', "pass", check_run),
    Mutant(ppo, "a resumed run begins its prompts anew", "first = len(encoded), iteration * c.batch_size",
           "first = len(encoded), (iteration - start) * c.batch_size", check_run),
    Mutant(ppo, "held-out prompts are trained on", "encoded[:n_val], encoded[n_val:]", "encoded[:n_val], encoded", check_prompts),
    Mutant(ppo, "the same answers in every iteration", "seed = c.seed * 1_000_003 + iteration", "seed = c.seed * 1_000_003", check_fresh_samples),
    Mutant(ppo, "the worst policy is kept", '> best["reward"]', '< best["reward"]', check_best_is_kept),
    Mutant(ppo, "the last policy is kept", "policy = load_sharded(kept, mesh, bf16=c.bf16, split_logits=False)[0].to(device)", "pass", check_best_is_kept),
    # reward models
    Mutant(reward, "the margin's sign", "rejected - margins", "rejected + margins", check_ranking_loss),
    Mutant(reward, "the rejected answer is preferred", "F.logsigmoid(chosen - rejected", "F.logsigmoid(rejected - chosen", check_ranking_loss),
    Mutant(reward, "no margin", "rejected - margins", "rejected", check_ranking_loss),
    Mutant(configs, "the table of margins reversed", '"large": (0.0, 1.0, 2.0, 3.0)', '"large": (3.0, 2.0, 1.0, 0.0)', check_margins),
    Mutant(reward, "margins of the opposite strength", "MARGINS[margin][p.strength]", "MARGINS[margin][3 - p.strength]", check_pairs),
    Mutant(reward, "the loss on a pair with another's answer", "rewards.chunk(2)", "(rewards[::2], rewards[1::2])", check_reward_loss),
    Mutant(reward, "safety turned around", "binary_cross_entropy_with_logits(rewards,", "binary_cross_entropy_with_logits(-rewards,", check_reward_loss),
    Mutant(reward, "unknown labels count as unsafe", ".masked_fill(~known, 0.0)", "", check_reward_loss),
    Mutant(reward, "unsafe labels are left out", 'batch["safe"] >= 0', 'batch["safe"] > 0', check_reward_loss),
    Mutant(reward, "the auxiliary loss is a sum of both sides", "safety_weight * 0.5 *", "safety_weight *", check_reward_loss),
    Mutant(reward, "text of the rejected answers", "nll.chunk(2)[0]", "nll.chunk(2)[1]", check_reward_loss),
    Mutant(reward, "text of both answers", "nll.chunk(2)[0].sum()", "nll.sum()", check_reward_loss),
    Mutant(reward, "text is unlearned", "total + text_weight", "total - text_weight", check_reward_loss),
    Mutant(reward, "a long answer's text weighs more", "written) / said.sum(1).clamp(min=1)", "written)", check_rewards),
    Mutant(reward, "text one token late", "tokens[:, 1:][said].unsqueeze", "tokens[:, :-1][said].unsqueeze", check_rewards),
    Mutant(reward, "a pair counts twice", "torch.tensor(len(chosen)", "torch.tensor(len(rewards)", check_reward_loss),
    Mutant(reward, "labels on the other side", "label(r[3].chosen_safe) for r in rows] + [label(r[3].rejected_safe)",
           "label(r[3].rejected_safe) for r in rows] + [label(r[3].chosen_safe)", check_pairs),
    Mutant(reward, "unknown labels are read as unsafe", "-1.0 if x is None else float(x)", "float(bool(x))", check_pairs),
    Mutant(reward, "identical sides are a pair", "if sides and sides[0] != sides[1]", "if sides", check_pairs),
    Mutant(reward, "long answers lose their end", "            return None\n        del", "            return (prompt + ids)[:limit], len(prompt)\n        del",
           check_encode),
    Mutant(reward, "the newest exchange is dropped", "del messages[first : first + 2]", "del messages[-2:]", check_encode),
    Mutant(reward, "answers without EOS", "eos=finished)", "eos=False)", check_encode),
    Mutant(reward, "EOS on answers that were cut", "eos=finished)", "eos=True)", check_encode),
    Mutant(reward, "the score of the last padded place", "features[rows, lengths - 1]", "features[rows, -1]", check_rewards),
    Mutant(reward, "the score one token early", "features[rows, lengths - 1]", "features[rows, lengths - 2]", check_rewards),
    Mutant(reward, "the score before the answer", "features[rows, lengths - 1]", "features[rows, starts - 1]", check_rewards),
    Mutant(reward, "scores in the order of lengths", "rewards[mine] =", "rewards[k : k + batch] =", check_rewards),
    Mutant(reward, "padding on the left", "ids + [0] * (T - len(ids)) for", "[0] * (T - len(ids)) + ids for", check_rewards),
    Mutant(reward, "the gate turned around", "torch.sigmoid(safety) < gate", "torch.sigmoid(safety) > gate", check_gate),
    Mutant(reward, "the gate on the logit", "torch.sigmoid(safety) < gate", "safety < gate", check_gate),
    Mutant(reward, "the gate on the whitened score", "torch.sigmoid(safety) < gate", "torch.sigmoid((safety - safety.mean()) / safety.std()) < gate",
           check_gate),
    Mutant(reward, "the gate on the helpfulness", "torch.sigmoid(safety) < gate", "torch.sigmoid(helpful) < gate", check_gate),
    Mutant(reward, "safety prompts are not gated", "torch.where(is_safety | (", "torch.where((", check_gate),
    Mutant(reward, "helpfulness for the unsafe", ", safety, helpful)", ", helpful, safety)", check_gate),
    Mutant(reward, "one model for both scores", "score(self.safety, rows)", "score(self.helpful, rows)", check_gated),
    Mutant(reward, "a gate without its flags", "torch.tensor(list(is_safety))", "torch.zeros(len(rows), dtype=torch.bool)", check_gated),
    Mutant(reward, "a tie is right", "(r[:, 0] > r[:, 1]).float()", "(r[:, 0] >= r[:, 1]).float()", check_accuracy),
    Mutant(reward, "accuracy turned around", "(r[:, 0] > r[:, 1]).float()", "(r[:, 0] < r[:, 1]).float()", check_accuracy),
    Mutant(reward, "safety models see mostly helpfulness", "len(mine) // 9", "len(others)", check_mixture),
    # the loss mask and Ghost Attention
    Mutant(chat, "loss on prompts", "trained += [False] * len(ids)", "trained += [True] * len(ids)", check_loss_mask),
    Mutant(chat, "no loss on EOS", "[i == last or not last_only] * len(ids)", "[i == last or not last_only] * (len(ids) - 1) + [False]", check_loss_mask),
    Mutant(chat, "no EOS after answers", 'f"{answer} ", eos=True', 'f"{answer} ", eos=False', check_loss_mask),
    Mutant(chat, "loss on all answers where the last is meant", "[i == last or not last_only]", "[True]", check_loss_mask),
    Mutant(chat, "loss on the first answer", "[i == last or not last_only]", "[i == 0 or not last_only]", check_loss_mask),
    Mutant(chat, "loss on the last answer always", "[i == last or not last_only]", "[i == last]", check_loss_mask),
    Mutant(chat, "BOS before the first exchange only", "tokenizer.encode(prompt, bos=True)", "tokenizer.encode(prompt, bos=i == 0)", check_loss_mask),
    Mutant(gatt, "the instruction on every turn in training", "every=not ghost", "every=True", check_ghost_rows),
    Mutant(gatt, "the control is the method", "every=not ghost", "every=False", check_ghost_rows),
    Mutant(gatt, "the instruction on no turn", "if every or i == 0 else", "if every else", check_ghost_rows),
    Mutant(gatt, "the instruction on later turns only", "if every or i == 0 else", "if every or i > 0 else", check_ghost_rows),
    Mutant(gatt, "loss on all answers", '"last_only": True', '"last_only": False', check_ghost_rows),
    Mutant(gatt, "empty answers are learned", "if said and all(said)", "if said", check_ghost_rows),
    Mutant(gatt, "sampling on the first instruction only", "answers[i][first:], every)", "answers[i][first:], False)", check_converse),
    Mutant(gatt, "answers of other dialogues", "zip(asked, drawn", "zip(reversed(asked), drawn", check_converse),
    Mutant(gatt, "cut answers lose a token", "ids[:-1] if finished else ids", "ids[:-1]", check_converse),
    Mutant(gatt, "answers are asked without their past", "answers[i][first:], every)", '[" "] * len(answers[i][first:]), every)', check_converse),
    Mutant(gatt, "sampled without the instruction", "tokenizer, dialogues, True,", "tokenizer, dialogues, False,", check_ghost_run),
    # rejection sampling
    Mutant(rejection, "the worst sample", "max(finished, key", "min(finished, key", check_choose),
    Mutant(rejection, "unfinished samples are chosen", '[s for s in samples if s["finished"]]', "list(samples)", check_choose),
    Mutant(rejection, "the best by helpfulness alone", 'key=lambda s: s["reward"]', 'key=lambda s: s["helpful"]', check_choose),
    Mutant(rejection, "the first sample", 'max(finished, key=lambda s: s["reward"])', "finished[0]", check_choose),
    Mutant(rejection, "the random control takes the best", 'if select == "best"', "if True", check_choose),
    Mutant(rejection, "empty answers count as finished", "finished and bool(answer)", "finished", check_draw),
    Mutant(rejection, "samples land at other prompts", "samples[i // k].append", "samples[i % len(prompts)].append", check_draw),
    Mutant(rejection, "flags of other prompts", 'prompts[i // k]["safety"]', 'prompts[i % len(prompts)]["safety"]', check_draw),
    Mutant(rejection, "prompts in another order", "[ids for ids in asked for _ in range(k)]", "[ids for _ in range(k) for ids in asked]", check_draw),
    Mutant(rejection, "scored without EOS", "(asked[i // k] + ids,", "(asked[i // k] + ids[:-1],", check_draw),
    Mutant(rejection, "all samples where the first n are meant", "row[:n]", "row", check_best_of),
    Mutant(rejection, "the mean for the median", "np.median(rewards, axis=1)", "np.mean(rewards, axis=1)", check_best_of),
    Mutant(rejection, "the mean of all for the median of all", "np.median(rewards))", "np.mean(rewards))", check_best_of),
    Mutant(rejection, "the sampler is tuned", "SFTConfig(init=config.init", "SFTConfig(init=config.policy", check_reject_run),
    Mutant(rejection, "earlier iterations are forgotten", "[selected, *config.pool]", "[selected]", check_reject_run),
    # safety tuning
    Mutant(safety, "the preprompt is trained on", "zip(prompts, original, answers", "zip(behind, original, answers", check_distil),
    Mutant(safety, "the gate turned around", 'r > old["safety"]', 'r < old["safety"]', check_distil),
    Mutant(safety, "the gate is always open", "not config.gate or r", "True or r", check_distil),
    Mutant(safety, "the gate cannot be opened", "not config.gate or r", "r", check_distil),
    Mutant(safety, "the gate asks the helpfulness model", 'r > old["safety"]', 'r > old["helpful"]', check_distil),
    Mutant(safety, "answers are judged behind the preprompt", "after = rescore(tokenizer, prompts", "after = rescore(tokenizer, behind", check_distil),
    Mutant(safety, "cut answers are distilled", 'new["finished"] and (', "(", check_distil),
    Mutant(safety, "the preprompt never reaches the teacher", "draw(teacher, tokenizer, behind", "draw(teacher, tokenizer, prompts", check_distil),
    Mutant(safety, "the policy's own answer is distilled", '"content": new["answer"]', '"content": old["answer"]', check_distil),
    Mutant(safety, "rescored by the helpfulness model", "score(reward.safety, rows)", "score(reward.helpful, rows)", check_distil),
    Mutant(safety, "one adjective twice", "rng.sample(ADJECTIVES, 2)", "[rng.choice(ADJECTIVES)] * 2", check_preprompt),
    Mutant(safety, "the system prompt is lost", "f\"{text} {messages[0]['content']}\"", "text", check_preprompt),
    Mutant(safety, "the safest answers are the failures", '[i][0]["safety"])', '[i][0]["safety"], reverse=True)', check_failures),
    Mutant(safety, "distilled against the gate", 'for d in distilled if d["kept"]', "for d in distilled", check_safety_run),
    Mutant(safety, "harmless prompts are distilled", '[p for p in prompts if p["safety"]]', "list(prompts)", check_safety_run),
    Mutant(safety, "the teacher's samples are not looked at", 'choose(row + (next(lessons) if p["safety"] else []),', "choose(row,", check_safety_run),
    Mutant(safety, "the teacher answers harmless prompts", "(prompts, adversarial)", "(prompts, prompts)", check_safety_run),
    Mutant(safety, "the teacher is tuned", "SFTConfig(init=config.policy", "SFTConfig(init=config.teacher", check_safety_run),
    # the annotator
    Mutant(preferences, "the worse answer is chosen", "a if first else b, b if first else a", "b if first else a, a if first else b", check_labels),
    Mutant(preferences, "labels stay where the answers were", "(seen[0], seen[1]) if first else (seen[1], seen[0])", "(seen[0], seen[1])", check_labels),
    Mutant(preferences, "unsafe answers beat safe ones", "if rejected_safe and not chosen_safe:", "if False:", check_labels),
    Mutant(preferences, "strengths reversed", "strength = sum(", "strength = 3 - sum(", check_labels),
    Mutant(preferences, "strength of the signed difference", "sum(abs(difference) > limit", "sum(difference > limit", check_labels),
    Mutant(preferences, "equal answers are a pair", "if a == b:", "if False:", check_labels),
    Mutant(preferences, "labels turned around", "[not self.gold.violates(x) for x", "[self.gold.violates(x) for x", check_labels),
    Mutant(preferences, "hazards are rated by helpfulness", "if harmful else", "if False else", check_safety_labels),
    Mutant(preferences, "harmless questions are to be refused", "if harmful else", "if True else", check_safety_labels),
    Mutant(preferences, "the unsafe answer wins", "(1 if seen[0] else -1)", "(-1 if seen[0] else 1)", check_safety_labels),
    Mutant(preferences, "helpfulness decides over a safety label", 'if kind == "safety" and seen[0] != seen[1]:', "if False:", check_safety_labels),
    Mutant(preferences, "safety pairs are marked helpful", 'kind = "safety" if task.kind == "hazard" else "helpful"', 'kind = "helpful"', check_safety_labels),
    Mutant(preferences, "raters without noise", " + self.rng.gauss(0.0, self.noise)", "", check_errors_of_raters),
    Mutant(preferences, "raters without slips", "self.rng.random() < self.slip", "False", check_errors_of_raters),
    Mutant(preferences, "raters that mostly slip", "self.rng.random() < self.slip", "self.rng.random() > self.slip", check_errors_of_raters),
]  # fmt: skip

REAL = list(dict.fromkeys((m.module, m.check) for m in MUTANTS))


@pytest.mark.parametrize("module,check", REAL, ids=lambda x: getattr(x, "__name__", "").removeprefix("minillama.").removeprefix("check_"))
def test_the_check_holds_on_the_real_module(module, check):
    """Guards against checks that fail on everything, and so would catch any mutant."""
    check(module)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # one mutant's fault
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module.__name__.removeprefix('minillama.')}: {m.bug}")
def test_the_mutant_is_caught(mutant):
    """Guards against oracles that a wrong implementation passes; a crash does not count, since it would be seen without a test."""
    with mutate(mutant.module, mutant.old, mutant.new) as module, pytest.raises(AssertionError):
        mutant.check(module)


def test_a_copy_without_a_change_passes():
    """Guards against checks that fail because a module runs under another name."""
    for module, check in REAL:
        first = inspect.getsource(module).splitlines()[0]
        with mutate(module, first + "\n", first + "\n") as copy:
            check(copy)


def test_mutants_cannot_go_stale():
    """Guards against a mutant whose text has gone from the module: it would be the module itself, or another bug than its name says."""
    for old in ("no such text", "mask"):
        with pytest.raises(AssertionError, match="not once"), mutate(ppo, old, "x"):
            pass
    assert len({(m.module, m.old, m.new) for m in MUTANTS}) == len({(m.module, m.bug) for m in MUTANTS}) == len(MUTANTS)
    assert not [name for name in sys.modules if name.startswith("_mutant")]
