"""Wrong answers to the exercises of 10_scale, of the kind that students make: each must score less than full marks."""
from tiny import but as _but

_HEADS = """def heads_of(rank, ranks, n_heads, n_kv_heads):
    if n_heads % ranks or (ranks % n_kv_heads and n_kv_heads % ranks):
        raise ValueError("does not divide")
    group, each = n_heads // n_kv_heads, n_heads // ranks
    queries = list(range(rank * each, (rank + 1) * each))
    keys = sorted({h // group for h in queries})
    copies = max(1, ranks // n_kv_heads)
    first = rank - rank % copies
    return queries, keys, list(range(first, first + copies))
"""
_REPORT = """def report(c, tokens, gpu_hours, peak, watts, pue, kg_per_kwh):
    possible = gpu_hours * 3600 * peak
    useful = c.flops_per_token() * tokens
    again = (c.flops_per_token(training=False) - 2 * c.vocab_size * c.dim) * tokens
    kwh = gpu_hours * watts / 1000
    return {"mfu": useful / possible, "hfu": (useful + again) / possible, "kwh": kwh, "tco2e": kwh * pue * kg_per_kwh / 1000}
"""
_PEAK = """def peak_bytes(c, ranks, tensor, rows):
    vocabulary = 2 * c.vocab_size * c.dim
    block = (c.n_params() - vocabulary) / c.n_layers
    positions = rows * c.max_seq_len
    state = 16 * c.n_params() / ranks
    gathered = 2 * (vocabulary + 2 * block) / tensor
    inputs = 2 * c.n_layers * positions * c.dim / tensor
    logits = (2 + 4 + 4) * positions * c.vocab_size / tensor
    return state + gathered + inputs + logits


def fewest(c, tensor, rows, limit, worlds):
    return min((n for n in worlds if peak_bytes(c, n, tensor, rows) <= limit), default=None)
"""
_LOSS = """def padded_loss(logits, targets, rank, vocab):
    V = logits.shape[-1]
    words = rank * V + torch.arange(V)
    logits = logits.masked_fill(words >= vocab, -torch.inf)
    top = yield maximum, logits.amax(-1)
    weights = (logits - top[:, None]).exp()
    total = yield g, weights.sum(-1)
    hit = words == targets[:, None]
    at_target = yield g, torch.where(hit, logits, 0.0).sum(-1)
    valid = targets != -100
    losses = total.log() + top - at_target
    grad = (weights / total[:, None] - hit.to(weights)) * valid[:, None]
    return losses[valid].sum(), grad
"""
_LAYER = """def rank_layer(x, gain, w1, b1, w2, b2):
    gain = yield f, gain
    b2 = yield f, b2
    h = yield gather, rms(x) * gain
    h = F.silu(h @ w1.T + b1)
    y = yield scatter, h @ w2.T
    return x + y + b2
"""
_PIPE = """def one_f_one_b(stage, stages, batches):
    ahead = min(stages - 1 - stage, batches)
    order = [("F", m) for m in range(ahead)]
    for m in range(batches - ahead):
        order += [("F", ahead + m), ("B", m)]
    return order + [("B", m) for m in range(batches - ahead, batches)]


def bubble(stages, batches):
    return (stages - 1) / (batches + stages - 1)
"""


WRONG = {
    "t1": [
        "def heads_of(rank, ranks, n_heads, n_kv_heads):\n    return buggy_heads_of(rank, ranks, n_heads, n_kv_heads)\n",
        _but(_HEADS, ("keys = sorted({h // group for h in queries})", "keys = sorted({h % n_kv_heads for h in queries})")),  # heads in turn, not in groups
        _but(_HEADS, ("list(range(first, first + copies))", "[rank]")),  # nobody sums the copies' gradients
        _but(_HEADS, ("first = rank - rank % copies", "first = rank % copies")),
        _but(
            _HEADS, ("list(range(first, first + copies))", "[r for r in range(ranks) if r % n_kv_heads == rank % n_kv_heads]")
        ),  # the copies dealt out in turn
        _but(_HEADS, ("if n_heads % ranks or (ranks % n_kv_heads and n_kv_heads % ranks):", "if n_heads % ranks:")),  # half a key-value head
        _but(
            _HEADS, ("if n_heads % ranks or (ranks % n_kv_heads and n_kv_heads % ranks):", "if n_kv_heads % ranks:")
        ),  # more ranks than key-value heads refused
        _but(_HEADS, ("keys = sorted({h // group for h in queries})", "keys = [h // group for h in queries]")),  # one for each query head
    ],
    "t2": [
        "def report(c, tokens, gpu_hours, peak, watts, pue, kg_per_kwh):\n    return {**buggy_report(c, tokens, gpu_hours, watts), 'hfu': 0.5}\n",
        _but(_REPORT, ("useful = c.flops_per_token() * tokens", "useful = 6 * c.n_params() * tokens")),  # embeddings counted, attention not
        _but(
            _REPORT, ("useful = c.flops_per_token() * tokens", "useful = (6 * c.n_params(False) + 12 * c.n_layers * c.dim * c.max_seq_len) * tokens")
        ),  # not causal
        _but(_REPORT, ("(c.flops_per_token(training=False) - 2 * c.vocab_size * c.dim) * tokens", "useful / 3")),  # the output layer repeated too
        _but(_REPORT, ("kwh * pue * kg_per_kwh / 1000", "kwh * kg_per_kwh / 1000")),  # the GPUs run in a field
        _but(_REPORT, ("kwh * pue * kg_per_kwh / 1000", "kwh * pue * kg_per_kwh")),  # kilograms
        _but(_REPORT, ("kwh * pue * kg_per_kwh / 1000", "kwh / pue * kg_per_kwh / 1000")),
        _but(_REPORT, ("kwh = gpu_hours * watts / 1000", "kwh = gpu_hours * watts * pue / 1000"), ("kwh * pue *", "kwh *")),  # energy of the data centre
        _but(_REPORT, ("gpu_hours * 3600 * peak", "gpu_hours * 3600 * 312e12")),
        _but(_REPORT, ('"mfu": useful / possible', '"mfu": (useful + again) / possible')),  # repeated work called useful
    ],
    "t3": [
        "def peak_bytes(c, ranks, tensor, rows):\n    return buggy_peak_bytes(c, ranks, tensor, rows)\n\n\n" + _PEAK[_PEAK.index("def fewest") :],
        _but(_PEAK, ("state = 16", "state = 12")),  # no gradients
        _but(_PEAK, ("return state + gathered + inputs + logits", "return state + gathered + inputs")),  # no logits
        _but(_PEAK, ("inputs = 2 * c.n_layers * positions * c.dim / tensor", "inputs = 2 * c.n_layers * positions * c.dim / ranks")),
        _but(_PEAK, ("gathered = 2 * (vocabulary + 2 * block) / tensor", "gathered = 2 * (vocabulary + 2 * block)")),
        _but(_PEAK, ("gathered = 2 * (vocabulary + 2 * block) / tensor", "gathered = 2 * (vocabulary + block) / tensor")),  # no prefetched block
        _but(_PEAK, ("block = (c.n_params() - vocabulary) / c.n_layers", "block = c.n_params() / c.n_layers")),
        _but(_PEAK, ("state = 16 * c.n_params() / ranks", "state = 16 * c.n_params() / (ranks * tensor)")),  # tensor ranks counted twice
        _but(_PEAK, ("(2 + 4 + 4) * positions * c.vocab_size / tensor", "(2 + 4 + 4) * positions * c.vocab_size")),
        _but(_PEAK, ("(2 + 4 + 4) * positions", "(2 + 4) * positions")),
        _but(_PEAK, ("positions = rows * c.max_seq_len", "positions = c.max_seq_len")),
        _but(_PEAK, ("<= limit), default=None", "< limit), default=None")),
        _but(_PEAK, ("return min((", "return next(("), ("<= limit), default=None)", "<= limit), None)")),  # the first, not the smallest
    ],
    "t4": [
        "def padded_loss(logits, targets, rank, vocab):\n    return (yield from buggy_loss(logits, targets, rank, vocab))\n",
        _but(_LOSS, ("top = yield maximum, logits.amax(-1)", "top = logits.amax(-1)")),  # this rank's own largest
        _but(_LOSS, ("words = rank * V + torch.arange(V)", "words = torch.arange(V)")),  # every rank the first words
        _but(_LOSS, ("    logits = logits.masked_fill(words >= vocab, -torch.inf)\n", "")),  # padding has probability
        _but(_LOSS, ("-torch.inf", "0.0")),  # a logit of 0 is not no word
        _but(_LOSS, (" * valid[:, None]", "")),
        _but(_LOSS, ("losses[valid].sum()", "losses.sum()")),
        _but(_LOSS, ("losses[valid].sum()", "losses[valid].mean()")),
        _but(_LOSS, ("    top = yield maximum, logits.amax(-1)\n", "    top = torch.zeros(len(logits))\n")),  # overflows
        _but(_LOSS, ("at_target = yield g, torch.where(hit, logits, 0.0).sum(-1)", "at_target = torch.where(hit, logits, 0.0).sum(-1)")),
        _but(_LOSS, ("at_target = yield g, torch.where(hit, logits, 0.0).sum(-1)", "at_target = yield maximum, torch.where(hit, logits, 0.0).sum(-1)")),
        _but(_LOSS, ("logits = logits.masked_fill(", "logits = logits.masked_fill_(")),  # in place
        "def padded_loss(logits, targets, rank, vocab):\n    V = logits.shape[-1]\n    every = yield gather, logits\n    every = every[:, :vocab]\n"
        "    valid = targets != -100\n    loss = F.cross_entropy(every, targets, reduction='sum')\n"
        "    grad = (every.softmax(-1) - F.one_hot(targets.clamp(min=0), vocab)) * valid[:, None]\n"
        "    grad = F.pad(grad, (0, V * 8))[:, rank * V : rank * V + V]\n    return loss, grad\n",  # all logits over the network
    ],
    "t5": [
        "def rank_layer(x, gain, w1, b1, w2, b2):\n    return (yield from buggy_layer(x, gain, w1, b1, w2, b2))\n",
        _but(_LAYER, ("    gain = yield f, gain\n", "")),
        _but(_LAYER, ("    b2 = yield f, b2\n", "")),
        _but(_LAYER, ("h = yield gather, rms", "h = yield gather_own, rms")),
        _but(_LAYER, ("y = yield scatter, h @ w2.T", "y = yield scatter, h @ w2.T + b2"), ("x + y + b2", "x + y")),  # t times the bias
        _but(_LAYER, ("    gain = yield f, gain\n", "    gain = yield g, gain\n")),  # t times the gain
        _but(_LAYER, ("y = yield scatter, h @ w2.T", "y = yield g, h @ w2.T"), ("x + y + b2", "x + y[:, : x.shape[1]] + b2")),  # everybody the first slice
        _but(_LAYER, ("    h = F.silu(h @ w1.T + b1)\n", "    b1 = yield f, b1\n    h = F.silu(h @ w1.T + b1)\n")),  # b1 is the rank's own
        _but(_LAYER, ("return x + y + b2", "return y + b2")),
        # right for three ranks
        _but(_LAYER, ("    b2 = yield f, b2\n", ""), ("scatter, h @ w2.T", "scatter, h @ w2.T + b2 / 3"), ("x + y + b2", "x + y")),
    ],
    "t6": [
        _but(_PIPE, ("ahead = min(stages - 1 - stage, batches)", "ahead = batches")),  # all forward passes first
        _but(_PIPE, ("ahead = min(stages - 1 - stage, batches)", "ahead = min(stage, batches)")),  # counted from the wrong end
        _but(_PIPE, ("ahead = min(stages - 1 - stage, batches)", "ahead = min(stages - stage, batches)")),  # one too many
        _but(_PIPE, ("ahead = min(stages - 1 - stage, batches)", "ahead = 0")),  # one micro-batch at a time
        _but(_PIPE, ("ahead = min(stages - 1 - stage, batches)", "ahead = stages - 1 - stage")),  # fewer micro-batches than stages
        _but(_PIPE, ('return order + [("B", m) for m in range(batches - ahead, batches)]', "return order")),  # the last gradients never come
        _but(_PIPE, ("(stages - 1) / (batches + stages - 1)", "(stages - 1) / batches")),  # idle over busy
        _but(_PIPE, ("(stages - 1) / (batches + stages - 1)", "1 / stages")),
        _but(_PIPE, ("for m in range(batches - ahead, batches)]", "for m in reversed(range(batches - ahead, batches))]")),  # last in, first out
    ],
}
