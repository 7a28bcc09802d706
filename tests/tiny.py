"""Tiny models that several test files need."""
import json
from pathlib import Path

import numpy as np
import torch

from minillama import checkpoint
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.reward import RewardModel
from minillama.tokenizer import Tokenizer


def build(config: LlamaConfig, seed: int = 3, kind: type[Llama] = Llama) -> Llama:
    """A model whose every weight matters: norm weights away from 1, logits and values far from constant."""
    model = kind(config).init_weights(seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=rng) + 0.5)
            elif name == "output.weight":
                p.mul_(2.0)
    return model


def talker(config: LlamaConfig, seed: int, ends: float) -> Llama:
    """A model that ends an answer after about `ends` tokens: a feature that is always on, by which the output layer favours EOS."""
    model = Llama(config).init_weights(seed).eval()
    with torch.no_grad():
        model.tok_embeddings.weight[:, 0] = 1.0
        for block in model.layers:
            block.attention.wo.weight[0] = 0.0
            block.feed_forward.w2.weight[0] = 0.0
        tokens = torch.randint(3, config.vocab_size, (20, 30), generator=torch.Generator().manual_seed(0))
        states, logits = model.features(tokens), model(tokens)
        wanted = logits.logsumexp(-1) - np.log(ends - 1) - logits[..., 2]  # how much the logit of EOS must rise
        model.output.weight[2, 0] += (wanted / states[..., 0]).mean()
    return model


def save_reward(config: LlamaConfig, path: Path, seed: int, tokenizer: Tokenizer) -> str:
    """A reward model with random weights in a stage's folder; returns the folder."""
    model = RewardModel(config).init_weights(seed).eval()
    with torch.no_grad():
        model.score.bias.zero_()
    checkpoint.save_state(path / "checkpoint", 1, model, {}, {}, tokenizer)
    (path / "reward.json").write_text(json.dumps({"evidence": False}))
    return str(path)


def but(source: str, *changes: tuple[str, str]) -> str:
    """`source` with each (old, new) replaced; old must stand in it once."""
    for old, new in changes:
        assert source.count(old) == 1, (old, source.count(old))
        source = source.replace(old, new)
    return source
