"""What every rank of tests/test_state.py's jobs runs, one task after another.

    torchrun --nproc-per-node 4 tests/state_worker.py FOLDER '[["train", {"shard": 4}, {"out": "whole", ...}], ...]'
"""
import json
import shutil
import sys
import weakref
from pathlib import Path

import torch
from parallel_worker import CONFIG, text_batches, weights

from minillama import _files, checkpoint, reward
from minillama.config import LlamaConfig, ParallelConfig, TrainConfig
from minillama.model import Llama, next_token_loss
from minillama.parallel import mesh as parallel
from minillama.parallel.state import build, load_sharded
from minillama.trainer import train


def run(out: Path, p: ParallelConfig, keep: Path | None = None) -> None:
    """Ten steps in `out`, from what is there; the checkpoint of step 5 is copied to `keep`."""
    mesh, real = parallel.current(), checkpoint.save_state
    c = TrainConfig(steps=10, batch_size=8, seq_len=30, lr=1e-2, warmup_steps=2, log_every=1, save_every=5, grad_clip=0.5, device="cpu", parallel=p)

    def save_state(folder, step, *args, **kwargs):
        path = real(folder, step, *args, **kwargs)
        if keep and step == 5:
            mesh.first(lambda: shutil.copytree(out, keep))
        return path

    checkpoint.save_state = save_state
    try:
        model = build(lambda: Llama(CONFIG), lambda m: m.init_weights(1), mesh)
        train(model, text_batches(mesh.data_rank, mesh.data_ranks), next_token_loss, c, out, resume=True)
    finally:
        checkpoint.save_state = real


def counting(seen: list) -> type:
    """Tensors that note in `seen` how many of those that were ever read are still in memory."""
    alive: list[weakref.ref] = []

    class Counting(_files.Tensors):
        def __getitem__(self, name: str) -> torch.Tensor:
            tensor = super().__getitem__(name)
            alive.append(weakref.ref(tensor))
            alive[:] = [ref for ref in alive if ref() is not None]
            seen.append(len(alive))
            return tensor

    return Counting


def convert(root: Path, source: str) -> dict:
    """Load a folder without holding it, save it in both formats, load those; and what was held meanwhile."""
    mesh, held, written, real = parallel.current(), [], [], checkpoint.write_tensors
    original, result = _files.Tensors, {}

    def write(tensors, file):
        written.append(sum(t.nbytes for t in tensors.values()))
        real(tensors, file)

    checkpoint.write_tensors = write
    checkpoint.Tensors = _files.Tensors = counting(held)
    try:
        model, _ = load_sharded(root / source, mesh)
        checkpoint.save_hf(model, None, root / f"{source}-hf", max_shard_bytes=50_000)
        checkpoint.save(model, None, root / f"{source}-own", max_shard_bytes=50_000)
        for name in (source, f"{source}-hf", f"{source}-own"):
            model, _ = load_sharded(root / name, mesh)
            result[name] = weights(model)
            mine = sum(p.to_local().numel() for p in model.parameters())
            assert mine <= 0.6 * CONFIG.n_params(), mine  # of two ranks
    finally:
        checkpoint.write_tensors, checkpoint.Tensors, _files.Tensors = real, original, original
    assert bool(written) == (mesh.rank == 0) and max(written, default=0) <= 50_000, written
    result["held"] = torch.tensor(max(held))
    return result


def refuse(root: Path) -> dict:
    """What a checkpoint of another config, a rank that cannot write, and a folder in use do: the same error on every rank, and nothing lost."""
    mesh, errors = parallel.current(), []

    def attempt(work) -> None:
        try:
            work()
            errors.append("no error")
        except Exception as e:
            errors.append(f"{type(e).__name__}: {e}")

    other = LlamaConfig(**{**CONFIG.to_params_json(), "dim": 32, "n_kv_heads": 8})
    model = build(lambda: Llama(other), lambda m: m.init_weights(1), mesh)
    attempt(lambda: checkpoint.load_weights(model, checkpoint.load_state(root / "half" / "checkpoint")[1]))

    import torch.distributed.checkpoint as dcp

    real = dcp.FileSystemWriter.write_data
    folder = root / "full"
    checkpoint.save_state(folder, 1, model, {}, {"n": 1})
    if mesh.rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        dcp.FileSystemWriter.write_data = full
    attempt(lambda: checkpoint.save_state(folder, 2, model, {}, {"n": 2}))
    dcp.FileSystemWriter.write_data = real
    torch.distributed.barrier()  # rank 0 tidies up
    errors.append(str([checkpoint.load_state(folder)[3], sorted(p.name for p in folder.iterdir())]))
    if mesh.rank == 0:
        (root / "file").write_text("")
    attempt(lambda: checkpoint.save(model, None, root / "file"))
    parts: list = [None] * mesh.world
    torch.distributed.all_gather_object(parts, errors)
    return {"errors": parts}


def rewards(root: Path) -> dict:
    """A reward model from a chat model of another number of ranks, trained for a step's worth of saving, and loaded again."""
    mesh = parallel.current()
    model = reward.from_chat(checkpoint.opened(root / "half"), True, seed=3)
    checkpoint.save_state(root / "rm" / "checkpoint", 1, model, {}, {}, reward.Tokenizer(root / "t.model"))
    mesh.first(lambda: (root / "rm" / "reward.json").write_text('{"evidence": true}'))
    return {"made": weights(model), "loaded": weights(reward.load(root / "rm")[0])}


def main() -> None:
    torch.set_num_threads(1)
    root, tasks = Path(sys.argv[1]), json.loads(sys.argv[2])
    parallel.start(ParallelConfig(**tasks[0][1]), "cpu")
    for task, degrees, more in tasks:
        p = ParallelConfig(**degrees)
        parallel.use(parallel.make(p, CONFIG))
        if task == "train":
            if "start" in more:
                parallel.current().first(lambda more=more: shutil.copytree(root / more["start"], root / more["out"]))
            run(root / more["out"], p, root / more["keep"] if "keep" in more else None)
            continue
        result = {"convert": lambda source: convert(root, source), "refuse": lambda: refuse(root), "rewards": lambda: rewards(root)}[task](**more)
        if parallel.current().rank == 0:
            torch.save(result, root / f"{task}{''.join(more.values())}.pt")
    parallel.stop()


if __name__ == "__main__":
    main()
