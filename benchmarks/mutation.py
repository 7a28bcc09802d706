"""Small changes of the alignment code, one at a time: which of them does no test notice? The changes are cosmic-ray's operators.

    pip install --target /tmp/cosmic cosmic-ray==8.7.0
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/cosmic python benchmarks/mutation.py [--sample 320] [--seed 0] [--slowest 4] [--killed runs/killed.txt]

cosmic-ray itself starts a process for every mutant, most of whose time is the import of torch; here a mutant is a forked child that has torch already and
runs only the tests that reach the changed statement (traced once), without those slower than `--slowest` seconds. A place (an operator, a number, a
condition; none in annotations) has up to 11 mutants, most of them alike in what they show: places are drawn, in proportion to each file's, and one mutant
at each. mutation.txt names survivors that were judged by hand, with their kind; they count as survivors and are not run again, nor is what `--killed`
names (for use while tests are added). Exit status 1 below 85%.

Kinds: equal (no input tells them apart), ranks (only a job of several processes does: tests/test_parallel.py), stream (another random stream, or a size
without a meaning), looks (progress bar and printed text), gap.
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

import pytest

FILES = ("ppo.py", "reward.py", "gatt.py", "safety.py")
TESTS = [f"tests/test_{x}.py" for x in ("ppo", "reward", "gatt", "safety", "alignment", "preferences", "rejection")]
HERE = Path(__file__).resolve().parent.parent


class Trace:
    """A pytest plugin that notes each passing test's seconds and the lines of FILES that it, or a fixture of its, reaches."""

    def __init__(self, root: Path):
        self.files, self.lines, self.tests, self.fixtures = {str(root / "minillama" / f): f for f in FILES}, set(), {}, {}

    def __call__(self, frame, event, arg):
        name = self.files.get(frame.f_code.co_filename)
        if name:
            self.lines.add(f"{name}:{frame.f_lineno}")
        return self if name else None

    def pytest_runtest_setup(self, item):
        self.lines, self.item, self.began = set(), item, time.monotonic()
        sys.settrace(self)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):  # one of a module runs once, for the first test that asks
        before, self.lines = self.lines, set()
        result = yield
        self.fixtures[fixturedef.baseid, fixturedef.argname], self.lines = self.lines, self.lines | before
        return result

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            module = report.nodeid.split("::")[0]
            lines = self.lines.union(*(self.fixtures.get((module, name), ()) for name in self.item.fixturenames))
            self.tests[report.nodeid] = (time.monotonic() - self.began, sorted(lines))


def pytest_child(args: list[str], log: Path, seconds: int, trace: Trace | None = None, notes: Path | None = None) -> int:
    """The exit status of pytest in a forked child; what does not end in time counts as failed."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    signal.alarm(seconds)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", *args], plugins=[trace] if trace else [])
    if notes:
        modules = [m for m in sys.modules if not m.startswith(("minillama", "test", "conftest", "tiny", "_"))]
        notes.write_text(json.dumps({"tests": trace.tests, "modules": modules}))
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


def reach(source: str, line: int) -> range:
    """The lines of the innermost statement at `line`, of a compound one its head; outside functions, what runs at import, all lines."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
    if not any(isinstance(n, ast.FunctionDef) for n in nodes):
        return range(1, 1 + source.count("\n"))
    node = min(nodes, key=lambda n: n.end_lineno - n.lineno)
    head = isinstance(getattr(node, "body", None), list) and not isinstance(node, ast.FunctionDef)
    return range(node.lineno, max(node.lineno, node.body[0].lineno - 1) + 1 if head else node.end_lineno + 1)


def main() -> int:
    p = argparse.ArgumentParser()
    for name, default in (("sample", 320), ("seed", 0), ("slowest", 4.0), ("killed", "")):
        p.add_argument(f"--{name}", type=type(default), default=default)
    a = p.parse_args()
    names, rng, survivors, score = HERE / (a.killed or "none"), Random(a.seed), [], {}
    known = set(names.read_text().splitlines()) if names.is_file() else set()
    judged = dict(x.split("  ", 1)[::-1] for x in (HERE / "benchmarks/mutation.txt").read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in ("minillama", "tests"):
            shutil.copytree(HERE / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "pyproject.toml", root)
        os.chdir(root)
        sys.path.insert(0, str(root))
        sys.dont_write_bytecode = True  # a mutant of the same size in the same second would be taken for the one before
        log, notes = root / "log", root / "notes.json"
        pytest_child([*TESTS, "-m", "not slow"], log, 3000, Trace(root), notes)
        noted = json.loads(notes.read_text())
        tests = {k: (s, set(lines)) for k, (s, lines) in noted["tests"].items() if s < a.slowest}
        for module in noted["modules"]:  # so that a child finds them imported
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        found = {f: places((root / "minillama" / f).read_text()) for f in FILES}
        n_places = sum(map(len, found.values()))
        print(log.read_text()[-300:], f"{len(tests)} tests of {len(noted['tests'])}; mutants at places: ",
              ", ".join(f"{f} {sum(map(len, x))} at {len(x)}" for f, x in found.items()), flush=True)  # fmt: skip
        for file, groups in found.items():
            path = root / "minillama" / file
            source, score[file] = path.read_text(), []
            for line, text in mutants(source, groups, round(a.sample * len(groups) / n_places), rng):
                diff = [x[2:].strip() for x in difflib.ndiff(source.splitlines(), text.splitlines()) if x[:2] in ("- ", "+ ")]
                name, at = f"{file}: " + "  ->  ".join(diff), {f"{file}:{n}" for n in reach(source, line)}
                mine = sorted((k for k, (_, hit) in tests.items() if hit & at), key=lambda k: tests[k][0])
                began, dead = time.monotonic(), name in known
                if mine and not dead and name not in judged:
                    path.write_text(text)
                    dead = pytest_child(["-x", *mine], log, 60 + 5 * int(sum(tests[k][0] for k in mine))) != 0
                    path.write_text(source)
                score[file].append(dead)
                kind = "killed" if dead else judged.get(name, "NEW")
                print(f"{kind:6} {time.monotonic() - began:5.1f} s {len(mine):3} tests  {line}  {name}", flush=True)
                survivors += [] if dead else [f"{kind:6}  {file}:{line}  {name}"]
                if dead and a.killed and name not in known:
                    with open(names, "a") as f:
                        f.write(f"{name}\n")
    killed, n, equal = sum(map(sum, score.values())), sum(map(len, score.values())), sum(x.startswith("equal") for x in survivors)
    print("\nsurvivors:", *sorted(survivors), "", *(f"{f}: {sum(x)}/{len(x)} killed" for f, x in score.items()), sep="\n")
    print(f"all: {killed}/{n} = {killed / n:.1%}; without the equal ones {killed / (n - equal):.1%}")
    return 0 if killed >= 0.85 * n else 1


if __name__ == "__main__":
    sys.exit(main())
