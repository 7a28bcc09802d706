"""The command line: exit status, one-line errors, and what needs no torch."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.cli import VERBS


def run(*args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "minillama", *args], capture_output=True, text=True, env=env, **kwargs)


def test_info_is_exact_and_needs_no_torch():
    """Guards against an import of torch on the way to `info`."""
    out = run("info", "llama2-70b", "--json")
    assert out.returncode == 0 and json.loads(out.stdout)["n_params"] == 68_976_648_192
    code = "import sys; from minillama.cli import main; main(['info','llama2-7b']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


@pytest.mark.parametrize("verb", [v for v in VERBS])
def test_help_exits_0(verb):
    """Guards against a verb whose help cannot be built."""
    out = run(verb, "--help")
    assert out.returncode == 0 and verb in out.stdout


def make(path: Path, name: str, data: bytes) -> str:
    (path / name).write_bytes(data)
    return str(path / name)


@pytest.mark.parametrize(
    "case",
    ["verb", "key", "value", "preset", "scale", "missing_tokenizer", "missing_text", "empty", "utf8", "no_run", "foreign_model", "yaml_key", "config_value"],
)
def test_wrong_requests_get_one_line_and_status_2(case, tmp_path):
    """Guards against tracebacks: every wrong request ends in one line that names the value."""
    from minillama.tokenizer import Tokenizer

    if case in ("empty", "utf8", "missing_text"):
        tok = str(Tokenizer.train(["some words to learn from"] * 5, 300, tmp_path / "t.model").path)
    small = ["--train.seq_len", "32", "--out", str(tmp_path / "o"), "--workers", "1"]
    args, word = {
        "verb": lambda: (["prtrain"], "prtrain"),
        "key": lambda: (["pretrain", "--train.lrr", "1"], "lrr"),
        "value": lambda: (["pretrain", "--train.steps", "many"], "many"),
        "preset": lambda: (["info", "llama3"], "llama3"),
        "scale": lambda: (["demo", "--scale", "huge", "--out", str(tmp_path / "r")], "huge"),
        "missing_tokenizer": lambda: (["pretrain", "--tokenizer", str(tmp_path / "no.model")], "no.model"),
        "missing_text": lambda: (["pretrain", *small, "--tokenizer", tok, "--data", str(tmp_path / "no.txt")], "no.txt"),
        "empty": lambda: (["pretrain", *small, "--tokenizer", tok, "--data", make(tmp_path, "e.txt", b"")], "e.txt"),
        "utf8": lambda: (["pretrain", *small, "--tokenizer", tok, "--data", make(tmp_path, "b.txt", b"good\n\nbad \xff\xfe")], "b.txt"),
        "no_run": lambda: (["report", "--run", str(tmp_path / "none")], "none"),
        "foreign_model": lambda: (["generate", "--model", str(tmp_path), "--prompt", "x"], str(tmp_path)),
        "yaml_key": lambda: (["sft", "--config", make(tmp_path, "c.yaml", b"epoch: 3\n")], "epoch"),
        "config_value": lambda: (["pretrain", "--train.lr", "-1"], "-1"),
    }[case]()
    out = run(*args)
    assert out.returncode == 2, out.stderr
    lines = out.stderr.strip().splitlines()
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in out.stderr, out.stderr


def test_a_full_disk_is_status_1_and_loses_nothing(tmp_path):
    """Guards against a corrupt tokenizer or checkpoint when writing fails: the file size limit stands in for the disk."""
    import resource

    from minillama.tokenizer import Tokenizer

    text = make(tmp_path, "t.txt", "\n\n".join(f"Line {i} of a book about {i * 3} boats." for i in range(80)).encode())
    tok = str(Tokenizer.train([Path(text).read_text()], 310, tmp_path / "t.model").path)
    args = ["pretrain", "--data", text, "--tokenizer", tok, "--preset", "ci", "--out", str(tmp_path / "o"), "--train.batch_size", "2", "--train.seq_len", "32",
            "--workers", "1", "--val_fraction", "0", "--train.device", "cpu"]  # fmt: skip
    assert run(*args, "--train.steps", "2").returncode == 0
    from minillama.checkpoint import load, load_state

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    out = run(*args, "--train.steps", "4", "--resume", "true", preexec_fn=limit)
    assert out.returncode == 1 and len(out.stderr.strip().splitlines()) == 1, out.stderr
    assert load_state(tmp_path / "o" / "checkpoint")[0] == 2
    load(tmp_path / "o")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("status", [0, 1])
def test_a_rank_of_a_job_ends_without_the_interpreters_clean_up(ranks, status):
    """Guards against gloo's threads, which abort a process (status -6) whose interpreter goes first: in a job of four, one end in three."""
    code = f"import atexit; from minillama import cli; atexit.register(print, 'cleaned up'); cli.main = lambda: print('done') or {status}; cli.run()"
    job = {"RANK": "0", "WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **job})
    assert (done.returncode, done.stdout) == (status, "done\ncleaned up\n" if ranks == 1 else "done\n"), done


def test_a_verb_keeps_the_memory_that_it_frees():
    """Arrays of 64 MB that come and go must not be faulted in anew each time: 16,384 pages each, where a verb would keep them."""
    code = (
        "import resource, sys, numpy as np; from minillama import cli\n"
        "def work():\n"
        "    for _ in range(2): np.ones(2**23)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4): np.ones(2**23)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "    return 0\n"
        "cli.main = work\n"
        "sys.argv[1] == 'run' and cli.run() or work()"
    )
    small = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}  # pages of 4 kB, whatever the system's setting
    faults = [int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, env=small).stdout) for how in ("run", "main")]
    if faults[1] < 4 * 2**14:
        pytest.skip(f"this system's C library keeps such memory by itself ({faults[1]} faults)")
    assert faults[0] < 100
