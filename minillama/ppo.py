"""PPO (sec 3.2.3): sample answers, score them with the gated and whitened reward less a KL penalty, and move the policy within a clip.

    minillama ppo --prompts runs/my/prompts.jsonl --policy runs/my/reject --helpful runs/my/reward --out runs/my/ppo

An iteration: sample one answer to each of batch_size prompts at T = 1 from the policy that is scored, nothing truncated; take log-probabilities of
policy and reference by the training forward; reward = whiten(logit(R_c)) at the last token, less beta (log pi - log pi_0) at every token; advantages by
GAE; one step a minibatch for policy and critic, each with a clipped loss and an optimizer of its own.

The paper is silent on these, and here is what we do: the critic is a copy of the helpfulness reward model, trunk and head, with weights of its own;
whitening takes the statistics of the iteration's batch; advantages are whitened over the whole batch; losses are means over the minibatch's answer
tokens; an answer without EOS loses a fixed amount after whitening. Left out, with the reason: an entropy bonus (the paper has none), several epochs over
a batch (the paper takes one step a minibatch), an adaptive beta (the paper's is fixed), dropout (Llama has none).

Shapes: B rows, T time. An answer's tokens are at starts..lengths-1 of its row; the action that writes token j is taken in state j-1, so log-probs,
values, rewards and the mask are [B,T-1] with the action for token j in column j-1.
"""
from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minillama import checkpoint
from minillama._files import Tensors
from minillama.chat import Message, encode_prompt
from minillama.config import PPOConfig, TrainConfig
from minillama.data.sources import read_prompts
from minillama.generate import log_probs, sample_many
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.parallel.mesh import settle, whole
from minillama.parallel.state import load_sharded
from minillama.reward import Gated, RewardModel, stack
from minillama.reward import load as load_reward
from minillama.trainer import (
    append_metrics,
    interrupted,
    keep_metrics,
    make_optimizer,
    optimizer_tensors,
    pick_device,
    restore_optimizer,
    stop_signals,
    write_config,
)

MICRO = 16  # rows of like length that go through the models together
Rewards = Callable[[list[tuple[list[int], int]], list[bool]], dict[str, Tensor]]


# ---- the mathematics: pure functions, each with a brute-force twin in the tests ------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is true, over all rows together."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor | None = None, floor: float = 1e-4) -> Tensor:
    """(x - mean) / std over the entries of mask (default all), 0 elsewhere. The std is at least `floor`: equal rewards stay 0 and do not explode."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean).square(), mask).sqrt()
    return ((x - mean) / std.clamp(min=floor)) * mask


def answer_mask(starts: Tensor, lengths: Tensor, T: int) -> Tensor:
    """bool [B,T-1]: columns of the actions that wrote the answer's tokens, EOS included: starts-1 .. lengths-2."""
    t = torch.arange(T - 1, device=starts.device)
    return (t >= starts[:, None] - 1) & (t < lengths[:, None] - 1)


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards [B,T-1]: -beta * (log pi - log pi_0) at every action, and the answer's score [B] once, at its last action."""
    rewards = -beta * kl * mask
    last = mask.long().cumsum(1).argmax(1)  # the first column at which the count is full: the last action
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B,T-1] (Schulman et al. 2016). Backward in time; after an answer's last action both value and advantage are 0.

    Returns are advantages + values, before any whitening: they are what the critic learns.
    """
    advantages = torch.zeros_like(rewards)
    after_value = torch.zeros_like(rewards[:, 0])
    after_advantage = torch.zeros_like(after_value)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after_value - values[:, t]
        after_advantage = (delta + gamma * lam * after_advantage) * mask[:, t]
        after_value = values[:, t] * mask[:, t]
        advantages[:, t] = after_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, a mean over the answer tokens, and the share of them at which the clip binds (Schulman et al. 2017)."""
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Squared error of values against returns, a mean over the answer tokens; a value that moved by more than `clip` from its old one gains nothing
    by it. clip 0 is none."""
    error = (values - returns).square()
    if clip:
        error = torch.max(error, (old_values + (values - old_values).clamp(-clip, clip) - returns).square())
    return masked_mean(error, mask)


def kl_estimates(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """(k1, k3) of KL(pi || ref) for sampled tokens: k1 = log pi - log ref is unbiased, k3 = ref/pi - 1 - log(ref/pi) too, and never negative."""
    difference = logp - ref_logp
    return difference, torch.exp(-difference) - 1 + difference


# ---- rollouts ------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """An iteration's answers and all that the update needs; everything is detached. tokens [B,T], starts, lengths, scores [B], rest [B,T-1]."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    mask: Tensor
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]

    def rows(self, index: Tensor) -> Rollout:
        """Some of the rows, cut to the longest of them."""
        T = int(self.lengths[index].max())
        parts = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)[:-1]}
        return Rollout(**{n: x[:, : T - (n != "tokens")] if x.dim() == 2 else x for n, x in parts.items()}, metrics={})


@torch.no_grad()
def by_batch(function: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, mask: Tensor, lengths: Tensor, batch: int) -> Tensor:
    """function(tokens [b,t], mask [b,t-1]) -> [b,t-1] for all rows [B,T-1], a few rows of like length at a time and cut to their longest; 0 outside
    `mask`. Data ranks share the rows, and return all of them."""
    mesh = parallel.current()
    out = torch.zeros(mask.shape, device=tokens.device)
    for index in lengths.argsort().split(batch * mesh.data_ranks):
        mine = index[mesh.share(len(index))]
        some = mine if len(mine) else index[:1]  # a rank without a row of its own goes along: its part of the weights is needed
        t = int(lengths[some].max())
        out[mine, : t - 1] = function(tokens[some, :t], mask[some, : t - 1])[: len(mine)]
    return mesh.sum(out).masked_fill(~mask, 0.0)


def distinct(rows: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams over all n-grams of the answers: 1 is no repetition at all."""
    grams = [tuple(ids[i : i + n]) for ids in rows for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def rollout(
    policy: Llama, reference: Llama, critic: RewardModel, rewards: Rewards, prompts: list[list[int]], is_safety: list[bool], config: PPOConfig, eos: int,
    seed: int,
) -> Rollout:  # fmt: skip
    """Sample an answer to every prompt, score it, and work out advantages. Sampling is at T = 1 and full support, so that the sampler is the policy."""
    device = next(policy.parameters()).device
    drawn = sample_many(_sampler(policy), prompts, config.max_new_tokens, 1.0, seed, [[eos]], config.batch_size)
    rows = [(p + ids, len(p)) for p, ids in zip(prompts, drawn.tokens, strict=True)]
    scored = rewards(rows, is_safety)
    raw = scored["reward"]
    if config.shuffle_rewards:
        raw = raw[torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(raw)))]
    finished = torch.tensor(drawn.stopped)
    score = whiten(logit_clamp(raw)) - config.no_eos_penalty * (~finished).float()  # [B]
    x = {name: t.to(device) for name, t in stack(rows).items()}
    tokens, mask = x["tokens"], answer_mask(x["starts"], x["lengths"], x["tokens"].shape[1])
    logp = by_batch(lambda t, m: log_probs(policy, t, where=m), tokens, mask, x["lengths"], MICRO)  # [B,T-1]
    ref_logp = by_batch(lambda t, m: log_probs(reference, t, where=m), tokens, mask, x["lengths"], MICRO)
    values = by_batch(lambda t, m: critic.values(t)[:, :-1], tokens, mask, x["lengths"], MICRO)  # the state before each action
    settle(policy)
    settle(critic)
    k1, k3 = kl_estimates(logp, ref_logp)
    advantages, returns = gae(token_rewards(score.to(device), k1, mask, config.beta), values, mask, config.gamma, config.gae_lambda)
    count = mask.sum(1)
    error = masked_mean((returns - values).square(), mask)
    spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    metrics = {
        "reward": float(scored["reward"].mean()), "helpful": float(scored["helpful"].mean()),
        "kl": float((k1 * mask).sum(1).mean()), "kl_k3": float((k3 * mask).sum(1).mean()), "length": float(count.float().mean()),
        "finished": float(finished.float().mean()), "distinct_2": distinct(drawn.tokens), "value": float(masked_mean(values, mask)),
        "return": float(masked_mean(returns, mask)), "explained_variance": float(1 - error / spread.clamp(min=1e-8)),
        "advantage_std": float(masked_mean(advantages.square(), mask).sqrt()),
    }  # fmt: skip
    if "safety" in scored:
        metrics["safety"] = float(scored["safety"].mean())
    return Rollout(tokens, x["starts"], x["lengths"], mask, logp, ref_logp, values, whiten(advantages, mask), returns, metrics)


def _sampler(policy: Llama) -> Llama:
    """The policy to sample with: itself, or in a job of several ranks a copy that is gathered once for the whole phase."""
    mesh = parallel.current()
    if mesh.world == 1:
        return policy
    from minillama.parallel.shard import gathered

    return gathered(policy, mesh)


def logit_clamp(logits: Tensor, eps: float = 1e-4) -> Tensor:
    """logit(clamp(sigmoid(x), eps, 1 - eps)), computed as a clamp of x itself: no infinity, however sure the reward model is (sec 3.2.3)."""
    limit = math.log((1 - eps) / eps)
    return logits.clamp(-limit, limit)


# ---- the update ----------------------------------------------------------------------------------------------------------------


def update(
    policy: Llama, critic: RewardModel, optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer], roll: Rollout, config: PPOConfig, seed: int,
    learn_policy: bool = True,
) -> dict[str, float]:  # fmt: skip
    """One step of policy and critic for every minibatch, in an order drawn from `seed`. Returns means of what happened. Data ranks share each
    minibatch's answers."""
    mesh = parallel.current()
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(roll.tokens)))
    totals: dict[str, float] = {}
    minibatches = order.split(config.minibatch)
    for i, minibatch in enumerate(minibatches):
        minibatch = minibatch.to(roll.tokens.device)
        n_tokens = roll.mask[minibatch].sum()
        seen: dict[str, float] = {}
        # Micro-batches of like length, to spare padding: each weighs as much as it has answer tokens, so the gradient is the minibatch's.
        for index in minibatch[roll.lengths[minibatch].argsort()][mesh.data_rank :: mesh.data_ranks].split(MICRO):
            b = roll.rows(index)
            share = b.mask.sum() / n_tokens
            all_logp = policy(b.tokens, where=F.pad(b.mask, (0, 1))).float().log_softmax(-1)  # [n,V] of the actions alone: prompts are longer than answers
            logp = torch.zeros_like(b.logp).masked_scatter(b.mask, all_logp.gather(1, b.tokens[:, 1:][b.mask, None]))  # [b,T-1]
            loss, clipped = policy_loss(logp, b.logp, b.advantages, b.mask, config.clip)
            values = critic.values(b.tokens)[:, :-1]
            critic_loss = config.value_weight * value_loss(values, b.values, b.returns, b.mask, config.value_clip)
            (share * mesh.data_ranks * loss).backward()  # a sharded model leaves the mean over the data ranks
            (share * mesh.data_ranks * critic_loss).backward()
            with torch.no_grad():
                step = (logp - b.logp).masked_fill(~b.mask, 0.0)
                entropy = -(all_logp.exp() * all_logp).sum(-1).mean()
                means = {"policy_loss": loss, "value_loss": critic_loss, "clip_fraction": clipped, "entropy": entropy,
                         "approx_kl": masked_mean(torch.exp(step) - 1 - step, b.mask)}  # fmt: skip
                for name, value in means.items():
                    seen[name] = seen.get(name, 0.0) + float(share * value)
                totals["ratio_max"] = max(totals.get("ratio_max", 0.0), float(torch.exp(step).max()))
                if i == 0:  # above 1e-4 the rollout's log-probs are not the update's: padding, other weights
                    totals["first_log_ratio"] = max(totals.get("first_log_ratio", 0.0), float(step.abs().max()))
        sums = mesh.sum(torch.tensor(list(seen.values()), dtype=torch.float64, device="cpu" if mesh.world == 1 else roll.tokens.device)).tolist()
        seen = dict(zip(seen, sums, strict=True))
        for name, model, optimizer in (("policy", policy, optimizers[0]), ("critic", critic, optimizers[1])):
            seen[f"{name}_grad_norm"] = norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the {name}'s gradient norm is {norm}: lower its learning rate, or look at the rewards of this iteration")
            if model is critic or learn_policy:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in seen.items():
            totals[name] = totals.get(name, 0.0) + value / len(minibatches)
    return totals | {name: max(mesh.gather([totals[name]])) for name in ("ratio_max", "first_log_ratio")}


def critic_from(reward: RewardModel, copied: bool = True) -> RewardModel:
    """A critic that starts as a copy of a reward model, its scalar head kept (Stiennon et al. 2020), or that takes it over. What only rewards use, the
    output layer and the parts of the evidence, takes no gradient."""
    critic = copy.deepcopy(reward).train() if copied else reward.train()
    for name, p in critic.named_parameters():
        p.requires_grad_(not name.startswith(("output", "gain", "wanted", "match")))
    return critic


def run(config: PPOConfig, prompts: Sequence[dict] | None = None, evaluate: Callable[[Llama], dict[str, float]] | None = None) -> Llama:
    """PPO by `config`; `prompts` ({"messages", "safety"}) replaces config.prompts; `evaluate` adds metrics every eval_every iterations, and before the first
    one, where the curves over KL begin.

    Writes metrics.jsonl, state/ (to resume, bit for bit), and checkpoint/ with the policy: with `patience` that of the best evaluation on the kept
    prompts, else the last. Raises ValueError for too few prompts, an output folder in use (without resume), or models of different tokenizers.
    """
    c, out = config, Path(config.out)
    mesh = parallel.start(c.parallel, c.device)
    device = pick_device(c.device)
    if c.minibatch % mesh.data_ranks:
        raise ValueError(f"minibatch {c.minibatch} is not divisible by the {mesh.data_ranks} data ranks")
    policy, tokenizer = load_sharded(c.policy, mesh, bf16=c.bf16, split_logits=False)
    gated = Gated(c.helpful, c.safety, c.gate, device)
    if tokenizer is None or gated.tokenizer.path.read_bytes() != tokenizer.path.read_bytes():
        raise ValueError(f"{c.policy} and {c.helpful} have different tokenizers; train the reward model from a model of the policy's family")
    prompts = read_prompts(c.prompts) if prompts is None else list(prompts)
    Random(f"ppo:{c.seed}").shuffle(prompts)
    encoded = [(encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in p["messages"]]), bool(p.get("safety"))) for p in prompts]
    n_val = round(len(encoded) * c.val_fraction) if c.eval_every else 0
    held, encoded = encoded[:n_val], encoded[n_val:]
    if c.patience and not held:
        raise ValueError(f"patience {c.patience} needs prompts to evaluate on; raise val_fraction {c.val_fraction} or eval_every {c.eval_every}, "
                         "or set patience to 0")  # fmt: skip
    limit = min(m.config.max_seq_len for m in (policy, gated.helpful, gated.safety) if m is not None)
    longest = max((len(p) for p, _ in held + encoded), default=0)
    if longest + c.max_new_tokens > limit:
        raise ValueError(f"a prompt of {longest} tokens leaves less than max_new_tokens {c.max_new_tokens} of max_seq_len {limit}; leave it out, "
                         "or lower max_new_tokens")  # fmt: skip
    if len(encoded) < c.batch_size:
        raise ValueError(f"{len(encoded)} prompts are fewer than batch_size {c.batch_size}; give more prompts or a smaller batch")
    # a sharded model is not copied but loaded once more
    reference = copy.deepcopy(policy) if mesh.world == 1 else load_sharded(c.policy, mesh, bf16=c.bf16, split_logits=False)[0]
    reference.to(device).eval().requires_grad_(False)
    policy.to(device).train()
    critic = (critic_from(gated.helpful) if mesh.world == 1 else critic_from(load_reward(c.helpful)[0], copied=False)).to(device)
    common = dict(steps=1, weight_decay=c.weight_decay, beta1=c.beta1, beta2=c.beta2, eps=c.eps)
    optimizers = (make_optimizer(policy, TrainConfig(lr=c.lr, **common)), make_optimizer(critic, TrainConfig(lr=c.critic_lr or c.lr, **common)))
    mesh.first(lambda: out.mkdir(parents=True, exist_ok=True))
    state = checkpoint.load_state(out / "state") if (out / "state").exists() else None
    if state and not c.resume:
        raise ValueError(f"{out} already holds a checkpoint of iteration {state[0]}; add --resume true to go on, or choose another folder")
    if state and state[0] > c.iterations:
        raise ValueError(f"{out} is at iteration {state[0]}, past the {c.iterations} asked for; raise iterations")
    if not state and not c.resume and (out / "checkpoint").exists():
        raise ValueError(f"{out} already holds the checkpoint of another stage; choose another folder")
    start, best = 0, {"reward": -math.inf, "iteration": 0, "worse": 0}
    if state:
        start, path, tensors, best = state
        checkpoint.load_weights(policy, path)
        restore(critic, optimizers, policy, tensors)
    metrics = out / "metrics.jsonl"
    mesh.first(lambda: (write_config(c, out), keep_metrics(metrics, start or -1)))

    def note(record: dict) -> None:
        if mesh.rank == 0:
            append_metrics(metrics, record)

    def save(done: int) -> None:
        tensors = {**{f"critic/{n}": p for n, p in critic.state_dict().items()},
                   **{f"policy_optimizer/{n}": t for n, t in optimizer_tensors(optimizers[0], policy).items()},
                   **{f"critic_optimizer/{n}": t for n, t in optimizer_tensors(optimizers[1], critic).items()}}  # fmt: skip
        checkpoint.save_state(out / "state", done, policy, tensors, best, tokenizer, keep=0)

    def measure() -> dict[str, float]:
        policy.eval()
        measured, sampler = {}, _sampler(policy)
        if held:
            drawn = sample_many(sampler, [p for p, _ in held], c.max_new_tokens, 1.0, c.seed, [[tokenizer.eos_id]], c.batch_size)
            scored = gated([(p + ids, len(p)) for (p, _), ids in zip(held, drawn.tokens, strict=True)], [s for _, s in held])
            measured["eval/reward"] = float(scored["reward"].mean())
            measured["eval/finished"] = sum(drawn.stopped) / len(drawn.stopped)
        measured |= {f"eval/{k}": v for k, v in evaluate(sampler).items()} if evaluate else {}
        policy.train()
        return measured

    bar = tqdm(total=c.iterations, initial=start, desc="ppo", unit="it", file=sys.stdout, dynamic_ncols=True, mininterval=1.0,
               disable=None if mesh.rank == 0 else True)  # fmt: skip
    kept = out / "checkpoint"
    with stop_signals() as stop, bar:
        if c.eval_every and not start:
            note({"step": 0, **measure()})
        stopped_early = c.patience and best["worse"] >= c.patience  # a finished run that is resumed
        for iteration in range(start, start if stopped_early else c.iterations):
            began = time.monotonic()
            seed = c.seed * 1_000_003 + iteration
            n, first = len(encoded), iteration * c.batch_size
            orders = {e: np.random.default_rng([c.seed, 3, e]).permutation(n) for e in {first // n, (first + c.batch_size - 1) // n}}
            mine = [encoded[orders[i // n][i % n]] for i in range(first, first + c.batch_size)]
            policy.eval()
            roll = rollout(policy, reference, critic, gated, [p for p, _ in mine], [s for _, s in mine], c, tokenizer.eos_id, seed)
            policy.train()
            seen = update(policy, critic, optimizers, roll, c, seed, learn_policy=iteration >= c.critic_warmup)
            done = iteration + 1
            record = {"step": done, **roll.metrics, **seen, "seconds": time.monotonic() - began}
            note(record)
            line = " ".join(f"{k} {record[k]:.2f}" for k in ("reward", "kl", "clip_fraction", "entropy", "length"))
            bar.set_postfix_str(line)
            bar.update()
            if bar.disable and mesh.rank == 0 and (done % 10 == 0 or done == c.iterations):
                print(f"ppo {done}/{c.iterations} {line} ETA {record['seconds'] * (c.iterations - done):.0f} s", flush=True)
            last = done == c.iterations
            if c.eval_every and (done % c.eval_every == 0 or last):
                measured = measure()
                note({"step": done, **measured})
                learned = c.patience and done > c.critic_warmup  # until then every evaluation is that of the policy as it came
                if learned and measured["eval/reward"] > best["reward"]:
                    best = {"reward": measured["eval/reward"], "iteration": done, "worse": 0}
                    checkpoint.save_state(kept, done, policy, {}, {}, tokenizer, keep=0)
                elif learned:
                    best = {**best, "worse": best["worse"] + 1}
                    last = last or best["worse"] >= c.patience
            stopping = mesh.any(bool(stop))  # a signal may have reached one rank only
            if stopping or last or c.save_every and done % c.save_every == 0:
                save(done)
            if stopping and not last:
                raise interrupted(stop[0] if stop else signal.SIGTERM, done, out / "state")
            if last:
                break
    if c.patience and best["iteration"]:
        policy = load_sharded(kept, mesh, bf16=c.bf16, split_logits=False)[0].to(device)
    else:
        checkpoint.save_state(kept, c.iterations, policy, {}, {}, tokenizer, keep=0)
    result = json.dumps({"iteration": best["iteration"] or c.iterations, "eval_reward": best["reward"] if best["iteration"] else None})
    mesh.first(lambda: (out / "result.json").write_text(result))
    return policy.eval()


def restore(critic: RewardModel, optimizers: tuple, policy: Llama, tensors: Tensors) -> None:
    """Put the critic's weights and both optimizers' states back."""
    tensors.under("critic/").fill(critic.state_dict())
    restore_optimizer(optimizers[0], policy, tensors.under("policy_optimizer/"))
    restore_optimizer(optimizers[1], critic, tensors.under("critic_optimizer/"))
