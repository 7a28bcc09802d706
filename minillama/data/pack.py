"""From texts to batches: tokenise in parallel into memory-mapped shards, pack rows, serve any batch from (seed, step).

    write_shards(texts, tokenizer_path, "runs/x/data");  Batches(Shards("runs/x/data"), batch_size=32, seq_len=256, seed=0)(step)

A batch is a pure function of (seed, step): there is no iterator to save, so a resumed run sees what the unstopped one would have,
whatever the number of ranks (each takes every world-size-th row of the global batch).
"""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from minillama.chat import Message, encode_dialogue
from minillama.tokenizer import Tokenizer

SHARD_TOKENS = 50_000_000

_tokenizer: Tokenizer | None = None  # one a worker process


def _start(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _encode(item: str | list[dict] | dict) -> tuple[list[int], list[bool] | None, int]:
    """A document (BOS text EOS, everything trained on) or a dialogue (answers trained on; as {"messages", "last_only": true} only the last), and a
    32-bit hash of its content."""
    key = int(hashlib.sha256((item if isinstance(item, str) else json.dumps(item)).encode()).hexdigest()[:8], 16)
    if isinstance(item, str):
        return _tokenizer.encode(item, bos=True, eos=True), None, key
    messages, last_only = (item["messages"], item.get("last_only", False)) if isinstance(item, dict) else (item, False)
    return *encode_dialogue(_tokenizer, [Message(m["role"], m["content"]) for m in messages], last_only), key


def _encode_many(items: list) -> list:
    return [_encode(x) for x in items]


def _chunks(items: Iterable, n: int = 256) -> Iterator[list]:
    chunk = []
    for x in items:
        chunk.append(x)
        if len(chunk) == n:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def write_shards(items: Iterable[str] | Iterable[list[dict]], tokenizer: str | os.PathLike, out: str | os.PathLike, workers: int = 2) -> Path:
    """Tokenise documents (strings) or dialogues (lists of {"role", "content"}) into `out`; order and result do not depend on `workers`.

    Writes shard-NNNNN.tokens (little-endian uint16, or uint32 from 65,536 tokens of vocabulary on), .trained (one byte a token, dialogues
    only), .offsets (document starts and the end, int64), .keys (a hash of each document's content, uint32)
    and meta.json last, so an interrupted write is not mistaken for a whole one.
    Raises ValueError when there is nothing to write.
    """
    out, tmp = Path(out), Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    dtype = "<u2" if Tokenizer(tokenizer).vocab_size < 65_536 else "<u4"
    shards: list[dict] = []
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    keys: list[int] = []

    def flush() -> None:
        stem = tmp / f"shard-{len(shards):05d}"
        np.concatenate(ids).astype(dtype).tofile(f"{stem}.tokens")
        np.cumsum([0, *map(len, ids)]).astype("<i8").tofile(f"{stem}.offsets")
        np.asarray(keys, "<u4").tofile(f"{stem}.keys")
        if trained:
            np.concatenate(trained).astype(np.uint8).tofile(f"{stem}.trained")
        shards.append({"documents": len(ids), "tokens": int(sum(map(len, ids)))})
        ids.clear(), trained.clear(), keys.clear()

    # Spawned workers: a forked child of a process that runs OpenMP threads can hang.
    pool = multiprocessing.get_context("spawn").Pool(workers, _start, (str(tokenizer),)) if workers > 1 else None
    if pool is None:
        _start(str(tokenizer))
    size = 0
    try:
        for chunk in pool.imap(_encode_many, _chunks(items)) if pool else map(_encode_many, _chunks(items)):
            for tokens, mask, key in chunk:
                ids.append(np.asarray(tokens))
                keys.append(key)
                size += len(tokens)
                if mask is not None:
                    trained.append(np.asarray(mask))
                if size >= SHARD_TOKENS:
                    flush()
                    size = 0
        if ids:
            flush()
    finally:
        if pool:
            pool.terminate()
            pool.join()
    if not shards:
        shutil.rmtree(tmp)
        raise ValueError("there are no documents to tokenise")
    (tmp / "meta.json").write_text(json.dumps({"dtype": dtype, "shards": shards}))
    shutil.rmtree(out, ignore_errors=True)
    tmp.rename(out)
    return out


class Shards:
    """The documents that `write_shards` wrote, memory-mapped. Raises ValueError for a folder that is not whole."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "meta.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path} holds no tokenised data (no meta.json)") from None
        self.tokens, self.trained, offsets, keys = [], [], [], []
        for i, shard in enumerate(meta["shards"]):
            stem = self.path / f"shard-{i:05d}"
            tokens = np.memmap(f"{stem}.tokens", dtype=meta["dtype"], mode="r")
            if len(tokens) != shard["tokens"]:
                raise ValueError(f"{stem}.tokens has {len(tokens)} tokens, meta.json says {shard['tokens']}; tokenise again")
            self.tokens.append(tokens)
            self.trained.append(np.memmap(f"{stem}.trained", dtype=np.uint8, mode="r") if Path(f"{stem}.trained").exists() else None)
            offsets.append(np.fromfile(f"{stem}.offsets", dtype="<i8"))
            keys.append(np.fromfile(f"{stem}.keys", dtype="<u4"))
        self.offsets = offsets
        self.keys = np.concatenate(keys)  # [documents]
        self.first = np.cumsum([0, *(len(o) - 1 for o in offsets)])  # first document of each shard
        self.lengths = np.concatenate([np.diff(o) for o in offsets])  # [documents], in tokens
        self.n_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and whether each is trained on [n] of document i."""
        s = int(np.searchsorted(self.first, i, side="right")) - 1
        a, b = self.offsets[s][i - self.first[s] : i - self.first[s] + 2]
        trained = self.trained[s]
        return self.tokens[s][a:b].astype(np.int64), np.ones(b - a, bool) if trained is None else trained[a:b].astype(bool)

    def split(self, fraction: float) -> tuple[Part, Part | None]:
        """Documents for training and for validation. Which is which follows from their content, so copies of one text are never on both sides.

        None for validation if `fraction` is 0. Raises ValueError if there are fewer than 2 documents to split.
        """
        held = self.keys < fraction * 2**32
        if fraction > 0 and (held.all() or not held.any()):
            if len(set(self.keys.tolist())) < 2:
                raise ValueError(f"the data holds {len(self)} document(s); keeping some for validation takes 2 different ones (or set val_fraction 0)")
            held = self.keys == self.keys[0]
        return Part(self, np.flatnonzero(~held)), Part(self, np.flatnonzero(held)) if held.any() else None


class Part:
    """Some documents of Shards, as Batches reads them: lengths [documents] in tokens, and document(i)."""

    def __init__(self, shards: Shards, documents: np.ndarray):
        self.shards, self.documents = shards, documents
        self.lengths = shards.lengths[documents]
        self.n_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained mask of this part's document i."""
        return self.shards.document(int(self.documents[i]))


def pack(lengths: np.ndarray, row: int, cut: bool = True) -> list[list[tuple[int, int, int]]]:
    """Best-fit decreasing: pieces (document, start, end) of at most `row` tokens, put into as few rows of `row` tokens as it finds.

    Documents longer than a row are cut; pieces overlap by one token so that every token but a document's first is a
    target once. Without `cut`, only their first row is kept (a dialogue's rest would lack its start).
    """
    pieces: list[tuple[int, int, int]] = []
    for d, n in enumerate(lengths.tolist()):
        start = 0
        while start == 0 or start < n - 1:
            pieces.append((d, start, min(start + row, n)))
            start = start + row - 1 if cut else n
    pieces.sort(key=lambda p: (p[1] - p[2], p[0], p[1]))
    rows: list[list[tuple[int, int, int]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in pieces:
        n = piece[2] - piece[1]
        at = bisect_left(room, (n, -1))
        if at < len(room):
            free, r = room.pop(at)
        else:
            free, r = row, len(rows)
            rows.append([])
        rows[r].append(piece)
        if free - n > 1:
            insort(room, (free - n, r))
    return rows


class Batches:
    """batch = batches(step): a list of micro-batches, tensors [b, seq_len], as `next_token_loss` takes them.

    Rows are packed once with whole documents (`whole_documents`), or cut from one stream as is common at scale; each epoch visits all rows
    in an order drawn from (seed, epoch). Raises ValueError if there are fewer tokens than one row in stream mode.
    """

    def __init__(
        self, shards: Shards | Part, batch_size: int, seq_len: int, seed: int = 0, micro_batch: int = 0, rank: int = 0, world: int = 1,
        whole_documents: bool = True,
        cut: bool = True,
    ):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} is not divisible by the {world} ranks")
        self.shards, self.batch_size, self.seq_len, self.seed = shards, batch_size, seq_len, seed
        self.micro_batch, self.rank, self.world, self.whole = micro_batch or batch_size // world, rank, world, whole_documents
        if whole_documents:
            self.rows = pack(shards.lengths, seq_len + 1, cut)
            self.n_rows = len(self.rows)
        else:
            self.ends = np.cumsum(shards.lengths)
            self.n_rows = (shards.n_tokens - 1) // seq_len
            if not self.n_rows:
                raise ValueError(f"{shards.n_tokens} tokens do not fill one row of {seq_len}; use more text or a shorter seq_len")
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.n_rows))

    @property
    def steps_per_epoch(self) -> float:
        """Steps that visit every row once."""
        return self.n_rows / self.batch_size

    def indices(self, step: int) -> list[int]:
        """Rows of the global batch of `step`."""
        first = step * self.batch_size
        return [int(self._order(i // self.n_rows)[i % self.n_rows]) for i in range(first, first + self.batch_size)]

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, targets (-100 where not trained), doc_ids, each [seq_len], of row r."""
        if self.whole:
            parts = [(k, *(x[a:b] for x in self.shards.document(d))) for k, (d, a, b) in enumerate(self.rows[r])]
        else:
            start, parts, end = r * self.seq_len, [], (r + 1) * self.seq_len + 1
            d = int(np.searchsorted(self.ends, start, side="right"))
            while start < end:
                base = self.ends[d] - self.shards.lengths[d]
                stop = min(end, self.ends[d])
                parts.append((0, *(x[start - base : stop - base] for x in self.shards.document(d))))
                start, d = stop, d + 1
            parts = [(0, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts]))]
        T = self.seq_len
        tokens, targets, doc_ids = np.zeros(T, np.int64), np.full(T, -100, np.int64), np.full(T, -1, np.int64)
        at = 0
        for k, ids, trained in parts:
            n = min(len(ids), T - at)  # the last token of a full row is a target only
            tokens[at : at + n], doc_ids[at : at + n] = ids[:n], k
            m = min(len(ids) - 1, n)
            targets[at : at + m] = np.where(trained[1 : m + 1], ids[1 : m + 1], -100)
            at += n
        return tokens, targets, doc_ids

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        mine = self.indices(step)[self.rank :: self.world]
        batches = []
        for i in range(0, len(mine), self.micro_batch):
            tokens, targets, doc_ids = (torch.from_numpy(np.stack(x)) for x in zip(*map(self.row, mine[i : i + self.micro_batch]), strict=True))
            batch = {"tokens": tokens, "targets": targets}
            batches.append({**batch, "doc_ids": doc_ids} if self.whole else batch)
        return batches


def tokenised(
    items: Iterable, fraction: float, tokenizer: str | os.PathLike, folder: Path, workers: int, reuse: bool
) -> tuple[Part, Part | None]:
    """Training and validation parts of `items`, tokenised into `folder`, or of what is there already if `reuse` (a resumed run)."""
    if not (reuse and (folder / "meta.json").exists()):
        write_shards(items, tokenizer, folder, workers)
    return Shards(folder).split(fraction)


def validation_batches(shards: Part, like: Batches, rows: int = 64) -> list:
    """Up to `rows` rows of the validation shards as micro-batches."""
    n = min(rows, len(shards))
    return Batches(shards, n, like.seq_len, 0, micro_batch=like.micro_batch, whole_documents=like.whole)(0)
