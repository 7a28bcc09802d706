"""Files for checkpoint.py: safetensors, Meta's .pth and JSON read with errors that name file and fix, and folders written whole or not at all.

    with new_folder(Path("runs/my/sft")) as tmp:      # fill tmp; it takes the folder's place when the block ends
        write_json({"dim": 128}, tmp / "params.json")

A folder is written under a hidden name beside its place, flushed to the disk, and renamed: whoever finds a checkpoint finds a whole
one, and a save that fails (a full disk) or is killed costs nothing that was there. One process writes a folder at a time.
Private to the package: nothing here is about Llama.
"""
from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]


def open_safetensors(files: list[Path]) -> tuple[dict[str, Shape], Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Shapes of all tensors by name, from the headers alone, and a function that yields (name, tensor) one by one."""
    shapes: dict[str, Shape] = {}

    @contextmanager
    def opened(file: Path):
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is incomplete; copy it again")
        try:
            with safe_open(file, "pt") as f:
                yield f
        except SafetensorError as e:
            fix = "copy it again, or delete its folder to go on from an older one"
            raise ValueError(f"{file} is truncated or not a safetensors file ({e}); {fix}") from None

    for file in files:
        with opened(file) as f:
            for name in f.keys():
                if name in shapes:
                    raise ValueError(f"{file} repeats the tensor {name} of shape {list(shapes[name])} of another file in the folder")
                shapes[name] = tuple(f.get_slice(name).get_shape())

    def read() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with opened(file) as f:
                for name in f.keys():
                    yield name, f.get_tensor(name).clone()  # what get_tensor gives changes when the file does

    return shapes, read


def read_pth(file: Path) -> dict[str, Tensor]:
    """A Meta shard, mapped from the disk; without rope.freqs, which follow from the config."""
    try:
        shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError and others for a damaged file
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise ValueError(f"{file} is truncated or not a checkpoint ({reason}); download it again") from None
    if not isinstance(shard, dict) or not all(isinstance(t, Tensor) for t in shard.values()):
        raise ValueError(f"{file} is not a dictionary of tensors; give Meta's consolidated.*.pth")
    return {name: t for name, t in shard.items() if name != "rope.freqs"}


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError where it is missing or holds anything else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete; copy it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # broken JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON ({e}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file of `tensors`. Raises OSError where it cannot be written."""
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(e))
        raise OSError(int(number[1]) if number else errno.EIO, f"cannot write ({e})", str(file)) from None


def write_json(value: dict, path: Path) -> None:
    """A JSON object, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_OURS = re.compile(r"(params|config|generation_config|special_tokens_map|tokenizer_config|tokenizer|train_state)\.json|tokenizer\.model"
                   r"|(model|model-\d+-of-\d+|train_state)\.safetensors|model\.safetensors\.index\.json")  # fmt: skip


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling to fill, which takes the place of `target` when the block ends and vanishes if the block fails."""
    target = target.resolve()  # through a link, so that the link stays
    tmp, old = target.with_name(f".tmp-{target.name}"), target.with_name(f".old-{target.name}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    if target.is_dir():
        foreign = sorted(p.name for p in target.iterdir() if not _OURS.fullmatch(p.name))
        if foreign:  # replacing the folder would delete it
            raise ValueError(f"{target} holds {foreign[0]!r}, which is not part of a checkpoint; save to a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():  # killed between the two renames below
        os.rename(old, target)
    for leftover in (tmp, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    tmp.mkdir()
    try:
        yield tmp
        mode = tmp.stat().st_mode & 0o666  # safetensors makes its files private; a shared cluster wants the umask's mode
        for file in tmp.iterdir():
            os.chmod(file, mode)
            _sync(file)
        _sync(tmp)
        if target.exists():
            os.rename(target, old)  # from here to the next line `settled` finds the old one
        try:
            os.rename(tmp, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def settled(dir: Path) -> Path:
    """`dir`, or its predecessor where a save was killed between its two renames. Raises FileNotFoundError if there is neither."""
    if dir.is_dir():
        return dir
    old = dir.resolve().with_name(f".old-{dir.resolve().name}")
    if old.is_dir():
        return old
    raise FileNotFoundError(f"no checkpoint folder {dir}" + (": it is a file" if dir.exists() else ""))
