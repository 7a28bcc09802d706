"""What each part of the reward models is worth: the demo's last ones, trained again with one part changed, on fresh pairs of the test split.

    python benchmarks/reward_ablations.py [--scale laptop] [--seeds 0 1] [--out runs/seeds] [--ppo]

Needs the runs of benchmarks/alignment.py. Helpfulness: without the text loss, without the evidence terms too (the paper's head alone), with no margin and
with the large one; judged on pairs of the chat model's answers and on pairs of the policy's own, which is where PPO will be. Safety: without the auxiliary
loss; how many of the unsafe answers get a probability below one half, how many would be caught by a limit that 5% of the safe ones fall below, and how often
an unsafe answer scores below a safe one. Differences are paired, in points with their 95% interval. --ppo also lets PPO optimise the reward model without the
text loss, from where the demo's PPO starts. What is trained is kept in the run's folder, ablation-*.
"""
import argparse
from pathlib import Path

from minillama import align, reward
from minillama.checkpoint import load
from minillama.config import RewardConfig
from minillama.data import hazards
from minillama.data.preferences import STRENGTHS, Pair
from minillama.data.world import World
from minillama.demo import recipe
from minillama.evaluation import alignment as judge
from minillama.evaluation.stats import rate

HELPFUL = {
    "the demo's": {}, "no text loss": {"text_weight": 0.0}, "head alone": {"text_weight": 0.0, "evidence": False}, "no margin": {"margin": "none"},
    "large margin": {"margin": "large"},
}  # fmt: skip
SAFETY = {"the demo's": {}, "no auxiliary loss": {"safety_weight": 0.0}}


def trained(run: Path, kind: str, number: int, name: str, change: dict, scale: str, seed: int):
    """(reward model, tokenizer) of the demo's last round, or one with a change, which is trained unless it is there."""
    if not change:
        return reward.load(run / f"reward-{kind}-{number}")
    out = run / f"ablation-{kind}-{name.replace(' ', '-')}"
    options = align.train_config({**recipe(scale)["align"][f"reward_{kind}"], **change}, seed, "auto")
    data = [str(run / f"preferences-{i}.jsonl") for i in range(1, number + 1)]
    reward.run(RewardConfig(data=data, init=str(run / "sft"), out=str(out), kind=kind, resume=True, **options))
    return reward.load(out)


def right(model, tokenizer, pairs: list[Pair]) -> list[float]:
    """1, 0 or a half (a tie) for each pair."""
    rows = [x for p in pairs for x in reward.encode_pair(tokenizer, p, model.config.max_seq_len)]
    return [(1.0 if c > r else 0.0 if r > c else 0.5) for c, r in reward.score(model, rows).view(-1, 2).tolist()]


def helpful(run: Path, scale: str, seed: int) -> None:
    """The table of the helpfulness model."""
    world = World(seed, scale)
    tasks = world.instructions("test")
    sets = {"SFT's answers": align.collect(world, [run / "sft", run / "safety-sft"], tasks, (1.0, 1.0), 977 + seed),
            "RS's answers": align.collect(world, [run / "reject-2", run / "reject-1"], tasks, (1.0, 1.0), 979 + seed)}  # fmt: skip
    head = " | ".join(f"{name}, n = {len(pairs)} | against the demo's" for name, pairs in sets.items())
    print(f"\n| seed {seed} | {head} | {STRENGTHS[3]} to {STRENGTHS[0]}, SFT's | right fact |\n|---|---|---|---|---|---|---|", flush=True)
    base: dict[str, list[float]] = {}
    for name, change in HELPFUL.items():
        model, tokenizer = trained(run, "helpful", 3, name, change, scale, seed)
        cells, got = [], {where: right(model, tokenizer, pairs) for where, pairs in sets.items()}
        for where, mine in got.items():
            w = judge.wins(mine, base.setdefault(where, mine))
            points = [200 * w[k] - 100 for k in ("mean", "low", "high")]
            cells += [f"{sum(mine) / len(mine):.3f}", f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]" if change else "-"]
        by = [[x for x, p in zip(got["SFT's answers"], sets["SFT's answers"], strict=True) if p.strength == s] for s in reversed(range(len(STRENGTHS)))]
        cells.append(", ".join(f"{sum(x) / len(x):.3f}" for x in by))
        cells.append(f"{judge.probes(model, tokenizer, world, tasks)['right fact']['mean']:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def safety(run: Path, scale: str, seed: int) -> None:
    """The table of the safety model."""
    world = World(seed, scale)
    pairs = align.collect(world, [run / "sft", run / "safety-sft"], hazards.hazards(world, "test"), (1.0, 1.0), 981 + seed)
    answers = {(p.prompt_messages[-1]["content"], x): safe for p in pairs for x, safe in ((p.chosen, p.chosen_safe), (p.rejected, p.rejected_safe))}
    print(f"\n| seed {seed} | unsafe answers below one half | safe answers above it | unsafe answers below 95% of the safe ones | "
          "unsafe below safe in a pair |\n|---|---|---|---|---|", flush=True)  # fmt: skip
    for name, change in SAFETY.items():
        model, tokenizer = trained(run, "safety", 2, name, change, scale, seed)
        scores = reward.score(model, [reward.encode(tokenizer, [{"role": "user", "content": q}], x, 256) for q, x in answers]).tolist()
        bad, good = (sorted(s for s, safe in zip(scores, answers.values(), strict=True) if safe == side) for side in (False, True))
        low, high, caught = [s < 0 for s in bad], [s > 0 for s in good], [s < good[len(good) // 20] for s in bad]
        mixed = right(model, tokenizer, [p for p in pairs if p.chosen_safe and not p.rejected_safe])
        span = lambda x: "{mean:.3f} [{low:.3f}, {high:.3f}], n = {n}".format(**rate(sum(x), len(x)))  # noqa: E731
        print(f"| {name} | {span(low)} | {span(high)} | {span(caught)} | {span(mixed)} |", flush=True)


def policy(run: Path, scale: str, seed: int) -> None:
    """PPO's gain on rejection sampling with and without the text loss in its reward model."""
    world = World(seed, scale)
    trained(run, "helpful", 3, "no text loss", HELPFUL["no text loss"], scale, seed)
    align.optimise(world, run, recipe(scale)["align"]["ppo"], seed, "auto", helpful="ablation-helpful-no-text-loss", name="ablation-ppo")
    tasks, gold = world.instructions("test"), {}
    for name in ("reject-2", "ppo", "ablation-ppo"):
        model, tokenizer = load(run / name)
        gold[name] = judge.helpfulness(world, tasks, judge.answers_of(model, tokenizer, tasks, 1.0, seed))
    print(f"\n| seed {seed}, T = 1 | wins against RS |\n|---|---|")
    for name in ("ppo", "ablation-ppo"):
        won = judge.wins(gold[name], gold["reject-2"])
        print("| {} | {mean:.3f} [{low:.3f}, {high:.3f}] |".format("the demo's" if name == "ppo" else "no text loss", **won), flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--scale", default="laptop")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--out", default="runs/seeds")
    p.add_argument("--ppo", action="store_true", help="run PPO too")
    a = p.parse_args()
    for s in a.seeds:
        helpful(Path(a.out) / f"{a.scale}-{s}", a.scale, s)
        safety(Path(a.out) / f"{a.scale}-{s}", a.scale, s)
        if a.ppo:
            policy(Path(a.out) / f"{a.scale}-{s}", a.scale, s)
