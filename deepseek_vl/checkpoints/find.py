"""Where a checkpoint is: a directory, an id on the Hugging Face Hub, or the name of a bundled model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BUNDLED = Path(__file__).resolve().parents[1] / "bundled"
"""Has a directory for each model that comes with the package."""


def bundled_or_same(name_or_path: str | os.PathLike) -> str:
    """The directory of a bundled model for its name, unless there is a checkpoint directory of that name; any other
    path or Hub id as it is."""
    name = os.fspath(name_or_path)
    bundled = BUNDLED / name
    is_name = bundled.parent == BUNDLED and (bundled / "config.json").is_file()
    return str(bundled) if is_name and not (Path(name) / "config.json").is_file() else name


# The arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def hub_arguments_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a `from_pretrained`'s arguments that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def checkpoint_dtype(model_path: str | os.PathLike) -> torch.dtype:
    """The dtype that a checkpoint's config says its weights are stored in; float32 if it says nothing.

    Raises:
        OSError: if there is no such checkpoint.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(os.path.expanduser(bundled_or_same(model_path)))  # noqa: PTH111
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))
