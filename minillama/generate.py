"""Generation: prefill, then one token at a time from the key-value cache, by greedy choice, temperature or top-p (nucleus).

    generate(model, [tokenizer.encode("Nila lives", bos=True)], max_new_tokens=40, temperature=0.8, top_p=0.9, seed=1)

`sample` is the whole story (tokens with their log-probabilities, and whether a stop came: what RLHF needs, sec 3.2.3);
`generate` returns its tokens alone, `stream` hands them out as they come. What one row draws depends on (seed, row, step) and its
own prompt, never on the rows beside it, so a small model's rows are shared out among a CPU's cores. Left out: beam search and speculative decoding;
the paper uses neither.

Shapes: B rows still in the batch, T time, S time in the cache, V vocabulary.
"""
from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillama._decode import Decoder, LeanDecoder, LeanWeights, is_plain, padded_causal
from minillama.model import Llama
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
    _check(model, prompts, max_new_tokens, temperature, top_p, seed)
    stops = _stops(stop)

    def part(weights: LeanWeights | None, rows: range) -> Samples:
        mine = [prompts[i] for i in rows]
        samples = Samples([[] for _ in mine], [[] for _ in mine], [False] * len(mine))
        for _ in _run(model, weights, mine, samples, max_new_tokens, temperature, top_p, seed, stops, first_row + rows.start, logprobs):
            pass
        return samples

    parts = _parts(model, len(prompts))
    if len(parts) == 1:
        return part(_lean(model, prompts, max_new_tokens), parts[0])
    with _one_core_a_thread(), ThreadPoolExecutor(len(parts)) as pool:
        weights = _lean(model, prompts, max_new_tokens)
        done = list(pool.map(lambda rows: part(weights, rows), parts))
    return Samples(*(list(itertools.chain.from_iterable(getattr(p, f.name) for p in done)) for f in fields(Samples)))


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
    _check(model, [prompt], max_new_tokens, temperature, top_p, seed)
    for _ in _run(model, _lean(model, [prompt], max_new_tokens), [prompt], samples, max_new_tokens, temperature, top_p, seed, stops, 0, False):
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


def log_probs(model: Llama, tokens: Tensor, valid: Tensor | None = None, where: Tensor | None = None) -> Tensor:
    """Log-probability [B,T-1] of tokens[:,1:], each given those before it in its row: one training forward, with gradient.

    valid: bool [B,T], True for real tokens, which must be contiguous in a row (padding left, right or both). where: bool [B,T-1], the tokens of
    tokens[:,1:] that are asked for; logits of others are never made. A result is 0 where nothing is asked, and where the token or the one before it
    is padding. Raises ValueError if tokens are longer than max_seq_len.
    """
    mask = positions = None
    if valid is not None:
        tokens = tokens.masked_fill(~valid, 0)  # a pad id of -1 must not reach the embedding
        real = valid[:, 1:] & valid[:, :-1]  # [B,T-1]
        where = real if where is None else where & real
        if not valid[:, 0].all():  # padding on the right alone needs nothing: causal attention never sees it
            positions = (valid.cumsum(1) - 1).clamp_(min=0)  # [B,T]
            mask = padded_causal(valid)  # [B,1,T,T]
    if where is None:
        where = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    logits = model(tokens, mask=mask, positions=positions, where=F.pad(where, (0, 1))).float()  # [N,V]
    found = -F.cross_entropy(logits, tokens[:, 1:][where], reduction="none")  # [N]
    return torch.zeros(where.shape, device=tokens.device).masked_scatter(where, found)


@torch.inference_mode()
def _lean(model: Llama, prompts: list[list[int]], max_new_tokens: int) -> LeanWeights | None:
    """What the lean decoder needs of a model that it can decode, else None."""
    if not is_plain(model):
        return None
    longest = max(map(len, prompts), default=0)
    return LeanWeights(model, min(longest + max_new_tokens, model.config.max_seq_len))


def _parts(model: Llama, rows: int) -> list[range]:
    """`rows` prompts in as many parts as are decoded at once, each by a core of its own.

    Cores that share each small product wait for each other at each, and where they are slow to hand over, as on some virtual machines, that is half of a
    step. Products of more than about four million weights, or of a few rows, are better shared.
    """
    small = next(model.parameters()).device.type == "cpu" and is_plain(model, limit=2**22)
    parts = max(1, min(torch.get_num_threads(), rows // 8)) if small else 1
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@contextmanager
def _one_core_a_thread() -> Iterator[None]:
    """Within it, products of this thread, and of those that it starts, take one core each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()  # on a generator it is left at each yield, so it never leaks into the caller
def _run(
    model: Llama, weights: LeanWeights | None, prompts: list[list[int]], samples: Samples, max_new_tokens: int, temperature: float, top_p: float,
    seed: int, stops: dict, first_row: int, logprobs: bool,
) -> Iterator[None]:  # fmt: skip
    """Fill `samples`, one token a row between yields."""
    limits = [min(max_new_tokens, model.config.max_seq_len - len(p)) for p in prompts]
    rows = [i for i, limit in enumerate(limits) if limit > 0]  # prompt number of each row of the batch, -1 once finished
    if not rows:
        return
    steps, left, ends = max(limits), len(rows), set(limits)
    tokens = [samples.tokens[i] for i in rows]  # where each row of the batch writes, once finished to no effect
    scores = [samples.logprobs[i] for i in rows]
    training = [m for m in model.modules() if m.training]
    try:
        if training:
            model.eval()
        batch = [prompts[i] for i in rows]
        decoder = LeanDecoder(weights, batch, steps) if weights else Decoder(model, batch, steps)
        logits = decoder.logits  # [B,V]
        uniform = _uniforms(seed, [first_row + i for i in rows], steps).to(logits.device) if temperature > 0 else None  # [steps,B,1]
        for step in range(steps):
            picked = _pick(logits, temperature, top_p, None if uniform is None else uniform[step])  # [B,1]
            news = picked[:, 0].tolist()  # the step's one transfer to the host
            for row, token in zip(tokens, news, strict=True):
                row.append(token)
            if logprobs:
                for row, score in zip(scores, logits.float().log_softmax(-1).gather(1, picked)[:, 0].tolist(), strict=True):
                    row.append(score)
            if step + 1 in ends or not stops.keys().isdisjoint(news):  # else no row can end here
                for j, token in enumerate(news):
                    row = rows[j]
                    if row < 0:
                        continue
                    if token in stops and _match(stops, samples.tokens[row]):
                        samples.stopped[row] = True
                    elif step + 1 < limits[row]:
                        continue
                    rows[j], tokens[j], scores[j] = -1, [], []
                    left -= 1
            yield
            if not left:
                return
            if 2 * left <= len(rows):  # finished rows ride along until half are: copying the cache at every end would cost more
                going = [j for j, row in enumerate(rows) if row >= 0]
                rows, tokens, scores = ([column[j] for j in going] for column in (rows, tokens, scores))
                keep = torch.tensor(going, device=logits.device)
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
