"""The one training loop, for every stage that descends a loss: accumulate, clip, step, log, evaluate, save, resume.

    train(model, batches, next_token_loss, TrainConfig(...), "runs/x/pretrain")

It knows no loss: `loss_fn(model, batch) -> (sum, count)`. Sums are accumulated, and the gradient is divided once by the GLOBAL count of valid
tokens, over micro-batches and ranks, so neither splitting a batch nor adding ranks changes it. A mean of means would weigh a token
in a short answer more than one in a long answer.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from minillama import checkpoint
from minillama._files import Tensors
from minillama.config import TrainConfig
from minillama.parallel import mesh as parallel
from minillama.parallel.mesh import settle, whole
from minillama.parallel.plan import GPUS
from minillama.tokenizer import Tokenizer

LossFn = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM or Ctrl-C); the state is saved."""


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda, then mps, then cpu. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except Exception as e:
        raise ValueError(f"device {name!r} cannot be used here ({str(e).splitlines()[0]}); use auto, cpu, cuda or mps") from None
    return torch.device(name)


def learning_rate(step: int, c: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up to the peak, then a cosine that reaches min_lr_ratio * peak at the last step (sec 2.2)."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.steps - 1 - c.warmup_steps)
    return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model: nn.Module, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW (sec 2.2); weight decay on matrices, none on norm gains."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def accumulate(model: nn.Module, micro_batches: list[dict[str, Tensor]], loss_fn: LossFn, device: torch.device, bf16: bool = False) -> tuple[float, int]:
    """Leave in .grad the gradient of the mean loss per valid token of the global batch, over micro-batches and data ranks; return that mean and the
    token count.

    Raises ValueError if no token is valid.
    """
    mesh = parallel.current()
    total, count = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
    for batch in micro_batches:
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        with mesh.loss_parallel():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16 and mesh.world == 1):  # a sharded model casts by itself
                loss, n = loss_fn(model, batch)
            loss.backward()
        total += whole(loss.detach())
        count += n
    n = int(mesh.sum(count))
    total = float(mesh.sum(total))
    if n == 0:
        raise ValueError("a batch has no token to train on; check the data and the loss mask")
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(grads, n / mesh.data_ranks)  # a sharded model leaves the mean over the data ranks
    return total / n, n


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]], loss_fn: LossFn) -> float:
    """Loss per valid token in nats over `batches`, on the model's device. Data ranks share the batches; each goes through the model equally often."""
    device, mesh = next(model.parameters()).device, parallel.current()
    sums = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # loss, tokens
    for i in range(mesh.data_rank, -(-len(batches) // mesh.data_ranks) * mesh.data_ranks, mesh.data_ranks):
        with mesh.loss_parallel():
            loss, n = loss_fn(model, {k: v.to(device) for k, v in batches[min(i, len(batches) - 1)].items()})
        if i < len(batches):
            sums += torch.tensor([float(whole(loss)), float(n)], dtype=sums.dtype, device=sums.device)
    total, count = mesh.sum(sums).tolist()
    if not count:
        raise ValueError("the validation data has no token to score")
    return total / count


def with_validation(
    batches: list[dict[str, Tensor]] | None, loss_fn: LossFn, evaluate: Callable[[nn.Module], dict[str, float]] | None
) -> Callable[[nn.Module], dict[str, float]]:
    """What a stage measures while it trains: "val_loss" over `batches`, if there are any, and what `evaluate` adds."""

    def metrics(model: nn.Module) -> dict[str, float]:
        loss = {"val_loss": mean_loss(model, batches, loss_fn)} if batches else {}
        return {**loss, **(evaluate(model) if evaluate else {})}

    return metrics


def last_state(out: str | os.PathLike, resume: bool) -> tuple[int, Path, Tensors, dict] | None:
    """What `checkpoint.load_state` finds in a stage's folder, None if nothing. Raises ValueError if there is something and `resume` is false: a stage
    asks before it writes anything, so that a second run does not spoil the files of the first."""
    state = checkpoint.load_state(Path(out) / "checkpoint")
    if state and not resume:
        raise ValueError(f"{out} already holds a checkpoint of step {state[0]}; add --resume true to go on, or choose another folder")
    return state


def _compiled(loss_fn: LossFn) -> LossFn:
    """`loss_fn` compiled for a CPU; without a C++ compiler it stays as it is, with a warning."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("torch.compile needs a C++ compiler on a CPU and finds none: training goes on without", file=sys.stderr)
        return loss_fn
    return torch.compile(loss_fn)  # the whole step: on a CPU models are small, and embedding, mask and loss are a tenth of the time


class _Progress:
    """What a run says of itself: a bar in a terminal, or lines where there is none, and metrics.jsonl."""

    def __init__(self, metrics: Path, config: TrainConfig, start: int, label: str, speaks: bool, watch: Callable[[float], dict[str, float]]):
        self.metrics, self.c, self.start, self.label, self.speaks, self.watch = metrics, config, start, label, speaks, watch
        self.bar = tqdm(total=config.steps, initial=start, desc=label, unit="step", file=sys.stdout, dynamic_ncols=True, mininterval=1.0,
                        disable=None if speaks else True)  # fmt: skip
        self.began = self.window = time.monotonic()
        self.tokens, self.steps = 0, 0  # since `window`, for the rate

    def step(self, done: int, loss: float, norm: float, lr: float, n: int, tokens_seen: int) -> None:
        """Note a step of n tokens; every log_every steps, and at the end, say so."""
        c, now = self.c, time.monotonic()
        if not self.speaks:
            return
        self.tokens, self.steps = self.tokens + n, self.steps + 1
        self.bar.update()
        if done % c.log_every and done < c.steps:
            return
        seconds = max(1e-9, now - self.window)
        rate, watched = self.tokens / seconds, self.watch(seconds / self.steps)
        self.window, self.tokens, self.steps = now, 0, 0
        text = " ".join([f"loss {loss:.3f} norm {norm:.2f} lr {lr:.1e} {rate:,.0f} tok/s", *(f"{k} {v:.3g}" for k, v in watched.items())])
        self.bar.set_postfix_str(text)
        if self.bar.disable and (done % (10 * c.log_every) == 0 or done == c.steps):
            eta = (now - self.began) / (done - self.start) * (c.steps - done)
            print(f"{self.label} {done}/{c.steps} {text} ETA {eta:.0f} s", flush=True)
        append_metrics(self.metrics, {"step": done, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens_seen, "rows": done * c.batch_size,
                                      "tok_s": rate, **watched})  # fmt: skip

    def skipped(self, done: int, what: str) -> None:
        """Note a step that was not taken."""
        if self.speaks:
            self.bar.update()
            print(f"{self.label}: skipped {what}", file=sys.stderr, flush=True)
            append_metrics(self.metrics, {"step": done, "skipped": what})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count against the rate."""
        began = time.monotonic()
        yield
        self.window += time.monotonic() - began


def _watch(model: nn.Module, c: TrainConfig, device: torch.device, world: int) -> Callable[[float], dict[str, float]]:
    """What to note of a step of so many seconds in a job of several ranks or on a GPU: tok_s_rank, the tokens of rows of full length that a rank
    takes a second; on a GPU peak_gib, the most memory that this rank's tensors had, and, of a Llama on a known type, mfu = tok_s_rank *
    LlamaConfig.flops_per_token(seq_len) / the peak in bf16."""
    per_token = model.config.flops_per_token(c.seq_len) if hasattr(model, "config") else 0.0
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    peak = next((gpu.tflops * 1e12 for kind, gpu in GPUS.items() if kind.split("-")[0] in name), 0.0)

    def watch(seconds: float) -> dict[str, float]:
        rate = c.batch_size * c.seq_len / seconds / world
        watched = {"tok_s_rank": rate} if world > 1 or name else {}
        if name:
            watched["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return watched | ({"mfu": rate * per_token / peak} if peak and per_token else {})

    return watch


def train(
    model: nn.Module, batches: Callable[[int], list[dict[str, Tensor]]], loss_fn: LossFn, config: TrainConfig, out: str | os.PathLike,
    tokenizer: Tokenizer | None = None, evaluate: Callable[[nn.Module], dict[str, float]] | None = None, resume: bool = False, label: str = "train",
) -> nn.Module:  # fmt: skip
    """Train `model` in place and return it. Writes `out`/metrics.jsonl and `out`/checkpoint/.

    batches(step) gives the micro-batches of a step and must be a pure function of it: then a run that was killed and resumed ends with the
    weights of one that was not, bit for bit on the same machine. SIGTERM and Ctrl-C save and raise Interrupted. Raises ValueError if
    `out` has a checkpoint and `resume` is false, or for bf16 on a CPU; FloatingPointError for a step that config.bad_step does not forgive.

    In a job of several ranks the model is sharded as config.parallel says, if it is not yet, and `batches` gives this data rank's share.
    """
    c, out = config, Path(out)
    mesh = parallel.start(c.parallel, c.device, getattr(model, "config", None))
    device = pick_device(c.device)
    if c.bf16 and device.type == "cpu":
        raise ValueError("bf16 is much slower than fp32 on a CPU; leave bf16 off or use a GPU")
    state = last_state(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "checkpoint"
    compile_blocks = c.compile and device.type != "cpu"
    if mesh.world > 1 or compile_blocks or c.parallel.activation_checkpointing == "full":
        from minillama.parallel.shard import parallelize  # a second to import, and most runs are of one process

        parallelize(model, mesh, bf16=c.bf16, compile=compile_blocks)
    model.to(device).train()
    optimizer = make_optimizer(model, c)
    start, tokens_seen, average = 0, 0, 0.0
    if state:
        start, path, tensors, meta = state
        if start > c.steps:
            raise ValueError(f"{path} is at step {start}, past the {c.steps} asked for; raise train.steps")
        checkpoint.load_weights(model, path)
        restore_optimizer(optimizer, model, tensors)
        tokens_seen, average = meta["tokens"], meta.get("average", 0.0)
    metrics = out / "metrics.jsonl"
    if mesh.rank == 0:
        keep_metrics(metrics, start)
    compile_step = c.compile and device.type == "cpu" and mesh.world == 1
    if compile_step:
        loss_fn = _compiled(loss_fn)

    def save(step: int) -> None:
        tensors = optimizer_tensors(optimizer, model)
        checkpoint.save_state(folder, step, model, tensors, {"tokens": tokens_seen, "average": average}, tokenizer, keep=0)

    progress = _Progress(metrics, c, start, label, mesh.rank == 0, _watch(model, c, device, mesh.world))
    with stop_signals() as stop, progress.bar, _deterministic(compile_step):
        for step in range(start, c.steps):
            lr = learning_rate(step, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, n = accumulate(model, batches(step), loss_fn, device, c.bf16)
            norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)))
            tokens_seen, done = tokens_seen + n, step + 1
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite and not (c.spike and average and loss > c.spike * average):
                optimizer.step()
                average = 0.98 * average + 0.02 * loss if average else loss
                progress.step(done, loss, norm, lr, n, tokens_seen)
            else:
                what = f"step {step}: loss {loss}, gradient norm {norm}" + (f", a spike over the average {average:.4g}" if finite else "")
                if c.bad_step == "stop":
                    raise FloatingPointError(f"{what}; lower lr or look at the data of this step")
                progress.skipped(done, what)
            optimizer.zero_grad(set_to_none=True)
            if evaluate and (done == c.steps or c.eval_every and done % c.eval_every == 0):
                model.eval()
                with torch.compiler.set_stance("force_eager"), progress.paused():  # other shapes, and a cache: not worth compiling for
                    measured = evaluate(model)
                    settle(model)
                if mesh.rank == 0:
                    append_metrics(metrics, {"step": done, "tokens": tokens_seen, **{f"eval/{k}": v for k, v in measured.items()}})
                model.train()
            stopping = mesh.any(bool(stop))  # a signal may have reached one rank only
            if stopping or done == c.steps or c.save_every and done % c.save_every == 0:
                save(done)
            if stopping and done < c.steps:
                raise interrupted(stop[0] if stop else signal.SIGTERM, done, folder)
    return model.eval()


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """With `on`, torch's deterministic algorithms. The compiler for CPUs else adds up the embedding's gradient from all threads in the order in which they
    come, and no two runs are the same."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if on:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name: "exp_avg/layers.0.attention.wq.weight" and the like."""
    names = {p: n for n, p in model.named_parameters()}
    return {f"{key}/{names[p]}": v for p, s in optimizer.state.items() for key, v in s.items()}


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave, in whatever way the model is split now. Raises ValueError for a tensor that the model does not have."""
    by_name, targets = dict(model.named_parameters()), {}
    for key in tensors:
        kind, name = key.split("/", 1)
        if name not in by_name:
            raise ValueError(f"the checkpoint's optimizer state is of a tensor {name!r} that this model does not have")
        p = by_name[name]
        targets[key] = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
        optimizer.state[p][kind] = targets[key]
    tensors.fill(targets)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it, SIGTERM, SIGUSR1 (Slurm's warning before a job's time is up) and Ctrl-C are noted in the list that it gives, for a loop to save and
    stop at the end of its step."""
    stop: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    previous = {s: signal.signal(s, lambda n, _: stop.append(n)) for s in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)) if main}
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def interrupted(number: int, done: int, folder: Path) -> Interrupted:
    """What a loop raises once it has saved after a signal."""
    return Interrupted(f"stopped by {signal.Signals(number).name} after step {done}; saved in {folder}; go on with --resume true")


def append_metrics(path: Path, record: dict) -> None:
    """One more line of a metrics.jsonl."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def keep_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, written by a run that was killed after its last checkpoint, and a broken last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    path.write_text("".join(kept), encoding="utf-8")


def write_config(config: object, out: Path) -> None:
    """The stage's config.yaml, every field."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")
