"""The hyper-parameters of Llama 2 and of every training stage, and the arithmetic that needs nothing else.

    LlamaConfig.preset("llama2-70b").n_params()      # 68_976_648_192, without torch

Field names are those of Meta's params.json. Each field's docstring is its help on the command line; it gives the unit
and says whether the value is the paper's ("Llama 2", 2023, section named) or assumed. Standard library only.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass
class LlamaConfig:
    """The architecture (sec 2.2). Defaults are the 7B's.

    Raises ValueError where heads, groups or the head size do not divide.
    """

    dim: int = 4096
    """Width of the residual stream, in features (paper)."""
    n_layers: int = 32
    """Number of transformer blocks (paper)."""
    n_heads: int = 32
    """Number of query heads (paper)."""
    n_kv_heads: int | None = None
    """Number of key-value heads; fewer than n_heads is grouped-query attention, 1 is multi-query, none given means n_heads (paper: 8 for 34B and 70B)."""
    vocab_size: int = 32_000
    """Number of tokens in the vocabulary (paper)."""
    multiple_of: int = 256
    """The hidden size of the feed-forward layer is rounded up to a multiple of this (Meta's params.json)."""
    ffn_dim_multiplier: float | None = None
    """Factor on the hidden size of the feed-forward layer before rounding (Meta's params.json: 1.3 for 70B)."""
    norm_eps: float = 1e-5
    """Epsilon inside the square root of RMSNorm (paper)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (paper)."""
    max_seq_len: int = 4096
    """Longest sequence, in tokens (paper)."""
    hidden_dim: int | None = None
    """Hidden size of the feed-forward layer, in features; none given means Meta's rule from dim, ffn_dim_multiplier and multiple_of."""

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"LlamaConfig.{name} must be a positive whole number, got {value!r}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head size dim/n_heads = {self.head_dim} must be even: rotary embeddings turn pairs of features")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer: 2/3 of 4*dim, times the multiplier, rounded up (Meta's rule)."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def n_params(self, embeddings: bool = True) -> int:
        """Exact number of parameters; without `embeddings`, only those that do matrix arithmetic for every token (output layer included)."""
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv_dim
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        output = self.vocab_size * self.dim
        return self.n_layers * block + self.dim + output + (output if embeddings else 0)

    def flops_per_token(self, seq_len: int | None = None, training: bool = True) -> float:
        """Floating-point operations for one token of a sequence of `seq_len` (default max_seq_len).

        2 for each parameter that multiplies, plus 2*2*dim*(seq_len+1)/2 a layer for causal attention scores and
        weighted sums; training counts the backward pass as twice the forward.
        """
        seq_len = seq_len or self.max_seq_len
        norms = self.dim * (2 * self.n_layers + 1)
        matmul = 2 * (self.n_params(embeddings=False) - norms)
        attention = 4 * self.dim * self.n_layers * (seq_len + 1) / 2
        return (3 if training else 1) * (matmul + attention)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that the key-value cache needs for one token (default 16-bit values)."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def to_params_json(self) -> dict:
        """Meta's params.json: fields that differ from None, under Meta's names."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def preset(cls, name: str, **overrides) -> LlamaConfig:
        """A named architecture with `overrides` applied. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


# 34B was described in the paper but never released; 70B's hidden size 28,672 comes from 4096 and 1.3 as in its params.json.
PRESETS: dict[str, dict] = {
    "ci": dict(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=1024, multiple_of=32, max_seq_len=512),
    "laptop": dict(dim=128, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=1536, multiple_of=32, max_seq_len=512),
    "gpu": dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, vocab_size=4096, multiple_of=64, max_seq_len=1024),
    "llama2-7b": dict(),
    "llama2-13b": dict(dim=5120, n_layers=40, n_heads=40),
    "llama2-34b": dict(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8),
    "llama2-70b": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
}
