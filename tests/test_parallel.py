"""Sharded equals single, to rounding: losses, weights, reward-model gradients and a PPO iteration on every kind of mesh, by gloo on the CPU."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import cli
from minillama.config import LlamaConfig, ParallelConfig
from minillama.parallel import mesh as parallel

sys.path.insert(0, str(Path(__file__).parent))
import parallel_worker as worker  # noqa: E402

FOUR = {
    "fsdp": {"shard": 4}, "hsdp": {"replicate": 2, "shard": 2}, "tp": {"tensor": 4}, "fsdp x tp": {"shard": 2, "tensor": 2},
    "fsdp x tp, checkpointed": {"shard": 2, "tensor": 2, "activation_checkpointing": "full"},
    "hsdp, kept, checkpointed": {"replicate": 2, "shard": 2, "reshard": False, "activation_checkpointing": "full"},
}  # fmt: skip
TWO = {"fsdp of 2": {"shard": 2}, "tp of 2": {"tensor": 2}}


def torchrun(n: int, *argv: str, timeout: int = 400, lines: str = "", **env: str) -> subprocess.CompletedProcess:
    """`argv` in n processes on this machine, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *argv]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def verbs(n: int, out: Path, *argvs: list, lines: str = "") -> list[list[dict]]:
    """For each of n ranks of one job what the verbs gave: {"status", "out", "err"} each. All of them read `lines` on rank 0's stdin."""
    out.mkdir(exist_ok=True)
    tasks = [{"argv": [str(a) for a in argv], "lines": lines} for argv in argvs]
    process = torchrun(n, str(Path(__file__).parent / "verbs_worker.py"), str(out), json.dumps(tasks))
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(n)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process makes of it ("single"), and every mesh."""
    out = tmp_path_factory.mktemp("parallel")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.one("single", ParallelConfig(), out)
    torch.set_num_threads(threads)
    for n, meshes in ((4, FOUR), (2, TWO)):
        process = torchrun(n, str(Path(worker.__file__)), str(out), json.dumps(meshes))
        assert process.returncode == 0, process.stderr[-4000:]
    found = {}
    for name in ("single", *FOUR, *TWO):
        found[name] = torch.load(out / f"{name}.pt", weights_only=True)
        found[name]["losses"] = [json.loads(line)["loss"] for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    return found


def close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_ten_steps_equal_those_of_one_process(results, name):
    """Guards against a wrong divisor (ragged token counts), a local clip, unsynchronised parts of the model, other initial weights."""
    single, sharded = results["single"], results[name]
    assert len(sharded["losses"]) == 10 and abs(sharded["losses"][-1] - sharded["losses"][0]) > 0.02  # it learns, so equality means something
    assert sharded["losses"] == pytest.approx(single["losses"], abs=1e-5)
    close(sharded["weights"], single["weights"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_a_reward_model_s_gradient_equals_that_of_one_process(results, name):
    single, sharded = results["single"]["reward"], results[name]["reward"]
    assert "score.weight" in sharded and sharded["score.weight"].abs().max() > 1e-3
    close(sharded, single, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_a_ppo_iteration_equals_that_of_one_process(results, name):
    """Sampled with the same numbers from gathered weights, scored and learned in shards."""
    single, sharded = results["single"], results[name]
    assert torch.equal(sharded["rollout"]["tokens"], single["rollout"]["tokens"])
    close({k: v for k, v in sharded["rollout"].items() if k != "tokens"}, {k: v for k, v in single["rollout"].items() if k != "tokens"}, 1e-4)
    close(sharded["policy"], single["policy"], 1e-5)
    close(sharded["critic"], single["critic"], 1e-5)
    assert sharded["ppo"] == pytest.approx(single["ppo"], abs=1e-4)
    assert sharded["drawn"] == single["drawn"]


def test_degrees_that_do_not_fit_are_refused_with_the_numbers():
    llama = LlamaConfig.preset("llama2-70b")
    assert ParallelConfig(tensor=8).resolve(512, llama).shard == 64
    with pytest.raises(ValueError, match=r"replicate 1 x shard 3 x tensor 2 does not make the 8 ranks"):
        ParallelConfig(shard=3, tensor=2).resolve(8)
    with pytest.raises(ValueError, match="tensor 16 does not divide n_kv_heads 8"):
        ParallelConfig(tensor=16).resolve(512, llama)
    with pytest.raises(ValueError, match="shard any x tensor 3"):
        ParallelConfig(tensor=3).resolve(8, llama)
    with pytest.raises(ValueError, match="parallel.tensor must be at least 1, got 0"):
        ParallelConfig(tensor=0)


def test_shares_are_a_partition():
    """Guards against rows that two ranks draw, or none."""
    for n in (0, 1, 3, 8, 13):
        for ranks in (1, 2, 4, 5):
            parts = [list(range(n))[parallel.Mesh(ParallelConfig(), data_rank=r, data_ranks=ranks).share(n)] for r in range(ranks)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A folder with all stages by one process, and the tokenizer."""
    import stages_worker

    from minillama.tokenizer import Tokenizer

    root = tmp_path_factory.mktemp("stages")
    tokenizer = Tokenizer.train([*stages_worker.TEXTS, "Tell line And another Always say"], 330, root / "t.model").path
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stages_worker.stages(root / "single", str(tokenizer), ParallelConfig())
    torch.set_num_threads(threads)
    return root, str(tokenizer)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"shard": 2}, {"tensor": 2}], ids=["fsdp", "tp"])
def test_every_stage_runs_sharded_and_does_what_one_process_does(staged, degrees, monkeypatch, capsys):
    """Guards against ranks that sample alike, score other rows, write over each other, or wait for one another for ever; and against stages that
    cannot read what a sharded one wrote. A process alone then generates with the result, and two ranks talk to it."""
    from minillama import checkpoint
    from minillama.generate import generate

    root, tokenizer = staged
    out, single = root / next(iter(degrees)), root / "single"
    process = torchrun(2, str(Path(__file__).parent / "stages_worker.py"), str(out), tokenizer, json.dumps(degrees), timeout=550)
    assert process.returncode == 0, process.stderr[-4000:]
    for stage in ("pretrain", "sft", "gatt", "reward-helpful", "reward-safety", "reject", "safety"):
        mine, theirs = ([r["loss"] for r in rows(x / stage / "metrics.jsonl") if "loss" in r] for x in (out, single))
        assert len(mine) == len(theirs) > 1 and mine == pytest.approx(theirs, abs=2e-3), stage
    for name in ("gatt/dialogues.jsonl", "reject/selected.jsonl", "safety/selected.jsonl"):
        mine, theirs = rows(out / name), rows(single / name)
        texts = lambda found: [r.get("answers") or r["messages"][-1]["content"] for r in found]  # noqa: E731
        assert texts(mine) == texts(theirs), name
    mine, theirs = rows(out / "ppo" / "metrics.jsonl"), rows(single / "ppo" / "metrics.jsonl")
    assert [r.keys() for r in mine] == [r.keys() for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx({k: v for k, v in b.items() if k != "seconds"}, abs=5e-3)
    (a, tok), (b, _) = (checkpoint.load(x / "safety") for x in (out, single))
    close(a.state_dict(), b.state_dict(), 2e-3)
    ids = tok.encode("Line 3", bos=True)
    said = "Line 3" + tok.decode(generate(a, [ids], max_new_tokens=12, temperature=0.0, stop=[tok.eos_id])[0])
    where = ["--model", str(out / "safety"), "--device", "cpu"]
    speak = ["generate", *where, "--prompt", "Line 3", "--max_new_tokens", "12"]
    if "tensor" in degrees:  # one of the other verbs on each mesh
        other, more, lines = ["chat", *where, "--max_new_tokens", "12"], ["--parallel.tensor", "2"], "Tell line 3\nAnd another\n/reset\nTell line 4\n"
    else:
        (root / "text.txt").write_text("Line 3 of the long book tells of 3 boats.\n\nLine 5 of it tells of none.")
        other, more, lines = ["eval", *where, "--data", str(root / "text.txt"), "--json"], [], ""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(other) == 0
    alone = capsys.readouterr().out
    first, second = verbs(2, root / f"verbs-{next(iter(degrees))}", [*speak, *more], [*other, *more], lines=lines)
    assert [v["status"] for v in first + second] == [0] * 4, (first, second)
    assert first[0]["out"].strip() == said.strip() and [v["out"] for v in second] == ["", ""]  # one rank speaks
    if lines:
        assert alone == first[1]["out"] and alone.count("\n") == 3
        process = torchrun(2, "-m", "minillama", *other, *more, lines=lines)  # and through torchrun, as README has it
        assert process.returncode == 0 and process.stdout == alone, process.stderr[-2000:]
    else:
        assert json.loads(alone) == pytest.approx(json.loads(first[1]["out"]), rel=1e-4)
