"""The grader's other half: a process that forks one child per task, and what that child may do. `minillama course grade` starts it; see grade.py.

    server -> child: locked cells, student's answer, tests          child -> server: nonce and verdict, over a pipe that only it holds

The server never sees a reference answer and never runs a student's line. A child (1) limits itself, removes the withheld names from the package, runs the
locked cells; (2) closes the doors: Landlock where the kernel has it, an audit hook everywhere; (3) runs the answer in a namespace of its own; (4) hands the
names that were asked for, and nothing else, to the tests; (5) runs the tests, bound to functions that were looked up before the student's first line, and
looks after every call whether torch, numpy or builtins were changed; (6) runs tests that must fail. Python is no sandbox: INSTRUCTORS.md says what remains.
"""
from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import ctypes
import gc
import importlib
import json
import linecache
import math
import operator
import os
import pkgutil
import secrets
import select
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
ANSWER, TESTS, UNIT = "<answer>", "<tests>", "<unit>"
REPORT_BYTES = 1 << 16
BANNED = {"ast", "builtins", "code", "codeop", "ctypes", "_ctypes", "dis", "faulthandler", "gc", "importlib", "imp", "inspect", "linecache", "marshal",
          "multiprocessing", "nbformat", "nbgrader", "pdb", "pkgutil", "pty", "runpy", "signal", "_signal", "socket", "subprocess", "_thread", "threading",
          "timeit", "traceback", "transformers", "zipimport"}  # fmt: skip
LATE = ("matplotlib.pyplot", "scipy.optimize", "scipy.special", "scipy.stats")  # they need open doors to load: loaded before the fork, if a cell names them
NO_BUILTINS = ("eval", "exec", "compile", "breakpoint", "input")


class Tampered(Exception):
    """The answer changed what the tests stand on."""


# ---------------------------------------------------------------- server
def serve() -> None:
    """One JSON job a line from stdin, one JSON verdict a line to stdout."""
    import torch

    torch.set_num_threads(1)  # and no thread pool, which a fork would not survive
    import numpy.testing  # noqa: F401
    import torch.testing  # noqa: F401

    for m in pkgutil.walk_packages([str(PACKAGE)], "minillama."):  # its source is out of reach later, lazy imports included
        if not m.name.startswith(("minillama.course.", "minillama.__main__")):
            importlib.import_module(m.name)
    x = torch.nn.Parameter(torch.ones(2))  # what torch loads on first use
    torch.testing.assert_close(x, x)
    (x * x).sum().backward()
    torch.optim.AdamW([x]).step()
    torch.vmap(torch.sin)(x)
    linecache.clearcache()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict) -> dict:
    """Fork a child for one task; its verdict, or what became of it."""
    for name in LATE:
        if name.split(".")[0] in "".join((*job["answer"], *job["before"], job["tests"])):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    scratch = tempfile.mkdtemp(prefix="grade-")
    nonce = secrets.token_hex(16)
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, scratch, nonce, w)  # never returns
    os.close(w)
    data, deadline, late = b"", time.monotonic() + job["seconds"], False
    while len(data) < REPORT_BYTES:
        late = not select.select([r], [], [], max(0.0, deadline - time.monotonic()))[0]
        chunk = b"" if late else os.read(r, REPORT_BYTES)
        if not chunk:
            break
        data += chunk
    os.close(r)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    if late:
        return {"kind": "time", "why": f"took longer than {job['seconds']:g} s"}
    head, _, body = data.partition(b"\n")
    if secrets.compare_digest(head, nonce.encode()):
        kind, _, why = body.decode("utf-8", "replace").partition("\n")
        return {"kind": kind, "why": why}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == getattr(signal, "SIGXCPU", 24):
        return {"kind": "time", "why": f"took longer than {job['seconds']:g} s"}
    return {"kind": "died", "why": "the process ended before the tests did" + (f" (signal {os.WTERMSIG(status)})" if os.WIFSIGNALED(status) else "")}


# ---------------------------------------------------------------- child
def child(job: dict, scratch: str, nonce: str, w: int) -> None:
    leave = os._exit
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        keep = os.dup2(w, 3) if w != 3 else 3
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(4, 4096)
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
        os.chdir(scratch)
        tempfile.tempdir = os.environ["TMPDIR"] = scratch
        write = os.write  # the verdict passes through nothing that an answer can replace
        try:
            kind, why = judge(job, scratch)
        except BaseException as e:
            kind, why = "died", f"the grader stumbled: {type(e).__name__}"
        write(keep, f"{nonce}\n{kind}\n{why[:1000]}".encode("utf-8", "replace"))
    finally:
        leave(0)


def judge(job: dict, scratch: str) -> tuple[str, str]:
    """(ok | visible | hidden | answer | tampered | unit, why). What is called after the answer ran was looked up before."""
    limit(job)
    cell: dict = {"__name__": "__main__", "__builtins__": builtins, "display": lambda *a, **k: None}
    try:
        withhold(job["withheld"])
        for source in job["before"]:
            exec(compile(magic(source), UNIT, "exec"), cell)
        tests = ast.parse(magic(job["tests"]), TESTS)
        between = [ast.parse(magic(s), UNIT) for s in job["between"]]
        for tree in (*between, tests):
            hoist(tree, cell)
        student = {k: v for k, v in cell.items() if not k.startswith("__")} | {"__name__": "__main__"}
        memo: dict = {}
        for k, v in student.items():  # data is the student's own copy; functions and classes are shared, so that isinstance holds
            if not isinstance(v, (ModuleType, type, FunctionType, BuiltinFunctionType)):
                with contextlib.suppress(Exception):
                    student[k] = copy.deepcopy(v, memo)
        student["__builtins__"] = guarded(job["allowed"])
        names, hidden, why, where, kinds = list(job["names"]), list(job["hidden"]), describe, frames, (Tampered, BaseException)
        answers = [magic(source) for source in job["answer"]]
        codes = [compile(tree, UNIT, "exec") for tree in between]
        arm = lock(scratch, job["readable"])
        plain, deep, called, intact, take = watcher(cell)
        blanks = [dict(cell), dict(cell)]
        test, *canaries = bind(tests, [cell, *blanks], set(names), plain, called, deep)
        check, run = must_fail, exec
        intact()
        arm()
    except BaseException as e:
        return "unit", f"the unit's own cells fail: {describe(e)}"
    try:
        for source in answers:
            run(compile(source, ANSWER, "exec"), student)
        intact()
    except kinds[0] as e:
        return "tampered", str(e)
    except kinds[1] as e:
        return "answer", why(e)
    try:
        for name in names:
            if name in student:
                cell[name] = deep(student[name])
            else:
                cell.pop(name, None)
        for code in codes:
            run(code, cell)
        take(cell)
        test()
        intact()
        for blank in blanks:
            blank.update(cell)
        check(canaries, blanks, names, take)
        return "ok", ""
    except kinds[0] as e:
        return "tampered", str(e)
    except kinds[1] as e:
        line = next((n for f, n in where(e) if f == TESTS), 0)
        kept = not line or any(a <= line <= b for a, b in hidden)
        return ("hidden", "") if kept else ("visible", why(e))


def must_fail(canaries: list, blanks: list[dict], names: list[str], take) -> None:
    """In the same process and after the same calls: an answer that does nothing, `assert False`, and comparisons that are false."""

    def blank(*args, **kwargs):
        raise NotImplementedError

    for test, cell, stub in zip(canaries, blanks, (blank, lambda *a, **k: None), strict=True):
        cell.update({n: stub if callable(cell.get(n)) else None for n in names})
        take(cell)
        if passes(test):
            raise Tampered("the tests pass without the answer, too")
    for source in ("assert False", *(f"assert {c}" for c in CANARIES)):
        ns: dict = {}
        exec("import math, operator, torch, numpy as np", ns)
        if passes(lambda s=source, ns=ns: exec(compile(s, TESTS, "exec"), ns)):
            raise Tampered(f"`{source}` passes after the answer ran")


CANARIES = """abs(-1) != 1; all([True, False]); any([False]); isinstance(1, str); len([1]) == 2; max(1, 2) == 1; sum([1]) == 2; round(0.4) == 1; float(1) == 2.0
math.isclose(1.0, 2.0); operator.eq(1, 2); np.allclose([0.0], [1.0]); np.array_equal([0], [1]); np.testing.assert_allclose([0.0], [1.0]) is None
torch.allclose(torch.zeros(3), torch.ones(3)); torch.equal(torch.zeros(3), torch.ones(3)); torch.isclose(torch.zeros(1), torch.ones(1)).item()
(torch.zeros(3) == torch.ones(3)).any(); (torch.zeros(2) - torch.ones(2)).abs().max() < 0.5; torch.testing.assert_close(torch.zeros(3), torch.ones(3)) is None
torch.nn.functional.mse_loss(torch.zeros(2), torch.ones(2)).item() == 0""".replace("\n", "; ").split("; ")


def passes(test) -> bool:
    try:
        test()
    except BaseException:
        return False
    return True


# ---------------------------------------------------------------- limits and doors
def limit(job: dict) -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):  # virtual memory: what the preloaded process maps already, and so much more
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + int(job["gigabytes"] * 1e9),) * 2)
    for what, value in (("CPU", math.ceil(job["seconds"]) + 1), ("FSIZE", 1 << 27), ("CORE", 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (value, value))


def withhold(names: list[str]) -> None:
    """Remove objects from the package, under every name that they have there, and empty what still refers to them."""
    for full in names:
        parts = full.split(".")
        depth = max(i for i in range(1, len(parts)) if ".".join(parts[:i]) in sys.modules)
        owner = sys.modules[".".join(parts[:depth])]
        for part in parts[depth:-1]:
            owner = getattr(owner, part)
        thing = getattr(owner, parts[-1])
        delattr(owner, parts[-1])
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "minillama":
                for key in [k for k, v in vars(module).items() if v is thing]:
                    delattr(module, key)
        thing = getattr(thing, "__wrapped__", thing)
        if isinstance(thing, FunctionType) and not thing.__code__.co_freevars:
            thing.__code__ = _withheld.__code__
        elif isinstance(thing, type):
            for key in [k for k, v in vars(thing).items() if isinstance(v, (FunctionType, staticmethod, classmethod, property))]:
                delattr(thing, key)
    gc.collect()


def _withheld(*args, **kwargs):
    raise NotImplementedError("withheld: this is the exercise")


def guarded(allowed: list[str]) -> dict:
    """Builtins of the student's own: nothing that runs text, no import of what would be the answer or a way around the grader."""
    own = {k: v for k, v in vars(builtins).items() if k not in NO_BUILTINS}
    real = builtins.__import__

    def __import__(name, globals=None, locals=None, fromlist=(), level=0):
        top = name.split(".")[0]
        ours = top == "minillama" and not (set(f"{name}.{f}" for f in fromlist) if fromlist else {name}) <= set(allowed)
        if top in BANNED or ours:
            raise ImportError(f"an answer may not import {name}")
        return real(name, globals, locals, fromlist, level)

    own["__import__"] = __import__
    return own


WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr",
          "os.removexattr", "os.lockf", "os.chflags", "tempfile.mkstemp", "tempfile.mkdtemp")  # fmt: skip
READS = ("os.listdir", "os.scandir", "os.chdir", "sqlite3.connect")
NEVER = ("subprocess.", "socket.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.startfile",
         "pty.", "gc.", "sys.set", "sys.addaudithook", "sys.monitoring", "sys._current", "_thread.start", "signal.", "resource.setrlimit", "cpython.run",
         "cpython._PySys", "fcntl.", "syslog.", "urllib.", "ftplib.", "smtplib.", "http.", "mmap.", "webbrowser.")  # fmt: skip
SECRETS = ("__code__", "__defaults__", "__kwdefaults__", "tb_frame", "gi_frame", "gi_code", "cr_frame", "cr_code", "ag_frame", "ag_code", "__bases__")
HOLES = {  # what would get around the hook
    "signal": ("signal", "setitimer", "alarm", "pthread_kill", "set_wakeup_fd"), "_signal": ("signal", "setitimer", "alarm", "pthread_kill", "set_wakeup_fd"),
    "torch": ("from_file",), "torch._C": ("_dispatch_library",), "faulthandler": ("register",),
    "os": ("pipe2", "fchdir", "memfd_create"),
}  # fmt: skip


def lock(scratch: str, readable: list[str]):
    """Close the doors; the function that it returns shuts the last one, the audit hook. From then on: read libraries and runs/, write into the scratch folder,
    no network, no processes, no frames, no code objects."""
    paths = sysconfig.get_paths()
    lib = [paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")] + [os.path.join(sys.base_prefix, "lib")]
    system = "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /usr/share/fonts /usr/share/zoneinfo /etc/fonts /etc/ld.so.cache /etc/localtime /dev/null"
    system += " /dev/zero /dev/urandom /proc/cpuinfo /proc/meminfo"
    roots = [r for p in dict.fromkeys(os.path.realpath(p) for p in (*lib, *system.split(), *readable)) if os.path.exists(p) for r in trees(p)]
    scratch = os.path.realpath(scratch)
    landlock(roots, scratch)
    for module, names in HOLES.items():
        for name in names:
            if hasattr(sys.modules.get(module), name):
                delattr(sys.modules[module], name)
    for module in (ctypes, sys.modules["_ctypes"]):  # it writes memory
        for name in [k for k in vars(module) if not k.startswith("__")]:
            delattr(module, name)
    gc.collect()
    std = os.path.dirname(os.__file__)
    makers = {os.path.join(std, f) for f in ("collections/__init__.py", "dataclasses.py", "enum.py", "typing.py", "abc.py", "functools.py")}
    makers.add(getattr(sys.modules.get("typing_extensions"), "__file__", ""))
    loaders = {"<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"}
    signature, log, stack, me = (os.path.join(std, f) for f in ("inspect.py", "logging/__init__.py", "traceback.py", __file__))
    getframe, realpath, isdir, fspath, fsdecode, sep = sys._getframe, os.path.realpath, os.path.isdir, os.fspath, os.fsdecode, os.sep
    # an answer may replace any global or builtin while it runs: none is looked up below
    reads, writes, never, hidden, deny, any_, isa, integer, text = READS, WRITES, NEVER, SECRETS, PermissionError, any, isinstance, int, str
    ofcode = ("__code__", "__defaults__", "__kwdefaults__", "__bases__")
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path, places):
        for p in places:
            if path == p or path.startswith(p + sep):
                return True
        return False

    def rules(event, args):
        if event == "open" or event in reads or event in writes:
            path = args[0] if args else None
            if path is None or isa(path, integer):  # the working folder, or what is open already
                return
            path = fsdecode(fspath(path))
            change = event in writes
            if event == "open":
                mode = args[1]
                change = any_([c in mode for c in "wax+"]) if isa(mode, text) else (args[2] or 0) & changing
                if mode is None and isdir(path) and not within(realpath(path), [scratch]):
                    raise deny(f"an answer may not open the folder {path}")
            two = event in ("os.rename", "os.link", "os.symlink")
            for t in (realpath(path), realpath(fsdecode(args[1]))) if two else (realpath(path),):
                if not within(t, [scratch] if change and t != "/dev/null" else [scratch, *roots]):
                    raise deny(f"an answer may not {'write' if change else 'read'} {path}")
        elif event in ("object.__getattr__", "object.__setattr__", "object.__delattr__"):
            if args[1] in hidden:
                f = getframe(2).f_code.co_filename
                if f != me and not ((f in makers or (f == signature and event == "object.__getattr__")) and args[1] in ofcode):
                    raise deny(f"an answer may not touch {args[1]}")
        elif event in ("sys._getframe", "sys._getframemodulename"):
            f = getframe(2)
            name = f.f_code.co_filename
            if not (name == me or name in makers or (name == log and f.f_back.f_code.co_filename == log)
                    or (name == stack and f.f_code.co_name in ("extract_stack", "format_stack"))):  # torch.manual_seed does; it yields text only
                raise deny("an answer may not look at frames")
        elif event in ("compile", "exec", "code.__new__", "function.__new__"):
            name = getframe(2).f_code.co_filename
            if not (name == me or name in makers or name in loaders):
                raise deny("an answer may not run text as code")
        elif event.startswith(never):
            raise deny(f"an answer may not use {event}")

    busy = []  # looking at a frame is an event, too

    def hook(event, args):
        if not busy:
            busy.append(event)
            try:
                rules(event, args)
            finally:
                busy.clear()

    return lambda: sys.addaudithook(hook)


def trees(root: str) -> list[str]:
    """The folder, or, where the package lies in it, everything beside the package."""
    package = str(PACKAGE)
    if package != root and not package.startswith(root + os.sep):
        return [root] if not root.startswith(package) else []
    return [] if package == root else [t for name in os.listdir(root) for t in trees(os.path.join(root, name))]


def landlock(roots: list[str], scratch: str) -> None:
    """The kernel's own file and TCP rules for this process (Linux 5.13 or newer); where there are none, the audit hook stands alone."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    everything = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attr = (ctypes.c_uint64 * 3)(everything, 3, 3)  # files; TCP bind and connect; abstract sockets and signals to others
    ruleset = libc.syscall(444, ctypes.byref(attr), ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24), 0)
    if ruleset < 0:
        return
    for path in [*roots, scratch]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = everything if path == scratch else 0b1100 if os.path.isdir(path) else 0b110 if path.startswith("/dev/") else 0b100  # read; write devices
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        libc.syscall(445, ruleset, 1, ctypes.c_char_p(rule), 0)
        os.close(fd)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    libc.syscall(446, ruleset, 0)
    os.close(ruleset)


# ---------------------------------------------------------------- watching
SUSPECT = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__abs__", "__sub__", "__rsub__", "__float__", "__int__", "__index__",
           "__class__", "__array__", "__array_ufunc__", "__array_function__", "__torch_function__", "__torch_dispatch__", "__instancecheck__",
           "__getattribute__")  # fmt: skip
WATCHED = ("builtins", "math", "operator", "random", "statistics", "functools", "itertools", "torch", "torch._tensor", "torch.functional",
           "torch.nn.functional", "torch.linalg", "torch.special", "torch.autograd", "torch.testing", "torch.testing._comparison", "numpy", "numpy.linalg",
           "numpy.testing", "numpy.testing._private.utils", "numpy._core.numeric", "numpy.core.numeric", "einops")  # fmt: skip


def watcher(cell: dict):
    """(plain, deep, called, intact, take): what the tests stand on, as it is now, before the answer runs. All of it in closures, out of an answer's reach."""
    import torch

    modules = {n: m for n, m in list(sys.modules.items()) if n in WATCHED or n.split(".")[0] == "minillama"}
    classes = {c for c in cell.values() if isinstance(c, type) and not hasattr(builtins, c.__name__)} | {torch.Tensor, torch.nn.Module, torch.nn.Parameter}
    spaces = []  # (name, namespace, keys, values)
    for name, space in [*((n, vars(m)) for n, m in modules.items()), *((c.__name__, vars(c)) for c in classes)]:
        keys = [k for k, v in space.items() if callable(v) or isinstance(v, (float, torch.dtype, property))]
        spaces.append((name, space, keys, [space[k] for k in keys]))
    shadows = [(n, vars(m), set(vars(builtins)) - set(vars(m))) for n, m in modules.items() if n != "builtins"]
    shadows += [(c.__name__, vars(c), set(dir(c)) - set(vars(c))) for c in classes]
    counts = [f for f in (getattr(torch._C, n, None) for n in ("_len_torch_function_stack", "_len_torch_dispatch_stack")) if f]
    counts += [v.__len__ for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global_") and isinstance(v, dict)]
    depth = [f() for f in counts]
    known, stack = {object}, [object]
    while stack:
        new = set(type.__subclasses__(stack.pop())) - known
        known |= new
        stack += new
    every, each, same, kind_of, function, bad, suspect, mine = all, map, operator.is_, type, FunctionType, Tampered, SUSPECT, ANSWER
    containers, mro, members = (list, tuple, set, frozenset), type.__dict__["__mro__"].__get__, type.__dict__["__dict__"].__get__
    unit: list = []

    def take(cell):
        """Watch the tests' own namespace, too."""
        keys = [k for k in cell if k != "__builtins__"]
        unit[:] = [("the unit's cells", cell, keys, [cell[k] for k in keys])]

    def intact():
        """Raise Tampered if a function was replaced: 0.2 ms."""
        for name, space, keys, values in (*spaces, *unit):
            if not every(each(same, each(space.get, keys), values)):
                changed = [k for k, v in zip(keys, values, strict=True) if space.get(k) is not v]
                raise bad(f"the answer changed {name}.{changed[0]}")
        for name, space, free in shadows:
            if not free.isdisjoint(space):
                raise bad(f"the answer put a {[k for k in space if k in free][0]} of its own into {name}")
        if [f() for f in counts] != depth:
            raise bad("the answer left a torch mode or a global hook on")

    def plain(x):
        """x, if comparisons with it are honest: no class of the student's own decides what equals what."""
        kind = kind_of(x)
        if kind not in known:
            if kind_of(kind) not in known:
                raise bad("an answer's class may not have a metaclass of its own")
            for c in mro(kind):
                for name in () if c in known else suspect:
                    f = members(c).get(name)
                    if f is not None and not (kind_of(f) is function and f.__code__.co_filename != mine):
                        raise bad(f"the answer returned an object that decides its own comparisons ({name})")
        return x

    def deep(x):
        plain(x)
        if kind_of(x) in containers:
            for item in x:
                deep(item)
        elif kind_of(x) is dict:
            for k in x:
                plain(k)
                deep(x[k])
        return x

    def called(x):
        intact()
        return deep(x)

    return plain, deep, called, intact, take


# ---------------------------------------------------------------- tests
def magic(source: str) -> str:
    """Lines of IPython (%magic, !shell, ?help) do nothing here. Text that is Python stays as it is."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        ast.parse(source)
        return source
    out = []
    for line in source.split("\n"):
        s = line.lstrip()
        out.append(line[: len(line) - len(s)] + "pass" if s[:1] in ("%", "!", "?") or (s.endswith("?") and s.rstrip("?").isidentifier()) else line)
    return "\n".join(out)


def hoist(tree: ast.Module, cell: dict) -> None:
    """Run the imports of a cell now, before the answer can stand in their way."""
    for node in [n for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)]:
        for i, s in enumerate(node.body):
            if isinstance(s, (ast.Import, ast.ImportFrom)):
                with contextlib.suppress(ImportError):
                    exec(compile(ast.Module([s], []), UNIT, "exec"), cell)
                    node.body[i] = ast.copy_location(ast.Pass(), s)


def bind(tree: ast.Module, cells: list[dict], answers: set[str], plain, called, deep) -> list[FunctionType]:
    """The tests as a function, one for each namespace: functions and classes known now are constants of its code; each value is looked at first."""
    cell = cells[0]
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    stored |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name}
    things: list = [plain, called, deep]

    def constant(thing, at):
        things.append(thing)
        return ast.copy_location(ast.Constant(f"\0{len(things) - 1}"), at)

    def wrap(which, node):
        return ast.copy_location(ast.Call(ast.copy_location(ast.Constant(f"\0{which}"), node), [node], []), node)

    def known(node):
        """The module, function or class that a dotted name meant before the answer ran, or None."""
        if isinstance(node, ast.Name) and node.id not in stored | answers:
            found = cell.get(node.id, getattr(builtins, node.id, None) if node.id not in ("super", "locals", "globals", "vars", "dir") else None)
        elif isinstance(node, ast.Attribute) and isinstance(owner := known(node.value), ModuleType):
            found = getattr(owner, node.attr, None)
        else:
            return None
        return found if isinstance(found, (ModuleType, FunctionType, BuiltinFunctionType, type)) or callable(found) else None

    class Bind(ast.NodeTransformer):
        def visit_Name(self, node, wrapped=True):
            if not isinstance(node.ctx, ast.Load) or node.id == "super":
                return node
            thing = known(node)
            return constant(thing, node) if thing is not None and not isinstance(thing, ModuleType) else wrap(0, node) if wrapped else node

        def visit_Attribute(self, node, wrapped=True):
            thing = known(node) if isinstance(node.ctx, ast.Load) else None
            if thing is not None and not isinstance(thing, ModuleType):
                return constant(thing, node)
            self.generic_visit(node)
            return wrap(0, node) if wrapped and isinstance(node.ctx, ast.Load) else node

        def visit_Call(self, node):
            func = node.func
            bare = {ast.Name: self.visit_Name, ast.Attribute: self.visit_Attribute}.get(type(func))
            node.func = bare(func, False) if bare else self.visit(func)
            node.args, node.keywords = [self.visit(a) for a in node.args], [self.visit(k) for k in node.keywords]
            return node if isinstance(func, ast.Name) and func.id == "super" else wrap(1, node)

        def visit_Subscript(self, node):
            self.generic_visit(node)
            return wrap(0, node) if isinstance(node.ctx, ast.Load) else node

        def visit_Compare(self, node):
            self.generic_visit(node)
            node.left, node.comparators = wrap(2, node.left), [wrap(2, c) for c in node.comparators]
            return node

    tree = Bind().visit(tree)
    old = [n for n in sorted(stored) if n in cell and n not in answers]
    body = ast.parse("def tests(" + ", ".join(f"{n}=None" for n in old) + "): pass").body[0]
    body.body = [*tree.body, ast.Pass()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = compile(ast.fix_missing_locations(ast.Module([body], [])), TESTS, "exec")
    code = next(c for c in code.co_consts if isinstance(c, CodeType))
    code = put(code, things)
    return [FunctionType(code, c, "tests", tuple(cell[n] for n in old)) for c in cells]


def put(const, things: list):
    """A code object with its placeholders replaced by the things that they stand for."""
    if isinstance(const, CodeType):
        return const.replace(co_consts=tuple(put(c, things) for c in const.co_consts))
    if isinstance(const, (tuple, frozenset)):
        return type(const)(put(c, things) for c in const)
    return things[int(const[1:])] if isinstance(const, str) and const[:1] == "\0" else const


def frames(e: BaseException) -> list[tuple[str, int]]:
    found, tb = [], e.__traceback__
    while tb is not None:
        found.append((tb.tb_frame.f_code.co_filename, tb.tb_lineno))
        tb = tb.tb_next
    return found


def describe(e: BaseException) -> str:
    """One line: the assertion's words, or the error and where in the answer it was raised."""
    try:
        text = " ".join(str(e).split())
    except BaseException:
        text = ""
    line = next((n for f, n in reversed(frames(e)) if f == ANSWER), 0)
    if isinstance(e, MemoryError) or "can't allocate memory" in text:
        text, e = "it needs more memory than a task may have", MemoryError()
    if isinstance(e, AssertionError) and not line:
        return text or "an assertion of the tests does not hold"
    if isinstance(e, NotImplementedError) and not text:
        return "not attempted (NotImplementedError)"
    return f"{type(e).__name__}{': ' + text if text else ''}{f' (line {line} of the answer)' if line else ''}"
