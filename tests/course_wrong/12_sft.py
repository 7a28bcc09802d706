"""Wrong answers to the unit 12_sft, of the kind that students hand in: each must lose its task's points."""

_READ = """
def read_back(tokens):
    turns = []
    starts = [i for i, t in enumerate(tokens) if t == BOS] + [len(tokens)]
    for a, b in zip(starts, starts[1:]):
        prompt, _, answer = tokenizer.decode([t for t in tokens[a:b] if t not in (BOS, EOS)]).partition("[/INST]")
        user = prompt.removeprefix("[INST]").strip()
        if {first} and user.startswith("<<SYS>>"):
            system, _, user = user.removeprefix("<<SYS>>").partition("<</SYS>>")
            turns.append(("system", system{strip}))
        turns.append(("user", user{strip}))
        if {ended}:
            turns.append(("assistant", answer{strip}))
    return turns
"""
_PAD = """
def pad_rows(rows, length):
    tokens = torch.full((len(rows), length), EOS)
    targets = torch.full((len(rows), length), -100)
    for b, (ids, trained) in enumerate(rows):
        if len(ids) {over} length{empty}:
            raise ValueError
        tokens[b, : len(ids)] = torch.tensor(ids)
        {fill}
    return tokens, targets
"""
_FILL = "targets[b, : len(ids) - 1] = torch.where(torch.tensor(trained[1:]), torch.tensor(ids[1:]), -100)"
_EMPTY = " or not any(trained[1:])"
_FIT = """
def fit_training(exchanges, system, room):
    for first in range(len(exchanges)):
        parts = [encode_exchange(u, a, system if {where} else None) for i, (u, a) in enumerate(exchanges[first:])]
        tokens, trained = sum((p[0] for p in parts), []), sum((p[1] for p in parts), [])
        if len(tokens) {fits} room:
            return tokens, trained
    return {lost}
"""
_LOSS = """
def weighted_loss(logits, tokens, trained, lengths, w):
    B, T, V = logits.shape
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1), reduction="none").view(B, T - 1)
    real = torch.arange({real})[None] < lengths[:, None]
    mask = trained[:, {mask}]
    weight = (mask.float() + w * (~mask).float()) * {times}
    return {result}
"""
_GOOD = dict(real="1, T", mask="1:", times="real", result="(weight * nll).sum() / weight.sum()")
_SPLIT = """
def split(exchanges):
    examples, context, flags = [], [], []
    for ids, trained in exchanges:
        examples.append((context + ids, {mask}))
        context, flags = context + ids, flags + list(trained)
    n = [len(ids) for ids, _ in examples]
    whole = n[-1]
    return examples, {tokens}, {pairs}
"""
_SPLIT_GOOD = dict(mask="[False] * len(context) + list(trained)", tokens="sum(n) / whole", pairs="sum(k * (k + 1) for k in n) / (whole * (whole + 1))")

WRONG = {
    "t1": [
        _READ.format(first="a == 0", strip=".strip()", ended="True"),  # an open prompt is answered with nothing
        _READ.format(first="a == 0", strip=".strip()", ended="answer.strip()"),  # an empty answer is lost
        _READ.format(first="a == 0", strip="", ended="tokens[b - 1] == EOS"),  # white space kept
        _READ.format(first="False", strip=".strip()", ended="tokens[b - 1] == EOS"),  # the system prompt stays in the user's turn
        """
def read_back(tokens):  # splits the text of the whole dialogue
    turns = []
    for part in tokenizer.decode(tokens).split("[INST]")[1:]:
        user, _, answer = part.partition("[/INST]")
        turns += [("user", user.strip()), ("assistant", answer.strip())]
    return turns
""",
        """
def read_back(tokens):  # one line a turn
    turns = []
    for line in "".join(tokenizer.decode([t for t in tokens if t > 2])).splitlines():
        turns.append(("user", line.strip()))
    return turns
""",
        """
def read_back(tokens):  # roles the wrong way round
    user, _, answer = tokenizer.decode(tokens).partition("[/INST]")
    return [("assistant", user.replace("[INST]", "").strip()), ("user", answer.strip())]
""",
    ],
    "t2": [
        _PAD.format(over=">", empty=_EMPTY, fill=_FILL + "\n        targets[b][targets[b] == EOS] = -100"),  # still no EOS
        _PAD.format(over=">", empty=_EMPTY, fill="targets[b, : len(ids)] = torch.where(torch.tensor(trained), torch.tensor(ids), -100)"),  # not shifted
        _PAD.format(over=">", empty=_EMPTY, fill=_FILL.replace("trained[1:]", "trained[:-1]")),  # mask not shifted
        _PAD.format(over=">", empty=_EMPTY, fill="targets[b, : len(ids) - 1] = torch.tensor(ids[1:])"),  # prompt trained too
        _PAD.format(over=">", empty=_EMPTY, fill=_FILL + "\n        targets[b, len(ids) - 1 :] = EOS"),  # padding trained
        _PAD.format(over=">", empty=_EMPTY, fill=_FILL + "\n        targets[b, len(ids) - 1] = EOS"),  # one EOS of the padding trained
        _PAD.format(over=">=", empty=_EMPTY, fill=_FILL),  # refuses a row that just fits
        _PAD.format(over=">", empty="", fill=_FILL),  # a row without a target passes
        "def pad_rows(rows, length):\n    return buggy_pad_rows(rows, length)\n",
        _PAD.format(over=">", empty=_EMPTY, fill=_FILL).replace(
            "tokens = torch.full", "rows = [(x[:length], m[:length]) for x, m in rows]\n    tokens = torch.full"
        ),  # cuts
    ],
    "t3": [
        _FIT.format(where="i == 0", fits="<", lost="None"),  # off by one
        _FIT.format(where="i == 0 and first == 0", fits="<=", lost="None"),  # the system prompt goes with the first exchange
        _FIT.format(where="True", fits="<=", lost="None"),  # the system prompt in every exchange
        _FIT.format(where="i == 0", fits="<=", lost="([], [])"),  # an empty dialogue for one that does not fit
        _FIT.format(where="i == 0", fits="<=", lost="(tokens[-room:], trained[-room:])"),  # its end
        "def fit_training(exchanges, system, room):\n    return buggy_fit_training(exchanges, system, room)\n",
        """
def fit_training(exchanges, system, room):  # the earliest exchanges
    for n in range(len(exchanges), 0, -1):
        parts = [encode_exchange(u, a, system if i == 0 else None) for i, (u, a) in enumerate(exchanges[:n])]
        tokens, trained = sum((p[0] for p in parts), []), sum((p[1] for p in parts), [])
        if len(tokens) <= room:
            return tokens, trained
    return None
""",
        """
def fit_training(exchanges, system, room):  # cut on the left
    parts = [encode_exchange(u, a, system if i == 0 else None) for i, (u, a) in enumerate(exchanges)]
    tokens, trained = sum((p[0] for p in parts), []), sum((p[1] for p in parts), [])
    return (tokens[-room:], trained[-room:]) if room > 5 else None
""",
    ],
    "t4": [
        _LOSS.format(**{**_GOOD, "mask": ":-1"}),  # mask of the position, not of its target
        _LOSS.format(**{**_GOOD, "real": "T - 1"}),  # the first padding token is a target
        _LOSS.format(**{**_GOOD, "times": "1.0"}),  # padding weighs w
        _LOSS.format(**{**_GOOD, "result": "(weight * nll).sum() / real.sum()"}),  # divided by tokens, not by weights
        _LOSS.format(**{**_GOOD, "result": "(weight * nll).sum() / mask.sum()"}),  # divided by trained tokens
        _LOSS.format(**{**_GOOD, "result": "((weight * nll).sum(1) / weight.sum(1)).mean()"}),  # a mean of means
        _LOSS.format(**{**_GOOD, "result": "(weight * nll).sum()"}),  # no division
        _LOSS.format(**_GOOD).replace("logits[:, :-1]", "logits[:, 1:]"),  # logits not shifted
        _LOSS.format(**{**_GOOD, "result": "((weight * nll).sum() / weight.sum()).detach()"}),
    ],
    "t5": [
        _SPLIT.format(**{**_SPLIT_GOOD, "mask": "flags + list(trained)"}),  # earlier answers are trained again
        _SPLIT.format(**{**_SPLIT_GOOD, "tokens": "sum(n) / len(n)"}),  # mean length
        _SPLIT.format(**{**_SPLIT_GOOD, "tokens": "whole / sum(n)"}),  # upside down
        _SPLIT.format(**{**_SPLIT_GOOD, "pairs": "sum(k * k for k in n) / whole**2"}),  # not causal
        _SPLIT.format(**{**_SPLIT_GOOD, "pairs": "(sum(n) / whole) ** 2"}),
        _SPLIT.format(**_SPLIT_GOOD).replace("(context + ids,", "(ids,").replace("[False] * len(context) + ", ""),  # without context
        _SPLIT.format(**{**_SPLIT_GOOD, "mask": "list(trained) + [False] * len(context)"}),  # flags at the wrong end
        _SPLIT.format(**{**_SPLIT_GOOD, "tokens": "(len(n) + 1) / 2"}),  # as if all were of one length
    ],
}
