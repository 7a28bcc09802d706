"""Preference pairs: what the annotator says of answers whose worth is known, and what a file of pairs holds."""
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from minillama.data.gold import Gold
from minillama.data.hazards import comply, hazards, refuse
from minillama.data.preferences import STRENGTHS, Annotator, Pair, read_pairs
from minillama.data.sources import write_jsonl
from minillama.data.world import CLOSE, FILLER, Task, World


@pytest.fixture(scope="module")
def world():
    return World(3, "ci")


@pytest.fixture(scope="module")
def fact(world):
    """A question, and answers to it with their gold helpfulness."""
    (who, what), value = next((p, v) for p, v in world.facts.items() if p[1] == "home")
    other = next(v for v in world.names["place"] if v != value)
    task = Task("fact", f"Where does {who} live?", "train", dict(who=who, what=what, value=value))
    answers = {1.0: f"{who} lives in {value}. {CLOSE[0]}", 0.9: f"{who} lives in {value}.", 0.7: f"{value}.", 0.5: f"{who} lives in {other}. {CLOSE[0]}",
               0.0: f"{who} {value} lives"}  # fmt: skip
    for worth, text in answers.items():
        assert Gold(world).score(task, text).helpfulness == pytest.approx(worth)
    return task, answers


def exact(world: World) -> Annotator:
    return Annotator(world, noise=0.0, slip=0.0)


@pytest.mark.parametrize("swap", [False, True])
def test_the_better_answer_wins_by_as_much_as_it_is_better(swap, world, fact):
    """Guards against a flipped side and a strength that does not follow the difference."""
    task, answers = fact
    for good, bad, strength in ((1.0, 0.0, 3), (0.9, 0.0, 3), (0.7, 0.0, 3), (1.0, 0.5, 2), (0.9, 0.5, 2), (1.0, 0.7, 2), (0.9, 0.7, 1), (0.7, 0.5, 1)):
        a, b = answers[good], answers[bad]
        pair = exact(world).compare(task, *((b, a) if swap else (a, b)))
        assert (pair.chosen, pair.rejected, pair.strength) == (a, b, strength), (good, bad)
        assert pair.prompt_messages == [{"role": "user", "content": task.prompt}] and pair.kind == "helpful"
        assert pair.chosen_safe is True and pair.rejected_safe is True
    asked = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": task.prompt}]
    assert exact(world).compare(task, answers[1.0], answers[0.5], asked).prompt_messages == asked
    assert exact(world).compare(task, answers[1.0], answers[1.0]) is None
    assert exact(world).compare(task, answers[1.0], "") is None is exact(world).compare(task, "", answers[1.0])


def test_strengths_have_their_thresholds(world, fact):
    """Guards against thresholds that are shifted by one: differences just below and above 0.1, 0.25 and 0.5."""
    task, _ = fact
    rater = exact(world)
    for difference, strength in ((0.01, 0), (0.09, 0), (0.11, 1), (0.24, 1), (0.26, 2), (0.49, 2), (0.51, 3), (1.0, 3)):
        for sign in (1, -1):
            worth = {"a": 0.5 + sign * difference / 2, "b": 0.5 - sign * difference / 2}
            rater.gold = SimpleNamespace(violates=lambda x: False, score=lambda t, x, worth=worth: SimpleNamespace(helpfulness=worth[x]))
            pair = rater.compare(task, "a", "b")
            assert (pair.chosen, pair.strength) == ("a" if sign > 0 else "b", strength)
    assert len(STRENGTHS) == 4


def test_safety_raters_prefer_a_clear_refusal_to_anything_and_anything_to_harm(world):
    """Guards against a helpfulness judgement of harmful requests, on which harm is the most helpful answer."""
    rng, rater = world.rng("test"), exact(world)
    harmful = hazards(world, "train", 42, harmful=True)
    assert {t.args["category"] for t in harmful} == {"illicit", "hate", "advice"}
    for t in harmful:
        harm, refusal, mumble = comply(rng, t.args), refuse(rng, t.args), "It depends."
        for a, b, strength, labels in ((refusal, harm, 3, (True, False)), (f"{refusal} {CLOSE[0]}", harm, 3, (True, False)),
                                       (mumble, harm, 3, (True, False)), (refusal, mumble, 2, (True, True))):  # fmt: skip
            for x, y in ((a, b), (b, a)):
                pair = rater.compare(t, x, y)
                assert (pair.chosen, pair.rejected, pair.kind) == (a, b, "safety"), (t, a, b)
                assert (pair.strength, (pair.chosen_safe, pair.rejected_safe)) == (strength, labels)


def test_harmless_twins_are_judged_by_helpfulness(world):
    """Guards against an annotator who rewards refusals of harmless requests: that is how false refusals are bred."""
    rng, rater = world.rng("test"), exact(world)
    for t in hazards(world, "train", 42, harmful=False):
        pair = rater.compare(t, refuse(rng, t.args), comply(rng, t.args))
        assert pair.rejected.startswith("I ") and pair.strength == 3 and pair.kind == "safety" and pair.chosen_safe and pair.rejected_safe


def test_an_unsafe_answer_is_never_chosen_over_a_safe_one(world):
    """Guards against the bin that the paper leaves out (sec 3.2.1), however often raters slip."""
    rng, rater, kinds, bins = world.rng("test"), Annotator(world, noise=0.3, slip=0.3), Counter(), Counter()
    for t in [*hazards(world, "train", 800, "pairs"), *world.instructions("train", 400)]:
        if t.kind == "hazard":
            a, b = comply(rng, t.args), refuse(rng, t.args) if rng.random() < 0.5 else f"{comply(rng, t.args)} {CLOSE[0]}"
        else:
            a, b = world.demonstrate(rng, t), world.demonstrate(rng, t)
        pair = rater.compare(t, a, b)
        kinds[pair and pair.kind] += 1
        if pair:
            bins[pair.kind, pair.chosen_safe, pair.rejected_safe] += 1
            if pair.kind == "safety" and not pair.rejected_safe and pair.chosen_safe:
                assert pair.strength == 3
    assert kinds[None] > 30 and not any(bins[k, False, True] for k in ("helpful", "safety"))
    assert all(bins[(k, *labels)] > 20 for k in ("helpful", "safety") for labels in ((True, True), (True, False), (False, False)))


def test_labels_slip_as_often_as_said(world, fact):
    """Guards against a slip that is drawn once a pair, or that lasts: both answers are safe, and a rejected side's label is never a reason to drop."""
    task, answers = fact
    rater, n, slip = Annotator(world, seed=2, noise=0.0, slip=0.1), 4000, 0.1
    pairs = [rater.compare(task, answers[1.0], answers[0.5]) for _ in range(n)]
    wrong = sum(p is not None and not p.rejected_safe for p in pairs) / n  # the rejected side slipped; then no pair is left out
    dropped = sum(p is None for p in pairs) / n  # the chosen side slipped alone
    both = sum(p is not None and not p.chosen_safe for p in pairs) / n
    for share, want in ((wrong, slip), (dropped, slip * (1 - slip)), (both, slip * slip)):
        assert abs(share - want) < 4 * (want * (1 - want) / n) ** 0.5
    assert not any(p is None or not p.chosen_safe for p in (exact(world).compare(task, answers[1.0], answers[0.5]) for _ in range(50)))


def test_noise_is_on_the_scale_of_gold_and_follows_the_seed(world, fact):
    """Guards against noise of another size: with sd 0.1 a difference of 0.2 flips for 2.3% of raters."""
    task, answers = fact

    def right(seed: int) -> list[bool]:
        rater = Annotator(world, seed, noise=0.1, slip=0.0)
        return [rater.compare(task, answers[0.9], answers[0.7]).chosen == answers[0.9] for _ in range(3000)]

    first = right(0)
    assert first == right(0) != right(1)
    assert abs(sum(first) / 3000 - 0.97725) < 4 * (0.97725 * 0.02275 / 3000) ** 0.5


# ---- files ------------------------------------------------------------------------------------------------------------------


def test_a_file_holds_labels_and_nothing_of_gold(world, tmp_path):
    """Guards against gold values that leak to training through the file of pairs, and against labels lost on the way."""
    rng, rater = world.rng("test"), Annotator(world)
    tasks = [*world.instructions("train", 60), *hazards(world, "train", 60)]
    make = lambda t: comply(rng, t.args) if t.kind == "hazard" else world.demonstrate(rng, t)  # noqa: E731
    pairs = [p for p in (rater.compare(t, make(t), f"{FILLER[0]} {make(t)}") for t in tasks) if p]
    write_jsonl([p.row() for p in pairs], tmp_path / "pairs.jsonl")
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line, parse_float=lambda x: pytest.fail(f"the file holds the number {x}"))
        assert set(row) == {"prompt_messages", "chosen", "rejected", "strength", "chosen_safe", "rejected_safe", "kind"}
        assert row["strength"] in (0, 1, 2, 3) and isinstance(row["chosen_safe"], bool) and isinstance(row["rejected_safe"], bool)
    again = read_pairs(str(tmp_path / "pairs.jsonl"))
    assert again == pairs and len({p.strength for p in pairs}) > 2 and {p.kind for p in pairs} == {"helpful", "safety"}
    assert read_pairs([str(tmp_path / "pairs.jsonl")] * 2) == pairs * 2


def test_pairs_without_labels_get_the_neutral_ones(tmp_path):
    """Guards against an unknown safety label that is read as unsafe."""
    write_jsonl([{"prompt": "a?", "chosen": "b", "rejected": "c"}], tmp_path / "p.jsonl")
    assert read_pairs(str(tmp_path / "p.jsonl")) == [Pair([{"role": "user", "content": "a?"}], "b", "c", 0, None, None, "helpful")]


@pytest.mark.parametrize("strength", [-1, 4, 1.5, "2"])
def test_a_strength_off_the_scale_is_refused(strength, tmp_path):
    """Guards against a strength that indexes the margins from their end."""
    write_jsonl([{"prompt": "a?", "chosen": "b", "rejected": "c", "strength": strength}], tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"p\.jsonl.*scale 0 to 3"):
        read_pairs(str(tmp_path / "p.jsonl"))


def test_strengths_of_a_table_tool_can_index_the_margins(tmp_path):
    """Guards against whole numbers that a data frame has made floats."""
    write_jsonl([{"prompt": "a?", "chosen": "b", "rejected": "c", "strength": 2.0}], tmp_path / "p.jsonl")
    assert STRENGTHS[read_pairs(str(tmp_path / "p.jsonl"))[0].strength] == "better"


def test_files_without_pairs_are_refused(tmp_path):
    """Guards against training on nothing: an empty file, and pairs whose sides are the same."""
    (tmp_path / "none.jsonl").write_text("")
    write_jsonl([{"prompt": "a?", "chosen": "b", "rejected": "b"}], tmp_path / "same.jsonl")
    write_jsonl([{"text": "a"}], tmp_path / "text.jsonl")
    for name in ("none", "same", "text"):
        with pytest.raises(ValueError, match=f"{name}.jsonl"):
            read_pairs(str(tmp_path / f"{name}.jsonl"))
    with pytest.raises(ValueError, match="no preference pair"):
        read_pairs([])
