"""Wrong answers to the tasks of unit 04, of the kind students hand in. None may reach full marks."""

FIT = """
def sequences_that_fit(config, seq_len, gpus, gpu_bytes):
    room = {room}
    heads = {heads}
    return {result}
"""
ROOM, HEADS, RESULT = (
    "gpu_bytes - 2 * config.n_params() / gpus",
    "max(1, config.n_kv_heads // gpus)",
    "max(0, math.floor(room / (2 * config.n_layers * heads * config.head_dim * 2 * seq_len)))",
)


def fit(room=ROOM, heads=HEADS, result=RESULT):
    return FIT.format(room=room, heads=heads, result=result)


GROWTH = """
def growth_exponent(draw, sizes):
    values = []
    for size in sizes:
        q, k = draw(size)
        scores = (q * k).sum(-1)
        values.append({value})
    x, y = torch.tensor(sizes, dtype=torch.float32){log}, torch.stack(values){log}
    x, y = x - {mx}, y - {my}
    return {slope}
"""


def growth(value="scores.square().mean().sqrt()", log=".log()", mx="x.mean()", my="y.mean()", slope="(x @ y / (x @ x)).item()"):
    return GROWTH.format(value=value, log=log, mx=mx, my=my, slope=slope)


MASK = """
def chunk_mask(new, past, window, pad):
    i = torch.arange({first}, {first} + new)[:, None]
    j = torch.arange(past + new)[None, :]
    pad = pad[:, None, None, None]
    seen = {seen}
    return {result}
"""


def mask(first="past", seen="(j <= i) & (j > i - window) & (j >= pad)", result="seen | ((i < pad) & (i == j))"):
    return MASK.format(first=first, seen=seen, result=result)


GROUPED = """
def grouped_attention(q, k, v):
    B, H, T, Hd = q.shape
    K = k.shape[1]
    k, v = {repeat}
    scores = q @ k.transpose(2, 3) * {scale}
    {cut}
    return weights @ v, weights
"""
REPEAT = "k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)"
CUT = 'weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)'


def grouped(repeat=REPEAT, scale="Hd**-0.5", cut=CUT):
    return GROUPED.format(repeat=repeat, scale=scale, cut=cut)


CONVERT = """
def to_grouped(wq, wk, wv, wo, n_kv_heads, head_dim, order):
    H, D = len(order), wq.shape[1]
    G = H // n_kv_heads
    {prepare}
    wq, wk, wv = wq.view(H, head_dim, D), wk.view(H, head_dim, D), wv.view(H, head_dim, D)
    {reorder}
    {wo}
    wk, wv = (w.view({view}, head_dim, D).{pool}.flatten(0, 1) for w in (wk, wv))
    return wq.flatten(0, 1), wk, wv, wo
"""


def convert(
    prepare="pass",
    reorder="wq, wk, wv = wq[order], wk[order], wv[order]",
    wo="wo = wo.view(-1, H, head_dim)[:, order].flatten(1)",
    view="n_kv_heads, G",
    pool="mean(1)",
):
    return CONVERT.format(prepare=prepare, reorder=reorder, wo=wo, view=view, pool=pool)


CONTINUE = """
def continue_layer(x, w, head_dim, cos, sin, past=None):
    B, T, _ = x.shape
    start = {start}
    q, k, v = ((x @ w[name].T).view(B, T, -1, head_dim) for name in ("wq", "wk", "wv"))
    here = slice(start, start + T)
    {turn}
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if past is not None:
        {join}
    S = k.shape[2]
    out = F.scaled_dot_product_attention(q, {attended}, enable_gqa=True, {mask})
    return out.transpose(1, 2).reshape(B, T, -1) @ w["wo"].T, (k, v)
"""


def resume(
    start="0 if past is None else past[0].shape[2]",
    turn="q, k = apply_rope(q, cos[here], sin[here]), apply_rope(k, cos[here], sin[here])",
    join="k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)",
    attended="k, v",
    mask="attn_mask=torch.ones(T, S, dtype=torch.bool).tril(S - T)",
):
    return CONTINUE.format(start=start, turn=turn, join=join, attended=attended, mask=mask)


WRONG = {
    "t1": [
        fit(room="gpu_bytes"),  # forgets the weights
        fit(heads="config.n_kv_heads / gpus"),  # cuts a head into pieces
        fit(heads="max(1, config.n_heads // gpus)"),  # query heads are not cached
        fit(result=RESULT.replace("max(0, ", "(")),  # a negative number of sequences
        fit(result=RESULT.replace("(2 * config", "(config")),  # keys without values
        fit(room="gpu_bytes * gpus - 2 * config.n_params()"),  # all the room, one GPU's heads
        fit(heads="config.n_kv_heads"),  # every GPU caches every head
        fit(result=RESULT.replace("math.floor", "math.ceil")),
        fit(result="max(0.0, room / (2 * config.n_layers * heads * config.head_dim * 2 * seq_len))"),  # not a whole number
        fit(room="gpu_bytes - 2 * config.n_params()"),  # all the weights on each GPU
        fit(heads="config.n_kv_heads // gpus or config.n_kv_heads"),  # too few to cut: every GPU copies them all
    ],
    "t2": [
        growth(value="scores.square().mean()"),  # the exponent of the mean square: twice too large
        growth(value="scores.std()"),  # about the mean: misses what queries and keys have in common
        growth(value="scores.mean().abs()"),
        growth(log=""),  # a line through the values themselves
        growth(slope="(y[-1] - y[0]).item() / (x[-1] - x[0]).item()"),  # the two ends only
        growth(mx="0", my="0"),  # a line through the origin
        growth(slope="(x @ y / (y @ y)).item()"),  # the other regression
        growth(slope="-(x @ y / (x @ x)).item()"),  # the exponent to multiply by
        growth(value="(q @ k.T)[0].square().mean().sqrt()"),  # one query with all keys
        "def growth_exponent(draw, sizes):\n    return 0.5\n",
    ],
    "t3": [
        mask(first="0"),  # the chunk's offset ignored
        mask(seen="(j < i) & (j > i - window) & (j >= pad)"),  # a query does not see itself
        mask(seen="(j <= i) & (j >= i - window) & (j >= pad)"),  # one too many
        mask(seen="(j <= i + 1) & (j > i - window) & (j >= pad)"),  # sees the next token
        mask(seen="(j <= i) & (j > i - window) & (j > pad)"),  # the first real token is lost
        mask(seen="(j <= i) & (j > i - window)"),  # looks at padding
        mask(result="seen"),  # empty rows: NaN
        mask(result="(seen | ((i < pad) & (i == j)))[:, 0]"),  # no axis for heads
        mask(seen="(j <= i) & (j > i - window) & (j >= pad) & (i >= pad)", result="seen | (i < pad)"),  # padding looks everywhere
        mask(seen="(j <= i) & (j >= pad)"),  # no window
        mask(seen="(j <= i) & (j < window) & (j >= pad)"),  # a window at the beginning
        mask(result="torch.where(seen, 0.0, float('-inf'))"),  # scores to add, not bool
    ],
    "t4": [
        grouped(repeat="k.repeat(1, H // K, 1, 1), v.repeat(1, H // K, 1, 1)"),  # h % K
        grouped(cut=CUT.replace("triu(1)", "triu(2)")),  # one token of the future
        grouped(cut=CUT.replace("triu(1)", "triu(0)")),  # not even itself
        grouped(cut=CUT.replace("triu(1)", "tril(-1)")),  # the future only
        grouped(scale="(H * Hd) ** -0.5"),  # of the model's width
        grouped(scale="1.0"),
        grouped(repeat="k.repeat_interleave(H // K, dim=1), v.repeat(1, H // K, 1, 1)"),  # half mended
        grouped(cut="weights = scores.softmax(-1).tril()"),  # cut after softmax
        grouped(cut="weights = scores.softmax(-1).tril(); weights = weights / weights.sum(-1, keepdim=True)", scale="Hd**-1"),
        grouped(cut=CUT.replace("softmax(-1)", "softmax(-2)")),  # over queries
        grouped(repeat="k.repeat_interleave(K, dim=1)[:, :H], v.repeat_interleave(K, dim=1)[:, :H]"),  # G and K mixed up
        "grouped_attention = buggy_grouped_attention\n",
    ],
    "t5": [
        convert(wo="pass"),  # the outputs still in the old order
        convert(reorder="wk, wv = wk[order], wv[order]"),  # queries too
        convert(prepare="order = [order.index(h) for h in range(H)]"),  # the inverse order
        convert(pool="sum(1)"),
        convert(view="G, n_kv_heads", pool="mean(0)"),  # strided groups
        convert(pool="select(1, 0)"),  # the first head of each group
        convert(reorder="pass", wo="pass"),  # no order at all
        convert(wo="wo = wo.view(-1, head_dim, H)[:, :, order].flatten(1)"),  # heads and features mixed up
        convert(wo="wo = wo.view(H, head_dim, -1)[order].flatten(0, 1).view(D, -1)"),  # rows instead of columns
        convert(pool="mean(1)", prepare="wq.mul_(1.0); wq += 0.0; wq[:] = wq.view(H, head_dim, D)[order].view(-1, D)", reorder="wk, wv = wk[order], wv[order]"),
        convert(wo="wo = wo.view(-1, H, head_dim)[:, order].flatten(1); wq = wq.mean(0, keepdim=True).expand(H, head_dim, D)"),
    ],
    "t6": [
        "continue_layer = buggy_continue_layer\n",
        resume(start="0"),  # every chunk begins at position 0
        resume(start="0 if past is None else past[0].shape[1]"),  # counts heads: only the mask mended
        resume(mask="is_causal=T > 1"),  # the wrong corner: only the positions mended
        resume(mask="attn_mask=torch.ones(T, S, dtype=torch.bool).tril(S - T - 1) if past is not None else torch.ones(T, S, dtype=torch.bool).tril()"),
        resume(mask="attn_mask=torch.ones(T, S, dtype=torch.bool).tril(S - T + 1)"),  # one token of the future
        resume(mask="attn_mask=None"),  # no mask at all
        resume(turn="q = apply_rope(q, cos[here], sin[here]); k = apply_rope(k, cos[:T], sin[:T])"),  # keys at the wrong place
        resume(turn="q, k, v = (apply_rope(t, cos[here], sin[here]) for t in (q, k, v))"),  # values do not turn
        resume(join="k, v = torch.cat([k, past[0]], dim=2), torch.cat([v, past[1]], dim=2)"),  # the past after the present
        resume(
            turn="q = apply_rope(q, cos[here], sin[here])",
            join="k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)",
            attended="apply_rope(k.transpose(1, 2), cos[: k.shape[2]], sin[: k.shape[2]]).transpose(1, 2), v",
        ),  # right outputs, but the cache holds unturned keys
        resume(attended="k.repeat(1, q.shape[1] // k.shape[1], 1, 1), v.repeat(1, q.shape[1] // v.shape[1], 1, 1)"),  # h % K
        resume(join="past[0][:, :, -T:] = k; k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)"),  # writes into the past
    ],
}
