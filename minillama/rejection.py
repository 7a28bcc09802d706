"""Rejection sampling fine-tuning (sec 3.2.3): sample K answers a prompt, keep the one that the reward model likes best, learn it as in SFT.

    minillama reject --prompts runs/my/prompts.jsonl --policy runs/my/sft --helpful runs/my/reward --out runs/my/reject

Each iteration tunes from the base model again, on the best samples of this iteration and of the earlier ones in `pool`. The policy that samples may be
larger than the model that is tuned: that is how the paper's 7B to 34B models learned from the 70B's samples. In a run's folder:
samples.jsonl (every sample with its rewards), selected.jsonl (one a prompt, in SFT's format), and the tuned model.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from minillama import sft
from minillama.chat import TAGS, Message, encode_prompt
from minillama.config import RejectConfig, SFTConfig
from minillama.data import sources
from minillama.generate import sample_many
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.parallel.state import load_sampler
from minillama.reward import Gated
from minillama.trainer import last_state, pick_device, write_config


def draw(policy: Llama, tokenizer, prompts: Sequence[dict], reward: Gated, k: int, temperature: float, max_new_tokens: int, seed: int,
         batch: int = 256) -> list[list[dict]]:  # fmt: skip
    """K samples for each prompt, each {"answer", "reward", "helpful", "safety" (if there is such a model), "finished"}; rewards are logits.

    What is scored is the sampled tokens themselves, EOS included if it came. Answers without EOS, empty ones and those that write a
    tag of the format are not `finished`, and are never chosen.
    """
    asked = [encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in p["messages"]]) for p in prompts]
    rows = sample_many(policy, [ids for ids in asked for _ in range(k)], max_new_tokens, temperature, seed, [[tokenizer.eos_id]], batch)
    scored = reward([(asked[i // k] + ids, len(asked[i // k])) for i, ids in enumerate(rows.tokens)],
                    [prompts[i // k]["safety"] for i in range(len(rows.tokens))])  # fmt: skip
    samples: list[list[dict]] = [[] for _ in prompts]
    for i, (ids, finished) in enumerate(zip(rows.tokens, rows.stopped, strict=True)):
        answer = tokenizer.decode(ids[:-1] if finished else ids).strip()
        finished = finished and bool(answer) and not any(t in answer for t in TAGS)
        samples[i // k].append({"answer": answer, "finished": finished, **{name: float(t[i]) for name, t in scored.items()}})
    return samples


def choose(samples: list[dict], select: str, rng: Random) -> dict | None:
    """The sample to learn: the best by reward, or with "random" any of them, among those that ended. None if none did."""
    finished = [s for s in samples if s["finished"]]
    if not finished:
        return None
    return max(finished, key=lambda s: s["reward"]) if select == "best" else rng.choice(finished)


def best_of(samples: Sequence[Sequence[dict]], ns: Sequence[int]) -> list[dict]:
    """Mean over prompts of the highest and of the median reward among the first n samples, for each n (fig 7), and "overall", the median of all of them.

    The median of one sample is its mean, and that of a few lies between both: where a few bad answers pull down the mean, "median" rises with n although
    the samples are what they were; "overall" does not.
    """
    table = []
    for n in ns:
        rewards = np.array([[s["reward"] for s in row[:n]] for row in samples])
        table.append({"n": n, "max": float(rewards.max(1).mean()), "median": float(np.median(rewards, axis=1).mean()), "overall": float(np.median(rewards)),
                      "prompts": len(samples)})  # fmt: skip
    return table


def run(config: RejectConfig, prompts: Sequence[dict] | None = None) -> Llama:
    """One iteration by `config`; `prompts` replaces config.prompts. Returns the tuned model.

    Raises ValueError for a file without prompts, or models that do not share a tokenizer.
    """
    out, c = Path(config.out), config.train
    mesh = parallel.start(c.parallel, c.device)
    last_state(out, config.resume)
    device = pick_device(c.device)
    prompts = sources.read_prompts(config.prompts) if prompts is None else list(prompts)
    selected = out / "selected.jsonl"
    if not (config.resume and selected.exists()):
        policy, tokenizer = load_sampler(config.policy, mesh, device, c.bf16 and mesh.world > 1)
        reward = Gated(config.helpful, config.safety, device=device)
        if tokenizer is None or reward.tokenizer.path.read_bytes() != tokenizer.path.read_bytes():
            raise ValueError(f"{config.policy} and {config.helpful} have different tokenizers; train the reward model from a model of the policy's family")
        samples = draw(policy, tokenizer, prompts, reward, config.samples, config.temperature, config.max_new_tokens, c.seed, config.batch)
        del policy  # what is tuned needs the room
        every = [{"messages": p["messages"], "samples": row} for p, row in zip(prompts, samples, strict=True)]
        mesh.first(lambda: sources.write_jsonl(every, out / "samples.jsonl"))
        rng = Random(f"choose:{c.seed}")
        chosen = [(p, choose(row, config.select, rng)) for p, row in zip(prompts, samples, strict=True)]
        rows = [{"messages": [*p["messages"], {"role": "assistant", "content": s["answer"]}], "reward": s["reward"]} for p, s in chosen if s]
        if not rows:
            raise ValueError(f"no sample of {config.policy} ended within {config.max_new_tokens} tokens; raise max_new_tokens")
        mesh.first(lambda: sources.write_jsonl(rows, selected))
    items = [row["messages"] for spec in [selected, *config.pool] for row in sources.read(spec, kind="instruction")]
    model = sft.run(SFTConfig(init=config.init, out=config.out, epochs=config.epochs, resume=config.resume, train=c), items)
    mesh.first(lambda: write_config(config, out))
    return model


def temperature_sweep(policy: Llama, tokenizer, prompts: Sequence[dict], reward: Gated, temperatures: Sequence[float], k: int, max_new_tokens: int,
                      seed: int = 0) -> list[dict]:  # fmt: skip
    """Highest reward of k samples, mean over prompts, at each temperature (fig 8): what the paper re-tunes every iteration."""
    table = []
    for t in temperatures:
        with torch.no_grad():
            row = best_of(draw(policy, tokenizer, prompts, reward, k, t, max_new_tokens, seed), [k])[0]
        table.append({"temperature": t, **row})
    return table
