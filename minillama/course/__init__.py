"""The course: tools that keep notebooks, exercises and package one thing. `minillama course sync | check | release | grade`.

    from minillama.course import best_run, world_of      # what a chapter needs of trained models
    run = best_run()
    model, tokenizer = minillama.load(run / "sft")
"""
from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout: minillama, notebooks, solutions and exercises lie side by side


def best_run() -> Path:
    """The folder of the best finished demo: runs/gpu, else runs/laptop, else runs/ci; MINILLAMA_RUN names another. Read it, never write into it.

    Where there is none, the ci demo is trained once, in about four minutes, in a cache folder (~/.cache/minillama/ci).
    Raises FileNotFoundError if MINILLAMA_RUN is not a finished demo.
    """
    chosen = os.environ.get("MINILLAMA_RUN")
    for folder in [Path(chosen)] if chosen else [ROOT / "runs" / scale for scale in ("gpu", "laptop", "ci")]:
        if _finished(folder):
            return folder.resolve()
    if chosen:
        raise FileNotFoundError(f"MINILLAMA_RUN is {chosen}, which holds no finished demo (no align.json); run `minillama demo --out {chosen}` first")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama" / "ci"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.parent / "ci.log", "a", encoding="utf-8") as log:
        with contextlib.suppress(ImportError):  # two notebooks may ask at once; Windows has no fcntl
            import fcntl

            fcntl.flock(log, fcntl.LOCK_EX)
        if not _finished(cache):
            from minillama import demo
            from minillama.config import DemoConfig

            print(f"No trained models under {ROOT / 'runs'}: training the smallest ones in {cache}, once, in about four minutes.", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                demo.run(DemoConfig(scale="ci", out=str(cache)))
    return cache


def world_of(run: Path):
    """The World that a demo's models were trained on."""
    from minillama.data.world import World

    card = json.loads((Path(run) / "world.json").read_text(encoding="utf-8"))
    return World(card["seed"], card["scale"])


def _finished(run: Path) -> bool:
    return (run / "align.json").is_file() and (run / "world.json").is_file()  # align.json is the last thing that a demo writes
