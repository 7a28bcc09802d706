"""Weights on disk: our own format, Meta's shards in, Hugging Face in and out, and the trainer's resumable steps.

    model, tokenizer = load("runs/my/sft")           # or Meta's Llama-2-7b/, or a Hugging Face folder
    save_hf(model, tokenizer, "out/my-llama-hf")     # transformers.AutoModelForCausalLM.from_pretrained("out/my-llama-hf")

Tensors keep Meta's names, so a Meta import is only the merging of its model-parallel shards. Hugging Face is one map of names,
with a permutation of wq and wk, because its rotary embeddings turn features i and i + Hd/2 where Meta's turn 2i and 2i + 1.
WEIGHTS says all of that, one line a tensor. A folder is written whole or not at all (_files.py); Hugging Face's other files are
in _huggingface.py.

Left out: sharded saving by many ranks (a rank that calls `save` must hold whole tensors), quantized weights, adapters, and the rotary
scaling and vocabulary-split embeddings of Llama 3; each of them is refused by name.

Shapes: D dim, F feed-forward hidden size, H heads (query or key-value), Hd head size, V vocabulary.
"""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from minillama._files import Shape, new_folder, open_safetensors, read_json, read_pth, settled, write_json, write_tensors
from minillama._huggingface import config_fields, config_json, write_tokenizer_json
from minillama.config import LlamaConfig
from minillama.model import Llama
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


def load(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a folder, in fp32 unless `dtype` says otherwise; the kind of folder is found from its files.

    Known: our own format, Meta's, Hugging Face's, and a stage of a run or its checkpoint/ folder (the newest step is taken).
    Raises FileNotFoundError if there is no such folder, ValueError if it is none of these or is damaged.
    """
    dir = settled(Path(dir))
    if (dir / "params.json").is_file() and (dir / "model.safetensors").is_file():
        return _load_own(dir, device, dtype)
    if any(dir.glob("consolidated.*.pth")):
        return load_meta(dir, device, dtype)
    if (dir / "config.json").is_file():
        return load_hf(dir, device, dtype)
    for folder in (dir, dir / "checkpoint"):
        steps = _steps(folder, ("params.json", "model.safetensors"))
        if steps:
            return _load_own(steps[-1][1], device, dtype)
    raise ValueError(
        f"{dir} holds no checkpoint: looked for params.json with model.safetensors (minillama), consolidated.*.pth (Meta), "
        "config.json with *.safetensors (Hugging Face), step-*/ and checkpoint/step-*/ (a stage of a run)"
    )


def load_meta(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """Meta's release: params.json, consolidated.NN.pth (one for each model-parallel rank), tokenizer.model there or in the parent folder.

    Shards are mapped, not read whole, and merged one at a time: the peak is one model in `dtype` (default fp32). The vocabulary and the
    feed-forward size are taken from the tensors. Raises ValueError for what is missing, damaged, of another shape, or not Llama 2.
    """
    dir = settled(Path(dir))
    files = sorted(dir.glob("consolidated.*.pth"))
    if not files or not (dir / "params.json").is_file():
        raise ValueError(f"{dir} is not a Meta checkpoint: it needs params.json and consolidated.00.pth")
    for i, file in enumerate(files):
        if file.name != f"consolidated.{i:02d}.pth":
            raise ValueError(f"{dir} lacks consolidated.{i:02d}.pth, though it has {files[-1].name}; download it again")
    n = len(files)
    config = _config_from_meta(dir / "params.json", files[0], n)
    table, shapes = weight_table(config), _shapes(config)
    parts = {name: _part(shape, table[name].split, n, dir) for name, shape in shapes.items()}
    whole = {name: torch.empty(shape, device=device, dtype=dtype or torch.float32) for name, shape in shapes.items()}
    for rank, file in enumerate(files):
        shard = read_pth(file)
        _check({name: tuple(t.shape) for name, t in shard.items()}, parts, file)
        for name, part in shard.items():
            dim = table[name].split
            if dim is None:  # the same in every shard
                whole[name].copy_(part)
            else:
                whole[name].narrow(dim, rank * part.shape[dim], part.shape[dim]).copy_(part)
    return _assemble(config, whole.items(), device, dtype), _find_tokenizer([dir, dir.parent], config)


def load_hf(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """A Hugging Face Llama: config.json, one or more *.safetensors, tokenizer.model if present; fp32 unless `dtype` says otherwise.

    Read tensor by tensor: the peak is one model in `dtype` and one tensor. Raises ValueError for a model that is not Llama 2's
    architecture (rotary scaling, biases, another activation or head size), for what is missing, damaged or of another shape.
    """
    dir = settled(Path(dir))
    raw = read_json(dir / "config.json")
    fields = config_fields(raw, dir / "config.json")
    config = _config(fields, dir / "config.json", fields.pop("hidden_dim"))
    shapes, read = open_safetensors(_hf_files(dir))
    tied = bool(raw.get("tie_word_embeddings"))
    ours = {w.hf: w for w in weight_table(config).values() if not (tied and w.hf == "lm_head.weight")}
    # Old exports carry the rotary frequencies, which follow from the config; a tied output layer is the embedding, stored or not.
    ignored = {n for n in shapes if n.endswith("rotary_emb.inv_freq") or tied and n == "lm_head.weight"}
    expected = _shapes(config)
    _check({n: s for n, s in shapes.items() if n not in ignored}, {n: expected[w.ours] for n, w in ours.items()}, dir)

    def convert() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in read():
            if name in ignored:
                continue
            w = ours[name]
            yield w.ours, to_interleaved(tensor, getattr(config, w.heads)) if w.heads else tensor
            if tied and w.ours == "tok_embeddings.weight":
                yield "output.weight", tensor

    return _assemble(config, convert(), device, dtype), _find_tokenizer([dir], config)


def load_weights(model: nn.Module, path: PathLike) -> None:
    """Copy `path`/model.safetensors into `model`, keeping its device and dtype. All names and shapes are compared before any is copied.

    Raises ValueError, with the model unchanged, for a tensor that is missing, unexpected or of another shape, or a damaged file.
    """
    file = Path(path) / "model.safetensors"
    shapes, read = open_safetensors([file])
    own = model.state_dict()
    _check(shapes, {n: tuple(t.shape) for n, t in own.items()}, file)
    with torch.no_grad():
        for name, tensor in read():
            own[name].copy_(tensor)


def load_state(dir: PathLike) -> tuple[int, Path, dict[str, Tensor], dict] | None:
    """(step, folder, tensors on the CPU, meta) that `save_state` wrote last in `dir`; None if there is no complete step.

    Raises ValueError if the newest complete step is damaged.
    """
    steps = _steps(Path(dir), ("model.safetensors", "train_state.safetensors", "train_state.json"))
    if not steps:
        return None
    step, path = steps[-1]
    state = read_json(path / "train_state.json")
    if state.get("step") != step or not isinstance(state.get("meta"), dict):
        raise ValueError(f"{path / 'train_state.json'} is not of step {step}; delete {path} to go on from an older step or from the start")
    _, read = open_safetensors([path / "train_state.safetensors"])
    return step, path, dict(read()), state["meta"]


# ------------------------------------------------------------------------------------------------------------- saving


def save(model: nn.Module, tokenizer: Tokenizer | None, dir: PathLike) -> None:
    """Write our own format to `dir`: params.json, model.safetensors, tokenizer.model. A checkpoint that was there is replaced at the end.

    Raises ValueError if `dir` is a file or holds other things than a checkpoint, OSError (nothing lost) if it cannot be written.
    """
    with new_folder(Path(dir)) as tmp:
        _write_own(model, tokenizer, tmp)


def save_state(
    dir: PathLike, step: int, model: nn.Module, tensors: dict[str, Tensor], meta: dict, tokenizer: Tokenizer | None = None, keep: int = 1
) -> Path:
    """Write `dir`/step-NNNNNNNN/, our own format plus the trainer's `tensors` and `meta` (JSON); return that folder.

    Afterwards the newest `keep` older steps stay and the rest is removed. Raises as `save`.
    """
    target = Path(dir) / f"step-{step:08d}"
    with new_folder(target) as tmp:
        _write_own(model, tokenizer, tmp)
        write_tensors(tensors, tmp / "train_state.safetensors")
        write_json({"step": step, "meta": meta}, tmp / "train_state.json")
    older = [path for s, path in _steps(Path(dir), ()) if s < step]
    killed = [p for p in Path(dir).iterdir() if p.name.startswith((".tmp-step-", ".old-step-"))]
    for path in older[: max(0, len(older) - keep)] + killed:
        shutil.rmtree(path, ignore_errors=True)
    return target


def save_hf(model: Llama, tokenizer: Tokenizer | None, dir: PathLike, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that transformers loads: weights in shards of up to `max_shard_bytes`, the tokenizer, the chat template.

    AutoTokenizer gives the ids of our Tokenizer, except that it reads "<s>", "</s>" and "<unk>" in a text as special tokens (its
    habit; the chat template refuses the first two in a turn). Raises as `save`, and ValueError if the tokenizer has more tokens than
    the model.
    """
    c = model.config
    if tokenizer is not None and tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {c.vocab_size}: they do not belong together")
    state, table = model.state_dict(), weight_table(c)
    shards = _hf_shards(state, max_shard_bytes)
    dtype = str(state["output.weight"].dtype).removeprefix("torch.")
    with new_folder(Path(dir)) as tmp:
        weight_map = {}
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                w = table[name]
                tensors[w.hf] = to_half_split(state[name], getattr(c, w.heads)) if w.heads else state[name]
                weight_map[w.hf] = file
            write_tensors(tensors, tmp / file)
        if len(shards) > 1:
            total = sum(t.nbytes for t in state.values())
            write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, tmp / "model.safetensors.index.json")
        ids = {"bos_token_id": tokenizer.bos_id if tokenizer else 1, "eos_token_id": tokenizer.eos_id if tokenizer else 2}
        write_json(config_json(c, dtype) | ids | {"pad_token_id": None}, tmp / "config.json")
        write_json(ids, tmp / "generation_config.json")
        if tokenizer is not None:
            _write_tokenizer(tokenizer, tmp)
            write_tokenizer_json(tokenizer, c.max_seq_len, tmp)


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


def _load_own(dir: Path, device: torch.device | str, dtype: torch.dtype | None) -> tuple[Llama, Tokenizer | None]:
    config = _config(read_json(dir / "params.json"), dir / "params.json")
    shapes, read = open_safetensors([dir / "model.safetensors"])
    _check(shapes, _shapes(config), dir / "model.safetensors")
    return _assemble(config, read(), device, dtype), _find_tokenizer([dir], config)


def _hf_files(dir: Path) -> list[Path]:
    index = dir / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        return [dir / name for name in sorted(set(weight_map.values()))]
    files = [dir / "model.safetensors"] if (dir / "model.safetensors").is_file() else sorted(dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{dir} has no *.safetensors; weights in *.bin are not read: convert them with transformers' save_pretrained")
    return files


def _hf_shards(state: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in the order of `state`, cut into shards of up to max_bytes (or one tensor, if that is larger)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


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


def _check(found: dict[str, Shape], expected: dict[str, Shape], where: Path) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where} lacks the tensor {name} of shape {list(shape)}: it is incomplete, or of another architecture")
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}: weights and config do not fit")
    extra = sorted(set(found) - set(expected))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"{where} has a tensor {extra[0]} of shape {list(found[extra[0]])}{more} that this model does not have")


def _assemble(config: LlamaConfig, tensors: Iterable[tuple[str, Tensor]], device: torch.device | str, dtype: torch.dtype | None) -> Llama:
    """A Llama that owns the given tensors (names and shapes already checked), with nothing allocated twice."""
    with torch.device("meta"):
        model = Llama(config)
    own = {}
    for name, t in tensors:
        if not t.is_floating_point():
            raise ValueError(f"{name} is stored as {t.dtype}: quantized weights are not supported")
        own[name] = t.to(device, dtype or torch.float32).contiguous()
    # A tied output layer must become a tensor of its own: ours is trained apart.
    if own["output.weight"].data_ptr() == own["tok_embeddings.weight"].data_ptr():
        own["output.weight"] = own["output.weight"].clone()
    model.load_state_dict(own, strict=True, assign=True)
    model.reset_rope()
    return model.eval()


def _find_tokenizer(folders: Iterable[Path], config: LlamaConfig) -> Tokenizer | None:
    path = next((d / "tokenizer.model" for d in folders if (d / "tokenizer.model").is_file()), None)
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they do not belong together")
    return tokenizer


def _write_own(model: nn.Module, tokenizer: Tokenizer | None, dir: Path) -> None:
    config = getattr(model, "config", None)
    if hasattr(config, "to_params_json"):  # the trainer also saves networks that are not a Llama
        write_json(config.to_params_json(), dir / "params.json")
    write_tensors(model.state_dict(), dir / "model.safetensors")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, dir)


def _write_tokenizer(tokenizer: Tokenizer, dir: Path) -> None:
    # From memory: the file may be in an older step's folder that is gone by now.
    (dir / "tokenizer.model").write_bytes(tokenizer.serialized())


def _steps(dir: Path, files: tuple[str, ...]) -> list[tuple[int, Path]]:
    """(step, folder) of the step folders in `dir` that hold all of `files`, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(dir.iterdir(), reverse=True) if dir.is_dir() else ():  # "step-" sorts after ".old-step-", so is preferred
        match = re.fullmatch(r"(?:\.old-)?step-(\d{8,})", path.name)
        if match and all((path / f).is_file() for f in files):
            found.setdefault(int(match[1]), path)
    return sorted(found.items())
