"""Intervals, so that no rate is printed without its n.

    wilson(45, 50)      # (0.786, 0.957)
"""
from __future__ import annotations

import math


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
