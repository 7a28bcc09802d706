"""Perplexity and bits per byte of a text (sec 2.3 reports losses; bits per byte compare models with different tokenizers).

    perplexity(model, tokenizer, ["Some text."])["bits_per_byte"]
"""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from minillama.model import Llama, next_token_loss
from minillama.tokenizer import Tokenizer


@torch.no_grad()
def perplexity(model: Llama, tokenizer: Tokenizer, texts: Iterable[str], window: int | None = None, stride: int | None = None) -> dict[str, float]:
    """{"loss" nats a token, "perplexity", "bits_per_byte", "tokens", "bytes"} of `texts`; each starts with BOS and EOS is not scored.

    Long texts go through windows of `window` tokens (default max_seq_len) that move by `stride` (default half a window); each token is
    scored once, with all the context its window has. Raises ValueError if there is nothing to score.
    """
    window = min(window or model.config.max_seq_len, model.config.max_seq_len)
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be from 1 to the window of {window}")
    device = next(model.parameters()).device
    total, count, n_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        n_bytes += len(text.encode())
        done = 0  # targets scored so far: target i is token i + 1
        start = 0
        while done < len(ids) - 1:
            end = min(start + window, len(ids) - 1)
            x = torch.tensor([ids[start:end]], device=device)  # [1,T]
            y = torch.tensor([ids[start + 1 : end + 1]], device=device)
            y[:, : done - start] = -100
            loss, n = next_token_loss(model, {"tokens": x, "targets": y})
            total, count, done, start = total + float(loss), count + int(n), end, start + stride
    model.train(was_training)
    if not count:
        raise ValueError("there is no text to score")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": total / math.log(2) / n_bytes, "tokens": count, "bytes": n_bytes}
