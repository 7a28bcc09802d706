"""PPO against its definitions: loops in float64, exact enumeration, rows alone, an update written by hand, and runs that are cut short."""
import copy
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny
import torch

import minillama
from minillama import checkpoint, ppo
from minillama.chat import Message, encode_prompt
from minillama.config import LlamaConfig, ParallelConfig, PPOConfig, TrainConfig
from minillama.data.sources import read_prompts
from minillama.generate import log_probs, sample_many
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.reward import Gated, RewardModel
from minillama.tokenizer import Tokenizer
from minillama.trainer import Interrupted, make_optimizer

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=13, multiple_of=8, max_seq_len=24)
EOS = 2
PROMPTS = [[1, 5, 9], [1, 7, 8, 3, 4, 6, 11], [1, 5, 9], [1, 12], [1, 10, 10, 4, 3], [1, 5, 9], [1, 8, 8, 8, 3, 3, 9, 9, 4], [1, 6]]
SAFETY = [False, True, False, True, False, False, True, False]
FIELDS = ("mask", "logp", "ref_logp", "values", "advantages", "returns")


def build(kind=Llama, seed=3, config=CONFIG):
    return tiny.build(config, seed, kind).eval()


# ---- the definitions, one number at a time -------------------------------------------------------------------------------------


def ragged(seed=0, B=6, T=11):
    """A mask [B,T] of one run a row, each at its own place, and numbers that are not zero anywhere, least of all outside it."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(B):
        first = int(rng.integers(0, T // 2))
        mask[i, first : int(rng.integers(first + 1, T + 1 if i else T))] = True
    mask[1, :], mask[2, :] = False, False
    mask[1, 3:], mask[2, 4] = True, True  # one answer to the last column, one of a single token
    draw = lambda scale=1.0: torch.from_numpy(rng.normal(size=(B, T)) * scale) + 40.0 * ~mask  # noqa: E731
    return mask, draw


def columns(mask, i):
    return [t for t in range(mask.shape[1]) if mask[i, t]]


def whiten_by_hand(x, mask, floor=1e-4):
    seen = [float(x[i, t]) for i in range(len(x)) for t in columns(mask, i)]
    mean = sum(seen) / len(seen)
    std = math.sqrt(sum((v - mean) ** 2 for v in seen) / len(seen))
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for t in columns(mask, i):
            out[i, t] = (float(x[i, t]) - mean) / max(std, floor)
    return out


def gae_by_hand(rewards, values, mask, gamma, lam):
    """Advantages as the sum over the rest of the answer of (gamma lambda)^l delta, and returns: no recursion."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(len(rewards)):
        own = columns(mask, i)
        for k, t in enumerate(own):
            for l, s in enumerate(own[k:]):
                after = float(values[i, s + 1]) if s != own[-1] else 0.0
                advantages[i, t] += (gamma * lam) ** l * (float(rewards[i, s]) + gamma * after - float(values[i, s]))
            returns[i, t] = advantages[i, t] + values[i, t]
    return advantages, returns


def policy_loss_by_hand(logp, old, advantages, mask, clip):
    """The clipped objective by its cases: a ratio out of bounds counts as the bound where it would gain by being out."""
    losses, bound = [], 0
    for i in range(len(logp)):
        for t in columns(mask, i):
            ratio, a = math.exp(float(logp[i, t] - old[i, t])), float(advantages[i, t])
            if a > 0 and ratio > 1 + clip:
                ratio, bound = 1 + clip, bound + 1
            elif a < 0 and ratio < 1 - clip:
                ratio, bound = 1 - clip, bound + 1
            losses.append(-a * ratio)
    return sum(losses) / len(losses), bound / len(losses)


def value_loss_by_hand(values, old, returns, mask, clip):
    errors = []
    for i in range(len(values)):
        for t in columns(mask, i):
            v, o, r = float(values[i, t]), float(old[i, t]), float(returns[i, t])
            near = min(max(v, o - clip), o + clip) if clip else v
            errors.append(max((v - r) ** 2, (near - r) ** 2))
    return sum(errors) / len(errors)


def rewards_by_hand(score, kl, mask, beta):
    out = torch.zeros_like(kl)
    for i in range(len(kl)):
        for t in columns(mask, i):
            out[i, t] = -beta * float(kl[i, t]) + (float(score[i]) if t == columns(mask, i)[-1] else 0.0)
    return out


def test_whiten():
    """Guards against advantages that are scaled but not centred, statistics over padding, and an explosion where all rewards are equal."""
    mask, draw = ragged()
    x = draw(3.0)
    got = ppo.whiten(x, mask)
    torch.testing.assert_close(got, whiten_by_hand(x, mask), rtol=0, atol=1e-12)
    assert abs(float(got[mask].mean())) < 1e-12 and float(got[mask].std(correction=0)) == pytest.approx(1.0) and not got[~mask].any()
    torch.testing.assert_close(ppo.whiten(x[0]), whiten_by_hand(x[:1], torch.ones(1, 11, dtype=torch.bool))[0], rtol=0, atol=1e-12)
    assert ppo.whiten(torch.full((5,), 7.0)).eq(0).all() and ppo.whiten(torch.tensor([3.0])).eq(0).all()
    assert ppo.whiten(torch.tensor([0.0, 2e-5]), floor=1e-2).abs().max() < 1e-2


def test_masked_mean_is_over_tokens():
    """Guards against a mean of means: a token of a short answer must weigh as much as one of a long answer."""
    mask, draw = ragged(9)
    x = draw(3.0)
    want = sum(float(x[i, t]) for i in range(len(x)) for t in columns(mask, i)) / int(mask.sum())
    assert float(ppo.masked_mean(x, mask)) == pytest.approx(want, abs=1e-12)
    assert abs(want - sum(float(x[i][mask[i]].mean()) for i in range(len(x))) / len(x)) > 1e-2  # the comparison can fail


def test_answer_mask():
    """Guards against prompt tokens among the actions, an EOS that is no action, and a pad that is one."""
    starts, lengths, T = [3, 1, 5, 2], [7, 2, 9, 9], 9
    mask = ppo.answer_mask(torch.tensor(starts), torch.tensor(lengths), T)
    assert mask.shape == (4, T - 1)
    for i, (s, n) in enumerate(zip(starts, lengths, strict=True)):
        assert [t + 1 for t in columns(mask, i)] == list(range(s, n))  # the token that each action writes


def test_token_rewards():
    """Guards against the score at the first token, at every token, or one slot late, and against a KL bonus in place of a penalty."""
    mask, draw = ragged(2)
    kl, score = draw(), torch.from_numpy(np.random.default_rng(3).normal(size=6) * 5)
    got = ppo.token_rewards(score, kl, mask, 0.3)
    torch.testing.assert_close(got, rewards_by_hand(score, kl, mask, 0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(ppo.token_rewards(score, kl, mask, 0.0).sum(1), score)
    assert ppo.token_rewards(0 * score, torch.ones_like(kl), mask, 0.3).sum() == pytest.approx(-0.3 * int(mask.sum()))


@pytest.mark.parametrize("gamma,lam", [(0.9, 0.7), (0.8, 1.0), (1.0, 0.95), (0.97, 0.0)])
def test_gae(gamma, lam):
    """Guards against gamma and lambda swapped, a value after the end, and advantages that depend on padding; a test with V = 0 sees none of it."""
    mask, draw = ragged(4)
    rewards, values = draw() * mask, draw()
    assert values.abs().min() > 0 and mask.any(1).all()
    got = ppo.gae(rewards, values, mask, gamma, lam)
    for a, b in zip(got, gae_by_hand(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    wider = [torch.cat([x, torch.full((6, 5), 9.0, dtype=x.dtype)], 1) for x in (rewards, values)]
    for a, b in zip(got, ppo.gae(*wider, torch.cat([mask, torch.zeros(6, 5, dtype=torch.bool)], 1), gamma, lam), strict=True):
        assert torch.equal(a, b[:, :11]) and not b[:, 11:].any()
    if lam == 1:  # the return is then the discounted sum of what comes
        i, own = 1, columns(mask, 1)
        want = sum(gamma**k * float(rewards[i, t]) for k, t in enumerate(own))
        assert float(got[1][i, own[0]]) == pytest.approx(want)


def test_returns_are_not_whitened():
    """Guards against a critic that chases whitened targets: with lambda 1, gamma 1 and no KL every return is the score itself."""
    mask, draw = ragged(5)
    score = torch.tensor([5.0, -3.0, 20.0, 1.0, 0.5, -9.0], dtype=torch.float64)
    _, returns = ppo.gae(ppo.token_rewards(score, draw(), mask, 0.0), draw(), mask, 1.0, 1.0)
    torch.testing.assert_close(returns, score[:, None] * mask)


def far_ratios(seed=6):
    """Log-probabilities whose ratios lie on both sides of the clip, near and far, with advantages of both signs."""
    mask, draw = ragged(seed)
    old, advantages = draw(), draw() + 0.1
    rng = np.random.default_rng(seed)
    logp = old + torch.from_numpy(rng.choice([-2.5, -0.3, -0.1, 0.0, 0.1, 0.3, 2.5], size=tuple(old.shape)))
    return mask, logp, old, advantages


def test_policy_loss():
    """Guards against min for max, a clip on one side, and a ratio upside down; a test at ratio 1 sees none of it."""
    mask, logp, old, advantages = far_ratios()
    ratio = torch.exp(logp - old)[mask]
    cases = {(bool(a > 0), bool(r > 1.2), bool(r < 0.8)) for a, r in zip(advantages[mask], ratio, strict=True)}
    assert len(cases) == 6 and ratio.max() > 10 and ratio.min() < 0.1
    for clip in (0.2, 0.05, 3.0):
        loss, share = ppo.policy_loss(logp, old, advantages, mask, clip)
        want = policy_loss_by_hand(logp, old, advantages, mask, clip)
        assert (float(loss), float(share)) == (pytest.approx(want[0], abs=1e-6), pytest.approx(want[1], abs=1e-6))
    loss, share = ppo.policy_loss(old, old, advantages, mask, 0.2)
    assert float(loss) == pytest.approx(-float(advantages[mask].mean())) and share == 0


def test_the_clip_stops_the_gradient_only_where_it_binds():
    """Guards against a trust region that also holds back a token on its way home: gradient -A ratio / n, and 0 where the clip binds or nothing counts."""
    mask, logp, old, advantages = far_ratios(7)
    logp.requires_grad_(True)
    ppo.policy_loss(logp, old, advantages, mask, 0.2)[0].backward()
    ratio = torch.exp((logp - old).detach())
    binds = (advantages > 0) & (ratio > 1.2) | (advantages < 0) & (ratio < 0.8)
    want = torch.where(mask & ~binds, -advantages * ratio / mask.sum(), 0.0)
    assert (mask & binds).any() and (mask & ~binds & ((ratio > 1.2) | (ratio < 0.8))).any()
    torch.testing.assert_close(logp.grad, want, rtol=0, atol=1e-9)


def test_value_loss():
    """Guards against an ignored clip, a clip around the returns, and a clip by which a value that ran away gains."""
    mask, draw = ragged(8)
    old = draw()
    values, returns = old + draw(1.5) * mask, draw(2.0)
    assert ((values - old).abs()[mask] > 0.2).any() and ((values - old).abs()[mask] < 0.2).any()
    losses = []
    for clip in (0.0, 0.2, 1.0):
        losses.append(float(ppo.value_loss(values, old, returns, mask, clip)))
        assert losses[-1] == pytest.approx(value_loss_by_hand(values, old, returns, mask, clip), abs=1e-10)
    assert losses[1] > losses[2] > losses[0]


def test_kl_estimates_are_exact_in_expectation():
    """Guards against a flipped sign and an inverted ratio: over every token, E k1 = E k3 = KL(pi || ref), k3 never negative."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        pi, ref = (torch.randn(5, generator=rng, dtype=torch.float64) * 3).log_softmax(0), torch.randn(5, generator=rng, dtype=torch.float64).log_softmax(0)
        k1, k3 = ppo.kl_estimates(pi, ref)
        want = sum(math.exp(a) * (a - b) for a, b in zip(pi.tolist(), ref.tolist(), strict=True))
        assert want > 0.1 and k1.min() < 0 <= float(k3.min())
        assert float((pi.exp() * k1).sum()) == pytest.approx(want) and float((pi.exp() * k3).sum()) == pytest.approx(want)
        reverse = sum(math.exp(b) * (b - a) for a, b in zip(pi.tolist(), ref.tolist(), strict=True))
        assert abs(reverse - want) > 1e-3  # the other direction would be seen
    assert all(k.eq(0).all() for k in ppo.kl_estimates(pi, pi))


def test_kl_of_whole_answers():
    """Guards against a mean over tokens where the sum is meant: over all answers of three tokens, E sum k1 = E sum k3 = KL of the two models."""
    tiny = LlamaConfig(dim=12, n_layers=1, n_heads=3, n_kv_heads=1, vocab_size=4, multiple_of=8, max_seq_len=8)
    policy, reference = build(seed=1, config=tiny).double(), build(seed=2, config=tiny).double()
    rows = torch.tensor([[1, *r] for r in itertools.product(range(4), repeat=3)])
    with torch.no_grad():
        logp, ref_logp = log_probs(policy, rows), log_probs(reference, rows)
        k1, k3 = ppo.kl_estimates(logp, ref_logp)
    p, q = logp.sum(1).exp(), ref_logp.sum(1).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5) and float(q.sum()) == pytest.approx(1.0, abs=1e-5)
    want = float((p * (p / q).log()).sum())
    assert want > 0.1 and k3.min() >= 0
    assert float((p * k1.sum(1)).sum()) == pytest.approx(want, abs=1e-5) and float((p * k3.sum(1)).sum()) == pytest.approx(want, abs=1e-5)


def test_the_score_is_finite_and_monotone():
    """Guards against log(0): logit(clamp(sigmoid(x))) at scores where sigmoid is exactly 0 or 1 in float32."""
    x = torch.tensor([-500.0, -40.0, -3.0, 0.0, 0.2, 3.0, 40.0, 500.0])
    got = ppo.logit_clamp(x)
    p = x.double().sigmoid().clamp(1e-4, 1 - 1e-4)
    torch.testing.assert_close(got.double(), (p / (1 - p)).log(), rtol=0, atol=1e-5)


# ---- rollouts ------------------------------------------------------------------------------------------------------------------


class Judge:
    """Rewards that are a function of a row's tokens and differ between rows; remembers what it was asked."""

    def __call__(self, rows, is_safety):
        self.rows, self.is_safety = rows, list(is_safety)
        self.raw = torch.tensor([math.sin(sum((j + 1) * t for j, t in enumerate(ids))) * 4 for ids, _ in rows])
        return {"helpful": self.raw + 1, "safety": self.raw - 1, "reward": self.raw}


def settings(**more) -> PPOConfig:
    return PPOConfig(**{**dict(batch_size=8, minibatch=4, max_new_tokens=7, beta=0.2, gamma=0.9, gae_lambda=0.7, no_eos_penalty=1.5), **more})


def models():
    """Policy, reference and critic, all different."""
    return build(seed=3), build(seed=4).requires_grad_(False), build(RewardModel, 5)


def roll_out(module=ppo, parts=None, prompts=PROMPTS, safety=SAFETY, seed=1, micro=3, **more):
    """(rollout, judge, models) of `module`, a few rows at a time so that every batch is ragged."""
    parts, judge = parts or models(), Judge()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MICRO", micro)
        return module.rollout(*parts, judge, prompts, safety, settings(**more), EOS, seed), judge, parts


def rows_of(roll):
    return [(roll.tokens[i, :n].tolist(), s) for i, (s, n) in enumerate(zip(roll.starts.tolist(), roll.lengths.tolist(), strict=True))]


@torch.no_grad()
def rollout_by_hand(parts, roll, raw, config):
    """All fields of a rollout from its tokens, each row alone and without padding, in loops. raw: the reward model's logits [B]."""
    policy, reference, critic = parts
    out = {name: torch.zeros(*roll.tokens[:, 1:].shape, dtype=torch.float64) for name in FIELDS}
    out["mask"] = out["mask"].bool()
    limit = math.log((1 - 1e-4) / 1e-4)
    score = torch.tensor([[min(max(float(r), -limit), limit) for r in raw]], dtype=torch.float64)
    score = whiten_by_hand(score, torch.ones_like(score, dtype=torch.bool))[0]
    for i, (ids, start) in enumerate(rows_of(roll)):
        x = torch.tensor([ids])
        for name, model in (("logp", policy), ("ref_logp", reference)):
            table = model(x)[0].double().log_softmax(-1)
            for j in range(start, len(ids)):
                out[name][i, j - 1] = table[j - 1, ids[j]]
        for j in range(start, len(ids)):
            out["values"][i, j - 1] = float(critic.score(critic.features(x[:, :j])[0, -1]))  # the state before token j, which it cannot have seen
            out["mask"][i, j - 1] = True
        if ids[-1] != EOS:
            score[i] -= config.no_eos_penalty
    kl = out["logp"] - out["ref_logp"]
    rewards = rewards_by_hand(score, kl, out["mask"], config.beta)
    advantages, out["returns"] = gae_by_hand(rewards, out["values"], out["mask"], config.gamma, config.gae_lambda)
    out["advantages"] = whiten_by_hand(advantages, out["mask"])
    return out, kl


def compare(roll, want, atol=1e-4):
    for name in FIELDS:
        torch.testing.assert_close(getattr(roll, name).to(want[name].dtype), want[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_rollout():
    """Guards against numbers that depend on padding, a mask off by one, an EOS that is no action, values that see the action, the wrong model as the
    reference, and a score that comes twice or never: every field, row by row alone."""
    roll, judge, parts = roll_out()
    rows = rows_of(roll)
    answers = [ids[s:] for ids, s in rows]
    ended = [a[-1] == EOS for a in answers]
    assert [ids[:s] for ids, s in rows] == PROMPTS and rows == judge.rows and judge.is_safety == SAFETY
    assert any(ended) and not all(ended) and len({len(a) for a in answers}) > 2  # ragged, or the test shows nothing
    assert all(EOS not in a[:-1] and 1 <= len(a) <= 7 for a in answers) and all(e or len(a) == 7 for e, a in zip(ended, answers, strict=True))
    assert not any(roll.tokens[i, len(ids) :].any() for i, (ids, _) in enumerate(rows)) and (roll.tokens == EOS).sum() == sum(ended)
    want, kl = rollout_by_hand(parts, roll, judge.raw, settings())
    torch.testing.assert_close(roll.logp.double(), want["logp"], rtol=0, atol=1e-5)
    compare(roll, want)
    m, n = roll.metrics, want["mask"].sum(1)
    k3 = torch.exp(-kl) - 1 + kl
    assert m["kl"] == pytest.approx(float(kl.sum(1).mean()), abs=1e-4) and m["kl_k3"] == pytest.approx(float(k3.sum(1).mean()), abs=1e-4)
    assert m["value"] == pytest.approx(float(want["values"].sum() / n.sum()), abs=1e-4) and m["finished"] == sum(ended) / 8
    assert m["return"] == pytest.approx(float(want["returns"].sum() / n.sum()), abs=1e-4) and m["distinct_2"] == ppo.distinct(answers)
    unforeseen = (want["returns"] - want["values"])[want["mask"]].square().mean()
    assert m["advantage_std"] == pytest.approx(float(unforeseen.sqrt()), abs=1e-4)
    assert m["length"] == float(n.double().mean()) and m["reward"] == pytest.approx(float(judge.raw.mean()))
    assert (m["helpful"], m["safety"]) == (pytest.approx(m["reward"] + 1, abs=1e-5), pytest.approx(m["reward"] - 1, abs=1e-5))
    left = unforeseen / want["returns"][want["mask"]].var(correction=0)
    assert m["explained_variance"] == pytest.approx(1 - float(left), abs=1e-3)


def test_rollout_fields_take_no_gradient():
    """Guards against gradients that flow into advantages, returns, old values or old log-probabilities."""
    roll, _, (policy, _, critic) = roll_out()
    assert all(p.requires_grad for model in (policy, critic) for p in model.parameters()) and torch.is_grad_enabled()
    assert not any(getattr(roll, name).requires_grad for name in FIELDS)
    assert all(p.grad is None for model in (policy, critic) for p in model.parameters())


def test_the_score_enters_once_at_the_last_action():
    """Guards against the slot after EOS, whose bias is (1 - lambda)(V - r): with gamma = lambda = 1 differences of returns are the rewards."""
    config = dict(gamma=1.0, gae_lambda=1.0, beta=0.3)
    roll, judge, _ = roll_out(**config)
    kl = (roll.logp - roll.ref_logp).double()
    ended = torch.tensor([ids[-1] == EOS for ids, _ in rows_of(roll)])
    score = (judge.raw - judge.raw.mean()) / judge.raw.std(correction=0) - 1.5 * ~ended
    for i in range(8):
        own = columns(roll.mask, i)
        after = [*roll.returns[i, own[1:]].tolist(), 0.0]
        for t, later in zip(own, after, strict=True):
            want = -0.3 * float(kl[i, t]) + (float(score[i]) if t == own[-1] else 0.0)
            assert float(roll.returns[i, t]) - later == pytest.approx(want, abs=1e-4)


def test_distinct_is_a_share_of_pairs():
    """Guards against pairs that reach over two answers, and a division by the number of none."""
    assert ppo.distinct([[1, 2, 1, 2], [1, 2], [3]]) == 2 / 4 and ppo.distinct([[5, 6, 7]], 3) == 1.0
    assert ppo.distinct([[1], []]) == 0.0


def test_unfinished_answers_lose_the_penalty():
    """Guards against a penalty on every sample, on the finished ones, or before whitening, which would blur it."""
    with_it, without = (roll_out(no_eos_penalty=x, gamma=1.0, gae_lambda=1.0)[0] for x in (1.5, 0.0))
    assert torch.equal(with_it.tokens, without.tokens)
    lost = without.returns - with_it.returns
    ended = torch.tensor([ids[-1] == EOS for ids, _ in rows_of(with_it)])
    torch.testing.assert_close(lost, 1.5 * (~ended)[:, None] * with_it.mask.float(), rtol=0, atol=1e-5)


def test_identical_models_have_no_kl():
    """Guards against a reference that is scored by another path than the policy: its KL would not start at 0, nor the ratio at 1."""
    policy = build(seed=3)
    roll, _, parts = roll_out(parts=(policy, copy.deepcopy(policy).requires_grad_(False), build(RewardModel, 5)))
    assert torch.equal(roll.logp, roll.ref_logp) and roll.metrics["kl"] == 0 and roll.metrics["kl_k3"] == 0
    seen = ppo.update(policy, parts[2], optimizers(policy, parts[2]), roll, settings(minibatch=8), 0)
    assert seen["first_log_ratio"] < 1e-5 and seen["clip_fraction"] == 0 and seen["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert roll_out()[0].metrics["kl"] > 0.1  # and different models have one


def test_shuffled_rewards_are_a_permutation():
    """Guards against a control that shuffles nothing, draws with replacement, or moves the penalty along with the reward."""
    config = dict(gamma=1.0, gae_lambda=1.0, beta=0.0)
    plain, judge, _ = roll_out(**config)
    shuffled, other, _ = roll_out(shuffle_rewards=True, **config)
    assert torch.equal(plain.tokens, shuffled.tokens) and torch.equal(judge.raw, other.raw)
    ended = torch.tensor([ids[-1] == EOS for ids, _ in rows_of(plain)])
    scores = [[float(r.returns[i, columns(r.mask, i)[0]]) + 1.5 * (not ended[i]) for i in range(8)] for r in (plain, shuffled)]
    assert sorted(scores[0]) == pytest.approx(sorted(scores[1]), abs=1e-4)
    assert sum(abs(a - b) > 1e-3 for a, b in zip(*scores, strict=True)) >= 4
    assert plain.metrics["reward"] == shuffled.metrics["reward"]


def test_duplicate_prompts_draw_different_answers():
    """Guards against one random stream a prompt: equal prompts would get equal answers, and seeds would not matter."""
    answers = lambda seed: [tuple(ids[s:]) for ids, s in rows_of(roll_out(prompts=[[1, 6]] * 8, seed=seed)[0])]  # noqa: E731
    assert len(set(answers(1))) >= 6 and answers(1) == answers(1) and answers(1) != answers(2)


def one_token_chi2(module=ppo, n=3000):
    """Chi-square of n sampled first tokens against the policy's own probabilities: 12 degrees of freedom, P(above 35) = 0.0005."""
    roll, _, (policy, *_) = roll_out(module, prompts=[[1, 5]] * n, safety=[False] * n, seed=2, micro=n, max_new_tokens=1, batch_size=n, minibatch=n)
    with torch.no_grad():
        want = policy(torch.tensor([[1, 5]]))[0, -1].double().softmax(-1) * n
    count = torch.bincount(roll.tokens[:, 2], minlength=13).double()
    return float(((count - want) ** 2 / want).sum())


def test_the_sampler_is_the_scored_policy(monkeypatch):
    """Guards against T != 1 or top_p < 1 in rollouts: the ratio still starts at 1, so only frequencies tell; both would be far off."""
    assert one_token_chi2() < 35
    real = ppo.sample_many
    for bad in (dict(temperature=0.8), dict(top_p=0.9)):
        signature = inspect.signature(real)

        def other(*a, bad=bad, signature=signature, **k):
            bound = signature.bind(*a, **k)
            bound.arguments.update(bad)
            return real(*bound.args, **bound.kwargs)

        monkeypatch.setattr(ppo, "sample_many", other)
        assert one_token_chi2() > 60


# ---- the update ----------------------------------------------------------------------------------------------------------------


def optimizers(policy, critic, **more):
    c = TrainConfig(**{**dict(steps=1, lr=1e-2, eps=1e-2), **more})  # so large an epsilon that the scale of a gradient shows in the step
    return make_optimizer(policy, c), make_optimizer(critic, c)


def injected(parts, seed=0, extra=0):
    """A rollout whose old log-probabilities and values differ from the models' (or no clip ever binds), `extra` columns of padding on the right, and
    large numbers wherever the mask is false."""
    policy, _, critic = parts
    rng = np.random.default_rng(seed)
    lengths = [9, 4, 12, 7, 6, 10, 5, 11]
    starts = [3, 3, 5, 1, 4, 2, 4, 6]
    T = max(lengths) + extra
    tokens = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, 13, (8, max(lengths))))
    tokens = torch.cat([tokens, torch.full((8, extra), 11)], 1)
    mask = torch.zeros(8, T - 1, dtype=torch.bool)
    for i, (s, n) in enumerate(zip(starts, lengths, strict=True)):
        mask[i, s - 1 : n - 1] = True
    draw = lambda scale: torch.from_numpy(rng.normal(size=(8, 11)) * scale).float()  # noqa: E731
    pad = lambda x: torch.cat([x, torch.zeros(8, extra)], 1)  # noqa: E731
    with torch.no_grad():
        logp = log_probs(policy, tokens) + pad(draw(0.4))
        values = critic.values(tokens)[:, :-1] + pad(draw(0.4))
    advantages, returns = pad(draw(1.0)), pad(draw(2.0))
    outside = lambda x, v: torch.where(mask, x, torch.tensor(v))  # noqa: E731
    return ppo.Rollout(tokens, torch.tensor(starts), torch.tensor(lengths), mask, outside(logp, -200.0), outside(logp, 3.0), outside(values, 70.0),
                       outside(advantages, 90.0), outside(returns, -80.0), {})  # fmt: skip


def update_by_hand(policy, critic, roll, config, seed, lr=1e-2, eps=1e-2, learn_policy=True):
    """The update once more: every row alone, every token alone, sums divided by the minibatch's number of tokens, AdamW written out. Metrics too."""
    c, D = config, TrainConfig(steps=1)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for model in (policy, critic) for p in model.parameters()}
    sums: dict[str, float] = {"ratio_max": 0.0, "first_log_ratio": 0.0}
    minibatches = np.split(np.random.default_rng([seed, 2]).permutation(len(roll.tokens)), len(roll.tokens) // c.minibatch)
    for step, minibatch in enumerate(minibatches, 1):
        losses, errors, seen = [], [], {"clip_fraction": 0.0, "entropy": 0.0, "approx_kl": 0.0}
        for i in minibatch:
            n, s = int(roll.lengths[i]), int(roll.starts[i])
            x = roll.tokens[i : i + 1, :n]
            table, values = policy(x)[0].log_softmax(-1), critic.values(x)[0]
            for j in range(s, n):
                log_ratio = table[j - 1, x[0, j]] - roll.logp[i, j - 1]
                ratio, a = log_ratio.exp(), float(roll.advantages[i, j - 1])
                bound = a * min(max(ratio.item(), 1 - c.clip), 1 + c.clip)
                losses.append(-a * ratio if a * ratio.item() <= bound else torch.tensor(-bound))
                seen["clip_fraction"] += a * ratio.item() > bound
                v, old, r = values[j - 1], roll.values[i, j - 1], roll.returns[i, j - 1]
                near = old + (v - old).clamp(-c.value_clip, c.value_clip) if c.value_clip else v
                errors.append((v - r) ** 2 if (v - r) ** 2 >= (near - r) ** 2 else (near - r) ** 2)
                seen["entropy"] -= (table[j - 1].exp() * table[j - 1]).sum().item()
                seen["approx_kl"] += ratio.item() - 1 - log_ratio.item()
                sums["ratio_max"] = max(sums["ratio_max"], ratio.item())
                if step == 1:
                    sums["first_log_ratio"] = max(sums["first_log_ratio"], abs(log_ratio.item()))
        seen = {k: v / len(losses) for k, v in seen.items()}
        loss, error = sum(losses) / len(losses), c.value_weight * sum(errors) / len(errors)
        seen |= {"policy_loss": loss.item(), "value_loss": error.item()}
        for name, model, part in (("policy", policy, loss), ("critic", critic, error)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(part, parameters, allow_unused=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
            seen[f"{name}_grad_norm"] = norm
            if name == "policy" and not learn_policy:
                continue
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    if g is None:
                        continue
                    g = g * min(1.0, c.grad_clip / (norm + 1e-6))
                    m, v = moments[p]
                    m.mul_(D.beta1).add_((1 - D.beta1) * g)
                    v.mul_(D.beta2).add_((1 - D.beta2) * g * g)
                    p.mul_(1 - lr * (D.weight_decay if p.dim() > 1 else 0.0))
                    p.sub_(lr * (m / (1 - D.beta1**step)) / ((v / (1 - D.beta2**step)).sqrt() + eps))
        for k, v in seen.items():
            sums[k] = sums.get(k, 0.0) + v / len(minibatches)
    return sums


def both_updates(module=ppo, learn_policy=True, extra=0, **more):
    """(metrics, models) of the package's update and of the one by hand, from the same weights and the same injected rollout."""
    config = settings(**{**dict(grad_clip=0.3, clip=0.2, value_clip=0.3, value_weight=0.7), **more})
    mine, hand = models(), models()
    roll = injected(mine, extra=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MICRO", 3)
        roll = module.Rollout(**{f.name: getattr(roll, f.name) for f in dataclasses.fields(roll)})
        seen = module.update(mine[0], mine[2], optimizers(mine[0], mine[2]), roll, config, 5, learn_policy)
    return (seen, mine), (update_by_hand(hand[0], hand[2], injected(hand), config, 5, learn_policy=learn_policy), hand)


def close(a, b, atol=2e-5):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("minibatch", [8, 4, 2])
def test_update_equals_one_written_by_hand(minibatch):
    """Guards against a mean of means, gradients that pile up over minibatches, a clip of the summed gradient that is lost, rows that are paired with
    others' advantages, and losses that see padding: weights and metrics."""
    (seen, mine), (want, hand) = both_updates(minibatch=minibatch)
    start = models()
    for k in (0, 2):
        moved = max((p - q).abs().max().item() for p, q in zip(mine[k].parameters(), start[k].parameters(), strict=True))
        assert moved > 5e-3
        close(mine[k], hand[k])
    assert seen.keys() == want.keys() and want["policy_grad_norm"] > 0.3 and want["critic_grad_norm"] > 0.3 and want["clip_fraction"] > 0.1
    assert seen == {k: pytest.approx(v, abs=1e-4, rel=1e-4) for k, v in want.items()}


def test_one_step_a_minibatch():
    """Guards against a step a micro-batch (a rate multiplied by their number) and a step over the whole batch."""
    for minibatch in (8, 4, 2, 1):
        parts, steps = models(), []
        pair = optimizers(parts[0], parts[2])
        for k, optimizer in enumerate(pair):
            optimizer.register_step_post_hook(lambda *a, k=k, steps=steps: steps.append(k))
        ppo.update(parts[0], parts[2], pair, injected(parts), settings(minibatch=minibatch), 0)
        assert steps == [0, 1] * (8 // minibatch)


def test_only_the_critic_learns_in_its_warm_up():
    """Guards against an early stop by a loss of 0: momentum and weight decay would move the policy all the same, and leave gradients behind."""
    (seen, mine), (want, hand) = both_updates(learn_policy=False)
    start = models()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(mine[0].parameters(), start[0].parameters(), strict=True))
    close(mine[2], hand[2])
    assert not torch.equal(mine[2].score.weight, start[2].score.weight) and seen["policy_loss"] == pytest.approx(want["policy_loss"], abs=1e-5)


def test_metrics_and_weights_ignore_padding():
    """Guards against entropy, KL and losses averaged over pads, which look calm while answers shrink."""
    (plain, a), _ = both_updates()
    (padded, b), _ = both_updates(extra=9)
    assert plain == {k: pytest.approx(v, rel=1e-6, abs=1e-5) for k, v in padded.items()}  # a norm of 28 rounds in its sixth digit
    close(a[0], b[0]), close(a[2], b[2])


def test_the_update_leaves_the_rollout_alone():
    """Guards against gradients into advantages or old values, and against a rollout that is changed in place between minibatches."""
    parts = models()
    roll = injected(parts)
    before = {name: getattr(roll, name).clone() for name in FIELDS}
    for name in ("logp", "advantages", "values", "returns"):
        assert not getattr(roll, name).requires_grad
    ppo.update(parts[0], parts[2], optimizers(parts[0], parts[2]), roll, settings(), 0)
    assert all(torch.equal(before[name], getattr(roll, name)) for name in FIELDS)


def test_a_gradient_that_is_not_finite_stops():
    """Guards against weights of NaN that are saved over good ones."""
    parts = models()
    roll = injected(parts)
    roll.advantages[0, roll.starts[0]] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient norm"):
        ppo.update(parts[0], parts[2], optimizers(parts[0], parts[2]), roll, settings(), 0)


@pytest.mark.parametrize("n", [2, 3])
def test_data_ranks_share_a_rollout(n, monkeypatch):
    """Guards against rows that no rank or several ranks go through, and a rank that knows its own rows only."""
    alone, _, _ = roll_out()
    monkeypatch.setattr(ppo, "MICRO", 3)
    for roll in tiny.on_ranks(n, lambda rank: ppo.rollout(*models(), Judge(), PROMPTS, SAFETY, settings(), EOS, 1)):
        assert torch.equal(roll.tokens, alone.tokens) and roll.metrics == pytest.approx(alone.metrics, abs=1e-4)
        compare(roll, {name: getattr(alone, name) for name in FIELDS}, atol=1e-5)


class Recorder:
    """In an optimizer's place: the gradients of a step."""

    def __init__(self, model):
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self):
        self.gradients = [p.grad.clone() for p in self.parameters if p.grad is not None]

    def zero_grad(self, set_to_none):
        assert set_to_none


def test_the_mean_of_the_data_ranks_gradients_is_that_of_one_rank(monkeypatch):
    """Guards against a minibatch of which a rank takes other rows than its own, and a weight that leaves the gradient a rank's share too large or small."""
    monkeypatch.setattr(ppo, "MICRO", 2)

    def work(rank):
        policy, _, critic = parts = models()
        recorders = Recorder(policy), Recorder(critic)
        seen = ppo.update(policy, critic, recorders, injected(parts), settings(minibatch=8, grad_clip=1e9), 5)
        return [g for x in recorders for g in x.gradients], {k: v for k, v in seen.items() if "norm" not in k}

    (want, metrics), (first, mine), (second, theirs) = work(0), *tiny.on_ranks(2, work)
    assert len(want) == len(first) > 20 and mine == theirs == pytest.approx(metrics, abs=1e-5)
    for g, a, b in zip(want, first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, g, rtol=1e-4, atol=1e-6)


def test_the_critic_is_a_copy_of_the_reward_model():
    """Guards against a critic that shares the reward model's weights (the reward drifts along) or that drops its head (random first advantages)."""
    for evidence in (False, True):
        reward = RewardModel(CONFIG, evidence).init_weights(5)
        critic = ppo.critic_from(reward)
        x = torch.tensor([[1, 5, 9, 4]])
        assert torch.equal(critic.values(x), reward.values(x))
        assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in reward.parameters()}
        critic.values(x).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in critic.parameters()) and critic.score.weight.requires_grad
        assert all(p.grad is None for p in reward.parameters())


# ---- whole runs ----------------------------------------------------------------------------------------------------------------


TEXTS = [f"[INST] Tell line {i} [/INST] Line {i} tells of {i % 7} boats. " for i in range(60)]
GATED = Gated.__call__
RUN = LlamaConfig(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=320, multiple_of=8, max_seq_len=160)


def write_stages(root: Path) -> Path:
    """A chat model whose answers end about half the time, and two reward models, with their tokenizer, as stages write them; and a file of prompts."""
    tokenizer = Tokenizer.train(TEXTS, 320, root / "t.model", threads=1)
    for name, kind, seed in (("policy", Llama, 1), ("helpful", RewardModel, 2), ("harmless", RewardModel, 3)):
        model = build(kind, seed, RUN)
        if name == "policy":
            with torch.no_grad():  # one feature is always on, whatever the block adds, and speaks for EOS
                model.tok_embeddings.weight[:, 0], model.norm.weight[0] = 3.0, 1.0
                model.layers[0].attention.wo.weight[0] = model.layers[0].feed_forward.w2.weight[0] = 0.0
                model.output.weight[:, 0] = 0.0
                model.output.weight[tokenizer.eos_id, 0] = 2.2
        else:
            (root / name).mkdir()
            (root / name / "reward.json").write_text(json.dumps({"evidence": False, "kind": name}))
        checkpoint.save_state(root / name / "checkpoint", 1, model, {}, {}, tokenizer)
    rows = [{"messages": [{"role": "user", "content": f"Tell line {i}"}], "safety": i % 3 == 0} for i in range(14)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def run_config(root: Path, out: Path, **more) -> PPOConfig:
    paths = dict(prompts=str(root / "prompts.jsonl"), policy=str(root / "policy"), helpful=str(root / "helpful"), safety=str(root / "harmless"), out=str(out))
    return PPOConfig(**{**paths, **dict(iterations=4, batch_size=8, minibatch=4, max_new_tokens=6, lr=3e-3, critic_lr=6e-3, beta=0.1, val_fraction=0.2,
                                        eval_every=2, save_every=2, critic_warmup=1, device="cpu"), **more})  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_stages(tmp_path_factory.mktemp("stages"))


def weights(out: Path, folder="checkpoint") -> dict:
    from safetensors.torch import load_file

    return load_file(checkpoint.load_state(out / folder)[1] / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(out: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of a run of four iterations at once."""
    out = tmp_path_factory.mktemp("whole") / "not" / "there" / "yet"
    ppo.run(run_config(root, out))
    return out


def test_run_writes_what_it_says(root, whole):
    """Guards against a metric that is lost, a checkpoint that nothing can load, and a policy that never moved or moved in the critic's warm-up."""
    lines = records(whole)
    trained, measured = [r for r in lines if "kl" in r], [r for r in lines if "kl" not in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4] and [r["step"] for r in measured] == [0, 2, 4]
    want = {"step", "reward", "helpful", "safety", "kl", "kl_k3", "length", "finished", "distinct_2", "value", "return", "explained_variance", "advantage_std",
            "policy_loss", "value_loss", "clip_fraction", "entropy", "approx_kl", "ratio_max", "first_log_ratio", "policy_grad_norm",
            "critic_grad_norm"}  # fmt: skip
    assert all(r.keys() == want and all(math.isfinite(v) for v in r.values()) for r in trained)
    assert all(r.keys() == {"step", "eval/reward", "eval/finished"} for r in measured)
    assert 0 < sum(r["finished"] for r in trained) < 4 and all(r["first_log_ratio"] < 1e-4 for r in trained)
    assert trained[0]["kl"] == trained[1]["kl"] == 0 and trained[2]["kl_k3"] > 0 and trained[3]["kl_k3"] > 0  # the first step of the policy is the second's
    model, tokenizer = minillama.load(whole)
    start, _ = minillama.load(root / "policy")
    assert same(model.state_dict(), weights(whole)) and same(model.state_dict(), weights(whole, "state")) and tokenizer.eos_id == EOS
    assert (model.output.weight - start.output.weight).abs().max() > 1e-3
    assert same(weights(root / "helpful"), Gated(root / "helpful").helpful.state_dict())
    step, _, tensors, _ = checkpoint.load_state(whole / "state")
    assert step == 4 and {k.split("/")[0] for k in tensors} == {"critic", "policy_optimizer", "critic_optimizer"}
    assert json.loads((whole / "result.json").read_text())["iteration"] == 4 and (whole / "config.yaml").exists()


def test_an_evaluation_equals_one_by_hand(root, whole):
    """Guards against a share of finished answers that is none, and an evaluation on prompts that were trained on."""
    policy, tokenizer = minillama.load(whole)
    prompts = read_prompts(str(root / "prompts.jsonl"))
    Random("ppo:0").shuffle(prompts)
    held = [encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in p["messages"]]) for p in prompts[:3]]
    drawn = sample_many(policy, held, 6, 1.0, 0, [[EOS]], 8)
    rows = [(p + ids, len(p)) for p, ids in zip(held, drawn.tokens, strict=True)]
    reward = Gated(root / "helpful", root / "harmless")(rows, [p["safety"] for p in prompts[:3]])["reward"]
    got = records(whole)[-1]
    assert got["eval/reward"] == pytest.approx(float(reward.mean()), abs=1e-5)
    assert got["eval/finished"] == pytest.approx(sum(drawn.stopped) / 3)


def test_run_takes_each_prompt_once_an_epoch(root, tmp_path, monkeypatch):
    """Guards against prompts that are never asked, held-out prompts that are trained on, and safety flags that belong to other prompts."""
    asked = []
    monkeypatch.setattr(Gated, "__call__", lambda self, rows, flags, *a: asked.append([(tuple(i[:s]), f) for (i, s), f in zip(rows, flags, strict=True)])
                        or GATED(self, rows, flags, *a))  # fmt: skip
    ppo.run(run_config(root, tmp_path / "out", iterations=3, batch_size=11, minibatch=11, eval_every=3))
    before, *epochs, held = asked
    assert len(epochs) == 3 and all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 11 for e in epochs) and epochs[0] != epochs[1]
    assert len(held) == 3 and not set(held) & set(epochs[0]) and before == held
    tokenizer = Tokenizer(root / "t.model")
    prompts = {tuple(tokenizer.encode(f"[INST] Tell line {i} [/INST]", bos=True)): i % 3 == 0 for i in range(14)}
    assert dict(held) | dict(epochs[0]) == prompts


@pytest.mark.parametrize("batch,iterations", [(5, 6), (6, 5)])
def test_an_epoch_may_end_within_a_batch(batch, iterations, root, tmp_path, monkeypatch):
    """Guards against an order of the next epoch that is missing where a batch holds its first prompt only (15 = 14 + 1), or several of them."""
    asked = []
    monkeypatch.setattr(Gated, "__call__", lambda self, rows, *a: asked.extend(tuple(i[:s]) for i, s in rows) or GATED(self, rows, *a))
    ppo.run(run_config(root, tmp_path / "out", iterations=iterations, batch_size=batch, minibatch=batch, eval_every=0))
    assert len(asked) == 30 and len(set(asked[:14])) == 14 and sorted(asked[:14]) == sorted(asked[14:28]) and asked[:14] != asked[14:28]
    assert len(set(asked[28:])) == 2


def test_every_iteration_has_its_seed_and_the_reference_is_frozen(root, tmp_path, monkeypatch):
    """Guards against answers that are drawn alike in every iteration or for every seed, and a reference that could learn."""
    seeds, real = [], ppo.rollout

    def spy(policy, reference, *a):
        assert not policy.training and not reference.training and not any(p.requires_grad for p in reference.parameters())
        seeds.append(a[-1])
        return real(policy, reference, *a)

    monkeypatch.setattr(ppo, "rollout", spy)
    for seed in (0, 1, 2):
        ppo.run(run_config(root, tmp_path / str(seed), seed=seed, iterations=2, eval_every=0))
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("critic_lr, want", [(6e-3, 6e-3), (0.0, 3e-3)])
def test_the_critic_has_a_rate_of_its_own(critic_lr, want, root, tmp_path, monkeypatch):
    """Guards against a critic that learns at the policy's rate although it was given another."""
    rates, real = [], ppo.make_optimizer
    monkeypatch.setattr(ppo, "make_optimizer", lambda model, c: rates.append(c.lr) or real(model, c))
    ppo.run(run_config(root, tmp_path / "out", iterations=1, batch_size=2, minibatch=2, eval_every=0, critic_lr=critic_lr))
    assert rates == [3e-3, want]


def test_progress_without_a_terminal(root, tmp_path, capsys, monkeypatch):
    """Guards against a log with a line for every iteration, or with none, seconds that are no duration, and a state written more often than asked."""
    began, saved, real = time.monotonic(), [], checkpoint.save_state
    monkeypatch.setattr(checkpoint, "save_state", lambda folder, step, *a, **k: saved.append((Path(folder).name, step)) or real(folder, step, *a, **k))
    ppo.run(run_config(root, tmp_path / "out", iterations=11, batch_size=2, minibatch=2, eval_every=0, save_every=4))
    assert saved == [("state", 4), ("state", 8), ("state", 11), ("checkpoint", 11)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ppo ")]
    assert [line[1] for line in lines] == ["10/11", "11/11"] and lines[1][-3:] == ["ETA", "0", "s"]
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert min(seconds) > 0 and sum(seconds) < time.monotonic() - began


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_writes_and_speaks(rank, root, tmp_path, monkeypatch):
    """Guards against a log, a progress bar or a line from every rank of a job, or from none."""
    monkeypatch.setattr(ppo.parallel, "start", lambda *_: parallel.Mesh(ParallelConfig(shard=1), rank=rank))
    spoken = []
    for i, kind in enumerate((io.StringIO, Terminal)):  # a log has lines, a terminal a bar
        out = tmp_path / str(i)
        monkeypatch.setattr(sys, "stdout", kind())
        ppo.run(run_config(root, out, iterations=10, batch_size=2, minibatch=2, eval_every=5))
        spoken.append(sys.stdout.getvalue())
        written = [name for name in ("metrics.jsonl", "config.yaml", "result.json") if (out / name).exists()]
        assert len(written) == (0 if rank else 3) and (out / "checkpoint").exists()
    assert spoken == ["", ""] if rank else "ppo 10/10" in spoken[0] and "ppo: 100%" in spoken[1] and "ETA" not in spoken[1]


def test_the_models_are_asked_for_whole_logits(root, tmp_path, monkeypatch):
    """Guards against a policy or a reference whose logits lie on several tensor ranks: no log-probability can be taken of a part."""
    asked, real = [], ppo.load_sharded
    monkeypatch.setattr(ppo, "load_sharded", lambda path, mesh, **how: asked.append((Path(path).name, how)) or real(path, mesh, **how))
    ppo.run(run_config(root, tmp_path / "out", iterations=2, patience=2, critic_warmup=0, eval_every=1))
    assert asked == [(name, {"bf16": False, "split_logits": False}) for name in ("policy", "checkpoint")]


def test_resume_is_exact(root, whole, tmp_path):
    """Guards against a critic, an optimizer or a position in the prompts that is lost between runs: two and two iterations are four, bit for bit."""
    out = tmp_path / "out"
    ppo.run(run_config(root, out, iterations=2))
    assert not same(weights(out), weights(whole))
    ppo.run(run_config(root, out, resume=True))
    assert same(weights(out), weights(whole)) and records(out) == records(whole)
    mine, theirs = (checkpoint.load_state(x / "state")[2] for x in (out, whole))
    assert same(mine, theirs) and len(mine) > 50
    before = records(out)
    assert same(ppo.run(run_config(root, out, resume=True)).state_dict(), weights(whole)) and records(out) == before  # nothing left to do


KILLED = """
import json, os, signal, sys
from minillama import ppo
from minillama.config import PPOConfig
append = ppo.append_metrics
def fatal(path, record):
    append(path, record)
    if record["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ppo.append_metrics = fatal
ppo.run(PPOConfig(**json.loads(sys.argv[1])))
"""


def test_kill_9_and_resume_gives_the_uninterrupted_weights(root, whole, tmp_path):
    """Guards against a state that is only right when the run ends by itself: killed after the third iteration, saved after the second."""
    config = run_config(root, tmp_path / "out")
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "parallel"}
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(fields)], capture_output=True, text=True, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [r["step"] for r in records(tmp_path / "out")] == [0, 1, 2, 2, 3] and not (tmp_path / "out" / "checkpoint").exists()
    ppo.run(dataclasses.replace(config, resume=True))
    assert same(weights(tmp_path / "out"), weights(whole)) and records(tmp_path / "out") == records(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_resumes(number, root, whole, tmp_path):
    """Guards against losing the iterations since the last state when a job is preempted."""
    out = tmp_path / "out"
    stopped = lambda _: signal.raise_signal(number) or {}  # in the evaluation of the start already  # noqa: E731
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 1"):
        ppo.run(run_config(root, out, save_every=0), evaluate=stopped)
    assert checkpoint.load_state(out / "state")[0] == 1
    ppo.run(run_config(root, out, save_every=0, resume=True))
    assert same(weights(out), weights(whole))


def scripted(monkeypatch, script, n_held=3):
    """The gated reward with given means on the held-out prompts, and its own on the others."""
    script = list(script)

    def call(self, rows, flags, *a):
        out = GATED(self, rows, flags, *a)
        return {**out, "reward": torch.full((n_held,), script.pop(0))} if len(rows) == n_held else out

    monkeypatch.setattr(Gated, "__call__", call)


def test_early_stopping_keeps_the_best(root, tmp_path, monkeypatch):
    """Guards against the last policy in place of the best, a count of bad evaluations that never starts anew, and a resume that forgets the best."""
    snapshots = []
    keep = lambda model: snapshots.append({k: v.clone() for k, v in model.state_dict().items()}) or {"n": float(len(snapshots))}  # noqa: E731
    config = run_config(root, tmp_path / "out", iterations=9, eval_every=1, save_every=1, patience=2, critic_warmup=0)
    script = [7.0, -1.0, -3.0, 0.5, 0.4, 0.3, 9.0, 9.0]  # the first is the start's, which is no candidate
    scripted(monkeypatch, script)
    best = ppo.run(config, evaluate=keep)
    assert len(snapshots) == 6 and not same(snapshots[3], snapshots[5])
    assert same(best.state_dict(), snapshots[3]) and same(weights(tmp_path / "out"), snapshots[3]) and not best.training
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == {"iteration": 3, "eval_reward": pytest.approx(0.5)}
    measured = [r for r in records(tmp_path / "out") if "eval/reward" in r]
    assert [r["eval/reward"] for r in measured] == pytest.approx(script[:6]) and [r["eval/n"] for r in measured] == [1, 2, 3, 4, 5, 6]
    before = records(tmp_path / "out")
    assert same(ppo.run(dataclasses.replace(config, resume=True)).state_dict(), snapshots[3]) and records(tmp_path / "out") == before  # nothing left to do
    real = checkpoint.save_state

    def full(folder, step, *a, **k):
        if Path(folder).name == "state" and step == 3:
            raise OSError(28, "No space left on device")
        return real(folder, step, *a, **k)

    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    with monkeypatch.context() as patch, pytest.raises(OSError):  # dies between the best policy and the state that knows of it
        patch.setattr(checkpoint, "save_state", full)
        scripted(patch, script)
        ppo.run(other)
    assert [checkpoint.load_state(tmp_path / "other" / x)[0] for x in ("checkpoint", "state")] == [3, 2]
    scripted(monkeypatch, script[3:])
    again = ppo.run(dataclasses.replace(other, resume=True))
    assert same(again.state_dict(), snapshots[3]) and [r["step"] for r in records(tmp_path / "other") if "kl" in r] == [1, 2, 3, 4, 5]


def test_patience_without_an_evaluation_keeps_the_last(root, tmp_path):
    """Guards against a run whose every evaluation falls into the critic's warm-up, and that ends by loading a best policy that is not there."""
    model = ppo.run(run_config(root, tmp_path / "out", iterations=2, critic_warmup=2, patience=2))
    assert same(model.state_dict(), weights(tmp_path / "out")) and not model.training
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == {"iteration": 2, "eval_reward": None}


def test_bad_requests(root, whole, tmp_path):
    """Guards against a run that dies in its first iteration, or overwrites another, for want of a look at what it was given."""
    out = tmp_path / "out"
    for more, words in (
        (dict(batch_size=16), "11 prompts are fewer than batch_size 16"),
        (dict(helpful=str(root / "policy")), "holds no reward model"),
    ):
        with pytest.raises(ValueError, match=words):
            ppo.run(run_config(root, out, **more))
    before = records(whole)
    with pytest.raises(ValueError, match="already holds a checkpoint of iteration 4; add --resume true"):
        ppo.run(run_config(root, whole))
    assert records(whole) == before
    (tmp_path / "taken" / "checkpoint").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint of another stage"):
        ppo.run(run_config(root, tmp_path / "taken"))
    other = Tokenizer.train([t[::-1] for t in TEXTS], 320, tmp_path / "t.model", threads=1)
    model, _ = minillama.load(root / "policy")
    minillama.save(model, other, tmp_path / "foreign")
    minillama.save(model, None, tmp_path / "mute")
    for policy in ("foreign", "mute"):
        with pytest.raises(ValueError, match="different tokenizers"):
            ppo.run(run_config(root, out, policy=str(tmp_path / policy)))
    for more, words in ((dict(minibatch=3), "batch_size 512 is not divisible by minibatch 3"), (dict(iterations=0), "iterations must be at least 1")):
        with pytest.raises(ValueError, match=words):
            PPOConfig(**more)
    assert not (out / "state").exists() and not (out / "checkpoint").exists()
