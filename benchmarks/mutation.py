"""Small changes of the alignment code, one at a time: which of them does no test notice? The changes are cosmic-ray's operators.

    pip install --target /tmp/cosmic cosmic-ray==8.7.0
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/cosmic python benchmarks/mutation.py [--sample 320] [--seed 0] [--slowest 4] [--killed runs/killed.txt]

cosmic-ray itself starts a process for every mutant, most of whose time is the import of torch; here a mutant is a forked child that has torch already, and
runs only the tests that reach the changed statement (traced once), without those slower than `--slowest` seconds. A place (an operator, a number, a
condition) has up to 11 mutants of a kind, alike in what they show: places are drawn, in proportion to each file's, and one mutant at each. What only
changes an annotation is not drawn. Mutants that `--killed` names are not run again: for use while tests are added. Exit status 1 below 85%.
"""
import argparse
import ast
import contextlib
import difflib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

FILES = ("ppo.py", "reward.py", "gatt.py", "safety.py")
TESTS = [f"tests/test_{x}.py" for x in ("ppo", "reward", "gatt", "safety", "alignment", "preferences", "rejection")]


class Trace:
    """A pytest plugin that notes each passing test's seconds and the lines of FILES that it reaches."""

    def __init__(self, root: Path):
        self.files, self.lines, self.tests = {str(root / "minillama" / f): f for f in FILES}, set(), {}

    def __call__(self, frame, event, arg):
        name = self.files.get(frame.f_code.co_filename)
        if name:
            self.lines.add(f"{name}:{frame.f_lineno}")
        return self if name else None

    def pytest_runtest_setup(self, item):
        self.lines, self.began = set(), time.monotonic()
        sys.settrace(self)

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            sys.settrace(None)
        elif report.when == "call" and report.passed:
            self.tests[report.nodeid] = (time.monotonic() - self.began, sorted(self.lines))


def pytest_child(args: list[str], log: Path, seconds: int, trace: Trace | None = None, notes: Path | None = None) -> int:
    """The exit status of pytest in a forked child; what does not end in time counts as failed."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    import pytest

    signal.alarm(seconds)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", *args], plugins=[trace] if trace else [])
    if notes:
        notes.write_text(json.dumps({"tests": trace.tests, "modules": [m for m in sys.modules if not m.startswith(("minillama", "test", "conftest", "tiny", "_"))]}))
    os._exit(int(status))


def places(source: str) -> list[list[tuple]]:
    """[(line, operator, its number among the operator's occurrences)] for every place that an operator can change, annotations left out."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    notes = [n for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns") if (n := getattr(node, name, None))]
    spans = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in notes]
    found, provider, nodes = {}, OperatorProvider(), list(ast_nodes(get_ast(source)))
    for name in sorted(set(provider) - {"VariableReplacer", "VariableInserter"}):  # those two want names of variables
        operator = provider[name]()
        for i, (start, _) in enumerate(position for node in nodes for position in operator.mutation_positions(node)):
            if not any(low <= start < high for low, high in spans):
                found.setdefault(start, []).append((start[0], operator, i))
    return [found[k] for k in sorted(found)]


def mutants(source: str, groups: list[list[tuple]], n: int, rng: Random) -> list[tuple[int, str]]:
    """(line, mutated source) at n places, in the order of the lines; a mutant that cannot be compiled, or is no change, is drawn again."""
    from cosmic_ray.mutating import mutate_code

    drawn = []
    for group in rng.sample(groups, len(groups)):
        for line, operator, i in rng.sample(group, len(group)):
            text = mutate_code(source, operator, i)
            with contextlib.suppress(SyntaxError):
                if ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)):
                    drawn.append((line, text))
                    break
        if len(drawn) == n:
            break
    return sorted(drawn)


def reach(source: str, line: int) -> range | None:
    """The lines of the innermost statement at `line`, of a compound one its head; None outside functions: what runs at import."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
    node = min(nodes, key=lambda n: n.end_lineno - n.lineno, default=None)
    if not any(isinstance(n, ast.FunctionDef) for n in nodes):
        return None
    head = isinstance(getattr(node, "body", None), list) and not isinstance(node, ast.FunctionDef)
    return range(node.lineno, max(node.lineno, node.body[0].lineno - 1) + 1 if head else node.end_lineno + 1)


def main() -> int:
    p = argparse.ArgumentParser()
    for name, default in (("sample", 320), ("seed", 0), ("slowest", 4.0), ("killed", "")):
        p.add_argument(f"--{name}", type=type(default), default=default)
    a = p.parse_args()
    here, rng, survivors, total, score = Path(__file__).resolve().parent.parent, Random(a.seed), [], 0, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in ("minillama", "tests"):
            shutil.copytree(here / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(here / "pyproject.toml", root)
        os.chdir(root)
        sys.path[:0] = [str(root)]
        log, notes = root / "log", root / "notes.json"
        pytest_child([*TESTS, "-m", "not slow"], log, 3000, Trace(root), notes)
        print(log.read_text()[-600:])
        noted = json.loads(notes.read_text())
        tests = {k: (s, set(lines)) for k, (s, lines) in noted["tests"].items() if s < a.slowest}
        print(f"{len(tests)} tests of {len(noted['tests'])}, {sum(s for s, _ in tests.values()):.0f} s traced", flush=True)
        sys.dont_write_bytecode = True
        for module in noted["modules"]:  # so that a child finds them imported
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        import torch

        torch.set_num_threads(1)
        found = {f: places((root / "minillama" / f).read_text()) for f in FILES}
        n_places = sum(map(len, found.values()))
        print({f: f"{sum(map(len, x))} mutants at {len(x)} places" for f, x in found.items()}, flush=True)
        known = set((here / a.killed).read_text().splitlines()) if a.killed and (here / a.killed).exists() else set()
        judged = {name: kind for kind, name in (x.split("  ", 1) for x in (here / "benchmarks/mutation.txt").read_text().splitlines())}
        for file, groups in found.items():
            path, killed = root / "minillama" / file, 0
            source = path.read_text()
            drawn = mutants(source, groups, min(len(groups), round(a.sample * len(groups) / n_places)), rng)
            for line, text in drawn:
                diff = [x for x in difflib.ndiff(source.splitlines(), text.splitlines()) if x[:2] in ("- ", "+ ")]
                name, lines = f"{file}:{line}: " + "  ->  ".join(x[2:].strip() for x in diff), reach(source, line)
                at = {f"{file}:{n}" for n in (lines or range(1, 1 + source.count("\n")))}
                mine = sorted((k for k, (_, hit) in tests.items() if hit & at), key=lambda k: tests[k][0])
                began, dead, kind = time.monotonic(), name in known, judged.get(name.replace(f":{line}:", ":", 1), "NEW")
                if not dead and kind == "NEW" and mine:
                    path.write_text(text)
                    dead = pytest_child(["-x", *mine], log, 60 + 5 * int(sum(tests[k][0] for k in mine))) != 0
                    path.write_text(source)
                killed += dead
                print(f"{time.strftime('%H:%M:%S')} {'killed' if dead else 'ALIVE '} {time.monotonic() - began:5.1f} s {len(mine):3} tests  {name}", flush=True)
                if dead and a.killed and name not in known:
                    with open(here / a.killed, "a") as f:
                        f.write(f"{name}\n")
                survivors += [] if dead else [f"{kind:6}  {name}  ({len(mine)} tests reach it)"]
            total, score[file] = total + killed, f"{killed}/{len(drawn)}"
    n, equal = total + len(survivors), sum(x.startswith("equal") for x in survivors)
    print("\n".join(["", "survivors:", *sorted(survivors), "", *(f"{f}: {s} killed" for f, s in score.items()), f"all: {total}/{n} = {total / n:.1%}, of those that differ {total / (n - equal):.1%}"]))
    return 0 if total >= 0.85 * n else 1


if __name__ == "__main__":
    sys.exit(main())
