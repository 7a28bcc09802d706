"""The course's own checks, each seen to go red: mirrored cells, homes, outputs, figures, links, limits, units, releases, stock nbgrader."""
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillama import course
from minillama.course import ROOT, check, release, sync
from minillama.course.homes import MODULES, TOOLS, homes, module_name

ROPE = sync.definitions((ROOT / "minillama/model.py").read_text())
IMPORTS = "import torch\nfrom torch import Tensor"
CHAPTER = [
    "# 03 Rope\n\nBack to [the start](start.ipynb).",
    (IMPORTS, ""),
    ("# minillama/model.py\n" + ROPE["rope_table"], ""),
    ("# minillama/model.py\n" + ROPE["apply_rope"], ""),
    ("print(torch.arange(3).tolist())", "[0, 1, 2]\n"),
    ("x = torch.rand(3)\nassert x.shape == (3,)\nprint(x)", "tensor([0.1, 0.2, 0.3])\n", "nbval-ignore-output"),
    ("import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.title('it rises')\nplt.xlabel('steps')\nplt.ylabel('loss')\nplt.show()", "FIGURE"),
]


def notebook(cells: list, meta: dict | None = None, prefix: str = "c") -> nbformat.NotebookNode:
    """Cells are markdown texts or (source, printed, tag or nbgrader metadata)."""
    nb, count = new_notebook(), 0
    for i, cell in enumerate(cells):
        if isinstance(cell, str):
            nb.cells.append(new_markdown_cell(cell, id=f"{prefix}{i:02d}"))
            continue
        source, printed, *more = cell
        tag = more[0] if more else None
        if source is None:
            new = new_markdown_cell(printed, id=f"{prefix}{i:02d}")
        else:
            count += 1
            outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
            if printed == "FIGURE":
                outputs = [new_output("display_data", {"text/plain": "<Figure size 640x480 with 1 Axes>", "image/png": "aGk="})]
            new = new_code_cell(source, id=f"{prefix}{i:02d}", execution_count=count, outputs=outputs)
        if tag:
            new.metadata.update({"nbgrader": tag} if isinstance(tag, dict) else {"tags": [tag]})
        nb.cells.append(new)
    nb.metadata.update({"minillama": meta} if meta else {})
    sync.synced(nb)
    return nb


def save(nb: nbformat.NotebookNode, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sync.text_of(nb))
    return path


def mark(name: str, **flags) -> dict:
    return {"schema_version": 3, "grade": False, "solution": False, "locked": True, "grade_id": name, **flags}


def task(t: str, tier: str, points: int, factor: int, more: str = "") -> list:
    text = f"## {tier}: times {factor} ({points} points, 5 minutes)\n{more}\nHint: multiply."
    answer = f"def f{t}(x):\n    ### BEGIN SOLUTION\n    return {factor} * x\n    ### END SOLUTION"
    tests = f"assert f{t}(2) == {2 * factor}, 'twice the factor'\n### BEGIN HIDDEN TESTS\nassert f{t}(5) == {5 * factor}\n### END HIDDEN TESTS"
    return [(None, text, mark(f"{t}_text")), (answer, "", mark(f"{t}_answer", solution=True, locked=False)),
            (tests, "", mark(f"{t}_tests", grade=True, points=points))]  # fmt: skip


def unit() -> nbformat.NotebookNode:
    cells = [("import math", "", mark("setup")), *task("t1", "Warm-up", 1, 3), *task("t2", "Core", 2, 4, "A bug hunt."), *task("t3", "Challenge", 3, 5)]
    return notebook(cells, {"unit": "03_rope", "chapter": "03_rope", "withheld": ["minillama.model.apply_rope"]})


@pytest.fixture
def root(tmp_path):
    """A course of one chapter, one unit and its exercise, beside the real package."""
    (tmp_path / "minillama").symlink_to(ROOT / "minillama")
    save(notebook(["# Start\n\n[Rope](03_rope.ipynb)"]), tmp_path / "notebooks/start.ipynb")
    save(notebook(CHAPTER), tmp_path / "notebooks/03_rope.ipynb")
    save(unit(), tmp_path / "solutions/03_rope/03_rope.ipynb")
    save(release.released(unit()), tmp_path / "exercises/03_rope/03_rope.ipynb")
    return tmp_path


def edit(path: Path, change) -> None:
    nb = sync.read(path)
    change(nb)
    save(nb, path)


def test_a_whole_course_has_no_fault(root):
    """Guards the rules themselves: a check that is never green is soon ignored."""
    assert check.check(root) == []


def set_source(i, old, new):
    def change(nb):
        assert old in nb.cells[i].source
        nb.cells[i].source = nb.cells[i].source.replace(old, new)

    return change


def printed(i, text, name="stdout"):
    return lambda nb: nb.cells[i].update(outputs=[new_output("stream", name=name, text=text)])


def clear(nb):
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []


def append(*cells):
    return lambda nb: nb.cells.extend(notebook(list(cells), prefix="more").cells)


CHAPTER_FAULTS = {
    "a broken mirror": (set_source(2, "theta", "base"), "cell 2 (c02): rope_table differs from minillama/model.py"),
    "a mirror with something more": (lambda nb: nb.cells[2].update(source=nb.cells[2].source + "\n\n\n# mine"), "holds more than definitions"),
    "a mirror of nothing": (set_source(2, "def rope_table", "def rope_chair"), "rope_chair is not a definition of minillama/model.py"),
    "a mirror with a statement": (lambda nb: nb.cells[2].update(source=nb.cells[2].source + "\nprint(1)"), "a mirrored cell holds nothing else"),
    "a home left empty": (lambda nb: nb.cells.pop(3), "apply_rope of minillama/model.py has its home here and is not mirrored"),
    "two mirrors in a chapter": (append(("# minillama/model.py\n" + ROPE["apply_rope"], "")), "apply_rope of minillama/model.py is mirrored in cells 3, 7"),
    "another chapter's definition": (append(("# minillama/model.py\n" + ROPE["RMSNorm"], "")), "RMSNorm of minillama/model.py is mirrored here; its home is"),
    "a cleared notebook": (clear, "cell 4 (c04): not executed"),
    "cells out of order": (lambda nb: nb.cells[4].update(execution_count=9), "not executed once each, from top to bottom"),
    "an error": (lambda nb: nb.cells[4].update(outputs=[new_output("error", ename="KeyError", evalue="'x'", traceback=[])]), "(c04): shows an error: KeyError"),
    "stderr": (printed(4, "careful", "stderr"), "cell 4 (c04): writes to stderr: 'careful'"),
    "an address": (printed(4, "<Llama object at 0x7f0123456789>"), "prints an address"),
    "a path": (printed(4, "/tmp/tmpabc/x"), "prints a path of this machine"),
    "digits": (printed(4, "0.123456789012"), "prints an unrounded number"),
    "a time": (set_source(4, "print(", "from time import perf_counter; print(perf_counter(), "), "prints what it timed"),
    "ignored without an assert": (set_source(5, "assert x.shape", "y = x.shape"), "its output is ignored and it asserts nothing"),
    "too much ignored": (append(*[("assert x.sum() < 3", "", "nbval-ignore-output")] * 5), "6 cells are tagged nbval-ignore-output, at most 5"),
    "a skipped cell": (set_source(4, "print", "# NBVAL_SKIP\nprint"), "an nbval comment"),
    "an exception let through": (lambda nb: nb.cells[4].metadata.update(tags=["raises-exception"]), "the tag raises-exception keeps it from being checked"),
    "a dead link": (set_source(0, "start.ipynb", "stop.ipynb"), "cell 0 (c00): dead link stop.ipynb"),
    "a long cell": (lambda nb: nb.cells[4].update(source="\n".join(f"x = {i}" for i in range(26))), "(c04): 26 lines, at most 25"),
    "many cells": (append(*["text"] * 44), "51 cells, at most 50"),
    "commented-out code": (set_source(4, "print", "# y = x.sum()\nprint"), "commented-out code: y = x.sum()"),
    "a magic": (set_source(4, "print", "%matplotlib inline\nprint"), "not plain Python"),
    "a widget": (lambda nb: nb.cells[4].update(outputs=[new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})]), "is not compared"),
    "an editor's traces": (lambda nb: nb.cells[4].metadata.update(execution={"iopub.execute_input": "now"}), "not laid out as `minillama course sync`"),
}


@pytest.mark.parametrize("name", CHAPTER_FAULTS)
def test_a_chapters_fault_is_found(root, name):
    """Guards against a rule that no longer bites."""
    change, message = CHAPTER_FAULTS[name]
    edit(root / "notebooks/03_rope.ipynb", change)
    found = check.check(root)
    assert any(line.startswith("notebooks/03_rope.ipynb") and message in line for line in found), found
    assert len(found) <= 7, found


def test_prose_in_comments_is_no_code():
    """Guards writers against a check that takes shapes and sentences for code."""
    prose = "# scores of one head, B x T\n# note: the mask\n# [B, T, D]\n# see table 18\n# T = 4 tokens, one row each\nx = 1  # y = 2\ns = '''\n# z = 3\n'''"
    assert check._commented_out(prose) == []
    assert check._commented_out("# for i in range(3):\n#     print(i)\n# import os\n# f(x)") == ["for i in range(3):", "print(i)", "import os", "f(x)"]


UNIT_FAULTS = {
    "two tasks": (lambda nb: [nb.cells.pop() for _ in range(3)], "2 graded tasks, wants 3 to 6"),
    "points that disagree": (lambda nb: nb.cells[3].metadata.nbgrader.update(points=7), "does not say '7 points'"),
    "no minutes": (set_source(1, "minutes", "moments"), "its text has no minutes"),
    "no hint": (set_source(1, "Hint", "Idea"), "its text has no hint"),
    "no tier": (set_source(1, "Warm-up", "Easy"), "no task is marked warm-up"),
    "no bug hunt": (set_source(4, "bug hunt", "walk"), "no task is marked bug hunt"),
    "nothing hidden": (set_source(3, "### ", "## "), "no hidden tests"),
    "partial credit": (lambda nb: nb.cells[3].update(source=nb.cells[3].source + "\n1"), "does not end in an assert"),
    "partial credit in public": (set_source(3, "'twice the factor'", "''\nft1(1)"), "does not end in an assert"),
    "an answer without a region": (set_source(2, "### ", "## "), "t1_answer has no ### BEGIN SOLUTION"),
    "a withheld name that is gone": (lambda nb: nb.metadata.minillama.update(withheld=["minillama.model.Nope"]), "minillama.model.Nope is not in the package"),
    "another unit's name": (lambda nb: nb.metadata.minillama.update(unit="04"), "file, folder and minillama.unit must agree"),
    "unmarked code": (lambda nb: nb.cells[0].metadata.pop("nbgrader"), "code cell c00 has no nbgrader metadata"),
    "an unfinished region": (set_source(2, "### END SOLUTION", ""), "cannot be released"),
}


@pytest.mark.parametrize("name", UNIT_FAULTS)
def test_a_units_fault_is_found(root, name):
    """Guards against units that stock nbgrader grades wrongly, or that lack what a student needs."""
    change, message = UNIT_FAULTS[name]
    edit(root / "solutions/03_rope/03_rope.ipynb", change)
    assert any("03_rope" in line and message in line for line in check.check(root)), check.check(root)


def test_exercises_follow_solutions(root, monkeypatch, capsys):
    """Guards against a stale exercise, one whose solution is gone, and a release that is not deterministic."""
    monkeypatch.setattr(release, "ROOT", root)
    monkeypatch.setattr(release.stale, "__defaults__", (root,))
    exercise = root / "exercises/03_rope/03_rope.ipynb"
    before = exercise.read_bytes()
    assert release.main(["--check"]) == 0
    edit(exercise, set_source(3, "== 6", "== 7"))
    save(unit(), root / "exercises/99_gone/99_gone.ipynb")
    assert any("03_rope.ipynb: stale" in line for line in check.check(root))
    assert release.main(["--check"]) == 1 and "99_gone.ipynb: its solution is gone" in capsys.readouterr().out
    assert release.main([]) == 0 and release.main(["--check"]) == 0
    assert exercise.read_bytes() == before and not (root / "exercises/99_gone").exists()
    text = before.decode()
    assert "HIDDEN" not in text and "return 3" not in text and "raise NotImplementedError()" in text and '"withheld"' in text
    assert all(not c.outputs and c.execution_count is None for c in sync.read(exercise).cells if c.cell_type == "code")


def test_an_unattempted_answer_fails_its_own_test_cell_only():
    """Guards against an exercise that cannot even be opened and run: only test cells stop, and with NotImplementedError."""
    scope, raised = {}, {}
    for cell in release.released(unit()).cells:
        if cell.cell_type == "code":
            try:
                exec(cell.source, scope)
            except Exception as e:
                raised[cell.metadata.nbgrader.grade_id] = type(e).__name__
    assert raised == {f"t{i}_tests": "NotImplementedError" for i in (1, 2, 3)}


def test_sync_writes_the_packages_text(root, monkeypatch, capsys):
    """Guards against a mirrored cell that sync leaves behind, and against a sync that changes anything else."""
    path = root / "notebooks/03_rope.ipynb"
    before = path.read_text()
    edit(path, lambda nb: (nb.cells[2].update(source=nb.cells[2].source.replace("theta", "base")), nb.cells[2].metadata.update(collapsed=True)))
    assert path.read_text() != before
    assert sync.main([str(path)]) == 0 and path.read_text() == before and "written" in capsys.readouterr().out
    assert sync.main([str(path)]) == 0 and capsys.readouterr().out == ""
    edit(path, set_source(2, "def rope_table", "def rope_chair"))
    with pytest.raises(ValueError, match="cell 2: rope_chair"):
        sync.main([str(path)])
    two = "# minillama/model.py\n" + ROPE["rope_table"] + "\n\n\n" + ROPE["apply_rope"]
    assert sync.refreshed(two.replace("theta", "t").replace("cos", "c")) == two


def test_every_module_is_taught_or_a_tool():
    """Guards against a new module that no chapter is asked to build."""
    table = homes(ROOT / "minillama")
    assert len(table) > 150 and table["model", "Llama"] == "05" and table["model", "Attention"] == "04" and table["ppo", "gae"] == "16"
    modules = {module_name(p, ROOT / "minillama") for p in (ROOT / "minillama").rglob("*.py")}
    assert set(MODULES) <= modules and modules - set(MODULES) - TOOLS <= {"config"}


def test_a_run_goes_red(root, tmp_path, capfd):
    """Guards against the strict run: an edited output, a figure without a title, and one without labels that is never shown by hand must fail;
    a cleared notebook passes it (nbval compares nothing then), which is why the check of files must not."""
    good = root / "notebooks/03_rope.ipynb"
    broken = {"edited": printed(4, "[0, 1, 3]\n"), "untitled": set_source(6, "plt.title('it rises')\n", ""),
              "unlabelled": set_source(6, "plt.ylabel('loss')\nplt.show()", "x = 1"), "cleared": clear}  # fmt: skip
    paths = [good]
    for name, change in broken.items():
        path = root / f"notebooks/{name}.ipynb"
        shutil.copy(good, path)
        edit(path, change)
        paths.append(path)
    xml = tmp_path / "results.xml"
    assert check.run(paths, 0, (f"--junitxml={xml}", f"--rootdir={root}")) == 1
    failed, text = {}, ""
    for case in ET.parse(xml).iter("testcase"):
        name = case.get("classname").split(".")[-2]
        failed.setdefault(name, []).extend([case.get("name")] if case.find("failure") is not None else [])
        text += "".join(f.text or "" for f in case.iter("failure"))
    assert {k: len(v) for k, v in failed.items()} == {"03_rope": 0, "edited": 1, "untitled": 1, "unlabelled": 1, "cleared": 0}, failed
    assert "axes 1 of 1: no title" in text and "axes 1 of 1: no y label" in text
    assert any("notebooks/cleared.ipynb: cell 4 (c04): not executed" in line for line in check.check(root))


def test_figures_without_words_are_found():
    """Guards the figure rule on what chapters draw: shared axes, twins, colour bars, drawings, legends."""
    from matplotlib.figure import Figure

    from minillama.course.figures import faults

    figure = Figure()
    a, b = figure.subplots(1, 2, sharey=True)
    assert len(faults(figure)) == 6
    for ax in (a, b):
        ax.set(title="t", xlabel="x")
    assert faults(figure) == ["axes 1 of 2: no y label", "axes 2 of 2: no y label"]
    a.set_ylabel("y")
    a.twinx().set_ylabel("z")
    figure.colorbar(b.imshow([[1, 2]]), ax=b)
    assert faults(figure) == []
    a.plot([1], label="one")
    a.plot([2], label="two")
    assert faults(figure) == ["axes 1 of 3: labelled curves and no legend"]
    drawing = Figure()
    drawing.subplots().axis("off")
    drawing.suptitle("boxes")
    assert faults(drawing) == []


def test_stock_nbgrader_releases_and_grades(root, tmp_path):
    """Guards those who already teach with nbgrader: it lists, generates and autogrades a unit with the project's config, and its exercise is ours."""
    shutil.copy(ROOT / "nbgrader_config.py", root)
    ours = (root / "exercises/03_rope/03_rope.ipynb").read_bytes()
    shutil.rmtree(root / "exercises")
    code = """if True:
        import json, shutil
        from pathlib import Path
        from traitlets.config.loader import PyFileConfigLoader
        from nbgrader.apps import NbGraderAPI
        api = NbGraderAPI(config=PyFileConfigLoader("nbgrader_config.py").load_config())
        listed = sorted(api.get_source_assignments())
        made = api.generate_assignment("03_rope")
        for student, source in (("ada", "solutions"), ("bob", "exercises")):
            shutil.copytree(f"{source}/03_rope", f".grading/submitted/{student}/03_rope")
        graded = [api.autograde("03_rope", s)["success"] for s in ("ada", "bob")]
        with api.gradebook as book:
            scores = {s.student.id: [s.score, s.max_score] for s in book.find_assignment("03_rope").submissions}
        print(json.dumps([listed, made["success"], graded, scores]))
    """
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # nbgrader calls alembic
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [["03_rope"], True, [True, True], {"ada": [6.0, 6.0], "bob": [0.0, 6.0]}]
    assert (root / "exercises/03_rope/03_rope.ipynb").read_bytes() == ours


def test_the_best_run(tmp_path, monkeypatch):
    """Guards chapters against a run that stopped half-way, and the choice of a run by hand."""
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.delenv("MINILLAMA_RUN", raising=False)
    for scale, files in {"gpu": ["world.json"], "laptop": ["world.json", "align.json"], "ci": ["world.json", "align.json"]}.items():
        (tmp_path / "runs" / scale).mkdir(parents=True)
        for file in files:
            (tmp_path / "runs" / scale / file).write_text('{"seed": 3, "scale": "ci"}')
    assert course.best_run() == tmp_path / "runs/laptop"
    assert (course.world_of(course.best_run()).seed, course.world_of(course.best_run()).scale) == (3, "ci")
    monkeypatch.setenv("MINILLAMA_RUN", str(tmp_path / "runs/ci"))
    assert course.best_run() == tmp_path / "runs/ci"
    monkeypatch.setenv("MINILLAMA_RUN", str(tmp_path / "runs/gpu"))
    with pytest.raises(FileNotFoundError, match="no finished demo"):
        course.best_run()
