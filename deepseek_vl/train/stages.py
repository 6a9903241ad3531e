"""What learns in each stage of the paper, and at which rate (section 3.3 and its table of hyperparameters)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

PARTS: dict[str, tuple[str, ...]] = {
    "sam": ("vision_model.vision_tower_high.",),
    "siglip": ("vision_model.vision_tower_low.", "vision_model.vision_tower."),
    "projector": ("aligner.",),
    "language": ("language_model.",),
}
"""The model's parts, and what their parameters' names begin with."""

NEVER_USED = ("attn_pool.", "high_layer_norm.", "low_layer_norm.")
"""Parts of the names of weights that the published checkpoints have and no forward pass uses: they get no gradient."""


@dataclass(frozen=True)
class Stage:
    """A stage's parts that learn, its learning rate and warm-up (the 7B model's), and whether batches are packed."""

    parts: tuple[str, ...]
    learning_rate: float
    warmup_steps: int
    pack: bool


STAGES: dict[str, Stage] = {
    "adaptor": Stage(("projector",), 1e-3, 128, pack=False),
    "pretrain": Stage(("projector", "language"), 4.2e-5, 2000, pack=True),
    "sft": Stage(("siglip", "projector", "language"), 2e-5, 256, pack=False),
}


def part_of(name: str) -> str | None:
    """The part that a parameter belongs to; None for what the forward pass does not use."""
    if any(unused in name for unused in NEVER_USED):
        return None
    # LoRA's wrappers stand in front of the model's own names.
    for part, prefixes in PARTS.items():
        if any(name.startswith(prefix) or f".{prefix}" in name for prefix in prefixes):
            return part
    return None


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """The parts that a model has: all, or all but `sam`."""
    found = {part_of(name) for name, _ in model.named_parameters()}
    return tuple(part for part in PARTS if part in found)


def set_trainable(model: nn.Module, parts: Iterable[str]) -> None:
    """Make exactly these parts' parameters learn.

    Raises:
        ValueError: for an unknown part, one that this model lacks, or none.
    """
    parts = tuple(parts)
    has = parts_of(model)
    if not parts:
        raise ValueError(f"Nothing would learn; give at least one of the parts {', '.join(has)}.")
    for part in parts:
        if part not in has:
            raise ValueError(f"There is no part {part!r} to train; this model has {', '.join(has)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)


def parameter_groups(
    model: nn.Module, learning_rate: float, part_rates: Mapping[str, float], weight_decay: float
) -> list[dict]:
    """Groups for the optimizer: one per part and kind, since vectors (norms, biases) are not decayed.

    Args:
        learning_rate: of every part that `part_rates` does not name.
        part_rates: other rates, by part.
    """
    groups: dict[tuple[str | None, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decayed = part_of(name), parameter.ndim > 1
        group = {"params": [], "lr": part_rates.get(part, learning_rate), "weight_decay": weight_decay * decayed}
        groups.setdefault((part, decayed), group)["params"].append(parameter)
    return list(groups.values())
