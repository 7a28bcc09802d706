"""What `generate` decodes with: prefill and one token at a time, for any Llama by calling it, for small ones in far fewer calls.

Shapes: B rows of the batch, T prompt time, S time in the cache, D model, H query heads, K key-value heads, G = H/K, Hd head size, F feed-forward
size, L layers, V vocabulary.
"""
from __future__ import annotations

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


class LeanDecoder(Decoder):
    """The same arithmetic in far fewer calls. One token through a small model is microseconds of arithmetic and a millisecond of
    Python and dispatch, so calls are what there is to save, and after them memory traffic:

    * norm weights are folded into the matrices that follow, with sqrt(D), which makes RMSNorm x / hypot(|x|, sqrt(D eps)), and that is the norm of x with
      sqrt(D eps) behind it;
    * wq, wk, wv are one matrix, ordered by key-value head (its G queries, its key, its value), and w1, w3 another;
    * weights are copied to [in, out], which a CPU multiplies up to one and a half times as fast as [out, in] with few rows;
    * two threads that have a product each wait for each other less than two that share one: the wide matrices are two halves, [2, in, out/2], and q, k, v
      of an even number of rows are made by halves of the rows;
    * what a layer makes of its rows has its place, and the views into it are made once: a view costs as much as a small product;
    * a rotary turn of a pair is one complex multiplication, and values are "turned" by 1, so q, k, v turn in one call;
    * keys and values of all layers are one tensor, sliced once a step and written by one copy a layer; residual sums happen inside addmm_;
    * one query a row attends by two batched matrix products, which on a CPU take an eighth of the fused kernel's time. (Keys kept as [Hd,S] would
      multiply a little faster, but a new key would then touch Hd cache lines a row, and from a few rows on that costs more.)
    * a prompt that stands in several rows (the K samples of rejection sampling) is read once, and of the last layer only its end.
    """

    def __init__(self, model: Llama, prompts: list[list[int]], steps: int):
        c = model.config
        self.group, self.kv_heads, self.head_dim = c.n_heads // c.n_kv_heads, c.n_kv_heads, c.head_dim
        self.embed, self.eps = model.tok_embeddings.weight, (c.dim * c.norm_eps) ** 0.5
        self.blocks = []
        for block in model.layers:
            a, f = block.attention, block.feed_forward
            heads = [w.weight.view(c.n_kv_heads, -1, c.dim) for w in (a.wq, a.wk, a.wv)]  # [K, G or 1 times Hd, D] each
            heads[0] = heads[0] * c.head_dim**-0.5  # the softmax's scale
            wqkv = _fold(block.attention_norm, torch.cat(heads, dim=1).flatten(0, 1))  # [D, K(G+2)Hd]
            w13 = _fold(block.ffn_norm, torch.stack([f.w1.weight, f.w3.weight]))  # [2,D,F]
            self.blocks.append((wqkv, a.wo.weight.T.contiguous(), w13, f.w2.weight.T.contiguous()))
        halves = 2 - c.vocab_size % 2
        self.out = _fold(model.norm, model.output.weight.view(halves, -1, c.dim))  # [2,D,V/2], or [1,D,V] of an odd V
        end = min(max(map(len, prompts)) + steps, c.max_seq_len)
        turn = torch.complex(model.rope_cos[:end], model.rope_sin[:end]).unsqueeze(1)  # [S',1,Hd/2]
        turn = torch.cat([turn.expand(-1, self.group + 1, -1), torch.ones_like(turn)], dim=1)  # [S',G+2,Hd/2]
        self.turn = turn.flatten(1).repeat(1, c.n_kv_heads)  # [S', K(G+2)Hd/2]
        distinct: dict[tuple[int, ...], int] = {}
        self.copies = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompts], device=self.turn.device)  # [B] its prompt's row there
        super().__init__(model, list(distinct), steps)
        self.pad, self.logits = self.pad[self.copies], self.logits[self.copies]
        if self.ragged:
            bias = torch.zeros(self.valid.shape, device=turn.device).masked_fill_(~self.valid, float("-inf"))[self.copies]  # [B,S]
            self.bias = bias.repeat_interleave(c.n_kv_heads, dim=0).unsqueeze(1)  # [B*K,1,S]
        self.places = _Places(self, len(prompts))

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        (B, T), G, K, Hd = tokens.shape, self.group, self.kv_heads, self.head_dim  # B distinct prompts
        self.length = T
        self.kv = self.embed.new_empty(len(self.blocks), 2, len(self.copies) * K, self.max_len, Hd)  # [L,2,B*K,S,Hd]
        turn = self.turn[:T] if positions is None else self.turn[positions]  # [T, K(G+2)Hd/2], with B before it
        to = _Places(self, B * T)
        torch.index_select(self.embed, 0, tokens.flatten(), out=to.x)  # [B*T,D]
        pairs = to.pairs.view(B, T, -1)  # [B, T, K(G+2)Hd/2]
        q, k, v = to.qkv.view(B, T, K, G + 2, Hd).permute(0, 2, 3, 1, 4).split_with_sizes((G, 1, 1), dim=2)  # [B,K,G,T,Hd], [B,K,1,T,Hd] twice
        k, v = k[:, :, 0], v[:, :, 0]
        for layer, (wqkv, *others) in enumerate(self.blocks):
            to.norm()
            to.project(wqkv)
            pairs.mul_(turn)
            self.kv[layer, 0, :, :T] = k[self.copies].flatten(0, 1)
            self.kv[layer, 1, :, :T] = v[self.copies].flatten(0, 1)
            query, causal = q.flatten(1, 2), mask is None  # [B,H,T,Hd]
            if layer == len(self.blocks) - 1:  # only the end of the prompt is asked for
                last, query, causal, to = to.x.view(B, T, -1)[:, -1], query[:, :, -1:], False, _Places(self, B)
                to.x.copy_(last)
                mask = None if mask is None else mask[:, :, -1:]
            o = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=True)  # [B,H,T,Hd]
            self.rest(to, o.transpose(1, 2).reshape(len(to.x), -1), *others)
        return self.head(to)

    def rest(self, to: _Places, o: Tensor, wo: Tensor, w13: Tensor, w2: Tensor) -> None:
        """Add to the residual stream what follows attention's o [N,H*Hd] in a block."""
        to.x.addmm_(o, wo)
        to.norm()
        torch.bmm(to.normed_twice, w13, out=to.hidden)
        to.x.addmm_(F.silu(to.gate, inplace=True).mul_(to.up), w2)

    def head(self, to: _Places) -> Tensor:
        """Logits [N,V] of the residual stream."""
        to.norm()
        return torch.cat(torch.bmm(to.normed.expand(len(self.out), -1, -1), self.out).unbind(), dim=1)

    def step(self, tokens: Tensor) -> Tensor:
        length, to = self.length, self.places
        self.length += 1
        bias = self.bias[..., : length + 1] if self.ragged else None  # [B*K,1,S]
        turn = self.turn[self.positions(length) if self.ragged else length]  # [B, K(G+2)Hd/2] or [K(G+2)Hd/2]
        keys, values = self.kv.narrow(3, 0, length + 1).unbind(1)  # [L,B*K,S,Hd] each
        slots = self.kv.select(3, length).transpose(1, 2)  # [L,B*K,2,Hd]
        torch.index_select(self.embed, 0, tokens, out=to.x)  # [B,D]
        for (wqkv, *others), k, v, slot in zip(self.blocks, keys.mT.unbind(), values.unbind(), slots.unbind(), strict=True):
            to.norm()
            to.project(wqkv)
            to.pairs.mul_(turn)
            slot.copy_(to.new)
            scores = torch.bmm(to.queries, k) if bias is None else torch.baddbmm(bias, to.queries, k)  # [B*K,G,S]
            torch.bmm(scores.softmax(-1), v, out=to.heads)
            self.rest(to, to.attended, *others)
        return self.head(to)

    def positions(self, length: int) -> Tensor:
        return (length - self.pad).clamp_(max=len(self.turn) - 1)

    def select(self, rows: Tensor) -> None:
        self.pad, self.places = self.pad[rows], _Places(self, len(rows))
        rows = (rows[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=rows.device)).flatten()  # of B*K
        self.kv = self.kv[:, :, rows]
        if self.ragged:
            self.bias = self.bias[rows]


class _Places:
    """Where the lean decoder puts what it makes of N rows, layer after layer, and its views of that."""

    def __init__(self, decoder: LeanDecoder, N: int):
        (_, _, w13, _), G, K, Hd = decoder.blocks[0], decoder.group, decoder.kv_heads, decoder.head_dim
        empty, D = decoder.embed.new_empty, w13.shape[1]
        self.padded = decoder.embed.new_full((N, D + 1), decoder.eps)
        self.x = self.padded[:, :D]  # the residual stream
        self.size, self.normed = empty(N, 1), empty(N, D)
        self.normed_twice = self.normed.expand(2, -1, -1)
        self.qkv = empty(N, K * (G + 2) * Hd)
        self.halves = None if N % 2 else (self.normed.view(2, N // 2, D), self.qkv.view(2, N // 2, -1))
        self.pairs = self.qkv.view(torch.complex64)  # [N, K(G+2)Hd/2]
        self.queries, self.new = self.qkv.view(N * K, G + 2, Hd).split_with_sizes((G, 2), dim=1)  # [N*K,G,Hd], [N*K,2,Hd]
        self.heads = empty(N * K, G, Hd)
        self.attended = self.heads.view(N, -1)  # [N,H*Hd]
        self.hidden = empty(2, N, w13.shape[2])
        self.gate, self.up = self.hidden.unbind()  # [N,F] each

    def norm(self) -> None:
        """normed [N,D] is x / sqrt(|x|^2 + D eps)."""
        torch.div(self.x, torch.linalg.vector_norm(self.padded, dim=1, keepdim=True, out=self.size), out=self.normed)

    def project(self, wqkv: Tensor) -> None:
        """qkv [N, K(G+2)Hd] is normed @ wqkv."""
        if self.halves is None:
            torch.mm(self.normed, wqkv, out=self.qkv)
        else:
            torch.bmm(self.halves[0], wqkv.expand(2, -1, -1), out=self.halves[1])


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
