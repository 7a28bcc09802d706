"""Judging a model by tinyworld's gold standard: fact recall, copying, and the helpfulness of answers.

    judge(world, tasks, chat_answers(model, tokenizer, tasks))["helpfulness"]["mean"]

A base model is asked in the style of its own documents, with two examples, which
keeps prompts about as long as its training rows; a chat model in the chat format. Both see the same tasks.
"""
from __future__ import annotations

from minillama.chat import Message, encode_prompt
from minillama.data.gold import Gold
from minillama.data.world import Task, World
from minillama.evaluation.stats import rate
from minillama.generate import generate, sample_many
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

PROPERTIES = ("parses", "on_topic", "correct", "named", "whole", "close", "no_filler", "length")
MAX_NEW = 100  # tokens; the longest answers of the world have about 80


def chat_answers(model: Llama, tokenizer: Tokenizer, tasks: list[Task], temperature: float = 0.0, seed: int = 0, batch: int = 128) -> list[str]:
    """One answer a task, asked in the chat format; greedy by default."""
    prompts = [encode_prompt(tokenizer, [Message("user", t.prompt)]) for t in tasks]
    return _answers(model, tokenizer, prompts, [[tokenizer.eos_id]], temperature, seed, batch)


def example_prompt(world: World, task: Task, shots: int = 2) -> tuple[str, str]:
    """(prompt, beginning of the answer): `shots` examples of the task's kind in the style of the corpus, then the task in the same style.

    Examples are of training pairs. Facts and readings stand as question and answer, stories and recipes under their titles, sums as lines of
    sums, of which the answer's beginning is given; lists, which the corpus never asks for, as question and answer.
    """
    rng = world.rng(f"examples:{task.id}")
    pool = _pool(world)[task.kind]
    shown = [(_in_style(t), world.answer(rng, t)) for t in rng.sample(pool, min(shots, len(pool)))]
    if task.kind == "sum":
        start = f"{task.args['a']} plus {task.args['b']} is"
        return "\n".join([*(answer for _, answer in shown), start]), start
    return "\n".join([*(f"{head}{answer}" for head, answer in shown), _in_style(task).rstrip(" ")]), ""


def _in_style(task: Task) -> str:
    """What stands before an answer in a document of the world."""
    a = task.args
    if task.kind == "story":
        return f"A story about {a['who']}, a {a['words'][0]} and a {a['words'][1]}\n"
    if task.kind == "howto":
        return f"How to make {a['who']}\n"
    if task.kind == "reading":
        text, question = task.prompt.rsplit(" Who has", 1)
        return f"{text}\nQuestion: Who has{question}\nAnswer: "
    return f"Question: {task.prompt}\nAnswer: "


_pools: dict[str, dict[str, list[Task]]] = {}


def _pool(world: World) -> dict[str, list[Task]]:
    key = f"{world.hash}:{world.scale}"
    if key not in _pools:
        _pools[key] = {}
        for t in world.instructions("train"):
            _pools[key].setdefault(t.kind, []).append(t)
    return _pools[key]


def base_answers(model: Llama, tokenizer: Tokenizer, world: World, tasks: list[Task], temperature: float = 0.0, seed: int = 0, batch: int = 128) -> list[str]:
    """One answer a task from a base model: the line that it writes after `example_prompt`."""
    asked = [example_prompt(world, t) for t in tasks]
    prompts = [tokenizer.encode(prompt, bos=True) for prompt, _ in asked]
    newline = tokenizer.encode("\n")[-1:]
    written = _answers(model, tokenizer, prompts, [[tokenizer.eos_id], newline], temperature, seed, batch)
    return [f"{start} {text}".strip() for (_, start), text in zip(asked, written, strict=True)]


def _answers(model, tokenizer, prompts, stop, temperature, seed, batch) -> list[str]:
    rows = sample_many(model, prompts, MAX_NEW, temperature, seed, stop, batch).tokens
    ends = {s[-1] for s in stop}
    return [tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids).strip() for ids in rows]


def judge(world: World, tasks: list[Task], answers: list[str]) -> dict:
    """Every property's rate with its Wilson interval; mean gold `helpfulness` likewise; `fact_recall`, correctness on fact questions;
    `by_kind`, mean helpfulness and correctness a kind of task."""
    gold = Gold(world)
    scores = [gold.score(t, a) for t, a in zip(tasks, answers, strict=True)]
    result = {p: rate(sum(getattr(s, p) for s in scores), len(scores)) for p in PROPERTIES}
    result["helpfulness"] = rate(sum(s.helpfulness for s in scores), len(scores))
    facts = [s.correct for t, s in zip(tasks, scores, strict=True) if t.kind == "fact"]
    if facts:
        result["fact_recall"] = rate(sum(facts), len(facts))
    kinds = sorted({t.kind for t in tasks})
    result["by_kind"] = {}
    for kind in kinds:
        mine = [s for t, s in zip(tasks, scores, strict=True) if t.kind == kind]
        n = len(mine)
        result["by_kind"][kind] = {"n": n, "correct": sum(s.correct for s in mine) / n, "helpfulness": sum(s.helpfulness for s in mine) / n}
    return result


class Probes:
    """Three measures to take while a base model trains, each of `n` greedy answers.

    copying: short texts say which person has which thing; the share of answers to "Who has ...?" that name a person of the text.
    reading: the share that names the right one, which takes finding it.
    fact_recall: the share of questions about validation pairs (never asked in training) that are answered right.
    """

    def __init__(self, world: World, tokenizer: Tokenizer, n: int = 64):
        self.world, self.tokenizer = world, tokenizer
        self.facts = [t for t in world.instructions("validation") if t.kind == "fact"][:n]
        rng = world.rng("probes")
        self.readings = []
        for _ in range(n):
            pairs, text = world.owners(rng, 3)
            p, t = rng.choice(pairs)
            self.readings.append((f"{text}\nQuestion: Who has the {t}?\nAnswer:", t, p, [name for name, _ in pairs]))

    def __call__(self, model: Llama) -> dict[str, float]:
        newline = self.tokenizer.encode("\n")[-1:]
        prompts = [self.tokenizer.encode(r[0], bos=True) for r in self.readings]
        prompts += [self.tokenizer.encode(f"Question: {t.prompt}\nAnswer:", bos=True) for t in self.facts]
        new = generate(model, prompts, max_new_tokens=28, temperature=0.0, stop=[[self.tokenizer.eos_id], newline])
        texts = [self.tokenizer.decode(ids).strip() for ids in new]
        copied = right = 0
        for answer, (_, t, p, names) in zip(texts, self.readings, strict=False):
            copied += answer in [f"The {t} belongs to {name}." for name in names]
            right += answer == f"The {t} belongs to {p}."
        gold, n = Gold(self.world), len(self.readings)
        known = sum(gold.score(t, a).correct for t, a in zip(self.facts, texts[n:], strict=True))
        return {"copying": copied / n, "reading": right / n, "fact_recall": known / len(self.facts)}
