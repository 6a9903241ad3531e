"""DeepSeek-VL (arXiv 2403.05525) on today's PyTorch and transformers.

Importing the package is cheap: the network is imported on first use of one of its names.
``import deepseek_vl.models`` registers the model, its configuration and its processors with transformers' Auto classes.
"""

import importlib
from typing import Any

from deepseek_vl.utils import attrdict_import  # noqa: F401  makes `from attrdict import AttrDict` work on Python >= 3.10

__version__ = "2.0.0"

_EXPORTS = {
    "MultiModalityCausalLM": "deepseek_vl.models",
    "MultiModalityConfig": "deepseek_vl.models",
    "VLChatProcessor": "deepseek_vl.models",
    "VLMImageProcessor": "deepseek_vl.models",
    "load_pil_images": "deepseek_vl.utils.io",
    "load_pretrained_model": "deepseek_vl.utils.io",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
