"""Sharded equals single, to rounding: losses, weights, reward-model gradients and a PPO iteration on every kind of mesh, by gloo on the CPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def torchrun(n: int, *argv: str, timeout: int = 400, **env: str) -> subprocess.CompletedProcess:
    """`argv` in n processes on this machine, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


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


@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_ten_steps_equal_those_of_one_process(results, name):
    """Guards against a wrong divisor (ragged token counts), a local clip, unsynchronised parts of the model, other initial weights."""
    single, sharded = results["single"], results[name]
    assert len(sharded["losses"]) == 10 and abs(sharded["losses"][-1] - sharded["losses"][0]) > 0.02  # it learns, so equality means something
    assert sharded["losses"] == pytest.approx(single["losses"], abs=1e-5)
    close(sharded["weights"], single["weights"], 1e-5)


@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_a_reward_model_s_gradient_equals_that_of_one_process(results, name):
    single, sharded = results["single"]["reward"], results[name]["reward"]
    assert "score.weight" in sharded and sharded["score.weight"].abs().max() > 1e-3
    close(sharded, single, 1e-5)


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
