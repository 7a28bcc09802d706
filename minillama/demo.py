"""The whole pipeline in one command: a world, its corpus cleaned, a tokenizer, a base model, a chat model, its alignment, and a report.

    minillama demo --scale laptop          # what `make demo` runs

Every stage leaves files under runs/<scale>/ and is skipped when they are whole, so a stopped demo goes on where it was. The report is rebuilt
from the files after every stage.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from minillama import align, pretrain, report, sft
from minillama.checkpoint import load
from minillama.config import DemoConfig, PretrainConfig, SFTConfig, TrainConfig
from minillama.data.clean import CleanConfig, clean, score
from minillama.data.sources import write_jsonl
from minillama.data.world import World
from minillama.evaluation.tinyworld import Probes, base_answers, chat_answers, judge
from minillama.tokenizer import Tokenizer


def recipe(scale: str) -> dict:
    """The settings of a scale, from minillama/configs/<scale>.yaml. Raises ValueError for an unknown scale."""
    path = Path(__file__).parent / "configs" / f"{scale}.yaml"
    if not path.is_file():
        raise ValueError(f"unknown scale {scale!r}; there are ci, laptop and gpu")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def run(config: DemoConfig) -> Path:
    """Run every stage that is not there yet; return the report's path."""
    settings, world = recipe(config.scale), World(config.seed, config.scale)
    out = Path(config.out or f"runs/{config.scale}")
    out.mkdir(parents=True, exist_ok=True)
    facts = {"seed": config.seed, "scale": config.scale, "hash": world.hash, "facts": len(world.facts)}
    card = out / "world.json"
    if card.exists() and json.loads(card.read_text()) != facts:
        raise ValueError(f"{out} holds the demo of another world ({card.read_text().strip()}); choose another --out or remove it")
    card.write_text(json.dumps(facts))

    def stage(name: str, title: str, done: Path, work: Callable[[], None]) -> None:
        if done.exists():
            print(f"{title}: already in {done}")
            return
        print(f"{title} ...", flush=True)
        began = time.monotonic()
        work()
        seconds = time.monotonic() - began
        with open(out / "times.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": name, "seconds": round(seconds, 1)}) + "\n")
        print(f"{title}: done in {seconds:.0f} s", flush=True)
        report.build(out)

    corpus, model_file = out / "corpus.jsonl", out / "tokenizer.model"

    def make_corpus() -> None:
        documents = list(world.documents())
        tests = [t.prompt for split in ("validation", "test") for t in world.instructions(split)]
        kept, result = clean(documents, CleanConfig(workers=2), tests)
        questions = world.contamination(d["text"] for d in kept)
        demos = world.contamination(m["content"] for e in world.demonstrations() for m in e["messages"])
        align.write(out / "clean.json", {
            "scores": score(result, documents), "documents": len(documents), "kept": len(kept), "characters": sum(len(d["text"]) for d in kept),
            "contamination_before": world.contamination(d["text"] for d in documents), "contamination": questions, "contamination_sft": demos,
        })  # fmt: skip
        write_jsonl(({"text": d["text"], "source": d["source"]} for d in kept), corpus)

    def texts() -> list[str]:
        return [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]

    def learn_tokenizer() -> None:
        sample = texts()
        chats = [f"[INST] {e['messages'][0]['content']} [/INST] {e['messages'][1]['content']}" for e in world.demonstrations(1000)]
        train_on = sample[: len(sample) // 2] + chats
        sizes = sorted({400, 512, 640, 768, settings["tokenizer"]["vocab_size"]})
        table = []
        held = "\n".join(sample[-200:])
        for size in sizes:  # a curve for the report; the last wanted size is the model's
            t = Tokenizer.train(train_on, size, model_file if size == settings["tokenizer"]["vocab_size"] else out / "tokenizer.tmp")
            table.append({"vocab_size": size, "bytes_per_token": len(held.encode()) / len(t.encode(held))})
        (out / "tokenizer.tmp").unlink(missing_ok=True)
        align.write(out / "tokenizer.json", table)

    def train_base() -> None:
        tokenizer = Tokenizer(model_file)
        c = PretrainConfig(
            data=str(corpus), tokenizer=str(model_file), out=str(out / "pretrain"), preset=settings["preset"], resume=True,
            train=TrainConfig(seed=config.seed, device=config.device, **settings["pretrain"]),
        )  # fmt: skip
        pretrain.run(c, texts(), Probes(world, tokenizer))

    def tune() -> None:
        replay = str(out / "pretrain" / "data") if "replay_share" in settings["sft"] else ""
        c = SFTConfig(init=str(out / "pretrain"), out=str(out / "sft"), replay=replay, resume=True,
                      **align.train_config(settings["sft"], config.seed, config.device))  # fmt: skip
        sft.run(c, [e["messages"] for e in world.demonstrations()])

    def evaluate() -> None:
        tasks = world.instructions("test")
        base, tokenizer = load(out / "pretrain")
        chat, _ = load(out / "sft")
        chats = {"0.0": chat_answers(chat, tokenizer, tasks), "1.0": chat_answers(chat, tokenizer, tasks, temperature=1.0, seed=config.seed)}
        bases = {"0.0": base_answers(base, tokenizer, world, tasks), "1.0": base_answers(base, tokenizer, world, tasks, temperature=1.0, seed=config.seed)}
        kinds = [t.kind for t in tasks]
        first = sorted({kinds.index(kind) for kind in kinds})  # one task of each kind
        results = {
            "n": len(tasks),
            "base": {t: judge(world, tasks, a) for t, a in bases.items()},
            "sft": {t: judge(world, tasks, a) for t, a in chats.items()},
            "samples": [{"prompt": tasks[i].prompt, "kind": tasks[i].kind, "base": bases["0.0"][i], "sft": chats["0.0"][i]} for i in first],
        }
        align.write(out / "eval.json", results)

    stage("corpus", f"corpus of tinyworld {world.hash}, written and cleaned", corpus, make_corpus)
    stage("tokenizer", "tokenizer", out / "tokenizer.json", learn_tokenizer)
    stage("pretrain", "pretraining", align.finished(out, "pretrain"), align.training(out, "pretrain", train_base))
    stage("sft", "supervised fine-tuning", align.finished(out, "sft"), align.training(out, "sft", tune))
    stage("eval", "evaluation on the test split", out / "eval.json", evaluate)
    if "align" in settings:
        align.build(world, out, settings["align"], config.seed, config.device, stage)
    path = report.build(out)
    print(f"\nreport: {path}\ntalk to the model: minillama chat --model {out / ('safety' if 'align' in settings else 'sft')}")
    return path
