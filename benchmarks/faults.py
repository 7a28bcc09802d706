"""kill -9 of one rank at a random moment, again and again: does the job end, does it say who died, and what is lost?

    python benchmarks/faults.py [--kills 10] [--ranks 2] [--seed 0]

Every other kill strikes while a checkpoint is being written. In between, the job is resumed, and at the end its losses must be those of a run that nobody
stopped, bit for bit. Exit status 1 if they are not, or a job took more than a minute to end, or anything but the steps since the last save was lost.
"""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAVE_EVERY = 5


def command(root: Path, out: Path, ranks: int, steps: int) -> list[str]:
    """A pretraining that takes some seconds, resumed if it can be."""
    model = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "max_seq_len": 64}
    stage = ["pretrain", "--data", root / "text.txt", "--tokenizer", root / "t.model", "--preset", "ci", "--model", json.dumps(model), "--workers", 1,
             "--train.batch_size", 8, "--train.seq_len", 64, "--train.lr", 0.01, "--train.warmup_steps", 5, "--train.log_every", 1,
             "--train.save_every", SAVE_EVERY, "--train.steps", steps, "--train.device", "cpu", "--out", out, "--resume", "true"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "minillama"]
    return [str(x) for x in [*launcher, *stage]]


def prepare(root: Path) -> None:
    """Text and a tokenizer of it."""
    from minillama.tokenizer import Tokenizer

    texts = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 4) for i in range(400)]
    (root / "text.txt").write_text("\n\n".join(texts))
    Tokenizer.train(texts, 330, root / "t.model")


def records(out: Path) -> list[dict]:
    """metrics.jsonl without a line that was cut off."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rank_pids(parent: int) -> dict[int, int]:
    """{rank: process id} of torchrun's children."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                env = dict(x.split("=", 1) for x in (path / "environ").read_text().split("\0") if "=" in x)
                found[int(env["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError, IndexError):
            continue
    return found


def strike(argv: list[str], out: Path, log: Path, rng: random.Random, ranks: int, saving: bool, patience: float = 120) -> dict:
    """Start the job, kill a rank some steps later (`saving`: while a step's hidden folder is there), and see."""
    from minillama import checkpoint

    # beyond what earlier starts reached: their lines are in the file until the job drops those after its checkpoint
    victim, target = rng.randrange(ranks), max((r["step"] for r in records(out)), default=0) + rng.randint(1, 2 * SAVE_EVERY)
    with open(log, "w") as f:
        job = subprocess.Popen(argv, stdout=f, stderr=f, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and job.poll() is None and not any(r["step"] >= target for r in records(out)[-1:]):
        time.sleep(0.002)
    while saving and time.monotonic() < deadline and job.poll() is None and not list((out / "checkpoint").glob(".tmp-step-*")):
        pass
    time.sleep(rng.random() * 0.02)
    os.kill(rank_pids(job.pid)[victim], signal.SIGKILL)
    began = time.monotonic()
    status = job.wait(timeout=patience)
    seconds = time.monotonic() - began
    half = [p.name for p in (out / "checkpoint").glob(".tmp-step-*")]
    after = checkpoint.load_state(out / "checkpoint")
    saved, reached = after[0] if after else 0, max((r["step"] for r in records(out)), default=0)
    said = re.search(r"rank +: (\d+) [^\n]*\n *exitcode +: (-?\d+)[^\n]*\n(?:[^\n]*\n)? *traceback +: ([^\n]*)", log.read_text().split("Root Cause")[-1])
    return {"rank": victim, "reached": reached, "half": bool(half), "seconds": seconds, "status": status, "saved": saved, "lost": reached - saved,
            "said": f"rank {said[1]}: {said[3]}" if said else "", "named": bool(said) and int(said[1]) == victim and said[2] == "-9"}  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    rng, good = random.Random(a.seed), True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        steps = 3 * SAVE_EVERY * (a.kills + 2)
        subprocess.run(command(root, root / "whole", a.ranks, steps), check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"{'kill':>4} {'rank':>4} {'at step':>7} {'half a save':>11} {'ended after':>11} {'status':>6} {'saved':>5} {'lost':>4}  torchrun says")
        for i in range(a.kills):
            r = strike(command(root, root / "out", a.ranks, steps), root / "out", root / "log", rng, a.ranks, saving=i % 2 == 1)
            print(f"{i + 1:>4} {r['rank']:>4} {r['reached']:>7} {'yes' if r['half'] else 'no':>11} {r['seconds']:>9.1f} s {r['status']:>6} {r['saved']:>5} "
                  f"{r['lost']:>4}  {r['said']}", flush=True)  # fmt: skip
            good &= r["named"] and r["seconds"] < 60 and r["status"] != 0 and r["saved"] % SAVE_EVERY == 0 and r["lost"] <= SAVE_EVERY
        subprocess.run(command(root, root / "out", a.ranks, steps), check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        whole, killed = ([(r["step"], r["loss"]) for r in records(root / x) if "loss" in r] for x in ("whole", "out"))
        same = whole == killed and len(whole) == steps
        print(f"{steps} steps, killed {a.kills} times: losses {'equal those of a run never stopped, bit for bit' if same else 'DIFFER'}")
    return 0 if good and same else 1


if __name__ == "__main__":
    sys.exit(main())
