"""The training loop: the gradient, the schedule, and what a killed run leaves."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import checkpoint, pretrain, sft
from minillama.config import LlamaConfig, PretrainConfig, SFTConfig, TrainConfig
from minillama.data.pack import Batches, Shards, write_shards
from minillama.model import Llama, next_token_loss
from minillama.tokenizer import Tokenizer
from minillama.trainer import accumulate, learning_rate, make_optimizer, train

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=330, multiple_of=8, max_seq_len=64)
TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 4) for i in range(120)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(TEXTS, 330, tmp_path_factory.mktemp("tok") / "t.model")


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    return Shards(write_shards(TEXTS, tokenizer.path, tmp_path_factory.mktemp("d") / "data", workers=1))


def gradient(batches, dtype=torch.float64):
    model = Llama(CONFIG).init_weights(1).to(dtype)
    loss, n = accumulate(model, batches, next_token_loss, CPU)
    return loss, n, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_gradient_does_not_depend_on_the_micro_batch(shards):
    """Guards against a mean of means: rows with few valid tokens would weigh too much as soon as micro-batches are ragged."""
    make = lambda m: Batches(shards, 8, 40, seed=2, micro_batch=m)(3)  # noqa: E731
    loss, n, grad = gradient(make(8), torch.float32)
    assert len({int((b["targets"] != -100).sum()) for b in make(1)}) > 1  # ragged, or the test shows nothing
    for m in (1, 2, 3):
        loss_m, n_m, grad_m = gradient(make(m), torch.float32)
        assert n_m == n and loss_m == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(grad_m, grad, rtol=0, atol=1e-6)
    assert grad.abs().max() > 1e-3


def test_the_gradient_is_that_of_the_mean_loss_per_token(shards):
    """Guards against a wrong divisor: compared with torch's own mean cross-entropy over the valid tokens."""
    batches = Batches(shards, 4, 40, seed=2)(0)
    _, _, grad = gradient(batches)
    model = Llama(CONFIG).init_weights(1).double()
    b = batches[0]
    from minillama.model import document_mask

    logits = model(b["tokens"], mask=document_mask(b["doc_ids"]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), b["targets"].flatten()).backward()
    torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-4, atol=1e-7)  # the loss is summed in fp32


def test_packed_documents_do_not_see_each_other(shards, tokenizer):
    """Guards against a mask that lets one document condition on its neighbour: the packed loss equals that of documents one by one."""
    model = Llama(CONFIG).init_weights(1).double()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(shards)):
        ids = torch.from_numpy(shards.document(i)[0])[None]
        total += next_token_loss(model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]})[0].detach()
    batches = Batches(shards, 1, 63)
    packed = sum(next_token_loss(model, b)[0].detach() for s in range(batches.n_rows) for b in batches(s))
    assert float(packed) == pytest.approx(float(total), rel=1e-6)  # the loss is summed in fp32


def test_the_schedule():
    """Guards against a warm-up off by one and a cosine that misses its end."""
    c = TrainConfig(steps=101, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    assert learning_rate(0, c) == pytest.approx(0.2) and learning_rate(9, c) == pytest.approx(2.0) and learning_rate(10, c) == pytest.approx(2.0)
    assert learning_rate(100, c) == pytest.approx(0.2) and learning_rate(55, c) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_weight_decay_spares_norms():
    """Guards against decaying gains, and checks the paper's betas and epsilon."""
    groups = make_optimizer(Llama(CONFIG), TrainConfig()).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-5
    assert all(p.dim() == 1 for p in groups[1]["params"]) and sum(len(g["params"]) for g in groups) == len(list(Llama(CONFIG).parameters()))


def weights(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(checkpoint.load_state(path / "checkpoint")[1] / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train_config(**more) -> TrainConfig:
    return TrainConfig(**{**dict(steps=14, batch_size=4, seq_len=48, lr=1e-2, warmup_steps=2, save_every=3, log_every=1, device="cpu"), **more})


@pytest.fixture(scope="module")
def stages(tokenizer, tmp_path_factory):
    """An uninterrupted pretraining and SFT, and the command lines' inputs to repeat them."""
    root = tmp_path_factory.mktemp("stages")
    (root / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": f"Tell line {i}"}, {"role": "assistant", "content": TEXTS[i][:30]}]} for i in range(60)]
    (root / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = {"dim": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 8, "max_seq_len": 64}
    pre = PretrainConfig(
        data=str(root / "text.txt"), tokenizer=str(tokenizer.path), out=str(root / "pre"), preset="ci", model=model, workers=1, train=train_config()
    )  # fmt: skip
    pretrain.run(pre)
    tune = SFTConfig(data=str(root / "chat.jsonl"), init=str(root / "pre"), out=str(root / "sft"), workers=1, epochs=6, train=train_config())
    sft.run(tune)
    return root, pre, tune


def test_replayed_text_stands_beside_the_dialogues(stages, tmp_path, monkeypatch):
    """Guards against text instead of dialogues, text of which only answers are trained, text held out for validation, and steps that follow from it."""
    root, pre, tune = stages
    seen = []
    real = sft.train
    monkeypatch.setattr(sft, "train", lambda model, batches, loss, c, *a, **k: seen.append((batches, c)) or real(model, batches, loss, c, *a, **k))
    replayed = sft.run(replace(tune, out=str(tmp_path / "r"), replay=str(root / "pre" / "data"), replay_share=0.5))
    plain = sft.run(replace(tune, out=str(tmp_path / "p")))
    (feed, c), (dialogues, usual) = seen
    kept, held = Shards(root / "pre" / "data").split(tune.val_fraction)
    usual_text, all_text = Batches(kept, 4, 48, tune.train.seed + 1), Batches(Shards(root / "pre" / "data"), 4, 48, tune.train.seed + 1)
    assert c.steps == usual.steps and held is not None
    for step in (0, 3):
        (chat, text), (alone,), (expected,), (wrong,) = feed(step), dialogues(step), usual_text(step), all_text(step)
        assert all(torch.equal(chat[k], alone[k]) for k in chat) and len(text["tokens"]) == len(chat["tokens"]) == 4
        assert all(torch.equal(text[k], expected[k]) for k in text) and not torch.equal(text["tokens"], wrong["tokens"])
        assert (chat["targets"] != -100).float().mean() < 0.6 < (text["targets"] != -100).float().mean()
    with torch.no_grad():
        loss = [float(sum(next_token_loss(m, b)[0] for s in range(3) for b in Batches(kept, 4, 48)(s))) for m in (replayed, plain)]
    assert loss[0] < 0.9 * loss[1]  # what it is for
    with pytest.raises(ValueError, match="is 0 rows of text"):
        sft.run(replace(tune, out=str(tmp_path / "a"), replay=str(root / "pre" / "data"), replay_share=0.05))
    with pytest.raises(ValueError, match="holds no tokenised data"):
        sft.run(replace(tune, out=str(tmp_path / "b"), replay=str(tmp_path)))
    with pytest.raises(ValueError, match="holds dialogues"):
        sft.run(replace(tune, out=str(tmp_path / "c"), replay=str(root / "sft" / "data")))
    with pytest.raises(ValueError, match="between 0 and 1"):
        SFTConfig(replay_share=1.0)


COMMON = ["--workers", "1", "--train.batch_size", "4", "--train.seq_len", "48", "--train.lr", "0.01", "--train.warmup_steps", "2",
          "--train.save_every", "3", "--train.log_every", "1", "--train.device", "cpu"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("kill_after", [1, 5])
def test_kill_9_and_resume_gives_the_uninterrupted_weights(stages, stage, kill_after, tmp_path):
    """Guards against a lost optimizer state, a shifted data position, or a half-written checkpoint: bit for bit."""
    root, pre, tune = stages
    out = tmp_path / "out"
    if stage == "pretrain":
        args = ["pretrain", "--data", pre.data, "--tokenizer", pre.tokenizer, "--preset", "ci", "--model", json.dumps(pre.model), "--train.steps", "14"]
    else:
        args = ["sft", "--data", tune.data, "--init", tune.init, "--epochs", "6"]
    command = [sys.executable, "-m", "minillama", *args, "--out", str(out), *COMMON]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "--resume", "true"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    reference = root / ("pre" if stage == "pretrain" else "sft")
    assert equal(weights(out), weights(reference))
    steps = [r["step"] for r in map(json.loads, metrics.read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, len(steps) + 1))


TWICE = """
import sys, torch
from minillama.config import LlamaConfig, TrainConfig
from minillama.model import Llama, next_token_loss
from minillama.trainer import train
torch.set_num_threads(2)
def run(folder):
    x = torch.randint(0, 8, (16, 128), generator=torch.Generator().manual_seed(1))  # eight tokens: both threads add to every row of the embedding
    model = Llama(LlamaConfig(dim=64, n_layers=1, n_heads=2, vocab_size=64, multiple_of=8, max_seq_len=128)).init_weights(0)
    batches = lambda step: [{"tokens": x, "targets": x.roll(-1, 1)}]
    train(model, batches, next_token_loss, TrainConfig(steps=20, lr=1e-2, warmup_steps=1, device="cpu", compile=True), folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])
a, b = run(sys.argv[1] + "/a"), run(sys.argv[1] + "/b")
assert torch.equal(a, b) and not torch.are_deterministic_algorithms_enabled()
"""


@pytest.mark.slow
def test_compiled_training_repeats_itself_on_two_threads(tmp_path):
    """Guards against sums whose order is left to the threads (the embedding's gradient, by the compiler's atomic additions): same seed, same weights."""
    done = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr


def test_sigterm_saves_and_exits(stages, tmp_path):
    """Guards against losing the steps since the last checkpoint on preemption: exit status 143, resumable."""
    _, pre, _ = stages
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minillama", "pretrain", "--data", pre.data, "--tokenizer", pre.tokenizer, "--preset", "ci", "--out", str(out),
               *COMMON, "--train.steps", "100000", "--train.save_every", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 2):
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143 and "saved" in err and len(err.strip().splitlines()) == 1
    step = checkpoint.load_state(out / "checkpoint")[0]
    assert step >= 3 and json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_finished_folder_is_not_overwritten(stages, tokenizer):
    """Guards against a second run that destroys the first."""
    _, pre, _ = stages
    before = weights(Path(pre.out))
    with pytest.raises(ValueError, match="--resume"):
        pretrain.run(pre)
    assert equal(before, weights(Path(pre.out)))


def test_a_full_disk_keeps_the_last_checkpoint(shards, tokenizer, tmp_path, monkeypatch):
    """Guards against replacing a good checkpoint by a broken one."""
    batches = Batches(shards, 4, 48)
    real = checkpoint.save_state
    calls = []

    def full(folder, step, *a, **k):
        calls.append(step)
        if step > 4:
            raise OSError(28, "No space left on device")
        return real(folder, step, *a, **k)

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(OSError):
        train(Llama(CONFIG).init_weights(), batches, next_token_loss, train_config(save_every=4), tmp_path, tokenizer)
    assert calls == [4, 8] and checkpoint.load_state(tmp_path / "checkpoint")[0] == 4


def test_bad_requests(shards, tmp_path):
    """Guards against bf16 on a CPU (a thousand times slower) and against divergence that goes on silently."""
    with pytest.raises(ValueError, match="bf16"):
        train(Llama(CONFIG).init_weights(), Batches(shards, 4, 48), next_token_loss, train_config(bf16=True), tmp_path)
    model = Llama(CONFIG).init_weights()
    with torch.no_grad():
        model.output.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, Batches(shards, 4, 48), next_token_loss, train_config(), tmp_path)
    masked = [{"tokens": torch.zeros(1, 4, dtype=torch.long), "targets": torch.full((1, 4), -100)}]
    with pytest.raises(ValueError, match="no token"):
        accumulate(Llama(CONFIG).init_weights(), masked, next_token_loss, CPU)


@pytest.mark.parametrize("factor, what", [(float("nan"), "loss nan"), (50.0, "a spike over the average")])
def test_a_bad_step_stops_or_is_skipped_as_configured(shards, tmp_path, capsys, factor, what):
    """Guards against a step on a broken gradient, a skip that nobody is told of, and optimizer state that a skipped step has touched."""
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        loss, n = next_token_loss(model, batch)
        return loss * (factor if len(calls) == 5 else 1.0), n

    def config(**more):
        return TrainConfig(steps=6, batch_size=4, seq_len=48, lr=1e-2, warmup_steps=1, log_every=1, device="cpu", spike=5.0, **more)

    batches = Batches(shards, 4, 48, seed=1)
    with pytest.raises(FloatingPointError, match=f"step 4: .*{what}"):
        train(Llama(CONFIG).init_weights(0), batches, loss_fn, config(), tmp_path / "stop")
    calls.clear()
    model = train(Llama(CONFIG).init_weights(0), batches, loss_fn, config(bad_step="skip"), tmp_path / "skip")
    records = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and what in records[4]["skipped"] and "loss" in records[5]
    assert f"skipped step 4: loss {'nan' if factor != factor else ''}" in capsys.readouterr().err

    # the same five steps by hand, without the fifth batch
    expected, c = Llama(CONFIG).init_weights(0), config()
    optimizer = make_optimizer(expected, c)
    for step in (0, 1, 2, 3, 5):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(step, c)
        accumulate(expected, batches(step), next_token_loss, CPU)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_what_is_watched_on_a_gpu(monkeypatch):
    """MFU against the 70B's figures: 322.9 tokens a second on an A100 are 44.3% of its peak, counting causal attention once."""
    from minillama.trainer import _watch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    with torch.device("meta"):
        model = torch.nn.Module()
    model.config = LlamaConfig.preset("llama2-70b")
    seconds = 4096 * 4096 / 512 / 322.9
    seen = _watch(model, TrainConfig(batch_size=4096, seq_len=4096), torch.device("cuda"), 512)(seconds)
    assert seen == {"tok_s_rank": pytest.approx(322.9), "peak_gib": 1.5, "mfu": pytest.approx(0.443, abs=5e-4)}
    assert _watch(model, TrainConfig(), CPU, 1)(1.0) == {}
