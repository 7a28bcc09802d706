"""Start a stage on many devices: with torchrun on this machine, or as a Slurm job that survives preemption.

    minillama launch --slurm --nodes 64 --gpus-per-node 8 --time 1-00:00:00 pretrain --config minillama/configs/llama2-70b/pretrain.yaml

The job script is sbatch.sh beside this file with its {{names}} filled in, written into the run folder for people to read and change. As a module
(`torchrun -m minillama.parallel.launch FOLDER GPUS`) this file is the health check that the script runs before the training. No torch except there.
"""
from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).with_name("sbatch.sh")


@dataclass
class Job:
    """A stage and what it runs on. Raises ValueError for counts below their least."""

    stage: str
    """Verb of the stage."""
    args: Sequence[str]
    """Its arguments."""
    out: Path
    """Its folder, where the checkpoints are."""
    nodes: int = 1
    per_node: int = 1
    """Ranks a node."""
    gpus: bool = True
    """Whether each rank has a GPU; without, ranks talk by gloo."""
    run: Path | None = None
    """Folder of script and logs; none is the stage's."""
    cpus: int = 8
    """CPU cores a rank."""
    time: str = "1-00:00:00"
    """Time limit in Slurm's notation; the job goes back to the queue before it is up, as often as it takes."""
    grace: int = 120
    """Seconds before the time limit at which the trainers save and stop."""
    failures: int = 3
    """New starts after failures without a new checkpoint in between."""
    options: Sequence[str] = ()
    """More of sbatch's options, for example --partition=a100."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("per_node", 1), ("cpus", 1), ("grace", 60), ("failures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        """The run folder, absolute."""
        return Path(os.path.abspath(self.run or self.out))


def torchrun(job: Job) -> list[str]:
    """The line that runs the job without Slurm: on every node, with its number for K and the first node's name for HOST."""
    where = ["--standalone"] if job.nodes == 1 else [f"--nnodes={job.nodes}", "--node-rank=K", "--master-addr=HOST", "--master-port=29500"]
    return ["torchrun", *where, f"--nproc-per-node={job.per_node}", "-m", "minillama", job.stage, *job.args]


def local(job: Job) -> None:
    """Become the torchrun that runs the job on this machine. Rank 0 is shown; the other ranks' output is in the run folder, logs/rank-K.log."""
    logs = job.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "torch.distributed.run", *torchrun(job)[1:]]
    at = line.index("-m", 3)
    rank = '[ "$RANK" = 0 ] || exec >>"$logs/rank-$RANK.log" 2>&1; exec "$python" "$@"'
    os.execve(sys.executable, [*line[:at], "--no-python", "bash", "-c", rank, "rank", *line[at:]], {**os.environ, "logs": str(logs), "python": sys.executable})


def script(job: Job, template: Path = TEMPLATE) -> str:
    """The job script. Raises ValueError for a name in the template that there is no value for."""
    options = [*job.options, *([f"--gpus-per-node={job.per_node}"] if job.gpus else [])]
    values = {
        "name": re.sub(r"[^\w.-]+", "-", f"{job.stage}-{job.folder.name}"), "nodes": job.nodes, "per_node": job.per_node, "cpus": job.cpus * job.per_node,
        "threads": job.cpus, "time": job.time, "here": os.getcwd(), "run": job.folder, "out": os.path.abspath(job.out), "grace": job.grace,
        "failures": job.failures, "gpus": job.per_node if job.gpus else 0, "python": sys.executable, "command": shlex.join([job.stage, *job.args]),
        "options": "\n".join(f"#SBATCH {o}" for o in options),
    }  # fmt: skip

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise ValueError(f"{template} has {match[0]}, which launch does not fill in; there are {', '.join(values)}")
        v = values[match[1]]
        return shlex.quote(str(v)) if isinstance(v, Path) or match[1] in ("here", "out", "python") else str(v)

    return re.sub(r"\{\{(\w+)\}\}", value, template.read_text(encoding="utf-8"))


def write(job: Job, template: Path = TEMPLATE) -> Path:
    """Write the job script into the run folder and return its path. Raises ValueError if that folder would not outlive the job."""
    scratch = Path(os.path.realpath(tempfile.gettempdir()))
    if Path(os.path.realpath(job.folder)).is_relative_to(scratch):
        raise ValueError(f"the run folder {job.folder} is in {scratch}, which is a node's own and does not outlive the job; choose one on a shared disk")
    text = script(job, template)
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    path = job.folder / "launch.sh"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def submit(path: Path) -> str:
    """Give a script to sbatch; return the job's number. Raises ValueError where there is no Slurm, or it refuses."""
    if not shutil.which("sbatch"):
        raise ValueError(f"there is no sbatch on this machine; {path} is written, submit it where there is, or use --local")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refuses {path}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def visible_gpus() -> int:
    """Number of NVIDIA GPUs here, 0 without its driver."""
    if not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def health(folder: str, gpus: int) -> str:
    """A rank's part of the check: its device is there, the run folder takes a file, and ones sum to the number of ranks. Returns what it found.

    Raises RuntimeError or OSError that names rank and node. `gpus` is how many a node has, 0 for none.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    me = f"rank {rank} on {os.uname().nodename}"
    found = torch.cuda.device_count()
    if found < gpus:
        raise RuntimeError(f"{me} sees {found} GPUs, not {gpus}; drain the node or leave it out with --sbatch=--exclude={os.uname().nodename}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    probe = Path(folder) / f".health-{rank}"
    probe.write_bytes(bytes(2**20))
    probe.unlink()
    ones = torch.ones(2**20, device=device)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=2))
    dist.all_reduce(ones)
    if not bool((ones == world).all()):
        raise RuntimeError(f"{me}: ones over {world} ranks sum to {ones.min().item():g} to {ones.max().item():g}; its device or network is broken")
    dist.destroy_process_group()
    return f"health: {world} ranks reach each other; {me} has {device}, and {shutil.disk_usage(folder).free / 2**30:,.0f} GiB are free at {folder}"


if __name__ == "__main__":
    try:
        print(health(sys.argv[1], int(sys.argv[2])), flush=True)
    except (RuntimeError, OSError) as e:
        sys.exit(f"minillama: rank {os.environ.get('RANK', 0)} on {os.uname().nodename}, health check: {' '.join(str(e).split())}")
