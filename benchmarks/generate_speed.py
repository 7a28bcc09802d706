"""Generation against transformers' generate, greedy, same weights and prompts, batch 1 and 32, interleaved, medians of five.

    python benchmarks/generate_speed.py [--preset laptop] [--new 96] [--threads 2]
"""
import argparse
import tempfile
import time
from statistics import median

import torch
import transformers

from minillama import checkpoint
from minillama.config import LlamaConfig
from minillama.generate import generate
from minillama.model import Llama


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="laptop")
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    config = LlamaConfig.preset(a.preset)
    model = Llama(config).init_weights().eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(model, None, folder + "/hf")
        peer = transformers.LlamaForCausalLM.from_pretrained(folder + "/hf", attn_implementation="sdpa").eval()
    settings = transformers.GenerationConfig(max_new_tokens=a.new, min_new_tokens=a.new, do_sample=False, pad_token_id=0, eos_token_id=None)
    for B in (1, 32):
        x = torch.randint(3, config.vocab_size, (B, 24), generator=torch.Generator().manual_seed(B))
        prompts = x.tolist()
        runs = {
            "minillama": lambda prompts=prompts: generate(model, prompts, max_new_tokens=a.new, temperature=0.0),
            "transformers": lambda x=x: peer.generate(x, attention_mask=torch.ones_like(x), generation_config=settings)[:, 24:].tolist(),
        }
        same = runs["minillama"]() == runs["transformers"]()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(5):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        t = {name: median(v) for name, v in times.items()}
        rates = ", ".join(f"{name} {B * a.new / s:,.0f} tokens/s" for name, s in t.items())
        print(f"batch {B:>2}, {a.threads} threads: {rates}; {t['transformers'] / t['minillama']:.2f}x; same text: {same}")


if __name__ == "__main__":
    main()
