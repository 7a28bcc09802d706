"""The tokenizer (sec 2.2): SentencePiece byte-pair encoding, digits split, bytes as the fallback.

    Tokenizer.train(texts, vocab_size=1024, path="tokenizer.model").encode("Nila lives here.", bos=True)

Meta's tokenizer.model loads unchanged: BOS is 1, EOS is 2, there is no pad token (pad_id -1), and a text is encoded with a space
put before it (SentencePiece's dummy prefix), which decoding takes away again.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece


class Tokenizer:
    """A SentencePiece model with Llama's conventions.

    Raises ValueError if `path` is not a SentencePiece model or lacks Llama's special ids, FileNotFoundError if it is missing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no tokenizer at {self.path}: train one with `minillama tokenizer`, or give Meta's tokenizer.model")
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(self.path.read_bytes())
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{self.path} is not a SentencePiece model: {str(e).strip()[:120] or 'it cannot be parsed'}") from None
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id(), self._sp.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{self.path} has no BOS or no EOS (ids {self.bos_id}, {self.eos_id}); Llama needs both")
        self.vocab_size = self._sp.GetPieceSize()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | os.PathLike, threads: int = 2) -> Tokenizer:
        """Learn a vocabulary from `texts` and write it to `path` (a .model file); the same texts and `threads` give the same file.

        vocab_size counts the 3 special tokens and 256 bytes; at least 300. No normalisation: text comes back as it went in.
        Raises ValueError for no text, or a vocabulary larger than the texts support (the error gives the largest).
        """
        if vocab_size < 300:
            raise ValueError(f"vocab_size {vocab_size} is too small: 3 special tokens and 256 bytes leave no room; use 300 or more")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{os.getpid()}")
        empty, failed = True, None

        def lines():
            nonlocal empty, failed
            try:
                for text in texts:
                    _check(text)
                    for line in text.split("\n"):  # newlines are bytes; pieces never cross them
                        if line.strip():
                            empty = False
                            yield from (line[i : i + 4000] for i in range(0, len(line), 4000))  # the trainer drops lines over its limit
            except Exception as e:  # SentencePiece would wrap it in an error of its own
                failed = e

        try:
            with open(tmp, "wb") as out:
                sentencepiece.SentencePieceTrainer.Train(
                    sentence_iterator=lines(), model_writer=out, vocab_size=vocab_size, model_type="bpe",
                    split_digits=True, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                    allow_whitespace_only_pieces=True, add_dummy_prefix=True, max_sentence_length=65536, character_coverage=0.99995,
                    unk_id=0, bos_id=1, eos_id=2, pad_id=-1, unk_surface=" \u2047 ", num_threads=threads, minloglevel=2,
                )  # fmt: skip
            if failed is not None:
                raise failed from None
            os.replace(tmp, path)
        except RuntimeError as e:
            if failed is not None:
                raise failed from None
            if empty:
                raise ValueError("there is no text to train a tokenizer on") from None
            raise ValueError(f"cannot learn {vocab_size} tokens from these texts: {' '.join(str(e).split())[-160:]}") from None
        finally:
            tmp.unlink(missing_ok=True)
        return cls(path)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, with BOS before and EOS after on request. Text never yields a special token.

        decode(encode(text)) == text for all Unicode text without U+2581, which is SentencePiece's own mark for a space.
        Raises ValueError for lone surrogates, which are not text (UTF-8 cannot carry them).
        """
        _check(text)
        ids = self._sp.EncodeAsIds(text)
        return ([self.bos_id] if bos else []) + ids + ([self.eos_id] if eos else [])

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no trace, broken byte sequences become U+FFFD. Raises ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        return self._sp.DecodeIds(ids)

    def serialized(self) -> bytes:
        """The model file's bytes (the file itself may have moved since it was read)."""
        return self._sp.serialized_model_proto()

    def piece(self, token: int) -> str:
        """The vocabulary entry of one id, with U+2581 for a space. Raises ValueError for an id out of range."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._sp.IdToPiece(int(token))


def _check(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"text has a lone surrogate U+{ord(text[e.start]):04X} at position {e.start}; read files with encoding='utf-8'"
        ) from None
