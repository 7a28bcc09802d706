"""Training step (forward, backward, AdamW) against transformers' LlamaForCausalLM: eager and compiled, interleaved, medians of five.

    python benchmarks/train_speed.py [--preset laptop] [--batch 16] [--seq 192] [--threads 2]

Rows hold several documents that do not see each other, as in pretraining; both models get the same mask. Compiled is the whole step of both, as the
trainer does it on a CPU. The last lines are attention alone, forward and backward: in blocks, and by PyTorch's kernel that is handed the mask.
"""
import argparse
import tempfile
import time
from statistics import median

import torch
import torch.nn.functional as F
import transformers

from minillama import checkpoint
from minillama.config import LlamaConfig
from minillama.model import Llama, attention_in_blocks, document_mask, next_token_loss


def interleaved(runs: dict, steps: int) -> dict[str, float]:
    """Seconds of one call of each of `runs`: in turn, `steps` calls at a time, the median of five."""
    for step in runs.values():  # compile and warm up
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, step in runs.items():
            began = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - began) / steps)
    return {name: median(v) for name, v in times.items()}


def attention_alone(config: LlamaConfig, batch: int, T: int, mask: torch.Tensor, steps: int) -> dict[str, float]:
    """Seconds of one layer's attention with its gradients, by "blocks" or "kernel", "eager" or "compiled". mask [B,1,T,T]."""
    B, H, K, Hd = batch, config.n_heads, config.n_kv_heads, config.head_dim
    q, k, v = (torch.randn(B, T, heads, Hd).transpose(1, 2).requires_grad_() for heads in (H, K, K))  # [B,heads,T,Hd], as Attention lays them out
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def kernel(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    runs = {}
    for name, attend, hides in (("blocks", attention_in_blocks, bias), ("kernel", kernel, mask)):
        for way, f in (("eager", attend), ("compiled", torch.compile(attend))):
            runs[f"{name} {way}"] = lambda f=f, hides=hides: torch.autograd.grad(f(q, k, v, hides).sum(), (q, k, v))
    return interleaved(runs, steps)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="laptop")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--seq", type=int, default=192)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=4, help="steps in one timing")
    p.add_argument("--profile", action="store_true", help="print where a step of ours spends its time, eager and compiled")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    config = LlamaConfig.preset(a.preset)
    x = torch.randint(0, config.vocab_size, (a.batch, a.seq + 1), generator=torch.Generator().manual_seed(0))
    doc_ids = (torch.arange(a.seq) // max(1, a.seq // 3)).expand(a.batch, a.seq).contiguous()
    batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous(), "doc_ids": doc_ids}

    def ours(compiled: bool):
        model = Llama(config).init_weights()
        loss = torch.compile(next_token_loss) if compiled else next_token_loss
        return step_of(model, lambda: loss(model, batch)[0] / batch["targets"].numel())

    def theirs(compiled: bool):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save_hf(Llama(config).init_weights(), None, folder + "/hf")
            model = transformers.LlamaForCausalLM.from_pretrained(folder + "/hf", attn_implementation="sdpa").train()

        def loss():
            logits = model(batch["tokens"], attention_mask=document_mask(batch["doc_ids"]), use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

        return step_of(model, torch.compile(loss) if compiled else loss)

    def step_of(model, loss):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    runs = {"minillama eager": ours(False), "transformers eager": theirs(False), "minillama compiled": ours(True), "transformers compiled": theirs(True)}
    t = interleaved(runs, a.steps)
    print(f"{a.preset}: {config.n_params():,} parameters, batch {a.batch} x {a.seq}, {a.threads} threads")
    for name, seconds in t.items():
        print(f"{name:<22} {seconds * 1e3:8.1f} ms a step  {a.batch * a.seq / seconds:10,.0f} tokens/s")
    print(f"eager against eager       {t['transformers eager'] / t['minillama eager']:.2f}x")
    print(f"compiled against compiled {t['transformers compiled'] / t['minillama compiled']:.2f}x")
    print(f"compiled against eager    {t['minillama eager'] / t['minillama compiled']:.2f}x")
    t = attention_alone(config, a.batch, a.seq, document_mask(doc_ids), 5 * a.steps)
    for way in ("eager", "compiled"):
        blocks, kernel = t[f"blocks {way}"], t[f"kernel {way}"]
        print(f"attention {way:<8} {blocks * 1e3:6.2f} ms in blocks, {kernel * 1e3:6.2f} ms by the kernel: {kernel / blocks:.2f}x")
    if a.profile:
        from torch.profiler import profile

        for name in ("minillama eager", "minillama compiled"):
            with profile() as prof:
                runs[name]()
            print(name, prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40), sep="\n")


if __name__ == "__main__":
    main()
