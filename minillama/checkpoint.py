"""Weights on disk: our own format, Meta's shards in, Hugging Face in and out, and the trainer's resumable steps.

    model, tokenizer = load("runs/my/sft")           # or Meta's Llama-2-7b/, or a Hugging Face folder
    save_hf(model, tokenizer, "out/my-llama-hf")     # transformers.AutoModelForCausalLM.from_pretrained("out/my-llama-hf")

Tensors keep Meta's names, so a Meta import is only the merging of its model-parallel shards. Hugging Face is one map of names,
with a permutation of wq and wk, because its rotary embeddings turn features i and i + Hd/2 where Meta's turn 2i and 2i + 1.
WEIGHTS says all of that, one line a tensor. A folder is written whole or not at all (_files.py); Hugging Face's other files are
in _huggingface.py.

In a job of several ranks every rank calls what writes, and none ever holds the whole model (parallel/state.py). Left out: quantized weights,
adapters, and the rotary scaling and vocabulary-split embeddings of Llama 3; each of them is refused by name.

Shapes: D dim, F feed-forward hidden size, H heads (query or key-value), Hd head size, V vocabulary.
"""
from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from minillama import _files
from minillama._files import Shape, Tensors, check_shapes, open_safetensors, open_weights, read_json, read_pth, settled, weight_files, write_json, write_tensors
from minillama._huggingface import config_fields, config_json, write_tokenizer_json
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.parallel.mesh import current, whole
from minillama.parallel.state import shared_folder, write_distributed
from minillama.tokenizer import Tokenizer

PathLike = str | os.PathLike


class Weight(NamedTuple):
    """One kind of tensor: our (Meta's) name, Hugging Face's, and what differs between the layouts."""

    ours: str
    hf: str
    split: int | None  # dimension that Meta's model-parallel ranks divide; None: every rank has all of it
    heads: str | None = None  # config field with the number of heads whose rows Hugging Face orders differently


WEIGHTS = (
    Weight("tok_embeddings", "model.embed_tokens", 1),
    Weight("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", 0, "n_heads"),
    Weight("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", 0, "n_kv_heads"),  # not n_heads: wrong for GQA, silent for MHA
    Weight("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", 0),
    Weight("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", 1),
    Weight("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", 0),
    Weight("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", 1),
    Weight("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", 0),
    Weight("layers.{}.attention_norm", "model.layers.{}.input_layernorm", None),
    Weight("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", None),
    Weight("norm", "model.norm", None),
    Weight("output", "lm_head", 0),
)


def weight_table(config: LlamaConfig) -> dict[str, Weight]:
    """WEIGHTS with full names: for every tensor of Llama(config), its name -> its line."""
    lines = [w._replace(ours=f"{w.ours}.weight", hf=f"{w.hf}.weight") for w in WEIGHTS]
    table = [w for w in lines if "{}" not in w.ours]
    table += [w._replace(ours=w.ours.format(i), hf=w.hf.format(i)) for i in range(config.n_layers) for w in lines if "{}" in w.ours]
    return {w.ours: w for w in table}


def to_half_split(w: Tensor, heads: int) -> Tensor:
    """wq or wk [H*Hd, D] with rotary pairs as neighbours -> the same with the pairs' halves apart (Hugging Face)."""
    return rearrange(w, "(h pair two) d -> (h two pair) d", h=heads, two=2)


def to_interleaved(w: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`, [H*Hd, D]."""
    return rearrange(w, "(h two pair) d -> (h pair two) d", h=heads, two=2)


# ------------------------------------------------------------------------------------------------------------ loading


class Stored(NamedTuple):
    """A checkpoint that is opened and not read: it can be saved in another format as a model is, tensor by tensor."""

    config: LlamaConfig
    tensors: Tensors  # by our names, whatever the files call them
    tokenizer: Tokenizer | None

    def state_dict(self) -> Tensors:
        """The tensors in fp32."""
        return Tensors(self.tensors.shapes, lambda name: self.tensors[name].float(), self.tensors.fill)


def opened(dir: PathLike) -> Stored:
    """The checkpoint in a folder of any kind that `load` knows, names and shapes checked. Raises as `load`."""
    dir = settled(Path(dir))
    if _is_own(dir):
        return _open_own(dir)
    if any(dir.glob("consolidated.*.pth")):
        return _open_meta(dir)
    if (dir / "config.json").is_file():
        return _open_hf(dir)
    for folder in (dir, dir / "checkpoint"):
        steps = _files.steps_of(folder, _is_own)
        if steps:
            return _open_own(steps[-1][1])
    raise ValueError(
        f"{dir} holds no checkpoint: looked for params.json with model.safetensors (minillama), consolidated.*.pth (Meta), "
        "config.json with *.safetensors (Hugging Face), step-*/ and checkpoint/step-*/ (a stage of a run)"
    )


def load(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a folder, in fp32 unless `dtype` says otherwise; the kind of folder is found from its files.

    Known: our own format, Meta's, Hugging Face's, and a stage of a run or its checkpoint/ folder (the newest step is taken, whether one process
    wrote it or many ranks). Raises FileNotFoundError if there is no such folder, ValueError if it is none of these or is damaged.
    """
    return _assemble(opened(dir), device, dtype)


def load_meta(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """Meta's release: params.json, consolidated.NN.pth (one for each model-parallel rank), tokenizer.model there or in the parent folder.

    Shards are mapped, not read whole, and merged tensor by tensor: the peak is one model in `dtype` (default fp32). The vocabulary and the
    feed-forward size come from the tensors where params.json leaves them out. Raises ValueError for what is missing, damaged or misfits.
    """
    return _assemble(_open_meta(settled(Path(dir))), device, dtype)


def load_hf(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """A Hugging Face Llama: config.json, one or more *.safetensors, tokenizer.model if present; fp32 unless `dtype` says otherwise.

    Read tensor by tensor: the peak is one model in `dtype` and one tensor. Raises ValueError for a model that is not Llama 2's
    architecture (rotary scaling, biases, another activation or head size), for what is missing, damaged or of another shape.
    """
    return _assemble(_open_hf(settled(Path(dir))), device, dtype)


def load_weights(model: nn.Module, path: PathLike) -> None:
    """Copy the weights of `path`, our own format or a step, into `model`, keeping its device and dtype. All names and shapes are compared before any
    is copied. The model may be split over ranks, and the files written by any number of them.

    Raises ValueError, with the model unchanged, for a tensor that is missing, unexpected or of another shape, or a damaged file.
    """
    tensors, where = open_weights(Path(path))
    own = model.state_dict()
    check_shapes(tensors.shapes, {n: tuple(t.shape) for n, t in own.items()}, where)
    tensors.fill(own)


def load_state(dir: PathLike) -> tuple[int, Path, Tensors, dict] | None:
    """(step, folder, tensors, meta) that `save_state` wrote last in `dir`; None if there is no complete step.

    Raises ValueError if the newest complete step is damaged.
    """
    steps = _files.steps_of(Path(dir), lambda p: (p / "train_state.json").is_file() and _files.has_weights(p)
                   and ((p / ".metadata").is_file() or (p / "train_state.safetensors").is_file()))  # fmt: skip
    if not steps:
        return None
    step, path = steps[-1]
    state = read_json(path / "train_state.json")
    if state.get("step") != step or not isinstance(state.get("meta"), dict):
        raise ValueError(f"{path / 'train_state.json'} is not of step {step}; delete {path} to go on from an older step or from the start")
    split = (path / ".metadata").is_file()
    tensors = _files.open_distributed(path).under("train/") if split else open_safetensors([path / "train_state.safetensors"])
    return step, path, tensors, state["meta"]


# ------------------------------------------------------------------------------------------------------------- saving


def save(model: nn.Module | Stored, tokenizer: Tokenizer | None, dir: PathLike, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write our own format to `dir`: params.json, model.safetensors (several and an index, of up to `max_shard_bytes` each), tokenizer.model. A
    checkpoint that was there is replaced at the end. A model that is split over ranks is gathered tensor by tensor; all ranks call this.

    Raises ValueError if `dir` is a file or holds other things than a checkpoint, OSError (nothing lost) if it cannot be written.
    """
    with shared_folder(Path(dir)) as tmp:
        _write_weights(model.state_dict(), tmp, max_shard_bytes)
        current().first(lambda: _write_about(model, tokenizer, tmp))


def save_state(
    dir: PathLike, step: int, model: nn.Module, tensors: dict[str, Tensor], meta: dict, tokenizer: Tokenizer | None = None, keep: int = 1
) -> Path:
    """Write `dir`/step-NNNNNNNN/, the model plus the trainer's `tensors` and `meta` (JSON); return that folder. A job of one writes our own format. In
    a job of several ranks all call this, and each writes its own parts; the folder has its name once all are done.

    Afterwards the newest `keep` older steps stay and the rest is removed. Raises as `save`.
    """
    target = Path(dir) / f"step-{step:08d}"
    mesh = current()
    with shared_folder(target) as tmp:
        if mesh.world > 1:
            write_distributed({**{f"model/{n}": t for n, t in model.state_dict().items()}, **{f"train/{n}": t for n, t in tensors.items()}}, tmp)
        else:
            _write_weights(model.state_dict(), tmp)
            write_tensors(tensors, tmp / "train_state.safetensors")

        def about() -> None:
            _write_about(model, tokenizer, tmp)
            write_json({"step": step, "meta": meta}, tmp / "train_state.json")

        mesh.first(about)
    mesh.first(lambda: _files.prune_steps(Path(dir), step, keep))
    return target


def save_hf(model: Llama | Stored, tokenizer: Tokenizer | None, dir: PathLike, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that transformers loads: weights in shards of up to `max_shard_bytes`, the tokenizer, the chat template. Ranks as in `save`.

    AutoTokenizer gives the ids of our Tokenizer, except that it reads "<s>", "</s>" and "<unk>" in a text as special tokens (its
    habit; the chat template refuses the first two in a turn). Raises as `save`, and ValueError if the tokenizer has more tokens than
    the model.
    """
    c = model.config
    if tokenizer is not None and tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {c.vocab_size}: they do not belong together")
    state, table = model.state_dict(), weight_table(c)

    def about() -> None:
        ids = {"bos_token_id": tokenizer.bos_id if tokenizer else 1, "eos_token_id": tokenizer.eos_id if tokenizer else 2}
        dtype = str(state["output.weight"].dtype).removeprefix("torch.")
        write_json(config_json(c, dtype) | ids | {"pad_token_id": None}, tmp / "config.json")
        write_json(ids, tmp / "generation_config.json")
        if tokenizer is not None:
            _write_tokenizer(tokenizer, tmp)
            write_tokenizer_json(tokenizer, c.max_seq_len, tmp)

    with shared_folder(Path(dir)) as tmp:
        _write_weights(state, tmp, max_shard_bytes, {n: (w.hf, w.heads and getattr(c, w.heads)) for n, w in table.items()})
        current().first(about)


# ------------------------------------------------------------------------------------------------------------ helpers


def _config(fields: dict, path: Path, hidden: int | None = None) -> LlamaConfig:
    """LlamaConfig of the fields that the file at `path` gave; `hidden` is the feed-forward size that the tensors have, if known."""
    unknown = sorted(set(fields) - set(LlamaConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{path} has {unknown[0]} = {fields[unknown[0]]!r}, which Llama 2 does not have: it is not supported")
    try:
        config = LlamaConfig(**fields)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from None
    if hidden not in (None, config.ffn_dim):  # only where the rule does not give it, so that params.json stays Meta's
        config.hidden_dim = hidden
    return config


def _config_from_meta(path: Path, first: Path, n: int) -> LlamaConfig:
    """The config of n shards: params.json, with what it leaves out taken from the first shard's tensors."""
    params, shard = read_json(path), read_pth(first)
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in shard:
            raise ValueError(f"{first} lacks {name}: it is not a checkpoint of Llama 2")
    if params.get("vocab_size", -1) == -1:  # Meta leaves it to the tokenizer
        params["vocab_size"] = shard["tok_embeddings.weight"].shape[0]
    params.pop("max_batch_size", None)
    if not params.get("use_scaled_rope"):
        params.pop("use_scaled_rope", None)
    return _config(params, path, hidden=shard["layers.0.feed_forward.w1.weight"].shape[0] * n)


def _is_own(dir: Path) -> bool:
    return (dir / "params.json").is_file() and _files.has_weights(dir)


def _open_own(dir: Path) -> Stored:
    config = _config(read_json(dir / "params.json"), dir / "params.json")
    tensors, where = open_weights(dir)
    check_shapes(tensors.shapes, _shapes(config), where)
    return Stored(config, tensors, _find_tokenizer([dir], config))


def _open_meta(dir: Path) -> Stored:
    files = sorted(dir.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{dir} has no consolidated.00.pth")
    for i, file in enumerate(files):
        if file.name != f"consolidated.{i:02d}.pth":
            raise ValueError(f"{dir} lacks consolidated.{i:02d}.pth, though it has {files[-1].name}; download it again")
    config = _config_from_meta(dir / "params.json", files[0], len(files))
    table, shapes = weight_table(config), _shapes(config)
    parts = {name: _part(shape, table[name].split, len(files), dir) for name, shape in shapes.items()}
    shards = [read_pth(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        check_shapes({name: tuple(t.shape) for name, t in shard.items()}, parts, file)

    def merged(name: str) -> Tensor:
        dim = table[name].split
        return shards[0][name].clone() if dim is None else torch.cat([shard[name] for shard in shards], dim)  # None: the same in every shard

    return Stored(config, Tensors(shapes, merged), _find_tokenizer([dir, dir.parent], config))


def _open_hf(dir: Path) -> Stored:
    raw = read_json(dir / "config.json")
    fields = config_fields(raw, dir / "config.json")
    config = _config(fields, dir / "config.json", fields.pop("hidden_dim"))
    tensors = open_safetensors(weight_files(dir))
    tied = bool(raw.get("tie_word_embeddings"))
    table, shapes = weight_table(config), _shapes(config)
    if tied:  # the output layer is the embedding, stored twice or not
        table["output.weight"] = table["output.weight"]._replace(hf=table["tok_embeddings.weight"].hf)
    # Old exports carry the rotary frequencies, which follow from the config.
    ignored = {n for n in tensors if n.endswith("rotary_emb.inv_freq") or tied and n == "lm_head.weight"}
    check_shapes({n: s for n, s in tensors.shapes.items() if n not in ignored}, {w.hf: shapes[n] for n, w in table.items()}, dir)

    def convert(name: str) -> Tensor:
        w = table[name]
        return to_interleaved(tensors[w.hf], getattr(config, w.heads)) if w.heads else tensors[w.hf]

    return Stored(config, Tensors(shapes, convert), _find_tokenizer([dir], config))


def _write_weights(state: Mapping[str, Tensor], dir: Path, max_bytes: int = 5_000_000_000, layout: dict[str, tuple[str, int | None]] | None = None) -> None:
    """model.safetensors, or as many files of up to max_bytes (or one tensor) as are needed and an index. `layout` gives Hugging Face's name of a
    tensor, and the heads to permute. Never more than one file is in memory, and on rank 0 only."""
    mesh = current()
    sizes = {n: 4 * math.prod(s) for n, s in state.shapes.items()} if isinstance(state, Tensors) else {n: t.nbytes for n, t in state.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = whole(state[name])
            to, heads = layout[name] if layout else (name, None)
            weight_map[to] = file
            if mesh.rank == 0:
                tensors[to] = to_half_split(tensor, heads) if heads else tensor
        mesh.first(partial(write_tensors, tensors, dir / file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        mesh.first(lambda: write_json(index, dir / "model.safetensors.index.json"))


def _shapes(config: LlamaConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}


def _part(shape: Shape, dim: int | None, n: int, where: Path) -> Shape:
    """Shape of one of n ranks' part of a tensor split on `dim`."""
    if dim is None:
        return shape
    if shape[dim] % n:
        raise ValueError(f"{where}: {n} shards do not divide a tensor of shape {list(shape)} on dimension {dim}; are all files there?")
    return (*shape[:dim], shape[dim] // n, *shape[dim + 1 :])


def _assemble(stored: Stored, device: torch.device | str, dtype: torch.dtype | None) -> tuple[Llama, Tokenizer | None]:
    """A Llama that owns the stored tensors, with nothing allocated twice."""
    with torch.device("meta"):
        model = Llama(stored.config)
    own = {}
    for name, t in stored.tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name} is stored as {t.dtype}: quantized weights are not supported")
        own[name] = t.to(device, dtype or torch.float32).contiguous()
    model.load_state_dict(own, strict=True, assign=True)
    model.reset_rope()
    return model.eval(), stored.tokenizer


def _find_tokenizer(folders: Iterable[Path], config: LlamaConfig) -> Tokenizer | None:
    path = next((d / "tokenizer.model" for d in folders if (d / "tokenizer.model").is_file()), None)
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they do not belong together")
    return tokenizer


def _write_about(model: nn.Module | Stored, tokenizer: Tokenizer | None, dir: Path) -> None:
    config = getattr(model, "config", None)
    if hasattr(config, "to_params_json"):  # the trainer also saves networks that are not a Llama
        write_json(config.to_params_json(), dir / "params.json")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, dir)


def _write_tokenizer(tokenizer: Tokenizer, dir: Path) -> None:
    # From memory: the file may be in an older step's folder that is gone by now.
    (dir / "tokenizer.model").write_bytes(tokenizer.serialized())
