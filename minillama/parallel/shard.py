"""Split a Llama over the ranks of a mesh, from outside: the model of model.py is not touched.

    model = parallelize(Llama(config), mesh.start(ParallelConfig(shard=8, tensor=2)))

The order matters: tensor parallelism splits the matrices, activation checkpointing wraps the blocks, torch.compile compiles each, and FSDP2 shards
what is left over the data ranks, block by block. All of it is PyTorch's own (DTensor, fully_shard); what is said here is which matrix is split how.

Shapes: B batch, T time, D dim, V vocabulary, t tensor ranks.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from minillama.model import Llama
from minillama.parallel.mesh import Mesh

HEADS = ("score", "wanted", "match")  # of a reward model: small, and the same on every tensor rank


class Replicated(ParallelStyle):
    """A module that every tensor rank computes whole, on whole inputs."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def inward(_, args, __):
            return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in args)

        return distribute_module(module, mesh, input_fn=inward, output_fn=lambda _, out, __: out.to_local())


def tensor_parallel(model: Llama, mesh: DeviceMesh, *, sequence: bool = True, split_logits: bool = True) -> None:
    """Split every matrix of `model` over `mesh`, in place: wq, wk, wv, w1, w3 and the output by columns, wo, w2 and the embeddings by rows.

    With `sequence` the residual stream and the norms are split over time, [B,T/t,D] a rank: an all-gather before each pair of matrices and a
    reduce-scatter behind it, instead of one all-reduce of as many bytes; a T that t does not divide is padded. Without it the stream is whole on every
    rank, for generation, where T is 1. `split_logits` leaves the logits as a DTensor split over V, for a loss that is computed where they lie
    (`Mesh.loss_parallel`); else every rank gets all of them. Scores of a reward model are whole on every rank.
    """
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "output": ColwiseParallel(output_layouts=Shard(-1) if split_logits else Replicate(), use_local_output=not split_logits),
    }
    for i in range(len(model.layers)):
        block = {
            "attention": PrepareModuleInput(input_layouts=(stream, None, None, None, None), desired_input_layouts=(Replicate(), None, None, None, None)),
            "feed_forward": PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate()),
            **{f"attention.{w}": ColwiseParallel() for w in ("wq", "wk", "wv")},
            **{f"feed_forward.{w}": ColwiseParallel() for w in ("w1", "w3")},
            **{w: RowwiseParallel(output_layouts=stream) for w in ("attention.wo", "feed_forward.w2")},
        }
        norms = {"attention_norm": SequenceParallel(use_local_output=True), "ffn_norm": SequenceParallel(use_local_output=True)}
        plan |= {f"layers.{i}.{name}": style for name, style in (block | (norms if sequence else {})).items()}
    parallelize_module(model, mesh, plan)
    parallelize_module(model, mesh, {name: Replicated() for name in HEADS if hasattr(model, name)})
    if sequence:
        parallelize_module(model, mesh, {"norm": SequenceParallel()})
        parallelize_module(model, mesh, {"norm": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())})
        model.features = _padded(model.features, mesh.size())


def _padded(features: Callable[..., Tensor], t: int) -> Callable[..., Tensor]:
    """`Llama.features` for any T: padded on the right until t divides it. Causal attention does not look there."""

    def padded(tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, cache=None) -> Tensor:
        if cache is not None:
            raise ValueError("a model that is split over time has no key-value cache; generate with shard.gathered(model)")
        T, more = tokens.shape[1], -tokens.shape[1] % t
        if more:
            tokens = F.pad(tokens, (0, more))
            if mask is not None:  # True: a query that may look nowhere would be NaN
                mask = F.pad(F.pad(mask, (0, more), value=False), (0, 0, 0, more), value=True)
            if positions is not None:
                positions = F.pad(positions, (0, more))
        out = features(tokens, mask=mask, positions=positions)
        return out[:, :T] if more else out

    return padded


def _checkpointed(block: nn.Module) -> None:
    """Keep only the block's input, and compute the block again in the backward pass."""
    forward = block.forward
    block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def parallelize(model: Llama, mesh: Mesh, *, bf16: bool = False, compile: bool = False, split_logits: bool = True) -> Llama:
    """Split `model` (on the meta device, or real and the same on every rank) over `mesh` by mesh.parallel, in place, unless it is; returns it.

    bf16: gather, compute and send activations in bf16; masters, gradients' sums and optimizer state stay fp32. Gradients are means over the data
    ranks: whoever wants the mean over tokens multiplies by `mesh.data_ranks` and divides by the global count.
    """
    if isinstance(model, FSDPModule):
        return model
    p, names = mesh.parallel, [n for n in ("features", "rewards", "values") if hasattr(model, n)]
    if mesh.tensor > 1:
        p.resolve(mesh.world, model.config)
        if getattr(model, "evidence", False):
            raise ValueError("a reward model with evidence is for models of a few million parameters: tensor must be 1")
        tensor_parallel(model, mesh.device_mesh["tensor"], split_logits=split_logits)
    for block in getattr(model, "layers", [model]):
        if p.activation_checkpointing == "full" and "forward" not in vars(block):  # once
            _checkpointed(block)
        if compile:
            block.compile()
    if mesh.world > 1:
        data = mesh.device_mesh["replicate", "shard"] if p.replicate > 1 else mesh.device_mesh["shard"]
        # Rotary angles must not be rounded to bf16, so inputs are not cast; behind the embedding everything is bf16 anyway.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
        for block in model.layers:
            fully_shard(block, mesh=data, mp_policy=policy, reshard_after_forward=p.reshard)
        fully_shard(model, mesh=data, mp_policy=policy)
        _gather_once(model, names)
    return model


def _gather_once(model: Llama, names: list[str]) -> None:
    """Let FSDP gather the root's weights at `names` too, as it does at forward, but not where one of them calls another: they would be freed behind
    the inner one, and gathered again for the backward pass."""
    inside: list[str] = []
    for name in ("forward", *names):
        plain = hooked = getattr(model, name)
        if name != "forward":
            register_fsdp_forward_method(model, name)
            hooked = getattr(model, name)

        def method(*args, plain=plain, hooked=hooked, name=name, **kwargs):
            if inside:
                return plain(*args, **kwargs)
            inside.append(name)
            try:
                return hooked(*args, **kwargs)
            finally:
                inside.pop()

        setattr(model, name, method)


class Filling(TorchFunctionMode):
    """Within it, and `implicit_replication`, split.copy_(whole) takes each rank's part, also where there are fewer rows than ranks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and isinstance(args[0], DTensor) and not isinstance(args[1], DTensor) and args[0].shape[0] < args[0].device_mesh.size():
            p = args[0]
            return p.to_local().copy_(distribute_tensor(args[1].to(p.dtype), p.device_mesh, p.placements, src_data_rank=None).to_local())
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], Llama], fill: Callable[[Llama], object], mesh: Mesh, **options) -> Llama:
    """A model that is split before it has weights: `make` builds it on the meta device, `fill` writes the weights, tensor by tensor, so that no
    rank ever holds more than one whole. In a job of one it is simply made and filled. Options as for `parallelize`."""
    if mesh.world == 1:
        model = make()
        fill(model)
        return model
    with torch.device("meta"):
        model = make()
    parallelize(model, mesh, **options).to_empty(device=mesh.device_mesh.device_type)
    model.reset_rope()
    with implicit_replication(), Filling():  # a plain tensor that is copied into a split one is the same on every rank
        fill(model)
    return model


@torch.no_grad()
def gathered(model: Llama, mesh: Mesh) -> Llama:
    """A copy of `model` to generate with, in the dtype it computes in: gathered over the data ranks once, block by block, and still split over the
    tensor ranks, without sequence parallelism. It has a key-value cache; the paper gathered once a sampling phase for the same reason (sec 3.2.3).
    Every rank must call this. In a job of one it is `model` itself.
    """
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        plain = Llama(model.config)
    if mesh.tensor > 1:
        tensor_parallel(plain, mesh.device_mesh["tensor"], sequence=False, split_logits=False)
    own = dict(plain.named_parameters())
    for prefix, part in [*((f"layers.{i}.", block) for i, block in enumerate(model.layers)), ("", model)]:
        part.unshard()
        for name, value in part.named_parameters():
            target = own.get(prefix + name)
            if target is None or (not prefix and name.startswith("layers.")):
                continue  # a reward model's heads; blocks had their turn
            local = (value.to_local() if isinstance(value, DTensor) else value).clone()
            if isinstance(target, DTensor):
                local = DTensor.from_local(local, target.device_mesh, target.placements, run_check=False)
            owner, _, leaf = (prefix + name).rpartition(".")
            setattr(plain.get_submodule(owner), leaf, nn.Parameter(local, requires_grad=False))
        part.reshard()
    plain.reset_rope()
    return plain.eval()
