"""Safety tuning (sec 4.2): rejection sampling with the gated reward on adversarial prompts, and context distillation that a reward model must approve.

    minillama safety --prompts runs/my/safety-prompts.jsonl --policy runs/my/ppo --teacher runs/my/safety-sft --out runs/my/safety

Supervised safety tuning is `minillama sft` on safe demonstrations: alone it refuses too much. Here the policy answers adversarial and harmless
prompts, and that safer teacher the adversarial ones too; the gated reward picks: the safety model decides for adversarial prompts, the helpfulness
model for the rest, unless an answer is unsafe. For adversarial prompts the teacher answers once more behind a safety preprompt, and that answer is
learned without the preprompt if the safety model likes it better than what the policy says by itself (sec 4.2.4: else distillation harms helpful
answers and breeds false refusals). With --red_team the adversarial prompts are attacks to try first, and only those whose answers the safety
model finds worst are learned from: run it again on the tuned model with new attacks, and that is the paper's next round.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from minillama import sft
from minillama.config import SafetyConfig, SFTConfig
from minillama.data import sources
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.parallel.state import load_sampler
from minillama.rejection import choose, draw
from minillama.reward import Gated, encode, score
from minillama.trainer import last_state, pick_device, write_config

ADJECTIVES = ("responsible", "respectful", "wise", "careful", "safe")
PREPROMPT = "You are a {0} and {1} assistant."


def preprompt(rng: Random) -> str:
    """A safety preprompt from the template, with two different adjectives (sec 4.2.4)."""
    return PREPROMPT.format(*rng.sample(ADJECTIVES, 2))


def with_preprompt(messages: Sequence[dict], text: str) -> list[dict]:
    """The dialogue behind `text` as its system prompt; one that has a system prompt gets `text` in front of it."""
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{text} {messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def distil(policy: Llama, teacher: Llama, tokenizer, prompts: Sequence[dict], reward: Gated, config: SafetyConfig) -> list[dict]:
    """For each adversarial prompt: {"messages" with the teacher's answer behind a preprompt, "original", "before", "after", "kept"}: the policy's own
    answer, the safety rewards (logits) of both as answers to the bare prompt, and whether the gate lets it pass."""
    rng = Random(f"preprompts:{config.train.seed}")
    seed, most = config.train.seed, config.max_new_tokens
    original = draw(policy, tokenizer, prompts, reward, 1, config.temperature, most, seed + 1)
    behind = [{**p, "messages": with_preprompt(p["messages"], preprompt(rng))} for p in prompts]
    answers = draw(teacher, tokenizer, behind, reward, 1, config.temperature, most, seed + 2)
    after = rescore(tokenizer, prompts, [row[0] for row in answers], reward)
    rows = []
    for p, (old,), (new,), r in zip(prompts, original, answers, after, strict=True):
        kept = new["finished"] and (not config.gate or r > old["safety"])
        rows.append({"messages": [*p["messages"], {"role": "assistant", "content": new["answer"]}], "original": old["answer"], "before": old["safety"],
                     "after": r, "kept": kept})  # fmt: skip
    return rows


def rescore(tokenizer, prompts: Sequence[dict], samples: Sequence[dict], reward: Gated) -> list[float]:
    """Safety rewards (logits) of answers as answers to `prompts`, whatever they were sampled behind."""
    limit = reward.safety.config.max_seq_len
    rows = [encode(tokenizer, p["messages"], s["answer"], limit, finished=s["finished"]) for p, s in zip(prompts, samples, strict=True)]
    if any(row is None for row in rows):
        raise ValueError(f"a prompt and its answer are longer than the reward model's max_seq_len {limit}; shorten max_new_tokens")
    return score(reward.safety, rows).tolist()


def failures(policy: Llama, tokenizer, prompts: Sequence[dict], reward: Gated, n: int, temperature: float, max_new_tokens: int, seed: int) -> list[dict]:
    """A red-team round (sec 4.3): the n adversarial prompts whose sampled answers the safety model finds worst. They feed the next tuning."""
    samples = draw(policy, tokenizer, prompts, reward, 1, temperature, max_new_tokens, seed)
    order = sorted(range(len(prompts)), key=lambda i: samples[i][0]["safety"])
    return [prompts[i] for i in order[:n]]


def run(config: SafetyConfig, prompts: Sequence[dict] | None = None) -> Llama:
    """Tune for safety by `config`; `prompts` replaces config.prompts. Returns the tuned model.

    Raises ValueError for prompts without an adversarial one, or models of different tokenizers.
    """
    out, c = Path(config.out), config.train
    mesh = parallel.start(c.parallel, c.device)
    last_state(out, config.resume)
    if not config.safety:
        raise ValueError("safety tuning needs a safety reward model; train one with `minillama reward --kind safety` and name it with --safety")
    device = pick_device(c.device)
    prompts = sources.read_prompts(config.prompts) if prompts is None else list(prompts)
    selected = out / "selected.jsonl"
    if not (config.resume and selected.exists()):
        adversarial = [p for p in prompts if p["safety"]]
        if not adversarial:
            raise ValueError(f"{config.prompts} has no adversarial prompt; mark them with safety: true")
        reward = Gated(config.helpful, config.safety, device=device)
        models = []
        for path in (config.policy, config.teacher):
            model, tokenizer = load_sampler(path, mesh, device, c.bf16 and mesh.world > 1)
            if tokenizer is None or tokenizer.path.read_bytes() != reward.tokenizer.path.read_bytes():
                raise ValueError(f"{path} and {config.safety} have different tokenizers")
            models.append(model)
        if config.red_team:
            adversarial = failures(models[0], tokenizer, adversarial, reward, config.red_team, config.temperature, config.max_new_tokens, c.seed + 20)
            prompts = [p for p in prompts if not p["safety"]] + adversarial
        own, taught = (draw(m, tokenizer, some, reward, config.samples, config.temperature, config.max_new_tokens, c.seed + 10 * i)
                       for i, (m, some) in enumerate(zip(models, (prompts, adversarial), strict=True)))  # fmt: skip
        lessons = iter(taught)
        best = [choose(row + (next(lessons) if p["safety"] else []), "best", Random(0)) for p, row in zip(prompts, own, strict=True)]
        rows = [{"messages": [*p["messages"], {"role": "assistant", "content": s["answer"]}], "reward": s["reward"], "safety": p["safety"]}
                for p, s in zip(prompts, best, strict=True) if s]  # fmt: skip
        if config.distil:
            distilled = distil(*models, tokenizer, adversarial, reward, config)
            mesh.first(lambda: sources.write_jsonl(distilled, out / "distilled.jsonl"))
            rows += [{"messages": d["messages"], "reward": d["after"], "safety": True} for d in distilled if d["kept"]]
        mesh.first(lambda: sources.write_jsonl(rows, selected))
    items = [row["messages"] for spec in [selected, *config.keep] for row in sources.read(spec, kind="instruction")]
    model = sft.run(SFTConfig(init=config.policy, out=config.out, epochs=config.epochs, resume=config.resume, train=c), items)
    mesh.first(lambda: write_config(config, out))
    return model
