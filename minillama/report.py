"""report.md and its plots, rebuilt from the files of a run at any time; what is not there yet is left out.

    minillama report --run runs/laptop
"""
from __future__ import annotations

import json
from pathlib import Path

LABELS = {
    "helpfulness": "gold helpfulness", "fact_recall": "fact recall, pairs only ever stated", "parses": "parses under the world's grammar",
    "on_topic": "speaks of what was asked", "correct": "right", "close": "closing line", "no_filler": "no filler", "whole": "whole sentences",
}  # fmt: skip


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; an unfinished last line is skipped."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def copying_turn(metrics: list[dict], level: float = 0.5) -> dict | None:
    """The first evaluation whose copying reaches `level`, or None."""
    return next((m for m in metrics if m.get("eval/copying", 0.0) >= level), None)


def interval(r: dict) -> str:
    """A rate with its 95% Wilson interval and n, as text."""
    return f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}] (n = {r['n']})"


def build(run: str | Path) -> Path:
    """Write report.md and plots of `run` from whatever stages it has. Raises ValueError if it has none."""
    import matplotlib

    matplotlib.use("Agg")
    run = Path(run)
    if not run.is_dir() or not any((run / name).exists() for name in ("world.json", "pretrain", "sft", "metrics.jsonl")):
        raise ValueError(f"{run} is not the folder of a run: it has neither world.json nor a stage")
    parts = ["# Report\n"]
    if (run / "world.json").exists():
        w = json.loads((run / "world.json").read_text())
        parts.append(f"tinyworld at scale `{w['scale']}`, seed {w['seed']}, {w['facts']} facts, fingerprint `{w['hash']}`.\n")
    for section in (_tokenizer, _cleaning, _training, _quality, _samples, _times):
        parts += section(run)
    path = run / "report.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _load(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _figure(run: Path, name: str, title: str, xlabel: str, ylabel: str, draw) -> str:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw(ax)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    fig.savefig(run / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(fig)
    return f"![{title}]({name}.png)\n"


def _tokenizer(run: Path) -> list[str]:
    table = _load(run / "tokenizer.json")
    if not table:
        return []
    x, y = [t["vocab_size"] for t in table], [t["bytes_per_token"] for t in table]
    title = f"{x[-1]} tokens carry {y[-1]:.2f} bytes each, {x[0]} carry {y[0]:.2f}"
    return ["## Tokenizer (sec 2.2)\n", _figure(run, "tokenizer", title, "vocabulary, tokens", "bytes per token", lambda ax: ax.plot(x, y, "o-"))]


def _cleaning(run: Path) -> list[str]:
    c = _load(run / "clean.json")
    if not c:
        return []
    rows = ["## Cleaning (sec 2.1, 4.1, A.6)\n", f"{c['documents']:,} documents written, {c['kept']:,} kept ({c['characters'] / 1e6:.2f} M characters).\n",
            "| filter | planted | flagged | precision | recall |", "|---|---|---|---|---|"]  # fmt: skip
    number = lambda x: "-" if x is None else f"{x:.3f}"  # noqa: E731
    rows += [f"| {k} | {s['planted']} | {s['flagged']} | {number(s['precision'])} | {number(s['recall'])} |" for k, s in c["scores"].items()]
    rows.append("\nToxic lines are found and scored but stay in, as in the paper (sec 4.1): safety tuning deals with them later.\n")
    rows.append(
        f"Questions about held-out (who, what) pairs in training text: {c['contamination_before']} before cleaning, "
        f"{c['contamination']} after, {c['contamination_sft']} in the instructions.\n"
    )
    return rows


def _training(run: Path) -> list[str]:
    parts = []
    for stage, title in (("pretrain", "Pretraining (sec 2)"), ("sft", "Supervised fine-tuning (sec 3.1)")):
        m = read_metrics(run / stage / "metrics.jsonl")
        steps = [r for r in m if "loss" in r]
        if not steps:
            continue
        evals = [r for r in m if "eval/val_loss" in r]

        def draw(ax, steps=steps, evals=evals):
            ax.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], lw=1, label="training")
            if evals:
                ax.plot([r["tokens"] / 1e6 for r in evals], [r["eval/val_loss"] for r in evals], "o-", label="validation")
            ax.legend()

        last = steps[-1]
        parts.append(f"## {title}\n\nStep {last['step']}, {last['tokens']:,} tokens: loss {last['loss']:.3f} nats a token"
                     + (f", validation {evals[-1]['eval/val_loss']:.3f}" if evals else "") + ".\n")  # fmt: skip
        finding = f"{title.split(' (')[0]}: the loss falls to {last['loss']:.2f}"
        parts.append(_figure(run, stage, finding, "tokens trained on, millions", "loss, nats per token", draw))
        probes = [r for r in evals if "eval/copying" in r]
        if probes:
            turn = copying_turn(m)
            at = f"copying turns at {turn['tokens'] / 1e6:.1f} M tokens" if turn else "copying has not turned yet"

            def curves(ax, probes=probes, turn=turn):
                for key, label in (
                    ("eval/copying", "a name copied from the context"),
                    ("eval/reading", "the right one of three names"),
                    ("eval/fact_recall", "facts recalled, pairs never asked about"),
                ):
                    ax.plot([r["tokens"] / 1e6 for r in probes], [r.get(key, float("nan")) for r in probes], "o-", label=label)
                if turn:
                    ax.axvline(turn["tokens"] / 1e6, color="grey", ls="--")
                ax.set_ylim(-0.03, 1.03)
                ax.legend()

            parts.append(_figure(run, "copying", f"Pretraining: {at}", "tokens trained on, millions", "share right (greedy)", curves))
    return parts


def _quality(run: Path) -> list[str]:
    e = _load(run / "eval.json")
    if not e:
        return []
    parts = ["## Test split, judged by gold\n", "Base: asked in its documents' style with two examples. Intervals: 95%, Wilson.\n"]
    for t, how in (("0.0", "greedy"), ("1.0", "T = 1")):
        parts += [f"| {how} | base | SFT |", "|---|---|---|"]
        for key, label in LABELS.items():
            if key in e["sft"][t]:
                parts.append(f"| {label} | {interval(e['base'][t][key])} | {interval(e['sft'][t][key])} |")
        parts.append("")
    kinds = list(e["sft"]["0.0"]["by_kind"])

    def bars(ax):
        for k, (name, shift) in enumerate((("base", -0.2), ("sft", 0.2))):
            rows = [e[name]["0.0"]["by_kind"][kind] for kind in kinds]
            ax.bar([i + shift for i in range(len(kinds))], [r["correct"] for r in rows], 0.4, label=("base, two examples", "SFT")[k])
        ax.set_xticks(range(len(kinds)), [f"{kind}\nn={e['sft']['0.0']['by_kind'][kind]['n']}" for kind in kinds])
        ax.set_ylim(0, 1.03)
        ax.legend()

    b, s = e["base"]["0.0"]["correct"]["mean"], e["sft"]["0.0"]["correct"]["mean"]
    parts.append(_figure(run, "quality", f"Right answers, greedy: base {b:.2f}, SFT {s:.2f}", "kind of task", "share right", bars))
    return parts


def _samples(run: Path) -> list[str]:
    e = _load(run / "eval.json")
    if not e:
        return []
    parts = ["## Samples (test split, greedy)\n"]
    for s in e["samples"]:
        parts += [f"**{s['prompt']}**\n", f"* base: {s['base'] or '(nothing)'}", f"* SFT: {s['sft'] or '(nothing)'}\n"]
    return parts


def _times(run: Path) -> list[str]:
    rows = read_metrics(run / "times.jsonl")
    if not rows:
        return []
    total = sum(r["seconds"] for r in rows)
    return ["## Time\n", "| stage | seconds |", "|---|---|", *(f"| {r['stage']} | {r['seconds']} |" for r in rows), f"| all | {total:.1f} |"]
