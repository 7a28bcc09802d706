"""The alignment half of the demo: preferences, reward models, rejection sampling, PPO, Ghost Attention, safety, in two rounds as in the paper, and
the gold evaluation of all of it.

    minillama demo --scale laptop

The order is the paper's (sec 3.2): preferences for the newest model, reward models retrained on all of them, rejection sampling, twice; then preferences for
what came of it, and PPO with the reward model that has seen them.

Every stage is a call of the same function that a verb calls, on files in the run's folder. What stands in for people is done here: tinyworld writes the
prompts and the annotator the labels. No stage sees the test split or gold.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from minillama import gatt, ppo, rejection, reward, safety, sft
from minillama.checkpoint import load
from minillama.config import GAttConfig, PPOConfig, RejectConfig, RewardConfig, SafetyConfig, SFTConfig, TrainConfig
from minillama.data import hazards, sources
from minillama.data.preferences import STRENGTHS, Annotator, Pair
from minillama.data.world import STANDING, Task, World
from minillama.evaluation import alignment as judge
from minillama.evaluation.stats import gwet_ac2
from minillama.evaluation.tinyworld import judge as properties
from minillama.tokenizer import Tokenizer

Stage = Callable[[str, str, Path, Callable[[], None]], None]
MODELS = ("sft", "gatt", "reject-2", "ppo", "safety")
NAMES = {"base": "base", "sft": "SFT", "gatt": "SFT+GAtt", "reject-2": "RS", "ppo": "RS+PPO", "safety": "safety-tuned", "safety-sft": "safety SFT alone"}
SHORT = (2, 4, 6)  # turns; the twentieth takes a context of 800 tokens, and is asked of Ghost Attention only
MAX_NEW = 100  # tokens; the longest answers of the world have about 80


def train_config(settings: dict, seed: int, device: str) -> dict:
    """Splits a stage's settings into its own and those of TrainConfig: {"train": TrainConfig, ...}."""
    own = {k: v for k, v in settings.items() if k not in TrainConfig.__dataclass_fields__}
    return {**own, "train": TrainConfig(**{"steps": 1, "seed": seed, "device": device, **{k: v for k, v in settings.items() if k not in own}})}


def prompt_rows(tasks: list[Task]) -> list[dict]:
    """Tasks as prompts of a file: only harmful requests are marked as adversarial, as a red team marks what it writes."""
    return [{"messages": [{"role": "user", "content": t.prompt}], "safety": t.kind == "hazard" and t.args["harmful"]} for t in tasks]


def finished(out: Path, name: str) -> Path:
    """A file that exists once a training stage has saved its last step."""
    return out / name / "done"


def training(out: Path, name: str, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, and then the file that says that it is done."""

    def both() -> None:
        work()
        finished(out, name).touch()

    return both


def collect(world: World, variants: list[Path], tasks: list[Task], temperatures: tuple[float, float], seed: int) -> list[Pair]:
    """A round of preferences (sec 3.2.1): two answers to each prompt, from two different model variants at temperatures of their own, labelled by the
    annotator. Which variant comes first is drawn, so that its place tells nothing."""
    both = []
    for i, (path, temperature) in enumerate(zip(variants, temperatures, strict=True)):
        model, tokenizer = load(path)
        both.append(judge.answers_of(model, tokenizer, tasks, temperature, seed + i))
    rater, rng, pairs = Annotator(world, seed), Random(f"order:{seed}"), []
    for task, a, b in zip(tasks, *both, strict=True):
        pairs.append(rater.compare(task, *((a, b) if rng.random() < 0.5 else (b, a))))
    return [p for p in pairs if p]


def gold_watch(world: World, out: Path, seed: int, n: int = 300) -> Callable[[object], dict[str, float]]:
    """What PPO logs beside its own reward: gold helpfulness on n validation prompts at T = 1. It is written down; nothing acts on it."""
    tokenizer, tasks = Tokenizer(out / "tokenizer.model"), world.instructions("validation")[:n]

    def measure(model) -> dict[str, float]:
        scores = judge.helpfulness(world, tasks, judge.answers_of(model, tokenizer, tasks, 1.0, seed))
        return {"gold": sum(scores) / len(scores)}

    return measure


def mixed_prompts(world: World, purpose: str, n: int, risky: int | None = None) -> list[dict]:
    """n helpful prompts and, so that those skills are not forgotten, `risky` harmless or harmful requests (default: one for each eight)."""
    tasks = world.instructions("rlhf", n, purpose) + hazards.hazards(world, "rlhf", n // 8 if risky is None else risky, purpose)
    return [{**row, "safety": False} for row in prompt_rows(tasks)]  # helpfulness only: safety has its own stage


def optimise(world: World, out: Path, settings: dict, seed: int, device: str, helpful: str = "reward-helpful-3", name: str = "ppo", **other) -> None:
    """PPO from the last round of rejection sampling against the reward model `helpful`, into the folder `name`; `other` replaces settings."""
    o = {**settings, **other}
    rows = mixed_prompts(world, "ppo", o.pop("prompts"), o.pop("hazards", None))
    ppo.run(PPOConfig(policy=str(out / "reject-2"), helpful=str(out / helpful), out=str(out / name), max_new_tokens=MAX_NEW, seed=seed, device=device,
                      resume=True, **o), rows, gold_watch(world, out, seed))  # fmt: skip


def dialogues(world: World, purpose: str, n: int, turns: int) -> list[dict]:
    """n dialogues for Ghost Attention, of two to `turns` turns: {"standing": an instruction, "turns": what the user asks}."""
    rng, rows = world.rng(purpose), []
    for _ in range(n):
        kind, value = world.standing(rng)
        tasks = world.dialogue_tasks(rng, "train", rng.randint(2, turns))
        rows.append({"standing": STANDING[kind].format(value=value), "turns": [t.prompt for t in tasks]})
    return rows


def ghost_attention(world: World, out: Path, settings: dict, seed: int, device: str, on: bool = True) -> None:
    """Ghost Attention from SFT into the folder "gatt", or its control into "gatt-control": the very same dialogues with the instruction kept on every turn."""
    name, o = "gatt" if on else "gatt-control", train_config(settings, seed, device)
    o.pop("control", None)  # whether the demo trains it
    n, turns, keep = (o.pop(k) for k in ("dialogues", "turns", "keep"))
    if not on:
        (out / name).mkdir(exist_ok=True)
        shutil.copyfile(out / "gatt" / "dialogues.jsonl", out / name / "dialogues.jsonl")
    single = [e["messages"] for e in world.demonstrations() if e["task"] != "dialogue"]  # the others drop an instruction behind its turn
    gatt.run(GAttConfig(policy=str(out / "sft"), out=str(out / name), ghost=on, max_new_tokens=40, resume=True, **o), dialogues(world, "gatt", n, turns),
             single[:keep])  # fmt: skip


def build(world: World, out: Path, settings: dict, seed: int, device: str, stage: Stage) -> None:
    """Run every alignment stage that is not there yet."""
    def options(name: str) -> dict:
        return train_config(settings[name], seed, device)

    def safety_sft() -> None:
        o = options("safety_sft")
        rng = Random(f"preprompts:{seed}")
        rows = hazards.safe_demonstrations(world, o.pop("demos"))
        rows = [safety.with_preprompt(r, safety.preprompt(rng)) if i % 3 == 0 else r for i, r in enumerate(rows)]  # so that preprompts mean something
        rows += [e["messages"] for e in world.demonstrations() if e["task"] != "hazard"][: o.pop("keep")]
        sft.run(SFTConfig(init=str(out / "sft"), out=str(out / "safety-sft"), resume=True, **o), rows)

    def preferences(number: int, policy: str, partner: str) -> Callable[[], None]:
        def work() -> None:
            p, temperatures, salt = settings["preferences"], (1.0, 0.8 if number == 1 else 1.0), 100 * seed + number
            helpful = world.instructions("rlhf", p["helpful"], f"preferences {number}")
            risky = hazards.hazards(world, "rlhf", p["safety"], f"preferences {number}")
            pairs = collect(world, [out / policy, out / partner], helpful, temperatures, salt)
            pairs += collect(world, [out / policy, out / "safety-sft"], risky, temperatures, salt + 50)
            sources.write_jsonl((p.row() for p in pairs), out / f"preferences-{number}.jsonl")

        return work

    def reward_model(kind: str, number: int) -> Callable[[], None]:
        data = [str(out / f"preferences-{i}.jsonl") for i in range(1, number + 1)]
        name = f"reward-{kind}-{number}"
        c = RewardConfig(data=data, init=str(out / "sft"), out=str(out / name), kind=kind, resume=True, **options(f"reward_{kind}"))
        return training(out, name, lambda: reward.run(c))

    def reject(number: int, policy: str) -> Callable[[], None]:
        def work() -> None:
            o, name = options("reject"), f"reject-{number}"
            rows = mixed_prompts(world, name, o.pop("prompts"))
            rejection.run(RejectConfig(policy=str(out / policy), init=str(out / "sft"), helpful=str(out / f"reward-helpful-{number}"), out=str(out / name),
                                       pool=[str(out / f"reject-{i}" / "selected.jsonl") for i in range(1, number)], max_new_tokens=MAX_NEW, resume=True,
                                       **o), rows)  # fmt: skip

        return training(out, f"reject-{number}", work)

    def make_safe() -> None:
        o = options("safety")
        tasks = hazards.hazards(world, "rlhf", o.pop("hazards"), "safety") + world.instructions("rlhf", o.pop("helpful"), "safety")
        safety.run(SafetyConfig(policy=str(out / "ppo"), teacher=str(out / "safety-sft"), helpful=str(out / "reward-helpful-3"),
                                safety=str(out / "reward-safety-2"), out=str(out / "safety"), max_new_tokens=MAX_NEW, resume=True, **o),
                   prompt_rows(tasks))  # fmt: skip

    ghost = partial(ghost_attention, world, out, settings["gatt"], seed, device)
    stage("gatt", "Ghost Attention", finished(out, "gatt"), training(out, "gatt", ghost))
    if settings["gatt"].get("control"):
        stage("gatt-control", "Ghost Attention's control", finished(out, "gatt-control"), training(out, "gatt-control", partial(ghost, on=False)))
    stage("safety-sft", "supervised safety tuning", finished(out, "safety-sft"), training(out, "safety-sft", safety_sft))
    for number, policy, other in ((1, "sft", "safety-sft"), (2, "reject-1", "safety-sft"), (3, "reject-2", "reject-1")):
        stage(f"preferences-{number}", f"preferences, round {number}", out / f"preferences-{number}.jsonl", preferences(number, policy, other))
        name = f"reward-helpful-{number}"
        stage(name, f"helpfulness reward model, round {number}", finished(out, name), reward_model("helpful", number))
        if number == 2:
            stage("reward-safety-2", "safety reward model", finished(out, "reward-safety-2"), reward_model("safety", 2))
        if number < 3:
            stage(f"reject-{number}", f"rejection sampling, round {number}", finished(out, f"reject-{number}"), reject(number, policy))
    stage("ppo", "PPO", finished(out, "ppo"), training(out, "ppo", lambda: optimise(world, out, settings["ppo"], seed, device)))
    stage("safety", "safety tuning", finished(out, "safety"), training(out, "safety", make_safe))
    stage("align-eval", "evaluation of alignment on the test split", out / "align.json", lambda: write(out / "align.json", evaluate(world, out, seed)))


def agreement(world: World, tasks: list[Task], a: list[str], b: list[str], seed: int) -> dict[str, float]:
    """How far two annotators agree on the same pairs: Gwet's AC2 over -4 (b significantly better) to 4, without 0 (sec 3.4.2)."""
    raters = [Annotator(world, seed + i) for i in (1, 2)]
    rows = []
    for task, x, y in zip(tasks, a, b, strict=True):
        both = [r.compare(task, x, y) for r in raters]
        if all(both):
            rows.append([(1 if p.chosen == x else -1) * (p.strength + 1) for p in both])
    scale = [*range(-len(STRENGTHS), 0), *range(1, len(STRENGTHS) + 1)]
    return {"ac2": gwet_ac2(rows, scale), "n": len(rows)}


def write(path: Path, data: object) -> None:
    """A JSON file that appears whole."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(data, indent=1), encoding="utf-8")
    tmp.rename(path)


def evaluate(world: World, out: Path, seed: int) -> dict:
    """Everything that the report says about alignment, judged by gold on the test split."""
    tasks, risky = world.instructions("test"), hazards.hazards(world, "test")
    models = {name: load(out / name)[0] for name in (*MODELS, "safety-sft")}
    tokenizer = load(out / "sft")[1]
    result: dict = {"n": len(tasks), "n_hazards": len(risky), "models": {}, "samples": []}
    gold: dict[tuple[str, str], list[float]] = {}
    for t in ("1.0", "0.0"):
        said = {name: judge.answers_of(m, tokenizer, tasks, float(t), seed) for name, m in models.items()}
        for name, rows in said.items():
            gold[name, t] = judge.helpfulness(world, tasks, rows)
            entry = {**properties(world, tasks, rows), "distinct_2": judge.distinct(rows), "words": sum(len(a.split()) for a in rows) / len(rows)}
            result["models"].setdefault(name, {})[t] = entry
        if t == "1.0":
            result["raters"] = agreement(world, tasks, said["sft"], said["gatt"], seed)
        for name in models:
            against = {other: judge.wins(gold[name, t], gold[other, t]) for other in ("sft", "reject-2") if other != name}
            result["models"][name][t]["wins"] = against
    for name, m in models.items():
        result["models"][name]["safety"] = judge.safety(world, risky, judge.answers_of(m, tokenizer, risky, 1.0, seed))
        if name != "sft":
            result["models"][name]["divergence"] = judge.divergence(m, models["sft"], tokenizer, tasks[:300], seed)
    shown = [next(t for t in tasks if t.kind == kind) for kind in ("fact", "story", "sum")]
    shown += [next(t for t in risky if t.args["harmful"] == bad and t.args["category"] == "illicit") for bad in (True, False)]
    for t in shown:
        result["samples"].append({"prompt": t.prompt, **{name: judge.answers_of(m, tokenizer, [t], 0.0)[0] for name, m in models.items()}})
    # three pairs a prompt: of one, a strength has some 170 pairs of 1,000 prompts, too few to tell it from its neighbour
    fresh = collect(world, [out / "sft", out / "safety-sft"], 3 * (tasks + risky), (1.0, 1.0), 977 + seed)
    raters = {kind: reward.load(out / f"reward-{kind}-{number}")[0] for kind, number in (("helpful", 3), ("safety", 2))}
    result["reward"] = {}
    for kind, m in raters.items():
        mine = [p for p in fresh if p.kind == kind]
        result["reward"][kind] = {"accuracy": reward.accuracy(m, tokenizer, mine), "calibration": reward.calibration(m, tokenizer, mine)}
    result["reward"]["helpful"]["probes"] = judge.probes(raters["helpful"], tokenizer, world, tasks)
    drawn = [sources.read_rows(out / f"reject-{i}" / "samples.jsonl", ("samples",)) for i in (1, 2)]
    k = len(drawn[0][0]["samples"])
    result["best_of"] = [rejection.best_of([r["samples"] for r in rows], [n for n in (1, 2, 4, 8, 16, 32) if n <= k]) for rows in drawn]  # a round each
    chat, ghost = models["sft"], models["gatt"]
    recall = lambda model, **how: judge.standing_recall(model, tokenizer, world, **how)  # noqa: E731
    result["standing"] = {
        "SFT, instruction on every turn": {"seen": recall(chat, turns=SHORT, every=True)}, "sft": {"seen": recall(chat, turns=SHORT)},
        "gatt": {"seen": {**recall(ghost, turns=SHORT), **recall(ghost, turns=(20,), n=40)}, "unseen": recall(ghost, turns=SHORT, unseen=True)},
    }  # fmt: skip
    if finished(out, "gatt-control").exists():
        result["standing"]["control"] = {"seen": recall(load(out / "gatt-control")[0], turns=SHORT)}
    return result
