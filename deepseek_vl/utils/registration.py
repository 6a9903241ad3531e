"""Has the models registered with transformers' Auto classes, without importing either before it is needed.

`import deepseek_vl` is to be cheap, and yet `AutoProcessor`, `AutoModelForImageTextToText` and `pipeline` are to know
its models afterwards. So `deepseek_vl.models`, which registers them, is imported right behind transformers.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

LIBRARY, MODELS = "transformers", "deepseek_vl.models"


class _Loader(importlib.abc.Loader):
    """A module's own loader, and what is to happen behind it."""

    def __init__(self, spec: ModuleSpec):
        self._spec = spec
        self._loader = spec.loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers, as the other finders do."""

    is_asking = False

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != LIBRARY or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_asking = False
        if spec is not None:
            spec.loader = _Loader(spec)
        return spec


def _register() -> None:
    """Import the models, unless a module of this package is being imported, which may stand in the way."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("deepseek_vl.")]
    if any(getattr(module.__spec__, "_initializing", False) for module in ours):
        return
    try:
        importlib.import_module(MODELS)
    except ImportError:  # transformers itself works without this package
        logger.warning("DeepSeek-VL's models cannot be registered with transformers.", exc_info=True)


def register_with_transformers() -> None:
    """Register the models as soon as transformers is imported, or now if it is."""
    if LIBRARY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
