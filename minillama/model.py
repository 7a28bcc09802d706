"""The Llama 2 network (sec 2.2), top to bottom: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, blocks, Llama.

    Llama(LlamaConfig.preset("laptop"))(tokens)      # tokens [B,T] -> logits [B,T,V]

Module names are Meta's, so a Meta checkpoint loads as it is. Rotary embeddings turn neighbouring pairs of features
(interleaved), as Meta's code does; Hugging Face's layout is a permutation of wq and wk (checkpoint.py).
Parallelism is applied from outside: nothing here knows of ranks, and head counts in shapes are inferred where a rank may
hold only some.

Shapes: B batch, T time (new tokens), S time (all tokens attended to), D dim, H query heads, K key-value heads, G = H/K,
Hd head size, F feed-forward hidden size, V vocabulary.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.config import LlamaConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in x's dtype (sec 2.2)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # [..., D]
        inv_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)  # [..., 1]
        return (x32 * inv_rms).type_as(x) * self.weight


def rope_table(head_dim: int, max_seq_len: int, theta: float = 10_000.0, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin [max_seq_len, Hd/2], fp32, of the angles position * theta^(-2i/Hd) (sec 2.2; Su et al. 2021)."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)  # [Hd/2]
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), inv_freq)  # [S, Hd/2]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of x [B,T,heads,Hd] by its position's angle; cos, sin [T or B,T, 1, Hd/2]."""
    pairs = x.float().unflatten(-1, (-1, 2))  # [B,T,heads,Hd/2,2]
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic and has no complex kernels
        even, odd = pairs.unbind(-1)  # [B,T,heads,Hd/2] each
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same numbers in one pass: (even + i odd) * (cos + i sin), several times faster uncompiled
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float()))
    return turned.flatten(-2).type_as(x)


class KVCache:
    """Keys and values of every layer for up to `max_len` tokens: k, v [B,K,max_len,Hd] a layer, filled from the left.

    A layer's memory is laid out at its first `append`, in the heads, dtype and device of what comes: a tensor-parallel rank holds its own heads
    only. `length` tokens are filled. Bytes: batch * max_len * config.kv_bytes_per_token(bytes a value).
    """

    def __init__(self, config: LlamaConfig, batch: int, max_len: int):
        self.batch, self.max_len, self.length = batch, max_len, 0
        self.k: list[Tensor | None] = [None] * config.n_layers
        self.v: list[Tensor | None] = [None] * config.n_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B,K,T,Hd] after the filled part; return all keys and values so far, [B,K,S,Hd]."""
        if self.k[layer] is None:
            shape = (self.batch, k.shape[1], self.max_len, k.shape[3])
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` (finished ones leave)."""
        self.batch = len(rows)
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Causal attention of q [B,H,T,Hd] over k, v [B,K,T,Hd], block by block of queries, each with the keys up to its end only: [B,H,T,Hd].

    bias: [B or 1, H or 1, T, T], added to the scores: very negative where a query may not look, later tokens among them. Of the T*T scores those to the
    right of a block are never made, up to half of them, which a kernel that is handed a mask cannot leave out. It keeps the softmax of every layer for
    the backward pass, so it is for short rows.
    """
    (B, H, T, Hd), K = q.shape, k.shape[1]
    size = max(64, -(-T // 8))  # smaller blocks make fewer scores, in slower products
    q = q.reshape(B, K, H // K, T, Hd) * Hd**-0.5  # [B,K,G,T,Hd]
    bias = bias.unflatten(1, (K, -1) if bias.shape[1] > 1 else (1, 1))  # [.., K or 1, G or 1, T, T]
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        rows = q[:, :, :, start:end].flatten(2, 3)  # [B,K,G*t,Hd]: the queries of a group below each other, so no key is copied G times
        scores = (rows @ k[:, :, :end].transpose(2, 3)).unflatten(2, (-1, end - start))  # [B,K,G,t,end]
        weights = (scores + bias[..., start:end, :end]).softmax(-1)  # [B,K,G,t,end]
        blocks.append((weights.flatten(2, 3) @ v[:, :, :end]).unflatten(2, (-1, end - start)))  # [B,K,G,t,Hd]
    return torch.cat(blocks, dim=3).flatten(1, 2)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (sec 2.2, A.2.1). Query head h reads key-value head h // G."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, -1, self.head_dim)  # [B,T,H,Hd]
        k = self.wk(x).view(B, T, -1, self.head_dim)  # [B,T,K,Hd]
        v = self.wv(x).view(B, T, -1, self.head_dim)  # [B,T,K,Hd]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,heads,T,Hd]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B,K,S,Hd]
        if T == 1:
            # One new token: the G queries of a group stand where time would, so no key is copied G times.
            H, K = q.shape[1], k.shape[1]
            out = F.scaled_dot_product_attention(q.view(B, K, H // K, self.head_dim), k, v, attn_mask=mask)
            return self.wo(out.reshape(B, 1, -1))
        if mask is not None and mask.is_floating_point():
            out = attention_in_blocks(q, k, v, mask)  # [B,H,T,Hd]
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)  # [B,H,T,Hd]
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), D -> F -> D (sec 2.2; Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x)) (sec 2.2)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)  # [B,T,D]
        return x + self.feed_forward(self.ffn_norm(x))  # [B,T,D]


class Llama(nn.Module):
    """Llama 2 (sec 2.2): token embeddings, n_layers blocks, a last norm, an untied output layer.

    Weights are drawn by `init_weights`; under `torch.device("meta")` nothing is allocated and parameter counts are exact. Rows of up to
    `longest_in_blocks` tokens that are trained on a CPU go through `attention_in_blocks`, all others through PyTorch's fused kernels.
    """

    longest_in_blocks = 512

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def features(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Final normed states [B,T,D] of tokens [B,T].

        mask: bool, broadcastable to [B,H,T,S], True where a query may look; it never sees later tokens, whatever the mask says. positions: [T] or
        [B,T], default the cache's length onwards; given ones must be below max_seq_len (IndexError, or undefined on a GPU). cache: appended to, in
        place. Raises ValueError past max_seq_len or the cache's room.
        """
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if cache is not None and start + T > cache.max_len:
            raise ValueError(f"{start} + {T} tokens do not fit the key-value cache of {cache.max_len}; make it longer")
        if positions is None:
            if start + T > self.config.max_seq_len:
                raise ValueError(f"{start + T} tokens are more than max_seq_len {self.config.max_seq_len}; raise it in the config or cut the input")
            cos, sin = self.rope_cos[start : start + T], self.rope_sin[start : start + T]  # [T,Hd/2]
        else:
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]  # [T or B,T, Hd/2]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [.., 1, Hd/2]
        x = self.tok_embeddings(tokens)  # [B,T,D]
        in_blocks = x.device.type == "cpu" and torch.is_grad_enabled() and cache is None and T <= self.longest_in_blocks
        if T > 1 and (mask is not None or start > 0 or in_blocks):  # else is_causal says it, which with a filled cache would align to the wrong corner
            causal = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
            mask = causal if mask is None else mask & causal
            if in_blocks:  # [B or 1, H or 1, T, T], added to scores; not -inf: a padding token that may look nowhere is a mean of anything, not NaN
                mask = x.new_zeros(()).masked_fill(~mask, torch.finfo(x.dtype).min).expand(torch.broadcast_shapes(mask.shape, (1, 1, T, T)))
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)  # [B,T,D]
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, cache: KVCache | None = None,
        where: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B,T,V] of tokens [B,T]; arguments as in `features`. where: bool [B,T], the positions wanted, whose logits come as [N,V]."""
        features = self.features(tokens, mask=mask, positions=positions, cache=cache)
        return self.output(features if where is None else features[where])

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Llama:
        """Draw every weight from a seed and refill the rotary tables; returns self.

        The paper gives no initialisation. Here: normal with std 1/sqrt(fan in) (1/sqrt(dim) for embeddings), the two projections that
        write to the residual stream (wo, w2) scaled down by sqrt(2 * n_layers) as in GPT-2, norms 1. Each tensor has a
        generator of its own, keyed by its name, so a rank that holds only some tensors draws the same values.
        """
        from zlib import crc32

        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            std = p.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= (2 * self.config.n_layers) ** 0.5
            g = torch.Generator().manual_seed(crc32(f"{seed}:{name}".encode()))
            p.copy_(torch.randn(p.shape, generator=g) * std)
        self.reset_rope()
        return self

    @torch.no_grad()
    def reset_rope(self) -> None:
        """Recompute the rotary tables on the device of the weights (needed after `to_empty`)."""
        c = self.config
        self.rope_cos, self.rope_sin = rope_table(c.head_dim, c.max_seq_len, c.rope_theta, self.norm.weight.device)


def document_mask(doc_ids: Tensor) -> Tensor:
    """Causal mask inside documents: doc_ids [B,T] -> bool [B,1,T,T], True where query and key share a document and key <= query."""
    T = doc_ids.shape[1]
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]  # [B,1,T,T]
    return same & torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()


def next_token_loss(model: Llama, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies in nats over the valid targets, and their number (sec 2.2; sec 3.1 with answers only as targets).

    batch: tokens [B,T]; targets [B,T], the token after each position, -100 where nothing is trained; doc_ids [B,T] if rows hold several
    documents that must not see each other. Pretraining and SFT differ only in the targets.
    """
    mask = document_mask(batch["doc_ids"]) if "doc_ids" in batch else None
    logits = model(batch["tokens"], mask=mask)  # [B,T,V]
    targets = batch["targets"]  # [B,T]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, (targets != -100).sum()
