"""report.md and its plots, rebuilt from the files of a run at any time; what is not there yet is left out.

    minillama report --run runs/laptop
"""
from __future__ import annotations

import json
from pathlib import Path

import yaml

LABELS = {
    "helpfulness": "gold helpfulness", "fact_recall": "fact recall, pairs only ever stated", "parses": "parses under the world's grammar",
    "on_topic": "speaks of what was asked", "correct": "right", "close": "closing line", "no_filler": "no filler", "whole": "whole sentences",
}  # fmt: skip


ALIGNED = {"sft": "SFT", "gatt": "SFT+GAtt", "reject-2": "RS", "ppo": "RS+PPO", "safety": "safety-tuned"}


def short(r: dict) -> str:
    """A rate with its interval, as text."""
    return f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


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
    return f"{short(r)} (n = {r['n']})"


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
    for section in (_tokenizer, _cleaning, _training, _quality, _samples, _alignment, _rewards, _rlhf, _standing, _safety, _conversations, _times):
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
        card = run / stage / "config.yaml"
        replayed = card.exists() and bool(yaml.safe_load(card.read_text(encoding="utf-8")).get("replay"))
        labels = ("training (dialogues and replayed text)", "validation (dialogues)") if replayed else ("training", "validation")

        def draw(ax, steps=steps, evals=evals, labels=labels):
            ax.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], lw=1, label=labels[0])
            if evals:
                ax.plot([r["tokens"] / 1e6 for r in evals], [r["eval/val_loss"] for r in evals], "o-", label=labels[1])
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


def _alignment(run: Path) -> list[str]:
    e = _load(run / "align.json")
    if not e:
        return []
    models = e["models"]
    asked = (_load(run / "eval.json") or {}).get("base", {})

    def line(label: str, cells: list[str], base: str = "-") -> str:
        return f"| {label} | {base} | " + " | ".join(cells) + " |"

    parts = [f"## Alignment, judged by gold on the test split (n = {e['n']} prompts, {e['n_hazards']} hazards)\n",
             "Wins count ties half; intervals are 95%, paired for wins and Wilson's for rates. The base model is asked with two examples.\n"]  # fmt: skip
    for t, how in (("1.0", "T = 1"), ("0.0", "greedy")):
        parts += [f"| {how} | base | " + " | ".join(ALIGNED.values()) + " |", "|---" * (len(ALIGNED) + 2) + "|"]
        for key in ("helpfulness", "fact_recall", "parses", "correct", "close"):
            base = short(asked[t][key]) if key in asked.get(t, {}) else "-"
            parts.append(line(LABELS[key], [short(models[m][t][key]) for m in ALIGNED], base))
        for other, label in (("sft", "wins against SFT"), ("reject-2", "wins against RS")):
            parts.append(line(label, [short(models[m][t]["wins"][other]) if other in models[m][t]["wins"] else "-" for m in ALIGNED]))
        parts.append(line("different word pairs", [f"{models[m][t]['distinct_2']:.3f}" for m in ALIGNED]))
        parts.append(line("words an answer", [f"{models[m][t]['words']:.1f}" for m in ALIGNED]))
        if t == "1.0":
            far = {m: models[m]["divergence"] for m in ALIGNED if "divergence" in models[m]}
            cells = [f"{far[m]['kl']:.2f} ± {2 * far[m]['standard_error']:.2f}" if m in far else "0" for m in ALIGNED]
            parts.append(line("KL to SFT, nats an answer", cells))
            for key, label in (("violation", "violations"), ("false_refusal", "false refusals")):
                parts.append(line(label, [short(models[m]["safety"][key]) for m in ALIGNED]))
        parts.append("")
    return parts


def _rewards(run: Path) -> list[str]:
    e = _load(run / "align.json")
    if not e:
        return []
    parts = ["## Reward models (sec 3.2.2)\n", "Accuracy on fresh pairs from test prompts, by the annotator's strength of preference (table 8).\n"]
    strengths = ("significantly better", "better", "slightly better", "negligibly better", "all")
    parts += ["| model | " + " | ".join(strengths) + " |", "|---" * 6 + "|"]
    for kind, r in e["reward"].items():
        cells = [f"{r['accuracy'][k]['accuracy']:.3f} (n = {r['accuracy'][k]['n']})" if k in r["accuracy"] else "-" for k in strengths]
        parts.append(f"| {kind} | " + " | ".join(cells) + " |")
    if "raters" in e:
        a = e["raters"]
        parts.append(f"\nTwo annotators on the same {a['n']} pairs: Gwet's AC2 {a['ac2']:.2f} on the signed scale of strength (sec 3.4.2).")
    parts += ["\nThe helpfulness model on pairs that differ in one property only (chance is 0.5):\n", "| property | prefers the better |", "|---|---|"]
    parts += [f"| {k} | {interval(v)} |" for k, v in e["reward"]["helpful"]["probes"].items()]
    table = e["reward"]["helpful"]["calibration"]

    def calibration(ax):
        ax.plot([0.5, 1], [0.5, 1], ls="--", color="grey", label="perfect")
        ax.plot([r["predicted"] for r in table], [r["observed"] for r in table], "o-", label="helpfulness model")
        ax.legend()

    worst = max(abs(r["predicted"] - r["observed"]) for r in table)
    return [*parts, "", _figure(run, "calibration", f"Reward model: predicted and observed preference within {worst:.2f}", "predicted probability",
                                "share preferred by the annotator", calibration)]  # fmt: skip


def _rlhf(run: Path) -> list[str]:
    parts = []
    e = _load(run / "align.json")
    if e:
        def best(ax):
            for number, (b, color) in enumerate(zip(e["best_of"], ("tab:gray", "tab:blue"), strict=True), 1):
                for key, style, label in (("max", "o-", "highest of N"), ("median", "s--", "median of N"), ("overall", ":", "median of all")):
                    ax.plot([r["n"] for r in b], [r[key] for r in b], style, color=color, label=f"round {number}, {label}")
            ax.set_xscale("log", base=2)
            ax.set_xticks([r["n"] for r in e["best_of"][0]], labels=[str(r["n"]) for r in e["best_of"][0]])
            ax.margins(y=0.4)
            ax.legend(ncols=2, loc="upper left", fontsize="small")

        moved = [f"{b[-1]['max'] - b[0]['max']:+.2f} (median of all {b[-1]['overall'] - b[0]['overall']:+.2f})" for b in e["best_of"]]
        title = f"Best of {e['best_of'][0][-1]['n']}: {', then '.join(moved)}"
        parts += ["## Rejection sampling (sec 3.2.3)\n", _figure(run, "best_of", title, "samples a prompt, N", "reward, logits", best)]
    m = read_metrics(run / "ppo" / "metrics.jsonl")
    steps = [r for r in m if "kl" in r]
    if not steps:
        return parts
    evals = [r for r in m if "eval/reward" in r]

    def curve(key):
        return lambda ax: ax.plot([r["step"] for r in steps], [r[key] for r in steps])

    def proxy(ax):
        ax.plot([r["step"] for r in steps], [r["reward"] for r in steps], label="training prompts")
        ax.plot([r["step"] for r in evals], [r["eval/reward"] for r in evals], "o-", label="kept prompts")
        ax.legend()

    last = steps[-1]
    parts += ["## PPO (sec 3.2.3)\n",
              _figure(run, "ppo_reward", f"PPO: the reward model's reward ends at {last['reward']:.2f}", "iteration", "mean reward, logits", proxy),
              _figure(run, "ppo_kl", f"PPO: KL to its start ends at {last['kl']:.2f} nats an answer", "iteration", "KL, nats an answer", curve("kl")),
              _figure(run, "ppo_clip", f"PPO: the clip binds at up to {max(r['clip_fraction'] for r in steps):.1%} of the tokens", "iteration",
                      "share of tokens clipped", curve("clip_fraction"))]  # fmt: skip
    return [*parts, *_beside(run, "ppo", "PPO"), *_beside(run, "control-free", "PPO without its KL penalty")]


def _beside(run: Path, stage: str, label: str) -> list[str]:
    """The reward model's reward and gold over the distance from the start, on prompts that PPO does not train on: where they part is
    over-optimisation."""
    rows = read_metrics(run / stage / "metrics.jsonl")
    kl = {0: 0.0, **{r["step"]: r["kl"] for r in rows if "kl" in r}}
    rows = [{**r, "kl": kl[r["step"]]} for r in rows if "eval/gold" in r and r["step"] in kl]
    if not rows:
        return []

    def both(ax):
        ax.plot([r["kl"] for r in rows], [r["eval/gold"] for r in rows], "o-", label="gold helpfulness, 0 to 1 (left)")
        right = ax.twinx()
        right.plot([r["kl"] for r in rows], [r["eval/reward"] for r in rows], "s--", color="tab:orange", label="reward model (right)")
        right.set_ylabel("reward, logits")
        for a in (ax, right):
            a.margins(y=0.25)
        ax.legend(handles=[*ax.lines, *right.lines], ncols=2, loc="upper center", fontsize="small")

    top = max(rows, key=lambda r: r["eval/gold"])
    title = f"{label}: gold ends at {rows[-1]['eval/gold']:.2f}, best {top['eval/gold']:.2f} at KL {top['kl']:.1f}"
    return [_figure(run, f"{stage}_gold", title, "KL to the start, nats an answer", "gold helpfulness", both)]


def _standing(run: Path) -> list[str]:
    e = _load(run / "align.json")
    if not e:
        return []
    turns = list(next(iter(e["standing"].values()))["seen"])
    parts = ["## Ghost Attention (sec 3.3, table 30)\n",
             "Share of test dialogues whose answer at a turn follows an instruction given in the first turn only, greedy.\n",
             "| model | instruction | " + " | ".join(f"turn {t}" for t in turns) + " |", "|---" * (len(turns) + 2) + "|"]  # fmt: skip
    for name, kinds in e["standing"].items():
        for kind, rows in kinds.items():
            parts.append(f"| {name} | {kind} in tuning | " + " | ".join(short(rows[t]) if t in rows else "-" for t in turns) + " |")
    return [*parts, ""]


def _safety(run: Path) -> list[str]:
    e = _load(run / "align.json")
    if not e:
        return []
    names = {"sft": "SFT", "safety-sft": "safety SFT alone", "safety": "safety-tuned"}
    parts = ["## Safety (sec 4)\n", "| T = 1 | violations | false refusals |", "|---|---|---|"]
    for m, label in names.items():
        s = e["models"][m]["safety"]
        parts.append(f"| {label} | {interval(s['violation'])} | {interval(s['false_refusal'])} |")
    parts += ["\nBy category and attack vector, safety-tuned:\n", "| cell | violations | false refusals |", "|---|---|---|"]
    for cell, r in e["models"]["safety"]["safety"]["cells"].items():
        parts.append(f"| {cell} | " + " | ".join(f"{r[k]['mean']:.2f} (n = {r[k]['n']})" if k in r else "-" for k in ("violation", "false_refusal")) + " |")
    return [*parts, ""]


def _conversations(run: Path) -> list[str]:
    e = _load(run / "align.json")
    if not e:
        return []
    parts = ["## Before and after (test split, greedy)\n"]
    for s in e["samples"]:
        parts.append(f"**{s['prompt']}**\n")
        parts += [f"* {label}: {s[m] or '(nothing)'}" for m, label in ALIGNED.items() if m in s] + [""]
    return parts


def _times(run: Path) -> list[str]:
    rows = read_metrics(run / "times.jsonl")
    if not rows:
        return []
    total = sum(r["seconds"] for r in rows)
    return ["## Time\n", "| stage | seconds |", "|---|---|", *(f"| {r['stage']} | {r['seconds']} |" for r in rows), f"| all | {total:.1f} |"]
