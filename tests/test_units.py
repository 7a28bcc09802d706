"""Every exercise unit's tests have teeth: the solution passes them, a blank sheet and each wrong answer of tests/course_wrong/ do not.

In-process: cells are executed in a fresh namespace, without kernels. The answers of course_wrong are data: {"t1": [text of a wrong answer cell, ...], ...}.
"""
import contextlib
import importlib.util
import io
import random
import warnings
from copy import deepcopy
from pathlib import Path

import pytest

from minillama.course import ROOT
from minillama.course.release import released
from minillama.course.sync import read

UNITS = sorted(ROOT.glob("solutions/*/*.ipynb"))
WRONG = Path(__file__).parent / "course_wrong"
ENOUGH = 5  # wrong answers a task


class Unit:
    """The code cells of a unit by grade_id, and a namespace in which they run."""

    def __init__(self, nb):
        self.cells = {c.metadata.nbgrader.grade_id: c for c in nb.cells if c.cell_type == "code"}
        self.tasks = [id.removesuffix("_tests") for id, c in self.cells.items() if c.metadata.nbgrader.get("grade")]
        self.scope = {"__name__": "__main__"}

    def run(self, id: str, source: str | None = None) -> None:
        """Execute a cell, or `source` in its place. Raises what it raises."""
        exec(compile(self.cells[id].source if source is None else source, id, "exec"), self.scope)

    def locked(self) -> None:
        """Run what surrounds the tasks, and remember the names that it leaves."""
        for id, cell in self.cells.items():
            if id.removesuffix("_tests") not in self.tasks and not cell.metadata.nbgrader.get("solution"):
                self.run(id)
        self.clean = dict(self.scope)

    def attempt(self, task: str, answer: str | None = None) -> BaseException | None:
        """What a task raises with this answer (default: the cell's own) among the locked cells and no other answer; None if it passes."""
        self.scope.clear()
        self.scope.update(self.clean)
        try:
            self.run(f"{task}_answer", answer)
            self.run(f"{task}_tests")
        except Exception as e:
            return e
        return None


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No windows, no figures left open, and the seeds as some student's session has them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda *a, **k: plt.close("all"))
    seed(0)


def seed(n: int) -> None:
    import numpy
    import torch

    random.seed(n)
    numpy.random.seed(n)
    torch.manual_seed(n)


def wrong(path: Path) -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location(f"wrong_{path.stem}", WRONG / f"{path.stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def units(test):
    return pytest.mark.parametrize("path", UNITS, ids=[p.stem for p in UNITS])(test)


@units
def test_the_solution_passes(path, monkeypatch):
    """Guards against tests that depend on luck, on the order of tasks, or on stderr: three times, with other seeds and all in one namespace, silent."""
    monkeypatch.chdir(path.parent)
    for n in range(3):
        unit = Unit(deepcopy(read(path)))
        seed(n)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, warnings.catch_warnings(record=True) as caught:
            for id in unit.cells:
                unit.run(id)
        shown = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]  # a notebook prints these on stderr
        assert not err.getvalue() and not shown, err.getvalue()[:300] or shown


@units
def test_tasks_are_independent_and_wrong_answers_fail(path, monkeypatch):
    """Guards against a test that a plausible wrong answer passes, and against an answer that needs another task's."""
    monkeypatch.chdir(path.parent)
    unit, answers = Unit(read(path)), wrong(path)
    assert set(answers) == set(unit.tasks), f"tests/course_wrong/{path.stem}.py has {sorted(answers)}, the unit {unit.tasks}"
    faults = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        unit.locked()
        for task in unit.tasks:
            error = unit.attempt(task)
            faults += [f"{task}: the solution alone raises {error!r}"] if error else []
            if len(set(answers[task])) < ENOUGH:
                faults.append(f"{task}: {len(set(answers[task]))} wrong answers, at least {ENOUGH}")
            for i, answer in enumerate(answers[task]):
                error = unit.attempt(task, answer)
                if error is None:
                    faults.append(f"{task}: wrong answer {i} passes:\n{answer}")
                elif isinstance(error, (SyntaxError, ImportError, NotImplementedError)) or type(error) is NameError:
                    faults.append(f"{task}: wrong answer {i} is no attempt at all ({error!r})")
    assert not faults, "\n".join(faults)


@units
def test_a_blank_exercise_fails_in_its_tests_alone(path, monkeypatch):
    """Guards against an exercise that breaks before the student writes a line, and against a task that a blank sheet passes."""
    monkeypatch.chdir(path.parent)
    unit = Unit(read(ROOT / "exercises" / path.parent.name / path.name))
    raised = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for id in unit.cells:
            try:
                unit.run(id)
            except Exception as e:
                raised[id] = type(e).__name__
    assert raised == {f"{task}_tests": "NotImplementedError" for task in unit.tasks}
    blank = Unit(released(read(path)))
    full = Unit(read(path))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        full.locked()
        for task in full.tasks:
            assert isinstance(full.attempt(task, blank.cells[f"{task}_answer"].source), NotImplementedError)


def test_every_unit_has_wrong_answers_and_none_is_left_over():
    """Guards against wrong answers that no test reads."""
    assert {p.stem for p in WRONG.glob("*.py")} == {p.stem for p in UNITS}
