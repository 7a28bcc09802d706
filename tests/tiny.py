"""Tiny models, and data ranks without processes, that several test files need."""
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from minillama import checkpoint
from minillama.config import LlamaConfig, ParallelConfig
from minillama.model import Llama
from minillama.parallel import mesh as parallel
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


class Asked(Exception):
    """Ends a run where the test has seen what it wanted."""


def sampler_precision(module, run: Callable[[bool], object]) -> dict[tuple[bool, int], bool]:
    """Whether `module.run` asks for a sampler in bf16, by (train.bf16, number of ranks); run(bf16) starts it."""
    asked = {}
    for bf16 in (False, True):
        for world in (1, 2):

            def ask(path, mesh, device, precision, key=(bf16, world)):
                asked[key] = precision
                raise Asked

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "load_sampler", ask)
                patch.setattr(module.parallel, "start", lambda *_, n=world: parallel.Mesh(ParallelConfig(shard=1), world=n))
                with pytest.raises(Asked):
                    run(bf16)
    return asked


def but(source: str, *changes: tuple[str, str]) -> str:
    """`source` with each (old, new) replaced; old must stand in it once."""
    for old, new in changes:
        assert source.count(old) == 1, (old, source.count(old))
        source = source.replace(old, new)
    return source


class Thread(parallel.Mesh):
    """A data rank that is a thread of this process; `board` is shared by all of them: a barrier, and a place for what each says."""

    def said(self, x: object) -> list:
        barrier, places = self.board
        places[self.data_rank] = x
        barrier.wait()
        everything = list(places)
        barrier.wait()
        return everything

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.said(x.clone())).sum(0))

    def gather(self, rows: list) -> list:
        return [row for part in self.said(rows) for row in part]


def on_ranks(n: int, work: Callable[[int], object]) -> list:
    """What work(rank) returns on each of n data ranks that run at once, as threads of this process: parallel.current() is each one's own mesh."""
    here, board = threading.local(), (threading.Barrier(n), [None] * n)

    def one(rank: int) -> object:
        here.mesh = Thread(ParallelConfig(shard=1), data_rank=rank, data_ranks=n)
        here.mesh.board = board
        try:
            return work(rank)
        except BaseException:
            board[0].abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(n) as pool:
        patch.setattr(parallel, "current", lambda: here.mesh)
        return list(pool.map(one, range(n)))
