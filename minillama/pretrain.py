"""Pretraining (sec 2): text to a base model.

    minillama pretrain --data mybooks/ --tokenizer runs/my/tokenizer.model --out runs/my/pretrain

Documents are tokenised once into memory-mapped shards, packed into rows, and trained on with the paper's optimiser. Every token but a document's
first is a target, the end-of-document token included.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import nn

from minillama.config import LlamaConfig, PretrainConfig, TrainConfig
from minillama.data import sources
from minillama.data.pack import Batches, Shards, tokenised, validation_batches
from minillama.data.world import from_spec
from minillama.model import Llama, next_token_loss
from minillama.parallel import mesh as parallel
from minillama.parallel.state import build, load_sharded
from minillama.tokenizer import Tokenizer
from minillama.trainer import last_state, train, with_validation, write_config


def documents(spec: str) -> Iterator[str]:
    """Texts of a data spec: "tinyworld[:scale[:seed]]", or anything `sources` reads."""
    if world := from_spec(spec):
        yield from (d["text"] for d in world.documents(defects=False))
    else:
        yield from (d["text"] for d in sources.read(spec, kind="document"))


def initialised(arch: LlamaConfig, c: TrainConfig, mesh: parallel.Mesh, draw: bool = True) -> Llama:
    """A new model, drawn from c.seed: the same on any mesh. In a job of several ranks it is split before it has weights, and they are only drawn if
    `draw` says so: for a model that is resumed, that would be minutes for nothing."""
    if mesh.world == 1:
        return Llama(arch).init_weights(c.seed)
    parallel.start(c.parallel, c.device, arch)
    fill = lambda model: draw and model.init_weights(c.seed)  # noqa: E731
    return build(lambda: Llama(arch), fill, mesh, bf16=c.bf16, compile=c.compile)


def run(config: PretrainConfig, texts: Iterable[str] | None = None, evaluate: Callable[[nn.Module], dict[str, float]] | None = None) -> Llama:
    """Pretrain by `config`; `texts` replaces config.data, `evaluate` adds metrics to the validation loss. Returns the model.

    Raises ValueError for data without text, a missing tokenizer, or an output folder that holds a run already (without resume).
    """
    out, c = Path(config.out), config.train
    mesh = parallel.start(c.parallel, c.device)
    state = last_state(out, config.resume)  # a folder that holds a run is refused before anything in it is written over
    tokenizer = Tokenizer(config.tokenizer)
    if config.init:
        model = load_sharded(config.init, mesh, bf16=c.bf16, compile=c.compile)[0]
        if model.config.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"{config.init} has {model.config.vocab_size} tokens, {config.tokenizer} {tokenizer.vocab_size}: they do not belong together")
    else:
        arch = LlamaConfig.preset(config.preset, **{"vocab_size": tokenizer.vocab_size, **config.model})
        model = initialised(arch, c, mesh, draw=state is None)
    if c.seq_len > model.config.max_seq_len:
        raise ValueError(f"train.seq_len {c.seq_len} is more than the model's max_seq_len {model.config.max_seq_len}")
    texts = documents(config.data) if texts is None else texts
    mesh.first(lambda: tokenised(texts, config.val_fraction, config.tokenizer, out / "data", config.workers, config.resume), hours=True)
    shards, val = Shards(out / "data").split(config.val_fraction)
    batches = Batches(shards, c.batch_size, c.seq_len, c.seed, c.micro_batch, mesh.data_rank, mesh.data_ranks, config.whole_documents)
    val_batches = validation_batches(val, batches) if val else None
    mesh.first(lambda: write_config(config, out))
    metrics = with_validation(val_batches, next_token_loss, evaluate)
    return train(model, batches, next_token_loss, c, out, tokenizer, metrics, config.resume, label="pretrain")
