"""The network against transformers, complex numbers, loops in fp64 and closed forms."""
import math

import pytest
import torch
import torch.nn.functional as F

from minillama.checkpoint import load_hf, save_hf
from minillama.config import PRESETS, LlamaConfig
from minillama.model import Attention, FeedForward, KVCache, Llama, RMSNorm, apply_rope, document_mask, next_token_loss, rope_table

GQA = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, multiple_of=16, vocab_size=97, max_seq_len=64)  # G = 3 differs from K = 2
MQA = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=1, multiple_of=16, vocab_size=97, max_seq_len=64)
MHA = dict(dim=32, n_layers=2, n_heads=4, multiple_of=16, vocab_size=97, max_seq_len=64)


def make(kind, seed=0, **changes):
    """A model with norms that are not 1, so that a norm in the wrong place shows."""
    model = Llama(LlamaConfig(**{**kind, **changes})).init_weights(seed).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(0.5 + torch.rand(p.shape, generator=g))
    return model


def tokens(*shape, seed=0, vocab=97):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-5):
    """Equal to `tol`, where the reference varies far more than that: a zero or shifted answer fails."""
    assert a.shape == b.shape
    assert b.std() > 1000 * tol and (a - b).abs().max() < tol, f"differ by {(a - b).abs().max():.1e}"


# ---------------------------------------------------------------------------------------------------------- reference


def hf_model(kind, length=64):
    transformers = pytest.importorskip("transformers")
    c = LlamaConfig(**{**kind, "max_seq_len": length})
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, max_position_embeddings=length, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, initializer_range=0.15,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [GQA, MQA, MHA])
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, kind):
    """Rotary pairs of the wrong layout, a query head that reads the wrong key head, a swapped w1 and w3: each way of converting."""
    hf = hf_model(kind)
    hf.save_pretrained(tmp_path / "theirs")
    x = tokens(2, 37)
    close(load_hf(tmp_path / "theirs")[0](x), hf(x).logits)
    import transformers

    model = make(kind)
    save_hf(model, None, tmp_path / "ours")
    close(model(x), transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")(x).logits)


@torch.no_grad()
def test_logits_equal_transformers_at_4096_tokens(tmp_path):
    """Rotary angles computed or stored in low precision drift with the position; small tests never see far ones."""
    hf = hf_model({**GQA, "n_layers": 1}, length=4096)
    hf.save_pretrained(tmp_path / "hf")
    model = load_hf(tmp_path / "hf")[0]
    x = tokens(1, 4096)
    ours, theirs = model(x), hf(x).logits
    close(ours, theirs)
    close(ours[:, -50:], theirs[:, -50:])


@pytest.mark.parametrize("kind", [GQA, MQA, MHA])
@pytest.mark.parametrize("length", [2, 64, 150, 520])
def test_training_equals_transformers(tmp_path, kind, length):
    """Attention in blocks, which only training on a CPU uses: a block's last rows, its border, a last block that is not full, documents that end inside
    one. Past 512 tokens there are no blocks."""
    hf = hf_model(kind, length=600)
    hf.save_pretrained(tmp_path)
    model, x = load_hf(tmp_path)[0].train(), tokens(2, length)
    ids = torch.stack([torch.arange(length) * 3 // length, torch.arange(length) // 50])
    for mask in (None, document_mask(ids)):
        ours, theirs = model(x, mask=mask), hf(x, attention_mask=mask).logits
        close(ours, theirs)
        weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / ours.numel() ** 0.5
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        close(model.tok_embeddings.weight.grad, hf.model.embed_tokens.weight.grad)
        close(model.layers[0].attention.wv.weight.grad, hf.model.layers[0].self_attn.v_proj.weight.grad)
        model.zero_grad(), hf.zero_grad()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(70, 70), (2, 1, 1, 70), (1, 6, 70, 70), (2, 6, 70, 70)])
def test_masks_of_any_shape_and_never_the_future(tmp_path, trained, shape):
    """A mask for all rows, all heads or all queries read as another; one that shows later tokens believed."""
    hf = hf_model(GQA, length=80)
    hf.save_pretrained(tmp_path)
    model, x = load_hf(tmp_path)[0], tokens(2, 70)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[..., 0] = True  # a query that may look nowhere has no answer
    with torch.set_grad_enabled(trained):
        got = model(x, mask=mask)
    assert got.requires_grad == trained
    full = mask.expand(2, 6, 70, 70) & torch.ones(70, 70, dtype=torch.bool).tril()
    close(got, hf(x, attention_mask=full).logits)


def test_padding_that_sees_nothing_is_finite():
    """-inf everywhere in a row is 0/0: NaN in a padding token reaches every gradient."""
    model, x = make(GQA), tokens(2, 9)
    mask = (torch.arange(9) >= 4).expand(2, 1, 1, 9)  # the first four are padding: they see nothing at all
    logits = model(x, mask=mask)
    logits[:, 4:].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        close(logits[:, 4:].detach(), model(x[:, 4:]))


# --------------------------------------------------------------------------------------------------- cache and masks


@pytest.mark.parametrize("kind", [GQA, MQA, MHA])
@pytest.mark.parametrize("chunks", [[29], [1] * 29, [5, 1, 1, 9, 2, 1, 10], [1, 28], [20, 9]])
@torch.no_grad()
def test_cached_equals_uncached(kind, chunks):
    """is_causal aligns to the upper left corner: a chunk of several tokens after a filled cache would see the wrong keys."""
    model, x = make(kind), tokens(3, 29)
    want = model(x)
    cache = KVCache(model.config, 3, 29)
    parts = [model(part, cache=cache) for part in x.split(chunks, dim=1)]
    assert cache.length == 29
    close(torch.cat(parts, 1), want)


@torch.no_grad()
def test_cache_select_and_room():
    """Rows that finished leave the batch: the others must keep their own keys; a full cache must not overwrite in silence."""
    model, x = make(GQA), tokens(4, 12)
    cache = KVCache(model.config, 4, 12)
    model(x[:, :7], cache=cache)
    rows = torch.tensor([3, 1])
    cache.select(rows)
    close(model(x[rows, 7:], cache=cache), model(x)[rows, 7:])
    with pytest.raises(ValueError, match="12 \\+ 1 tokens do not fit the key-value cache of 12"):
        model(x[rows, :1], cache=cache)


@pytest.mark.parametrize("kind", [GQA, MHA])
@torch.no_grad()
def test_left_padded_rows_equal_single_rows(kind):
    """Padding that is attended to, or positions that count it: each row of a ragged batch must be what it is alone, cached steps too."""
    model, lengths, steps = make(kind), [11, 4, 1, 7], 3
    rows = [tokens(n + steps, seed=n) for n in lengths]
    T = max(lengths)
    x = torch.full((4, T), 5)
    real = torch.zeros(4, T + steps, dtype=torch.bool)
    for i, n in enumerate(lengths):
        x[i, T - n :] = rows[i][:n]
        real[i, T - n :] = True
    positions = (real.cumsum(1) - 1).clamp(min=0)  # [B, T+steps]
    causal = torch.ones(T + steps, T + steps, dtype=torch.bool).tril()
    mask = real[:, None, None, :] & causal  # [B,1,T+steps,T+steps]
    mask = mask | torch.eye(T + steps, dtype=torch.bool)  # a padding query must see something, or its softmax is 0/0
    cache = KVCache(model.config, 4, T + steps)
    logits = model(x, mask=mask[:, :, :T, :T], positions=positions[:, :T], cache=cache)
    assert logits.isfinite().all()
    alone = [model(r[None])[0] for r in rows]
    for i, n in enumerate(lengths):
        close(logits[i, T - n :], alone[i][:n])
    for s in range(steps):
        step = torch.stack([r[n + s] for r, n in zip(rows, lengths, strict=True)])[:, None]
        t = T + s
        logits = model(step, mask=mask[:, :, t : t + 1, : t + 1], positions=positions[:, t : t + 1], cache=cache)
        for i, n in enumerate(lengths):
            close(logits[i, 0], alone[i][n + s])


@torch.no_grad()
def test_document_mask_blocks_other_documents():
    """A packed row that lets a document see the one before it: attention then crosses a border that no text has."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 7]])
    want = torch.tensor([[[ids[b, q] == ids[b, k] and k <= q for k in range(9)] for q in range(9)] for b in range(2)])
    assert torch.equal(document_mask(ids), want[:, None])
    model, x = make(GQA), tokens(2, 9)
    logits = model(x, mask=document_mask(ids))
    # Rotary positions are relative: a document in the middle of a row is what it is at the start of one.
    for b, start, end in [(0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 8), (1, 8, 9)]:
        close(logits[b, start:end], model(x[b : b + 1, start:end])[0])
    assert (logits[0, 3:] - model(x)[0, 3:]).abs().max() > 0.1  # and the border does matter


@torch.no_grad()
def test_causality():
    """A model that sees the token it must predict has a perfect loss and no use."""
    model, x = make(GQA), tokens(1, 20)
    changed = x.clone()
    changed[0, 12] = (x[0, 12] + 1) % 97
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and ((a - b)[0, 12:].abs().amax(-1) > 1e-3).all()


# --------------------------------------------------------------------------------------------------------- parts


def test_rope_against_complex_numbers():
    """Half-split instead of interleaved pairs, the wrong sign, or a table that starts at 1."""
    Hd, theta, start = 10, 500.0, 13
    x = torch.randn(2, 7, 3, Hd, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(Hd, 40, theta)
    positions = torch.stack([torch.arange(start, start + 7), torch.tensor([0, 3, 1, 39, 20, 20, 5])])
    got = apply_rope(x, cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2))
    for b in range(2):
        for t in range(7):
            for h in range(3):
                for i in range(Hd // 2):
                    z = complex(x[b, t, h, 2 * i], x[b, t, h, 2 * i + 1])
                    angle = int(positions[b, t]) * theta ** (-2 * i / Hd)
                    z *= complex(math.cos(angle), math.sin(angle))
                    assert abs(z - complex(got[b, t, h, 2 * i], got[b, t, h, 2 * i + 1])) < 1e-5
    close(apply_rope(x[:1], cos[start : start + 7, None], sin[start : start + 7, None]), got[:1], 1e-6)


def test_rms_norm():
    """LayerNorm's mean, epsilon outside the root, or arithmetic in bf16."""
    g = torch.Generator().manual_seed(0)
    x, norm = torch.randn(5, 3, 24, generator=g) * 0.01 + 0.02, RMSNorm(24, eps=1e-4)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(24, generator=g) + 0.5)
    w = norm.weight.double().tolist()

    def loop(row):
        rms = math.sqrt(sum(v * v for v in row) / len(row) + 1e-4)
        return [v / rms * wi for v, wi in zip(row, w, strict=True)]

    want = torch.tensor([[loop(row) for row in rows] for rows in x.double().tolist()], dtype=torch.float64)
    close(norm(x).double(), want, 1e-6)
    # bf16 in, bf16 out, fp32 between: rounded once, at the end. Rounding the squares or 1/rms too moves a third of the values.
    x = (torch.randn(64, 128, generator=g) * 3).bfloat16()
    out = RMSNorm(128).to(torch.bfloat16)(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert out.dtype == torch.bfloat16 and (out == exact.bfloat16()).float().mean() > 0.99


@torch.no_grad()
def test_swiglu_by_loops():
    """silu on the wrong branch (w3 instead of w1), or gelu."""
    ffn = FeedForward(5, 7)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    w1, w2, w3 = (w.weight.copy_(torch.randn(w.weight.shape, generator=g)) for w in (ffn.w1, ffn.w2, ffn.w3))
    want = torch.zeros(2, 5)
    for b in range(2):
        for f in range(7):
            a, c = (sum(float(w[f, d] * x[b, d]) for d in range(5)) for w in (w1, w3))
            for d in range(5):
                want[b, d] += w2[d, f] * (a / (1 + math.exp(-a))) * c
    close(ffn(x), want)


@pytest.mark.parametrize("kind", [GQA, MHA])
@torch.no_grad()
def test_attention_by_loops(kind):
    """Query head h must read key head h // G, not h % K: with G = K, or one group, the two cannot be told apart."""
    c = LlamaConfig(**kind)
    attention = Attention(c, 0)
    g = torch.Generator().manual_seed(0)
    for p in attention.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    x = torch.randn(1, 6, c.dim, generator=g)
    cos, sin = rope_table(c.head_dim, 20)
    cos, sin = cos[9:15, None], sin[9:15, None]
    q = apply_rope(attention.wq(x).view(1, 6, c.n_heads, c.head_dim), cos, sin)[0]
    k = apply_rope(attention.wk(x).view(1, 6, c.n_kv_heads, c.head_dim), cos, sin)[0]
    v = attention.wv(x).view(6, c.n_kv_heads, c.head_dim)
    heads = torch.zeros(6, c.n_heads, c.head_dim)
    for t in range(6):
        for h in range(c.n_heads):
            group = h // (c.n_heads // c.n_kv_heads)
            scores = [math.exp(float(q[t, h] @ k[s, group]) / math.sqrt(c.head_dim)) for s in range(t + 1)]
            for s in range(t + 1):
                heads[t, h] += scores[s] / sum(scores) * v[s, group]
    close(attention(x, cos, sin, None, None)[0], attention.wo(heads.flatten(1)))


# -------------------------------------------------------------------------------------------- counts, limits, weights


def test_parameter_counts():
    """A hidden size off by one rounding, or a formula that forgets the norms: `info` and `plan` work from it."""
    llama2 = {"llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-34b": 33_743_970_304, "llama2-70b": 68_976_648_192}
    for name in PRESETS:
        config = LlamaConfig.preset(name)
        with torch.device("meta"):
            model = Llama(config)
        assert sum(p.numel() for p in model.parameters()) == config.n_params() == llama2.get(name, config.n_params())
        assert config.n_params(embeddings=False) == config.n_params() - model.tok_embeddings.weight.numel()
    assert set(llama2) < set(PRESETS)
    assert LlamaConfig.preset("llama2-70b").ffn_dim == 28_672 and LlamaConfig.preset("llama2-7b").ffn_dim == 11_008


@torch.no_grad()
def test_past_max_seq_len():
    """Past the rotary table a slice is short and broadcasts, or an index fails deep inside: the error must come first, with numbers."""
    model = make(GQA, max_seq_len=16)
    assert model(tokens(1, 16)).shape == (1, 16, 97)
    with pytest.raises(ValueError, match="17 tokens are more than max_seq_len 16"):
        model(tokens(1, 17))
    cache = KVCache(model.config, 1, 40)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(tokens(1, 1), cache=cache)
    assert cache.length == 16


def test_init_weights_is_deterministic():
    """Weights that follow from how much random state was used before, or from the order of the tensors: no run could be repeated."""
    torch.manual_seed(5)
    a = Llama(LlamaConfig(**GQA)).init_weights(3)
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        b = Llama(LlamaConfig(**GQA))
    b = b.to_empty(device="cpu").init_weights(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())
    with torch.no_grad():
        assert torch.equal(a(tokens(1, 9)), b(tokens(1, 9)))  # the rotary tables came back too
    c = Llama(LlamaConfig(**GQA)).init_weights(4)
    matrices = [n for n, p in a.named_parameters() if p.dim() == 2]
    assert all(not torch.equal(a.state_dict()[n], c.state_dict()[n]) for n in matrices)
    assert len({float(a.state_dict()[n].flatten()[0]) for n in matrices}) == len(matrices)  # each tensor has its own stream
    assert not any(torch.allclose(a.layers[0].attention.wk.weight, w.weight) for w in (a.layers[1].attention.wk, a.layers[0].attention.wv))
    big = Llama(LlamaConfig(dim=128, n_layers=8, n_heads=2, vocab_size=300, multiple_of=64)).init_weights()
    block, narrow = big.layers[3], 128**-0.5
    stds = [(big.tok_embeddings, narrow), (block.attention.wq, narrow), (block.attention.wo, narrow / 4), (big.output, narrow),
            (block.feed_forward.w2, big.config.ffn_dim**-0.5 / 4)]  # fmt: skip
    for module, std in stds:
        w = module.weight.detach()
        assert abs(float(w.std()) / std - 1) < 0.03 and abs(float(w.mean())) < 0.03 * std


def test_next_token_loss():
    """A mean where a sum belongs, ignored targets that count, or documents of a packed row that see each other."""
    model, x = make(GQA), tokens(2, 9)
    targets = x.roll(-1, 1)
    targets[:, -1] = -100
    targets[1, :5] = -100
    doc_ids = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    loss, count = next_token_loss(model, {"tokens": x, "targets": targets, "doc_ids": doc_ids})
    with torch.no_grad():
        rows = [(model(x[:1])[0], targets[0]), (model(x[1:, 4:])[0], targets[1, 4:])]
    want = -sum(float(F.log_softmax(logits, -1)[t, y]) for logits, ys in rows for t, y in enumerate(ys) if y != -100)
    assert int(count) == 11 and abs(float(loss.detach()) - want) < 1e-4 and want > 10
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
