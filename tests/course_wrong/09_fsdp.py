"""Wrong answers to the exercises of 09_fsdp, of the kind that students make: each must score less than full marks."""
from tiny import but as _but

_BILL = """def state_bytes(n_params, stage, W):
    weights, gradients, adamw = 2.0, 2.0, 12.0
    return n_params * (weights / (W if stage >= 3 else 1) + gradients / (W if stage >= 2 else 1) + adamw / (W if stage >= 1 else 1))


def sent_bytes(n_params, stage, W):
    return (3 if stage == 3 else 2) * 2.0 * n_params * (W - 1) / W


def fewest_ranks(n_params, stage, capacity):
    kept = {0: 16.0, 1: 4.0, 2: 2.0, 3: 0.0}[stage] * n_params
    if 16.0 * n_params <= capacity:
        return 1
    if kept >= capacity:
        return None
    W = 1
    while state_bytes(n_params, stage, W) > capacity:
        W += 1
    return W
"""
_TREE = """def tree(rank, world, x, root):
    me, reach = (rank - root) % world, 1
    while reach < world:
        if me < reach and me + reach < world:
            yield ("send", (me + reach + root) % world, x)
        elif reach <= me < 2 * reach:
            x = yield ("receive", (me - reach + root) % world)
        reach *= 2
    return x
"""
_PIECES = """def clipped_pieces(gradients, tokens, max_norm):
    W, count = len(gradients), sum(tokens)
    if not count:
        raise ValueError("no token")
    pieces = [p / count for p in reduce_scatter([F.pad(g, (0, -len(g) % W)) for g in gradients])]
    norm = sum(float(p.double().square().sum()) for p in pieces) ** 0.5
    scale = min(1.0, max_norm / norm) if norm else 1.0
    return [p * scale for p in pieces], norm
"""
_MASK = """def keep_mask(seed, step, first, last, width, keep):
    from zlib import crc32

    g = torch.Generator().manual_seed(crc32(f"{seed}:{step}".encode()))
    return (torch.rand(last, width, generator=g) < keep)[first:]
"""
_ROWS = """def keep_mask(seed, step, first, last, width, keep):
    mask = torch.zeros(last - first, width, dtype=torch.bool)
    for row in range(first, last):
        g = torch.Generator().manual_seed(seed * 1_000_003 * 1_000_003 + step * 1_000_003 + row)
        mask[row - first] = torch.rand(width, generator=g) < keep
    return mask
"""
_TAKE = """def take(cursor, n, n_rows, order, rank, world):
    positions = range(cursor + n * rank // world, cursor + n * (rank + 1) // world)
    orders = {epoch: order(epoch) for epoch in {p // n_rows for p in positions}}
    return [orders[p // n_rows][p % n_rows] for p in positions], cursor + n
"""
_RECUT = """def recut(read, n, old, new, rank):
    size, was = -(-n // new), -(-n // old)
    piece = torch.zeros(size)
    first, last = rank * size, min(n, (rank + 1) * size)
    for i in range(old):
        a, b = max(first, i * was), min(last, (i + 1) * was)
        if a < b:
            piece[a - first : b - first] = read(i, a - i * was, b - i * was)
    return piece
"""


WRONG = {
    "t1": [
        _but(_BILL, ("weights, gradients, adamw = 2.0, 2.0, 12.0", "weights, gradients, adamw = 4.0, 4.0, 8.0")),  # fp32
        _but(_BILL, ("weights, gradients, adamw = 2.0, 2.0, 12.0", "weights, gradients, adamw = 6.0, 2.0, 8.0")),  # the 32-bit copy with the weights
        _but(_BILL, ("weights, gradients, adamw = 2.0, 2.0, 12.0", "weights, gradients, adamw = 2.0, 2.0, 8.0")),  # no 32-bit copy
        _but(_BILL, ("gradients / (W if stage >= 2 else 1)", "gradients / (W if stage >= 1 else 1)")),  # stage 1 keeps whole gradients
        _but(_BILL, ("gradients / (W if stage >= 2 else 1)", "gradients / (W if stage == 2 else 1)")),  # stages do not add up
        _but(_BILL, ("2.0 * n_params * (W - 1) / W", "2.0 * n_params")),  # large W only
        _but(_BILL, ("(3 if stage == 3 else 2) * 2.0", "(3 if stage == 3 else 1) * 2.0")),  # an all-reduce for the price of one lap
        _but(_BILL, ("(3 if stage == 3 else 2) * 2.0", "2 * 2.0")),  # stage 3 for nothing
        _but(_BILL, ("(3 if stage == 3 else 2) * 2.0", "(3 if stage == 3 else 2) * 4.0")),  # 32 bits on the wire
        _but(_BILL, ("(3 if stage == 3 else 2) * 2.0 * n_params", "(2 + stage / 3) * 2.0 * n_params")),
        _but(_BILL, ("    W = 1\n", "    W = 2\n"), ("        return 1\n", "        return 2\n")),  # never one rank
        _but(_BILL, ("n_params, stage, W) > capacity", "n_params, stage, W) >= capacity")),
        _but(_BILL, ("    if kept >= capacity:\n        return None\n", "    if kept > capacity:\n        return None\n    W = 4000\n"), ("    W = 1\n", "")),
        _but(
            _BILL,
            (
                "    W = 1\n    while state_bytes(n_params, stage, W) > capacity:\n        W += 1\n    return W\n",
                "    return math.ceil(16.0 * n_params / capacity)\n",
            ),
        ),  # as if all were cut
        _but(
            _BILL,
            (
                "    W = 1\n    while state_bytes(n_params, stage, W) > capacity:\n        W += 1\n",
                "    W = 1\n    while state_bytes(n_params, stage, W) > capacity:\n        W *= 2\n",
            ),
        ),  # powers of two
    ],
    "t2": [
        "def tree(rank, world, x, root):\n    return (yield from star(rank, world, x, root))\n",  # right, in W - 1 rounds
        _but(
            _TREE,
            ("(rank - root) % world, 1", "rank, 1"),
            ("(me + reach + root) % world", "(me + reach) % world"),
            ("(me - reach + root) % world", "(me - reach) % world"),
        ),  # root 0 only
        _but(_TREE, (" and me + reach < world", "")),  # powers of two only
        _but(_TREE, ("(me + reach + root) % world", "me + reach"), ("(me - reach + root) % world", "me - reach")),  # forgets to number back
        _but(_TREE, ("(rank - root) % world", "(rank + root) % world")),
        _but(_TREE, ("            x = yield", "            yield")),  # does not keep what came
        # a chain
        """def tree(rank, world, x, root):
    me = (rank - root) % world
    if me:
        x = yield ("receive", (rank - 1) % world)
    if me < world - 1:
        yield ("send", (rank + 1) % world, x)
    return x
""",
        # everybody sends first
        """def tree(rank, world, x, root):
    reach = 1
    while reach < world:
        yield ("send", (rank + reach) % world, x)
        x = yield ("receive", (rank - reach) % world)
        reach *= 2
    return x
""",
        # halves that go to a child each: two sends where one more rank could have helped
        """def tree(rank, world, x, root):
    me = (rank - root) % world
    if me:
        x = yield ("receive", ((me - 1) // 2 + root) % world)
    for child in (2 * me + 1, 2 * me + 2):
        if child < world:
            yield ("send", (child + root) % world, x)
    return x
""",
        _but(_TREE, ("        reach *= 2", "        reach += 1")),
        "def tree(rank, world, x, root):\n    return x\n    yield\n",
    ],
    "t3": [
        "def clipped_pieces(gradients, tokens, max_norm):\n    return buggy_pieces(gradients, tokens, max_norm)\n",
        _but(
            _PIECES,
            (
                "[p / count for p in reduce_scatter([F.pad(g, (0, -len(g) % W)) for g in gradients])]",
                "[p / W for p in reduce_scatter([F.pad(g / max(1, n), (0, -len(g) % W)) for g, n in zip(gradients, tokens)])]",
            ),
        ),  # mean of means
        _but(_PIECES, ("[p / count for p in", "[p / count / W for p in")),  # averaged once too often
        _but(_PIECES, ("[p / count for p in", "[p / W for p in")),  # per rank, not per token
        # each rank divides its piece by its own tokens
        _but(
            _PIECES,
            ("    pieces = [p / count for p in reduce_scatter(", "    pieces = [p / max(1, n) for n, p in zip(tokens, reduce_scatter("),
            ("for g in gradients])]", "for g in gradients]))]"),
        ),
        _but(
            _PIECES,
            (
                "    scale = min(1.0, max_norm / norm) if norm else 1.0\n    return [p * scale for p in pieces], norm",
                "    return [p * min(1.0, max_norm / (float(p.norm()) or 1.0)) for p in pieces], norm",
            ),
        ),  # local clip
        _but(
            _PIECES, ("    norm = sum(float(p.double().square().sum()) for p in pieces) ** 0.5", "    norm = sum(float(p.norm()) for p in pieces)")
        ),  # norms added
        _but(_PIECES, ("    norm = sum(float(p.double().square().sum()) for p in pieces) ** 0.5", "    norm = max(float(p.norm()) for p in pieces)")),
        _but(
            _PIECES,
            (
                "    norm = sum(float(p.double().square().sum()) for p in pieces) ** 0.5",
                "    norm = (sum(float(p.double().square().sum()) for p in pieces) / W) ** 0.5",
            ),
        ),  # mean of squares
        _but(_PIECES, ("min(1.0, max_norm / norm) if norm else 1.0", "max_norm / norm if norm else 1.0")),  # small gradients blown up
        _but(
            _PIECES,
            ("[p / count for p in reduce_scatter([F.pad(g, (0, -len(g) % W)) for g in gradients])]", "list((torch.stack(gradients).sum(0) / count).chunk(W))"),
        ),  # chunk's lengths
        _but(
            _PIECES,
            (
                "[p / count for p in reduce_scatter([F.pad(g, (0, -len(g) % W)) for g in gradients])]",
                "[p / count for p in torch.stack(gradients).sum(0).tensor_split(W)]",
            ),
        ),  # lengths that differ by one
        _but(_PIECES, ("F.pad(g, (0, -len(g) % W))", "F.pad(g, (-len(g) % W, 0))")),  # padded in front
        _but(_PIECES, ("F.pad(g, (0, -len(g) % W))", "F.pad(g, (0, W - len(g) % W))")),  # a full row too many where W divides
        _but(_PIECES, ('    if not count:\n        raise ValueError("no token")\n', "    count = max(1, count)\n")),
        _but(_PIECES, ("    return [p * scale for p in pieces], norm", "    return [p * scale for p in pieces], norm * scale")),  # the norm afterwards
        _but(_PIECES, (" if norm else 1.0", "")),  # 0 / 0
        _but(_PIECES, ("    norm = sum(float(p.double()", "    pieces = [p.clamp(-max_norm, max_norm) for p in pieces]\n    norm = sum(float(p.double()")),
        # the gradients are clipped before they are added
        _but(
            _PIECES,
            (
                "F.pad(g, (0, -len(g) % W)) for g in gradients",
                "F.pad(g * min(1.0, max_norm * max(1, n) / (float(g.norm()) or 1.0)), (0, -len(g) % W)) for g, n in zip(gradients, tokens)",
            ),
        ),
    ],
    "t4": [
        "def keep_mask(seed, step, first, last, width, keep):\n    return buggy_mask(seed, step, first, last, width, keep)\n",
        # the usual patch
        """def keep_mask(seed, step, first, last, width, keep):
    g = torch.Generator().manual_seed(seed + step + first)
    return torch.rand(last - first, width, generator=g) < keep
""",
        _but(_MASK, ('crc32(f"{seed}:{step}".encode())', "seed + step")),  # seed 0, step 1 is seed 1, step 0
        _but(_MASK, ('crc32(f"{seed}:{step}".encode())', 'crc32(f"{seed}{step}".encode())')),  # 1, 11 and 11, 1
        _but(_MASK, ('crc32(f"{seed}:{step}".encode())', "seed * step")),
        _but(_MASK, ('crc32(f"{seed}:{step}".encode())', "seed")),  # the same in all steps
        _but(_MASK, ('crc32(f"{seed}:{step}".encode())', "step")),  # the same for all seeds
        _but(_MASK, ("torch.rand(last, width, generator=g) < keep)[first:]", "torch.rand(last - first, width, generator=g) < keep)")),  # ranks alike
        _but(_MASK, ("    g = torch.Generator().manual_seed(", "    g = None\n    torch.manual_seed(")),  # touches the global state
        _but(_MASK, ('    g = torch.Generator().manual_seed(crc32(f"{seed}:{step}".encode()))\n', "    g = None\n")),  # whatever the state is
        _but(_MASK, ("< keep)", "> keep)")),  # drops what it should keep
        _but(_MASK, ("(torch.rand(last, width, generator=g) < keep)[first:]", "(torch.rand(last, width, generator=g) < keep)[first:].float()")),
        _but(_MASK, ("(torch.rand(last, width, generator=g) < keep)[first:]", "(torch.rand(last, 1, generator=g) < keep)[first:].expand(-1, width)")),
        _but(_ROWS, ("seed * 1_000_003 * 1_000_003 + step * 1_000_003 + row", "seed + 10 * step + 100 * row")),  # sums that meet
        _but(_ROWS, ("seed * 1_000_003 * 1_000_003 + step * 1_000_003 + row", "seed * 1_000_003 + step")),  # all rows of a step alike
        _but(_ROWS, ("step * 1_000_003 + row", "step * 1_000_003 + row - first")),  # rows counted on the rank
    ],
    "t5": [
        "def take(cursor, n, n_rows, order, rank, world):\n    return buggy_take(cursor, n, n_rows, order, rank, world)\n",
        _but(_TAKE, ("cursor + n\n", "cursor + 1\n")),  # steps
        _but(_TAKE, ("cursor + n\n", "cursor + len(positions)\n")),  # its own rows only
        _but(_TAKE, ("cursor + n\n", "(cursor + n) % n_rows\n")),  # forgets the epoch
        _but(_TAKE, ("range(cursor + n * rank // world, cursor + n * (rank + 1) // world)", "range(cursor + rank, cursor + n, world)")),  # every W-th
        _but(
            _TAKE,
            ("range(cursor + n * rank // world, cursor + n * (rank + 1) // world)", "range(cursor + n // world * rank, cursor + n // world * (rank + 1))"),
        ),  # the remainder is lost
        _but(
            _TAKE,
            (
                "range(cursor + n * rank // world, cursor + n * (rank + 1) // world)",
                "range(cursor + -(-n // world) * rank, cursor + min(n, -(-n // world) * (rank + 1)))",
            ),
        ),  # other shares than asked
        _but(_TAKE, ("orders[p // n_rows][p % n_rows] for p", "order(0)[p % n_rows] for p")),  # each epoch alike
        _but(_TAKE, ("orders[p // n_rows][p % n_rows] for p", "order(cursor // n_rows)[p % n_rows] for p")),  # the batch across the border
        _but(_TAKE, ("orders[p // n_rows][p % n_rows] for p", "p % n_rows for p")),  # not shuffled
        # the rest of an epoch is dropped
        """def take(cursor, n, n_rows, order, rank, world):
    epoch, at = divmod(cursor, n_rows)
    if at + n > n_rows:
        epoch, at, cursor = epoch + 1, 0, (epoch + 1) * n_rows
    rows = order(epoch)[at : at + n]
    return rows[n * rank // world : n * (rank + 1) // world], cursor + n
""",
        # at most one border
        """def take(cursor, n, n_rows, order, rank, world):
    epoch, at = divmod(cursor, n_rows)
    rows = (order(epoch) + order(epoch + 1))[at : at + n]
    return rows[n * rank // world : n * (rank + 1) // world], cursor + n
""",
        # reads all that was before
        """def take(cursor, n, n_rows, order, rank, world):
    stream = [row for epoch in range((cursor + n) // n_rows + 1) for row in order(epoch)]
    rows = stream[cursor : cursor + n]
    return rows[n * rank // world : n * (rank + 1) // world], cursor + n
""",
    ],
    "t6": [
        # everything, then cut
        """def recut(read, n, old, new, rank):
    was, size = -(-n // old), -(-n // new)
    whole = torch.cat([read(i, 0, was) for i in range(old)])[:n]
    return F.pad(whole, (0, size * new - n))[rank * size : (rank + 1) * size]
""",
        # whole files that overlap
        """def recut(read, n, old, new, rank):
    was, size = -(-n // old), -(-n // new)
    piece = torch.zeros(size)
    first, last = rank * size, min(n, (rank + 1) * size)
    for i in range(old):
        a, b = max(first, i * was), min(last, (i + 1) * was)
        if a < b:
            piece[a - first : b - first] = read(i, 0, was)[a - i * was : b - i * was]
    return piece
""",
        _but(_RECUT, ("first, last = rank * size, min(n, (rank + 1) * size)", "first, last = rank * size, (rank + 1) * size")),  # reads padding
        _but(_RECUT, ("        if a < b:\n            piece", "        if True:\n            piece")),  # empty reads
        _but(_RECUT, ("        if a < b:\n            piece", "        if a <= b:\n            piece")),
        _but(_RECUT, ("read(i, a - i * was, b - i * was)", "read(i, a, b)")),  # positions of the vector
        _but(_RECUT, ("piece[a - first : b - first]", "piece[a - i * was : b - i * was]")),  # positions of the old file
        _but(_RECUT, ("size, was = -(-n // new), -(-n // old)", "size, was = n // new, n // old")),  # no padding
        _but(_RECUT, ("size, was = -(-n // new), -(-n // old)", "size, was = n // new + 1, n // old + 1")),  # always padded
        _but(_RECUT, ("    piece = torch.zeros(size)\n", "    piece = torch.full((size,), float('nan'))\n")),  # its own padding is not zero
        # only as many files as fit whole
        """def recut(read, n, old, new, rank):
    was, size = -(-n // old), -(-n // new)
    k = max(1, old // new)
    parts = [read(i, 0, was) for i in range(rank * k, min(old, (rank + 1) * k))]
    return torch.cat(parts)[:size] if parts else torch.zeros(size)
""",
        "def recut(read, n, old, new, rank):\n    return read(rank, 0, -(-n // new))\n",
        "def recut(read, n, old, new, rank):\n    return torch.zeros(-(-n // new))\n",
        _but(_RECUT, ("    piece = torch.zeros(size)\n", "    piece = torch.zeros(min(size, max(0, n - rank * size)))\n")),  # a last piece that is too short
    ],
}
