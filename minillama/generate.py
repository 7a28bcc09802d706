"""Generation: prefill, then one token at a time from the key-value cache, by greedy choice, temperature or top-p (nucleus).

    generate(model, [tokenizer.encode("Nila lives", bos=True)], max_new_tokens=40, temperature=0.8, top_p=0.9, seed=1)

`sample` is the whole story (tokens with their log-probabilities, and whether a stop came: what RLHF needs, sec 3.2.3);
`generate` returns its tokens alone, `stream` hands them out as they come. What one row draws depends on (seed, row, step) and its
own prompt, never on the rows beside it. Left out: beam search and speculative decoding; the paper uses neither.

Shapes: B rows still in the batch, T prompt time, S time in the cache, D model, H query heads, K key-value heads, G = H/K, Hd head
size, L layers, V vocabulary.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.model import Attention, FeedForward, KVCache, Llama, RMSNorm, TransformerBlock
from minillama.parallel import mesh as parallel
from minillama.tokenizer import Tokenizer

Stop = Iterable[int | Sequence[int]]  # token ids, or sequences of them


@dataclass
class Samples:
    """What `sample` returns, one entry a prompt: new tokens (the stop included, if one came), the log-probability of each under the
    model itself (temperature 1, no truncation), and whether a stop ended the row (else its limit did)."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    stopped: list[bool]


def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0,
    seed: int = 0, stop: Stop = (),
) -> list[list[int]]:  # fmt: skip
    """New tokens for each prompt, without the stop that ended them. Arguments and errors are those of `sample`."""
    stop = list(stop)
    out = sample(model, prompts, max_new_tokens, temperature, top_p, seed, stop, logprobs=False)
    stops = _stops(stop)
    return [row[: len(row) - _match(stops, row)] if stopped else row for row, stopped in zip(out.tokens, out.stopped, strict=True)]


def sample(
    model: Llama, prompts: list[list[int]], max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0,
    seed: int = 0, stop: Stop = (), *, first_row: int = 0, logprobs: bool = True,
) -> Samples:  # fmt: skip
    """Continue every prompt by up to max_new_tokens, to a stop, or to the end of the context (max_seq_len), whichever is first.

    temperature 0 is greedy. top_p keeps the smallest set of likeliest tokens whose mass is at least top_p. stop: token ids, or
    sequences of them that end the new tokens. first_row: number of the first prompt; sampling prompts 64.. with first_row=64
    gives what they would get in one call for all. logprobs=False leaves Samples.logprobs empty and saves time.
    Raises ValueError for an empty prompt, one longer than max_seq_len, a token outside the vocabulary, or a setting out of range.
    """
    samples = Samples([[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts))
    for _ in _run(model, prompts, samples, max_new_tokens, temperature, top_p, seed, _stops(stop), first_row, logprobs):
        pass
    return samples


def sample_many(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int, stop: Stop, batch: int = 256, *,
    top_p: float = 1.0, logprobs: bool = False,
) -> Samples:  # fmt: skip
    """`sample` for any number of prompts, `batch` rows at a time, rows of like length together. A prompt that comes twice draws twice.

    In a job of several ranks each data rank draws its share, with the numbers that one rank would draw, and all ranks return all rows.
    """
    mesh = parallel.current()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drawn = []
    for k in range(0, len(order), batch):
        mine = mesh.share(len(order[k : k + batch]))
        index = order[k : k + batch][mine]
        if index:
            part = sample(model, [prompts[i] for i in index], max_new_tokens, temperature, top_p, seed, stop, first_row=k + mine.start, logprobs=logprobs)
            drawn += zip(index, part.tokens, part.logprobs, part.stopped, strict=True)
    out = Samples([[]] * len(prompts), [[]] * len(prompts), [False] * len(prompts))
    for i, *row in mesh.gather(drawn):
        out.tokens[i], out.logprobs[i], out.stopped[i] = row
    return out


def stream(
    model: Llama, prompt: list[int], max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, stop: Stop = ()
) -> Iterator[int]:
    """The tokens of generate(model, [prompt], ...)[0], each as soon as it cannot be the beginning of a stop. Errors as `sample`."""
    stops = _stops(stop)
    hold = max((len(s) for group in stops.values() for s in group), default=1) - 1
    samples, done = Samples([[]], [[]], [False]), 0
    row = samples.tokens[0]
    for _ in _run(model, [prompt], samples, max_new_tokens, temperature, top_p, seed, stops, 0, False):
        while done < len(row) - hold and not samples.stopped[0]:
            yield row[done]
            done += 1
    yield from row[done : len(row) - (_match(stops, row) if samples.stopped[0] else 0)]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text whose concatenation is tokenizer.decode(all tokens), in linear time.

    A character outside the vocabulary comes as up to 4 byte tokens and is held back until whole. Decoding drops one space at the start
    of a text and only there, so the first piece is decoded alone and every later one behind an anchor, the letter "a".
    """
    anchor = tokenizer.encode("a")[-1:]
    skip = len(tokenizer.decode(anchor))
    pending: list[int] = []
    tail = b""  # bytes of a character that is not complete yet
    started = False

    def text() -> str:
        return tokenizer.decode(anchor + pending)[skip:] if started else tokenizer.decode(pending)

    for token in tokens:
        pending.append(token)
        piece = tokenizer.piece(token)
        if len(piece) == 6 and piece.startswith("<0x"):
            byte = int(piece[3:5], 16)
            need = 4 if 0xF0 <= byte < 0xF8 else 3 if byte >= 0xE0 else 2  # length that a lead byte announces
            if 0xC0 <= byte < 0xF8:
                tail, wanted = bytes([byte]), need
            elif tail and 0x80 <= byte < 0xC0:
                tail += bytes([byte])
            else:
                tail = b""
            if tail and len(tail) < wanted:
                continue
        tail = b""
        if out := text():
            yield out
            started = True
        if started:  # before that, pending may hold the space that decoding has dropped, and must go on holding it
            pending = []
    if pending and (out := text()):
        yield out


def log_probs(model: Llama, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Log-probability [B,T-1] of tokens[:,1:], each given those before it in its row: one training forward, with gradient.

    valid: bool [B,T], True for real tokens, which must be contiguous in a row (padding left, right or both). A result is 0 where the token
    or the one before it is padding. Raises ValueError if tokens are longer than max_seq_len.
    """
    mask = positions = None
    if valid is not None:
        tokens = tokens.masked_fill(~valid, 0)  # a pad id of -1 must not reach the embedding
        if not valid[:, 0].all():  # padding on the right alone needs nothing: causal attention never sees it
            positions = (valid.cumsum(1) - 1).clamp_(min=0)  # [B,T]
            mask = _padded_causal(valid)  # [B,1,T,T]
    logits = model(tokens, mask=mask, positions=positions)[:, :-1].float()  # [B,T-1,V]
    out = -F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(logits.shape[:2])  # [B,T-1]
    return out if valid is None else out.masked_fill(~(valid[:, 1:] & valid[:, :-1]), 0.0)


@torch.inference_mode()  # on a generator it is left at each yield, so it never leaks into the caller
def _run(
    model: Llama, prompts: list[list[int]], samples: Samples, max_new_tokens: int, temperature: float, top_p: float, seed: int,
    stops: dict, first_row: int, logprobs: bool,
) -> Iterator[None]:  # fmt: skip
    """Fill `samples`, one token a row between yields."""
    _check(model, prompts, max_new_tokens, temperature, top_p, seed)
    limits = [min(max_new_tokens, model.config.max_seq_len - len(p)) for p in prompts]
    rows = [i for i, limit in enumerate(limits) if limit > 0]  # prompt number of each row of the batch, -1 once finished
    if not rows:
        return
    steps, left = max(limits), len(rows)
    training = [m for m in model.modules() if m.training]
    try:
        if training:
            model.eval()
        decoder = (_LeanDecoder if _is_plain(model) else _Decoder)(model, [prompts[i] for i in rows], steps)
        logits = decoder.logits  # [B,V]
        uniform = _uniforms(seed, [first_row + i for i in rows], steps).to(logits.device) if temperature > 0 else None  # [steps,B,1]
        for step in range(steps):
            picked = _pick(logits, temperature, top_p, None if uniform is None else uniform[step])  # [B,1]
            if logprobs:
                scores = logits.float().log_softmax(-1).gather(1, picked)[:, 0].tolist()
            for j, token in enumerate(picked[:, 0].tolist()):  # the step's one transfer to the host
                row = rows[j]
                if row < 0:
                    continue
                out = samples.tokens[row]
                out.append(token)
                if logprobs:
                    samples.logprobs[row].append(scores[j])
                if token in stops and _match(stops, out):
                    samples.stopped[row] = True
                elif len(out) < limits[row]:
                    continue
                rows[j] = -1
                left -= 1
            yield
            if not left:
                return
            if 2 * left <= len(rows):  # finished rows ride along until half are: copying the cache at every end would cost more
                keep = torch.tensor([j for j, row in enumerate(rows) if row >= 0], device=logits.device)
                rows = [row for row in rows if row >= 0]
                picked, uniform = picked[keep], None if uniform is None else uniform[:, keep]
                decoder.select(keep)
            logits = decoder.step(picked[:, 0])
    finally:
        for m in training:
            m.training = True


def _pick(logits: Tensor, temperature: float, top_p: float, u: Tensor | None) -> Tensor:
    """Next tokens [B,1] of logits [B,V], by inverting the cumulative distribution at u [B,1] in [0,1)."""
    if temperature == 0 and logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))  # a tenth of torch's time there
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs = (logits.float() / temperature).softmax(-1)  # [B,V]
    if top_p == 1:
        cdf = probs.cumsum(-1)  # [B,V]
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # right: the first entry ABOVE u, so never one of probability 0
    return _pick_nucleus(probs, top_p, u)


def _pick_nucleus(probs: Tensor, top_p: float, u: Tensor, k: int = 64) -> Tensor:
    """As `_pick`, from the nucleus of probs [B,V]: the shortest prefix of the sorted tokens whose sum reaches top_p. It is usually
    short, and the top 64 cost a fifth of a whole sort; rows whose top k do not reach top_p are done again with more."""
    k = min(k, probs.shape[1])
    top, order = probs.topk(k)  # [B,k] each, sorted
    cdf = top.cumsum(-1)  # [B,k]
    last = torch.searchsorted(cdf, torch.full_like(u, top_p))  # [B,1] first entry that reaches top_p, k where none does
    mass = cdf.gather(1, last.clamp(max=k - 1))  # all of the row where rounding keeps the sum of all tokens below top_p
    picked = order.gather(1, torch.searchsorted(cdf, u * mass, right=True))  # [B,1]
    if k < probs.shape[1] and (last == k).any():
        short = (last[:, 0] == k).nonzero()[:, 0]
        picked[short] = _pick_nucleus(probs[short], top_p, u[short], 8 * k)
    return picked


def _uniforms(seed: int, rows: list[int], steps: int) -> Tensor:
    """One number in [0,1) for each step and row, [steps,B,1]: a pure function of (seed, row, step)."""
    table = np.stack([np.random.default_rng((seed, row)).random(steps) for row in rows], axis=1)
    return torch.from_numpy(table * (1 - 2**-22)).float().unsqueeze(-1)  # so that u * mass, rounded, stays below mass


class _Decoder:
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
            mask = _padded_causal(self.valid[:, :T])  # [B,1,T,T]
        self.logits = self.prefill(tokens, mask, positions)  # [B,V]

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Logits [B,V] behind the prompts, tokens [B,T]."""
        self.cache = KVCache(self.model.config, len(tokens), self.max_len)
        if _is_plain(self.model, limit=None):
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


class _LeanDecoder(_Decoder):
    """The same arithmetic in far fewer calls. One token through a small model is microseconds of arithmetic and a millisecond of
    Python and dispatch, so calls are what there is to save, and after them memory traffic:

    * norm weights are folded into the matrices that follow, with sqrt(D), which makes RMSNorm x / hypot(|x|, sqrt(D eps));
    * wq, wk, wv are one matrix, ordered by key-value head (its G queries, its key, its value), and w1, w3 another;
    * weights are copied to [in, out], which a CPU multiplies up to one and a half times as fast as [out, in] with few rows;
    * a rotary turn of a pair is one complex multiplication, and values are "turned" by 1, so q, k, v turn in one call;
    * keys of all layers are one tensor and values another, sliced once a step; residual sums happen inside addmm_;
    * one query a row attends by two batched matrix products, which on a CPU take an eighth of the fused kernel's time, or, with
      keys kept as [Hd,S], so that neither product has to turn a matrix over, a twelfth;
    * a prompt that stands in several rows (the K samples of rejection sampling) is read once, and of the last layer only its end.
    """

    def __init__(self, model: Llama, prompts: list[list[int]], steps: int):
        c = model.config
        self.group, self.kv_heads, self.head_dim = c.n_heads // c.n_kv_heads, c.n_kv_heads, c.head_dim
        self.embed, self.eps = model.tok_embeddings.weight, torch.tensor((c.dim * c.norm_eps) ** 0.5, device=model.rope_cos.device)
        self.blocks = []
        for block in model.layers:
            a, f = block.attention, block.feed_forward
            heads = [w.weight.view(c.n_kv_heads, -1, c.dim) for w in (a.wq, a.wk, a.wv)]  # [K, G or 1 times Hd, D] each
            heads[0] = heads[0] * c.head_dim**-0.5  # the softmax's scale
            wqkv = _fold(block.attention_norm, torch.cat(heads, dim=1).flatten(0, 1))  # [D, K(G+2)Hd]
            w13 = _fold(block.ffn_norm, torch.cat([f.w1.weight, f.w3.weight]))  # [D,2F]
            self.blocks.append((wqkv, a.wo.weight.T.contiguous(), w13, f.w2.weight.T.contiguous()))
        self.out = _fold(model.norm, model.output.weight)  # [D,V]
        end = min(max(map(len, prompts)) + steps, c.max_seq_len)
        turn = torch.complex(model.rope_cos[:end], model.rope_sin[:end]).unsqueeze(1)  # [S',1,Hd/2]
        turn = torch.cat([turn.expand(-1, self.group + 1, -1), torch.ones_like(turn)], dim=1)  # [S',G+2,Hd/2]
        self.turn = turn.flatten(1).repeat(1, c.n_kv_heads)  # [S', K(G+2)Hd/2]
        distinct = {tuple(p): None for p in prompts}
        number = {p: i for i, p in enumerate(distinct)}
        self.copies = torch.tensor([number[tuple(p)] for p in prompts], device=self.turn.device)  # [B] row of its prompt among the distinct
        super().__init__(model, list(distinct), steps)
        self.pad, self.logits = self.pad[self.copies], self.logits[self.copies]
        if self.ragged:
            bias = torch.zeros(self.valid.shape, device=turn.device).masked_fill_(~self.valid, float("-inf"))[self.copies]  # [B,S]
            self.bias = bias.repeat_interleave(c.n_kv_heads, dim=0).unsqueeze(1)  # [B*K,1,S]

    def prefill(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        (B, T), G, K, Hd = tokens.shape, self.group, self.kv_heads, self.head_dim  # B distinct prompts
        self.length = T
        self.values = self.embed.new_empty(len(self.blocks), len(self.copies) * K, self.max_len, Hd)  # [L,B*K,S,Hd]
        self.keys = self.embed.new_empty(len(self.blocks), len(self.copies) * K, Hd, self.max_len)  # [L,B*K,Hd,S]
        turn = self.turn[:T] if positions is None else self.turn[positions]  # [T, K(G+2)Hd/2], with B before it
        x = self.embed[tokens].flatten(0, 1)  # [B*T,D]
        for layer, (wqkv, wo, w13, w2) in enumerate(self.blocks):
            qkv = torch.mm(self.norm(x), wqkv).view(B, T, -1)  # [B, T, K(G+2)Hd]
            qkv.view(torch.complex64).mul_(turn)
            q, k, v = qkv.view(B, T, K, G + 2, Hd).permute(0, 2, 3, 1, 4).split_with_sizes((G, 1, 1), dim=2)  # [B,K,G,T,Hd], [B,K,1,T,Hd] twice
            q, k, v = q.flatten(1, 2), k[:, :, 0], v[:, :, 0]
            self.keys[layer, ..., :T] = k[self.copies].flatten(0, 1).mT
            self.values[layer, :, :T] = v[self.copies].flatten(0, 1)
            causal = mask is None
            if layer == len(self.blocks) - 1:  # only the end of the prompt is asked for
                x, q, causal = x.view(B, T, -1)[:, -1].contiguous(), q[:, :, -1:], False
                mask = None if mask is None else mask[:, :, -1:]
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=True)  # [B,H,T,Hd]
            self.rest(x, o.transpose(1, 2).reshape(len(x), -1), wo, w13, w2)
        return torch.mm(self.norm(x), self.out)  # [B,V]

    def norm(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).hypot_(self.eps)

    def rest(self, x: Tensor, o: Tensor, wo: Tensor, w13: Tensor, w2: Tensor) -> None:
        """Add to the residual stream x [N,D] what follows attention's o [N,H*Hd] in a block."""
        x.addmm_(o, wo)
        gate, up = torch.mm(self.norm(x), w13).chunk(2, dim=1)  # [N,F] each
        x.addmm_(F.silu(gate).mul_(up), w2)

    def step(self, tokens: Tensor) -> Tensor:
        B, G, K, Hd, length = tokens.shape[0], self.group, self.kv_heads, self.head_dim, self.length
        self.length += 1
        bias = self.bias[..., : length + 1] if self.ragged else None  # [B*K,1,S]
        turn = self.turn[self.positions(length) if self.ragged else length]  # [B, K(G+2)Hd/2] or [K(G+2)Hd/2]
        keys, values = self.keys.narrow(3, 0, length + 1).unbind(), self.values.narrow(2, 0, length + 1).unbind()  # L of [B*K,Hd,S] and [B*K,S,Hd]
        key_slots, value_slots = (x.narrow(2, length, 1).unbind() for x in (self.keys.mT, self.values))  # L of [B*K,1,Hd] each
        x = self.embed.index_select(0, tokens)  # [B,D]
        for (wqkv, *others), k, v, key_slot, value_slot in zip(self.blocks, keys, values, key_slots, value_slots, strict=True):
            qkv = torch.mm(self.norm(x), wqkv)  # [B, K(G+2)Hd]
            qkv.view(torch.complex64).mul_(turn)
            q, key, value = qkv.view(B * K, G + 2, Hd).split_with_sizes((G, 1, 1), dim=1)  # [B*K,G,Hd], [B*K,1,Hd] twice
            key_slot.copy_(key)
            value_slot.copy_(value)
            scores = torch.bmm(q, k) if bias is None else torch.baddbmm(bias, q, k)  # [B*K,G,S]
            o = torch.bmm(scores.softmax(-1), v)  # [B*K,G,Hd]
            self.rest(x, o.view(B, -1), *others)
        return torch.mm(self.norm(x), self.out)  # [B,V]

    def positions(self, length: int) -> Tensor:
        return (length - self.pad).clamp_(max=len(self.turn) - 1)

    def select(self, rows: Tensor) -> None:
        self.pad = self.pad[rows]
        rows = (rows[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=rows.device)).flatten()  # of B*K
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        if self.ragged:
            self.bias = self.bias[rows]


def _fold(norm: RMSNorm, weight: Tensor) -> Tensor:
    """The weight [N,D] of a linear behind `norm`, to follow a division by |x| alone; as [D,N]."""
    return (weight * (norm.weight * norm.weight.numel() ** 0.5)).T.contiguous()


_PLAIN = (Llama, TransformerBlock, Attention, FeedForward, RMSNorm, nn.ModuleList, nn.Linear, nn.Embedding)


def _is_plain(model: Llama, limit: int | None = 2**26) -> bool:
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


def _padded_causal(valid: Tensor) -> Tensor:
    """valid [B,T] -> bool [B,1,T,T]: key is real and not after the query. Padding sees itself, as a row of nothing would be NaN."""
    T = valid.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    return (valid[:, None, None] & causal) | torch.eye(T, dtype=torch.bool, device=valid.device)


def _stops(stop: Stop) -> dict[int, list[tuple[int, ...]]]:
    """Stop sequences under their last token, so that a step pays one dict lookup a row."""
    stops: dict[int, list[tuple[int, ...]]] = {}
    for s in stop:
        s = (s,) if isinstance(s, int) else tuple(s)
        if not s:
            raise ValueError("a stop sequence is empty; give at least one token id")
        stops.setdefault(s[-1], []).append(s)
    return stops


def _match(stops: dict[int, list[tuple[int, ...]]], row: list[int]) -> int:
    """Length of the longest stop that ends `row`, 0 if there is none."""
    return max((len(s) for s in stops.get(row[-1], ()) if tuple(row[-len(s) :]) == s), default=0)


def _check(model: Llama, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} is negative; use 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} is out of range; use 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is out of range; use a mass above 0 and at most 1 (1 keeps every token)")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; use 0 or more")
    limit, vocab = model.config.max_seq_len, model.config.vocab_size
    for i, p in enumerate(prompts):
        if not len(p):
            raise ValueError(f"prompt {i} is empty; begin it with the BOS token")
        if len(p) > limit:
            raise ValueError(f"prompt {i} has {len(p)} tokens, more than max_seq_len {limit}; cut it, or raise max_seq_len in the config")
        if min(p) < 0 or max(p) >= vocab:
            bad = next(t for t in p if not 0 <= t < vocab)
            raise ValueError(f"prompt {i} has token {bad}, outside the vocabulary of {vocab}; use the model's own tokenizer")


class _CallableModule(ModuleType):
    """`minillama.generate` is this module once it is imported and the function by interface; a callable module is both."""

    def __call__(self, *args, **kwargs) -> list[list[int]]:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
