"""Generation against transformers' generate, greedy, same weights and prompts, batch 1 and 32, interleaved, medians of five.

    python benchmarks/generate_speed.py [--preset laptop | --model runs/laptop/sft] [--new 96] [--threads 2]

Beside them, in the same rounds, two products say what the machine gave at the time. A large one has its speed whenever both cores are there; a small one, of a
step's size, also needs what the cores hand to each other: on a virtual machine that takes half as long again in some minutes, and then decoding does too,
minillama's by more than transformers'. Where a row's text parts from transformers', the gap between the two tokens'
logits there is printed: rounding decides ties, nothing else may.
"""
import argparse
import tempfile

import torch
import transformers
from train_speed import interleaved

from minillama import checkpoint
from minillama.config import LlamaConfig
from minillama.generate import generate
from minillama.model import Llama


@torch.no_grad()
def gap(model: Llama, ours: list[int], start: int, theirs: list[int]) -> float:
    """Difference of the logits of the two tokens at the first place where the texts differ."""
    at = next(i for i in range(start, len(ours)) if ours[i] != theirs[i])
    logits = model(torch.tensor([ours[:at]]))[0, -1]
    return abs(float(logits[ours[at]] - logits[theirs[at]]))


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="laptop")
    p.add_argument("--model", default="", help="a checkpoint; without one, random weights of the preset")
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    model = checkpoint.load(a.model)[0].eval() if a.model else Llama(LlamaConfig.preset(a.preset)).init_weights().eval()
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(model, None, folder + "/hf")
        peer = transformers.LlamaForCausalLM.from_pretrained(folder + "/hf", attn_implementation="sdpa").eval()
    peer.generation_config.eos_token_id = None  # else min_new_tokens forbids it there and not here
    square, rows, weight, place = torch.randn(1024, 1024), torch.randn(32, 128), torch.randn(128, 352), torch.empty(32, 352)
    settings = transformers.GenerationConfig(max_new_tokens=a.new, do_sample=False, pad_token_id=0, eos_token_id=None)
    for B in (1, 32):
        x = torch.randint(3, config.vocab_size, (B, 24), generator=torch.Generator().manual_seed(B))
        prompts = x.tolist()
        runs = {
            "minillama": lambda prompts=prompts: generate(model, prompts, max_new_tokens=a.new, temperature=0.0),
            "transformers": lambda x=x: peer.generate(x, attention_mask=torch.ones_like(x), generation_config=settings)[:, 24:].tolist(),
            "large": lambda: [square @ square for _ in range(5)],
            "small": lambda: [torch.mm(rows, weight, out=place) for _ in range(1000)],
        }
        ours, theirs, *_ = (run() for run in runs.values())
        gaps = [gap(model, p + o, len(p), p + t) for p, o, t in zip(prompts, ours, theirs, strict=True) if o != t]
        t = interleaved(runs, 1)
        rates = ", ".join(f"{name} {B * a.new / t[name]:,.0f} tokens/s" for name in ("minillama", "transformers"))
        print(f"batch {B:>2}, {a.threads} threads: {rates}; {t['transformers'] / t['minillama']:.2f}x", end="; ")
        print(f"{B - len(gaps)} of {B} texts the same" + (f", the others part where two logits are within {max(gaps):.1e}" if gaps else ""), end="; ")
        print(f"products: 1,024 x 1,024 at {5 * 2 * 1024**3 / t['large'] / 1e9:.0f} GFLOP/s, 32 x 128 x 352 in {t['small'] * 1e3:.0f} us")


if __name__ == "__main__":
    main()
