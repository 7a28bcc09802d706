"""Sources (sec 2.1): one reader for local text, JSON lines, parquet and the hub's data sets, and the mixing of sources.

    for doc in read("books/*.txt"): ...          for pair in read("hf:Anthropic/hh-rlhf", kind="preference"): ...

Whatever the source, three plain dicts come out; further columns ride along:
    document     {"text": str, "source": str}
    instruction  {"messages": [{"role", "content"}, ...], "source": str}
    preference   {"prompt_messages": [...], "chosen": str, "rejected": str, "source": str}
Which column is which is declared in KNOWN. The same declarations serve a local file with the same columns. Everything streams: a file is
never held as a whole. Left out: trees of messages (the raw OpenAssistant export); write them as lists of messages first.
"""
from __future__ import annotations

import glob
import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from random import Random

MAX_CHARS = 10_000  # of one document cut from a text file
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Columns:
    """The names of the columns that hold each part; empty where there is none. The filled ones decide the kind of data.

    `chosen` and `rejected` are answers where `prompt` or `messages` is named, and whole dialogues where neither is.
    """

    text: str = ""
    prompt: str = ""
    context: str = ""
    answer: str = ""
    messages: str = ""
    chosen: str = ""
    rejected: str = ""

    @property
    def kind(self) -> str:
        """ "document", "instruction" or "preference". Raises ValueError if the columns make none of them."""
        if self.chosen and self.rejected:
            return "preference"
        if self.messages or (self.prompt and self.answer):
            return "instruction"
        if self.text:
            return "document"
        raise ValueError(f"columns {self.named()} make no document, instruction or preference: name text, or prompt and answer, or "
                         "messages, or chosen and rejected")  # fmt: skip

    def named(self) -> dict[str, str]:
        """The parts that have a column."""
        return {part: column for part, column in asdict(self).items() if column}


# In the order in which a file without declared columns is matched: the first whose columns are all present. `context` may be missing.
KNOWN: dict[str, Columns] = {
    "minillama/preferences": Columns(messages="prompt_messages", chosen="chosen", rejected="rejected"),
    "minillama/prompted-preferences": Columns(prompt="prompt", chosen="chosen", rejected="rejected"),
    "Anthropic/hh-rlhf": Columns(chosen="chosen", rejected="rejected"),
    "HuggingFaceH4/no_robots": Columns(messages="messages"),
    "tatsu-lab/alpaca": Columns(prompt="instruction", context="input", answer="output"),
    "databricks/databricks-dolly-15k": Columns(prompt="instruction", context="context", answer="response"),
    "roneneldan/TinyStories": Columns(text="text"),
    "Salesforce/wikitext": Columns(text="text"),
}


# ---- rows: from a file or the hub, each with the place it came from ---------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a UTF-8 file, unzipped if it ends in .gz. Raises ValueError that names the byte that is not UTF-8."""
    offset = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as e:
                    raise ValueError(f"{path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {offset + e.start} (line {number}); "
                                     "convert it, for example with iconv -t utf-8") from None  # fmt: skip
                offset += len(raw)
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is not a whole gzip file ({e}); fetch or write it again") from None


def _text_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """A text file as documents of at most MAX_CHARS, each cut at the last blank line that fits, else line end, space or character."""
    held, number = "", 0
    for _, line in _lines(path):
        line = line.rstrip() + "\n"
        for i in range(0, len(line), MAX_CHARS):
            held += line[i : i + MAX_CHARS]
            while len(held) > MAX_CHARS:
                cut = next((at for gap in ("\n\n", "\n", " ") if (at := held.rfind(gap, 1, MAX_CHARS)) > 0), MAX_CHARS)
                yield f"{path}: document {(number := number + 1)}", {"text": held[:cut].strip()}
                held = held[cut:].lstrip()
    yield f"{path}: document {number + 1}", {"text": held.strip()}


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{number}: not JSON ({e.msg}, column {e.colno}); each line must be one object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a line must be one JSON object with named columns, got {type(row).__name__}")
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa  # slow to import, and most readers never need it
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as f:
            for batch in f.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}: row {(number := number + 1)}", row
    except pa.ArrowException as e:
        raise ValueError(f"{path} is not a whole parquet file: {str(e).splitlines()[0][:160]}") from None


def _hub_rows(spec: str, split: str) -> Iterator[tuple[str, dict]]:
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{spec!r} is not a data set of the hub; write hf:owner/name or hf:owner/name:config")
    import datasets

    try:  # streaming, so errors of the network come up while reading too
        for number, row in enumerate(datasets.load_dataset(name, config or None, split=split, streaming=True), 1):
            yield f"{spec}: row {number}", row
    except Exception as e:  # the hub's client raises a dozen unrelated classes
        reason = (str(e).splitlines() or [""])[0][:200]
        raise ValueError(f"cannot read {spec} (split {split!r}): {type(e).__name__}: {reason}. The hub needs a network, or the data set in "
                         "the datasets cache; without either, give a local .jsonl, .parquet or .txt file with the same columns") from e


def files_of(spec: str | os.PathLike) -> list[Path]:
    """The files a path, a folder (searched to any depth) or a glob stands for, sorted. Raises FileNotFoundError if there is none."""
    path = Path(spec)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"cannot read {path}: the name must end in one of {', '.join(SUFFIXES)}")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(spec), recursive=True))
    files = sorted(f for f in found if f.is_file() and f.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"no file at {spec}: give a file, a folder or a glob of {', '.join(SUFFIXES)}, or hf:owner/name")
    return files


def _rows(spec: str, split: str) -> Iterator[tuple[str, dict]]:
    if spec.startswith("hf:"):
        yield from _hub_rows(spec, split)
        return
    for path in files_of(spec):
        reader = _parquet_rows if path.suffix == ".parquet" else _json_rows if path.name.endswith((".jsonl", ".jsonl.gz")) else _text_rows
        yield from reader(path)


# ---- normalising ------------------------------------------------------------------------------------------------------------

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")


def parse_dialogue(text: str) -> list[dict]:
    r"""Turns of "\n\nHuman: ... \n\nAssistant: ..." (Anthropic/hh-rlhf) as messages; neighbours of one role are joined.

    Raises ValueError if the text does not begin with a turn.
    """
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"not a dialogue of Human: and Assistant: turns: {text[:60]!r}")
    messages: list[dict] = []
    for role, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = "user" if role == "Human" else "assistant", content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages


def _pair(chosen: list[dict], rejected: list[dict]) -> dict | None:
    """The first turn at which two dialogues part, if it is an answer in both; None if they part at a question or not at all."""
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            if a["role"] == b["role"] == "assistant" and i and a["content"] and b["content"]:
                return {"prompt_messages": chosen[:i], "chosen": a["content"], "rejected": b["content"]}
            return None
    return None


def _turns(value: object, where: str) -> list[dict]:
    if isinstance(value, str):
        try:
            return parse_dialogue(value)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in value):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}, got {str(value)[:80]!r}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _normalise(row: dict, c: Columns, where: str) -> dict | None:
    """The row as one of the three dicts, or None if the part that is learned from is empty or the pair cannot be compared."""

    def get(part: str) -> str:
        value = row.get(getattr(c, part))
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: column {getattr(c, part)!r} must hold text, got {type(value).__name__}")
        return (value or "").strip()

    prompt = c.prompt and "\n\n".join(x for x in (get("prompt"), c.context and get("context")) if x)
    if c.kind == "document":
        out = {"text": row[c.text]} if get("text") else None
    elif c.kind == "instruction":
        if c.messages:
            messages = _turns(row[c.messages], where)
        else:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": get("answer")}]
        out = {"messages": messages} if messages and all(m["content"].strip() for m in messages) else None
    elif isinstance(row[c.chosen], str) and (c.prompt or c.messages):
        before = _turns(row[c.messages], where) if c.messages else [{"role": "user", "content": prompt}]
        good, bad = get("chosen"), get("rejected")
        out = {"prompt_messages": before, "chosen": good, "rejected": bad} if before and good and bad and good != bad else None
    else:  # whole dialogues
        out = _pair(_turns(row[c.chosen], where), _turns(row[c.rejected], where))
    used = set(c.named().values())
    return out and {**{k: v for k, v in row.items() if k not in used}, **out}


def _columns_for(spec: str, row: dict, given: Columns | dict | None, where: str) -> Columns:
    """The columns to use, checked against the first row. Raises ValueError that names the columns present and the fix."""
    if isinstance(given, dict):
        parts = [f.name for f in fields(Columns)]
        if unknown := sorted(set(given) - set(parts)):
            raise ValueError(f"unknown part {unknown[0]!r} in columns; the parts are {', '.join(parts)}")
        given = Columns(**given)
    known = KNOWN.get(spec.removeprefix("hf:").partition(":")[0]) if spec.startswith("hf:") else None
    for c in [given] if given else [known] if known else KNOWN.values():
        missing = [column for part, column in c.named().items() if column not in row and part != "context"]
        if not missing:
            return c
    wanted = f"there is no column {missing[0]!r}" if given or known else "the columns are of no known data set"
    raise ValueError(f"{where}: {wanted}; present are {', '.join(map(repr, row))}. Name yours, for example columns={{'text': ...}} or "
                     "columns={'prompt': ..., 'answer': ...}")  # fmt: skip


def read(spec: str | os.PathLike, columns: Columns | dict | None = None, split: str = "train", limit: int | None = None,
         kind: str | None = None) -> Iterator[dict]:  # fmt: skip
    """Stream the documents, instructions or preferences of `spec`: a file, a folder, a glob, or hf:owner/name[:config].

    columns: part -> column name, where KNOWN does not fit. split: of a hub data set. limit: at most this many items.
    kind: "document", "instruction" or "preference" if only that will do. Rows without text are skipped, and so are pairs of dialogues
    that part at a question; a warning at the end counts the pairs.
    Raises FileNotFoundError, or ValueError for bad bytes, bad JSON, missing columns, the wrong kind, an unreachable hub, or no text at all.
    """
    yield from islice(_read(os.fspath(spec), columns, split, kind), limit)


def _read(spec: str, columns: Columns | dict | None, split: str, kind: str | None) -> Iterator[dict]:
    by_columns: dict[tuple, Columns] = {}  # a folder may hold files of different columns
    n, skipped = 0, 0
    for where, row in _rows(spec, split):
        c = by_columns.get(key := tuple(row))
        if c is None:
            c = by_columns[key] = _columns_for(spec, row, columns, where)
            if kind and c.kind != kind:
                raise ValueError(f"{where}: holds {c.kind}s (columns {', '.join(map(repr, row))}), and {kind}s are wanted")
        item = _normalise(row, c, where)
        if item is None:
            skipped += c.kind == "preference"
            continue
        n += 1
        yield item if item.get("source") else {**item, "source": spec}
    if not n:
        raise ValueError(f"{spec} holds no text")
    if skipped:
        warnings.warn(f"{spec}: skipped {skipped} pairs without two different answers to one prompt, kept {n}", stacklevel=3)


def write_jsonl(rows: Iterable[dict], path: str | os.PathLike) -> int:
    """Write one object a line (gzip if the name ends in .gz) and return how many. The file appears only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    n = 0
    try:
        with gzip.open(tmp, "wt", encoding="utf-8") if path.suffix == ".gz" else open(tmp, "w", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                n += 1
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return n


def read_prompts(spec: str | os.PathLike) -> list[dict]:
    """Prompts of a file: {"messages" that end with the user's turn, "safety": bool}. An answer at the end is left out; other columns are kept.

    Raises ValueError if there is none.
    """
    prompts = []
    for row in read(spec, kind="instruction"):
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        prompts.append({**row, "messages": messages, "safety": bool(row.get("safety", False))})
    if not prompts:
        raise ValueError(f"{spec} holds no prompt")
    return prompts


def read_rows(path: str | os.PathLike, keys: tuple[str, ...]) -> list[dict]:
    """The objects of a jsonl or parquet file that must have `keys`. Raises ValueError that names the row without one, or if there is no row."""
    rows = []
    for where, row in _rows(str(path), "train"):
        if missing := [k for k in keys if k not in row]:
            raise ValueError(f"{where}: there is no {missing[0]!r}; a row needs {', '.join(keys)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


# ---- mixing -----------------------------------------------------------------------------------------------------------------


def by_source(docs: Iterable[dict]) -> dict[str, list[dict]]:
    """Documents grouped by their "source", in order of first appearance: what `mix` takes."""
    groups: dict[str, list[dict]] = {}
    for doc in docs:
        groups.setdefault(doc["source"], []).append(doc)
    return groups


def mix(sources: dict[str, Iterable[dict]], weights: dict[str, float], seed: int,
        n_docs: int | None = None) -> tuple[list[dict], dict[str, dict]]:  # fmt: skip
    """Mix sources, the most factual ones up-sampled (sec 2.1); returns (documents, report).

    A weight is a number of passes: 1.0 takes each document once, 2.5 takes each twice and a random half of them a third time, 0 leaves the
    source out. With n_docs, all passes are scaled by one factor to give exactly n_docs documents. The order is a shuffle by `seed`; which
    documents a broken pass takes depends on (seed, name) only, so another source does not change it. Documents are shared, not copied.
    report: name -> {"size", "taken", "epochs" = taken / size, "share" of the mixture}. Raises ValueError for a source without weight, a
    weight without source, a negative weight, or an empty source.
    """
    pools = {name: list(docs) for name, docs in sources.items()}
    for name in [*pools, *weights]:
        if name not in pools or name not in weights:
            raise ValueError(f"source {name!r} has no {'weight' if name in pools else 'documents'}; sources are {', '.join(pools)}")
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"the weight of {name!r} must be a number of passes, 0 or more, got {weights[name]}")
        if weights[name] and not pools[name]:
            raise ValueError(f"source {name!r} holds no documents to take {weights[name]} passes over")
    wanted = {name: weights[name] * len(pool) for name, pool in pools.items()}
    if n_docs is not None:
        if not (total := sum(wanted.values())):
            raise ValueError("all weights are 0: there is nothing to mix")
        wanted = {name: n_docs * w / total for name, w in wanted.items()}
        taken = {name: int(w) for name, w in wanted.items()}
        for name in sorted(wanted, key=lambda x: (taken[x] - wanted[x], x))[: n_docs - sum(taken.values())]:
            taken[name] += 1  # largest remainder first, so that the counts add up
    else:
        taken = {name: int(w + 0.5) for name, w in wanted.items()}
    mixture: list[dict] = []
    for name, pool in pools.items():
        passes, rest = divmod(taken[name], len(pool)) if pool else (0, 0)
        mixture += pool * passes + Random(f"mix:{seed}:{name}").sample(pool, rest)
    Random(f"mix:{seed}").shuffle(mixture)
    report = {
        name: {"size": len(pool), "taken": taken[name], "epochs": taken[name] / len(pool) if pool else 0.0,
               "share": taken[name] / max(1, len(mixture))}
        for name, pool in pools.items()
    }  # fmt: skip
    return mixture, report
