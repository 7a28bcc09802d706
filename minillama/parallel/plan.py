"""Plan a run before it has a cluster: memory, traffic, time, energy and carbon, in closed form (sec 2.2, table 2).

    minillama plan llama2-70b --gpus 512 --gpu a100-80gb

Memory is the largest of a few moments of a step, each a sum of named parts, for rank 0; `dryrun` runs the step, and is what they are checked
against. Time is a mechanism with one set of constants: matmuls at a share of the peak, the rest at the speed of memory, tensor traffic waited for,
data traffic hidden behind computation as far as it goes. Standard library only.

Letters: n tokens of a micro-batch, D dim, H heads, K size of keys, F feed-forward hidden size, V vocabulary, L blocks; t tensor, s shard, r replicate
ranks. All sizes in bytes.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from minillama.config import LlamaConfig, ParallelConfig

GIB = 2**30
KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
STAGES = ("pretrain", "sft", "reward", "ppo")
NODE = 8  # GPUs of a node


@dataclass(frozen=True)
class GPU:
    """A type of GPU, by its data sheet."""

    tflops: float  # dense bf16 peak at `full` watts, 1e12/s
    gib: float  # memory that a process can have
    hbm: float  # speed of it, 1e9 B/s
    link: float  # to the other GPUs of the node, 1e9 B/s one way
    net: float  # to other nodes, 1e9 B/s
    watts: float  # power limit
    full: float  # the power limit that the peak is for


GPUS = {
    "a100-40gb": GPU(312, 39.4, 1555, 300, 25, 400, 400),
    "a100-80gb": GPU(312, 79.2, 2039, 300, 25, 400, 400),  # 200 Gb/s a GPU between nodes, as in both of the paper's clusters
    "h100-80gb": GPU(989, 79.1, 3350, 450, 50, 700, 700),
    "h100-96gb": GPU(989, 94.0, 2400, 450, 50, 500, 700),  # HBM2e and 500 W; its memory's speed is assumed
}
# The constants of the time model, the same for every GPU and every model.
MATMUL = 0.60  # share of the peak, beside what they wait for memory: the one that is fitted, the middle of what table 2's hours (stops and all) allow
ATTENTION = 0.45  # share of the peak of fused attention (assumed)
MEMORY = 0.80  # share of the data sheet's speed of memory (assumed)
LINK = 0.80  # share of the data sheet's speed of links and network (assumed)
HOP = 10e-6  # seconds that a node adds to a ring (assumed)
ROOM = 0.90  # share of a GPU's memory to fill: the rest is for its context, NCCL, workspaces and fragmentation (assumed)
KG_PER_KWH = 0.4235  # gives table 2's carbon from its hours and watts, in every row


def shapes(c: LlamaConfig, t: int = 1, scalar_head: bool = False) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, columns) of a block's parameters, and of the root's, on one of t tensor ranks. FSDP splits rows."""
    D, F, K, V = c.dim, c.ffn_dim, c.n_kv_heads * c.head_dim, c.vocab_size
    block = [(D // t, D), (K // t, D), (K // t, D), (D, D // t), (F // t, D), (D, F // t), (F // t, D), (D, 1), (D, 1)]
    return block, [(V // t, D), (D, 1), (V // t, D), *([(1, D), (1, 1)] if scalar_head else [])]


def padded(parts: list[tuple[int, int]], ranks: int) -> int:
    """Elements of parameters that are split over ranks as FSDP2 does: rows by torch.chunk, and every rank's part as large as the first."""
    return sum(ceil(rows / ranks) * ranks * columns for rows, columns in parts)


def moments(c: LlamaConfig, p: ParallelConfig, rows: int, T: int, accumulation: int = 1, scalar_head: bool = False) -> dict[str, dict[str, int]]:
    """Bytes by kind at the moments of a training step that can be its peak, on rank 0, for `rows` sequences of T tokens a micro-batch."""
    t, full = p.tensor, p.activation_checkpointing == "full"
    n, D, L = rows * ceil(T / t) * t, c.dim, c.n_layers
    parts, top = shapes(c, t, scalar_head)
    block, root = padded(parts, p.shard), padded(top, p.shard)
    trained = root - padded(top[2:3], p.shard) * scalar_head  # a reward model's output layer takes no gradient
    tensors = L * len(parts) + len(top)
    a = 2 * n * D  # a stream of all tokens in bf16
    x, q, k, h = a // t, a // t, 2 * n * c.n_kv_heads * c.head_dim // t, 2 * n * c.ffn_dim // t  # split: stream, queries, keys, hidden
    more = a if t > 1 else 0  # a gradient that was gathered beside its part
    rope = 4 * T * c.head_dim
    # Two norms (fp32 input, bf16 cast, rms) and gathered outputs; q, k, v, attention's output and sums, complex angles twice; w1, silu, w3, product.
    saved = 6 * x + 8 * n // t + 2 * a + 2 * q + 2 * k + 4 * n * c.n_heads // t + 2 * rope + 4 * h
    kept = x if full else saved
    w, square, narrow, vocab = (2 * D * m // t for m in (c.ffn_dim, D, c.n_kv_heads * c.head_dim, 0 if scalar_head else c.vocab_size))
    logits = 0 if scalar_head else n * c.vocab_size // t
    ahead = 2 * block if p.reshard and p.shard > 1 else 0  # the next block's weights, gathered
    own = 4 * block // p.shard  # a block's fp32 part
    all_grads = L * own + 4 * trained // p.shard
    still = {"parameters": L * own + 4 * root // p.shard, "optimizer": 2 * all_grads + 4 * tensors, "buffers": 4 * c.max_seq_len * c.head_dim + 8 * n}

    def at(activations: int, buffers: int, done: int, logits: int = 0, gradients: int | None = None) -> dict[str, int]:
        if gradients is None:  # of `done` blocks; after the first micro-batch of all, and beside them what copies of the model are still adding up
            gradients = done * own if accumulation == 1 else all_grads + done * own * (p.replicate > 1)
        return {**still, "gradients": gradients, "activations": activations, "logits": logits, "buffers": still["buffers"] + buffers}

    forward = 0 if p.reshard else 2 * L * block
    found = {
        # log-softmax, its gradient in and out, in fp32; split over tensor ranks PyTorch needs one more
        "loss": at(L * kept + 3 * x + 4 * n // t + a, 2 * root + forward, 0, (12 if t == 1 else 16) * logits),
        "output layer": at(L * kept + 3 * x + 2 * a, 2 * root + forward + ahead + vocab, 0, 2 * logits),
        "optimizer": at(0, 0, L, 0, all_grads),
    }
    for i in {L - 1, max(L - 2, 0), min(1, L - 1), 0}:  # backward through block i: its weights, the next ones', gradients of the last one on their way
        acts = i * kept + saved + x + (x if full else 0)
        buffers = 2 * root + vocab + (2 * block if p.reshard else 2 * (i + 1) * block) + (ahead if i else 0) + (4 * block if i < L - 1 else 0)
        steps = (
            ("feed-forward", max(2 * h, h + more), w), ("silu", a - h, 2 * w), ("feed-forward input", 2 * a - 3 * h, 3 * w),
            ("feed-forward norm", 9 * x - 4 * h - a, 3 * w), ("attention", max(2 * q + 2 * k, more + q) - 4 * h - a - 3 * x, 3 * w + square),
            ("attention norm", max(2 * a, 8 * x - a) - 4 * h - a - 3 * x - q - 2 * k - 2 * rope, 3 * w + 2 * square + 2 * narrow),
        )  # fmt: skip
        found |= {f"{name} of block {i}, backward": at(acts + da, buffers + db, L - 1 - i) for name, da, db in steps}
    sent = 2 * root + vocab + ahead * (L > 1) + (0 if p.reshard else 2 * (L - 1) * block)
    found["first gradients sent"] = at((L - 1) * kept + x, sent + 4 * block + max(2 * block, own), 0)  # fp32 copies beside the bf16 ones or their sums
    embedding = vocab if t == 1 else 2 * c.vocab_size * D + max(a, vocab)  # split, PyTorch makes the whole table's gradient first
    found["embeddings, backward"] = at(x if t == 1 else 0, 2 * root + vocab + 4 * block + embedding, L)
    grads = all_grads if accumulation > 1 else L * own  # the sums so far, and beside them those of this micro-batch that copies of the model add up
    grads += L * own * (accumulation > 1 < p.replicate)
    table, mine = 2 * c.vocab_size * D // t * (p.shard > 1), 4 * trained // p.shard  # the embeddings' bf16 gradient goes last, after the sums are laid out
    rest = (2 * trained, 0) if 2 * trained > table + mine else (table, mine)
    found["last gradients sent"] = at(0, 4 * trained + rest[0], L, 0, grads + rest[1])
    return found


def memory(c: LlamaConfig, p: ParallelConfig, rows: int, T: int, accumulation: int = 1, stage: str = "pretrain") -> tuple[str, dict[str, int]]:
    """The peak of a step: the moment's name, and bytes by kind.

    PPO holds four models of one size, all in fp32 masters: policy and critic train, reference and reward model only score.
    """
    add = lambda *parts: {kind: sum(x.get(kind, 0) for x in parts) for kind in KINDS}  # noqa: E731
    found = moments(c, p, rows, T, accumulation, stage == "reward")
    if stage == "ppo":
        critic, done = moments(c, p, rows, T, accumulation, True), found["optimizer"]
        idle = critic["optimizer"]
        frozen = {"parameters": 2 * idle["parameters"]}
        graph = {k: critic["loss"][k] - (idle[k] if k == "buffers" else 0) for k in ("activations", "buffers")}  # the critic's forward pass is done too
        state = {k: idle[k] for k in ("parameters", "optimizer", "buffers")}
        parts, top = shapes(c, p.tensor)
        copy = {"buffers": 2 * (c.n_layers * padded(parts, 1) + padded(top, 1)), "activations": rows * accumulation * T * c.kv_bytes_per_token() // p.tensor}
        rollout = add({**done, "gradients": 0}, state, frozen, copy)
        found = {f"policy: {name}": add(m, state, graph, frozen) for name, m in found.items()}
        found |= {f"critic: {name}": add(m, done, frozen) for name, m in critic.items()} | {"rollout": rollout}
    name = max(found, key=lambda m: sum(found[m].values()))
    return name, add(found[name])


def traffic(c: LlamaConfig, p: ParallelConfig, rows: int, T: int, accumulation: int = 1, stage: str = "pretrain") -> dict[tuple[str, str], list[int]]:
    """{(collective, mesh dimension): [count, bytes]} a rank and step: outputs of all-gathers, inputs of the others. Scalars are left out."""
    t, L, full, head = p.tensor, c.n_layers, p.activation_checkpointing == "full", stage == "reward"
    n = rows * ceil(T / t) * t
    parts, top = shapes(c, t, head)
    block, root = padded(parts, p.shard), padded(top, p.shard)
    reduced = L * block + root - (padded(top[2:3], p.shard) if head else 0)
    trains, scores = (2, 4) if stage == "ppo" else (1, 0)  # models; and one is gathered once more, for half of each row to be sampled
    passes = 2 if p.reshard else 1  # a block's weights are gathered for the forward and again for the backward pass; the root's stay
    sampled = T // 2 * (2 * L + 1) if stage == "ppo" else 0  # sums behind every pair of matrices and the embeddings, a new token each
    out = {}
    if p.shard > 1:
        times, once = (passes * trains + scores) * accumulation + (stage == "ppo"), (trains + scores) * accumulation + (stage == "ppo")
        out["all_gather", "shard"] = [times * L + once, 2 * (times * L * block + once * root)]
        out["reduce_scatter", "shard"] = [trains * accumulation * (L + 1), 4 * trains * accumulation * reduced]
    if p.replicate > 1:
        out["all_reduce", "replicate"] = [trains * accumulation * (L + 1), 4 * trains * accumulation * reduced // p.shard]
    if t > 1:
        stream, ahead = 2 * n * c.dim, scores * (2 * L + 1)
        gathers = accumulation * (trains * ((6 if full else 4) * L + 2) + ahead)
        scatters = accumulation * (trains * ((5 if full else 4) * L + 1) + ahead)
        out["all_gather", "tensor"] = [gathers, gathers * stream]
        out["reduce_scatter", "tensor"] = [scatters, scatters * stream]
        sums = 0 if head else 3  # the loss: largest logit, sum of exponentials, the target's logit; beside the features' and the norms' gradients
        out["all_reduce", "tensor"] = [trains * accumulation * (2 * L + 2 + sums) + sampled,
            trains * accumulation * ((c.dim + 2 * sums) * 2 * rows * T + (2 * L + 1) * 2 * c.dim) + sampled * 2 * rows * accumulation * c.dim]  # fmt: skip
    return out


def seconds(c: LlamaConfig, g: GPU, p: ParallelConfig, rows: int, T: int, accumulation: int = 1, stage: str = "pretrain") -> dict[str, float]:
    """Seconds of a step by what they are spent on. PPO's step is an iteration: half of each row is sampled, four models score, two train."""
    t, n, D, F, K, L = p.tensor, rows * T, c.dim, c.ffn_dim, c.n_kv_heads * c.head_dim, c.n_layers
    peak, hbm = g.tflops * 1e12 * (g.watts / g.full) ** (1 / 3), MEMORY * g.hbm * 1e9  # power goes with the cube of the clock
    parts, top = shapes(c, t, stage == "reward")
    block, root = padded(parts, p.shard), padded(top, p.shard)

    def matmul(inner: float, outer: float) -> float:
        return 2 * n * inner * outer / (MATMUL * peak) + 2 * (n * inner + inner * outer + n * outer) / hbm

    def ring(size: float, ranks: int, stride: int) -> float:
        """A ring over `ranks` that lie `stride` apart. Those of one node share its network cards."""
        near = min(ranks, max(1, NODE // stride))
        speed = g.link if ranks == near and ranks * stride <= NODE else min(g.link, near * g.net)
        return 0.0 if ranks == 1 else size * (ranks - 1) / ranks / (LINK * speed * 1e9) + HOP * (ceil(ranks / near) - 1)

    mm = sum(matmul(*sides) for sides in ((D, D / t), (D, K / t), (D, K / t), (D / t, D), (D, F / t), (D, F / t), (F / t, D)))
    attention = 4 * n * D / t * (T + 1) / 2 / (ATTENTION * peak)
    other = n * (24 * D + 4 * K + 6 * F) / t / hbm  # norms, sums, rotation, gate: each read and written once, as compiled
    head = 0.0 if stage == "reward" else matmul(D, c.vocab_size / t)
    loss = 0.0 if stage == "reward" else 30 * n * c.vocab_size / t / hbm
    stream = ring(2 * n * D, t, 1)
    gather, scatter = ring(2 * block, p.shard, t), ring(4 * block, p.shard, t) + 2 * ring(4 * block / p.shard, p.replicate, t * p.shard)
    again = 1 if p.activation_checkpointing == "full" else 0
    forward = mm + attention + other + 4 * stream
    backward = 2 * mm + 2.5 * attention + 2 * other + 4 * stream + again * (mm + attention + other + 3 * stream)
    late = max(0.0, gather - forward)
    ends = ring(2 * root, p.shard, t) + gather
    train = {
        "matmul": L * (3 + again) * mm + 3 * head,
        "attention": L * (3.5 + again) * attention,
        "memory": L * (3 + again) * other + loss,
        "tensor traffic": (L * (8 + 3 * again) + 5) * stream,
        "data traffic": L * (late + max(0.0, scatter + p.reshard * gather - backward)) + ends + scatter + ring(4 * root, p.shard, t)
        + 2 * ring(4 * root / p.shard, p.replicate, t * p.shard),
    }  # fmt: skip
    models = 2 if stage == "ppo" else 1
    total = {name: accumulation * models * time for name, time in train.items()}
    total["optimizer"] = models * 50 * (L * block + root) / p.shard / hbm  # read and write masters, two moments, gradients; norm, clip, cast
    if stage == "ppo":
        score = {"matmul": L * mm + head, "attention": L * attention, "memory": L * other + loss, "tensor traffic": (4 * L + 2) * stream}
        for name, time in {**score, "data traffic": L * late + ends}.items():
            total[name] += 4 * accumulation * time
        weights = 2 * (L * padded(parts, 1) + padded(top, 1))
        total["sampling"] = T // 2 * (weights + rows * accumulation * c.kv_bytes_per_token() * 0.75 * T / t) / hbm + ring(weights, p.shard, t)
    return total


@dataclass
class Plan:
    """What a run on a mesh needs."""

    llama: LlamaConfig
    stage: str
    gpu: str
    gpus: int
    parallel: ParallelConfig
    seq_len: int
    batch: int  # sequences a step
    micro_batch: int  # sequences that a data rank takes at once
    accumulation: int  # micro-batches a step
    moment: str  # when the peak is
    memory: dict[str, int]
    traffic: dict[tuple[str, str], list[int]]
    seconds: dict[str, float]
    tokens: float
    watts: float

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak leaves room on the GPU."""
        return self.peak <= ROOM * GPUS[self.gpu].gib * GIB

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second and GPU."""
        return self.batch * self.seq_len / self.step_seconds / self.gpus

    @property
    def flops_per_token(self) -> float:
        """FLOPs that the model needs: 3 forward passes in training; in PPO 2 models train, 4 score and 1 samples half of each row."""
        return self.llama.flops_per_token(self.seq_len, training=False) * (10.5 if self.stage == "ppo" else 3)

    @property
    def mfu(self) -> float:
        """Model FLOPs over the GPUs' peak at full power; what is computed again does not count."""
        return self.flops_per_token * self.tokens_per_second / (GPUS[self.gpu].tflops * 1e12)

    @property
    def gpu_hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    @property
    def kwh(self) -> float:
        """Energy of the GPUs at their power limit."""
        return self.gpu_hours * self.watts / 1000

    @property
    def tco2e(self) -> float:
        """Tonnes of carbon, by the paper's table 2."""
        return self.kwh * KG_PER_KWH / 1000

    @property
    def binds(self) -> str:
        """memory if it does not fit, else what most of the time goes to: compute, or bandwidth of memory and links."""
        compute = self.seconds["matmul"] + self.seconds["attention"]
        return "memory" if not self.fits else "compute" if 2 * compute >= self.step_seconds else "bandwidth"

    @property
    def assumptions(self) -> list[str]:
        """What the numbers rest on."""
        g, run = GPUS[self.gpu], self.tokens != self.batch * self.seq_len
        return [
            f"{self.gpu}: {g.tflops:g} TFLOP/s dense bf16 at {g.full:g} W, {g.gib:g} GiB, memory {g.hbm:g}, links {g.link:g}, network {g.net:g} GB/s a GPU, "
            f"{NODE} GPUs a node",
            f"matmuls at {MATMUL:.0%} of the peak beside their memory traffic, attention at {ATTENTION:.0%}; clocks as the cube root of {self.watts:g} W",
            f"memory at {MEMORY:.0%}, links at {LINK:.0%} of their speed; {HOP * 1e6:g} us a hop between nodes; elementwise work fused by a compiler",
            "tensor traffic is waited for, data traffic hides behind computation; no failures, evaluations or checkpoints",
            f"bf16 compute and all-gathers, fp32 masters, AdamW and reduce-scatters; activation checkpointing {self.parallel.activation_checkpointing}",
            f"it fits if {ROOM:.0%} of the memory is enough; context, NCCL, workspaces and fragmentation are not counted"
            + ("; one GPU alone computes under autocast, which takes a tenth more or less" if self.gpus == 1 else ""),
            "MFU: 6 FLOPs a parameter that multiplies plus causal attention, nothing for what is computed again" if self.stage != "ppo" else
            "MFU: 2 FLOPs a parameter and causal attention, for 2 models that train, 4 that score and half of each row sampled",
            f"hours, energy and carbon are of {self.tokens:.3g} tokens{'' if run else ', one step'}; {KG_PER_KWH} kg CO2e a kWh at the GPU, as table 2",
        ]  # fmt: skip

    def to_json(self) -> dict:
        """Everything, in the units of the keys; `memory_gib` and `collectives` as `dryrun --json` has them."""
        p, collectives, gib = self.parallel, {}, {}
        for (kind, dim), (count, size) in sorted(self.traffic.items()):
            entry = collectives.setdefault(kind, {"count": 0, "bytes": 0, "by_dim": {}})
            entry["count"] += count
            entry["bytes"] += size
            entry["by_dim"][dim] = {"count": count, "bytes": size}
            gib[f"{kind}_{dim}"] = size / GIB
        return {"n_params": self.llama.n_params(), "stage": self.stage, "gpu": self.gpu, "gpus": self.gpus,
                "mesh": {"replicate": p.replicate, "shard": p.shard, "tensor": p.tensor}, "seq_len": self.seq_len, "batch": self.batch,
                "micro_batch": self.micro_batch, "accumulation": self.accumulation,
                "memory_gib": {"total": self.peak / GIB, **{k: v / GIB for k, v in self.memory.items()}}, "peak_at": self.moment, "fits": self.fits,
                "binds": self.binds, "traffic_gib": {"total": sum(gib.values()), **gib}, "collectives": collectives,
                "flops_per_token": self.flops_per_token, "step_seconds": self.step_seconds, "seconds": self.seconds, "mfu": self.mfu,
                "tokens_per_second_per_gpu": self.tokens_per_second, "tokens": self.tokens, "gpu_hours": self.gpu_hours, "watts": self.watts,
                "kwh": self.kwh, "tco2e": self.tco2e, "assumptions": self.assumptions}  # fmt: skip

    def __str__(self) -> str:
        p, g, brief = self.parallel, GPUS[self.gpu], lambda x: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
        row = "  {:<26}{:>10.2f} GiB".format
        lines = [
            f"{self.llama.n_params():,} parameters, {self.stage} on {self.gpus} {self.gpu}: replicate {p.replicate} x shard {p.shard} x tensor {p.tensor}",
            f"  a step: {self.batch} sequences of {self.seq_len} tokens, {self.micro_batch} at once, {self.accumulation} time(s) a data rank",
            f"  {'fits' if self.fits else 'DOES NOT FIT'} in {g.gib:g} GiB; {self.binds} binds; the peak is at: {self.moment}",
            row("memory of a rank", self.peak / GIB), *(row(f"  {k}", v / GIB) for k, v in self.memory.items()),
            *(f"{row(f'{kind}, {dim}', size / GIB)} a step in {count:,}" for (kind, dim), (count, size) in sorted(self.traffic.items())),
            f"  {'time of a step':<26}{self.step_seconds:>10.2f} s", *(f"    {k:<24}{v:>10.2f} s" for k, v in self.seconds.items()),
            f"  {self.tokens_per_second:,.0f} tokens a second and GPU, MFU {self.mfu:.1%}",
            f"  {self.tokens:.3g} tokens: {brief(self.gpu_hours)} GPU-hours, {brief(self.gpu_hours / self.gpus / 24)} days, {brief(self.kwh)} kWh, "
            f"{brief(self.tco2e)} t CO2e",
            "assumed:", *(f"  {x}" for x in self.assumptions),
        ]  # fmt: skip
        return "\n".join(lines)


def plan(
    llama: LlamaConfig, gpus: int, gpu: str = "a100-80gb", *, tensor: int | None = None, replicate: int | None = None, shard: int | None = None,
    checkpointing: str = "full", reshard: bool = True, seq_len: int | None = None, batch: int | None = None, micro_batch: int | None = None,
    tokens: float | None = None, stage: str = "pretrain", watts: float | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run. batch: sequences a step over all ranks; none given is one micro-batch a data rank (of 1 sequence). tokens: of the whole run;
    none given is 2e12 in pretraining, else one step's. watts: power limit of a GPU.

    With no degree given it proposes a mesh: of those that fit, the simplest within 5% of the fastest. With some, the others are as ParallelConfig's, but
    a tensor degree that is left out grows until no data rank lacks a sequence. Raises ValueError where a request cannot be met.
    """
    T = seq_len or llama.max_seq_len
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; there are {', '.join(GPUS)}")
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; there are {', '.join(STAGES)}")
    for name, value in (("gpus", gpus), ("seq_len", T), ("batch", batch), ("micro_batch", micro_batch), ("tokens", tokens), ("watts", watts)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")
    if T > llama.max_seq_len:
        raise ValueError(f"seq_len {T} is more than the model's {llama.max_seq_len}")
    g = GPUS[gpu]
    if watts and watts > g.full:
        raise ValueError(f"{watts:g} W is more than the {g.full:g} W that {gpu} is made for")
    g = GPU(**{**g.__dict__, "watts": watts or g.watts})
    free = tensor is None and replicate is None and shard is None
    degrees = [tensor] if tensor is not None else [d for d in range(1, min(gpus, NODE) + 1) if gpus % d == 0]
    found, problem = [], None
    for t in degrees:
        try:
            copies = [d for d in range(1, gpus // t + 1) if gpus // t % d == 0] if free else [replicate or 1]
            options = [ParallelConfig(r, shard or 0, t, checkpointing, reshard).resolve(gpus, llama) for r in copies]
        except ValueError as e:
            if tensor is not None:
                raise
            problem = problem or e
            continue
        for p in options:
            ranks = p.replicate * p.shard
            if batch and batch < ranks:
                problem = ValueError(f"a batch of {batch} sequences is less than the {ranks} data ranks that tensor {t} leaves of {gpus}; "
                                     "raise the batch or the tensor degree")  # fmt: skip
                continue
            share = ceil(batch / ranks) if batch else micro_batch or 1
            if micro_batch and micro_batch > share:
                raise ValueError(f"micro_batch {micro_batch} is more than the {share} of {batch} sequences that each of {ranks} data ranks gets")
            for rows in [micro_batch] if micro_batch else [d for d in range(1, share + 1) if share % d == 0]:
                times = ceil(share / rows)
                moment, peak = memory(llama, p, rows, T, times, stage)
                found.append(Plan(llama, stage, gpu, gpus, p, T, batch or share * ranks, rows, times, moment, peak, traffic(llama, p, rows, T, times, stage),
                                  seconds(llama, g, p, rows, T, times, stage), 0, g.watts))  # fmt: skip
        if found and tensor is None and not free:
            break  # the least degree that does
    if not found:
        raise problem
    fitting = [x for x in found if x.fits] or [min(found, key=lambda x: x.peak)]
    best = max(x.tokens_per_second for x in fitting)
    chosen = min((x for x in fitting if x.tokens_per_second >= 0.95 * best), key=lambda x: (x.parallel.tensor, x.parallel.replicate, x.accumulation))
    chosen.tokens = tokens or (2e12 if stage == "pretrain" else chosen.batch * T)
    return chosen


def plot(p: Plan, path: str) -> None:
    """Draw memory by kind against the number of ranks, from 1/16 to 16 times the plan's, the tensor and replicate degrees and rows a rank as they are."""
    from matplotlib.figure import Figure

    m, shards = p.parallel, []
    for k in range(-4, 5):
        if (shard := round(m.shard * 2**k)) and shard == m.shard * 2**k:
            shards.append(shard)
    rows = [memory(p.llama, replace(m, shard=s), p.micro_batch, p.seq_len, p.accumulation, p.stage)[1] for s in shards]
    ranks = [m.replicate * s * m.tensor for s in shards]
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.stackplot(ranks, [[r[kind] / GIB for r in rows] for kind in KINDS], labels=KINDS)
    axes.axhline(GPUS[p.gpu].gib, color="black", linestyle="--", label=p.gpu)
    need = [n for n, r in zip(ranks, rows, strict=True) if sum(r.values()) <= ROOM * GPUS[p.gpu].gib * GIB]
    title = f"fits {p.gpu} from {need[0]:,} ranks" if need else f"does not fit {p.gpu} at any of these"
    axes.set(xscale="log", xlabel="ranks", ylabel="GiB a rank at the peak", title=f"{p.llama.n_params() / 1e9:.1f}B, {p.stage}: {title}")
    axes.set_xticks(ranks, [f"{n:,}" for n in ranks], minor=False)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
