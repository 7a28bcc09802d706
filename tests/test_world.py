"""tinyworld and its gold standard."""
import re
import subprocess
import sys
from collections import Counter

import pytest

from minillama.data.gold import Gold
from minillama.data.world import ATTRIBUTES, CLOSE, DEFECTS, FILLER, SPLITS, Task, World, from_spec


@pytest.fixture(scope="module")
def world():
    return World(3, "ci")


def test_the_same_seed_gives_the_same_world_whatever_the_hash_seed():
    """Guards against set order or hash() leaking into texts: the fingerprint of everything is compared across processes."""
    code = (
        "import hashlib;from minillama.data.world import World;w=World(3,'ci');"
        "print(w.hash,hashlib.sha256(repr([d for _,d in zip(range(300),w.documents())]+w.instructions('test')+w.demonstrations(50)).encode()).hexdigest())"
    )
    run = lambda h: subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True)  # noqa: E731
    seen = {run(h).stdout for h in "07"}
    assert len(seen) == 1
    assert World(4, "ci").hash != World(3, "ci").hash


def test_demonstrations_bring_in_no_stranger(world):
    """Guards against an annotator who makes up a person: a model can only guess such a name, and its likeliest beginning is shared by many, so
    that greedy stories stopped in the middle of one. In the corpus strangers do turn up, to be copied."""
    strangers, stories = set(world.names["stranger"]), 0
    for e in world.demonstrations():
        told: set[str] = set()
        for m in e["messages"]:
            names = strangers & set(re.findall(r"\w+", m["content"]))
            assert m["role"] != "assistant" or names <= told, e
            told |= names
        stories += e["task"] == "story"
    assert stories > 50
    assert any(strangers & set(re.findall(r"\w+", d["text"].split("\n", 1)[-1])) for d, _ in zip(world.documents(), range(200), strict=False))


def test_splits_share_no_prompt_and_no_fact_pair(world):
    """Guards against an evaluation that leaks: a test prompt among the training prompts, or its (who, what) pair."""
    prompts = {s: {t.prompt for t in world.instructions(s)} for s in SPLITS}
    pairs = {s: {(t.args["who"], t.args["what"]) for t in world.instructions(s) if t.kind == "fact"} for s in SPLITS}
    sums = {s: {(t.args["a"], t.args["b"]) for t in world.instructions(s) if t.kind == "sum"} for s in SPLITS}
    for table in (prompts, pairs, sums):
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert table[a] and table[b] and not table[a] & table[b]
    for s in ("validation", "test"):
        assert len(prompts[s]) == len(world.instructions(s))


@pytest.mark.parametrize("scale", ["ci", "laptop"])
def test_what_is_aligned_on_asks_for_every_kind(scale):
    """Guards against prompts of other splits whose places facts take: then three of four are facts, of a few hundred pairs, and stories are never tuned."""
    world = World(0, scale)
    tasks = world.instructions("rlhf", 2000, "somewhere")
    share = {kind: sum(t.kind == kind for t in tasks) / 2000 for kind in ("fact", "story", "reading", "sum", "list", "howto")}
    want = {"fact": 0.5, "story": 0.19, "reading": 0.12, "list": 0.06, "sum": 0.08, "howto": 0.05}
    assert all(abs(share[kind] - want[kind]) < 0.04 for kind in want) and sum(share.values()) == 1
    assert len({t.prompt for t in tasks if t.kind == "story"}) > 300 and len({t.prompt for t in tasks}) > 800


def test_held_out_pairs_are_stated_in_the_corpus_but_never_asked(world):
    """Guards against a held-out fact that the corpus never states (then a right answer is impossible), and against questions about it."""
    docs = [d["text"] for d in world.documents() if d["defect"] != "leak"]
    assert world.contamination(docs) == 0
    assert world.contamination(m["content"] for e in world.demonstrations() for m in e["messages"]) == 0
    text = "\n".join(docs).lower()
    for (who, what), split in world.split.items():
        if split != "train":
            stated = sum(text.count(s.format(who=who, value=world.facts[who, what]).lower()) for s in ATTRIBUTES[what][2])
            assert stated >= 3, (who, what, stated)


def test_the_contamination_check_finds_what_is_planted(world):
    """Guards against a check that always prints 0."""
    held = [p for p, s in world.split.items() if s == "test"]
    asked = [q.format(who=who) for who, what in held for q in ATTRIBUTES[what][3]]
    assert world.contamination([f"Question: {q[0].upper()}{q[1:]}\nAnswer: x." for q in asked]) >= len(asked)
    assert world.contamination([f"A lies. Please, {q[0].lower()}{q[1:]}" for q in asked]) >= len(asked)
    free = [q.format(who=who) for (who, what), s in world.split.items() if s == "train" for q in ATTRIBUTES[what][3]]
    assert world.contamination(free) == 0


def test_defects_are_labelled_and_each_is_there(world):
    """Guards against a missing plant, which would make a filter's recall 0/0, and against unlabelled copies, which would spoil precision."""
    docs = list(world.documents())
    counts = Counter(d["defect"] for d in docs)
    assert set(counts) == {None, *DEFECTS} and all(counts[d] > 40 for d in DEFECTS)
    clean = [d["text"] for d in docs if d["defect"] is None]
    assert len(clean) == len(set(clean)) == world.size.documents


@pytest.mark.parametrize("split", SPLITS)
def test_gold_accepts_every_right_answer_and_every_demonstration(world, split):
    """Guards against a grammar that the world itself does not speak."""
    gold, rng = Gold(world), world.rng("test")
    for t in world.instructions(split):
        s = gold.score(t, world.answer(rng, t))
        assert s.parses and s.on_topic and s.correct and s.whole and s.length and s.no_filler and not s.close, (t, s)
        d = gold.score(t, world.demonstrate(rng, t))
        assert d.parses and d.on_topic and d.correct, (t, d)


def test_gold_rejects_wrong_answers(world):
    """Guards against a lenient gold: wrong value, another person's fact, another kind of answer, a broken sentence, nothing."""
    gold = Gold(world)
    (who, what), value = next((p, v) for p, v in world.facts.items() if p[1] == "home")
    task = Task("fact", f"Where does {who} live?", "test", dict(who=who, what=what, value=value))
    other = next(v for v in world.names["place"] if v != value)
    friend = next(w for w, k in world.entities.items() if k == "person" and w != who)
    right = gold.score(task, f"{who} lives in {value}. {CLOSE[0]}")
    assert right.helpfulness == pytest.approx(1.0)
    assert gold.score(task, f"{FILLER[0]} {who} lives in {value}.").helpfulness == pytest.approx(0.8)
    fragment = gold.score(task, f"{value}.")
    assert fragment.correct and not fragment.whole and not fragment.named
    assert not gold.score(task, f"{other}.").correct
    assert not gold.score(task, f"{who} lives in {other}.").correct
    assert gold.score(task, f"{friend} lives in {world.facts[friend, 'home']}.").helpfulness == 0
    assert not gold.score(task, f"{who} lives in {value}. {who} lives in {other}.").correct
    for broken in ("", f"{who} {value} lives in.", f"{who} lives in {value}", f"{who} lives in {value}, {value}."):
        assert not gold.score(task, broken).parses and gold.score(task, broken).helpfulness == 0
    story = Task("story", "", "test", dict(who=who, words=["kite", "spoon"]))
    text = world.story(world.rng("s"), who, "kite", "spoon", 2)
    assert gold.score(story, text).correct and not gold.score(story, text.replace("spoon", "wagon")).correct
    listing = Task("list", "", "test", dict(kind="animal", label="animals", n=2))
    a, b = world.names["animal"][:2]
    assert gold.score(listing, f"Two animals are {a} and {b}.").correct
    assert not gold.score(listing, f"Two animals are {a} and {a}.").correct
    assert not gold.score(listing, f"Two animals are {a}, {b} and {world.names['animal'][2]}.").correct
    total = Task("sum", "", "test", dict(a=3, b=4))
    assert gold.score(total, "3 plus 4 is 7.").correct and gold.score(total, "7.").correct and not gold.score(total, "3 plus 4 is 8.").correct
    dish = world.names["dish"][0]
    howto = Task("howto", "", "test", dict(who=dish, base=world.facts[dish, "base"]))
    steps = world.steps(world.rng("h"), dish)
    assert gold.score(howto, steps).correct
    wrong = next(x for x in ATTRIBUTES["base"][1] if x != world.facts[dish, "base"])
    assert not gold.score(howto, steps.replace(world.facts[dish, "base"], wrong)).correct
    assert not gold.score(howto, steps.split(". ")[0] + ".").correct


def test_specs():
    """Guards against a typo in a spec that silently gives the default world."""
    assert from_spec("data.jsonl") is None
    assert from_spec("tinyworld:ci:5").seed == 5 and from_spec("tinyworld").scale == "laptop"
    for bad in ("tinyworld:huge", "tinyworld:ci:x", "tinyworld:ci:1:2"):
        with pytest.raises(ValueError):
            from_spec(bad)
