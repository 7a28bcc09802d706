"""What `generate` decodes with: prefill and one token at a time, for any Llama by calling it, for small ones in far fewer calls.

Shapes: B rows of the batch, T prompt time, S time in the cache, D model, H query heads, K key-value heads, G = H/K, Hd head size, F feed-forward
size, L layers, V vocabulary.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.model import Attention, FeedForward, KVCache, Llama, RMSNorm, TransformerBlock


class Decoder:
    """Prefill and cached decoding by calling the model: right for any Llama, whatever was wrapped around its parts.

    Prompts are padded on the left, so that all rows write to the same cache slot; each row has positions of its own.
    """

    def __init__(self, model: Llama, prompts: list[list[int]], steps: int):
        self.model, device = model, model.rope_cos.device
        lengths = torch.tensor([len(p) for p in prompts])  # [B]
        T = int(lengths.max())
        self.max_len = T + steps - 1
        self.pad = (T - lengths).to(device)  # [B]
        self.ragged = bool((lengths < T).any())
        tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)  # [B,T]
        mask = positions = None
        if self.ragged:
            slots = torch.arange(self.max_len, device=device)
            self.valid = slots >= self.pad[:, None]  # [B,S]
            positions = (slots[:T] - self.pad[:, None]).clamp_(min=0)  # [B,T]
            mask = padded_causal(self.valid[:, :T])  # [B,1,T,T]
        self.logits = self.prefill(tokens, mask, positions)  # [B,V]

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Logits [B,V] behind the prompts, tokens [B,T]."""
        self.cache = KVCache(self.model.config, len(tokens), self.max_len)
        if is_plain(self.model, limit=None):
            return self.model.output(self.model.features(tokens, mask=mask, positions=positions, cache=self.cache)[:, -1])
        # what parallelism hangs on the root's forward must run, even if that gives the logits of all positions
        return self.model(tokens, mask=mask, positions=positions, cache=self.cache)[:, -1]

    def positions(self, length: int) -> Tensor:
        """Position [B] of the token that a row puts into slot `length`; a finished row that rides along stays inside the tables."""
        return (length - self.pad).clamp_(max=self.model.config.max_seq_len - 1)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B,V] after one more token [B] a row."""
        mask = positions = None
        if self.ragged:
            length = self.cache.length
            mask, positions = self.valid[:, None, None, : length + 1], self.positions(length)[:, None]  # [B,1,1,S], [B,1]
        return self.model(tokens[:, None], mask=mask, positions=positions, cache=self.cache)[:, -1]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows` [B']."""
        self.pad = self.pad[rows]
        if self.ragged:
            self.valid = self.valid[rows]
        self.cache.select(rows)


class LeanWeights:
    """A small model's weights, laid out for `LeanDecoder`, with rotary turns for `length` positions."""

    def __init__(self, model: Llama, length: int):
        c, embed = model.config, model.tok_embeddings.weight
        self.model, G, K = model, c.n_heads // c.n_kv_heads, c.n_kv_heads
        self.kv_heads, self.head_dim = K, c.head_dim
        self.embed = torch.cat([embed, embed.new_full((len(embed), 1), (c.dim * c.norm_eps) ** 0.5)], dim=1)  # [V,D+1]
        self.blocks = []
        for block in model.layers:
            a, f = block.attention, block.feed_forward
            heads = [w.weight.view(K, -1, c.dim) for w in (a.wq, a.wk, a.wv)]  # [K, G or 1 times Hd, D] each
            heads[0] = heads[0] * c.head_dim**-0.5  # the softmax's scale
            wqkv = _fold(block.attention_norm, torch.cat(heads, dim=1).flatten(0, 1))  # [D, K(G+2)Hd]
            w13 = _fold(block.ffn_norm, torch.stack([f.w1.weight, f.w3.weight]))  # [2,D,F]
            self.blocks.append((wqkv, a.wo.weight.T.contiguous(), w13, f.w2.weight.T.contiguous()))
        self.out = _fold(model.norm, model.output.weight)  # [D,V]
        turn = torch.complex(model.rope_cos[:length], model.rope_sin[:length]).unsqueeze(1)  # [S,1,Hd/2]
        turn = torch.cat([turn.expand(-1, G + 1, -1), torch.ones_like(turn)], dim=1)  # [S,G+2,Hd/2]
        self.turn = turn.flatten(1).repeat(1, K)  # [S, K(G+2)Hd/2]
        self.calls = _scripted() if embed.device.type == "cpu" else (_prefill, _step)


class LeanDecoder(Decoder):
    """The same arithmetic in far fewer calls. One token through a small model is microseconds of arithmetic and a millisecond of
    Python and dispatch, so calls are what there is to save, and after them memory traffic:

    * norm weights are folded into the matrices that follow, with sqrt(D), which makes RMSNorm x / hypot(|x|, sqrt(D eps)), and that is the norm of x with
      sqrt(D eps) behind it;
    * wq, wk, wv are one matrix, ordered by key-value head (its G queries, its key, its value), and w1, w3 a pair;
    * weights are copied to [in, out], which a CPU multiplies up to one and a half times as fast as [out, in] with few rows;
    * a rotary turn of a pair is one complex multiplication, and values are "turned" by 1, so q, k, v turn in one call;
    * keys and values of all layers are one tensor, sliced once a step and written by one copy a layer; residual sums happen inside addmm_;
    * one query a row attends by two batched matrix products, which on a CPU take an eighth of the fused kernel's time. (Keys kept as [Hd,S] would
      multiply a little faster, but a new key would then touch Hd cache lines a row, and from a few rows on that costs more.)
    * on a CPU prefill and step are TorchScript: single calls without Python's lock, so `generate` can give each core a part of the rows;
    * a prompt that stands in several rows (the K samples of rejection sampling) is read once, and of the last layer only its end.
    """

    def __init__(self, weights: LeanWeights, prompts: list[list[int]], steps: int):
        self.weights = weights
        distinct: dict[tuple[int, ...], int] = {}
        self.copies = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompts], device=weights.embed.device)  # [B] its prompt's row there
        super().__init__(weights.model, list(distinct), steps)
        self.pad, self.logits = self.pad[self.copies], self.logits[self.copies]
        if self.ragged:
            bias = torch.zeros(self.valid.shape, device=self.pad.device).masked_fill_(~self.valid, float("-inf"))[self.copies]  # [B,S]
            self.bias = bias.repeat_interleave(weights.kv_heads, dim=0).unsqueeze(1)  # [B*K,1,S]

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        w, self.length = self.weights, tokens.shape[1]
        self.kv = w.embed.new_empty(len(w.blocks), 2, len(self.copies) * w.kv_heads, self.max_len, w.head_dim)  # [L,2,B*K,S,Hd]
        turn = w.turn[: self.length] if positions is None else w.turn[positions]
        return w.calls[0](w.embed, w.blocks, w.out, self.kv, tokens, turn, mask, self.copies)

    def step(self, tokens: Tensor) -> Tensor:
        length, w = self.length, self.weights
        self.length += 1
        bias = self.bias[..., : length + 1] if self.ragged else None  # [B*K,1,S]
        turn = w.turn[self.positions(length) if self.ragged else length]  # [B, K(G+2)Hd/2] or [K(G+2)Hd/2]
        return w.calls[1](w.embed, w.blocks, w.out, self.kv, tokens, turn, bias, length)

    def positions(self, length: int) -> Tensor:
        return (length - self.pad).clamp_(max=len(self.weights.turn) - 1)

    def select(self, rows: Tensor) -> None:
        self.pad = self.pad[rows]
        K = self.weights.kv_heads
        rows = (rows[:, None] * K + torch.arange(K, device=rows.device)).flatten()  # of B*K
        self.kv = self.kv[:, :, rows]
        if self.ragged:
            self.bias = self.bias[rows]


class _Places(NamedTuple):
    """Where a layer puts what it makes of N rows, the same for all layers: views are made once, as a view costs as much as a small sum."""

    padded: Tensor  # [N,D+1], the residual stream with sqrt(D eps) behind it
    x: Tensor  # [N,D], the residual stream
    size: Tensor  # [N,1]
    normed: Tensor  # [N,D]
    twice: Tensor  # [2,N,D], normed for w1 and for w3
    hidden: Tensor  # [2,N,F]
    gate: Tensor  # [N,F], hidden[0]
    up: Tensor  # [N,F], hidden[1]


def _places(padded: Tensor, ffn: int) -> _Places:
    N, D = padded.size(0), padded.size(1) - 1
    normed, hidden = padded.new_empty([N, D]), padded.new_empty([2, N, ffn])
    gate, up = hidden.unbind()
    return _Places(padded, padded.narrow(1, 0, D), padded.new_empty([N, 1]), normed, normed.expand(2, -1, -1), hidden, gate, up)


def _norm(to: _Places) -> Tensor:
    """x / sqrt(|x|^2 + D eps) [N,D] of the residual stream."""
    return torch.div(to.x, torch.linalg.vector_norm(to.padded, dim=[1], keepdim=True, out=to.size), out=to.normed)


def _rest(to: _Places, o: Tensor, wo: Tensor, w13: Tensor, w2: Tensor) -> None:
    """Add to the residual stream what follows attention's o [N,H*Hd] in a block."""
    to.x.addmm_(o, wo)
    _norm(to)
    torch.bmm(to.twice, w13, out=to.hidden)
    to.x.addmm_(F.silu(to.gate, inplace=True).mul_(to.up), w2)


def _prefill(
    embed: Tensor, blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]], out: Tensor, kv: Tensor, tokens: Tensor, turn: Tensor, mask: Tensor | None, copies: Tensor
) -> Tensor:
    """Logits [P,V] behind the distinct prompts tokens [P,T], whose keys and values fill kv [L,2,N*K,S,Hd], row n with those of prompt copies[n]. turn
    [T or P,T, K(G+2)Hd/2]; mask [P,1,T,T], None is causal."""
    P, T, Hd, ffn = tokens.size(0), tokens.size(1), kv.size(4), blocks[0][2].size(2)
    K = kv.size(2) // len(copies)
    to = _places(embed.index_select(0, tokens.flatten()), ffn)  # P*T rows
    for i, (wqkv, wo, w13, w2) in enumerate(blocks):
        qkv = torch.mm(_norm(to), wqkv)  # [P*T, K(G+2)Hd]
        torch.view_as_complex(qkv.view(P, T, -1, 2)).mul_(turn)
        heads = qkv.view(P, T, K, -1, Hd).permute(0, 2, 3, 1, 4)  # [P,K,G+2,T,Hd]
        q, k, v = heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]  # [P,H,T,Hd], [P,K,T,Hd] twice
        kv[i, 0, :, :T] = k[copies].flatten(0, 1)
        kv[i, 1, :, :T] = v[copies].flatten(0, 1)
        last = i == len(blocks) - 1  # only the end of the prompt is asked for
        if last:
            q, mask = q[:, :, -1:], None if mask is None else mask[:, :, -1:]
            to = _places(to.padded.view(P, T, -1)[:, -1].contiguous(), ffn)  # P rows
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and not last, scale=1.0, enable_gqa=True)  # [P,H,T,Hd]
        _rest(to, o.transpose(1, 2).reshape(len(to.x), -1), wo, w13, w2)
    return torch.mm(_norm(to), out)


def _step(
    embed: Tensor, blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]], out: Tensor, kv: Tensor, tokens: Tensor, turn: Tensor, bias: Tensor | None, length: int
) -> Tensor:
    """Logits [N,V] after tokens [N] at slot `length` of kv [L,2,N*K,S,Hd]; weights as in LeanWeights, turn [N or 1, K(G+2)Hd/2], bias [N*K,1,length+1]."""
    wqkv, wo, w13, w2 = blocks[0]
    N, NK, Hd = len(tokens), kv.size(2), kv.size(4)
    to = _places(embed.index_select(0, tokens), w13.size(2))
    qkv, attended = embed.new_empty([N, wqkv.size(1)]), embed.new_empty([N, len(wo)])
    pairs, per_head, heads = torch.view_as_complex(qkv.view(N, -1, 2)), qkv.view(NK, -1, Hd), attended.view(NK, -1, Hd)
    queries, new = per_head.split_with_sizes([heads.size(1), 2], dim=1)  # [N*K,G,Hd], [N*K,2,Hd]
    keys, values = kv.narrow(3, 0, length + 1).unbind(1)  # [L,N*K,S,Hd] each
    layers = zip(blocks, keys.mT.unbind(), values.unbind(), kv.select(3, length).transpose(1, 2).unbind())  # noqa: B905 (TorchScript knows no strict)
    for (wqkv, wo, w13, w2), k, v, slot in layers:
        torch.mm(_norm(to), wqkv, out=qkv)
        pairs.mul_(turn)
        slot.copy_(new)
        scores = torch.bmm(queries, k) if bias is None else torch.baddbmm(bias, queries, k)  # [N*K,G,S]
        torch.bmm(scores.softmax(-1), v, out=heads)
        _rest(to, attended, wo, w13, w2)
    return torch.mm(_norm(to), out)


@functools.cache
def _scripted() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`_prefill` and `_step` as TorchScript. PyTorch calls that deprecated and names torch.compile in its place, which keeps Python's lock and
    compiles for longer than a call here takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_prefill), torch.jit.script(_step)


def _fold(norm: RMSNorm, weight: Tensor) -> Tensor:
    """The weight [..,N,D] of a linear behind `norm`, to follow a division by |x| alone; as [..,D,N]."""
    return (weight * (norm.weight * norm.weight.numel() ** 0.5)).mT.contiguous()


_PLAIN = (Llama, TransformerBlock, Attention, FeedForward, RMSNorm, nn.ModuleList, nn.Linear, nn.Embedding)


def is_plain(model: Llama, limit: int | None = 2**26) -> bool:
    """True if the model is made of its own unhooked modules and plain tensors (no FSDP, DTensor, adapters), and so small, in 32 bits and
    at most `limit` parameters, that the lean decoder's copies of the weights cost nothing. Without a limit, sizes do not matter."""
    for m in model.modules():
        if type(m) not in _PLAIN or m._forward_hooks or m._forward_pre_hooks:
            return False
    params = list(model.parameters())
    if any(type(p) is not nn.Parameter for p in params):
        return False
    if limit is None:
        return True
    small = sum(p.numel() for p in params) <= limit and all(p.dtype == torch.float32 for p in params)
    return small and not torch.is_autocast_enabled(params[0].device.type)


def padded_causal(valid: Tensor) -> Tensor:
    """valid [B,T] -> bool [B,1,T,T]: key is real and not after the query. Padding sees itself, as a row of nothing would be NaN."""
    T = valid.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    return (valid[:, None, None] & causal) | torch.eye(T, dtype=torch.bool, device=valid.device)
