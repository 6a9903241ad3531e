"""LoRA: which layers get adapters, and merging them into the weights for export."""

import argparse
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from deepseek_vl.checkpoints.read import checkpoint_dtype
from deepseek_vl.checkpoints.write import appearing_whole
from deepseek_vl.command_line import OneLineParser, run_command
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.train.stages import PARTS, parts_of
from deepseek_vl.utils.io import errors_that_name, load_pretrained_model

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

LAYERS: dict[str, str] = {
    "sam": r"vision_tower\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])",
    "siglip": r"(vision_tower\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
    "projector": r"((high_up_proj|low_up_proj)|layers(\.\d+)?)",
    "language": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
"""Patterns of the linear layers that get an adapter: their names in each part, after the part's prefix."""


def add_lora(
    model: MultiModalityCausalLM, parts: Iterable[str], rank: int = 16, alpha: int = 32, dropout: float = 0.05
) -> "PeftModel":
    """Freeze the model and put adapters on the linear layers of some parts.

    Args:
        parts: of `PARTS`.
        rank: LoRA's rank (arXiv 2106.09685).
        alpha: an adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an adapter's input while training.

    Raises:
        ValueError: for a part that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    parts = tuple(parts)
    for part in parts:
        if part not in parts_of(model):
            raise ValueError(f"There is no part {part!r} to adapt; this model has {', '.join(parts_of(model))}.")
    patterns = [re.escape(prefix) + LAYERS[part] for part in parts for prefix in PARTS[part]]
    targets = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(re.fullmatch(pattern, name) for pattern in patterns)
    )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def note_base(adapted: "PeftModel", model_path: str, output: Path) -> None:
    """Record an adapter's base model: a name as it is, a directory relative to `output`, where the adapter is saved."""
    base = Path(os.path.relpath(model_path, output)).as_posix() if Path(model_path).is_dir() else model_path
    model: Any = adapted.get_base_model()
    model.name_or_path = model.config.name_or_path = base  # what peft's model cards have
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = base


def find_base(adapter: Path) -> str:
    """The base model of an adapter, or of a checkpoint of its training: an existing directory, or the recorded name.

    Raises:
        ValueError: if none is recorded.
    """
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise ValueError(f"The adapter {str(adapter)!r} does not say which model it belongs to; give --model_path.")
    places = (adapter / name, adapter.parent / name)
    return next((str(place) for place in places if (place / "config.json").is_file()), name)


def write_card(adapter: Path, rows: int, steps: int) -> None:
    """Replace the model card that peft writes, which is a form to be filled in.

    Args:
        adapter: directory of a saved adapter.
        rows: how many conversations it was trained on.
        steps: for how many optimizer steps.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter))
    # The config may name several layers by one pattern.
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = [name.removeprefix("base_model.model.") for name in weights if ".lora_A." in name]
    parts = ", ".join(part for part in PARTS if any(layer.startswith(PARTS[part]) for layer in layers))
    base = config.base_model_name_or_path
    text = _CARD.format(base=base, rank=config.r, parts=parts, layers=len(layers), rows=rows, steps=steps)
    (adapter / "README.md").write_text(text, encoding="utf-8")


_CARD = """\
---
base_model: "{base}"
library_name: peft
pipeline_tag: image-text-to-text
tags:
- deepseek-vl
- lora
---
# A LoRA adapter for DeepSeek-VL

The weights in this directory are no model. They are adapters of rank {rank} for {layers} linear layers ({parts}) of the
DeepSeek-VL checkpoint `{base}`, trained on {rows} conversations for {steps} steps.

Merge them into a checkpoint of its own:

    python -m deepseek_vl.train.lora --adapter THIS_DIRECTORY --output NEW_DIRECTORY

or load them over the base model:

    from deepseek_vl.utils.io import load_pretrained_model
    from peft import PeftModel

    tokenizer, processor, model = load_pretrained_model("BASE")
    model = PeftModel.from_pretrained(model, "THIS_DIRECTORY")
"""


def merge(adapter: Path, output: Path, model_path: str | None = None) -> None:
    """Merge an adapter into the model it was trained on, and write the resulting checkpoint.

    Args:
        adapter: directory that training with LoRA wrote.
        output: where the checkpoint goes, in the published layout and the base model's dtype.
        model_path: the base model, if it is no longer where the adapter says.

    Raises:
        OSError: if the adapter or the base model is not there.
        ValueError: if they do not fit together.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{str(adapter)!r} is no LoRA adapter: it has no adapter_config.json.")
    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise FileNotFoundError(f"{str(adapter)!r} has no adapter_model.safetensors, the adapter's weights.")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{str(output)!r} is not empty; choose a new directory.")
    with errors_that_name(str(adapter), adapter):
        model_path = model_path or find_base(adapter)
    _, _, model = load_pretrained_model(model_path, device="cpu", dtype="float32")
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"The adapter {str(adapter)!r} does not fit {model_path!r}: {cause}") from error
    merged = adapted.merge_and_unload(safe_merge=True).to(checkpoint_dtype(model_path))
    with appearing_whole(output) as unfinished:
        merged.save_pretrained(unfinished)
        VLChatProcessor.from_pretrained(str(adapter)).save_pretrained(str(unfinished))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m deepseek_vl.train.lora`; returns the exit code."""
    parser = OneLineParser(prog="python -m deepseek_vl.train.lora", description="Merge a LoRA adapter for export.")
    parser.add_argument("--adapter", type=Path, required=True, help="directory that training with --lora wrote")
    parser.add_argument("--output", type=Path, required=True, help="new directory for the checkpoint")
    parser.add_argument("--model_path", help="the base model (default: where the adapter says it was)")

    def run(args: argparse.Namespace) -> None:
        merge(args.adapter, args.output, args.model_path)
        logger.info("Chat with it: python cli_chat.py --model_path %s", args.output)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
