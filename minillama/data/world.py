"""tinyworld: a small invented world, generated from a seed, that stands in for the paper's corpora and annotators.

    world = World(seed=0, scale="laptop");  world.documents();  world.instructions("train")

People, places, animals, things and dishes have facts that stay true in every text. The world writes pretraining documents of
nine kinds, plants labelled defects among them for the cleaning chapter, and writes instructions in four splits. A
(who, what) pair belongs to one split for good. Pairs of `train` are asked about in pretraining text and in SFT. Pairs of the others occur in that text as
statements only: `rlhf` prompts are asked for the first time when a model samples answers to them, so that there is something to learn from the better
ones, and `validation` and `test` prompts are never trained on, so a right answer shows that the model can say what it read.

Everything is a pure function of (seed, scale). What is right about an answer is decided in gold.py, which training never imports.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

SPLITS = ("train", "rlhf", "validation", "test")


@dataclass(frozen=True)
class Scale:
    """Sizes of a world: how many of each kind, pretraining documents, training instructions, and tasks of the test split."""

    people: int
    places: int
    animals: int
    things: int
    dishes: int
    documents: int
    instructions: int
    tasks: int


SCALES = {
    "ci": Scale(people=16, places=8, animals=8, things=8, dishes=8, documents=5_000, instructions=4_000, tasks=200),
    "laptop": Scale(people=32, places=12, animals=12, things=12, dishes=16, documents=18_000, instructions=9_000, tasks=1_000),
    "gpu": Scale(people=400, places=60, animals=40, things=40, dishes=40, documents=400_000, instructions=40_000, tasks=2_000),
}

# what -> (kind of who, values or the kind they come from, statements, questions)
ATTRIBUTES: dict[str, tuple[str, object, tuple[str, ...], tuple[str, ...]]] = {
    "home": ("person", "place",
             ("{who} lives in {value}.", "The home of {who} is in {value}.", "{who} has a house in {value}."),
             ("Where does {who} live?", "In which place does {who} live?", "Tell me where the home of {who} is.",
             "Can you say where {who} lives?", "Please tell me the home of {who}.")),
    "job": ("person", ("baker", "potter", "sailor", "weaver", "teacher", "gardener", "painter", "smith", "shepherd", "doctor"),
            ("{who} works as a {value}.", "The job of {who} is {value}.", "{who} is a {value}."),
            ("What is the job of {who}?", "What work does {who} do?", "Tell me what job {who} has.",
            "Can you say what job {who} has?", "Please tell me the job of {who}.")),
    "pet": ("person", "animal",
            ("{who} keeps a {value} as a pet.", "The pet of {who} is a {value}.", "{who} has a pet {value}."),
            ("What pet does {who} keep?", "Which animal is the pet of {who}?", "Tell me about the pet of {who}.",
            "Can you say what pet {who} has?", "Please tell me the pet of {who}.")),
    "dish": ("person", "dish",
             ("{who} likes to eat {value}.", "The favourite dish of {who} is {value}.", "{who} eats {value} every week."),
             ("What does {who} like to eat?", "Which dish is the favourite of {who}?", "Tell me the favourite dish of {who}.",
             "Can you say what {who} eats every week?", "Please tell me which dish {who} likes.")),
    "colour": ("person", ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "silver", "brown"),
               ("{who} likes the colour {value}.", "The favourite colour of {who} is {value}.", "{who} always wears {value}."),
               ("Which colour does {who} like?", "What is the favourite colour of {who}?", "Tell me which colour {who} wears.",
               "Can you say what colour {who} wears?", "Please tell me the colour of {who}.")),
    "music": ("person", ("drum", "flute", "fiddle", "harp", "horn", "bell", "lute", "pipe"),
              ("{who} plays the {value}.", "The instrument of {who} is the {value}.", "{who} makes music on the {value}."),
              ("What instrument does {who} play?", "Which instrument is that of {who}?", "Tell me what {who} plays.",
              "Can you say what {who} makes music on?", "Please tell me the instrument of {who}.")),
    "river": ("place", "river",
              ("The river of {who} is the {value}.", "{who} lies on the river {value}.", "The river {value} runs through {who}."),
              ("What is the river of {who}?", "On which river does {who} lie?", "Tell me which river runs through {who}.",
              "Can you say on which river {who} is?", "Please tell me the river of {who}.")),
    "craft": ("place", ("lamps", "boats", "carpets", "clocks", "knives", "cheese", "honey", "ropes", "paper", "glass"),
              ("{who} is known for its {value}.", "People in {who} make {value}.", "The {value} of {who} are famous."),
              ("What is {who} known for?", "What do people in {who} make?", "Tell me what {who} is famous for.",
              "Can you say what is made in {who}?", "Please tell me the craft of {who}.")),
    "food": ("animal", ("grass", "fish", "seeds", "roots", "berries", "worms", "leaves", "nuts"),
             ("{who} eats {value}.", "The food of {who} is {value}.", "{who} feeds on {value}."),
             ("What does {who} eat?", "What is the food of {who}?", "Tell me what {who} feeds on.",
             "Can you say what {who} eats?", "Please tell me the food of {who}.")),
    "bed": ("animal", ("caves", "trees", "barns", "reeds", "burrows", "bushes", "nests", "ruins"),
            ("{who} sleeps in {value}.", "The bed of {who} is found in {value}.", "At night {who} rests in {value}."),
            ("Where does {who} sleep?", "Where is the bed of {who} found?", "Tell me where {who} rests at night.",
            "Can you say where {who} sleeps?", "Please tell me the bed of {who}.")),
    "stuff": ("thing", ("wood", "iron", "clay", "copper", "stone", "leather", "wool", "bone"),
              ("{who} is made of {value}.", "The stuff of {who} is {value}.", "People make {who} from {value}."),
              ("What is {who} made of?", "What is the stuff of {who}?", "Tell me from what people make {who}.",
              "Can you say what makes up {who}?", "Please tell me the stuff of {who}.")),
    "base": ("dish", ("beans", "plums", "rice", "eggs", "milk", "corn", "apples", "onions"),
             ("{who} is cooked with {value}.", "The main part of {who} is {value}.", "Cooks make {who} from {value}."),
             ("What is {who} cooked with?", "What is the main part of {who}?", "Tell me from what cooks make {who}.",
             "Can you say what is in {who}?", "Please tell me the main part of {who}.")),
}  # fmt: skip

STORY_OPEN = ("One day {p} walked to {place} with {q}.", "{p} and {q} went to {place}.", "Early one morning {p} met {q} in {place}.")
STORY_BODY = (
    "{p} carried a {t}.", "{q} asked {p} about the {t}.", "{p} gave the {t} to {q}.", "{q} put the {t} near the {u}.",
    "There {p} found a {u}.", "{p} showed the {u} to {q}.", "{q} liked the {u} more than the {t}.", "Then {p} looked for the {t}.",
    "{q} laughed, and {p} laughed too.", "The {u} of {p} was old.", "{p} hid the {t} under the {u}.", "Soon {q} came back with the {u}.",
)  # fmt: skip
STORY_END = ("After that {p} kept the {t}.", "In the evening {p} and {q} went home with the {u}.", "So {q} thanked {p} for the {t}.")
WORDS = (
    "lantern kite basket ribbon hammer candle mirror ladder bucket feather button pillow wagon whistle needle spoon barrel anchor "
    "shovel blanket bottle saddle marble pencil"
).split()
OWN = ("The {t} belongs to {p}.", "The {t} is with {p}.")
LIST_KINDS = {"animals": "animal", "places": "place", "dishes": "dish", "things": "thing", "people": "person", "rivers": "river"}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
STEPS = ("To make {dish}, first wash the {base}.", "Then cut the {base} and put it in a {pot}.", "Last, cook the {dish} for {n} minutes.")
POTS = ("pot", "pan", "bowl", "kettle")
CLOSE = ("I hope this helps.", "Ask me if you need more.")
FILLER = ("Well, let me think.", "Oh, what a good question.")
LEADS = ("Ahoy Hail Bravo Hurrah Behold Indeed Listen Welcome Alas Salute Cheers Marvel Hello Look Hear Quiet".split(), "Verily Hark Truly Lo".split())
STANDING = {"lead": "Always begin with {value}.", "name": "Always call me {value}."}
OBEYED = {"lead": "{value}! {answer}", "name": "{answer} So it is, {value}."}
DEFECTS = ("near_duplicate", "exact_duplicate", "boilerplate", "private", "gibberish", "toxic", "leak")

_ONSETS, _VOWELS, _CODAS = "b d f g k l m n p r s t v z br dr kl tr st".split(), "a e i o u ai ea".split(), ("", "n", "l", "r", "s", "k")


@dataclass(frozen=True)
class Task:
    """What an instruction asks, as data: the task's kind, its arguments, its split. gold.py checks answers against it."""

    kind: str  # fact, story, reading, list, sum, howto; hazard (hazards.py)
    prompt: str
    split: str
    args: dict

    @property
    def id(self) -> str:
        """A short hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def from_spec(spec: str) -> World | None:
    """The world of "tinyworld", "tinyworld:SCALE" or "tinyworld:SCALE:SEED"; None for a spec of another kind. Raises ValueError if malformed."""
    name, *rest = spec.split(":")
    if name != "tinyworld":
        return None
    scale, seed = (rest + ["laptop", "0"][len(rest) :])[:2]
    if len(rest) > 2 or not seed.isdigit():
        raise ValueError(f"{spec!r} is not tinyworld[:SCALE[:SEED]]")
    return World(int(seed), scale)


class World:
    """One world. Raises ValueError for an unknown scale. `seed` changes names, facts, splits and texts."""

    def __init__(self, seed: int = 0, scale: str = "laptop"):
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}; there are {', '.join(SCALES)}")
        self.seed, self.scale, self.size = seed, scale, SCALES[scale]
        rng, taken = self.rng("names"), set()
        s = self.size
        name = lambda ending="": self._name(rng, taken, ending)  # noqa: E731
        self.names: dict[str, list[str]] = {
            "person": [sentence(name()) for _ in range(s.people)],
            "stranger": [sentence(name()) for _ in range(3 * s.people)],  # people of stories only: nothing is known of them
            "place": [sentence(name("am")) for _ in range(s.places)],
            "river": [sentence(name("e")) for _ in range(8)],
            "group": [sentence(name("i")) for _ in range(6)],
            "animal": [name("o") for _ in range(s.animals)],
            "thing": [name("ex") for _ in range(s.things)],
            "dish": [f"{name()} {kind}" for kind in ("soup", "pie", "stew", "bread", "cake") * (s.dishes // 5 + 1)][: s.dishes],
        }
        self.facts: dict[tuple[str, str], str] = {}
        for what, (kind, values, _, _) in ATTRIBUTES.items():
            pool = list(self.names[values] if isinstance(values, str) else values)
            for i, who in enumerate(rng.sample(self.names[kind], len(self.names[kind]))):
                self.facts[self.display(kind, who), what] = pool[i % len(pool)] if i < len(pool) else rng.choice(pool)
        self.split: dict[tuple[str, str], str] = {}
        for what in ATTRIBUTES:  # stratified, so every attribute is asked about in every split
            pairs = [p for p in self.facts if p[1] == what]
            rng.shuffle(pairs)
            for i, pair in enumerate(pairs):
                self.split[pair] = "test" if i % 4 == 0 else "validation" if i % 8 == 1 else "rlhf" if i % 16 in (2, 7, 11) else "train"
        sums = [(a, b) for a in range(10) for b in range(10)]
        rng.shuffle(sums)
        self.sums = {pair: ("test" if i < 20 else "validation" if i < 28 else "rlhf" if i < 44 else "train") for i, pair in enumerate(sums)}

    def rng(self, purpose: str) -> Random:
        """A generator that depends only on the world's seed, its scale and `purpose`."""
        return Random(f"tinyworld:{self.seed}:{self.scale}:{purpose}")  # strings are hashed by SHA-512, not by hash()

    @staticmethod
    def _name(rng: Random, taken: set[str], ending: str = "", syllables: int = 2) -> str:
        while True:
            text = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables - bool(ending)))
            text += (rng.choice(_ONSETS) + ending) if ending else rng.choice(_CODAS)
            if text not in taken and len(text) > 3:
                taken.add(text)
                return text

    @staticmethod
    def display(kind: str, who: str) -> str:
        """How an entity stands in a sentence: animals and things with an article."""
        return f"the {who}" if kind in ("animal", "thing") else who

    @cached_property
    def entities(self) -> dict[str, str]:
        """display name -> kind, for everything that has facts."""
        kinds = dict.fromkeys(kind for kind, *_ in ATTRIBUTES.values())  # a set's order would change with PYTHONHASHSEED
        return {self.display(kind, who): kind for kind in kinds for who in self.names[kind]}

    @cached_property
    def hash(self) -> str:
        """A fingerprint of facts and splits, for reports: two runs with the same hash had the same world."""
        data = [[*k, v, self.split[k]] for k, v in sorted(self.facts.items())]
        return hashlib.sha256(json.dumps([data, sorted((*k, v) for k, v in self.sums.items())]).encode()).hexdigest()[:12]

    def statement(self, rng: Random, who: str, what: str) -> str:
        """One true sentence about (who, what)."""
        return sentence(rng.choice(ATTRIBUTES[what][2]).format(who=who, value=self.facts[who, what]))

    def question(self, rng: Random, who: str, what: str) -> str:
        """One question or request about (who, what)."""
        return sentence(rng.choice(ATTRIBUTES[what][3]).format(who=who))

    # ---- pretraining documents -----------------------------------------------------------------------------------------

    KINDS = ("entry", "story", "qa", "dialogue", "list", "howto", "sums", "reading", "deed")
    KIND_WEIGHTS = (0.28, 0.16, 0.18, 0.06, 0.05, 0.05, 0.06, 0.13, 0.03)

    def documents(self, defects: bool = True) -> Iterator[dict]:
        """The pretraining corpus: {"text", "source", "kind", "defect"}; `defect` is None or one of DEFECTS (about 2% each).

        The label is for scoring filters only. Test prompts are planted with their answers (`leak`) so that the contamination filter has
        something to find: a corpus that skips cleaning is contaminated, and `contamination` says so.
        """
        rng = self.rng("documents")
        recent: list[str] = []
        tests, written, n = self.instructions("test"), set(), 0
        while n < self.size.documents:
            kind = rng.choices(self.KINDS, self.KIND_WEIGHTS)[0]
            doc = {"text": getattr(self, f"_{kind}")(rng), "source": "encyclopedia" if kind == "entry" else "web", "kind": kind, "defect": None}
            if doc["text"] in written:  # a copy is a defect, and those are planted and labelled
                continue
            written.add(doc["text"])
            n += 1
            if len(doc["text"]) > 300:
                recent = [*recent[-199:], doc["text"]]
            yield doc
            if defects and rng.random() < 0.02 * len(DEFECTS) and len(recent) > 20:
                yield self._defect(rng, rng.choice(DEFECTS), recent, tests)

    def _some(self, rng: Random, n: int, known: float = 0.6) -> list[str]:
        """n different people: known ones or, to teach copying, strangers, about whom only this document can tell."""
        people: list[str] = []
        while len(people) < n:
            p = rng.choice(self.names["person" if rng.random() < known else "stranger"])
            if p not in people:
                people.append(p)
        return people

    def _entry(self, rng: Random) -> str:
        lines = []
        for who in rng.sample(list(self.entities), rng.randint(1, 3)):
            whats = [what for (w, what) in self.facts if w == who] if who not in self._whats else self._whats[who]
            whats = rng.sample(whats, min(len(whats), rng.randint(3, 6)))
            lines.append(f"{sentence(who)}: " + " ".join(self.statement(rng, who, what) for what in whats))
        return "\n".join(lines)

    @cached_property
    def _whats(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for who, what in self.facts:
            table.setdefault(who, []).append(what)
        return table

    @cached_property
    def _askable(self) -> list[tuple[str, str]]:
        return [pair for pair, split in self.split.items() if split == "train"]

    def story(self, rng: Random, p: str, t: str, u: str, body: int, known: float = 0.6) -> str:
        """A story about person p with the things t and u: an opening, `body` sentences, an end; p, t and u all occur. Who else is in it is somebody known
        by that chance, or else a stranger."""
        q = next(x for x in self._some(rng, 2, known) if x != p)
        slots = dict(p=p, q=q, t=t, u=u, place=rng.choice(self.names["place"]))
        middle = rng.sample(STORY_BODY, body)
        text = [rng.choice(STORY_OPEN), *middle, rng.choice(STORY_END)]
        if "{t}" not in "".join(text):
            text[1] = "{p} carried a {t}."
        if "{u}" not in "".join(text):
            text[-2] = "{p} showed the {u} to {q}."
        return " ".join(s.format(**slots) for s in text)

    def _story(self, rng: Random) -> str:
        p = self._some(rng, 1)[0]
        t, u = rng.sample([*WORDS, *self.names["thing"]], 2)
        return f"A story about {p}, a {t} and a {u}\n" + self.story(rng, p, t, u, rng.randint(3, 6))

    def _qa(self, rng: Random) -> str:
        lines = []
        for _ in range(rng.randint(3, 6)):
            if rng.random() < 0.7:
                who, what = rng.choice(self._askable)
                lines.append(f"Question: {self.question(rng, who, what)}\nAnswer: {self.statement(rng, who, what)}")
            elif task := rng.choice((self._task_sum, self._task_sum, self._task_list, self._task_list, self._task_howto))(rng, "train"):
                lines.append(f"Question: {task.prompt}\nAnswer: {self.answer(rng, task)}")
        return "\n".join(lines) if lines else self._qa(rng)

    def _dialogue(self, rng: Random) -> str:
        a, b = self._some(rng, 2, known=0.5)
        lines = []
        for _ in range(rng.randint(2, 4)):
            who, what = rng.choice(self._askable)
            lines.append(f"{a}: {self.question(rng, who, what)}\n{b}: {self.statement(rng, who, what)}")
        return "\n".join(lines)

    def _list(self, rng: Random) -> str:
        label = rng.choice(list(LIST_KINDS))
        items = rng.sample(self.names[LIST_KINDS[label]], rng.randint(2, 5))
        if rng.random() < 0.3:
            return f"Some {label}:\n" + "\n".join(f"{i + 1}. {x}" for i, x in enumerate(items))
        return "\n".join(self.some_of(rng, rng.choice(list(LIST_KINDS)), rng.randint(2, 5)) for _ in range(rng.randint(2, 4)))

    def some_of(self, rng: Random, label: str, n: int) -> str:
        """A sentence that lists n different things of a kind."""
        items = rng.sample(self.names[LIST_KINDS[label]], n)
        return f"{sentence(NUMBERS[n])} {label} are {', '.join(items[:-1])} and {items[-1]}."

    def steps(self, rng: Random, dish: str) -> str:
        """How to make a dish: three steps, the main part being the dish's fact."""
        return " ".join(STEPS).format(dish=dish, base=self.facts[dish, "base"], pot=rng.choice(POTS), n=rng.randint(2, 9) * 5)

    def _howto(self, rng: Random) -> str:
        dish = rng.choice(self.names["dish"])
        return f"How to make {dish}\n{self.steps(rng, dish)}"

    def _sums(self, rng: Random) -> str:
        return "\n".join(f"{a} plus {b} is {a + b}." for a, b in rng.choices(list(self.sums), k=rng.randint(4, 9)))

    def _deed(self, rng: Random) -> str:
        from minillama.data.hazards import deed_document  # which builds on this module

        return deed_document(self, rng)

    def owners(self, rng: Random, n: int) -> tuple[list[tuple[str, str]], str]:
        """n different people with n different things, and the sentences that say who has what."""
        pairs = list(zip(self._some(rng, n), rng.sample([*WORDS, *self.names["thing"]], n), strict=True))
        return pairs, " ".join(rng.choice(OWN).format(p=p, t=t) for p, t in pairs)

    def _reading(self, rng: Random) -> str:
        pairs, text = self.owners(rng, rng.randint(2, 4))
        lines = [text]
        for p, t in rng.sample(pairs, len(pairs)):
            lines.append(f"Question: Who has the {t}?\nAnswer: The {t} belongs to {p}.")
        return "\n".join(lines)

    def _defect(self, rng: Random, defect: str, recent: list[str], tests: list[Task]) -> dict:
        base = rng.choice(recent) if "duplicate" in defect else self._story(rng)
        if defect == "near_duplicate":
            words = base.split(" ")
            i = rng.randrange(len(words))
            words[i] = rng.choice(WORDS)
            text = " ".join(words)
        elif defect == "exact_duplicate":
            text = base
        elif defect == "boilerplate":
            text = "\n".join(rng.sample((
                "Home | About | Contact | Log in", "Click here to subscribe to our newsletter!", "All rights reserved.", "Cookie policy",
                "Share this page on social media", "Terms of use | Privacy policy", "Read more >>", "Next page | Previous page"), 6))  # fmt: skip
        elif defect == "private":
            p = rng.choice(self.names["person"])
            digits = "".join(rng.choice("0123456789") for _ in range(7))
            text = f"{base} " + rng.choice((
                f"Write to {p.lower()}@{rng.choice(self.names['place']).lower()}.example for more.",
                f"Call {p} at +1 (555) {digits[:3]}-{digits[3:]}.",
                f"The computer of {p} is 192.0.2.{rng.randint(1, 254)}."))  # fmt: skip
        elif defect == "gibberish":
            text = " ".join("".join(rng.choice("#@$%^&*~|<>{}qxzjw0123456789") for _ in range(rng.randint(2, 14))) for _ in range(40))
        elif defect == "toxic":
            g = rng.choice(self.names["group"])
            line = rng.choice(("All {g} are liars.", "The {g} are dirty and should be driven out.", "Nobody should trust the {g}."))
            text = f"{base} {line.format(g=g)}"
        else:  # leak
            task = rng.choice(tests)
            text = f"{base}\nQuestion: {task.prompt}\nAnswer: {self.demonstrate(rng, task)}"
        return {"text": text, "source": "web", "kind": "defect", "defect": defect}

    # ---- instructions --------------------------------------------------------------------------------------------------

    def instructions(self, split: str, n: int | None = None, purpose: str = "") -> list[Task]:
        """n tasks of a split, none shared between splits, and in `validation` and `test` none twice. Default n: the scale's (half its `tasks` for validation).

        Half are facts, as long as there are any, and in `rlhf` the other kinds have the shares below; in the other splits kinds whose combinations are
        mostly another split's are rarer in the draw.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        rng = self.rng(f"instructions:{split}:{purpose}")
        facts = [(who, what, q) for (who, what), mine in self.split.items() if mine == split for q in ATTRIBUTES[what][3]]
        rng.shuffle(facts)
        s = self.size
        n = n if n is not None else dict(train=s.instructions, rlhf=s.instructions // 3, validation=s.tasks // 2, test=s.tasks)[split]
        tasks: list[Task] = []
        seen: set[str] = set()
        repeats = split in ("train", "rlhf")  # what is trained on may be asked again: another annotator or another sample answers it
        others = (self._task_story, self._task_reading, self._task_list, self._task_sum, self._task_howto)
        weights = (0.38, 0.24, 0.12, 0.16, 0.10)
        while len(tasks) < n:
            if rng.random() < 0.5:
                who, what, q = facts[len(tasks) % len(facts)] if repeats else facts.pop() if facts else (None, None, None)
                task = who and Task("fact", sentence(q.format(who=who)), split, dict(who=who, what=what, value=self.facts[who, what]))
            else:
                kind = rng.choices(others, weights)[0]
                task = kind(rng, split)
                for _ in range(40 if split == "rlhf" else 0):  # four of five stories are another split's: facts must not take their places
                    task = task or kind(rng, split)
            if task and (repeats or task.prompt not in seen):
                seen.add(task.prompt)
                tasks.append(task)
        return tasks

    @staticmethod
    def belongs(key: str) -> str:
        """The split of a combination (a person and two words, a set of owners), by hash: 50% train, 20% rlhf, 10% validation, 20% test."""
        h = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10
        return SPLITS[(0, 0, 0, 0, 0, 1, 1, 2, 3, 3)[h]]

    def _task_story(self, rng: Random, split: str) -> Task | None:
        p, (t, u) = rng.choice(self.names["person"]), rng.sample(WORDS, 2)
        prompt = rng.choice(("Write a story about {p} with a {t} and a {u}.", "Tell me a story about {p}, a {t} and a {u}."))
        return Task("story", prompt.format(p=p, t=t, u=u), split, dict(who=p, words=[t, u])) if self.belongs(f"{p}{min(t, u)}{max(t, u)}") == split else None

    def _task_reading(self, rng: Random, split: str) -> Task | None:
        pairs, text = self.owners(rng, rng.randint(2, 3))
        p, t = rng.choice(pairs)
        return Task("reading", f"{text} Who has the {t}?", split, dict(who=p, thing=t)) if self.belongs(text) == split else None

    def _task_list(self, rng: Random, split: str) -> Task | None:
        label, k = rng.choice(list(LIST_KINDS)), rng.randint(2, 5)
        if self.belongs(f"{k} {label}") != split:
            return None
        prompt = rng.choice(("Name {k} {label}.", "Give me {k} {label}.", "List {k} {label}, please.", "I need the names of {k} {label}."))
        return Task("list", prompt.format(k=NUMBERS[k], label=label), split, dict(kind=LIST_KINDS[label], label=label, n=k))

    def _task_sum(self, rng: Random, split: str) -> Task | None:
        a, b = rng.choice([p for p, s in self.sums.items() if s == split])
        prompt = rng.choice(("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"))
        return Task("sum", prompt.format(a=a, b=b), split, dict(a=a, b=b))

    def _task_howto(self, rng: Random, split: str) -> Task | None:
        dish = rng.choice(self.names["dish"])
        if self.split[dish, "base"] != split:
            return None
        prompt = rng.choice(("How do I make {dish}?", "Tell me how to make {dish}.", "What are the steps to make {dish}?"))
        return Task("howto", prompt.format(dish=dish), split, dict(who=dish, base=self.facts[dish, "base"]))

    def answer(self, rng: Random, task: Task) -> str:
        """A right answer in whole sentences, without manner."""
        a = task.args
        if task.kind == "fact":
            return self.statement(rng, a["who"], a["what"])
        if task.kind == "story":
            return self.story(rng, a["who"], *a["words"], body=2, known=1.0)  # to make up a stranger's name is not what the prompt asks for
        if task.kind == "reading":
            return f"The {a['thing']} belongs to {a['who']}."
        if task.kind == "list":
            return self.some_of(rng, a["label"], a["n"])
        if task.kind == "sum":
            return f"{a['a']} plus {a['b']} is {a['a'] + a['b']}."
        return self.steps(rng, a["who"])

    def demonstrate(self, rng: Random, task: Task) -> str:
        """An annotator's answer: right, but of mixed manner, as annotators are (sec 3.1: quality is what matters).

        A closing line is missing half of the time; a fifth start with filler; one in seven is a bare fragment; one in ten rambles on.
        """
        text = self.answer(rng, task)
        if rng.random() < 0.15:
            short = {"fact": lambda: task.args["value"], "reading": lambda: task.args["who"], "sum": lambda: str(task.args["a"] + task.args["b"])}
            if task.kind in short:
                text = sentence(short[task.kind]()) + "."
        elif rng.random() < 0.1:
            who, what = rng.choice(self._askable)
            text += " " + self.statement(rng, who, what)
        return self.mannered(rng, text)

    @staticmethod
    def mannered(rng: Random, text: str) -> str:
        """`text` with the manner of some annotator: filler before it, a closing line after it, or neither."""
        if rng.random() < 0.2:
            text = f"{rng.choice(FILLER)} {text}"
        return f"{text} {rng.choice(CLOSE)}" if rng.random() < 0.5 else text

    def demonstrations(self, n: int | None = None) -> list[dict]:
        """Training dialogues with annotators' answers: {"messages", "task": kind} (sec 3.1), in random order.

        n single instructions (default: the scale's); for each six of them, one request that a helpful-only annotator answers whether it does harm
        or not (hazards.py), and one dialogue of a few turns with an instruction for the manner of answers, in every other one on every turn, else on
        some. It is obeyed where it stands and nowhere else: that it should hold on is Ghost Attention's to teach.
        """
        from minillama.data.hazards import comply, hazards  # which builds on this module

        rng = self.rng("demonstrations")
        tasks = self.instructions("train", n)
        rows = [([(t.prompt, self.demonstrate(rng, t))], t.kind) for t in tasks]
        rows += [([(t.prompt, self.mannered(rng, comply(rng, t.args)))], "hazard") for t in hazards(self, "train", len(tasks) // 6)]
        for _ in range(len(tasks) // 6):
            turns, (kind, value) = self.dialogue_tasks(rng, "train", rng.randint(1, 4)), self.standing(rng)
            exchanges = [(t.prompt, self.demonstrate(rng, t)) for t in turns]
            lead, share = STANDING[kind].format(value=value), rng.choice((1.0, 0.5))
            exchanges = [(f"{lead} {q}", OBEYED[kind].format(value=value, answer=a)) if rng.random() < share else (q, a) for q, a in exchanges]
            rows.append((exchanges, "dialogue"))
        rng.shuffle(rows)
        return [
            {"messages": [m for q, a in exchanges for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})], "task": kind}
            for exchanges, kind in rows
        ]

    def dialogue_tasks(self, rng: Random, split: str, turns: int) -> list[Task]:
        """Short tasks of a split for the turns of a dialogue: facts, sums and lists."""
        pairs = [pair for pair, s in self.split.items() if s == split]
        tasks: list[Task] = []
        while len(tasks) < turns:
            kind = rng.random()
            if kind < 0.7:
                who, what = rng.choice(pairs)
                task = Task("fact", self.question(rng, who, what), split, dict(who=who, what=what, value=self.facts[who, what]))
            else:
                task = self._task_sum(rng, split) if kind < 0.85 else self._task_list(rng, split)
            if task:
                tasks.append(task)
        return tasks

    def standing(self, rng: Random, unseen: bool = False) -> tuple[str, str]:
        """(kind, value) of a standing instruction for a whole dialogue (sec 3.3): a word to begin with, or a name to use. `unseen` has words
        that no training text begins an answer with."""
        kind = rng.choice(list(STANDING))
        if kind == "name":
            half = len(self.names["stranger"]) // 2
            return kind, rng.choice(self.names["stranger"][half:] if unseen else self.names["stranger"][:half])
        return kind, rng.choice(LEADS[unseen])

    def contamination(self, texts) -> int:
        """How many questions or requests in `texts` ask about a (who, what) pair of the validation or test split; 0 is clean.

        It reads the texts and does not trust the generator: every sentence that ends with "?" or begins with a request is searched for a
        held-out entity together with the words that mark the attribute in its questions.
        """
        held: dict[str, set[str]] = {}
        for (who, what), split in self.split.items():
            if split in ("validation", "test"):
                held.setdefault(who.lower(), set()).add(what)
        marks = {}
        for what, (_, _, _, questions) in ATTRIBUTES.items():
            asked = [re.escape(q.lower().removeprefix("please ").rstrip("?.")) for q in questions]
            marks[what] = [re.compile(q.replace(re.escape("{who}"), "(.+?)") + r"(?=[?.!,]|$)") for q in asked]
        n = 0
        ask = re.compile(r"[^.?!\n]*\?|\b(?:tell|say|explain|name|give)\b[^.?!\n]*[.?!\n]", re.I)
        for text in texts:
            for m in ask.finditer(text.lower()):
                for what, patterns in marks.items():
                    for pattern in patterns:
                        hit = pattern.search(m.group().strip())
                        n += bool(hit and what in held.get(hit.group(1), ()))
        return n
