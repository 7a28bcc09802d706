"""Intervals, so that no rate is printed without its n.

    wilson(45, 50)      # (0.786, 0.957)
"""
from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95% by default (our addition: the paper gives rates without intervals).

    `successes` may be a sum of scores in [0, 1]: their variance is at most that of a proportion with the same mean, so the interval is
    then wider than needed, never too narrow. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not -1e-9 <= successes <= n + 1e-9:
        raise ValueError(f"wilson needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    p = min(1.0, max(0.0, successes / n))
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def rate(successes: float, n: int) -> dict[str, float]:
    """{"mean", "n", "low", "high"} of a proportion or a mean of scores in [0, 1]."""
    low, high = wilson(successes, n)
    return {"mean": successes / n, "n": n, "low": low, "high": high}


def paired(outcomes: Sequence[float], z: float = 1.96) -> dict[str, float]:
    """{"mean", "n", "low", "high"} of outcomes in [0, 1] on the same prompts, ties being 0.5, by their own variance (sec 4.3's win rates; the interval is
    our addition). Raises ValueError for fewer than 2."""
    n = len(outcomes)
    if n < 2:
        raise ValueError(f"a paired comparison needs 2 outcomes at least, got {n}")
    mean = sum(outcomes) / n
    half = z * math.sqrt(sum((x - mean) ** 2 for x in outcomes) / (n - 1) / n)
    return {"mean": mean, "n": n, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models fail equally often on the same prompts: a binomial test of the prompts on which they differ."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def gwet_ac2(ratings: Sequence[Sequence[float | None]], categories: Sequence[float]) -> float:
    """Gwet's AC2 with quadratic weights for items [n] by raters [r] on an ordered scale, None where a rater gave none (AC1 and AC2 in sec 3.4.2 and 4.4).

    AC2 = (p_a - p_e) / (1 - p_e): weighted agreement within items with two ratings or more, and Gwet's chance agreement from how often each
    category is used. Unlike kappa it does not collapse when nearly all items get one label. Raises ValueError if no item has two ratings.
    """
    q, span = len(categories), max(categories) - min(categories)
    weight = [[1 - ((x - y) / span) ** 2 if span else 1.0 for y in categories] for x in categories]
    index = {c: i for i, c in enumerate(categories)}
    agreement, shares, n_pairs, n_rated = 0.0, [0.0] * q, 0, 0
    for item in ratings:
        counts = [0] * q
        for x in item:
            if x is not None:
                counts[index[x]] += 1
        r = sum(counts)
        if r == 0:
            continue
        n_rated += 1
        shares = [s + c / r for s, c in zip(shares, counts, strict=True)]
        if r >= 2:
            n_pairs += 1
            weighted = [sum(w * c for w, c in zip(row, counts, strict=True)) for row in weight]
            agreement += sum(c * (w - 1) for c, w in zip(counts, weighted, strict=True)) / (r * (r - 1))
    if not n_pairs:
        raise ValueError("agreement needs items with two ratings at least")
    p_a = agreement / n_pairs
    shares = [s / n_rated for s in shares]
    p_e = sum(map(sum, weight)) / (q * (q - 1)) * sum(s * (1 - s) for s in shares)
    return (p_a - p_e) / (1 - p_e)
