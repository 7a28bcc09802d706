"""Checkpoints of a job: resumed on any number of ranks, read by one process, exported and imported in parts, and what a kill leaves."""
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillama import checkpoint, cli, reward
from minillama._files import open_distributed
from minillama.config import ParallelConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "benchmarks")]
import faults  # noqa: E402
import state_worker as worker  # noqa: E402
from test_parallel import torchrun, verbs  # noqa: E402
from test_slurm import wait_for  # noqa: E402

TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 4) for i in range(120)]
RESUMED = {"fsdp4": {"shard": 4}, "fsdp2-tp2": {"shard": 2, "tensor": 2}, "hsdp": {"replicate": 2, "shard": 2}, "from-one": {"shard": 4},
           "fsdp2": {"shard": 2}, "tp2": {"tensor": 2}, "one": {}}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A run of 4 ranks that was never stopped, and its checkpoint of step 5, resumed in every way; the same of one process."""
    root = tmp_path_factory.mktemp("state")
    Tokenizer.train(TEXTS, 330, root / "t.model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.run(root / "alone", ParallelConfig(), root / "half-alone")

    def work(n: int, *tasks) -> None:
        process = torchrun(n, str(Path(worker.__file__)), str(root), json.dumps(tasks))
        assert process.returncode == 0, process.stderr[-4000:]

    def resumed(name: str) -> list:
        return ["train", RESUMED[name], {"out": name, "start": "half-alone" if name == "from-one" else "half"}]

    work(4, ["train", {"shard": 4}, {"out": "whole", "keep": "half"}], *map(resumed, ("fsdp4", "fsdp2-tp2", "hsdp", "from-one")))
    work(2, *map(resumed, ("fsdp2", "tp2")), ["convert", {"shard": 2}, {"source": "half"}], ["convert", {"tensor": 2}, {"source": "half-alone"}],
         ["refuse", {"shard": 2}, {}], ["rewards", {"shard": 2}, {}])  # fmt: skip
    shutil.copytree(root / "half", root / "one")
    worker.run(root / "one", ParallelConfig())
    torch.set_num_threads(threads)
    return root


def losses(path: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 11))
    return [r[key] for r in rows]


def final(path: Path) -> dict:
    return dict(checkpoint.load(path)[0].state_dict())


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_any_mesh_with_the_losses_of_a_run_never_stopped(jobs, name):
    """Guards against lost optimizer state, a shifted data position, parts put together in the wrong order."""
    whole, resumed = losses(jobs / "whole"), losses(jobs / name)
    exact = name == "fsdp4"
    assert resumed == whole if exact else resumed == pytest.approx(whole, abs=1e-5)
    assert losses(jobs / "whole", "tokens") == losses(jobs / name, "tokens")  # the same data
    assert abs(whole[5] - whole[4]) > 1e-4  # steps differ, so a position off by one would show
    a, b = final(jobs / "whole"), final(jobs / name)
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(b[n], a[n], rtol=0, atol=0 if exact else 1e-5)


def test_a_step_of_four_ranks_is_split_and_whole(jobs):
    """Guards against a rank that gathers everything, and against optimizer state of fewer tensors than there are."""
    folder = jobs / "half" / "checkpoint" / "step-00000005"
    assert sorted(p.name for p in folder.iterdir()) == [".metadata", *(f"__{r}_0.distcp" for r in range(4)), "params.json", "train_state.json"]
    sizes = [(folder / f"__{r}_0.distcp").stat().st_size for r in range(4)]
    assert max(sizes) < 0.4 * sum(sizes)
    names = set(open_distributed(folder))
    own = set(Llama(worker.CONFIG).state_dict())
    assert names == {f"model/{n}" for n in own} | {f"train/{k}/{n}" for n in own for k in ("exp_avg", "exp_avg_sq", "step")}
    assert sorted(p.name for p in (jobs / "whole" / "checkpoint").iterdir()) == ["step-00000010"]  # older ones are gone


def test_import_and_export_hold_no_whole_model(jobs):
    """Bit for bit through Hugging Face's format and ours in several files, from a job's folder and from one process's. The worker asserts that a rank
    keeps half, and that a file holds no more than it may; here, that tensors were read one at a time."""
    for source in ("half", "half-alone"):
        found = torch.load(jobs / f"convert{source}.pt")
        want = final(jobs / source)
        assert 1 <= int(found.pop("held")) <= 4 and len(found) == 3  # of 21; a permuted one has been read as another
        for name, tensors in found.items():
            assert all(torch.equal(tensors[n], want[n]) for n in want), name
        for kind in ("hf", "own"):
            folder = jobs / f"{source}-{kind}"
            assert len(list(folder.glob("model-*.safetensors"))) > 3 and (folder / "model.safetensors.index.json").exists()
            assert all(torch.equal(t, want[n]) for n, t in final(folder).items())


def test_hugging_face_reads_what_ranks_exported(jobs):
    """Guards against a permutation that is applied to a part of the heads."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(jobs / "half-hf").eval()
    tokens = torch.arange(1, 41)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, checkpoint.load(jobs / "half")[0](tokens), rtol=0, atol=1e-5)


def test_convert_reads_a_job_s_folder(jobs, tmp_path, capsys):
    for kind in ("hf", "minillama"):
        assert cli.main(["convert", "--model", str(jobs / "half"), "--to", kind, "--out", str(tmp_path / kind)]) == 0
        want = final(jobs / "half")
        assert all(torch.equal(t, want[n]) for n, t in final(tmp_path / kind).items())
    assert "without tokenizer" in capsys.readouterr().out


def test_every_rank_gets_the_same_error(jobs):
    """Guards against a hang where one rank fails, and a step that is renamed though a rank did not write its part."""
    first, second = torch.load(jobs / "refuse.pt")["errors"]
    assert first == second
    config, disk, left, file = first
    assert re.match(r"ValueError: .*step-00000005: tok_embeddings.weight has shape \[128, 64\], expected \[128, 32\]", config)
    assert disk.startswith("OSError: [Errno 28] rank 1 cannot write its part") and "No space left" in disk
    assert left == str([{"n": 1}, ["step-00000001"]])
    assert re.match(r"ValueError: .*file is a file; give a folder", file)


def test_a_reward_model_of_ranks_is_that_of_one_process(jobs):
    found = torch.load(jobs / "rewards.pt")
    alone = reward.from_chat(checkpoint.load(jobs / "half")[0], True, seed=3).state_dict()
    for tensors in (found["made"], found["loaded"], reward.load(jobs / "rm")[0].state_dict()):
        assert tensors.keys() == alone.keys() and all(torch.equal(tensors[n], alone[n]) for n in alone)


def test_damage_is_named(jobs, tmp_path):
    """A folder copied in part must not be loaded in part; a list of names must not run code."""
    folder = tmp_path / "checkpoint" / "step-00000005"
    shutil.copytree(jobs / "half" / "checkpoint" / "step-00000005", folder)
    os.truncate(folder / "__2_0.distcp", 1000)
    with pytest.raises(ValueError, match="__2_0.distcp is missing or truncated; copy it again"):
        checkpoint.load(tmp_path)
    (folder / "__2_0.distcp").unlink()
    with pytest.raises(ValueError, match="__2_0.distcp is missing"):
        checkpoint.load_state(tmp_path / "checkpoint")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"\.metadata is truncated or not of a checkpoint \(it names \w+.mkdir\)"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "pwned").exists()
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.metadata is truncated"):
        checkpoint.load(tmp_path)


def test_what_a_killed_save_leaves_is_not_loaded(jobs, tmp_path):
    half = jobs / "half" / "checkpoint" / "step-00000005"
    shutil.copytree(half, tmp_path / "step-00000005")
    shutil.copytree(half, tmp_path / ".tmp-step-00000010")
    assert checkpoint.load_state(tmp_path)[0] == 5
    (tmp_path / "step-00000010").mkdir()  # a copy of a run that was cut off: the list of names comes last
    shutil.copy(half / "__0_0.distcp", tmp_path / "step-00000010")
    assert checkpoint.load_state(tmp_path)[0] == 5


# ------------------------------------------------------------------------------------------------------------ the CLI


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with the run of 30 steps that nobody stopped, "whole", and command(out, *more) that starts the same on 2 ranks."""
    root = tmp_path_factory.mktemp("stage")
    faults.prepare(root)

    def command(out: Path, *more: str) -> list[str]:
        return [*faults.command(root, out, 2, 30), *more]

    assert run(command(root / "whole")).returncode == 0
    return root, command


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_wrong_requests_end_on_every_rank_with_the_numbers(stage, tmp_path):
    """Guards against one rank that stops and others that wait for it."""
    root, command = stage
    shutil.copytree(root / "whole" / "checkpoint", tmp_path / "other" / "checkpoint")
    c = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "max_seq_len": 64}
    wrong = [
        (tmp_path / "a", ["--train.parallel.shard", "3"], "replicate 1 x shard 3 x tensor 1 does not make the 2 ranks"),
        (tmp_path / "a", ["--train.batch_size", "1"], r"batch\D* 1 .*\b2\b"),
        (tmp_path / "other", ["--model", json.dumps({**c, "dim": 24})], r"tok_embeddings.weight has shape \[330, 48\], expected \[330, 24\]"),
        (root / "whole", ["--resume", "false"], "already holds a checkpoint of step 30"),
    ]
    verb = lambda out, more: (argv := command(out, *more))[argv.index("minillama") + 1 :]  # noqa: E731
    for rank in verbs(2, tmp_path, *(verb(out, more) for out, more, _ in wrong)):
        for (_, _, expected), said in zip(wrong, rank, strict=True):
            assert said["status"] == 2 and re.fullmatch(rf"minillama: .*{expected}.*\n", said["err"]), said
    more, expected = ["--train.parallel.tensor", "2", "--model", json.dumps({**c, "n_kv_heads": 1})], "tensor 2 does not divide n_kv_heads 1"
    began = time.monotonic()
    done = run(command(tmp_path / "a", *more))  # and how a job of its own ends
    lines = [line for line in done.stderr.splitlines() if line.startswith("minillama: ")]
    assert len(lines) == 2 and all(re.search(expected, line) for line in lines), done.stderr  # one of each rank
    assert "minillama/cli.py" not in done.stderr and time.monotonic() - began < 60  # the one traceback is torchrun's own
    codes = re.findall(r"exitcode +: (-?\d+)", done.stderr)
    assert "2" in codes and set(codes) <= {"2", "-15"}, done.stderr  # torchrun may end one that waits for the other to say its line


@pytest.mark.slow
def test_kill_9_of_a_rank_ends_the_job_and_loses_only_steps_since_the_last_save(stage, tmp_path):
    """Guards against ranks that wait for a dead one, a half-written step that counts, and a resumed run that differs. benchmarks/faults.py kills more."""
    root, command = stage
    rng, out = random.Random(2), tmp_path / "out"
    for saving in (False, True):
        r = faults.strike(command(out), out, tmp_path / "log", rng, 2, saving)
        assert r["named"] and r["status"] != 0 and r["seconds"] < 60, (r, (tmp_path / "log").read_text())
        assert r["saved"] % faults.SAVE_EVERY == 0 and r["lost"] <= faults.SAVE_EVERY, r
    done = run(command(out))
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (faults.records(x) for x in (root / "whole", out))
    assert [(r["step"], r.get("loss")) for r in a] == [(r["step"], r.get("loss")) for r in b] and b[-1]["step"] == 30
    want = final(root / "whole")
    assert all(torch.equal(t, want[n]) for n, t in final(out).items())


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
def test_a_rank_that_hangs_is_named(stage, tmp_path, saving):
    """Guards against a job that waits for ever for a rank that is alive and silent, in a step or in a save, and against an error that does not say which."""
    _, command = stage
    out, log = tmp_path / "out", tmp_path / "log"
    more = ("--train.steps", "100000", "--train.parallel.timeout_minutes", "0.2", "--train.save_every", "2" if saving else "100000")
    with log.open("w") as f:
        job = subprocess.Popen(command(out, *more), stderr=f, stdout=f, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(faults.records(out)) >= 3, 180, "no 3 steps in three minutes")
        silent, hidden = faults.rank_pids(job.pid)[1], lambda: list((out / "checkpoint").glob(".tmp-step-*"))
        while True:
            if saving:
                wait_for(hidden, 90, "nothing was saved", pause=0)
            os.kill(silent, signal.SIGSTOP)
            time.sleep(1)
            if not saving or hidden():  # else the save was over before the signal came
                break
            os.kill(silent, signal.SIGCONT)
        wait_for(lambda: "waited in vain" in log.read_text(), 90, "no rank said whom it waited for")
        os.kill(silent, signal.SIGCONT)
        assert job.wait(60) != 0
    finally:
        for pid in [*faults.rank_pids(job.pid).values(), job.pid] if job.poll() is None else []:
            os.kill(pid, signal.SIGKILL)  # each rank is in a session of its own
    lines = [line for line in log.read_text().splitlines() if line.startswith("minillama: ")]
    assert re.match(r"minillama: rank 0: waited in vain for rank 1 \(parallel.timeout_minutes\): .*[Tt]imed out", lines[0]), lines
