"""Low-rank adapting language models to their sparse autoencoders.

The names of the main path are here, `from sae_lora import load_lm, splice, …`. Each is imported
from its module when it is first asked for, so `import sae_lora` loads no PyTorch.
"""

__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType

_HOME = {
    "load_lm": "lm",
    "load_sae": "formats",
    "splice": "splice",
    "add_lora": "lora",
    "fit_lora": "train",
    "fidelity": "metrics",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "token_blocks": "text",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "This package. Importing a module that is named as one of `__all__` does not hide that name."

    def __setattr__(self, name: str, value):
        # Python sets each imported submodule as an attribute of its package. `splice` is the name
        # of a module and of the function in it; of the package it stays the function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
