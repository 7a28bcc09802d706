"""The arithmetic of the architecture against published numbers, closed forms, and the network itself."""
import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from minillama.config import PRESETS, LlamaConfig


@pytest.mark.parametrize(
    "name,params,ffn",
    [
        ("llama2-7b", 6_738_415_616, 11008),
        ("llama2-13b", 13_015_864_320, 13824),
        ("llama2-34b", 33_743_970_304, 22016),
        ("llama2-70b", 68_976_648_192, 28672),
    ],
)
def test_published_sizes(name, params, ffn):
    """The exact parameter counts and feed-forward sizes of the released checkpoints (34B: Code Llama's, the same architecture)."""
    config = LlamaConfig.preset(name)
    assert config.ffn_dim == ffn and config.n_params() == params
    assert config.n_params() - config.n_params(embeddings=False) == 32_000 * config.dim


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_n_params_is_what_the_network_has(name):
    """Counted on the meta device, where nothing is allocated, so the 70B too."""
    torch = pytest.importorskip("torch")
    from minillama import Llama

    config = LlamaConfig.preset(name)
    with torch.device("meta"):
        model = Llama(config)
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    assert config.n_params(embeddings=False) == config.n_params() - model.tok_embeddings.weight.numel()
    assert model.layers[0].feed_forward.w1.weight.shape == (config.ffn_dim, config.dim)


def test_kv_bytes():
    """2 (keys and values) x layers x kv heads x head size x bytes; grouped queries make the 70B's 8 times smaller."""
    big = LlamaConfig.preset("llama2-70b")
    assert big.kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2 == 327_680
    assert LlamaConfig.preset("llama2-70b", n_kv_heads=64).kv_bytes_per_token() == 8 * big.kv_bytes_per_token()
    assert LlamaConfig.preset("llama2-7b").kv_bytes_per_token(4) == 2 * 32 * 32 * 128 * 4


def test_kv_bytes_is_what_the_cache_takes():
    import torch

    from minillama.model import KVCache, Llama

    config = LlamaConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=50)
    cache = KVCache(config, batch=5, max_len=7)
    Llama(config).features(torch.zeros(5, 1, dtype=torch.long), cache=cache)  # memory is laid out with the first token
    assert sum(t.numel() * t.element_size() for t in cache.k + cache.v) == 5 * 7 * config.kv_bytes_per_token(4)


def test_flops_per_token():
    """6 a parameter that multiplies, a third of it without the backward pass; attention adds 2 products of the mean causal length."""
    for name in ("llama2-7b", "llama2-70b", "laptop"):
        c = LlamaConfig.preset(name)
        n = c.n_params(embeddings=False)
        assert c.flops_per_token(seq_len=1) == pytest.approx(6 * n, rel=0.005)
        assert c.flops_per_token(seq_len=1) == pytest.approx(3 * c.flops_per_token(seq_len=1, training=False))
        assert c.flops_per_token() == c.flops_per_token(seq_len=c.max_seq_len) > c.flops_per_token(seq_len=1)
        scores = sum(2 * 2 * c.dim * visible for visible in range(1, 101)) / 100 * c.n_layers  # token t sees t tokens
        linear = c.flops_per_token(100, training=False) - scores
        assert linear == 2 * (n - c.dim * (2 * c.n_layers + 1))


def test_flops_are_those_of_the_network():
    """Multiplications of the linear layers, counted by torch, for a shape where no two sizes are equal."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from minillama import Llama

    config = LlamaConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=50, multiple_of=16, max_seq_len=16)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        Llama(config)(torch.zeros(2, 9, dtype=torch.long))
    linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 4 * config.dim * config.n_layers * (9 + 1) / 2
    assert linear == 18 * (config.flops_per_token(9, training=False) - attention)


def test_ffn_rule():
    """2/3 of 4 dim, times the multiplier, rounded UP to multiple_of; hidden_dim overrides all of it."""
    assert LlamaConfig(dim=96, n_heads=6, multiple_of=32).ffn_dim == 256
    assert LlamaConfig(dim=96, n_heads=6, multiple_of=1).ffn_dim == 256
    assert LlamaConfig(dim=96, n_heads=6, multiple_of=100).ffn_dim == 300
    assert LlamaConfig(dim=96, n_heads=6, multiple_of=1, ffn_dim_multiplier=1.3).ffn_dim == 332
    assert LlamaConfig(dim=96, n_heads=6, multiple_of=100, hidden_dim=77).ffn_dim == 77


def test_defaults_and_presets():
    assert LlamaConfig() == LlamaConfig.preset("llama2-7b")
    assert LlamaConfig(n_heads=16).n_kv_heads == 16 and LlamaConfig().head_dim == 128
    assert LlamaConfig.preset("laptop", n_layers=2).n_layers == 2 and LlamaConfig.preset("laptop").n_layers == 4
    for name in PRESETS:
        config = LlamaConfig.preset(name)
        assert LlamaConfig(**json.loads(json.dumps(config.to_params_json()))) == config
        assert not [k for k, v in config.to_params_json().items() if v is None]
    assert 0.8e6 < LlamaConfig.preset("laptop").n_params() < 1.5e6


@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(dim=100, n_heads=3), "dim 100 is not divisible by n_heads 3"),
        (dict(dim=30, n_heads=6), "= 5 must be even"),
        (dict(dim=48, n_heads=6, n_kv_heads=4), "n_heads 6 is not divisible by n_kv_heads 4"),
        (dict(dim=48, n_heads=6, n_kv_heads=0), "n_kv_heads must be a positive whole number, got 0"),
        (dict(n_layers=0), "n_layers must be a positive whole number, got 0"),
        (dict(vocab_size=-5), "vocab_size must be a positive whole number, got -5"),
        (dict(dim=48.0, n_heads=6), "dim must be a positive whole number, got 48.0"),
        (dict(max_seq_len="512"), "max_seq_len must be a positive whole number, got '512'"),
        (dict(multiple_of=0), "multiple_of must be a positive whole number, got 0"),
    ],
)
def test_impossible_shapes_are_refused(kw, words):
    """Errors name the field and the value, before anything is built."""
    with pytest.raises(ValueError, match=words.replace("'", ".")):
        LlamaConfig(**kw)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'llama3-8b'.*llama2-70b"):
        LlamaConfig.preset("llama3-8b")
    with pytest.raises(TypeError):
        LlamaConfig(layers=3)


def test_every_field_tells_its_help():
    """Field docstrings are the command line's help: each field needs one, with a unit or a rule."""
    import ast
    import inspect

    import minillama.config

    tree = ast.parse(inspect.getsource(minillama.config))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "LlamaConfig").body
    told = {a.target.id for a, d in itertools.pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(d, ast.Expr)}
    assert told == {f.name for f in dataclasses.fields(LlamaConfig)}


def test_import_is_light():
    """`minillama info` must be instant: the package and the config load no torch, numpy or sentencepiece."""
    code = (
        "import sys, minillama; c = minillama.LlamaConfig.preset('llama2-70b'); print(c.n_params());"
        "print([m for m in ('torch', 'numpy', 'sentencepiece', 'einops') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["68976648192", "[]"]


def test_public_names():
    import minillama

    assert set(minillama.__all__) <= set(dir(minillama))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = minillama.nonsense
