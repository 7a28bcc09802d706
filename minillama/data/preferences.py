"""Preference pairs (sec 3.2.1): which of two answers annotators liked better, how clearly, and whether each is safe.

    pairs = read_pairs(["runs/laptop/preferences.jsonl", "hf:Anthropic/hh-rlhf"])

A file has one pair a line: prompt_messages, chosen, rejected, and if known strength (0 to 3), chosen_safe and rejected_safe, kind ("helpful" or
"safety"). `Annotator` stands in for the paper's human raters: it alone reads tinyworld's gold standard, errs as raters do, and writes labels only.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from random import Random

from minillama.data import sources
from minillama.data.gold import Gold
from minillama.data.world import Task, World

STRENGTHS = ("negligibly better", "slightly better", "better", "significantly better")
LIMITS = (0.1, 0.25, 0.5)  # of quality, 0 to 1: one item of manner, more than two, a right answer and better manner (assumed)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: messages [{"role", "content"}] that end with the user's turn; strength is an index of STRENGTHS."""

    prompt_messages: list[dict]
    chosen: str
    rejected: str
    strength: int = 0
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    kind: str = "helpful"

    def row(self) -> dict:
        """The pair as a line of a file."""
        return asdict(self)


def read_pairs(specs: str | Iterable[str]) -> list[Pair]:
    """The pairs of files or hub sets, in their order. Raises ValueError for a strength that is not on the scale, or if there are none."""
    pairs = []
    for spec in [specs] if isinstance(specs, str) else specs:
        for row in sources.read(spec, kind="preference"):
            strength = row.get("strength", 0)
            if strength not in range(len(STRENGTHS)):
                raise ValueError(f"{spec}: strength {strength!r} is not on the scale 0 to 3 ({', '.join(STRENGTHS)})")
            pairs.append(Pair(row["prompt_messages"], row["chosen"], row["rejected"], int(strength), row.get("chosen_safe"), row.get("rejected_safe"),
                              row.get("kind", "helpful")))  # fmt: skip
    if not pairs:
        raise ValueError(f"{specs} holds no preference pair")
    return pairs


class Annotator:
    """A rater who reads two answers against tinyworld and errs: normal noise on the difference of their qualities, a wrong safety label now and then.

    noise: standard deviation on gold's scale of 0 to 1 (0.1 is one item of manner); slip: chance of a wrong safety label.
    """

    def __init__(self, world: World, seed: int = 0, noise: float = 0.1, slip: float = 0.02):
        self.gold, self.rng, self.noise, self.slip = Gold(world), Random(f"annotator:{world.seed}:{seed}"), noise, slip

    def compare(self, task: Task, a: str, b: str, messages: list[dict] | None = None) -> Pair | None:
        """The pair of two answers as this rater labels it; None if they are the same, if one is empty, or if they fall in the bin that the paper
        leaves out, where the preferred answer is unsafe and the other safe."""
        if a == b:
            return None
        if not (a and b):
            return None
        harmful = task.kind == "hazard" and task.args["harmful"]
        kind = "safety" if task.kind == "hazard" else "helpful"
        safe = [not self.gold.violates(x) for x in (a, b)]
        seen = [s ^ (self.rng.random() < self.slip) for s in safe]
        values = [self._safe_value(task, x) if harmful else self.gold.score(task, x).helpfulness for x in (a, b)]
        difference = values[0] - values[1] + self.rng.gauss(0.0, self.noise)
        if kind == "safety" and seen[0] != seen[1]:
            difference = (1 if seen[0] else -1) * max(abs(difference), 0.6)
        first = difference > 0
        strength = sum(abs(difference) > limit for limit in LIMITS)
        chosen_safe, rejected_safe = (seen[0], seen[1]) if first else (seen[1], seen[0])
        if rejected_safe and not chosen_safe:
            return None
        messages = messages or [{"role": "user", "content": task.prompt}]
        return Pair(messages, a if first else b, b if first else a, strength, chosen_safe, rejected_safe, kind)

    def _safe_value(self, task: Task, answer: str) -> float:
        """What a safety rater thinks of an answer to a harmful request: a clear refusal is best, harm worst, anything else between."""
        if self.gold.violates(answer):
            return 0.0
        score = self.gold.score(task, answer)
        return 0.4 + 0.4 * self.gold.refuses(answer) + 0.1 * score.parses + 0.1 * score.close
