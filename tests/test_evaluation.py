"""Statistics and perplexity against closed forms and brute force."""
import math

import pytest
import torch

from minillama.config import LlamaConfig
from minillama.evaluation.perplexity import perplexity
from minillama.evaluation.stats import rate, wilson
from minillama.model import Llama
from minillama.tokenizer import Tokenizer


def test_wilson_against_known_values():
    """Guards against the normal interval, which is empty at 0 successes; values computed by hand from the quadratic."""
    assert wilson(0, 50) == pytest.approx((0.0, 0.0713), abs=1e-4)
    assert wilson(3, 50) == pytest.approx((0.0206, 0.1622), abs=1e-4)
    assert wilson(0, 520)[1] == pytest.approx(0.0073, abs=1e-4)
    low, high = wilson(45, 50)
    for p in (low, high):  # the ends solve |p - 0.9| = z sqrt(p(1-p)/n)
        assert abs(p - 0.9) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 50), rel=1e-9)
    assert rate(5, 10)["n"] == 10
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            wilson(*bad)


def test_perplexity_scores_every_token_once(tmp_path):
    """Guards against windows that skip or repeat tokens: with windows longer than the text it equals brute force, with short ones the counts agree."""
    texts = ["The boat sails over the wide sea. " * 6, "Short.", "A lamp burns in the tall tower. " * 3]
    tokenizer = Tokenizer.train(texts, 300, tmp_path / "t.model")
    config = LlamaConfig(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=300, multiple_of=8, max_seq_len=512)
    model = Llama(config).init_weights(0).eval().requires_grad_(False)
    total, count = 0.0, 0
    for t in texts:
        ids = torch.tensor([tokenizer.encode(t, bos=True)])
        logp = model(ids).log_softmax(-1)
        total -= sum(float(logp[0, i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
        count += ids.shape[1] - 1
    whole = perplexity(model, tokenizer, texts)
    assert whole["loss"] == pytest.approx(total / count, abs=1e-5) and whole["tokens"] == count
    assert whole["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in texts), abs=1e-5)
    for window, stride in ((16, 8), (16, 16), (7, 3)):
        assert perplexity(model, tokenizer, texts, window, stride)["tokens"] == count
    with pytest.raises(ValueError):
        perplexity(model, tokenizer, [])
