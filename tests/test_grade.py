"""The grader against honest and hostile work: on a small unit of three tasks, each attack scores 0 on its task and costs the other tasks nothing."""

# ruff: noqa: E501 (an attack reads best as the one line that a student would type)
import contextlib
import csv
import json
import os
from dataclasses import replace

import pytest

from minillama.course import ROOT
from minillama.course import grade as module
from minillama.course.grade import Server, grade, main, read, read_unit, refuse

SETUP = """import math

import torch
import torch.nn.functional as F
from torch import nn
from minillama.config import LlamaConfig

config = LlamaConfig.preset("ci")
TABLE = {"half": 0.5, "third": [3, 1]}


def naive_mean_square(x):
    return sum(v * v for v in x.flatten().tolist()) / x.numel()
"""
ANSWERS = {
    "t1": '''def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, D] over its root mean square, times weight [D]."""
    ### BEGIN SOLUTION
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight
    ### END SOLUTION
''',
    "t2": """def pairs(n: int) -> list[int]:
    ### BEGIN SOLUTION
    return [i * (i + 1) // 2 for i in range(1, n + 1)]
    ### END SOLUTION


ratio = TABLE["half"] / 2  ### BEGIN SOLUTION
### END SOLUTION
""",
    "t3": """class Gate(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.w = nn.Parameter(torch.ones(dim))
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        return F.silu(x) * self.w
        ### END SOLUTION
""",
}
TESTS = {
    "t1": """torch.manual_seed(0)
x, w = 3 * torch.randn(5, 7), torch.rand(7) + 0.5
out = rms(x, w)
assert isinstance(out, torch.Tensor) and out.shape == (5, 7), "rms keeps the shape of x"
assert torch.allclose(out[2] / w, x[2] / math.sqrt(naive_mean_square(x[2]) + 1e-5), atol=1e-5), "each row is divided by its own root mean square"
### BEGIN HIDDEN TESTS
secret_eps = 1e-5
zero = rms(torch.zeros(2, 3), torch.ones(3))
torch.testing.assert_close(zero, torch.zeros(2, 3), msg="SECRET epsilon is inside the root")
assert torch.equal(rms(x, 2 * w), 2 * out), "SECRET weight is a factor"
### END HIDDEN TESTS
""",
    "t2": """got = pairs(4)
assert len(got) == 4 and all(isinstance(v, int) for v in got), "pairs(n) is a list of n whole numbers"
assert got == [1, 3, 6, 10], f"pairs(4) should be the first four sums 1, 1 + 2, ...; it is {got}"
assert abs(ratio - 0.25) < 1e-9, "ratio is half of a half"
### BEGIN HIDDEN TESTS
assert pairs(0) == [], "SECRET n = 0"
assert pairs(7)[-1] == 28
### END HIDDEN TESTS
""",
    "t3": """gate = Gate(6)
x = torch.linspace(-2, 2, 12).view(2, 6).requires_grad_()
y = gate(x)
assert [tuple(p.shape) for p in gate.parameters()] == [(6,)], "one parameter of shape (dim,)"
torch.testing.assert_close(y, x * torch.sigmoid(x))
y.sum().backward()
s = torch.sigmoid(x.detach())
assert torch.allclose(x.grad, s * (1 + x.detach() * (1 - s)), atol=1e-5), "the gradient is silu's"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate(3)

    def forward(self, x):
        return self.gate(self.gate(x))


### BEGIN HIDDEN TESTS
with torch.no_grad():
    gate.w.fill_(2.0)
for n in (1, 4):
    z = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(gate(z), 2 * F.silu(z), atol=1e-6), "SECRET the weight scales"
assert Twice()(torch.ones(3)).shape == (3,)
### END HIDDEN TESTS
""",
}
POINTS = {"t1": 2, "t2": 3, "t3": 5}


def cell(source, **flags):
    meta = {"nbgrader": {"schema_version": 3, "grade": False, "solution": False, "locked": False, **flags}} if flags else {}
    return {"cell_type": "code", "id": flags.get("grade_id", "x"), "metadata": meta, "source": source, "outputs": [], "execution_count": None}


def notebook(answers, tests=TESTS, setup=SETUP, drop=(), extra=()):
    """A unit, or somebody's copy of it: `extra` cells stand before the answers."""
    cells = [cell(setup, locked=True, grade_id="setup"), *extra]
    for t in POINTS:
        cells.append(cell(answers.get(t, ANSWERS[t]), solution=True, grade_id=f"{t}_answer"))
        cells.append(cell(tests.get(t, TESTS[t]), grade=True, locked=True, points=POINTS[t], grade_id=f"{t}_tests"))
    cells = [c for c in cells if c["metadata"].get("nbgrader", {}).get("grade_id") not in drop]
    meta = {"minillama": {"unit": "00_toy", "withheld": ["minillama.model.RMSNorm", "minillama.model.Llama"]}}
    return {"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}


def save(path, nb):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, unit, server): the limits are tight, so that loops cost seconds and big allocations nothing."""
    folder = tmp_path_factory.mktemp("toy")
    path = save(folder / "solutions" / "00_toy" / "00_toy.ipynb", notebook({}))
    with Server(seconds=4, gigabytes=2) as server:
        yield folder, read_unit(path), server


def graded(toy, nb):
    folder, unit, server = toy
    return {r.task: r for r in grade(read(save(folder / "handed_in.ipynb", nb)), unit, server)}


CHEAT = "def rms(x, weight):\n    return x\n"  # wrong, and in need of help
CHEAT2 = "def pairs(n):\n    return [1] * n\nratio = 9.0\n"
CHEAT3 = "class Gate(nn.Module):\n    def __init__(self, dim):\n        super().__init__()\n        self.w = nn.Parameter(torch.ones(dim))\n    def forward(self, x):\n        return x\n"


def hostile(solutions):
    """name -> (task, answer cell)."""
    there = str(solutions)
    steal = """
import re, json
def rms(x, weight):
    for c in json.loads(text)['cells']:
        if 'def rms' in ''.join(c['source']):
            raise AssertionError('stolen: ' + ''.join(c['source']))
"""
    package = str(ROOT / "minillama" / "model.py")
    return {
        # the answer from elsewhere
        "imports the package": (
            "t1",
            "from minillama.model import RMSNorm\ndef rms(x, weight):\n    n = RMSNorm(x.shape[-1], 1e-5); n.weight.data = weight; return n(x)\n",
        ),
        "imports the package late": ("t1", "import minillama\ndef rms(x, weight):\n    return minillama.model.RMSNorm(x.shape[-1], 1e-5)(x) * weight\n"),
        "imports by name": (
            "t1",
            "import importlib\nm = importlib.import_module('minillama.model')\ndef rms(x, weight):\n    return m.RMSNorm(7, 1e-5)(x) * weight\n",
        ),
        "__import__ from a dict": (
            "t1",
            "i = __builtins__['__im' + 'port__']\ndef rms(x, weight):\n    return i('minillama.model', fromlist=['x']).RMSNorm(x.shape[-1], 1e-5)(x) * weight\n",
        ),
        "sys.modules by another name": (
            "t1",
            "import sys\nm = getattr(sys, 'mod' + 'ules')['minillama.model']\ndef rms(x, weight):\n    return m.RMSNorm(x.shape[-1], 1e-5)(x) * weight\n",
        ),
        "subclasses": (
            "t1",
            "def rms(x, weight):\n    c = [c for c in getattr(nn.Module, '__sub' + 'classes__')() if c.__name__ == 'RMSNorm' and 'minillama' in c.__module__][0]\n"
            "    return c(x.shape[-1], 1e-5)(x) * weight\n",
        ),
        "reads solutions": ("t1", f"text = open({there!r}).read()" + steal),
        "reads solutions with os": ("t1", f"import os\ntext = os.read(os.open({there!r}, 0), 10**6).decode()" + steal),
        "reads solutions in C++": (
            "t1",
            f"text = bytes(torch.UntypedStorage.from_file({there!r}, False, 100).tolist()).decode()"
            + steal.replace("json.loads(text)['cells']", "[{'source': 'def rms' + text}]"),
        ),
        "reads solutions with numpy": ("t1", f"import numpy as np\ntext = np.fromfile({there!r}, dtype=np.uint8).tobytes().decode()" + steal),
        "links to solutions": ("t1", f"import os\nos.symlink({there!r}, 'x')\ntext = open('x').read()" + steal),
        "reads the package": ("t1", f"text = open({package!r}).read()\nraise AssertionError('stolen: ' + text[:50])\n"),
        "reads pyc by the loader": (
            "t1",
            "import sys\nm = getattr(sys, 'mod' + 'ules')['minillama.config']\nl = getattr(m, '__load' + 'er__')\nl.path = l.path.replace('config', 'model')\n"
            "raise AssertionError('stolen: ' + repr(l.get_data(l.path))[:60])\n",
        ),
        "reads its own memory": ("t1", "raise AssertionError('stolen: ' + open('/proc/self/maps').read()[:50])"),
        "inspect": ("t1", "import inspect, minillama.model\n" + CHEAT),
        "gc": ("t1", "import sys\nm = getattr(sys, 'mod' + 'ules')['gc']\nraise AssertionError('stolen: %d' % len(m.get_objects()))\n"),
        # helpers that agree with everything
        "allclose": ("t1", "torch.allclose = lambda *a, **k: True\ntorch.equal = lambda *a: True\ntorch.testing.assert_close = lambda *a, **k: None\n" + CHEAT),
        "allclose, while it runs": (
            "t1",
            "def rms(x, weight):\n    torch.allclose = torch.equal = lambda *a, **k: True\n    torch.testing.assert_close = lambda *a, **k: None\n    return x\n",
        ),
        "allclose, and back": (
            "t1",
            "old = torch.allclose\ndef once(*a, **k):\n    torch.allclose = old\n    return True\n"
            "def rms(x, weight):\n    torch.allclose = once\n    return x\n",
        ),
        "assert_close's inside": ("t3", "import torch.testing._comparison as c\nc.not_close_error_metas = lambda *a, **k: []\n" + CHEAT3),
        "a name over a builtin": ("t3", "import torch.testing._comparison as c\nc.isinstance = lambda *a: True\n" + CHEAT3),
        "builtins": (
            "t2",
            "import sys\nb = getattr(sys, 'mod' + 'ules')['builtins']\nb.abs = lambda x: 0\nb.all = lambda x: True\nb.len = lambda x: 4\nb.isinstance = lambda *a: True\n"
            + CHEAT2,
        ),
        "builtins, while it runs": (
            "t2",
            "import sys\nb = getattr(sys, 'mod' + 'ules')['builtins']\ndef pairs(n):\n    b.abs = lambda x: 0\n    return [1, 3, 6, 10]\nratio = 7.0\n",
        ),
        "names of its own": ("t2", "abs = lambda x: 0\nall = lambda x: True\nlen = lambda x: 4\nisinstance = lambda *a: True\n" + CHEAT2),
        "Tensor methods": ("t1", "torch.Tensor.__truediv__ = lambda a, b: a\ntorch.Tensor.__eq__ = lambda a, b: True\n" + CHEAT),
        "the unit's helper": ("t1", "naive_mean_square = lambda x: 1.0\ndef rms(x, weight):\n    return x * weight\n"),
        "the unit's helper's code": (
            "t1",
            "setattr(naive_mean_square, '__co' + 'de__', getattr(lambda x: 1.0, '__co' + 'de__'))\ndef rms(x, weight):\n    return x * weight\n",
        ),
        "the unit's globals": (
            "t1",
            "g = getattr(naive_mean_square, '__glo' + 'bals__')\ng['torch'] = g['math'] = None\ng['naive_mean_square'] = lambda x: 1.0\ndef rms(x, weight):\n    return x * weight\n",
        ),
        "equal to everything": (
            "t2",
            "class E(list):\n    def __eq__(self, o): return True\n    def __getitem__(self, i): return 28\ndef pairs(n):\n    return E([0] * n)\nratio = 0.25\n",
        ),
        "equal inside a list": ("t2", "class E(int):\n    def __eq__(self, o): return True\ndef pairs(n):\n    return [E(28)] * n\nratio = 0.25\n"),
        "a float that is never far": ("t2", ANSWERS["t2"] + "class R(float):\n    def __sub__(self, o): return 0.0\nratio = R(7)\n"),
        "a tensor subclass": (
            "t1",
            "class T(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, f, types, args=(), kwargs=None):\n        return True if f in (torch.allclose, torch.equal) else super().__torch_function__(f, types, args, kwargs or {})\n"
            "def rms(x, weight):\n    return x.as_subclass(T)\n",
        ),
        "a torch mode": (
            "t1",
            "from torch.overrides import TorchFunctionMode\nclass M(TorchFunctionMode):\n    def __torch_function__(self, f, types, args=(), kwargs=None):\n        return True if f in (torch.allclose, torch.equal) else f(*args, **(kwargs or {}))\n"
            "M().__enter__()\n" + CHEAT,
        ),
        "a kernel of its own": (
            "t1",
            "lib = torch.library.Library('aten', 'IMPL')\nlib.impl('allclose', lambda *a, **k: True, 'CompositeImplicitAutograd')\n" + CHEAT,
        ),
        "global hooks": ("t3", "torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: F.silu(i[0]))\n" + CHEAT3),
        "the unit's data": ("t2", "TABLE['half'] = 18.0\n" + ANSWERS["t2"]),
        # the process and its verdict
        "exit": ("t1", "import os\ndef rms(x, weight):\n    os._exit(0)\n"),
        "exit by another name": ("t1", "import os\ndef rms(x, weight):\n    getattr(os, '_ex' + 'it')(0)\n"),
        "SystemExit": ("t1", "def rms(x, weight):\n    raise SystemExit(0)\n"),
        "KeyboardInterrupt at once": ("t1", "raise KeyboardInterrupt\n"),
        "a forged verdict": (
            "t1",
            'import os, json\nfor fd in range(64):\n    for t in (\'{"kind": "ok", "why": ""}\', \'\\n{"kind": "ok", "why": ""}\\n\'):\n        try:\n            os.write(fd, t.encode())\n        except OSError:\n            pass\n'
            + CHEAT,
        ),
        "a verdict and out": ("t1", 'import os\ntry:\n    os.write(3, b\'{"kind": "ok", "why": ""}\')\nfinally:\n    getattr(os, \'_ex\' + \'it\')(0)\n'),
        "atexit": ("t1", "import atexit\natexit.register(print, 'OK 2/2 t1')\n" + CHEAT),
        "excepthook": ("t1", "import sys\nsetattr(sys, 'except' + 'hook', lambda *a: None)\nprint('OK 2/2 t1')\n" + CHEAT),
        "settrace": (
            "t1",
            "import sys\ndef tr(frame, event, arg):\n    frame.f_globals['torch'].allclose = lambda *a, **k: True\n    return tr\ngetattr(sys, 'set' + 'trace')(tr)\n"
            + CHEAT,
        ),
        "frames": (
            "t1",
            "import sys\ndef rms(x, weight):\n    f = getattr(sys, '_get' + 'frame')(1)\n    raise AssertionError('stolen: ' + str(getattr(f, 'f_co' + 'de').co_consts))\n",
        ),
        "frames of a traceback": (
            "t1",
            "def rms(x, weight):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        f = getattr(e.__traceback__, 'tb_' + 'frame')\n"
            "    raise AssertionError('stolen: ' + str(getattr(f, 'f_ba' + 'ck')))\n",
        ),
        "a signal": (
            "t1",
            "import sys\ns = getattr(sys, 'mod' + 'ules')['signal']\ndef h(n, frame):\n    frame.f_globals['torch'].allclose = lambda *a, **k: True\ns.signal(s.SIGALRM, h)\ns.setitimer(s.ITIMER_REAL, 0.0001)\n"
            + CHEAT,
        ),
        "a thread": (
            "t1",
            "import sys\nt = getattr(sys, 'mod' + 'ules')['threading']\ndef run():\n    while True:\n        torch.allclose = lambda *a, **k: True\nt.Thread(target=run, daemon=True).start()\n"
            + CHEAT,
        ),
        "IPython": ("t1", "get_ipython().events.register('post_run_cell', lambda r: setattr(r, 'success', True))\n" + CHEAT),
        "swallows errors": ("t1", "import sys\nget_ipython = lambda: None\n__builtins__['AssertionError'] = ZeroDivisionError\n" + CHEAT),
        # what costs only its task
        "endless loop": ("t1", "def rms(x, weight):\n    while True:\n        pass\n"),
        "loop at once": ("t1", "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass\n"),
        "10 GB": ("t1", "def rms(x, weight):\n    return torch.ones(10 * 2**28) * x\n"),
        "10 GB of bytes": ("t1", "junk = bytearray(10**10)\n" + ANSWERS["t1"]),
        "crash": (
            "t1",
            "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1) if n else f(1)\nclass C:\n    pass\ndef rms(x, weight):\n    import numpy as np\n    a = np.lib.stride_tricks.as_strided(np.zeros(1), shape=(1,), strides=(8,))\n    np.lib.stride_tricks.as_strided(a, shape=(10**12,), strides=(4096,))[10**9] = 1\n    return x\n",
        ),
        "fork bomb": ("t1", "import os\ngetattr(os, 'fo' + 'rk')()\n" + ANSWERS["t1"]),
        "shell": ("t1", "import os\nos.system('true')\n" + ANSWERS["t1"]),
        "network": (
            "t1",
            "import sys\ns = getattr(sys, 'mod' + 'ules').get('socket') or torch.distributed.socket\ns.create_connection(('127.0.0.1', 9))\n" + ANSWERS["t1"],
        ),
        "kills the grader": ("t1", "import os\nos.kill(os.getppid(), 9)\n" + ANSWERS["t1"]),
        "writes outside": ("t1", f"open({str(solutions.parent / 'x')!r}, 'w').write('x')\n" + ANSWERS["t1"]),
        "not Python": ("t1", "def rms(x, weight)\n    return x\n"),
        "not attempted": ("t1", "def rms(x, weight):\n    # YOUR CODE HERE\n    raise NotImplementedError()\n"),
    }


NAMES = list(hostile(ROOT / "solutions"))


WHOLE = ("endless loop", "10 GB", "allclose", "exit by another name", "a forged verdict")  # graded with the other tasks, which must not suffer


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_scores_nothing_on_its_task_and_costs_the_others_nothing(toy, name, monkeypatch):
    monkeypatch.setattr(module, "refuse", lambda source, allowed: "")  # the worker alone: the friendly layer has its own test
    folder, unit, server = toy
    task, answer = hostile(folder / "solutions" / "00_toy" / "00_toy.ipynb")[name]
    if name not in WHOLE:
        unit = replace(unit, tasks=[t for t in unit.tasks if t.id == task])
    found = {r.task: r for r in grade(read(save(folder / "handed_in.ipynb", notebook({task: answer}))), unit, server)}
    assert {t: r.points for t, r in found.items()} == {t.id: 0 if t.id == task else POINTS[t.id] for t in unit.tasks}, found
    result = found[task]
    assert result.kind != "unit", result
    assert "SECRET" not in result.feedback and "stolen" not in result.feedback
    assert len(result.feedback) > 5 and "\n" not in result.feedback


def test_the_answer_in_full_scores_full_marks_three_times(toy):
    for _ in range(3):
        assert {t: r.points for t, r in graded(toy, notebook({})).items()} == POINTS


def test_a_blank_notebook_scores_nothing_and_says_so(toy):
    blank = {
        "t1": "def rms(x, weight):\n    raise NotImplementedError()\n",
        "t2": "def pairs(n):\n    raise NotImplementedError()\nratio = None\n",
        "t3": "# YOUR CODE HERE\n",
    }
    found = graded(toy, notebook(blank))
    assert [r.points for r in found.values()] == [0, 0, 0]
    assert found["t1"].line() == "--  0/2 t1: not attempted (NotImplementedError)"
    assert "Gate" in found["t3"].feedback


def test_feedback_is_the_words_of_a_visible_test_and_nothing_of_a_hidden_one(toy):
    found = graded(toy, notebook({"t1": "def rms(x, weight):\n    return x * torch.rsqrt((x * x).mean(-1, keepdim=True)) * weight\n",  # 0 / 0 in a hidden test
                                  "t2": "def pairs(n):\n    return list(range(n))\nratio = 0.25\n",
                                  "t3": "class Gate(nn.Module):\n    def __init__(self, dim):\n        super().__init__()\n        self.w = nn.Parameter(torch.ones(dim))\n"
                                        "    def forward(self, x):\n        return undefined(x)\n"}))  # fmt: skip
    assert found["t1"].feedback == "a hidden test fails: look at edge cases, other shapes and other sizes"
    assert found["t2"].feedback == "pairs(4) should be the first four sums 1, 1 + 2, ...; it is [0, 1, 2, 3]"
    assert found["t3"].feedback == "NameError: name 'undefined' is not defined (line 6 of the answer)"


def test_only_answer_cells_count(toy):
    """Locked cells and tests are the solution's: rewriting them, deleting them, or copying a cell changes nothing; a deleted answer costs its own task."""
    easy = notebook({"t1": CHEAT}, tests={t: "assert True" for t in POINTS}, setup="import torch\ntorch.allclose = lambda *a, **k: True")
    assert {t: r.points for t, r in graded(toy, easy).items()} == {**POINTS, "t1": 0}
    gone = graded(toy, notebook({"t2": CHEAT2}, drop=("setup", "t1_tests", "t2_tests", "t3_answer")))
    assert {t: r.points for t, r in gone.items()} == {"t1": 2, "t2": 0, "t3": 0}
    assert gone["t3"].feedback == "the answer cell is missing"
    twice = notebook({})
    twice["cells"].append(cell(CHEAT, solution=True, grade_id="t1_answer"))
    twice["cells"].append(cell("assert True", grade=True, locked=True, points=99, grade_id="t9_tests"))
    assert {t: r.points for t, r in graded(toy, twice).items()} == POINTS
    forged = notebook({"t1": CHEAT})
    for c in forged["cells"]:
        c["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "OK 2/2"}]
        c["metadata"].setdefault("nbgrader", {})["points"] = 100
    assert {t: r.points for t, r in graded(toy, forged).items()} == {**POINTS, "t1": 0}


def test_helper_cells_are_taken_where_the_answer_names_them(toy):
    helper = [
        cell("while True: pass"),
        cell("x = weight = F = 1\nwhile True: pass"),  # not the answer's x, which is an argument
        cell("EPS = 1e-5"),
        cell("def root(x):\n    return torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)"),
    ]
    found = graded(toy, notebook({"t1": "def rms(x, weight):\n    return x * root(x) * weight\n"}, extra=helper))
    assert {t: r.points for t, r in found.items()} == POINTS


def test_warnings_prints_and_magics_cost_nothing(toy):
    noisy = ("%matplotlib inline\n!ls\nimport sys, tempfile, warnings\nopen(tempfile.mkdtemp() + '/x', 'w').write('1')\nfrom collections import namedtuple\nfrom dataclasses import dataclass\n\n@dataclass\nclass Row:\n    n: int\n\n"
             "Pair = namedtuple('Pair', 'a b')\nprint('x' * 10**5, file=sys.stderr)\ndisplay(Row(1))\n"
             "def pairs(n):\n    warnings.warn('deprecated')\n    print(n)\n    return [Pair(i, i + 1).a * (i + 1) // 2 for i in range(1, n + 1)]\nratio = TABLE['half'] / 2\n")  # fmt: skip
    assert {t: r.points for t, r in graded(toy, notebook({"t2": noisy})).items()} == POINTS


HONEST = """
import einops
y = einops.rearrange(torch.ones(2,3), 'a b -> b a')
from torch.func import grad, vmap
y = vmap(grad(lambda x: (x*x).sum()))(torch.ones(3,2))
y = torch.autograd.functional.jacobian(lambda x: x*x, torch.ones(2))
torch.autograd.gradcheck(lambda x: x*x, torch.ones(2,dtype=torch.double,requires_grad=True))
from typing import NamedTuple, Optional, Protocol, TypeVar
from enum import Enum
from abc import ABC, abstractmethod
import functools, itertools, collections, re, json, random, statistics, time, copy, logging
class P(NamedTuple):
    a: int
    b: Optional[int] = None
class E(Enum):
    A = 1
class Q(ABC):
    @abstractmethod
    def f(self): ...
@functools.lru_cache
def f(x): return x
f(1); logging.warning('x'); T = TypeVar('T')
@torch.no_grad()
def g(x): return x
g(1); copy.deepcopy(nn.Linear(2,2))
import numpy as np
r = np.random.default_rng(0).normal(size=3)
np.linalg.svd(np.eye(3))
np.einsum('ij->ji', np.eye(2))
m = nn.Linear(2,2)
o = torch.optim.AdamW(m.parameters())
m(torch.ones(2)).sum().backward()
o.step()
torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1.0).step()
import io, tempfile, os
b = io.BytesIO(); torch.save({'a': torch.ones(2)}, b); b.seek(0); torch.load(b)
with tempfile.TemporaryDirectory() as t:
    torch.save(nn.Linear(2,2).state_dict(), os.path.join(t, 'x.pt')); torch.load(os.path.join(t, 'x.pt')); os.listdir(t)
y = F.scaled_dot_product_attention(torch.ones(1,2,3,4), torch.ones(1,2,3,4), torch.ones(1,2,3,4), is_causal=True)
y = nn.MultiheadAttention(4,2,batch_first=True)(y[0], y[0], y[0])
y=torch.distributions.Categorical(logits=torch.zeros(3)).sample()
from tqdm import tqdm
for i in tqdm(range(3)): pass
import matplotlib.pyplot as plt
plt.plot([1,2])
plt.show()
"""


def test_ordinary_libraries_work_inside(toy):
    """What an honest answer may well use, much of which looks at frames, code or files on its way."""
    text = "label = '''\n%s and !important\n''' % 1\n"  # no magic
    assert {t: r.feedback for t, r in graded(toy, notebook({"t1": HONEST + text + ANSWERS["t1"]})).items()} == dict.fromkeys(POINTS, "")


def test_the_reason_is_told_kindly(toy):
    _, unit, _ = toy
    assert unit.allowed == ["minillama.config.LlamaConfig"]
    assert refuse("from minillama.config import LlamaConfig\nimport math, numpy as np\nx = model.modules", unit.allowed) == ""
    for source, words in {"from minillama.model import RMSNorm": "imports minillama.model.RMSNorm; write it yourself", "import minillama": "imports minillama",
                          "import inspect": "may not import inspect (line 1)", "x = 1\neval('1')": "may not use eval (line 2)", "def f(:": "not Python", "f.__globals__": "__globals__",
                          "import sys\nsys.modules": "may not use modules"}.items():  # fmt: skip
        assert words in refuse(source, unit.allowed), source


def test_a_test_that_passes_without_an_answer_gives_nobody_points(toy):
    folder, _, server = toy
    weak = save(folder / "weak.ipynb", notebook({}, tests={**TESTS, "t1": "assert rms is not None"}))
    found = {r.task: r for r in grade(read(weak), read_unit(weak), server)}
    assert found["t1"].points == 0 and "without the answer" in found["t1"].feedback
    assert found["t2"].points == 3


@pytest.fixture
def at(toy, monkeypatch):
    """main() on this module's server and solutions."""

    @contextlib.contextmanager
    def shared(seconds, gigabytes):
        yield toy[2]

    monkeypatch.setattr(module, "Server", shared)
    return lambda *argv: main([*map(str, argv), "--solutions", str(toy[0] / "solutions")])


def test_a_folder_of_submissions_becomes_a_table(toy, at, tmp_path, capsys):
    save(tmp_path / "ada" / "00_toy" / "00_toy.ipynb", notebook({}))
    save(tmp_path / "bob.ipynb", notebook({"t2": "def pairs(n):\n    raise ValueError('=1+1')\nratio = 1\n"}))
    save(tmp_path / "=cy" / "00_toy.ipynb", notebook({}, drop=("t3_answer",)))
    save(tmp_path / "ada" / "00_toy" / ".ipynb_checkpoints" / "00_toy-checkpoint.ipynb", notebook({}))
    assert at(tmp_path, "--csv", tmp_path / "out.csv") == 0
    rows = list(csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8")))
    points = {s: [float(r["points"]) for r in rows if r["student"] == s] for s in ("ada", "bob", "'=cy")}
    assert points == {"ada": [2, 3, 5], "bob": [2, 0, 5], "'=cy": [2, 3, 0]}
    assert {r["unit"] for r in rows} == {"00_toy"} and [r["max"] for r in rows[:3]] == ["2", "3", "5"] and rows[0]["feedback"] == "OK"
    out = capsys.readouterr()
    assert (
        "bob 00_toy: 7 of 10 points" in out.out and "OK  2/2 t1" in out.out and "--  0/3 t2: ValueError: =1+1 (line 2 of the answer)" in out.out and not out.err
    )


def test_what_cannot_be_graded_is_said_and_the_rest_is_graded(toy, at, tmp_path, capsys):
    save(tmp_path / "ada.ipynb", notebook({}))
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "00_toy.ipynb").write_text("{")
    os.symlink(toy[0] / "solutions" / "00_toy" / "00_toy.ipynb", tmp_path / "eve.ipynb")
    save(tmp_path / "scratch.ipynb", {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    strange = notebook({}, setup=f"open({str(tmp_path / 'ran')!r}, 'w').close()")  # its own cells are nobody's: they are not run
    strange["metadata"]["minillama"]["unit"] = "99_strange"
    save(tmp_path / "mal.ipynb", strange)
    assert at(tmp_path, "--json", "--csv", tmp_path / "out.csv") == 1
    assert not (tmp_path / "ran").exists()
    found = {g["student"]: g for g in json.loads(capsys.readouterr().out)}
    assert found["ada"]["points"] == found["ada"]["max"] == 10 and found["ada"]["tests"] == "all" and not found["ada"]["error"]
    assert "is not a notebook" in found["bob"]["error"] and "link" in found["eve"]["error"] and "no unit" in found["scratch"]["error"]
    assert "there is no unit 99_strange" in found["mal"]["error"]
    assert [r["feedback"][:20] for r in csv.DictReader(open(tmp_path / "out.csv")) if not r["task"]] == ["could not be graded:"] * 4


def test_a_broken_unit_is_not_the_students_zero(toy, tmp_path, monkeypatch, capsys):
    save(tmp_path / "solutions" / "00_toy" / "00_toy.ipynb", notebook({}, setup="1 / 0"))
    save(tmp_path / "in" / "ada.ipynb", notebook({}))
    monkeypatch.setattr(module, "Server", lambda *a: contextlib.nullcontext(toy[2]))
    assert main([str(tmp_path / "in"), "--solutions", str(tmp_path / "solutions")]) == 1
    assert "the unit's own cells fail: ZeroDivisionError" in capsys.readouterr().err


def test_a_student_without_the_solutions_runs_the_visible_tests(toy, tmp_path, monkeypatch, capsys):
    visible = {t: s.split("### BEGIN")[0] for t, s in TESTS.items()}
    wrong_in_hidden = "def rms(x, weight):\n    return x * torch.rsqrt((x * x).mean(-1, keepdim=True)) * weight\n"
    path = save(tmp_path / "00_toy" / "00_toy.ipynb", notebook({"t1": wrong_in_hidden, "t2": CHEAT2}, tests=visible))
    monkeypatch.setattr(module, "Server", lambda *a: contextlib.nullcontext(toy[2]))
    assert main([str(path.parent), "--solutions", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert "7 of 10 points (visible tests only)" in out and "0/3 t2: pairs(4) should be" in out
    assert main([str(path), "--visible", "--solutions", str(toy[0] / "solutions")]) == 0
    assert "7 of 10 points (visible tests only)" in capsys.readouterr().out
    assert main([str(path), "--solutions", str(toy[0] / "solutions")]) == 0
    assert "5 of 10 points\n" in capsys.readouterr().out


def test_a_wrong_request_is_one_line(at, tmp_path):
    for argv, words in [
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path,), "no notebook of a unit; there are 00_toy"),
        ((tmp_path, "--colour"), "unrecognized arguments"),
        ((tmp_path, "--csv", tmp_path / "no" / "x.csv"), "there is no folder"),
    ]:
        with pytest.raises(ValueError, match=words):  # cli.main makes it one line and status 2
            at(*argv)


UNITS = sorted(p for p in (ROOT / "solutions").glob("*/*.ipynb") if p.stem == p.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_units_own_solution_scores_full_marks(path):
    unit = read_unit(path)
    with Server(seconds=60, gigabytes=4) as server:
        results = grade(read(path), unit, server)
    assert [(r.task, r.feedback) for r in results if r.points < r.max] == []
