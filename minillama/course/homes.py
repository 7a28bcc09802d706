"""Where each public definition is taught: one home chapter, which mirrors it. `minillama course check` holds chapters to this table."""
from __future__ import annotations

import ast
from pathlib import Path

MODULES = {  # module -> number of the home chapter of its public classes and functions
    "tokenizer": "01", "model": "05", "checkpoint": "05", "generate": "06", "data/sources": "07", "data/clean": "07", "data/pack": "07",
    "trainer": "08", "pretrain": "08", "evaluation/perplexity": "11", "evaluation/tinyworld": "11", "chat": "12", "sft": "12", "gatt": "13",
    "parallel/mesh": "09", "parallel/shard": "09", "parallel/state": "09", "parallel/plan": "10", "parallel/dryrun": "10", "parallel/launch": "10",
    "reward": "14", "data/preferences": "14", "rejection": "15", "ppo": "16", "safety": "17", "evaluation/alignment": "18", "evaluation/stats": "18",
}  # fmt: skip
SYMBOLS = {  # definitions that are taught elsewhere than the rest of their module
    "model": {"RMSNorm": "02", "FeedForward": "02", "rope_table": "03", "apply_rope": "03", "Attention": "04", "attention_in_blocks": "04", "KVCache": "06",
              "next_token_loss": "08", "document_mask": "08"},
    "config": {"TokenizerConfig": "01", "LlamaConfig": "05", "GenerateConfig": "06", "ParallelConfig": "09", "TrainConfig": "08", "PretrainConfig": "08",
               "SFTConfig": "12", "GAttConfig": "13", "RewardConfig": "14", "RejectConfig": "15", "PPOConfig": "16", "SafetyConfig": "17"},
}  # fmt: skip
TOOLS = {"__init__", "__main__", "_decode", "_files", "_huggingface", "align", "cli", "demo", "report", "course",  # taught nowhere
         "data/world", "data/gold", "data/hazards"}  # fmt: skip
NO_HOME = {"config": {"DemoConfig"}, "parallel/mesh": {"absent"}}


def module_name(path: Path, package: Path) -> str:
    """"data/clean" for minillama/data/clean.py, "course" for anything in minillama/course."""
    parts = path.relative_to(package).with_suffix("").parts
    return "course" if parts[0] == "course" else "/".join(parts if parts[-1] != "__init__" or len(parts) == 1 else ("__init__",))


def homes(package: Path) -> dict[tuple[str, str], str]:
    """{(module, name): number of its home chapter} of the package's public classes and functions. Raises ValueError for a module or name without one."""
    table = {}
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        if module in TOOLS:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_") or node.name in NO_HOME.get(module, ()):
                continue
            home = SYMBOLS.get(module, {}).get(node.name) or MODULES.get(module)
            if home is None:
                raise ValueError(f"minillama/{module}.py: {node.name} has no home chapter; add it to minillama/course/homes.py")
            table[module, node.name] = home
    return table
