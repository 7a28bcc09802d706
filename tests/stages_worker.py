"""Every stage after another on the mesh that is asked for, for tests/test_parallel.py: alone, or as every rank of a torchrun job.

    torchrun --nproc-per-node 2 tests/stages_worker.py FOLDER TOKENIZER '{"tensor": 2}'
"""
import json
import sys
from pathlib import Path

import torch

from minillama import gatt, ppo, pretrain, rejection, reward, safety, sft
from minillama.config import GAttConfig, ParallelConfig, PPOConfig, PretrainConfig, RejectConfig, RewardConfig, SafetyConfig, SFTConfig, TrainConfig
from minillama.data.preferences import Pair
from minillama.parallel import mesh as parallel

TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 3) for i in range(80)]
MODEL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "max_seq_len": 96}


def turn(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def stages(out: Path, tokenizer: str, p: ParallelConfig) -> None:
    """All of them, in `out`."""

    def c(**more) -> TrainConfig:
        return TrainConfig(**{**dict(steps=8, batch_size=4, seq_len=64, lr=3e-3, warmup_steps=2, log_every=1, device="cpu", parallel=p), **more})

    at = lambda name: str(out / name)  # noqa: E731
    pretrain.run(PretrainConfig(tokenizer=tokenizer, out=at("pretrain"), preset="ci", model=MODEL, workers=1, train=c(steps=30)), TEXTS)
    dialogues = [[turn(f"Tell line {i}"), turn(TEXTS[i][:30], "assistant")] for i in range(40)]
    sft.run(SFTConfig(init=at("pretrain"), out=at("sft"), epochs=8, train=c()), dialogues)
    talks = [{"standing": f"Always say {i % 3}", "turns": [f"Tell line {i}", "And another"]} for i in range(12)]
    gatt.run(GAttConfig(policy=at("sft"), out=at("gatt"), max_new_tokens=8, train=c()), talks)
    pairs = [Pair([turn(f"Tell line {i}")], TEXTS[i][:24], TEXTS[i + 1][:9], i % 4, True, bool(i % 2), "helpful" if i % 3 else "safety") for i in range(30)]
    for kind in ("helpful", "safety"):
        weight = float(kind == "safety")
        reward.run(RewardConfig(init=at("gatt"), out=at(f"reward-{kind}"), kind=kind, safety_weight=weight, val_fraction=0.2, train=c()), pairs)
    models = dict(helpful=at("reward-helpful"), safety=at("reward-safety"))
    prompts = [{"messages": [turn(f"Tell line {i}")], "safety": i % 4 == 0} for i in range(14)]
    rejection.run(RejectConfig(policy=at("gatt"), init=at("pretrain"), out=at("reject"), samples=3, max_new_tokens=9, batch=8, train=c(), **models), prompts)
    ppo.run(PPOConfig(policy=at("reject"), out=at("ppo"), iterations=2, batch_size=8, minibatch=4, max_new_tokens=9, lr=1e-3, eval_every=1, val_fraction=0.2,
                      device="cpu", parallel=p, **models), prompts)  # fmt: skip
    safety.run(SafetyConfig(policy=at("ppo"), teacher=at("sft"), out=at("safety"), samples=2, max_new_tokens=9, epochs=3, train=c(), **models), prompts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stages(Path(sys.argv[1]), sys.argv[2], ParallelConfig(**json.loads(sys.argv[3])))
    parallel.stop()
