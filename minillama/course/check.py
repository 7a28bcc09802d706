"""What keeps the course true: every rule that a notebook can break, looked for in its file, and in its run.

    minillama course check                       # the files: seconds
    minillama course check --run [-n 2]          # then every notebook in a fresh kernel: outputs as committed, figures labelled
    minillama course check notebooks/04_attention.ipynb

It prints one line a fault, with notebook, cell and name, and exits 1 if there is any.
"""
from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

from minillama.cli import Parser
from minillama.course import ROOT
from minillama.course.homes import homes
from minillama.course.release import stale
from minillama.course.sync import module_of, notebooks, read, refreshed, spans, synced

MAX_CELLS, MAX_LINES, MAX_IGNORED, TASKS, TIERS = 50, 25, 5, range(3, 7), ("warm-up", "core", "challenge")
IGNORED, UNCHECKED = "nbval-ignore-output", {"nbval-skip", "nbval-raises-exception", "raises-exception"}  # tags
UNSTABLE = {r"\b0x[0-9a-f]{6,}": "an address", r"(?<![\w.])/(tmp|home|work|root|Users)/": "a path of this machine", r"\d\.\d{9,}": "an unrounded number",
            r"\b\d{4}-\d\d-\d\d[ T]\d\d:": "a date"}  # fmt: skip
CLOCK = re.compile(r"\b(perf_counter|monotonic|process_time|time\.time|timeit)\b")
HIDDEN = re.compile(r"^[^\n]*### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS[^\n]*\n?", re.S | re.M)


def check(root: Path = ROOT) -> list[str]:
    """The faults of the files of notebooks/, solutions/ and exercises/, one line each. Runs nothing."""
    found, mirrors, start = [], {}, root / "notebooks" / "start.ipynb"
    index = start.read_text(encoding="utf-8") if start.is_file() else None
    for path in notebooks(root):
        where, chapter = path.relative_to(root), path.parent.name == "notebooks"
        try:
            nb = read(path)
        except ValueError as e:
            found.append(f"{where}: {e}")
            continue
        faults = _notebook(nb, path) + ([] if chapter else _unit(nb, path))
        if chapter and index and path != start and f"]({path.name})" not in index:
            faults.append("notebooks/start.ipynb does not link to it")
        for i, cell in enumerate(nb.cells):
            if chapter and cell.cell_type == "code" and module_of(cell.source) and _parses(cell.source):
                for name, *_ in spans(cell.source):
                    mirrors.setdefault((module_of(cell.source)[10:-3], name), []).append((where, i))
        if not faults and synced(nb, root) != path.read_text(encoding="utf-8"):
            faults = ["not laid out as `minillama course sync` writes it"]
        found += [f"{where}: {fault}" for fault in faults]
    found += _homes(root, mirrors)
    for page in sorted([*root.glob("*.md"), *root.glob("notebooks/*.md")]):
        found += [f"{page.relative_to(root)}: dead link {link}" for link in _dead_links(page.read_text(encoding="utf-8"), page.parent)]
    try:
        return found + [f"{path.relative_to(root)}: stale; run `minillama course release`" for path in stale(root)]
    except ValueError as e:
        return [*found, str(e)]


def _homes(root: Path, mirrors: dict[tuple[str, str], list[tuple[Path, int]]]) -> list[str]:
    """Definitions that their home does not mirror, or that are mirrored twice or elsewhere."""
    found, chapters = [], {path.name[:2]: path.relative_to(root) for path in root.glob("notebooks/[0-9][0-9]_*.ipynb")}
    for (module, name), number in homes(root / "minillama").items():
        label, shown = f"{name} of minillama/{module}.py", mirrors.get((module, name), [])
        at_home = [str(i) for where, i in shown if where.name[:2] == number]
        found += [f"{where}: cell {i}: {label} is mirrored here; its home is chapter {number}" for where, i in shown if where.name[:2] != number]
        if number in chapters and not at_home:
            found.append(f"{chapters[number]}: {label} has its home here and is not mirrored")
        elif len(at_home) > 1:
            found.append(f"{chapters[number]}: {label} is mirrored in cells {', '.join(at_home)}; once is enough")
    return found


def _notebook(nb, path: Path) -> list[str]:
    """Rules for any notebook."""
    code = [c for c in nb.cells if c.cell_type == "code"]
    found = [f"{len(nb.cells)} cells, at most {MAX_CELLS}"] if len(nb.cells) > MAX_CELLS else []
    ignored = [c.id for c in code if IGNORED in c.metadata.get("tags", [])]
    if len(ignored) > MAX_IGNORED:
        found.append(f"{len(ignored)} cells are tagged {IGNORED}, at most {MAX_IGNORED}: {', '.join(ignored)}")
    counts = [c.execution_count for c in code]
    if None not in counts and counts != list(range(1, len(counts) + 1)):
        found.append("cells were not executed once each, from top to bottom; restart and run all")
    for i, c in enumerate(nb.cells):
        faults = [f"dead link {link}" for link in _dead_links(c.source, path.parent)] if c.cell_type == "markdown" else []
        faults += _source(c) + _outputs(c) if c.cell_type == "code" else []
        found += [f"cell {i} ({c.id}): {fault}" for fault in faults]
    return found


def _dead_links(text: str, folder: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    links = [a or b for a, b in re.findall(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)", text)]
    return [t for t in links if not re.match(r"[a-z]+:|#", t) and not (folder / unquote(re.split(r"[#?]", t)[0])).exists()]


def _parses(source: str) -> bool:
    try:
        return bool(ast.parse(source))
    except SyntaxError:
        return False


def _source(cell) -> list[str]:
    """Faults of a code cell's text and tags."""
    source, tags = cell.source, set(cell.metadata.get("tags", []))
    if not source.strip() or not _parses(source):
        return ["not plain Python" if source.strip() else "empty"]
    found = [f"the tag {tag} keeps it from being checked" for tag in sorted(tags & UNCHECKED)]
    if module_of(source):
        found += _differs(source)
    else:
        n = len(HIDDEN.sub("", source).strip().splitlines())
        found += [f"{n} lines, at most {MAX_LINES}"] if n > MAX_LINES else []
        found += [f"commented-out code: {line}" for line in _commented_out(source)]
    if re.search(r"#\s*(NBVAL|PYTEST)_", source):
        found.append(f"an nbval comment; use the tag {IGNORED}, with an assert")
    if IGNORED in tags and not re.search(r"\bassert", source):
        found.append("its output is ignored and it asserts nothing")
    return found


def _differs(source: str) -> list[str]:
    """The first definition of a mirrored cell whose text is not the package's."""
    try:
        right = refreshed(source)
    except ValueError as e:
        return [str(e)]
    if right == source:
        return []
    old, new = source.splitlines(), right.splitlines()
    for (name, a, b), (_, c, d) in zip(spans(source), spans(right)):  # noqa: B905 (as many by construction)
        if old[a:b] != new[c:d]:
            return [f"{name} differs from {module_of(source)}; run `minillama course sync`"]
    return [f"holds more than definitions of {module_of(source)}; run `minillama course sync`"]


def _commented_out(source: str) -> list[str]:
    """Comments on lines of their own that are statements of Python."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ").strip()
        if token.type != tokenize.COMMENT or token.line.strip() != token.string.strip():
            continue
        whole = next((t for t in (text, f"{text} pass") if _parses(t)), "")  # `for x in y:` wants a body
        for node in ast.parse(whole).body[:1]:
            prose = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) or isinstance(node, ast.AnnAssign) and node.value is None
            found += [] if prose else [text]
    return found


def _outputs(cell) -> list[str]:
    """Faults of what a code cell shows."""
    found, text = ["not executed"] if cell.execution_count is None else [], ""
    for out in cell.outputs:
        if out.output_type == "error":
            found.append(f"shows an error: {out.ename}: {out.evalue[:100]}")
        elif out.output_type == "stream" and out.name == "stderr":
            found.append(f"writes to stderr: {out.text.strip()[:100]!r}")
        elif out.output_type == "stream":
            text += out.text
        else:
            text += "".join(str(v) for kind, v in out.data.items() if kind.startswith("text/"))
            found += [f"prints {kind}, which is not compared" for kind in out.data if "widget" in kind]
    if text and IGNORED not in cell.metadata.get("tags", []):
        found += [f"prints {what}, compared with every run: {m[0]!r}" for pattern, what in UNSTABLE.items() if (m := re.search(pattern, text))]
        found += [f"prints what it timed, compared with every run; tag it {IGNORED}"] if CLOCK.search(cell.source) else []
    return found


def _unit(nb, path: Path) -> list[str]:
    """Rules for a unit's solution."""
    meta = nb.metadata.get("minillama", {})
    found = [f"notebook metadata minillama.{key} is missing" for key in ("unit", "chapter", "withheld") if key not in meta]
    if len({path.stem, path.parent.name, meta.get("unit", path.stem)}) > 1:
        found.append(f"file, folder and minillama.unit must agree: {path.stem}, {path.parent.name}, {meta.get('unit')}")
    found += [f"minillama.withheld: {name} is not in the package" for name in meta.get("withheld", []) if not _exists(name)]
    found += [f"code cell {c.id} has no nbgrader metadata" for c in nb.cells if c.cell_type == "code" and "nbgrader" not in c.metadata]
    marked = {c.metadata.nbgrader.grade_id: c for c in nb.cells if "nbgrader" in c.metadata}
    graded = {name: c for name, c in marked.items() if c.metadata.nbgrader.get("grade")}
    if len(graded) not in TASKS:
        found.append(f"{len(graded)} graded tasks, wants {TASKS.start} to {TASKS.stop - 1}")
    texts = {}
    for name, c in graded.items():
        task, points = name.split("_")[0], c.metadata.nbgrader.get("points", 0)
        texts[task] = text = "\n".join(t.source for id, t in marked.items() if t.cell_type == "markdown" and id.startswith(f"{task}_")).lower()
        rules = {
            "a task's cells are named like t1_answer and t1_tests": name == f"{task}_tests" and f"{task}_answer" in marked,
            f"{task}_answer has no ### BEGIN SOLUTION": "### BEGIN SOLUTION" in getattr(marked.get(f"{task}_answer"), "source", ""),
            f"its text does not say '{points:g} points', as its metadata does": re.search(rf"\b{points:g}\s+points?\b", text),
            "its text has no minutes": re.search(r"\d\s+min", text),
            "its text has no hint": "hint" in text,
            f"its text names none of the tiers {', '.join(TIERS)}": any(tier in text for tier in TIERS),
            "no hidden tests": HIDDEN.search(c.source),
            "does not end in an assert, with and without its hidden part": all(_ends_in_assert(s) for s in (c.source, HIDDEN.sub("", c.source))),
        }
        found += [f"{name}: {fault}" for fault, kept in rules.items() if not kept]
    words = "\n".join(texts.values()).replace("-", " ")
    return found + [f"no task is marked {kind}" for kind in (*TIERS, "bug hunt") if kind.replace("-", " ") not in words]


def _exists(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(import_module(module), attribute)
    except (ImportError, ValueError):
        return False


def _ends_in_assert(source: str) -> bool:
    body = ast.parse(source).body if _parses(source) else []
    while body and hasattr(body[-1], "body"):
        body = body[-1].body
    last = body[-1] if body else None
    call = last.value.func if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) else None
    return isinstance(last, ast.Assert) or getattr(call, "attr", getattr(call, "id", "")).startswith("assert_")  # torch.testing.assert_close


def run(paths: list[Path], workers: int = 0, more: tuple[str, ...] = ()) -> int:
    """pytest --nbval on notebooks, each in a kernel of its own with one thread, figures watched. Returns its exit status."""
    env = {"OMP_NUM_THREADS": "1", **os.environ, "MPLBACKEND": "module://minillama.course.figures"}
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "-n", str(workers), "--dist", "loadscope"]  # a notebook's cells stay together
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--durations=10"]
    return subprocess.call([*command, *options, *more, *map(str, paths)], env=env)


def main(argv: list[str]) -> int:
    """Check notebooks, exercises and the links between them."""
    p = Parser(prog="minillama course check", description=main.__doc__)
    p.add_argument("notebooks", nargs="*", type=Path, help="report on these alone (default: all)")
    p.add_argument("--run", action="store_true", help="also run them and compare outputs")
    p.add_argument("-n", type=int, default=0, metavar="WORKERS", help="processes, a notebook each at a time (default: this one)")
    a = p.parse_args(argv)
    chosen = [path.resolve() for path in a.notebooks] or notebooks()
    missing = [str(path) for path in chosen if not (path.is_file() and path.is_relative_to(ROOT))]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no notebook of this course")
    names = {str(path.relative_to(ROOT)) for path in chosen}
    found = [line for line in check() if not a.notebooks or line.split(":")[0] in names]
    print("\n".join([*found, f"{len(found)} faults in the files of {len(chosen)} notebooks"]))
    return int(bool(found) or bool(a.run and run(chosen, a.n)))
