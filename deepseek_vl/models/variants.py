"""Tables of tower variants: published rows by name, any field of a row open to the config."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


def select_variant(table: dict[str, Row], model_name: str, **overrides: Any) -> Row:
    """The row `model_name` of `table`, a dict of dataclass instances, with the fields in `overrides` replaced.

    Raises:
        ValueError: for a name that is not in the table or an override that is not a field of its rows.
    """
    if model_name not in table:
        raise ValueError(f"Unknown vision tower {model_name!r}; known are {', '.join(table)}.")
    row = table[model_name]
    fields = [f.name for f in dataclasses.fields(row)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(
            f"Unknown key {', '.join(map(repr, unknown))} for vision tower {model_name!r}; "
            f"it takes {', '.join(fields)}."
        )
    return dataclasses.replace(row, **overrides)


def load_tower_checkpoint(tower: nn.Module, path: str, prefix: str = "") -> None:
    """Fill a tower from a weights file of its own (`ckpt_path` in the config), a `.safetensors` or a torch file.

    Keys in the file may carry `prefix`. The file may hold other parts or lack some, as a plain SAM file lacks the
    second neck: these are logged. Nothing is read while transformers builds the model on the meta device, because then
    the model's own checkpoint follows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file fills no parameter at all, or a shape differs.
    """
    if not path or any(parameter.is_meta for parameter in tower.parameters()):
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"No tower weights at {path!r} (ckpt_path).")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state_dict = load_file(path)
    else:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    own = tower.state_dict()
    if not own.keys() & state_dict.keys():
        raise ValueError(
            f"No key in {path!r} belongs to {type(tower).__name__}, which has {', '.join(list(own)[:3])}..."
        )
    mismatched = [key for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
    if mismatched:
        details = ", ".join(
            f"{key} {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the tower"
            for key in sorted(mismatched)[:5]
        )
        raise ValueError(f"{path!r} is for another size: {details}.")
    missing, unexpected = tower.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        logger.warning(
            "%s: %d keys missing (%s), %d unused (%s)", path, len(missing), missing, len(unexpected), unexpected
        )
