"""Checkpoints of a job: written by all ranks at once, read by any number of them.

    model, tokenizer = load_sharded("runs/my/pretrain", mesh.start(ParallelConfig(shard=8)))

Every rank writes its own parts with PyTorch's distributed checkpoint (DCP), beside the files that a job of one writes, into one hidden folder that
rank 0 renames when all are done: whoever finds a step finds a whole one. Reading asks nobody: a rank looks up which parts of which files make up its
own, so the number of ranks and the mesh may change between jobs, and one process can read what a cluster wrote.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillama._files import Tensors, hidden, new_folder
from minillama.parallel.mesh import Mesh, current

if TYPE_CHECKING:
    from minillama.checkpoint import Stored
    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer


@contextmanager
def shared_folder(target: Path) -> Iterator[Path]:
    """`new_folder` for all ranks: rank 0 makes the hidden folder, all may fill it, rank 0 renames it. The file system must be shared."""
    mesh = current()
    with ExitStack() as stack:
        mesh.first(lambda: stack.enter_context(new_folder(target)))
        yield hidden(target)
        mesh.first(stack.close)


def write_distributed(tensors: dict[str, Tensor], dir: Path) -> None:
    """Write every rank's parts of `tensors` to `dir`; of what is on several ranks, one writes. All ranks call this; what fails on one is raised on
    all, as OSError."""
    import torch.distributed.checkpoint as dcp  # a second or more to import
    from torch.distributed.checkpoint.api import CheckpointException

    mesh = current()
    try:
        # A group of its own kind: a slow disk is waited for longer than a collective of the training, but not for ever.
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(dir), planner=dcp.DefaultSavePlanner(flatten_state_dict=False), process_group=mesh.disk_group)
    except CheckpointException as e:
        rank, (error, _) = next(iter(e.failures.items()))
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"rank {rank} cannot write its part ({' '.join(str(error).split())})", str(dir)) from None


def build(make: Callable[[], Llama], fill: Callable[[Llama], object], mesh: Mesh, *, bf16: bool = False, compile: bool = False,
          split_logits: bool = True) -> Llama:  # fmt: skip
    """`shard.build`: a model that is split over `mesh` before `fill` gives it weights. In a job of one it is made and filled, and options are the
    trainer's business."""
    if mesh.world == 1:
        model = make()
        fill(model)
        return model
    from minillama.parallel import shard  # a second to import

    compile = compile and mesh.device_mesh.device_type != "cpu"
    return shard.build(make, fill, mesh, bf16=bf16, compile=compile, split_logits=split_logits)


def copy_weights(source: Llama | Stored, target: Llama) -> None:
    """The weights of a model, or of a checkpoint that is only opened (`checkpoint.opened`), to the tensors of the same name."""
    weights, own = source.state_dict(), target.state_dict()
    weights = weights if isinstance(weights, Tensors) else Tensors({n: tuple(t.shape) for n, t in weights.items()}, weights.__getitem__)
    weights.fill({name: own[name] for name in weights})


def load_sharded(
    path: str | os.PathLike, mesh: Mesh, *, bf16: bool = False, compile: bool = False, split_logits: bool = True
) -> tuple[Llama, Tokenizer | None]:
    """`checkpoint.load` for a job: the model and tokenizer of a folder of any kind, split over `mesh` before it has weights, in fp32 and eval mode. No
    rank holds more than one whole tensor. Options as for `shard.parallelize`; raises as `checkpoint.load`, on every rank."""
    from minillama import checkpoint
    from minillama.model import Llama

    if mesh.world == 1:
        return checkpoint.load(path)
    stored = checkpoint.opened(path)
    model = build(lambda: Llama(stored.config), lambda m: copy_weights(stored, m), mesh, bf16=bf16, compile=compile, split_logits=split_logits)
    return model.eval(), stored.tokenizer


def load_sampler(path: str | os.PathLike, mesh: Mesh, device: torch.device, bf16: bool = False) -> tuple[Llama, Tokenizer | None]:
    """A model to generate with, in eval mode: in a job of several ranks gathered over the data ranks and split over the tensor ranks only."""
    model, tokenizer = load_sharded(path, mesh, bf16=bf16)
    if mesh.world == 1:
        return model.to(device).eval(), tokenizer
    from minillama.parallel.shard import gathered

    return gathered(model, mesh), tokenizer
