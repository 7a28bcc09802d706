"""The launcher: its job script, what becomes of failures and signals, and the full-scale settings."""
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from minillama import config
from minillama.cli import _STAGES, _config, main
from minillama.parallel.launch import Job, script, torchrun

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "minillama" / "configs").glob("llama2-*/*.yaml"))
COMMAND = re.compile(r"^#     minillama (launch --slurm .*)$", re.M)

# A stand-in for srun: the health check finds nothing, unless $FAKE/health says otherwise; the training is $FAKE/train.
SRUN = """#!/bin/bash
for last in "$@"; do case $last in minillama.parallel.launch) part=health;; minillama) part=${part:-train};; esac; done
echo "$part $$" >>"$FAKE/srun.calls"
touch "$logs/$part.node-0.log"
echo "health: fine" >"$logs/health.rank-0.log"
[ -e "$FAKE/$part" ] || exit 0
. "$FAKE/$part"
"""


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder that counts as shared by all nodes."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path


@pytest.fixture
def cluster(shared):
    """start(files, restart) begins the job script with a stand-in for Slurm and returns its process; scontrol's calls are in `fake`/scontrol.calls."""
    fake, run = shared / "fake", shared / "run"
    fake.mkdir()
    tools = {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" >>"$FAKE/scontrol.calls"\n', "sleep": "#!/bin/bash\nexec /bin/sleep 0.1\n"}
    for name, text in tools.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    text = script(Job("pretrain", ["--out", str(run)], run, gpus=False, failures=1))
    (shared / "launch.sh").write_text(text)
    (run / "logs").mkdir(parents=True)

    def start(train: str = "", health: str = "", restart: int = 0) -> subprocess.Popen:
        for name, text in (("train", train), ("health", health)):
            (fake / name).write_text(text) if text else (fake / name).unlink(missing_ok=True)
        env = {**os.environ, "FAKE": str(fake), "PATH": f"{fake}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart),
               "SLURM_JOB_NODELIST": "a", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}  # fmt: skip
        return subprocess.Popen(["bash", shared / "launch.sh"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.calls = lambda: (fake / "scontrol.calls").read_text().splitlines() if (fake / "scontrol.calls").exists() else []
    start.fake, start.run = fake, run
    return start


def ended(process: subprocess.Popen, status: int) -> str:
    text = process.communicate(timeout=30)[0]
    assert process.returncode == status, text
    return text


def test_failures_go_back_to_the_queue_until_there_is_no_progress(cluster):
    """Guards against a broken job that is requeued for ever, and a long one that is given up though it gets on."""
    crash = "echo 'exitcode  : -9 (pid: 5)' >$logs/train.node-1.log; echo boom >$logs/train.rank-3.log; exit 1"
    text = ended(cluster(crash), 1)
    assert cluster.calls() == ["requeue 7"] and "boom" in text and "train failed at no checkpoint" in text
    (cluster.run / "checkpoint" / "step-00000400").mkdir(parents=True)
    ended(cluster(crash, restart=1), 1)
    (cluster.run / "checkpoint" / "step-00000800").mkdir()
    (cluster.run / "checkpoint" / ".tmp-step-00000900").mkdir()  # not finished: no progress
    ended(cluster(crash, restart=2), 1)
    assert cluster.calls() == ["requeue 7"] * 3  # a failure each, at three points
    assert "not started again" in ended(cluster(crash, restart=3), 1)
    assert cluster.calls() == ["requeue 7"] * 3 and len((cluster.run / "failures.log").read_text().splitlines()) == 4


def test_a_wrong_request_is_never_started_again(cluster):
    """Guards against a wrong setting that waits in the queue three times to be refused three times."""
    assert "the request was wrong" in ended(cluster("echo '  exitcode  : 2 (pid: 5)' >$logs/train.node-0.log; exit 1"), 2)
    assert cluster.calls() == []


def test_an_unhealthy_node_stops_the_job_before_the_training(cluster):
    """Guards against a training that hangs in its first collective."""
    text = ended(cluster("exit 0", health="echo 'rank 3 on gpu17 sees 7 GPUs' >$logs/health.rank-3.log; exit 1"), 1)
    assert "health failed" in text and "gpu17 sees 7 GPUs" in text and cluster.calls() == ["requeue 7"]
    assert [line.split()[0] for line in (cluster.fake / "srun.calls").read_text().splitlines()] == ["health"]


def test_success_is_the_end(cluster):
    text = ended(cluster("exit 0"), 0)
    assert "health: fine" in text and "done" in text and cluster.calls() == []


@pytest.mark.parametrize(("sent", "calls"), [(signal.SIGUSR1, ["requeue 7"]), (signal.SIGTERM, [])])
def test_signals(cluster, sent, calls):
    """A warning reaches the trainers, even those that were still loading, and brings the job back; when Slurm takes the nodes the script leaves it alone:
    it may have been cancelled."""
    deaf = "trap '' USR1; touch $FAKE/up; /bin/sleep 1; trap 'exit 143' USR1 TERM; for i in {1..100}; do /bin/sleep 0.1; done; exit 0"
    p = cluster(deaf)
    while not (cluster.fake / "up").exists():
        time.sleep(0.05)
    p.send_signal(sent)
    if sent == signal.SIGTERM:  # Slurm tells the whole job
        time.sleep(1.5)
        os.kill(int((cluster.fake / "srun.calls").read_text().split()[-1]), signal.SIGTERM)
    ended(p, 143)
    assert cluster.calls() == calls and not (cluster.run / "failures.log").exists()


def test_a_training_that_hangs_when_the_time_is_up(cluster):
    """Guards against a job that runs into its time limit, which Slurm does not requeue."""
    path = cluster.run.parent / "launch.sh"
    path.write_text(path.read_text().replace("120 - 20", "2"))
    p = cluster("trap '' USR1; touch $FAKE/up; exec /bin/sleep 60")
    while not (cluster.fake / "up").exists():
        time.sleep(0.05)
    p.send_signal(signal.SIGUSR1)
    ended(p, 137)
    assert cluster.calls() == ["requeue 7"]


@pytest.mark.slow
def test_torchrun_and_health_check_for_real(cluster):
    """Runs the script's own torchrun line on one node, two ranks: the health check passes, and a wrong request is known as one by torchrun's log."""
    job = Job("pretrain", ["--tokenizer", "none", "--train.device", "cpu"], cluster.run, per_node=2, gpus=False)
    (cluster.run.parent / "launch.sh").write_text(script(job))
    srun = """for a in "$@"; do case $a in --output=*) out=${a#*=};; esac; done; while [ "$1" != bash ]; do shift; done; exec "$@" >${out/%n/0} 2>&1"""
    (cluster.fake / "srun").write_text("#!/bin/bash\n" + srun.replace("/%n/", "/\\%n/"))
    process = cluster()
    text = process.communicate(timeout=120)[0]
    assert "2 ranks reach each other" in text, text
    assert process.returncode == 2 and "the request was wrong" in text and "no tokenizer at none" in text, text
    assert list(cluster.run.glob(".health-*")) == []


def test_the_script_keeps_what_it_is_given(shared, capsys, monkeypatch):
    """Guards against arguments that the shell takes apart, and a script that is not one."""
    monkeypatch.chdir(shared)
    args = ["--out", "my run", "--train.device", "cpu", "--data", "it's *.txt"]
    options = ["--nodes", "2", "--processes", "4", "--partition", "p1", "--sbatch=--mem=0", "--time", "3:00:00"]
    assert main(["launch", "--slurm", *options, "--dry", "pretrain", *args]) == 0
    path = shared / "my run" / "launch.sh"
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0 and "{{" not in text
    line = next(x for x in text.splitlines() if x.startswith("on_every_node train"))
    assert shlex.split(line) == ["on_every_node", "train", "-m", "minillama", "pretrain", *args, "--resume", "true", "&"]
    header = [x.removeprefix("#SBATCH ") for x in text.splitlines() if x.startswith("#SBATCH")]
    assert {"--nodes=2", "--partition=p1", "--mem=0", "--time=3:00:00", "--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= set(header)
    assert not any("gpus" in x for x in header)
    said = capsys.readouterr().out
    assert text in said
    assert shlex.join(torchrun(Job("pretrain", args, Path("my run"), 2, 4, False))) in said


def test_refusals(shared, capsys, monkeypatch):
    """A request that cannot work ends before it waits in a queue, in one line with the numbers."""
    monkeypatch.chdir(shared)
    (shared / "old" / "checkpoint" / "step-00000010").mkdir(parents=True)
    nodes = ["launch", "--slurm", "--nodes", "2", "--gpus-per-node", "4"]
    for wrong, words in [
        ([*nodes, "pretrain", "--out", "x", "--train.parallel.tensor", "3"], "tensor 3 does not make the 8 ranks"),
        ([*nodes, "pretrain", "--out", "x", "--preset", "llama2-13b", "--train.parallel.tensor", "8", "--model", "{n_kv_heads: 4}"], "n_kv_heads 4"),
        ([*nodes, "sft", "--out", "x", "--train.batch_size", "4"], "4 rows does not reach the 8 data ranks"),
        ([*nodes, "ppo", "--out", "x", "--minibatch", "4"], "4 rows does not reach the 8 data ranks"),
        ([*nodes, "sft", "--out", "old"], "already holds a checkpoint"),
        ([*nodes, "sft", "--out", str(shared / "scratch" / "x")], "does not outlive the job"),
        ([*nodes, "--grace", "10", "sft", "--out", "x"], "grace must be at least 60, got 10"),
        ([*nodes, "sft", "--out", "x", "--train.lrr", "1"], "lrr"),
        ([*nodes, "chat"], "chat"),
        (["launch", "--local", "--nodes", "2", "--processes", "2", "sft", "--out", "x"], "torchrun --nnodes=2 --node-rank=K"),
        (["launch", "sft"], "--local --slurm is required"),
    ]:
        assert main(wrong) == 2, wrong
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err
    monkeypatch.setenv("PATH", str(shared))
    assert main([*nodes, "sft", "--out", "x"]) == 2 and "no sbatch" in capsys.readouterr().err
    (shared / "t.sh").write_text("#SBATCH --nodes={{nodez}}")
    assert main([*nodes, "--template", "t.sh", "--dry", "sft", "--out", "x"]) == 2 and "{{nodez}}" in capsys.readouterr().err


def test_no_torch_before_the_job_runs():
    code = "import sys; from minillama.cli import main; main(['launch', '--local', '--processes', '2', '--dry', 'sft']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# ---- the full-scale settings ----------------------------------------------------------------------------------------------------


def test_every_size_has_every_stage():
    stages = {"pretrain", "sft", "gatt", "reward-helpful", "reward-safety", "reject", "ppo", "safety-sft", "safety"}
    assert {(p.parent.name, p.stem) for p in CONFIGS} == {(f"llama2-{s}", f) for s in ("7b", "13b", "34b", "70b") for f in stages}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_full_scale_file(path, shared, monkeypatch):
    """Guards against a file that its stage refuses, a value without a source, a command in the head that does not work, and an input that no stage makes."""
    text = path.read_text()
    for line in text.splitlines():
        if not line.startswith("#") and not re.fullmatch(r" *\w+:", line):
            assert re.fullmatch(r" *\w+: \S.*  # (paper \((sec \d|table \d)[^)]*\)|assumed: ).*", line) and len(line) <= 160, line
    command = COMMAND.search(text)[1].split()
    monkeypatch.chdir(shared)
    (shared / "minillama").symlink_to(ROOT / "minillama")
    assert main([command[0], "--dry", *command[1:]]) == 0
    stage = command[command.index("--config") - 1]
    assert path.stem.split("-")[0] == stage or path.stem == "safety-sft"
    c, _ = _config(getattr(config, _STAGES[stage][1]), stage, ["--config", str(path)])
    outs = {yaml.safe_load(p.read_text())["out"] for p in CONFIGS}
    assert {getattr(c, name) for name in ("init", "policy", "helpful", "safety", "teacher") if getattr(c, name, "")} <= outs
    assert c.out.startswith(f"runs/{path.parent.name}/")


def test_the_paper_s_numbers():
    """Against the paper: table 1 and sec 2.2 (pretraining), 3.1 (SFT), 3.2.2 (reward models), 3.2.3 (PPO)."""
    adam = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "grad_clip": 1.0}
    for size, lr, reward_lr, beta in (("7b", 3e-4, 1e-5, 0.01), ("13b", 3e-4, 1e-5, 0.01), ("34b", 1.5e-4, 1e-5, 0.005), ("70b", 1.5e-4, 5e-6, 0.005)):
        files = {p.stem: yaml.safe_load(p.read_text()) for p in CONFIGS if p.parent.name == f"llama2-{size}"}
        p = files["pretrain"]["train"]
        assert p.items() >= {**adam, "lr": lr, "warmup_steps": 2000, "min_lr_ratio": 0.1, "seq_len": 4096}.items()
        assert abs(p["steps"] * p["batch_size"] * p["seq_len"] / 2.0e12 - 1) < 1e-5 and 4.0e6 <= p["batch_size"] * p["seq_len"] < 4.2e6
        assert files["sft"]["train"].items() >= {"lr": 2e-5, "weight_decay": 0.1, "batch_size": 64, "seq_len": 4096}.items() and files["sft"]["epochs"] == 2
        for kind in ("helpful", "safety"):
            r = files[f"reward-{kind}"]
            assert r["train"].items() >= {**adam, "lr": reward_lr, "batch_size": 512, "min_lr_ratio": 0.1, "warmup_steps": 5}.items()
            assert r["epochs"] == 1 and r["kind"] == kind
        assert files["ppo"].items() >= {**adam, "lr": 1e-6, "batch_size": 512, "minibatch": 64, "clip": 0.2, "beta": beta, "gate": 0.15}.items()
        assert 200 <= files["ppo"]["iterations"] <= 400
        assert files["reject"]["init"] == f"runs/llama2-{size}/pretrain" and files["reject"]["policy"] == "runs/llama2-70b/sft"
