"""Weights on disk: our own format, Meta's shards in, Hugging Face in and out, and the trainer's resumable steps.

    model, tokenizer = load("runs/my/sft")           # or Meta's Llama-2-7b/, or a Hugging Face folder
    save_hf(model, tokenizer, "out/my-llama-hf")     # transformers.AutoModelForCausalLM.from_pretrained("out/my-llama-hf")

Tensors keep Meta's names, so a Meta import is only the merging of its model-parallel shards. Hugging Face is one map of names,
with a permutation of wq and wk, because its rotary embeddings turn features i and i + Hd/2 where Meta's turn 2i and 2i + 1.
WEIGHTS says all of that, one line a tensor.

A folder is written under a hidden name beside its place, flushed to the disk, and renamed: whoever finds a checkpoint finds a whole
one, and a save that fails (a full disk) or is killed costs nothing that was there. One process writes a folder at a time.

Left out: sharded saving by many ranks (a rank that calls `save` must hold whole tensors), quantized weights, adapters, and the rotary
scaling and vocabulary-split embeddings of Llama 3; each of them is refused by name.

Shapes: D dim, F feed-forward hidden size, H heads (query or key-value), Hd head size, V vocabulary.
"""
from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

PathLike = str | os.PathLike
Shape = tuple[int, ...]


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


# ---------------------------------------------------------------------------------------------------- public: loading


def load(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a folder, in fp32 unless `dtype` says otherwise; the kind of folder is found from its files.

    Known: our own format, Meta's, Hugging Face's, and a stage of a run or its checkpoint/ folder (the newest step is taken).
    Raises FileNotFoundError if there is no such folder, ValueError if it is none of these or is damaged.
    """
    dir = _settled(Path(dir))
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


def _load_own(dir: Path, device: torch.device | str, dtype: torch.dtype | None) -> tuple[Llama, Tokenizer | None]:
    config = _config(_read_json(dir / "params.json"), dir / "params.json")
    shapes, read = _open_safetensors([dir / "model.safetensors"])
    _check(shapes, _shapes(config), dir / "model.safetensors")
    return _assemble(config, read(), device, dtype), _find_tokenizer([dir], config)


def load_meta(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """Meta's release: params.json, consolidated.NN.pth (one for each model-parallel rank), tokenizer.model there or in the parent folder.

    Shards are mapped, not read whole, and merged one at a time: the peak is one model in `dtype` (default fp32). The vocabulary and the
    feed-forward size are taken from the tensors. Raises ValueError for what is missing, damaged, of another shape, or not Llama 2.
    """
    dir = _settled(Path(dir))
    files = sorted(dir.glob("consolidated.*.pth"))
    if not files or not (dir / "params.json").is_file():
        raise ValueError(f"{dir} is not a Meta checkpoint: it needs params.json and consolidated.00.pth")
    for i, file in enumerate(files):
        if file.name != f"consolidated.{i:02d}.pth":
            raise ValueError(f"{dir} lacks consolidated.{i:02d}.pth, though it has {files[-1].name}; download it again")
    n = len(files)
    first = _read_pth(files[0])
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in first:
            raise ValueError(f"{files[0]} lacks {name}: it is not a checkpoint of Llama 2")
    params = _read_json(dir / "params.json")
    if params.get("vocab_size", -1) == -1:  # Meta leaves it to the tokenizer
        params["vocab_size"] = first["tok_embeddings.weight"].shape[0]
    params.pop("max_batch_size", None)
    if not params.get("use_scaled_rope"):
        params.pop("use_scaled_rope", None)
    hidden = first["layers.0.feed_forward.w1.weight"].shape[0] * n
    config = _with_hidden(_config(params, dir / "params.json"), hidden)
    table, expected = weight_table(config), _shapes(config)
    merged = {name: torch.empty(shape, device=device, dtype=dtype or torch.float32) for name, shape in expected.items()}
    parts = {name: _part(shape, table[name].split, n, dir) for name, shape in expected.items()}
    del first
    for rank, file in enumerate(files):
        shard = _read_pth(file)
        _check({k: tuple(v.shape) for k, v in shard.items()}, parts, file)
        for name, whole in merged.items():
            dim = table[name].split
            if dim is None:
                if rank == 0:  # replicated
                    whole.copy_(shard[name])
            else:
                whole.narrow(dim, rank * parts[name][dim], parts[name][dim]).copy_(shard[name])
    return _assemble(config, merged.items(), device, dtype), _find_tokenizer([dir, dir.parent], config)


def load_hf(dir: PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """A Hugging Face Llama: config.json, one or more *.safetensors, tokenizer.model if present; fp32 unless `dtype` says otherwise.

    Read tensor by tensor: the peak is one model in `dtype` and one tensor. Raises ValueError for a model that is not Llama 2's
    architecture (rotary scaling, biases, another activation or head size), for what is missing, damaged or of another shape.
    """
    dir = _settled(Path(dir))
    raw = _read_json(dir / "config.json")
    config = _config_from_hf(raw, dir / "config.json")
    index = dir / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        files = [dir / name for name in sorted(set(weight_map.values()))]
    else:
        files = [dir / "model.safetensors"] if (dir / "model.safetensors").is_file() else sorted(dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{dir} has no *.safetensors; weights in *.bin are not read: convert them with transformers' save_pretrained")
    shapes, read = _open_safetensors(files)
    tied = bool(raw.get("tie_word_embeddings"))
    ours = {w.hf: w for w in weight_table(config).values() if not (tied and w.hf == "lm_head.weight")}
    # Old exports carry the rotary frequencies, which follow from the config; a tied output layer is the embedding, stored or not.
    ignored = {n for n in shapes if n.endswith("rotary_emb.inv_freq") or tied and n == "lm_head.weight"}
    expected = _shapes(config)
    _check({n: s for n, s in shapes.items() if n not in ignored}, {n: expected[w.ours] for n, w in ours.items()}, dir)

    def convert() -> Iterator[tuple[str, Tensor]]:
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
    shapes, read = _open_safetensors([file])
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
    state = _read_json(path / "train_state.json")
    if state.get("step") != step or not isinstance(state.get("meta"), dict):
        raise ValueError(f"{path / 'train_state.json'} is not of step {step}; delete {path} to go on from an older step or from the start")
    _, read = _open_safetensors([path / "train_state.safetensors"])
    return step, path, dict(read()), state["meta"]


# ----------------------------------------------------------------------------------------------------- public: saving


def save(model: nn.Module, tokenizer: Tokenizer | None, dir: PathLike) -> None:
    """Write our own format to `dir`: params.json, model.safetensors, tokenizer.model. A checkpoint that was there is replaced at the end.

    Raises ValueError if `dir` is a file or holds other things than a checkpoint, OSError (nothing lost) if it cannot be written.
    """
    with _new_folder(Path(dir)) as tmp:
        _write_own(model, tokenizer, tmp)


def save_state(
    dir: PathLike, step: int, model: nn.Module, tensors: dict[str, Tensor], meta: dict, tokenizer: Tokenizer | None = None, keep: int = 1
) -> Path:
    """Write `dir`/step-NNNNNNNN/, our own format plus the trainer's `tensors` and `meta` (JSON); return that folder.

    Afterwards the newest `keep` older steps stay and the rest is removed. Raises as `save`.
    """
    target = Path(dir) / f"step-{step:08d}"
    with _new_folder(target) as tmp:
        _write_own(model, tokenizer, tmp)
        _write_tensors(tensors, tmp / "train_state.safetensors")
        _write_json({"step": step, "meta": meta}, tmp / "train_state.json")
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
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    dtype = str(state["output.weight"].dtype).removeprefix("torch.")
    with _new_folder(Path(dir)) as tmp:
        weight_map = {}
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                w = table[name]
                tensors[w.hf] = to_half_split(state[name], getattr(c, w.heads)) if w.heads else state[name]
                weight_map[w.hf] = file
            _write_tensors(tensors, tmp / file)
        if len(shards) > 1:
            _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, tmp / "model.safetensors.index.json")
        ids = {"bos_token_id": tokenizer.bos_id if tokenizer else 1, "eos_token_id": tokenizer.eos_id if tokenizer else 2}
        _write_json(_config_to_hf(c, dtype) | ids | {"pad_token_id": None}, tmp / "config.json")
        _write_json(ids, tmp / "generation_config.json")
        if tokenizer is not None:
            _write_hf_tokenizer(tokenizer, c.max_seq_len, tmp)


# ------------------------------------------------------------------------------------------------------------ configs


def _config(params: dict, path: Path) -> LlamaConfig:
    unknown = sorted(set(params) - set(LlamaConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{path} has {unknown[0]} = {params[unknown[0]]!r}, which Llama 2 does not have: it is not supported")
    try:
        return LlamaConfig(**params)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from None


def _with_hidden(config: LlamaConfig, hidden: int) -> LlamaConfig:
    if hidden != config.ffn_dim:  # only where the rule does not give it, so that params.json stays Meta's
        config.hidden_dim = hidden
    return config


def _config_from_hf(raw: dict, path: Path) -> LlamaConfig:
    def refuse(key: str, why: str) -> None:
        raise ValueError(f"{path}: {key} = {raw.get(key)!r} is not supported: {why}")

    if raw.get("model_type") != "llama":
        refuse("model_type", "only llama is")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive whole number, got {raw.get(key)!r}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(key):
            refuse(key, "Llama 2 has none")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "Llama 2 has silu")
    if raw.get("head_dim") not in (None, raw["hidden_size"] // raw["num_attention_heads"]):
        refuse("head_dim", "Llama 2 has hidden_size / num_attention_heads")
    theta = raw.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 puts the base in the second
        rope = raw.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse(key, "Llama 2 has plain rotary embeddings")
        theta = rope.get("rope_theta", theta)
    fields = dict(
        dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"],
        n_heads=raw["num_attention_heads"], n_kv_heads=raw.get("num_key_value_heads"),
        norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=10_000.0 if theta is None else float(theta),  # transformers' own defaults
        max_seq_len=raw.get("max_position_embeddings", 2048),
    )  # fmt: skip
    return _with_hidden(_config(fields, path), raw["intermediate_size"])


def _config_to_hf(c: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype)."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.dim, "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_seq_len, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
        "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "rope_scaling": None,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": False, "use_cache": True,
        "initializer_range": 0.02, "pretraining_tp": 1, "torch_dtype": dtype, "dtype": dtype,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- tokenizer

# chat.py's format in Jinja; like chat.py it refuses tags inside a turn, and also the special tokens, which transformers would read as such.
CHAT_TEMPLATE = (
    "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    "{%- set turns = messages[1:] if has_system else messages -%}"
    "{%- if not turns -%}{{ raise_exception('a dialogue needs a user turn') }}{%- endif -%}"
    "{%- for m in messages -%}{%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>', bos_token, eos_token] -%}"
    "{%- if tag in m['content'] -%}"
    "{{ raise_exception('the ' + m['role'] + ' turn contains ' + tag + ', which is reserved for the format') }}"
    "{%- endif -%}{%- endfor -%}{%- endfor -%}"
    "{%- for m in turns -%}{%- if m['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    "{{ raise_exception('turns must alternate user, assistant, ...; a system turn comes first only') }}"
    "{%- elif m['role'] == 'user' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if loop.first and has_system else '' -%}"
    "{{- bos_token + '[INST] ' + system + m['content'].strip() + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'].strip() + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"
)


def _find_tokenizer(folders: Iterable[Path], config: LlamaConfig) -> Tokenizer | None:
    path = next((d / "tokenizer.model" for d in folders if (d / "tokenizer.model").is_file()), None)
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they do not belong together")
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, dir: Path) -> None:
    # From memory: the file may be in an older step's folder that is gone by now.
    (dir / "tokenizer.model").write_bytes(tokenizer.serialized())


def _write_hf_tokenizer(tokenizer: Tokenizer, max_len: int, dir: Path) -> None:
    """tokenizer.model, tokenizer_config.json, and tokenizer.json: the same BPE for those who cannot read SentencePiece.

    SentencePiece joins the neighbours whose union is the earliest entry of the vocabulary; the list of merges says the same by pairs.
    The space put before a text is a normalizer here: transformers' own Metaspace leaves it out where the text begins with a space.
    """
    _write_tokenizer(tokenizer, dir)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    specials = {"unk_token": tokenizer.unk_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {key: pieces[i] for key, i in specials.items()}
    learned = {p: i for i, p in enumerate(pieces) if i not in specials.values() and not re.fullmatch("<0x[0-9A-F]{2}>", p)}
    merges = []
    for piece in learned:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((p for p in pairs if p[0] in learned and p[1] in learned), key=lambda p: (learned[p[0]], learned[p[1]]))
    bos = names["bos_token"]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = single + [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    unspace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    _write_json({
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in sorted(specials.values())],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair,
                           "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "dropout": None, "unk_token": names["unk_token"], "fuse_unk": True, "byte_fallback": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
                  "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges},
    }, dir / "tokenizer.json")  # fmt: skip
    # PreTrainedTokenizerFast takes tokenizer.json as it stands; LlamaTokenizer would put its own normalizer in.
    _write_json({
        "tokenizer_class": "PreTrainedTokenizerFast", **names, "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "clean_up_tokenization_spaces": False, "model_max_length": max_len, "padding_side": "left", "chat_template": CHAT_TEMPLATE,
    }, dir / "tokenizer_config.json")  # fmt: skip
    _write_json(names, dir / "special_tokens_map.json")


# ------------------------------------------------------------------------------------------------------------ reading


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


def _open_safetensors(files: list[Path]) -> tuple[dict[str, Shape], Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Shapes of all tensors by name, from the headers alone, and a function that yields (name, tensor) one by one."""
    shapes: dict[str, Shape] = {}

    @contextmanager
    def opened(file: Path):
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is incomplete; copy it again")
        try:
            with safe_open(file, "pt") as f:
                yield f
        except SafetensorError as e:
            fix = "copy it again, or delete its folder to go on from an older one"
            raise ValueError(f"{file} is truncated or not a safetensors file ({e}); {fix}") from None

    for file in files:
        with opened(file) as f:
            for name in f.keys():
                if name in shapes:
                    raise ValueError(f"{file} repeats the tensor {name} of shape {list(shapes[name])} of another file in the folder")
                shapes[name] = tuple(f.get_slice(name).get_shape())

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with opened(file) as f:
                for name in f.keys():
                    yield name, f.get_tensor(name).clone()  # what get_tensor gives changes when the file does

    return shapes, read


def _read_pth(file: Path) -> dict[str, Tensor]:
    """A Meta shard, mapped from the disk; without rope.freqs, which follow from the config."""
    try:
        shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError and others for a damaged file
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise ValueError(f"{file} is truncated or not a checkpoint ({reason}); download it again") from None
    if not isinstance(shard, dict) or not all(isinstance(t, Tensor) for t in shard.values()):
        raise ValueError(f"{file} is not a dictionary of tensors; give Meta's consolidated.*.pth")
    return {name: t for name, t in shard.items() if name != "rope.freqs"}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete; copy it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # broken JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON ({e}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


# ------------------------------------------------------------------------------------------------------------ writing


def _write_own(model: nn.Module, tokenizer: Tokenizer | None, dir: Path) -> None:
    config = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):
        _write_json(config.to_params_json(), dir / "params.json")
    _write_tensors(model.state_dict(), dir / "model.safetensors")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, dir)


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(e))
        raise OSError(int(number[1]) if number else errno.EIO, f"cannot write ({e})", str(file)) from None


def _write_json(value: dict, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_OURS = re.compile(r"(params|config|generation_config|special_tokens_map|tokenizer_config|tokenizer|train_state)\.json|tokenizer\.model"
                   r"|(model|model-\d+-of-\d+|train_state)\.safetensors|model\.safetensors\.index\.json")  # fmt: skip


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling to fill, which takes the place of `target` when the block ends and vanishes if the block fails."""
    target = target.resolve()  # through a link, so that the link stays
    tmp, old = target.with_name(f".tmp-{target.name}"), target.with_name(f".old-{target.name}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    if target.is_dir():
        foreign = sorted(p.name for p in target.iterdir() if not _OURS.fullmatch(p.name))
        if foreign:  # replacing the folder would delete it
            raise ValueError(f"{target} holds {foreign[0]!r}, which is not part of a checkpoint; save to a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():  # killed between the two renames below
        os.rename(old, target)
    for leftover in (tmp, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    tmp.mkdir()
    try:
        yield tmp
        mode = tmp.stat().st_mode & 0o666  # safetensors makes its files private; a shared cluster wants the umask's mode
        for file in tmp.iterdir():
            os.chmod(file, mode)
            _sync(file)
        _sync(tmp)
        if target.exists():
            os.rename(target, old)  # from here to the next line `_settled` finds the old one
        try:
            os.rename(tmp, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _settled(dir: Path) -> Path:
    """`dir`, or its predecessor where a save was killed between its two renames. Raises FileNotFoundError if there is neither."""
    if dir.is_dir():
        return dir
    old = dir.resolve().with_name(f".old-{dir.resolve().name}")
    if old.is_dir():
        return old
    raise FileNotFoundError(f"no checkpoint folder {dir}" + (": it is a file" if dir.exists() else ""))


def _steps(dir: Path, files: tuple[str, ...]) -> list[tuple[int, Path]]:
    """(step, folder) of the step folders in `dir` that hold all of `files`, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(dir.iterdir(), reverse=True) if dir.is_dir() else ():  # "step-" sorts after ".old-step-", so is preferred
        match = re.fullmatch(r"(?:\.old-)?step-(\d{8,})", path.name)
        if match and all((path / f).is_file() for f in files):
            found.setdefault(int(match[1]), path)
    return sorted(found.items())
