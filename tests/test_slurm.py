"""The job script on a real Slurm of two nodes on this machine (tests/slurm.sh): warned, requeued, finished, with the losses of a run left alone."""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 150
missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin")]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing) or os.geteuid() != 0,
              reason=f"needs root and Debian's slurm-wlm and munge ({', '.join(missing) or 'not root'})")]  # fmt: skip


@pytest.fixture
def slurm(tmp_path_factory):
    """The environment of commands that talk to a cluster which lives as long as the test."""
    folder = tmp_path_factory.mktemp("slurm")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PORT": str(17000 + os.getpid() % 2000), "PATH": os.environ["PATH"] + ":/usr/sbin",
           "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}  # fmt: skip
    # files, not pipes: the daemons would keep a pipe open
    with open(folder / "start.log", "w") as log:
        started = subprocess.run([ROOT / "tests/slurm.sh", "start", folder], env=env, stdout=log, stderr=log)
    assert started.returncode == 0, (folder / "start.log").read_text()
    yield env
    subprocess.run([ROOT / "tests/slurm.sh", "stop", folder], env=env)


def losses(path: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


def wait_for(what, seconds: float, about: str, pause: float = 0.2):
    """Wait until what() is true, asked every `pause` seconds. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, about
        time.sleep(pause)


def test_a_job_that_is_warned_and_requeued_ends_with_the_losses_of_one_left_alone(slurm, tmp_path):
    """Guards against a signal that does not reach the trainers, a requeue that starts from nothing, and steps lost or done twice."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abdeghiklmnoprstuv", k=rng.randint(2, 7))) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(300)))
    minillama = [sys.executable, "-m", "minillama"]

    def call(*args: object) -> str:
        done = subprocess.run([str(x) for x in args], env=slurm, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(*minillama, "tokenizer", "--data", tmp_path / "text.jsonl", "--vocab_size", 300, "--out", tmp_path / "t.model")
    stage = ["pretrain", "--data", tmp_path / "text.jsonl", "--tokenizer", tmp_path / "t.model", "--preset", "ci", "--train.steps", STEPS,
             *"--train.device cpu --train.batch_size 8 --train.seq_len 64 --train.lr 0.001 --train.warmup_steps 5 --train.log_every 1".split()]  # fmt: skip
    call(*minillama, "launch", "--local", "--processes", 2, *stage, "--out", tmp_path / "alone")
    expected = losses(tmp_path / "alone" / "metrics.jsonl")
    assert sorted(expected) == list(range(1, STEPS + 1)) and expected[STEPS] < expected[1] - 0.5

    run, metrics = tmp_path / "job", tmp_path / "job" / "metrics.jsonl"
    said = call(*minillama, "launch", "--slurm", "--nodes", 2, "--processes", 1, "--cpus", 1, "--time", 20, *stage, "--out", run)
    job = said.split()[1].rstrip(":")
    log = run / "logs" / f"{job}.log"

    def report() -> str:
        return "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in [log, *sorted(run.glob("logs/*/*.log"))] if p.exists())

    try:
        wait_for(lambda: len(losses(metrics)) > 20, 120, "no 20 steps in two minutes")
        call("scancel", "--signal=USR1", "--batch", job)  # what Slurm sends before the time is up
        wait_for(lambda: "back to the queue" in log.read_text(), 60, "the job did not go back to the queue")
        first = max(losses(metrics))
        assert first < STEPS and (run / "checkpoint" / f"step-{first:08d}").is_dir()  # stopped between two steps, and saved that one
        wait_for(lambda: len(losses(metrics)) > first + 20, 180, "the job did not go on after its first return")
        call("scontrol", "requeue", job)  # as after a preemption: Slurm takes the nodes away
        wait_for(lambda: "took the nodes away" in log.read_text(), 60, "the job script did not end")
        wait_for(lambda: "done, " in log.read_text(), 240, "the job did not finish after its second return")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{report()}") from None
    assert losses(metrics) == expected
    assert [r["step"] for r in map(json.loads, metrics.read_text().splitlines()) if "loss" in r] == list(range(1, STEPS + 1))  # none twice
    text = log.read_text()
    assert text.count("health: 2 ranks reach each other") == 3 and not (run / "failures.log").exists()
    for start in range(3):
        assert {p.name for p in (run / "logs" / f"{job}.{start}").glob("train.rank-*.log")} == {"train.rank-0.log", "train.rank-1.log"}
    assert "Restarts=2" in call("scontrol", "show", "job", job)
