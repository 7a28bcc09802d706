"""Supervised fine-tuning (sec 3.1): a base model learns to answer in the chat format.

    minillama sft --data instructions.jsonl --init runs/my/pretrain --out runs/my/sft

The objective is pretraining's with one change: user tokens are context and never targets. The end-of-sequence token after an
answer is a target: a model that is not taught it never stops. Dialogues are packed into full rows, as in the paper; unlike a plain
concatenation, packed dialogues do not see each other.

A small model forgets: it takes a name that no training question asks about for one that some do. With --replay it goes on reading its pretraining text
beside the dialogues (the paper does not; Ouyang et al. 2022 do so in RLHF).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from minillama.config import SFTConfig
from minillama.data import sources
from minillama.data.pack import Batches, Shards, tokenised, validation_batches
from minillama.data.world import from_spec
from minillama.model import Llama, next_token_loss
from minillama.parallel import mesh as parallel
from minillama.parallel.state import load_sharded
from minillama.tokenizer import Tokenizer
from minillama.trainer import last_state, train, with_validation, write_config


def dialogues(spec: str) -> Iterator[list[dict]]:
    """Dialogues of a data spec: "tinyworld[:scale[:seed]]", or anything `sources` reads as instructions; each a list of {"role", "content"}."""
    if world := from_spec(spec):
        yield from (e["messages"] for e in world.demonstrations())
    else:
        yield from (e["messages"] for e in sources.read(spec, kind="instruction"))


def run(config: SFTConfig, items: Iterable[list[dict]] | None = None, evaluate: Callable[[nn.Module], dict[str, float]] | None = None) -> Llama:
    """Fine-tune by `config`; `items` replaces config.data, `evaluate` adds metrics to the validation loss. Returns the model.

    Steps follow from config.epochs over the packed rows of dialogues. Raises ValueError for data without dialogues, a checkpoint without a tokenizer, a
    replay that is not a folder of tokenised text, or an output folder that holds a run already (without resume).
    """
    out = Path(config.out)
    mesh = parallel.start(config.train.parallel, config.train.device)
    last_state(out, config.resume)
    model, tokenizer = load_sharded(config.init, mesh, bf16=config.train.bf16, compile=config.train.compile)
    if config.tokenizer:
        tokenizer = Tokenizer(config.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{config.init} has no tokenizer.model; name one with --tokenizer")
    if config.train.seq_len > model.config.max_seq_len:
        raise ValueError(f"train.seq_len {config.train.seq_len} is more than the model's max_seq_len {model.config.max_seq_len}")
    items = dialogues(config.data) if items is None else items
    mesh.first(lambda: tokenised(items, config.val_fraction, tokenizer.path, out / "data", config.workers, config.resume), hours=True)
    shards, val = Shards(out / "data").split(config.val_fraction)
    c = config.train
    batches = Batches(shards, c.batch_size, c.seq_len, c.seed, c.micro_batch, mesh.data_rank, mesh.data_ranks, cut=False)
    c = dataclasses.replace(c, steps=max(1, round(config.epochs * batches.steps_per_epoch)))
    feed: Callable[[int], list[dict[str, Tensor]]] = batches
    if config.replay:
        old, rows = Shards(config.replay), round(c.batch_size * config.replay_share / (1 - config.replay_share))
        if any(mask is not None for mask in old.trained):
            raise ValueError(f"{config.replay} holds dialogues; replay takes the text that a pretraining tokenised")
        if not rows or rows % mesh.data_ranks:
            raise ValueError(f"replay_share {config.replay_share} beside a batch of {c.batch_size} is {rows} rows of text: it must be 1 at least, and a "
                             f"multiple of the {mesh.data_ranks} data ranks")  # fmt: skip
        text = Batches(old.split(config.val_fraction)[0], rows, c.seq_len, c.seed + 1, c.micro_batch, mesh.data_rank, mesh.data_ranks)
        feed = lambda step: batches(step) + text(step)  # noqa: E731
    val_batches = validation_batches(val, batches) if val else None
    mesh.first(lambda: write_config(dataclasses.replace(config, train=c), out))
    metrics = with_validation(val_batches, next_token_loss, evaluate)
    return train(model, feed, next_token_loss, c, out, tokenizer, metrics, config.resume, label="sft")
