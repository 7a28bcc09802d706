"""Judging alignment: paired statistics, agreement, safety cells, divergence, reward probes and standing instructions, each against a definition."""
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from minillama.align import mixed_prompts
from minillama.chat import Message, encode_prompt
from minillama.config import LlamaConfig
from minillama.data.gold import Gold
from minillama.data.hazards import comply, hazards, refuse
from minillama.data.world import OBEYED, STANDING, World
from minillama.evaluation import alignment
from minillama.evaluation.alignment import PROBES, distinct, divergence, helpfulness, probes, safety, standing_recall, wins
from minillama.evaluation.stats import gwet_ac2, mcnemar, paired, wilson
from minillama.generate import sample_many
from minillama.model import Llama
from minillama.reward import RewardModel
from minillama.tokenizer import Tokenizer

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=400, multiple_of=8, max_seq_len=256)


@pytest.fixture(scope="module")
def world():
    return World(3, "ci")


@pytest.fixture(scope="module")
def tokenizer(world, tmp_path_factory):
    texts = [t.prompt for t in world.instructions("train", 600)]
    return Tokenizer.train(texts, 400, tmp_path_factory.mktemp("tok") / "t.model")


# ---- prompts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, risky", [(None, 5), (20, 20), (0, 0)])
def test_a_stage_sees_as_many_risky_requests_as_it_asks_for(asked, risky, world):
    """Guards against a setting that nothing reads: PPO with few risky requests leaves violations to a stage that pays for them in helpfulness."""
    prompts = [r["messages"][-1]["content"] for r in mixed_prompts(world, "ppo", 40, asked)]
    harmless = {t.prompt for t in world.instructions("rlhf", 40, "ppo")}
    assert len(prompts) == 40 + risky and sum(p not in harmless for p in prompts) == risky


# ---- statistics -------------------------------------------------------------------------------------------------------------


def test_paired_is_the_interval_of_a_mean():
    """Guards against Wilson's interval on win rates with ties, and a variance divided by n."""
    rng = np.random.default_rng(0)
    outcomes = rng.choice([0.0, 0.5, 1.0], size=80, p=[0.2, 0.5, 0.3])
    got = paired(outcomes.tolist())
    half = 1.96 * outcomes.std(ddof=1) / math.sqrt(80)
    assert got == pytest.approx({"mean": outcomes.mean(), "n": 80, "low": outcomes.mean() - half, "high": outcomes.mean() + half})
    wide = wilson(outcomes.sum(), 80)
    assert got["high"] - got["low"] < wide[1] - wide[0] - 0.02  # ties carry less variance than wins
    assert paired([1.0, 1.0, 0.5])["high"] == 1.0 and paired([0.5] * 9) == {"mean": 0.5, "n": 9, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="got 1"):
        paired([1.0])


def test_wins_count_ties_half():
    """Guards against ties given to one side, and a win by rounding."""
    got = wins([0.9, 0.5, 0.1 + 0.2, 0.0], [0.5, 0.9, 0.3, 0.0])
    assert got["mean"] == 0.5 and got["ties"] == 0.5 and got["n"] == 4
    assert wins([1.0, 1.0, 0.2], [0.0, 0.5, 0.9])["mean"] == pytest.approx(2 / 3)
    a, b = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=(2, 50)).tolist()
    assert wins(a, b)["mean"] == pytest.approx(1 - wins(b, a)["mean"])
    with pytest.raises(ValueError):
        wins([1.0, 0.0], [1.0])


def test_mcnemar_is_an_exact_binomial_test():
    """Guards against a one-sided test, a chi-square, and prompts that count although both models agree."""
    rng = np.random.default_rng(0)
    for n, p, q in ((6, 0.5, 0.5), (40, 0.1, 0.4), (40, 0.5, 0.2), (200, 0.05, 0.02)):
        a, b = (rng.random(n) < p).tolist(), (rng.random(n) < q).tolist()
        only_a, differ = sum(x > y for x, y in zip(a, b, strict=True)), sum(x != y for x, y in zip(a, b, strict=True))
        coins = [math.comb(differ, k) / 2**differ for k in range(differ + 1)]
        want = sum(c for c in coins if c <= coins[only_a] * (1 + 1e-9))  # everything at most as likely as what was seen
        assert mcnemar(a, b) == pytest.approx(want) == mcnemar(b, a)
    assert mcnemar([True] * 9, [True] * 9) == 1.0 == mcnemar([], [])
    assert mcnemar([True] * 6 + [False] * 90, [False] * 96) == pytest.approx(2 / 2**6)


def test_mcnemar_against_scipy():
    """Guards against the same mistake in both the test and its brute force."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    for _ in range(20):
        a, b = (rng.random(60) < rng.random()).tolist(), (rng.random(60) < rng.random()).tolist()
        only_a, differ = sum(x > y for x, y in zip(a, b, strict=True)), sum(x != y for x, y in zip(a, b, strict=True))
        if differ:
            assert mcnemar(a, b) == pytest.approx(stats.binomtest(only_a, differ, 0.5).pvalue)


def ac2_by_hand(ratings, categories) -> float:
    """Gwet's AC2 from pairs of raters: mean weighted agreement of the pairs of an item, and chance agreement from the shares of the categories."""
    weight = lambda x, y: 1 - (x - y) ** 2 / (max(categories) - min(categories)) ** 2  # noqa: E731
    rated = [[x for x in item if x is not None] for item in ratings]
    agree = [np.mean([weight(x, y) for x, y in combinations(item, 2)]) for item in rated if len(item) > 1]
    share = {c: np.mean([item.count(c) / len(item) for item in rated if item]) for c in categories}
    q = len(categories)
    chance = sum(weight(x, y) for x in categories for y in categories) / (q * (q - 1)) * sum(p * (1 - p) for p in share.values())
    return (np.mean(agree) - chance) / (1 - chance)


def test_ac2_against_pairs_of_raters():
    """Guards against agreement of a rating with itself, and items with one rating that count as agreement or not at all."""
    rng = np.random.default_rng(0)
    for categories, raters in (((1, 2, 3, 4, 5), 3), ((0, 1), 4), ((1, 2, 5), 2)):
        truth = rng.choice(categories, size=120)
        ratings = [[int(t) if rng.random() < 0.6 else int(rng.choice(categories)) for _ in range(raters)] for t in truth]
        ratings = [[None if rng.random() < 0.4 else x for x in item] for item in ratings]
        assert {sum(x is not None for x in item) for item in ratings} == set(range(raters + 1))  # items without ratings, with one, and with more
        got = gwet_ac2(ratings, categories)
        assert got == pytest.approx(ac2_by_hand(ratings, categories), abs=1e-12) and 0.1 < got < 0.95
    assert gwet_ac2([[3, 3, 3], [1, 1, None], [5, 5, 5]], (1, 2, 3, 4, 5)) == pytest.approx(1.0)
    assert gwet_ac2([[1, 5]] * 4, (1, 5)) == pytest.approx(-1.0)  # never agree: p_a is 0, chance 1/2
    with pytest.raises(ValueError, match="two ratings"):
        gwet_ac2([[1, None], [None, 2]], (1, 2))


def test_ac2_does_not_collapse_where_kappa_does():
    """Guards against kappa's paradox (Gwet 2002): raters who agree on 118 of 125 cases, nearly all of one label, have AC1 0.9408 and kappa -0.0234."""
    ratings = [[1, 1]] * 118 + [[1, 0]] * 5 + [[0, 1]] * 2
    assert gwet_ac2(ratings, (0, 1)) == pytest.approx(0.9408, abs=5e-5)
    observed, yes = 118 / 125, (123 / 125, 120 / 125)
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    assert (observed - chance) / (1 - chance) == pytest.approx(-0.0234, abs=5e-5)


# ---- safety and helpfulness -------------------------------------------------------------------------------------------------


def test_safety_counts_harm_and_false_refusals_in_their_cells(world):
    """Guards against refusals of harmful requests that count as false, and cells that mix categories or vectors."""
    rng, tasks = world.rng("test"), hazards(world, "test", 210)
    refuses = {t.prompt: i % 3 == 0 for i, t in enumerate(tasks)}
    answers = [refuse(rng, t.args) if refuses[t.prompt] else comply(rng, t.args) for t in tasks]
    got = safety(world, tasks, answers)
    cells = {}
    for t in tasks:
        name = "violation" if t.args["harmful"] else "false_refusal"
        hit = refuses[t.prompt] != t.args["harmful"]
        cells.setdefault(f"{t.args['category']}/{t.args['vector']}", {}).setdefault(name, []).append(hit)
    assert set(got["cells"]) == set(cells) and len(cells) == 21
    for cell, names in cells.items():
        for name, hits in names.items():
            low, high = wilson(sum(hits), len(hits))
            assert got["cells"][cell][name] == pytest.approx({"mean": sum(hits) / len(hits), "n": len(hits), "low": low, "high": high})
    for name in ("violation", "false_refusal"):
        hits = [x for names in cells.values() for x in names[name]]
        assert got[name]["n"] == len(hits) and got[name]["mean"] == pytest.approx(sum(hits) / len(hits))
        assert 0.2 < got[name]["mean"] < 0.8
    never = safety(world, tasks, [refuse(rng, t.args) for t in tasks])
    assert never["violation"]["mean"] == 0 and never["false_refusal"]["mean"] == 1


def test_helpfulness_is_golds(world):
    """Guards against answers that are judged by another task."""
    tasks, rng = world.instructions("test", 30), world.rng("test")
    answers = [world.demonstrate(rng, t) if i % 2 else "I hope this helps." for i, t in enumerate(tasks)]
    gold = Gold(world)
    assert helpfulness(world, tasks, answers) == [gold.score(t, a).helpfulness for t, a in zip(tasks, answers, strict=True)]
    with pytest.raises(ValueError):
        helpfulness(world, tasks, answers[:-1])


def test_distinct_against_a_count():
    """Guards against n-grams that cross answers."""
    answers = ["a b a b", "b a", "c"]
    assert distinct(answers) == 2 / 4 and distinct(answers, 1) == 3 / 7 and distinct(["c"]) == 0.0  # ab ba ab, ba


# ---- divergence -------------------------------------------------------------------------------------------------------------


def test_divergence_against_row_by_row_log_probabilities(world, tokenizer, monkeypatch):
    """Guards against a KL over prompts or padding, an answer shifted by one token, and a model that differs from itself."""
    monkeypatch.setattr(alignment, "MAX_NEW", 15)
    model, reference = Llama(CONFIG).init_weights(1).eval(), Llama(CONFIG).init_weights(2).eval()
    tasks = world.instructions("test", 70)
    got = divergence(model, reference, tokenizer, tasks, seed=4)
    prompts = [encode_prompt(tokenizer, [Message("user", t.prompt)]) for t in tasks]
    drawn = sample_many(model, prompts, 15, 1.0, 4, [[tokenizer.eos_id]], alignment.BATCH)
    sums = []
    with torch.no_grad():
        for prompt, new in zip(prompts, drawn.tokens, strict=True):
            a, b = (m(torch.tensor([prompt + new]))[0].log_softmax(-1) for m in (model, reference))
            at = range(len(prompt), len(prompt) + len(new))
            sums.append(sum(float(a[i - 1, t] - b[i - 1, t]) for i, t in zip(at, new, strict=True)))
    assert got["kl"] == pytest.approx(np.mean(sums), abs=1e-4) and got["kl"] > 1
    assert got["standard_error"] == pytest.approx(np.std(sums, ddof=1) / math.sqrt(70), abs=1e-4)
    assert got["length"] == pytest.approx(np.mean([len(x) for x in drawn.tokens])) and got["n"] == 70
    own = divergence(model, model, tokenizer, tasks[:20])
    assert own["kl"] == 0 == own["standard_error"] and own["length"] > 5


# ---- reward probes ----------------------------------------------------------------------------------------------------------


def probed(world, monkeypatch, judge, n: int = 200) -> tuple[dict, list]:
    """`probes` with a reward that is judge(task, answer) instead of a model's; and the rows that were judged."""
    tasks = world.instructions("test", 500)
    by_prompt = {t.prompt: t for t in tasks}
    seen = []
    monkeypatch.setattr(alignment, "encode", lambda tok, messages, answer, limit: (messages[-1]["content"], answer))
    monkeypatch.setattr(alignment, "score", lambda model, rows: torch.tensor([float(judge(by_prompt[q], a)) for q, a in rows if not seen.append((q, a))]))
    return probes(RewardModel(CONFIG), None, world, tasks, n), seen


def test_probes_of_an_oracle_are_all_right(world, monkeypatch):
    """Guards against a probe whose "better" answer is not, which would blame or praise a reward model for nothing."""
    gold = Gold(world)
    got, rows = probed(world, monkeypatch, lambda t, a: gold.score(t, a).helpfulness)
    assert set(got) == set(PROBES)
    for name, rate in got.items():
        assert rate["mean"] == 1.0 and rate["n"] > 15, (name, rate)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in pairs)
    reversed_, _ = probed(world, monkeypatch, lambda t, a: -gold.score(t, a).helpfulness)
    assert all(rate["mean"] == 0.0 for rate in reversed_.values())


def test_probes_of_a_reward_that_sees_one_thing_are_right_there_only(world, monkeypatch):
    """Guards against probes that differ in more than they say: a judge of length, and a judge who says the same to all."""
    constant, _ = probed(world, monkeypatch, lambda t, a: 1.0, n=12)
    assert all(rate["mean"] == 0.5 and rate["n"] == 12 for rate in constant.values())
    longer, _ = probed(world, monkeypatch, lambda t, a: len(Gold.sentences(a)))
    assert longer["closing line"]["mean"] == 1 and longer["no filler"]["mean"] == 0 == longer["length"]["mean"]
    assert all(longer[k]["mean"] == 0.5 for k in ("right fact", "asked name", "asked words", "whole sentence"))


# ---- standing instructions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unseen", [False, True])
def test_standing_recall_counts_answers_that_obey_at_a_turn(unseen, world, monkeypatch):
    """Guards against a turn off by one, a full context that counts as a failure, silence that does not, and another dialogue's instruction."""
    asked = []

    def fake(model, tokenizer, dialogues, every, temperature, max_new_tokens, seed, batch=256):
        asked.append((dialogues, every))
        said = []
        for i, d in enumerate(dialogues):
            kind = next(k for k, s in STANDING.items() if d["standing"].startswith(s.split("{")[0]))
            value = d["standing"].removeprefix(STANDING[kind].split("{")[0]).rstrip(".")
            obeyed = OBEYED[kind].format(value=value, answer="Two things are a kite and a spoon.")
            answers = [obeyed if turn < 2 or (turn == 3 and i % 4 == 0) else "A kite." for turn in range(6)]
            full = answers[: 4 if i % 2 else 6]  # the context of the odd ones is full after 4 turns
            said.append([*answers[:2], ""] if i % 8 == 6 else full)  # and an empty answer ends five others
        return said

    monkeypatch.setattr("minillama.gatt.converse", fake)
    got = standing_recall(None, None, world, n=40, turns=(1, 2, 3, 4, 6, 9), unseen=unseen)
    assert {t: (r["mean"], r["n"]) for t, r in got.items()} == {1: (1.0, 40), 2: (1.0, 40), 3: (0.0, 40), 4: (0.25, 40), 6: (0.0, 20), 9: (0.0, 5)}
    ((dialogues, every),) = asked
    assert not every and len(dialogues) == 40 and all(len(d["turns"]) == 9 for d in dialogues)
    assert len({d["standing"] for d in dialogues}) > (5 if unseen else 15)
    standing_recall(None, None, world, n=2, turns=(2,), every=True)
    assert asked[-1][1] is True
    held = [p for p, s in world.split.items() if s == "test"]
    facts = [q for d in dialogues for q in d["turns"] if world.contamination([q])]
    assert held and len(facts) > 100  # questions about held-out facts: no training dialogue can have asked them
