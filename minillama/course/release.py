"""exercises/ from solutions/: what nbgrader releases to students, without its database.

    minillama course release             # write exercises/NN_name/NN_name.ipynb for every unit of solutions/
    minillama course release --check     # exit 1 if that would change anything

The files are byte for byte those of `nbgrader generate_assignment`, so units can be released, collected and graded with stock nbgrader too.
"""
from __future__ import annotations

from pathlib import Path

from nbformat import NotebookNode
from nbgrader import preprocessors

from minillama.cli import Parser
from minillama.course import ROOT
from minillama.course.sync import read, text_of

STEPS = ("LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata", "ComputeChecksums", "ClearHiddenTests", "ClearMarkScheme", "ComputeChecksums",
         "CheckCellMetadata")  # fmt: skip


def released(nb: NotebookNode) -> NotebookNode:
    """The student's version of a solution: solutions, hidden tests and outputs removed. Changes `nb`.

    Raises an error of nbgrader's for cells that are not marked as it wants them (a region without an end, points missing, a grade_id twice).
    """
    for step in STEPS:
        nb, _ = getattr(preprocessors, step)().preprocess(nb, {})
    return nb


def stale(root: Path = ROOT) -> dict[Path, str | None]:
    """{exercise: its right text, or None for one whose solution is gone} of the files of exercises/ that are not what solutions/ gives."""
    found: dict[Path, str | None] = {path: None for path in sorted(root.glob("exercises/*/*.ipynb"))}
    for solution in sorted(root.glob("solutions/*/*.ipynb")):
        path = root / "exercises" / solution.relative_to(root / "solutions")
        try:
            found[path] = text_of(released(read(solution)))
        except Exception as e:  # nbgrader raises its own, RuntimeError and others
            raise ValueError(f"{solution} cannot be released: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from None
    return {path: text for path, text in found.items() if text is None or not path.is_file() or path.read_text(encoding="utf-8") != text}


def main(argv: list[str]) -> int:
    """Write exercises/ from solutions/."""
    p = Parser(prog="minillama course release", description=main.__doc__)
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 if exercises/ is not up to date")
    check, changes = p.parse_args(argv).check, stale()
    for path, text in changes.items():
        print(f"{path.relative_to(ROOT)}: " + (("stale; run `minillama course release`" if check else "written") if text else "its solution is gone"))
        if text and not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not check:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    return int(check and bool(changes))
