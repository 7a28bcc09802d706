"""The ranks of a job as a mesh (replicate, shard, tensor).

    torchrun --nproc-per-node 8 -m minillama pretrain --train.parallel.tensor 2 ...

Data ranks, replicate * shard of them, each read their own rows; the tensor ranks of one data rank read the same. A process that torchrun did not start
is a mesh of one. Tensor ranks are neighbours, so that their traffic, which is waited for in every layer, stays inside a node.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minillama.config import LlamaConfig, ParallelConfig


@dataclass
class Mesh:
    """This process's place among the ranks. `device_mesh` has the dimensions replicate, shard and tensor; None in a job of one."""

    parallel: ParallelConfig
    device_mesh: DeviceMesh | None = None
    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data_ranks: int = 1
    data_group: dist.ProcessGroup | None = None
    disk_group: dist.ProcessGroup | None = None  # for waits while files are written
    patient_group: dist.ProcessGroup | None = None  # for waits that may take hours: one rank tokenises

    @property
    def tensor(self) -> int:
        """Number of tensor ranks."""
        return self.parallel.tensor

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the data ranks, on all of them, in place."""
        if self.data_ranks > 1:
            dist.all_reduce(x, group=self.data_group)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank of the job: what all must agree on before they act."""
        if self.world == 1:
            return flag
        device = "cpu" if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
        x = torch.tensor(int(flag), device=device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return bool(x)

    def share(self, n: int) -> slice:
        """This data rank's part of n things, next to each other; the parts differ by one at most."""
        return slice(n * self.data_rank // self.data_ranks, n * (self.data_rank + 1) // self.data_ranks)

    def gather(self, rows: list) -> list:
        """The data ranks' lists behind each other, in the order of the ranks, on all of them."""
        if self.data_ranks == 1:
            return rows
        parts: list = [None] * self.data_ranks
        dist.all_gather_object(parts, rows, group=self.data_group)
        return [row for part in parts for row in part]

    def first(self, work: Callable[[], object], hours: bool = False) -> None:
        """Do `work` on rank 0 only, the others wait for it, as for a write to disk or (`hours`) without end; what it raises is raised on every rank."""
        error = None
        if self.rank == 0:
            try:
                work()
            except Exception as e:
                if self.world == 1:
                    raise
                error = e
        error = self.told(error, hours)
        if error is not None:
            raise error

    def told(self, x: object, hours: bool = True) -> object:
        """What `x` is on rank 0, which may take its time to know it."""
        values = [x]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, group=self.patient_group if hours else self.disk_group)
        return values[0]

    def loss_parallel(self) -> AbstractContextManager:
        """Within it, a cross-entropy of logits that are split over the tensor ranks is computed where they lie; its backward pass belongs inside."""
        if self.tensor == 1:
            return nullcontext()
        from torch.distributed.tensor.parallel import loss_parallel

        return loss_parallel()


_current = Mesh(ParallelConfig(shard=1))


def current() -> Mesh:
    """The mesh of this process: that of the last `start`, else a mesh of one."""
    return _current


def make(parallel: ParallelConfig, llama: LlamaConfig | None = None, device: str = "cpu") -> Mesh:
    """The mesh over the process group that is running. Raises ValueError if degrees and ranks, or degrees and `llama`, do not fit."""
    world = dist.get_world_size()
    p = parallel.resolve(world, llama)
    mesh = init_device_mesh(device, (p.replicate, p.shard, p.tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    data = mesh["replicate", "shard"]._flatten("data")
    mesh["shard", "tensor"]._flatten("model")  # one all-reduce for a gradient norm, not two
    return Mesh(p, mesh, dist.get_rank(), world, data.get_local_rank(), data.size(), data.get_group())


def start(parallel: ParallelConfig, device: str = "auto", llama: LlamaConfig | None = None) -> Mesh:
    """Join the job that torchrun started and return its mesh; alone, a mesh of one. A second call must ask for the same degrees.

    GPUs talk by NCCL, CPUs by gloo. A collective that a rank never joins fails after parallel.timeout_minutes, one that waits for a file after three
    times that; rank 0 may tokenise as long as it takes. Raises ValueError if the degrees do not fit the number of ranks, or the heads of `llama`.
    """
    global _current
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = parallel.resolve(world, llama)  # a wrong request ends here, on every rank, before anyone waits for another
    if world == 1:
        _current = Mesh(wanted)
    elif not dist.is_initialized():
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=parallel.timeout_minutes))
        disk = dist.new_group(backend="gloo", timeout=timedelta(minutes=3 * parallel.timeout_minutes))
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        _current = replace(make(parallel, llama, "cuda" if gpu else "cpu"), disk_group=disk, patient_group=patient)
    else:
        have = _current.parallel
        if (wanted.replicate, wanted.shard, wanted.tensor) != (have.replicate, have.shard, have.tensor):
            raise ValueError(f"this job runs as replicate {have.replicate} x shard {have.shard} x tensor {have.tensor}, "
                             f"not {wanted.replicate} x {wanted.shard} x {wanted.tensor}")  # fmt: skip
        _current = replace(_current, parallel=wanted)
    return _current


def use(mesh: Mesh) -> None:
    """Make `mesh` the current one: another split of the same ranks."""
    global _current
    _current = mesh


def stop() -> None:
    """Leave the job: the process is a mesh of one again."""
    global _current
    if dist.is_initialized():
        dist.destroy_process_group()
    _current = Mesh(ParallelConfig(shard=1))


def absent(seconds: float = 5.0) -> list[int]:
    """The ranks that do not ask this within `seconds` of this one: after a collective that timed out, those that hang elsewhere. None before `start`."""
    if not dist.is_initialized():  # what timed out may be the way to the store itself
        return []
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # torchrun's; it needs no collective
    world = int(os.environ["WORLD_SIZE"])
    store.set(f"minillama/here/{os.environ['RANK']}", "")
    time.sleep(seconds)
    return [rank for rank in range(world) if not store.check([f"minillama/here/{rank}"])]


def settle(model: torch.nn.Module) -> None:
    """Put a sharded model back into shards after passes without a backward one: else its parameters are the gathered ones, to whoever looks."""
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()


def whole(x: Tensor) -> Tensor:
    """A plain tensor of x, which may be split over ranks; then all of them must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
