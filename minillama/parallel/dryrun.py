"""Rehearse a training step of any number of ranks in one process, without the memory, the GPUs or the network (sec 2.2, at the paper's size).

    minillama dryrun llama2-70b --gpus 512 --tensor 8

It is the real model, `parallelize` and `accumulate`, on PyTorch's fake process group (collectives that return at once) and fake tensors (shapes
without data). A meter sees every operation and keeps the books: bytes alive by kind, and what every collective moves. All private parts of
PyTorch that minillama leans on are in this file. Not seen: a GPU's context, NCCL's buffers, kernels' workspaces, fragmentation.
"""
from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillama.config import LlamaConfig, ParallelConfig, TrainConfig
from minillama.model import Llama, next_token_loss
from minillama.parallel import mesh as meshes
from minillama.parallel.plan import KINDS
from minillama.parallel.shard import parallelize
from minillama.trainer import accumulate, make_optimizer

# A collective's name without namespace and overload -> its kind, and the argument whose bytes count; None is the result. Outputs of all-gathers, else inputs.
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0), "all_gather_into_tensor": ("all_gather", None), "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0), "allreduce_": ("all_reduce", 0), "all_reduce": ("all_reduce", 0), "all_reduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0), "all_to_all_single": ("all_to_all", 0), "shard_dim_alltoall": ("all_to_all", 0),
}  # fmt: skip


def _tensors(x) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for t in tree_leaves(x) if isinstance(t, Tensor)] if isinstance(x, (tuple, list)) else []


class Meter(TorchDispatchMode):
    """Counts, within it, the bytes of all live storages by kind, those at the peak, and collectives: {(kind, group): [count, bytes]}.

    `vocab`: sizes of a last dimension that make a new tensor logits; else one dimension makes it a buffer, more an activation. `groups`: names of
    process groups, for people. What exists before is counted from `mark` on. FSDP frees and refills gathered weights by resizing their storage,
    which no mode sees: resize_ is patched within. Under fake tensors, a number that is asked for reads 1.
    """

    def __init__(self, vocab: Iterable[int] = (), groups: dict[str, str] | None = None):
        super().__init__()
        self.vocab, self.groups, self.live, self.clock = frozenset(vocab), groups or {}, {}, 0  # live: storage -> [bytes, kind, born, weak reference]
        self.now, self.total = dict.fromkeys(KINDS, 0), 0
        self.restart()

    def restart(self) -> None:
        """Forget the peak and the collectives so far."""
        self.peak, self.at_peak, self.peak_clock, self.collectives = self.total, dict(self.now), self.clock, {}

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these tensors' storages as `kind`, in the peak too if they were part of it."""
        for t in tensors:
            entry = self._see(t.to_local() if isinstance(t, DTensor) else t, kind)
            for books in (self.now, self.at_peak) if entry[2] <= self.peak_clock else (self.now,):
                books[entry[1]] -= entry[0]
                books[kind] += entry[0]
            entry[1] = kind

    def _see(self, t: Tensor, kind: str) -> list:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = [0, kind, self.clock, weakref.ref(storage, lambda _: self._grow(self.live.pop(key), 0))]
            self._grow(self.live[key], storage.nbytes())
        return self.live[key]

    def _grow(self, entry: list, size: int) -> None:
        self.now[entry[1]] += size - entry[0]
        self.total += size - entry[0]
        entry[0] = size
        if self.total > self.peak:
            self.peak, self.at_peak, self.peak_clock = self.total, dict(self.now), self.clock

    def __enter__(self) -> Meter:
        self.fake, self.resize = active_fake_mode(), torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self.resize(storage, size)
            if entry := self.live.get(storage._cdata):
                self._grow(entry, size)
            return storage

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # these come back as operations on local tensors
        name = func._schema.name.split("::")[1]
        if func.is_view or active_fake_mode() is not self.fake:  # the latter: DTensor asks for the shape of a global result, nothing is computed
            return func(*args, **kwargs or {})
        if self.fake and name == "_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else 1
        if self.fake and name == "wait_tensor":  # the fake one copies
            return args[0]
        self.clock += 1
        if name == "chunk_cat":  # FSDP copies whole gradients into what is reduced
            self.mark(args[0], "buffers")
        out = func(*args, **kwargs or {})
        for t in _tensors(out):
            self._see(t, "buffers" if t.dim() < 2 else "logits" if t.shape[-1] in self.vocab else "activations")
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._collective(func, name, args, out)
        if name == "_reduce_scatter_base_":
            self.mark([args[0]], "gradients")
        return out

    def _collective(self, func, name: str, args: tuple, out) -> None:
        group = next((a for a, s in zip(args, func._schema.arguments, strict=False) if s.name in ("process_group", "group_name")), None)
        if group is None or name == "barrier":
            return
        assert name in COLLECTIVES, f"the meter does not know the collective {func}"
        kind, which = COLLECTIVES[name]
        where = group if isinstance(group, str) else dist.ProcessGroup.unbox(group).group_name
        entry = self.collectives.setdefault((kind, self.groups.get(where, "world")), [0, 0])
        entry[0] += 1
        entry[1] += sum(t.nbytes for t in _tensors(out if which is None else args[which]))


@dataclass
class Rehearsal:
    """What a rank needs and moves in one training step."""

    parallel: ParallelConfig
    world: int
    rank: int
    memory: dict[str, int]  # bytes by kind at the peak
    resident: dict[str, int]  # and between two steps
    collectives: dict[tuple[str, str], list[int]]  # (kind, mesh dimension) -> [count, bytes]
    seconds: float  # that the rehearsal took

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def to_json(self) -> dict:
        """As `plan --json`: memory_gib, total and by kind; and collectives, count and bytes by kind, and of each by mesh dimension."""
        p, collectives = self.parallel, {}
        for (kind, dim), (count, size) in sorted(self.collectives.items()):
            entry = collectives.setdefault(kind, {"count": 0, "bytes": 0, "by_dim": {}})
            entry["count"] += count
            entry["bytes"] += size
            entry["by_dim"][dim] = {"count": count, "bytes": size}
        return {"gpus": self.world, "rank": self.rank, "mesh": {"replicate": p.replicate, "shard": p.shard, "tensor": p.tensor},
                "memory_gib": {"total": self.peak / 2**30, **{k: v / 2**30 for k, v in self.memory.items()}},
                "resident_gib": sum(self.resident.values()) / 2**30, "collectives": collectives, "seconds": round(self.seconds, 1)}  # fmt: skip

    def __str__(self) -> str:
        """The same for people."""
        p, row = self.parallel, "  {:<24}{:>10.2f} GiB".format
        lines = [f"rank {self.rank} of {self.world}: replicate {p.replicate} x shard {p.shard} x tensor {p.tensor}", row("peak", self.peak / 2**30)]
        lines += [row(f"  {k}", v / 2**30) for k, v in self.memory.items()] + [row("between steps", sum(self.resident.values()) / 2**30)]
        lines += [f"{row(f'{kind}, {dim}', size / 2**30)} in {count:,}" for (kind, dim), (count, size) in sorted(self.collectives.items())]
        return "\n".join([*lines, f"rehearsed in {self.seconds:.0f} s"])


@contextmanager
def _fake_job(world: int, rank: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks do not exist. Raises ValueError inside a real job."""
    if dist.is_initialized():
        raise ValueError(f"a rehearsal starts a job of its own, and this process is rank {dist.get_rank()} of {dist.get_world_size()} in one; run it outside")
    detect, other = _sharding_prop.detect_fake_mode, FakeTensorMode()
    _sharding_prop.detect_fake_mode = lambda *_: other  # shapes of whole tensors are worked out apart from ours, where the meter can tell
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        meshes.stop()
        _sharding_prop.detect_fake_mode = detect
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()  # what it remembers names this job's groups
        torch._C._clear_DTensor_sharding_propagator_cache()


def groups(mesh: meshes.Mesh) -> dict[str, str]:
    """The mesh's dimension by the name of its process group: replicate, shard, tensor, and those made of two of them."""
    root = mesh.device_mesh
    parts = {**root._flatten_mapping, **{d: root[d] for d in root.mesh_dim_names}} if root else {}
    return {part.get_group().group_name: dim for dim, part in parts.items()}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]], bf16: bool, meter: Meter) -> None:
    """A step as `trainer.train` takes it, on real or fake tensors; tells `meter` which tensors are gradients and optimizer state."""
    accumulate(model, batches, next_token_loss, torch.device("cpu"), bf16)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    meter.mark((p.grad for p in model.parameters()), "gradients")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meter.mark((t for state in optimizer.state.values() for t in state.values()), "optimizer")


def rehearse(
    llama: LlamaConfig, world: int, parallel: ParallelConfig, *, seq_len: int | None = None, micro_batch: int = 1, accumulation: int = 1, rank: int = 0,
    bf16: bool = True,
) -> Rehearsal:  # fmt: skip
    """Two training steps of rank `rank` of `world`; what is counted is the second's: the first, of one micro-batch, allocates the optimizer's state.

    seq_len: tokens a row (default llama.max_seq_len). micro_batch: rows a data rank takes at once, `accumulation` times a step. Raises ValueError if
    degrees, ranks and `llama` do not fit, or inside a torchrun job.
    """
    T = seq_len or llama.max_seq_len
    if T > llama.max_seq_len:
        raise ValueError(f"seq_len {T} is more than the model's {llama.max_seq_len}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of the {world} ranks 0 to {world - 1}")
    if micro_batch < 1 or accumulation < 1:
        raise ValueError(f"micro_batch {micro_batch} and accumulation {accumulation} must be at least 1")
    parallel.resolve(world, llama)
    began = time.monotonic()
    with _fake_job(world, rank):
        mesh = meshes._current = meshes.make(parallel, llama) if world > 1 else meshes.Mesh(parallel.resolve(1))
        with torch.device("meta"):
            model = Llama(llama)
        parallelize(model, mesh, bf16=bf16)  # outside the fake mode: a device mesh looks at real numbers
        meter = Meter({llama.vocab_size, llama.vocab_size // mesh.tensor}, groups(mesh))
        with FakeTensorMode(allow_non_fake_inputs=True), meter:
            model.to_empty(device="cpu").train()
            model.longest_in_blocks = 0  # it stands for a GPU, where attention is a fused kernel
            meter.mark(model.parameters(), "parameters")
            meter.mark(model.buffers(), "buffers")
            optimizer = make_optimizer(model, TrainConfig())
            tokens = torch.zeros(micro_batch, T, dtype=torch.int64)
            batches = [{"tokens": tokens, "targets": tokens} for _ in range(accumulation)]
            for micro_batches in (batches[:1], batches):
                meter.restart()
                step(model, optimizer, micro_batches, bf16, meter)
        return Rehearsal(mesh.parallel, world, rank, meter.at_peak, dict(meter.now), meter.collectives, time.monotonic() - began)
