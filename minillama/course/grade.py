"""Grade exercises: `minillama course grade DIR --csv out.csv`. One submission or a folder of many, offline, trusting nothing that was handed in.

    minillama course grade exercises/04_attention                      # your own work
    minillama course grade submitted --csv grades.csv                  # submitted/<student>/<unit>/<unit>.ipynb, submitted/<student>.ipynb, ...

From a submission come the answer cells (by grade_id) and the student's helper cells that they name; everything else comes from solutions/<unit>/<unit>.ipynb.
Where there is no such file, the tests that the notebook shows are run ("visible tests only"). A task is the pair tN_answer, tN_tests: all of its points or
none. Each is graded in a process of its own (worker.py), with limits on time and memory. INSTRUCTORS.md says what this defends against.
"""
from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import symtable
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minillama.cli import Parser
from minillama.course import ROOT
from minillama.course.worker import BANNED, magic

BEGIN, END = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
MAX_BYTES, MAX_CELL = 50_000_000, 100_000  # of a notebook, of a cell
LOOKS = {"__globals__", "__code__", "__closure__", "__subclasses__", "__builtins__", "__defaults__", "__bases__", "__loader__", "__spec__",
         "_getframe", "tb_frame", "f_back", "f_globals", "f_locals", "gi_frame", "cell_contents", "settrace", "setprofile", "addaudithook", "modules",
         "meta_path", "excepthook", "_exit", "__torch_function__"}  # fmt: skip


@dataclass
class Task:
    id: str
    points: float
    tests: str
    before: list[str]  # locked code cells above the answer
    between: list[str]  # and between the answer and its tests
    names: list[str]  # what the answer cell defines
    hidden: list[tuple[int, int]]  # lines of the tests whose outcome is not explained


@dataclass
class Unit:
    name: str
    tasks: list[Task]
    withheld: list[str]
    allowed: list[str]  # names of minillama that the locked cells import
    locked: set[str]  # grade_ids that are not the student's
    given: set[str]  # what the locked cells define
    full: bool = True


@dataclass
class Result:
    task: str
    points: float
    max: float
    feedback: str
    kind: str = "ok"

    def line(self) -> str:
        return f"{'OK' if self.kind == 'ok' else '--'}  {self.points:g}/{self.max:g} {self.task}" + (f": {self.feedback}" if self.kind != "ok" else "")


@dataclass
class Graded:
    student: str
    unit: str
    notebook: str
    tests: str = "all"
    tasks: list[Result] = field(default_factory=list)
    error: str = ""

    points = property(lambda self: sum(t.points for t in self.tasks))
    max = property(lambda self: sum(t.max for t in self.tasks))


# ---------------------------------------------------------------- notebooks
def read(path: Path) -> dict:
    """The notebook at path. ValueError if it is none."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES // 10**6} MB")
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
        for c in nb["cells"]:
            c["source"] = "".join(c["source"])
            flags = c.setdefault("metadata", {}).setdefault("nbgrader", {})
            flags["grade_id"], c["cell_type"] = str(flags.get("grade_id") or ""), str(c["cell_type"])
            flags["points"] = float(flags.get("points") or 0)
        nb["metadata"].setdefault("minillama", {}).setdefault("unit", "")
        return nb
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is not a notebook") from None


def read_unit(path: Path, visible: bool = False) -> Unit:
    """The unit that a notebook (an instructor's, or a released one) defines. ValueError if it defines none."""
    nb = read(path)
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    flags = [c["metadata"]["nbgrader"] for c in code]
    ids = [f["grade_id"] for f in flags]
    answers = {i: names(code[n]["source"]) for n, i in enumerate(ids) if flags[n].get("solution")}
    given = [n for n, f in enumerate(flags) if f.get("locked") and not f.get("grade")]
    shared = set().union(*(names(code[n]["source"]) for n in given))
    tasks = []
    for n, tests in enumerate(ids):
        if not flags[n].get("grade"):
            continue
        task = tests.removesuffix("_tests")
        if f"{task}_answer" not in answers:
            raise ValueError(f"{path}: the test cell {tests!r} has no answer cell {task}_answer")
        at = ids.index(f"{task}_answer")
        foreign = set().union(*(v for k, v in answers.items() if k != ids[at])) - shared - answers[ids[at]]  # a cell that shows another task's answer at work
        mine = [k for k in given if not loads(code[k]["source"]) & foreign]
        lines = code[n]["source"].split("\n")
        marks = [(i + 1, BEGIN in line) for i, line in enumerate(lines) if BEGIN in line or END in line]
        hidden = [(a, b) for (a, begins), (b, _) in zip(marks, marks[1:], strict=False) if begins]
        if visible:
            lines = [line for i, line in enumerate(lines, 1) if not any(a <= i <= b for a, b in hidden)]
        source = {k: code[k]["source"] for k in mine}
        before, between = [s for k, s in source.items() if k < at], [s for k, s in source.items() if at < k < n]
        tasks.append(Task(task, flags[n]["points"], "\n".join(lines), before, between, sorted(answers[ids[at]]), [] if visible else hidden))
    if not tasks:
        raise ValueError(f"{path} has no graded cells")
    meta = nb["metadata"]["minillama"]
    allowed = sorted(set().union(*(ours(parse(c["source"])) for c, f in zip(code, flags, strict=True) if f.get("locked"))))
    locked = {i for i, f in zip(ids, flags, strict=True) if i and not f.get("solution")}
    return Unit(meta["unit"] or path.stem, tasks, list(meta.get("withheld", [])), allowed, locked, shared, not visible)


def parse(source: str) -> ast.Module:
    """The cell's tree; an empty one for what is not Python."""
    try:
        return ast.parse(magic(source) if len(source) <= MAX_CELL else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def names(source: str) -> set[str]:
    """What a cell binds at its top level."""
    found, stack = set(), list(parse(source).body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            stack += ast.iter_child_nodes(node)
    return found


def loads(source: str) -> set[str]:
    """The global names that a cell uses, in its functions, too."""
    if not parse(source).body:
        return set()
    found, stack = set(), [symtable.symtable(magic(source), "<cell>", "exec")]
    while stack:
        table = stack.pop()
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table.get_type() == "module" or s.is_global())}
        stack += table.get_children()
    return found


def ours(tree: ast.Module) -> set[str]:
    """Names of minillama that a cell imports: 'minillama.model', 'minillama.model.RMSNorm'."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names if a.name.split(".")[0] == "minillama"}
        elif isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "minillama":
            found |= {f"{n.module}.{a.name}" for a in n.names}
    return found


def refuse(source: str, allowed: list[str]) -> str:
    """Why an answer is not run at all, or ''. The friendly layer: what it misses meets the worker's."""
    if len(source) > MAX_CELL:
        return f"the answer cell has more than {MAX_CELL} characters"
    try:
        tree = ast.parse(magic(source))
    except SyntaxError as e:
        return f"the answer cell is not Python: {e.msg} (line {e.lineno})"
    except (ValueError, RecursionError, MemoryError) as e:
        return f"the answer cell is not Python: {type(e).__name__}"
    theirs = sorted(ours(tree) - set(allowed))
    if theirs:
        return f"the answer imports {theirs[0]}; write it yourself, with what the notebook's own cells import"
    for n in ast.walk(tree):
        modules = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) else []
        for m in modules:
            if m.split(".")[0] in BANNED:
                return f"an answer may not import {m} (line {n.lineno})"
        word = n.attr if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else ""
        if word in LOOKS or (isinstance(n, ast.Name) and word in ("eval", "exec", "compile", "__import__", "globals")):
            if not (isinstance(n, ast.Attribute) and word == "modules" and not (isinstance(n.value, ast.Name) and n.value.id == "sys")):
                return f"an answer may not use {word} (line {n.lineno})"
    return ""


# ---------------------------------------------------------------- grading
class Server:
    """The worker process: it loads torch and the package once, and forks for each task."""

    def __init__(self, seconds: float, gigabytes: float):
        if not hasattr(os, "fork"):
            raise ValueError("course grade needs fork: run it on Linux or macOS (on Windows, in WSL)")
        self.seconds, self.gigabytes, self.process = seconds, gigabytes, None
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"
        self.readable = [str(p) for p in (ROOT / "runs", cache, os.environ.get("MINILLAMA_RUN", "")) if str(p)]

    def start(self) -> None:
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "LC_ALL", "XDG_CACHE_HOME", "MINILLAMA_RUN", "LD_LIBRARY_PATH", "TMPDIR")}
        self.folder = tempfile.TemporaryDirectory(prefix="grade-")
        env = {**keep, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg",
               "MPLCONFIGDIR": self.folder.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
               "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
        command = [sys.executable, "-c", "from minillama.course.worker import serve; serve()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=self.folder.name)

    def __call__(self, job: dict) -> dict:
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps({**job, "seconds": self.seconds, "gigabytes": self.gigabytes, "readable": self.readable}) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError("the grader's worker process ended; its message is above") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.folder.cleanup()


def grade(nb: dict, unit: Unit, server: Server) -> list[Result]:
    """Grade one notebook's answers, task by task."""
    cells, first = [], {}
    for c in nb["cells"]:
        i = c["metadata"]["nbgrader"]["grade_id"]
        if c["cell_type"] == "code" and i not in unit.locked and i not in first:
            first.update({i: len(cells)} if i else {})
            cells.append((i, c["source"]))
    results = []
    for t in unit.tasks:
        at = first.get(f"{t.id}_answer")
        if at is None:
            results.append(Result(t.id, 0, t.points, "the answer cell is missing", "missing"))
            continue
        answer, need = [cells[at][1]], loads(cells[at][1]) - unit.given
        for _, source in reversed(cells[:at]):  # the student's helpers, as far as the answer names them
            if names(source) & need:
                answer.insert(0, source)
                need |= loads(source) - unit.given
        why = next(filter(None, (refuse(s, unit.allowed) for s in answer)), "")
        if why:
            results.append(Result(t.id, 0, t.points, tidy(why), "refused"))
            continue
        job = {**asdict(t), "answer": answer, "withheld": unit.withheld, "allowed": unit.allowed}
        v = server(job)
        kind, why = v["kind"], tidy(v["why"])
        if kind == "hidden":
            why = "a hidden test fails: look at edge cases, other shapes and other sizes"
        elif kind == "tampered":
            why = f"not graded as an answer: {why}"
        results.append(Result(t.id, t.points if kind == "ok" else 0, t.points, why, kind))
    return results


def tidy(text: str) -> str:
    """One printable line."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= 300 else text[:297] + "..."


def collect(where: Path, solutions: Path) -> list[tuple[str, str, Path]]:
    """(student, unit, notebook) of every submission in a folder. ValueError if there is none."""
    if not where.exists():
        raise ValueError(f"{where} does not exist")
    units = {p.parent.name for p in solutions.glob("*/*.ipynb") if p.stem == p.parent.name}
    paths = [where] if where.is_file() else sorted(p for p in where.rglob("*.ipynb") if not any(part.startswith(".") for part in p.relative_to(where).parts))
    found = []
    for p in paths:
        unit = p.stem if p.stem in units else ""
        if not unit:
            try:
                nb = read(p)
                graded = any(c["metadata"]["nbgrader"].get("grade") for c in nb["cells"])
                unit = str(nb["metadata"]["minillama"]["unit"]) or (p.parent.name if p.parent.name in units else p.stem if graded else "")
            except ValueError:
                unit = p.parent.name if p.parent.name in units else ""
        unit = unit if re.fullmatch(r"[\w-]+", unit) else ""
        top = where if where.is_dir() else where.parent
        folders = [*p.relative_to(top).with_suffix("").parts, *reversed(top.resolve().parts)]
        found.append((next(s for s in folders if s != unit), unit, p))
    if not any(unit for _, unit, _ in found):
        raise ValueError(f"{where}: no notebook of a unit; there are {', '.join(sorted(units)) or 'no units in ' + str(solutions)}")
    return found


def main(argv: list[str]) -> int:
    """Grade a submission, or a folder of them."""
    p = Parser(prog="minillama course grade", description=main.__doc__)
    p.add_argument("dir", type=Path, help="a notebook, a folder with one, or a folder of submissions")
    p.add_argument("--csv", type=Path, help="write a row per student, unit and task: student, unit, task, points, max, feedback")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--solutions", type=Path, default=ROOT / "solutions", help="the instructor's notebooks (default: this checkout's)")
    p.add_argument("--visible", action="store_true", help="run the visible tests only")
    p.add_argument("--seconds", type=float, default=60, help="limit of a task in seconds, its locked cells included (default 60)")
    p.add_argument("--memory", type=float, default=4, help="limit of a task in GB above the loaded libraries (default 4)")
    a = p.parse_args(argv)
    if a.csv and not a.csv.parent.is_dir():
        raise ValueError(f"--csv {a.csv}: there is no folder {a.csv.parent}")
    submissions = collect(a.dir, a.solutions)
    own = not any(a.solutions.glob("*/*.ipynb"))  # a student's checkout: only there does a notebook bring its own tests
    units: dict[str, Unit] = {}
    graded = []
    with Server(a.seconds, a.memory) as server:
        for student, name, path in submissions:
            g = Graded(tidy(student), name, tidy(str(path)))
            graded.append(g)
            try:
                if not name:
                    raise ValueError("no unit: neither its name nor its metadata names one")
                if path.is_symlink() or not path.resolve().is_relative_to((a.dir if a.dir.is_dir() else a.dir.parent).resolve()):
                    raise ValueError("it is a link; hand in the file itself")
                source = a.solutions / name / f"{name}.ipynb"
                if not own and not source.is_file():
                    raise ValueError(f"there is no unit {name} in {a.solutions}")
                if own or name not in units:
                    units[name] = read_unit(path, True) if own else read_unit(source, a.visible)
                g.tests = "all" if units[name].full else "visible"
                g.tasks = grade(read(path), units[name], server)
                broken = [t for t in g.tasks if t.kind == "unit"]
                g.error = f"{broken[0].task}: {broken[0].feedback}" if broken else ""
            except ValueError as e:
                g.error = tidy(str(e))
            if not a.json:
                show(g)
    if a.json:
        print(json.dumps([{**asdict(g), "points": g.points, "max": g.max} for g in graded], indent=1))
    if a.csv:
        write(graded, a.csv)
    return 1 if any(g.error for g in graded) else 0


def show(g: Graded) -> None:
    if g.error:
        print(f"minillama: {g.notebook} could not be graded: {g.error}", file=sys.stderr, flush=True)
    else:
        print(f"{g.student} {g.unit}: {g.points:g} of {g.max:g} points" + (" (visible tests only)" if g.tests == "visible" else ""))
        print("\n".join(f"    {t.line()}" for t in g.tasks), flush=True)


def write(graded: list[Graded], path: Path) -> None:
    """A row per task; one with an empty task for what could not be graded. Text that a spreadsheet would run as a formula gets a quote before it."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["student", "unit", "task", "points", "max", "feedback"])
        for g in graded:
            rows = [[g.student, g.unit, "", "", "", f"could not be graded: {g.error}"]] if g.error else [
                [g.student, g.unit, t.task, f"{t.points:g}", f"{t.max:g}", t.feedback or "OK"] for t in g.tasks]  # fmt: skip
            out.writerows([f"'{v}" if v[:1] in ("=", "+", "-", "@", "\t", "\r") else v for v in row] for row in rows)
