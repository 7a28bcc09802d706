"""Wrong answers to solutions/05_llama, of the kind that students hand in: each must score less than full marks."""

T1 = '''def kv_heads_from_size(n_params, dim, n_layers, n_heads, hidden_dim, vocab_size, tied=False):
    vocabulary = {vocabulary}
    without = vocabulary + {last_norm} + n_layers * ({attention} + 3 * dim * hidden_dim + {norms})
    kv_heads, rest = divmod(n_params - without, n_layers * {matrices} * dim * (dim // n_heads))
    if {refuse}:
        raise ValueError("no")
    return kv_heads
'''
R1 = dict(vocabulary="vocab_size * dim * (1 if tied else 2)", last_norm="dim", attention="2 * dim * dim", norms="2 * dim", matrices="2",
          refuse="rest or kv_heads < 1 or n_heads % kv_heads")  # fmt: skip

T2 = '''def windowed_flops_per_token(config, seq_len, window):
    w = min(window, seq_len)
    keys = {keys}
    matrices = {matrices}
    return {times} * (2 * matrices + {attention} * keys)
'''
R2 = dict(keys="(w * (w + 1) / 2 + (seq_len - w) * w) / seq_len", matrices="config.n_params(embeddings=False) - config.dim * (2 * config.n_layers + 1)",
          times="3", attention="4 * config.dim * config.n_layers")  # fmt: skip

T3 = '''def widest(max_params, max_cache_bytes, context, n_layers, head_dim, group, vocab_size):
    best, k = None, 1
    while True:
        c = LlamaConfig(dim={dim}, n_layers=n_layers, n_heads={heads}, n_kv_heads={kv}, vocab_size=vocab_size, {length})
        if {over}:
            break
        best, k = c, k + 1
    {none}
    return best
'''
R3 = dict(dim="k * group * head_dim", heads="k * group", kv="k", length="max_seq_len=context", none="if best is None: raise ValueError('none')",
          over="c.n_params() > max_params or context * c.kv_bytes_per_token() > max_cache_bytes")  # fmt: skip

T4 = "def output_std(dim, excess, norm_scale=1.0):\n    return {0}\n"

T5 = '''def from_hf(state, config):
    names = {names}
    ours = {{}}
    for name, tensor in state.items():
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        if name.endswith({permuted}):
            heads = {heads}
            tensor = tensor.reshape(heads, {shape}, config.dim).transpose(1, 2).reshape(-1, config.dim)
        ours[name] = tensor
    return ours
'''
R5 = dict(names='{**NAMES, "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}', permuted='("wq.weight", "wk.weight")',
          heads='config.n_heads if "wq" in name else config.n_kv_heads', shape="2, -1")  # fmt: skip

T6 = '''@torch.no_grad()
def gpt2_init(model, seed=0):
    {before}
    for name, p in model.named_parameters():
        {each}
        if p.dim() == 1:
            {norm}
            continue
        p.copy_({draw})
        if {residual}:
            p.div_({factor})
'''
R6 = dict(before="g = torch.Generator().manual_seed(seed)", each="pass", norm="p.fill_(1.0)", draw="torch.randn(p.shape, generator=g) * 0.02",
          residual='name.endswith(("wo.weight", "w2.weight"))', factor="(2 * model.config.n_layers) ** 0.5")  # fmt: skip

WRONG = {
    "t1": [
        T1.format(**R1 | dict(vocabulary="vocab_size * dim * 2")),  # tied is ignored
        T1.format(**R1 | dict(vocabulary="vocab_size * dim")),  # always tied
        T1.format(**R1 | dict(last_norm="0")),  # the last norm forgotten
        T1.format(**R1 | dict(norms="dim")),  # one norm a block
        T1.format(**R1 | dict(attention="dim * dim")),  # wo forgotten
        T1.format(**R1 | dict(matrices="1")),  # keys and not values
        T1.format(**R1 | dict(refuse="rest or kv_heads < 1")),  # four heads for six queries
        T1.format(**R1 | dict(refuse="kv_heads < 1 or n_heads % kv_heads")),  # rounds down to something that fits
        T1.format(**R1 | dict(refuse="rest or n_heads % max(kv_heads, 1)")),  # no heads at all
        T1.format(**R1).replace("return kv_heads", "return n_heads // kv_heads"),  # the group size
        T1.format(**R1).replace('raise ValueError("no")', "return None"),
    ],
    "t2": [
        T2.format(**R2 | dict(keys="w")),  # the first tokens see fewer
        T2.format(**R2 | dict(keys="(w + 1) / 2")),  # as if the window were the sequence
        T2.format(**R2 | dict(keys="(w * (w - 1) / 2 + (seq_len - w) * w) / seq_len")),  # a token does not see itself
        T2.format(**R2 | dict(keys="(w * (w + 1) / 2 + (seq_len - w) * (w + 1)) / seq_len")),  # the window and itself
        T2.format(**R2 | dict(times="1")),  # forward only
        T2.format(**R2 | dict(matrices="config.n_params()")),  # 6N
        T2.format(**R2 | dict(matrices="config.n_params(embeddings=False)")),  # norms multiply no matrix
        T2.format(**R2 | dict(attention="2 * config.dim * config.n_layers")),  # scores without weighted sums
        T2.format(**R2 | dict(attention="4 * config.n_kv_heads * config.head_dim * config.n_layers")),  # grouping saves no scores
        T2.format(**R2).replace("min(window, seq_len)", "window"),  # negative counts past the sequence
        T2.format(**R2 | dict(keys="w * (seq_len - w / 2) / seq_len")),  # integral, not sum
    ],
    "t3": [
        T3.format(**R3 | dict(over="c.n_params() > max_params")),  # the cache ignored
        T3.format(**R3 | dict(over="context * c.kv_bytes_per_token() > max_cache_bytes")),  # the parameters ignored
        T3.format(**R3 | dict(over="c.n_params() > max_params or c.kv_bytes_per_token() > max_cache_bytes")),  # one token's cache
        T3.format(**R3 | dict(over="c.n_params() >= max_params or context * c.kv_bytes_per_token() >= max_cache_bytes")),  # equal is allowed
        T3.format(**R3 | dict(over="c.n_params() > max_params or context * c.kv_bytes_per_token(4) > max_cache_bytes")),  # 32-bit cache
        T3.format(**R3 | dict(over="c.n_params(embeddings=False) > max_params or context * c.kv_bytes_per_token() > max_cache_bytes")),
        T3.format(**R3 | dict(length="max_seq_len=4096")),  # the context forgotten
        T3.format(**R3 | dict(kv="k * group")),  # no grouping
        T3.format(**R3 | dict(kv="group", heads="k * group")),  # group is not the number of key-value heads
        T3.format(**R3 | dict(none="pass")),  # None instead of ValueError
        T3.format(**R3 | dict(none="best = best or c")),  # too large rather than an error
        T3.format(**R3).replace("return best", "return c"),  # the first that does not fit
    ],
    "t4": [
        T4.format("(2 * excess / dim) ** 0.5"),  # norm_scale ignored
        T4.format("(2 * excess / dim) ** 0.5 * norm_scale"),
        T4.format("(2 * excess / dim / norm_scale) ** 0.5"),
        T4.format("(excess / dim) ** 0.5 / norm_scale"),  # variance instead of half of it
        T4.format("2 * excess / dim / norm_scale ** 2"),  # the variance
        T4.format("(2 * excess) ** 0.5 / dim / norm_scale"),  # length D, not sqrt(D)
        T4.format("2 * excess * dim ** -0.5 / norm_scale"),  # linear in the excess: right at one half
        T4.format("dim ** -0.5 / norm_scale"),  # the package's, whatever is asked
        T4.format("0.0"),
    ],
    "t5": [
        "def from_hf(state, config):\n    return buggy_from_hf(state, config)\n",
        T5.format(**R5 | dict(names="NAMES")),  # gate and up still swapped
        T5.format(**R5 | dict(heads="config.n_heads")),  # wk with the query heads
        T5.format(**R5 | dict(heads="config.n_kv_heads")),  # wq with the key heads
        T5.format(**R5 | dict(shape="-1, 2")),  # the inverse
        T5.format(**R5 | dict(permuted='("wq.weight", "wk.weight", "wv.weight")')),  # values are not turned
        T5.format(**R5 | dict(permuted='"wq.weight"')),
        T5.format(**R5 | dict(permuted='"nothing"')),  # names only
        T5.format(**R5).replace(".transpose(1, 2)", ""),  # reshaped, not permuted
        T5.format(**R5).replace("ours[name] = tensor", "ours[name] = tensor.mul_(1.0).zero_() if 'norm' in name else tensor"),
    ],
    "t6": [
        "def gpt2_init(model, seed=0):\n    buggy_init(model, seed)\n",
        T6.format(**R6 | dict(residual='name.endswith(("wo.weight", "w3.weight"))')),  # the wrong matrix
        T6.format(**R6 | dict(residual='name.endswith(("wo.weight", "w1.weight"))')),
        T6.format(**R6 | dict(residual='name.endswith("wo.weight")')),
        T6.format(**R6 | dict(residual='name.endswith("c_proj.weight")')),  # a name that nothing here has
        T6.format(**R6 | dict(residual='name.endswith(("wo.weight", "w2.weight", "output.weight"))')),
        T6.format(**R6 | dict(factor="model.config.n_layers ** 0.5")),  # two writes a block
        T6.format(**R6 | dict(factor="2 * model.config.n_layers")),  # variance, not standard deviation
        T6.format(**R6 | dict(each="g = torch.Generator().manual_seed(seed)")),  # the same numbers in every matrix
        T6.format(**R6 | dict(before="g = torch.Generator().manual_seed(0)")),  # the seed ignored
        T6.format(**R6 | dict(before="g = None")),  # nobody's seed
        T6.format(**R6 | dict(norm="pass")),  # norms as they were
        T6.format(**R6 | dict(norm="p.zero_()")),
        T6.format(**R6 | dict(draw="torch.rand(p.shape, generator=g) * 0.02")),  # uniform, above 0
    ],
}
