"""The command line: `minillama VERB --help` shows every setting with its default and unit.

Exit status: 0 done, 1 the work failed, 2 the request was wrong. An error is one line that names the value and the fix.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time


def info(argv: list[str]) -> int:
    """Sizes of an architecture, without torch: parameters, FLOPs, key-value cache."""
    from minillama.config import PRESETS, LlamaConfig

    p = Parser(prog="minillama info", description=info.__doc__)
    p.add_argument("preset", nargs="?", help="one of: " + ", ".join(PRESETS))
    p.add_argument("--json", action="store_true", help="print JSON")
    a = p.parse_args(argv)
    rows = []
    for name in [a.preset] if a.preset else PRESETS:
        c = LlamaConfig.preset(name)
        rows.append({"preset": name, "n_params": c.n_params(), "dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
                     "ffn_dim": c.ffn_dim, "vocab_size": c.vocab_size, "max_seq_len": c.max_seq_len, "kv_bytes_per_token": c.kv_bytes_per_token(),
                     "training_flops_per_token": c.flops_per_token()})  # fmt: skip
    if a.json:
        print(json.dumps(rows[0] if a.preset else rows))
    else:
        for r in rows:
            shape = f"dim {r['dim']} layers {r['n_layers']} heads {r['n_heads']}/{r['n_kv_heads']} ffn {r['ffn_dim']} vocab {r['vocab_size']}"
            cost = f"{r['kv_bytes_per_token']:,} B of 16-bit cache and {r['training_flops_per_token'] / 1e9:.3g} GFLOP of training a token"
            print(f"{r['preset']:<12} {r['n_params']:>15,} parameters  {shape}  {cost}")
    return 0


def demo(argv: list[str]) -> int:
    """The whole pipeline on tinyworld: corpus, tokenizer, pretraining, SFT, alignment, evaluation, report."""
    from minillama.config import DemoConfig

    c, _ = _config(DemoConfig, "demo", argv)
    from minillama import demo as module

    module.run(c)
    return 0


def tokenizer(argv: list[str]) -> int:
    """Learn a SentencePiece BPE tokenizer from text."""
    from minillama.config import TokenizerConfig

    c, _ = _config(TokenizerConfig, "tokenizer", argv)
    from itertools import islice

    from minillama.pretrain import documents
    from minillama.tokenizer import Tokenizer

    t = Tokenizer.train(islice(documents(c.data), c.max_docs), c.vocab_size, c.out)
    text = "\n".join(islice(documents(c.data), 200))
    print(f"{c.out}: {t.vocab_size} tokens, {len(text.encode()) / len(t.encode(text)):.2f} bytes per token on the first 200 documents")
    return 0


def _training(verb: str, module: str, config: str, text: str, after: str):
    """A verb that runs a stage: `minillama.<module>.run` on a config from the command line."""

    def run(argv: list[str]) -> int:
        from importlib import import_module

        c, _ = _config(getattr(import_module("minillama.config"), config), verb, argv)
        import_module(f"minillama.{module}").run(c)
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {c.out}; {after.format(out=c.out)}")
        return 0

    run.__doc__ = text
    return run


_CHAT = "try: minillama chat --model {out}"
_STAGES = {
    "pretrain": ("pretrain", "PretrainConfig", "Pretrain a base model on text.", "try: minillama generate --model {out} --prompt '...'"),
    "sft": ("sft", "SFTConfig", "Fine-tune a model on instructions.", _CHAT),
    "gatt": ("gatt", "GAttConfig", "Ghost Attention: make an instruction of the first turn hold.", _CHAT),
    "reward": ("reward", "RewardConfig", "Train a reward model on preference pairs.", "next: minillama reject --helpful {out}"),
    "reject": ("rejection", "RejectConfig", "Rejection sampling: learn the best of K samples.", _CHAT),
    "ppo": ("ppo", "PPOConfig", "PPO against the reward models.", _CHAT),
    "safety": ("safety", "SafetyConfig", "Safety tuning: gated rejection sampling and context distillation.", _CHAT),
}


def clean(argv: list[str]) -> int:
    """Filter documents: quality, private data, duplicates, test-set contamination."""
    from minillama.data.clean import CleanConfig

    def more(p):
        p.add_argument("data", help="documents: tinyworld[:scale[:seed]], a file, a folder, a glob, or hf:owner/name")
        p.add_argument("--out", required=True, help="jsonl file to write")
        p.add_argument("--test", default="", help="texts to keep out of the result: a file of evaluation samples")

    c, a = _config(CleanConfig, "clean", argv, more)
    from minillama.data import sources
    from minillama.data.clean import clean as work
    from minillama.data.clean import score
    from minillama.data.world import from_spec

    world = from_spec(a.data)
    docs = list(world.documents() if world else sources.read(a.data, kind="document"))
    if world:
        tests = [t.prompt for split in ("validation", "test") for t in world.instructions(split)]
    else:
        tests = [d["text"] for d in sources.read(a.test, kind="document")] if a.test else []
    kept, report = work(docs, c, tests)
    sources.write_jsonl(({"text": d["text"], "source": d.get("source", "")} for d in kept), a.out)
    print(report)
    if world:
        for name, s in score(report, docs).items():
            print(f"{name}: {s}")
    print(f"{len(kept)} of {len(docs)} documents written to {a.out}")
    return 0


def evaluate(argv: list[str]) -> int:
    """Judge a model: perplexity of a text, or gold helpfulness on tinyworld's test split."""
    p = Parser(prog="minillama eval", description=evaluate.__doc__)
    p.add_argument("--model", required=True, help="checkpoint: a stage's folder, minillama's own format, Meta's or Hugging Face's")
    p.add_argument("--data", default="tinyworld", help="tinyworld[:scale[:seed]] for gold on the test split; else a text to score")
    p.add_argument("--tasks", type=int, help="number of test tasks (tinyworld; default the scale's)")
    p.add_argument("--temperature", type=float, default=0.0, help="softmax temperature; 0 is greedy (tinyworld)")
    p.add_argument("--base", action="store_true", help="ask with examples in the documents' style instead of the chat format (tinyworld)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--tensor", type=int, default=1, help="ranks of a torchrun job that split the model (default 1)")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto (default)")
    a = p.parse_args(argv)
    from minillama.config import ParallelConfig
    from minillama.data.world import from_spec

    world = from_spec(a.data)
    model, tok, _ = _to_generate(a.model, a.device, ParallelConfig(tensor=a.tensor))
    if world:
        from minillama.evaluation.tinyworld import base_answers, chat_answers, judge
        from minillama.report import interval

        tasks = world.instructions("test", a.tasks)
        answers = base_answers(model, tok, world, tasks, a.temperature) if a.base else chat_answers(model, tok, tasks, a.temperature)
        result = {"world": world.hash, "temperature": a.temperature, **judge(world, tasks, answers)}
        lines = [f"{k}: {interval(v)}" for k, v in result.items() if isinstance(v, dict) and "mean" in v]
    else:
        from minillama.data.sources import read
        from minillama.evaluation.perplexity import perplexity

        result = perplexity(model, tok, (d["text"] for d in read(a.data, kind="document")))
        lines = [f"{k}: {v:.4g}" for k, v in result.items()]
    print(json.dumps(result) if a.json else "\n".join(lines))
    return 0


def generate(argv: list[str]) -> int:
    """Continue a text."""
    from minillama.config import GenerateConfig

    c, _ = _config(GenerateConfig, "generate", argv)
    from minillama.generate import stream, stream_text

    model, tok, _ = _to_generate(c.model, c.device, c.parallel, c.bf16)
    ids = tok.encode(c.prompt, bos=True)
    print(c.prompt, end="", flush=True)
    new = stream(model, ids, max_new_tokens=c.max_new_tokens, temperature=c.temperature, top_p=c.top_p, seed=c.seed, stop=[tok.eos_id])
    for text in stream_text(tok, (t for t in new if t != tok.eos_id)):
        print(text, end="", flush=True)
    print()
    return 0


def chat(argv: list[str]) -> int:
    """Talk to a model in the [INST] format. An empty line or Ctrl-D ends; /reset forgets the dialogue."""
    from minillama.config import GenerateConfig

    def more(p):
        p.add_argument("--system", default="", help="system prompt")

    c, a = _config(GenerateConfig, "chat", argv, more)
    from minillama.chat import Message, check, encode_prompt, fit_context
    from minillama.generate import stream, stream_text

    model, tok, mesh = _to_generate(c.model, c.device, c.parallel, c.bf16)
    start = [Message("system", a.system)] if a.system else []
    history = list(start)
    room = model.config.max_seq_len - min(c.max_new_tokens, model.config.max_seq_len // 2)
    turn = 0
    while True:
        try:
            line = ""
            if mesh.rank == 0:
                line = c.prompt if c.prompt and not turn else input("you> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            line = ""
        line = mesh.told(line)
        if not line.strip():
            break
        if line.strip() == "/reset":
            history = list(start)
            continue
        asked = [*history, Message("user", line)]
        try:
            check(asked)
            fitted = fit_context(tok, asked, room)
        except ValueError as e:
            print(f"(not sent: {e})", file=sys.stderr)
            if c.prompt and not turn:
                return 2
            continue
        if len(fitted) < len(asked):
            print(f"(the context holds {room} tokens: {(len(asked) - len(fitted)) // 2} oldest exchange(s) left out)", file=sys.stderr)
        history, pieces = fitted, []
        ids = encode_prompt(tok, history)
        new = stream(model, ids, max_new_tokens=c.max_new_tokens, temperature=c.temperature, top_p=c.top_p, seed=c.seed + turn, stop=[tok.eos_id])
        for text in stream_text(tok, (t for t in new if t != tok.eos_id)):
            pieces.append(text)
            print(text, end="", flush=True)
        print()
        turn += 1
        answer = "".join(pieces).strip()
        try:
            check([*history, Message("assistant", answer)])
            history = [*history, Message("assistant", answer)]
        except ValueError:
            print("(the answer holds a tag of the format; this exchange is forgotten)", file=sys.stderr)
            history = history[:-1]
        if c.prompt and not sys.stdin.isatty() and turn == 1:
            break
    return 0


def convert(argv: list[str]) -> int:
    """Convert a checkpoint: Meta, Hugging Face or minillama in; Hugging Face or minillama out."""
    p = Parser(prog="minillama convert", description=convert.__doc__)
    p.add_argument("--model", required=True, help="checkpoint to read, of any kind")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--to", choices=("hf", "minillama"), default="hf", help="format to write (default hf)")
    a = p.parse_args(argv)
    from minillama import checkpoint

    found = checkpoint.opened(a.model)  # and read tensor by tensor as it is written: a model need not fit the memory
    (checkpoint.save_hf if a.to == "hf" else checkpoint.save)(found, found.tokenizer, a.out)
    print(f"{a.out}: {found.config.n_params():,} parameters, {'with' if found.tokenizer else 'without'} tokenizer")
    return 0


def report(argv: list[str]) -> int:
    """Rebuild report.md and its plots from the files of a run."""
    p = Parser(prog="minillama report", description=report.__doc__)
    p.add_argument("--run", default="runs/laptop", help="folder of the run (default runs/laptop)")
    a = p.parse_args(argv)
    from minillama.report import build

    print(build(a.run))
    return 0


def launch(argv: list[str]) -> int:
    """Start a stage on many devices: by torchrun on this machine, or as a Slurm job that is requeued and resumes."""
    p = Parser(prog="minillama launch", description=launch.__doc__, epilog="Options of the launch stand before the stage, the stage's own after it.")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="torchrun on this machine")
    where.add_argument("--slurm", action="store_true", help="write a job script into the run folder and submit it")
    p.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    ranks = p.add_mutually_exclusive_group()
    ranks.add_argument("--gpus-per-node", type=int, help="GPUs, and ranks, a node (default those seen here; 8 with --slurm)")
    ranks.add_argument("--processes", type=int, help="ranks a node that need no GPU; the stage then wants --train.device cpu")
    p.add_argument("--cpus", type=int, default=8, help="CPU cores a rank (default 8)")
    p.add_argument("--run", help="folder of script and logs (default the stage's)")
    p.add_argument("--time", default="1-00:00:00", help="time limit; before it is up the job saves and goes back to the queue (default a day)")
    p.add_argument("--grace", type=int, default=120, help="seconds before the time limit at which it does (default 120)")
    p.add_argument("--failures", type=int, default=3, help="new starts after failures without a new checkpoint in between (default 3)")
    p.add_argument("--partition", help="Slurm partition")
    p.add_argument("--account", help="Slurm account")
    p.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch, as --sbatch=--mem=0; may be repeated")
    p.add_argument("--template", help="job script to fill in instead of minillama/parallel/sbatch.sh")
    p.add_argument("--dry", action="store_true", help="write and print, but start nothing")
    p.add_argument("stage", choices=_STAGES, help="one of: " + ", ".join(_STAGES))
    p.add_argument("args", nargs=argparse.REMAINDER, help="the stage's own arguments")
    a = p.parse_args(argv)
    import shlex
    from importlib import import_module
    from pathlib import Path

    from minillama.config import LlamaConfig
    from minillama.parallel.launch import TEMPLATE, Job, local, submit, torchrun, visible_gpus, write

    c, _ = _config(getattr(import_module("minillama.config"), _STAGES[a.stage][1]), a.stage, a.args)
    per_node = a.processes or a.gpus_per_node or (8 if a.slurm else max(1, visible_gpus()))
    options = [*([f"--partition={a.partition}"] if a.partition else []), *([f"--account={a.account}"] if a.account else []), *a.sbatch]
    job = Job(a.stage, a.args, Path(c.out), a.nodes, per_node, not a.processes and (a.slurm or bool(a.gpus_per_node or visible_gpus())),
              Path(a.run) if a.run else None, a.cpus, a.time, a.grace, a.failures, options)  # fmt: skip
    train = getattr(c, "train", c)
    llama = LlamaConfig.preset(c.preset, **c.model) if a.stage == "pretrain" else None
    p = train.parallel.resolve(job.nodes * per_node, llama)
    rows = getattr(c, "minibatch", train.batch_size)
    if rows < p.replicate * p.shard:
        raise ValueError(f"a step of {rows} rows does not reach the {p.replicate * p.shard} data ranks; take fewer, or raise the batch or parallel.tensor")
    if list((job.out / "checkpoint").glob("step-*")) and not c.resume:
        raise ValueError(f"{job.out} already holds a checkpoint; add --resume true to go on, or choose another folder")
    if a.local:
        if a.nodes > 1:
            raise ValueError(f"--local is this machine, not {a.nodes} nodes; without Slurm, run on each: {shlex.join(torchrun(job))}")
        print(shlex.join(torchrun(job)), flush=True)
        if not a.dry:
            local(job)
        return 0
    path = write(job, Path(a.template) if a.template else TEMPLATE)
    print(path.read_text(encoding="utf-8") if a.dry else f"job {submit(path)}: {path}; its log is in {path.parent / 'logs'}")
    print(f"without Slurm{', on each node K' if a.nodes > 1 else ''}: {shlex.join(torchrun(job))}")
    return 0


def plan(argv: list[str]) -> int:
    """Plan a run in closed form: memory, traffic and time of a step, whether it fits, GPU-hours, energy and carbon. Needs no torch."""
    from minillama.config import PRESETS, LlamaConfig
    from minillama.parallel.plan import GPUS, STAGES, plan, plot

    p = Parser(prog="minillama plan", description=plan.__doc__)
    p.add_argument("preset", help="one of: " + ", ".join(PRESETS))
    p.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    p.add_argument("--gpu", default="a100-80gb", help="one of: " + ", ".join(GPUS) + " (default a100-80gb)")
    p.add_argument("--replicate", type=int, help="copies of the sharded model; with no degree given, a mesh is proposed")
    p.add_argument("--shard", type=int, help="ranks that share parameters, gradients and optimizer state")
    p.add_argument("--tensor", type=int, help="ranks that split every matrix")
    p.add_argument("--checkpointing", choices=("none", "full"), default="full", help="activation checkpointing (default full)")
    p.add_argument("--keep-gathered", action="store_true", help="keep gathered weights from the forward to the backward pass")
    p.add_argument("--layers", type=int, help="number of blocks, to try a smaller one")
    p.add_argument("--seq-len", type=int, help="tokens a row (default the preset's longest)")
    p.add_argument("--batch", type=int, help="sequences a step over all ranks (default a micro-batch a data rank)")
    p.add_argument("--micro-batch", type=int, help="sequences a data rank takes at once (default 1, or with --batch as many as fit)")
    p.add_argument("--tokens", type=float, help="tokens of the run (default 2e12 in pretraining, else those of a step)")
    p.add_argument("--stage", default="pretrain", help="one of: " + ", ".join(STAGES) + " (default pretrain)")
    p.add_argument("--watts", type=float, help="power limit of a GPU (default its own; the paper's 34B had 350)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--plot", metavar="FILE.png", help="draw memory against ranks")
    a = p.parse_args(argv)
    llama = LlamaConfig.preset(a.preset, **{k: v for k, v in {"n_layers": a.layers, "max_seq_len": a.seq_len}.items() if v is not None})
    options = dict(tensor=a.tensor, replicate=a.replicate, shard=a.shard, checkpointing=a.checkpointing, reshard=not a.keep_gathered, batch=a.batch,
                   micro_batch=a.micro_batch, tokens=a.tokens, stage=a.stage, watts=a.watts)  # fmt: skip
    result = plan(llama, a.gpus, a.gpu, **options)
    print(json.dumps({"preset": a.preset, **result.to_json()}) if a.json else result)
    if a.plot:
        plot(result, a.plot)
    return 0


def dryrun(argv: list[str]) -> int:
    """Rehearse a training step of any number of ranks in this process: peak memory and collectives of one rank."""
    from minillama.config import PRESETS, LlamaConfig, ParallelConfig

    p = Parser(prog="minillama dryrun", description=dryrun.__doc__)
    p.add_argument("preset", help="one of: " + ", ".join(PRESETS))
    p.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    p.add_argument("--replicate", type=int, default=1, help="copies of the sharded model (default 1)")
    p.add_argument("--shard", type=int, default=0, help="ranks that share parameters, gradients and optimizer state (default all that the others leave)")
    p.add_argument("--tensor", type=int, default=1, help="ranks that split every matrix (default 1)")
    p.add_argument("--checkpointing", choices=("none", "full"), default="full", help="activation checkpointing (default full)")
    p.add_argument("--keep-gathered", action="store_true", help="keep gathered weights from the forward to the backward pass")
    p.add_argument("--layers", type=int, help="number of blocks, to try a smaller one")
    p.add_argument("--seq-len", type=int, help="tokens a row (default the preset's longest)")
    p.add_argument("--micro-batch", type=int, default=1, help="rows a data rank takes at once (default 1)")
    p.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (default 1)")
    p.add_argument("--fp32", action="store_true", help="compute in fp32 instead of bf16")
    p.add_argument("--rank", type=int, default=0, help="the rank that is rehearsed (default 0)")
    p.add_argument("--json", action="store_true", help="print JSON")
    a = p.parse_args(argv)
    llama = LlamaConfig.preset(a.preset, **{k: v for k, v in {"n_layers": a.layers, "max_seq_len": a.seq_len}.items() if v is not None})
    parallel = ParallelConfig(a.replicate, a.shard, a.tensor, a.checkpointing, not a.keep_gathered)
    parallel.resolve(a.gpus, llama)
    from minillama.parallel.dryrun import rehearse

    r = rehearse(llama, a.gpus, parallel, micro_batch=a.micro_batch, accumulation=a.accumulation, rank=a.rank, bf16=not a.fp32)
    asked = {"seq_len": llama.max_seq_len, "micro_batch": a.micro_batch, "accumulation": a.accumulation}
    print(json.dumps({"preset": a.preset, "n_params": llama.n_params(), **asked, **r.to_json()}) if a.json else r)
    return 0


def course(argv: list[str]) -> int:
    """The course's tools: sync, check, release, grade (each with --help)."""
    tools = ("sync", "check", "release", "grade")
    if not argv or argv[0] not in tools:
        if argv in (["-h"], ["--help"]):
            print(f"usage: minillama course {{{','.join(tools)}}} [--help]")
            return 0
        raise ValueError(f"minillama course takes one of {', '.join(tools)}" + (f", not {argv[0]!r}" if argv else ""))
    from importlib import import_module

    try:
        return import_module(f"minillama.course.{argv[0]}").main(argv[1:])
    except ModuleNotFoundError as e:
        if (e.name or "minillama").startswith("minillama"):
            raise
        raise ValueError(f"the course's tools need {e.name}; pip install -c constraints.txt -e '.[course]'") from None


VERBS = {"info": info, "demo": demo, "tokenizer": tokenizer, "clean": clean, **{verb: _training(verb, *rest) for verb, rest in _STAGES.items()},
         "eval": evaluate, "generate": generate, "chat": chat, "convert": convert, "launch": launch, "report": report, "course": course,
         "plan": plan, "dryrun": dryrun}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Arguments whose errors are one line, for `main` to print."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _config(cls: type, verb: str, argv: list[str], more=None):
    """(config, other arguments) from the command line: --config file.yaml, then dotted overrides."""
    import dataclasses

    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    p = jsonargparse.ArgumentParser(prog=f"minillama {verb}", description=VERBS[verb].__doc__, exit_on_error=False)
    p.add_argument("--config", action="config", help="YAML file of settings; later arguments override it")
    if more:
        more(p)
    p.add_class_arguments(cls, None)
    try:
        parsed = p.parse_args(argv)
        values = p.instantiate(parsed)
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as e:
        raise ValueError(f"{' '.join(str(e).split())}; see `minillama {verb} --help`") from None
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{n: getattr(values, n) for n in names}), values


def _to_generate(path: str, device: str, parallel, bf16: bool = False):
    """(model, tokenizer, mesh) of a checkpoint; of a torchrun job's ranks only the first speaks."""
    from minillama.parallel import mesh as module
    from minillama.parallel.state import load_sampler
    from minillama.trainer import pick_device

    mesh = module.start(parallel, device)
    model, tok = load_sampler(path, mesh, pick_device(device), bf16)
    if tok is None:
        raise ValueError(f"{path} has no tokenizer.model; put the one it was trained with beside the weights")
    if mesh.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return model, tok, mesh


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minillama VERB [--help]\n\n" + "\n".join(f"  {name:<10} {fn.__doc__.splitlines()[0]}" for name, fn in VERBS.items()))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"minillama: unknown verb {argv[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        return _fail(_line(e), 2)
    except OSError as e:
        hint = " (free some space, then go on with --resume true)" if e.errno in (27, 28, 122) else ""  # too large, no space, over quota
        return _fail(f"{_line(e)}; what was saved before is still there{hint}", 1)
    except (FloatingPointError, MemoryError, RuntimeError) as e:
        return _fail(_waited(_line(e)), 1)
    except Exception as e:
        if type(e).__name__ == "Interrupted":
            return _fail(_line(e), 143)
        raise


def _keep_memory() -> None:
    """Let this process keep up to a gigabyte of what it has freed, in blocks of up to 256 MB each (glibc; elsewhere nothing happens).

    Every training step on a CPU asks for the arrays that the last one freed. By default the large ones go back to the system in between, which hands
    out 4 kB of zeros at a time, one page fault each, and on a virtual machine these take as long as some of the products.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((-3, 1 << 28), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, value)


def _in_job() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _line(e: BaseException) -> str:
    if isinstance(e, OSError) and e.filename and e.strerror:
        return f"{e.strerror}: {e.filename}"
    return " ".join(str(e).split()) or type(e).__name__


def _waited(message: str) -> str:
    """`message`, and which ranks were waited for if it tells of a collective that timed out."""
    if not _in_job() or "timed out" not in message.lower():
        return message
    from minillama.parallel.mesh import absent

    return f"waited in vain for rank {', '.join(map(str, ranks))} (parallel.timeout_minutes): {message}" if (ranks := absent()) else message


def _fail(message: str, status: int) -> int:
    job = _in_job()
    who = f"rank {os.environ.get('RANK')}: " if job and status == 1 else ""  # a wrong request is the same on all
    sys.stderr.write(f"minillama: {who}{message}\n")  # at once, or lines of several ranks would mix
    sys.stderr.flush()
    if job and status == 2:
        time.sleep(2)  # torchrun ends the other ranks as soon as one is gone: let each say what is wrong
    return status


def run() -> None:
    """Run a verb and end the process with its exit status: what `minillama` and `python -m minillama` call.

    A rank of a job ends without Python's own clean-up: a thread of gloo that still holds a tensor of the last collective when the interpreter goes
    would abort it, and torchrun would report a job that has done all its work as failed.
    """
    _keep_memory()
    status = main()
    if not _in_job():
        sys.exit(status)
    if status == 0:  # else another rank may be waited for
        from minillama.parallel import mesh

        mesh.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
