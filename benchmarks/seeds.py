"""The demo at a scale for several seeds, and the table that it is accepted by.

    python benchmarks/seeds.py [--scale laptop] [--seeds 0 1 2] [--out runs/seeds] [--replay]

A seed changes the world, its splits, the weights and the order of the data. Finished runs are read, not repeated. --replay tunes each base model once more,
without the pretraining text beside the dialogues, and says what base model and both tuned ones recall, of names that some training question asked of and of
those that none did.
"""
import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import yaml

from minillama import align, sft
from minillama.checkpoint import load
from minillama.config import SFTConfig
from minillama.data.gold import Gold
from minillama.data.world import World
from minillama.demo import recipe
from minillama.evaluation.stats import rate
from minillama.evaluation.tinyworld import base_answers, chat_answers


def replay(run: Path, scale: str, seed: int) -> None:
    """Print the greedy fact recall of the base model, asked with examples, and of SFT with and without replay, on the test split."""
    if not yaml.safe_load((run / "sft" / "config.yaml").read_text())["replay"]:
        raise SystemExit(f"{run / 'sft'} was tuned without replay; remove the run or choose another --out")
    world, settings = World(seed, scale), align.train_config(recipe(scale)["sft"], seed, "auto")  # without `replay` its share says nothing
    sft.run(SFTConfig(init=str(run / "pretrain"), out=str(run / "sft-without-replay"), resume=True, **settings),
            [e["messages"] for e in world.demonstrations()])  # fmt: skip
    asked = {who for (who, _), split in world.split.items() if split == "train"}
    tasks, gold = [t for t in world.instructions("test") if t.kind == "fact"], Gold(world)
    for name in ("pretrain", "sft", "sft-without-replay"):
        model, tokenizer = load(run / name)
        answers = base_answers(model, tokenizer, world, tasks) if name == "pretrain" else chat_answers(model, tokenizer, tasks)
        scored = [(t, gold.score(t, a)) for t, a in zip(tasks, answers, strict=True)]
        for title, wanted in (("some question asked of", True), ("no question asked of", False)):
            right = [s.correct for t, s in scored if (t.args["who"] in asked) == wanted]
            r = rate(sum(right), len(right))
            print(f"seed {seed}, {name}: facts about names that {title}: {r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}] (n = {len(right)})", flush=True)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--scale", default="laptop")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", default="runs/seeds")
    p.add_argument("--replay", action="store_true")
    a = p.parse_args()
    rows, ok = [], True
    for seed in a.seeds:
        run = Path(a.out) / f"{a.scale}-{seed}"
        subprocess.run([sys.executable, "-m", "minillama", "demo", "--scale", a.scale, "--seed", str(seed), "--out", str(run)], check=True)
        e, c = json.loads((run / "eval.json").read_text()), json.loads((run / "clean.json").read_text())
        seconds = sum(json.loads(line)["seconds"] for line in (run / "times.jsonl").read_text().splitlines())
        for t in ("0.0", "1.0"):
            s, b = e["sft"][t], e["base"][t]
            facts = s["fact_recall"]
            rows.append((seed, "greedy" if t == "0.0" else "T = 1", s["parses"]["mean"], s["on_topic"]["mean"], facts["mean"], facts["n"],
                         b["helpfulness"], s["helpfulness"], c["contamination"] + c["contamination_sft"], seconds))  # fmt: skip
        s, b = e["sft"]["0.0"], e["base"]["0.0"]
        ok &= s["parses"]["mean"] >= 0.95 and s["on_topic"]["mean"] >= 0.9 and s["fact_recall"]["mean"] >= 0.8
        ok &= s["helpfulness"]["low"] > b["helpfulness"]["high"] and c["contamination"] + c["contamination_sft"] == 0
    print("| seed | decoding | parses | on topic | fact recall (n) | base helpfulness | SFT helpfulness | asked held-out pairs | seconds |")
    print("|---" * 9 + "|")
    for seed, how, parses, topic, facts, n, b, s, leak, seconds in rows:
        span = lambda r: f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"  # noqa: E731
        print(f"| {seed} | {how} | {parses:.3f} | {topic:.3f} | {facts:.3f} ({n}) | {span(b)} | {span(s)} | {leak} | {seconds:.0f} |")
    for seed in a.seeds if a.replay and "replay_share" in recipe(a.scale)["sft"] else ():
        replay(Path(a.out) / f"{a.scale}-{seed}", a.scale, seed)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nlargest process: {peak:.2f} GiB")
    print(f"greedy: parses >= 0.95, on topic >= 0.90, facts >= 0.80, intervals apart, nothing asked before: {'holds' if ok else 'FAILS'}")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
