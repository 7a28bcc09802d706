"""minillama: Llama 2 and Llama 2-Chat, rebuilt from scratch, small enough for a laptop and complete enough for a cluster.

    from minillama import LlamaConfig, Llama, Tokenizer, generate, load, save

The names below load on first use, so that `import minillama` and `minillama info llama2-70b` never wait for torch.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "LlamaConfig": "config",
    "Llama": "model",
    "Tokenizer": "tokenizer",
    "load": "checkpoint",
    "save": "checkpoint",
}
__all__ = ["LlamaConfig", "Llama", "Tokenizer", "generate", "load", "save"]


def __getattr__(name: str):
    if name == "generate":  # a function and, by import, the submodule of the same name: the module is callable
        return import_module("minillama.generate")
    if name in _HOME:
        return getattr(import_module(f"minillama.{_HOME[name]}"), name)
    raise AttributeError(f"module 'minillama' has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
