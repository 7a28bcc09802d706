"""Mirrored cells: a chapter shows a definition as the package has it, in a cell whose first line names the module.

    minillama course sync                # rewrite every mirrored cell of notebooks/ and solutions/ from the package
    minillama course sync notebooks/04_attention.ipynb

Such a cell holds whole definitions and nothing else. The package is the source: edit there, then sync, then run the notebook again. Sync also
tidies what an editor leaves behind (timings, the version of Python), so that a notebook's file changes only when its content does.
"""
from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from minillama.cli import Parser
from minillama.course import ROOT


def notebooks(root: Path = ROOT) -> list[Path]:
    """Chapters, then units in nbgrader's source form."""
    return [*sorted(root.glob("notebooks/*.ipynb")), *sorted(root.glob("solutions/*/*.ipynb"))]


def read(path: Path) -> NotebookNode:
    """A notebook. Raises ValueError if it is none."""
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a notebook ({str(e).splitlines()[0][:120]})") from None
    return nb


def text_of(nb: NotebookNode) -> str:
    """The file of a notebook, as nbformat lays it out."""
    return nbformat.writes(nb) + "\n"


def module_of(source: str) -> str | None:
    """"minillama/model.py" for a mirrored cell of that module, None for any other cell."""
    m = re.match(r"# (minillama/[\w/]+\.py)[ \t]*(\n|$)", source)
    return m[1] if m else None


def spans(source: str) -> list[tuple[str, int, int]]:
    """(name, first line, line after the last) of what a module or a mirrored cell defines, with decorators; the name is "" for other statements.

    Raises ValueError for source that does not parse.
    """
    found = []
    try:
        body = ast.parse(source).body
    except SyntaxError as e:
        raise ValueError(f"not valid Python (line {e.lineno})") from None
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.append((getattr(node, "name", None) or getattr(target, "id", ""), first - 1, node.end_lineno))
    return found


def definitions(source: str) -> dict[str, str]:
    """{name: text} of the top-level classes, functions and constants of a module."""
    lines = source.splitlines()
    return {name: "\n".join(lines[a:b]) for name, a, b in spans(source) if name}


def refreshed(source: str, root: Path = ROOT) -> str:
    """A mirrored cell with each of its definitions as the package has it now. Raises ValueError, naming the definition, where there is none."""
    module = module_of(source)
    if not (root / module).is_file():
        raise ValueError(f"{module} is not in the package")
    package, lines, out, done = definitions((root / module).read_text(encoding="utf-8")), source.splitlines(), [], 0
    for name, a, b in spans(source):
        if name not in package:
            raise ValueError(f"{name or 'line ' + str(a + 1)} is not a definition of {module}; a mirrored cell holds nothing else")
        out += [*(line for i, line in enumerate(lines[done:a], done) if not i or not line), package[name]]  # comments between are not the package's
        done = b
    if not done:
        raise ValueError(f"holds no definition of {module}")
    return "\n".join(out)


def synced(nb: NotebookNode, root: Path = ROOT) -> str:
    """The file that a notebook should be. Changes `nb`. Raises ValueError, naming the cell, for a mirrored cell that cannot be written."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and module_of(cell.source):
            try:
                cell.source = refreshed(cell.source, root)
            except ValueError as e:
                raise ValueError(f"cell {i}: {e}") from None
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in ("tags", "nbgrader")})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    ours = {k: v for k, v in nb.metadata.items() if k == "minillama"}
    nb.metadata = nbformat.from_dict({**ours, "kernelspec": kernel, "language_info": {"name": "python"}})
    return text_of(nb)


def main(argv: list[str]) -> int:
    """Rewrite mirrored cells; print the notebooks that changed."""
    p = Parser(prog="minillama course sync", description=main.__doc__)
    p.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter and solution")
    for path in p.parse_args(argv).notebooks or notebooks():
        try:
            text = synced(read(path))
        except ValueError as e:
            raise ValueError(f"{path}, {e}") from None
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"{path}: written")
    return 0
