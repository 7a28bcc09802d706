"""Files for checkpoint.py: tensors and JSON in files of every kind, with errors that name file and fix, and folders written whole or not at all.

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
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]


class Tensors(Mapping[str, Tensor]):
    """Tensors on disk by name. Their shapes are known; each is read, whole and to the CPU, when it is asked for, and not kept."""

    def __init__(self, shapes: dict[str, Shape], read: Callable[[str], Tensor], fill: Callable[[dict[str, Tensor]], None] | None = None):
        self.shapes, self._read, self._fill = shapes, read, fill

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def under(self, prefix: str) -> Tensors:
        """Those whose names begin with `prefix`, without it."""
        shapes = {n.removeprefix(prefix): s for n, s in self.shapes.items() if n.startswith(prefix)}
        return Tensors(shapes, lambda n: self._read(prefix + n), lambda targets: self.fill({prefix + n: t for n, t in targets.items()}))

    @torch.no_grad()
    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy into tensors of these names and shapes, which keep their device and dtype and may be split over ranks. No rank holds more than one
        whole tensor, and where the files are split too, a rank reads little more than its own parts. Nobody waits for another rank."""
        if self._fill:
            self._fill(targets)
            return
        for name, target in targets.items():
            tensor = self[name]
            if target.is_floating_point() and not tensor.is_floating_point():
                raise ValueError(f"{name} is stored as {tensor.dtype}: quantized weights are not supported")
            if hasattr(target, "full_tensor"):  # a DTensor
                from torch.distributed.tensor.experimental import implicit_replication

                with implicit_replication():  # every rank has read the same
                    target.copy_(tensor.to(target.device))
            else:
                target.copy_(tensor)


def open_safetensors(files: list[Path]) -> Tensors:
    """The tensors of safetensors files. Raises ValueError where one is missing, damaged, or repeats a tensor of another."""
    where: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is incomplete; copy it again")
        try:
            with safe_open(file, "pt") as f:
                found = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        except SafetensorError as e:
            fix = "copy it again, or delete its folder to go on from an older one"
            raise ValueError(f"{file} is truncated or not a safetensors file ({e}); {fix}") from None
        for name, shape in found.items():
            if name in shapes:
                raise ValueError(f"{file} repeats the tensor {name} of shape {list(shape)} of another file in the folder")
            shapes[name], where[name] = shape, file

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as f:  # opened for each tensor: the file is mapped, and what was read of it would stay in memory
            return f.get_tensor(name).clone()  # what get_tensor gives changes when the file does

    return Tensors(shapes, read)


class _Metadata(pickle.Unpickler):
    """Reads the list of who wrote what that torch.distributed.checkpoint leaves as .metadata: a pickle, the only one in our formats. Nothing but the
    classes of such a list is allowed in it, so that a file from elsewhere cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        dcp = "torch.distributed.checkpoint"
        known = (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"), (f"{dcp}.filesystem", "_StorageInfo"))
        if known or module in ("torch", f"{dcp}.metadata", "pathlib", "pathlib._local") and "." not in name:
            found = super().find_class(module, name)
            if known or isinstance(found, torch.dtype) or module != "torch" and isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def open_distributed(dir: Path) -> Tensors:
    """The tensors that the ranks of a job wrote to `dir` with torch.distributed.checkpoint. Raises ValueError if a file is missing or damaged."""
    import torch.distributed.checkpoint as dcp  # a second or more to import
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_, **__) -> Any:  # once, not for every tensor
            return metadata

    try:
        with open(dir / ".metadata", "rb") as f:
            metadata = _Metadata(f).load()
        metadata.storage_meta.load_id = None
        tensors = {n: t for n, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        ends: dict[str, int] = {}
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    except OSError:
        raise
    except Exception as e:  # an unpickler may raise anything
        raise ValueError(f"{dir / '.metadata'} is truncated or not of a checkpoint ({' '.join(str(e).split())}); copy it again") from None
    for name, end in ends.items():
        if not (dir / name).is_file() or (dir / name).stat().st_size < end:
            raise ValueError(f"{dir / name} is missing or truncated; copy it again, or delete {dir} to go on from an older one")

    def fill(targets: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no process group is asked is what we want: every rank reads for itself
            try:
                dcp.load(dict(targets), storage_reader=Reader(dir), planner=dcp.DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
            except CheckpointException as e:
                reason = " ".join(str(next(iter(e.failures.values()))[0]).split())[:200]
                raise ValueError(f"{dir} cannot be read ({reason}); copy it again, or delete it to go on from an older one") from None

    def read(name: str) -> Tensor:
        whole = torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)
        fill({name: whole})
        return whole

    return Tensors({n: tuple(t.size) for n, t in tensors.items()}, read, fill)


def has_weights(dir: Path) -> bool:
    """Whether our own format's tensors are in a folder, in one file, in several, or as the ranks of a job wrote them."""
    return any((dir / name).is_file() for name in (".metadata", "model.safetensors", "model.safetensors.index.json"))


def open_weights(dir: Path) -> tuple[Tensors, Path]:
    """The weights in a folder of our own format, and the path to name in an error."""
    if (dir / ".metadata").is_file():
        return open_distributed(dir).under("model/"), dir
    index = (dir / "model.safetensors.index.json").is_file()
    return open_safetensors(weight_files(dir) if index else [dir / "model.safetensors"]), dir if index else dir / "model.safetensors"


def weight_files(dir: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one. Raises ValueError if there are none."""
    index = dir / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        return [dir / name for name in sorted(set(weight_map.values()))]
    files = [dir / "model.safetensors"] if (dir / "model.safetensors").is_file() else sorted(dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{dir} has no *.safetensors; weights in *.bin are not read: convert them with transformers' save_pretrained")
    return files


def check_shapes(found: dict[str, Shape], expected: dict[str, Shape], where: Path) -> None:
    """Raises ValueError for a tensor that is missing, of another shape, or not expected."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where} lacks the tensor {name} of shape {list(shape)}: it is incomplete, or of another architecture")
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}: weights and config do not fit")
    extra = sorted(set(found) - set(expected))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"{where} has a tensor {extra[0]} of shape {list(found[extra[0]])}{more} that this model does not have")


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
                   r"|(model|model-\d+-of-\d+|train_state)\.safetensors|model\.safetensors\.index\.json|\.metadata|__\d+_\d+\.distcp")  # fmt: skip


def hidden(target: Path) -> Path:
    """Where `new_folder` fills what becomes `target`."""
    target = target.resolve()
    return target.with_name(f".tmp-{target.name}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling to fill, which takes the place of `target` when the block ends and vanishes if the block fails."""
    target = target.resolve()  # through a link, so that the link stays
    tmp, old = hidden(target), target.with_name(f".old-{target.name}")
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


def steps_of(dir: Path, complete: Callable[[Path], bool]) -> list[tuple[int, Path]]:
    """(step, folder) of the complete step folders in `dir`, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(dir.iterdir(), reverse=True) if dir.is_dir() else ():  # "step-" sorts after ".old-step-", so is preferred
        match = re.fullmatch(r"(?:\.old-)?step-(\d{8,})", path.name)
        if match and complete(path):
            found.setdefault(int(match[1]), path)
    return sorted(found.items())


def prune_steps(dir: Path, step: int, keep: int) -> None:
    """Remove the step folders before `step` but the newest `keep`, and what killed saves left."""
    older = [path for s, path in steps_of(dir, lambda _: True) if s < step]
    killed = [p for p in dir.iterdir() if p.name.startswith((".tmp-step-", ".old-step-"))]
    for path in older[: max(0, len(older) - keep)] + killed:
        shutil.rmtree(path, ignore_errors=True)
