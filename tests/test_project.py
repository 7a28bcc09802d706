"""The project's own rules: layers of imports, agreement of environments, nothing private in the tree."""
import ast
import re
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"config"},
    {"_files", "tokenizer", "model", "chat"},
    {"generate", "_decode", "_huggingface", "checkpoint", "data", "parallel", "trainer"},
    {"pretrain", "sft", "gatt", "reward", "rejection", "ppo", "safety", "evaluation"},
    {"demo", "align", "report", "cli", "serve", "course", "__main__"},
]
ALLOWED = {("chat", "tokenizer"), ("checkpoint", "_huggingface"), ("generate", "_decode"), ("trainer", "checkpoint"), ("trainer", "parallel"),
           ("generate", "parallel"),
           ("checkpoint", "parallel"), ("parallel", "trainer"), ("parallel", "checkpoint"),  # a sharded checkpoint; a rehearsal of the trainer's step
           ("rejection", "sft"), ("rejection", "reward"), ("ppo", "reward"), ("gatt", "sft"), ("safety", "sft"), ("safety", "rejection"), ("safety", "reward"),
           ("evaluation", "reward"), ("evaluation", "gatt"), ("demo", "report"), ("demo", "align"), ("cli", "demo"), ("cli", "report"),
           ("course", "demo"), ("course", "cli"), ("__main__", "cli")}  # fmt: skip


def level(part: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if part in names)


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minillama"):
            tail = node.module.split(".")[1:]
            yield from ([tail] if tail else [[a.name] for a in node.names])
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("minillama."))


def test_imports_go_downward():
    """Guards against a stage that reaches for the demo, and a model that knows of the trainer."""
    seen = 0
    for path in (ROOT / "minillama").rglob("*.py"):
        me = path.relative_to(ROOT / "minillama").with_suffix("").parts[0]
        if me == "__init__":
            continue
        for other, *_ in imports(path):
            if other in ("__version__", me) or other in ("LlamaConfig",):
                continue
            seen += 1
            assert level(other) < level(me) or (me, other) in ALLOWED, f"{path.name} imports {other}"
    assert seen > 30


def test_only_evaluation_and_the_annotator_know_gold():
    """Guards against training that peeks at the gold standard."""
    for path in (ROOT / "minillama").rglob("*.py"):
        if any(i[:2] == ["data", "gold"] for i in imports(path)):
            assert path.parent.name == "evaluation" or path.name == "preferences.py", path


def test_environments_agree():
    """Guards against conda users who get other packages than pip users: environment.yml installs this project by the same constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {k.lower().replace("_", "-"): v for k, v in pins.items()}
    extras = project["optional-dependencies"]
    for need in [*project["dependencies"], *extras["test"], *extras["peers"], *extras["course"]]:
        name = re.match(r"[\w-]+", need).group().lower().replace("_", "-")
        assert name in pins, f"{name} has no pin in constraints.txt"
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert "-c constraints.txt" in pip and "-e .[test,peers,course]" in pip
    python = next(d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python="))
    low = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= low


def test_configs_are_complete():
    """Guards against a recipe with a key that no stage knows."""
    from minillama.align import train_config
    from minillama.config import LlamaConfig, SFTConfig, TrainConfig

    for path in (ROOT / "minillama" / "configs").glob("*.yaml"):
        c = yaml.safe_load(path.read_text())
        LlamaConfig.preset(c["preset"])
        TrainConfig(**c["pretrain"])
        SFTConfig(**train_config(c["sft"], 0, "cpu"))
