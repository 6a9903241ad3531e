"""DeepSeek-VL (arXiv 2403.05525) on today's PyTorch and transformers.

Importing the package is cheap: the network is imported on first use of one of its names, and registers itself with
transformers' Auto classes then.
"""

import importlib
from typing import Any

from deepseek_vl.checkpoints import attrdict_import  # noqa: F401  makes `from attrdict import AttrDict` work

__version__ = "2.0.0"

_EXPORTS = {
    "DeepseekVLConfig": "deepseek_vl.hf",
    "DeepseekVLForConditionalGeneration": "deepseek_vl.hf",
    "DeepseekVLImageProcessor": "deepseek_vl.hf",
    "DeepseekVLImageProcessorFast": "deepseek_vl.hf",
    "DeepseekVLModel": "deepseek_vl.hf",
    "DeepseekVLProcessor": "deepseek_vl.hf",
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
    importlib.import_module("deepseek_vl.models")  # registers the classes
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
