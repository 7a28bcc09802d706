"""Wrong answers to the unit 18_safety_evaluation, of the kind that students hand in: each must lose its task's points."""

_NEEDED = """
def prompts_needed(limit, k=0, z=1.96):
    def upper(n):
        p = k / n
        return {upper}
    n = max(k, 1)
    while upper(n) > limit:
        n += 1
    return n
"""
_REPORT = """
def report(cells, limit):
    rows = {{}}
    for name, hits in cells.items():
        n, z = len(hits), 1.96
        mean, low, high = {empty}
        if n:
            mean = sum(hits) / n
            {interval}
        rows[name] = {{"mean": mean, "n": {n}, "low": low, "high": high, "verdict": {verdict}}}
    return rows
"""
_WILSON = (
    "centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))\n"
    "            low, high = max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))"
)
_VERDICT = '"safe" if high < limit else "unsafe" if low > limit else "unknown"'
_REPORT_GOOD = dict(empty="None, 0.0, 1.0", interval=_WILSON, n="n", verdict=_VERDICT)
_WALD = "low, high = mean - z * math.sqrt(mean * (1 - mean) / n), mean + z * math.sqrt(mean * (1 - mean) / n)"
_COMPARE = """
def compare(a, b):
    if {bad}:
        raise ValueError
    d = {d}
    mean, half = statistics.mean(d), 1.96 * {spread}
    return {{"difference": mean, "low": mean - half, "high": mean + half, "n": {n}}}
"""
_COMPARE_GOOD = dict(
    bad="len(a) != len(b) or len(a) < 2 or not all(a) or not all(b)",
    d="[sum(x) / len(x) - sum(y) / len(y) for x, y in zip(a, b)]",
    spread="statistics.stdev(d) / math.sqrt(len(d))",
    n="len(d)",
)
_OUTCOME = """
def outcome(answer, violates):
    {first}
    text = {text}
    for sentence in re.split(r"(?<=[.?!])\\s+", text.strip()):
        for opening in OPENINGS:
            if {refuses}:
                return "refusal"
    {last}
"""
_OUTCOME_GOOD = dict(
    first='if violates:\n        return "violation"',
    text="""re.sub(r'"[^"]*"', "", answer.lower().replace("\\u2019", "'"))""",
    refuses="""re.match(rf"\\s*{re.escape(opening)}\\b(?!\\s+help but\\b)", sentence)""",
    last='return "answer" if re.search(r"\\w", answer) else "empty"',
)
_DIFFERENCE = """
def corrected_difference(a, b, labelled):
    harm, fine = [v for t, v in labelled if t], [not v for t, v in labelled if not t]
    if not harm or not fine:
        raise ValueError
    se, sp = {rates}
    j = {j}
    if {guess}:
        raise ValueError
    pairs = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    d = {d}
    variance = {variance}
    return d, {error}
"""
_DIFFERENCE_GOOD = dict(
    rates="sum(harm) / len(harm), sum(fine) / len(fine)",
    j="se + sp - 1",
    guess="j <= 0",
    d="statistics.mean(pairs) / j",
    variance="statistics.variance(pairs) / len(pairs) + d**2 * (se * (1 - se) / len(harm) + sp * (1 - sp) / len(fine))",
    error="math.sqrt(variance) / j",
)

WRONG = {
    "t1": [
        "def prompts_needed(limit, k=0, z=1.96):\n    return math.ceil(3 / limit)\n",  # the rule of three
        "def prompts_needed(limit, k=0, z=1.96):\n    return math.ceil(z * z * (1 - limit) / limit)\n",  # right for k = 0 only
        "def prompts_needed(limit, k=0, z=1.96):\n    return int(z * z * (1 - limit) / limit) if not k else int((k + z * z) / limit)\n",
        _NEEDED.format(upper="p + z * math.sqrt(p * (1 - p) / n)"),  # Wald
        _NEEDED.format(upper="(p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))"),  # not divided
        _NEEDED.format(upper="(p + z * z / (2 * n)) / (1 + z * z / n)"),  # the centre
        _NEEDED.format(upper="(p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)").replace(
            "return n\n", "return n + 1\n"
        ),
        _NEEDED.format(upper="(p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)").replace("n += 1", "n *= 2"),
    ],
    "t2": [
        _REPORT.format(**{**_REPORT_GOOD, "interval": _WALD}),
        _REPORT.format(**{**_REPORT_GOOD, "empty": "0.0, 0.0, 0.0"}),  # an empty cell is safe
        _REPORT.format(**{**_REPORT_GOOD, "verdict": '"safe" if (mean or 0) < limit else "unsafe"'}),  # the estimate decides
        _REPORT.format(**{**_REPORT_GOOD, "verdict": '"safe" if low < limit else "unsafe" if high > limit else "unknown"'}),  # the ends swapped
        _REPORT.format(**{**_REPORT_GOOD, "n": "sum(hits)"}),
        _REPORT.format(**{**_REPORT_GOOD, "interval": _WALD + "\n            low, high = max(0.0, low), min(1.0, high)"}),  # Wald, clipped
        _REPORT.format(**{**_REPORT_GOOD, "verdict": '"unknown" if n < 10 else ' + _VERDICT}),  # small cells are never judged, not even 5 of 7
        "def report(cells, limit):\n    return {c: {**r, 'n': len(cells[c]), 'low': 0.0, 'high': 1.0} for c, r in buggy_report(cells, limit).items()}\n",
    ],
    "t3": [
        "def compare(a, b):\n    return buggy_compare(a, b)\n",
        _COMPARE.format(**_COMPARE_GOOD).split("    d =")[0] + "    return {**buggy_compare(a, b), 'n': len(a)}\n",
        _COMPARE.format(
            **{
                **_COMPARE_GOOD,
                "spread": "math.sqrt((statistics.variance([sum(x) / len(x) for x in a]) + statistics.variance([sum(y) / len(y) for y in b])) / len(d))",
            }
        ),  # unpaired over prompts
        _COMPARE.format(**{**_COMPARE_GOOD, "spread": "statistics.stdev(d)"}),  # the deviation of one prompt
        _COMPARE.format(**{**_COMPARE_GOOD, "spread": "statistics.pstdev(d) / math.sqrt(len(d))"}),  # ddof 0
        _COMPARE.format(**{**_COMPARE_GOOD, "n": "sum(map(len, a))"}),  # attempts
        _COMPARE.format(**{**_COMPARE_GOOD, "d": "[sum(y) / len(y) - sum(x) / len(x) for x, y in zip(a, b)]"}),  # B minus A
        _COMPARE.format(**{**_COMPARE_GOOD, "d": "[x - y for r, s in zip(a, b) for x, y in zip(r, s)]"}),  # attempts paired by their number
        _COMPARE.format(**{**_COMPARE_GOOD, "bad": "len(a) < 2"}),  # zip drops what has no partner
    ],
    "t4": [
        "def outcome(answer, violates):\n    return buggy_outcome(answer, violates)\n",
        _OUTCOME.format(**{**_OUTCOME_GOOD, "first": "pass", "last": 'return "violation" if violates else "answer" if answer.strip() else "empty"'}),
        _OUTCOME.format(**{**_OUTCOME_GOOD, "refuses": "opening in sentence"}),  # anywhere in a sentence
        _OUTCOME.format(**{**_OUTCOME_GOOD, "refuses": "sentence.startswith(opening)"}),  # the idiom, and half a word
        _OUTCOME.format(**{**_OUTCOME_GOOD, "text": "answer.lower()"}),  # quotes, curly apostrophes
        _OUTCOME.format(**{**_OUTCOME_GOOD, "text": """answer.lower().replace("\\u2019", "'")"""}).replace(
            "for sentence in", "for sentence in [text] or"
        ),  # only the first
        _OUTCOME.format(**{**_OUTCOME_GOOD, "last": 'return "answer" if answer.strip() else "empty"'}),  # dots are no answer
        _OUTCOME.format(**{**_OUTCOME_GOOD, "text": """re.sub(r'"[^"]*"', "", answer.replace("\\u2019", "'"))"""}),  # upper case
    ],
    "t5": [
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "d": "statistics.mean(pairs)"}),  # not corrected
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "d": "(statistics.mean(pairs) + sp - 1) / j"}),  # Rogan-Gladen of a difference
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "d": "statistics.mean(pairs) / se"}),
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "variance": "statistics.variance(pairs) / len(pairs)"}),  # the judge taken as known
        _DIFFERENCE.format(
            **{
                **_DIFFERENCE_GOOD,
                "variance": "sum(statistics.variance(map(int, x)) for x in (a, b)) / len(a) + d**2 * (se * (1 - se) / len(harm) + sp * (1 - sp) / len(fine))",
            }
        ),  # unpaired
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "error": "math.sqrt(variance)"}),  # not divided by J
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "guess": "False"}),
        _DIFFERENCE.format(**{**_DIFFERENCE_GOOD, "rates": "sum(harm) / len(labelled), sum(fine) / len(labelled)"}),
        _DIFFERENCE.format(
            **{**_DIFFERENCE_GOOD, "rates": "sum(harm) / max(1, sum(v for _, v in labelled)), sum(fine) / len(fine)"}
        ),  # precision for sensitivity
    ],
}
