"""What Hugging Face keeps beside the weights: config.json in and out, the tokenizer in its own format, the chat template in Jinja.

    LlamaConfig(**config_fields(json.loads(Path("Llama-2-7b-hf/config.json").read_text()), "config.json"))

For checkpoint.load_hf and save_hf, which move the weights. Private to the package.
"""
from __future__ import annotations

import re
from pathlib import Path

from minillama._files import write_json
from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer


def config_fields(raw: dict, path: Path) -> dict:
    """The fields of LlamaConfig in a config.json. Raises ValueError for any that Llama 2's architecture does not have."""

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
    return dict(
        dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"],
        n_heads=raw["num_attention_heads"], n_kv_heads=raw.get("num_key_value_heads"),
        norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=10_000.0 if theta is None else float(theta),  # transformers' own defaults
        max_seq_len=raw.get("max_position_embeddings", 2048), hidden_dim=raw["intermediate_size"],
    )  # fmt: skip


def config_json(c: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype)."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.dim, "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_seq_len, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
        "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "rope_scaling": None,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": False, "use_cache": True,
        "initializer_range": 0.02, "pretraining_tp": 1, "torch_dtype": dtype, "dtype": dtype,
    }  # fmt: skip


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


def write_tokenizer_json(tokenizer: Tokenizer, max_len: int, dir: Path) -> None:
    """tokenizer_config.json, and tokenizer.json: the same BPE as tokenizer.model's for those who cannot read SentencePiece.

    SentencePiece joins the neighbours whose union is the earliest entry of the vocabulary; the list of merges says the same by pairs.
    The space put before a text is a normalizer here: transformers' own Metaspace leaves it out where the text begins with a space.
    """
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
    write_json({
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
    write_json({
        "tokenizer_class": "PreTrainedTokenizerFast", **names, "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "clean_up_tokenization_spaces": False, "model_max_length": max_len, "padding_side": "left", "chat_template": CHAT_TEMPLATE,
    }, dir / "tokenizer_config.json")  # fmt: skip
    write_json(names, dir / "special_tokens_map.json")
