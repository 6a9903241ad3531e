"""Rewriting a checkpoint in the other layout, tensor by tensor, and comparing every number.

What the new layout has no place for is kept in `other_layout`, so that converting back gives every file as it was.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig

from deepseek_vl.checkpoints import layout_configs as configs
from deepseek_vl.checkpoints.find import find_checkpoint, read_json
from deepseek_vl.checkpoints.names import (
    PLACES,
    REFERENCE,
    TRANSFORMERS,
    UNUSED,
    layout_of,
    other_layout,
    rename,
    unused_weights,
)
from deepseek_vl.checkpoints.read import unread_weights
from deepseek_vl.checkpoints.special_tokens import checkpoint_special_tokens, token_id_of
from deepseek_vl.checkpoints.tensors import Slice, dtype_of, shape_of
from deepseek_vl.checkpoints.write import INDEX, appearing_whole, bytes_of, write_shards

KEPT, KEPT_WEIGHTS = "other_layout", "unused.safetensors"
CONFIG, IMAGES, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
TOKENIZER, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
REWRITTEN = (CONFIG, IMAGES, PROCESSOR, TOKENIZER, GENERATION, TEMPLATE)
"""The files that differ between the layouts, besides the weights."""


@dataclass(frozen=True)
class Architecture:
    """What converting needs to know of the model.

    Attributes:
        weights: a config in the reference's layout -> the model's weights by name, on the meta device.
        tower_fields: see `configs.TowerFields`.
        chat_template: the Jinja template that goes with transformers' layout.
    """

    weights: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]
    tower_fields: configs.TowerFields
    chat_template: str


def convert(source: str | Path, destination: str | Path, layout: str, architecture: Architecture) -> int:
    """Write a checkpoint in another layout, and check that every number has arrived.

    Memory holds one shard at a time. `destination` appears when it is complete.

    Args:
        source: a checkpoint's directory, the name of a bundled model, or an id on the Hub.
        destination: a directory that does not exist yet.
        layout: `reference` or `transformers`.
        architecture: of the model.

    Returns:
        The number of the source's tensors.

    Raises:
        FileExistsError: if there is something at `destination`.
        OSError: if the source's files are missing or broken.
        ValueError: if the source is in this layout already, lacks weights, or has settings or weights that the layout
            has no place for; and if what was written is not what was read.
    """
    source, destination = Path(find_checkpoint(source)), Path(destination)
    check_places(source, destination)
    config = read_json(source / CONFIG)
    if configs.is_transformers(config) == (layout == TRANSFORMERS):
        raise ValueError(f"'{source}' is in the {layout} layout already.")

    settings = _settings(source, layout, architecture)
    in_reference = json.loads(settings[CONFIG]) if layout == REFERENCE else config
    files = weight_files(source)
    tensors = unread_weights(files)
    renamed = _renamed(source, architecture.weights(in_reference), tensors, layout)
    with appearing_whole(destination) as unfinished:
        (unfinished / KEPT).mkdir()
        write_shards(renamed, unfinished, max(file.stat().st_size for file in files))
        if left := {name: tensors[name][...] for name in UNUSED if name in tensors and layout == TRANSFORMERS}:
            save_file(left, unfinished / KEPT / KEPT_WEIGHTS, metadata={"format": "pt"})
        _write_files(source, unfinished, settings)
        _compare(tensors, unfinished)
    return len(tensors)


def check_places(source: Path, destination: Path) -> None:
    """Check that the source is a checkpoint, and that nothing is in the way at the destination.

    Raises:
        FileExistsError: if there is something at the destination.
        OSError: if the source is no checkpoint.
        ValueError: if the destination is inside the source.
    """
    if destination.exists():
        raise FileExistsError(f"There is something at '{destination}' already; choose another name, or delete it.")
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"'{destination}' is inside the checkpoint itself; choose a place outside.")
    if not read_json(source / CONFIG):
        raise OSError(f"'{source}' is no checkpoint: it has no {CONFIG}.")


WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights, or indices of such files; if there are several, transformers loads the first."""


def weight_files(directory: Path) -> list[Path]:
    """A checkpoint's files of weights, safetensors or torch's.

    Raises:
        OSError: if there are none, or one that the index names is missing.
    """
    name = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if name is None:
        raise OSError(f"'{directory}' has no weights: neither {' nor '.join(WEIGHTS)}.")
    is_index = name.endswith(".json")
    names = sorted(set(read_json(directory / name)["weight_map"].values())) if is_index else [name]
    files = [directory / name for name in names]
    for file in files:
        if not file.is_file():
            raise OSError(f"'{directory}' has no {file.name}, which its {name} names.")
    return files


def _renamed(
    source: Path, model: Mapping[str, torch.Tensor], tensors: Mapping[str, Slice], layout: str
) -> dict[str, Slice | torch.Tensor]:
    """The tensors in the given layout, checked to be complete and without extras.

    Raises:
        ValueError: if they are not those of the config's model.
    """
    found, left = rename(tensors, layout)
    renamed: dict[str, Slice | torch.Tensor] = {**found}
    here: Mapping[str, Slice | torch.Tensor] = tensors
    if layout == REFERENCE:
        kept = source / KEPT / KEPT_WEIGHTS
        kept = unread_weights([kept]) if kept.is_file() else {}
        here = renamed = {**renamed, **unused_weights(model, _dtype(tensors)), **kept}
    check_weights(source, model, here, left)
    return renamed


def check_weights(
    source: Path, model: Mapping[str, torch.Tensor], tensors: Mapping[str, Slice | torch.Tensor], left: Iterable[str]
) -> None:
    """Check that a checkpoint has a model's weights.

    Args:
        model: its weights, on the meta device.
        tensors: the checkpoint's, by the same names.
        left: the names of the checkpoint's unknown tensors.

    Raises:
        ValueError: naming what is missing, of another shape, or not known.
    """
    problems = {
        "missing": sorted(model.keys() - tensors.keys()),
        "of another shape": sorted(
            name for name in model.keys() & tensors.keys() if shape_of(tensors[name]) != list(model[name].shape)
        ),
        "not known": sorted(set(left) - set(UNUSED)),
    }
    if any(problems.values()):
        details = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise ValueError(f"The weights at '{source}' do not fit the config: {details}.")


def _dtype(tensors: Mapping[str, Slice | torch.Tensor]) -> torch.dtype:
    """The dtype of a checkpoint's smallest tensor, taken as that of all."""
    return dtype_of(min(tensors.values(), key=lambda tensor: math.prod(shape_of(tensor))))


def _write_files(source: Path, destination: Path, settings: Mapping[str, str]) -> None:
    """Write everything but the weights: what differs between the layouts, and the rest as it is."""
    weights = {*WEIGHTS, *(file.name for file in weight_files(source))}
    for path in source.iterdir():
        if path.name not in (*weights, *REWRITTEN, KEPT):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, destination / path.name)
    for name in _texts(source):
        shutil.copy2(source / name, destination / KEPT / name)
    for name, text in settings.items():
        (destination / name).write_bytes(text.encode())


def _settings(source: Path, layout: str, architecture: Architecture) -> dict[str, str]:
    """The contents of `REWRITTEN` in the other layout.

    Raises:
        ValueError: for a setting that the layout has no place for.
    """
    here, kept = _texts(source), _texts(source / KEPT)
    # The kept files are those that the present ones were made from, unless someone has changed them since.
    is_kept = bool(kept) and _rewritten(kept, other_layout(layout), source, architecture) == here
    return kept if is_kept else _rewritten(here, layout, source, architecture)


def _texts(directory: Path) -> dict[str, str]:
    """The contents of the `REWRITTEN` files that a directory has, by name."""
    return {name: (directory / name).read_bytes().decode() for name in REWRITTEN if (directory / name).is_file()}


def _rewritten(texts: Mapping[str, str], layout: str, source: Path, architecture: Architecture) -> dict[str, str]:
    """Convert the config files from the other layout to `layout`.

    Args:
        texts: the files' contents.
        layout: the wanted one.
        source: the checkpoint, for its tokenizer.
        architecture: of the model.

    Raises:
        ValueError: for a setting that the layout has no place for.
    """
    config, images, processor, tokenizer, generation = (
        json.loads(texts.get(name, "{}")) for name in (CONFIG, IMAGES, PROCESSOR, TOKENIZER, GENERATION)
    )
    images = images or processor.get("image_processor", {})
    num_image_tokens = processor.get("num_image_tokens", 576)
    language = config.get("language_config") or config.get("text_config") or {}
    tokens = checkpoint_special_tokens(source, LlamaConfig(**language))
    fields = architecture.tower_fields
    if layout == TRANSFORMERS:
        configs.require_transformers_processor(processor)
        new_images = configs.images_to_transformers(images, config)
        new: dict[str, Any] = {
            CONFIG: configs.to_transformers(config, images, token_id_of(configs.IMAGE_TAG, source), fields),
            IMAGES: new_images,
            PROCESSOR: {"num_image_tokens": num_image_tokens, "processor_class": new_images["processor_class"]},
            # The published class would rebuild the tokenizer without its spaces.
            TOKENIZER: {
                **tokenizer,
                "extra_special_tokens": {"image_token": configs.IMAGE_TAG},
                "processor_class": new_images["processor_class"],
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            GENERATION: {**generation, **tokens},
        }
        return {**{name: _json(value) for name, value in new.items()}, TEMPLATE: architecture.chat_template}
    new = {
        CONFIG: configs.to_reference(config, images, fields),
        IMAGES: configs.images_to_reference(images),
        PROCESSOR: {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": configs.IMAGE_TAG,
            "mask_prompt": True,
            "num_image_tokens": num_image_tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
        TOKENIZER: {**tokenizer, "processor_class": "VLChatProcessor", "tokenizer_class": "LlamaTokenizerFast"},
        GENERATION: {**generation, **tokens},
    }
    return {name: _json(value) for name, value in new.items()}


def _compare(tensors: Mapping[str, Slice], destination: Path) -> None:
    """Read what was written, and compare every tensor with the one it was made from.

    Raises:
        ValueError: if one differs.
    """
    written = unread_weights(weight_files(destination))
    if (kept := destination / KEPT / KEPT_WEIGHTS).is_file():
        written |= unread_weights([kept])
    layout = layout_of(tensors)
    back, left = rename(written, layout)
    back |= {name: written[name] for name in left}
    older, newer = PLACES[TRANSFORMERS]["SIGLIP"]
    for name, tensor in tqdm(tensors.items(), desc="Checking", unit="tensor", disable=None):
        again = back.get(name, back.get(name.replace(newer, older, 1)))
        if again is None or _hash(again[...]) != _hash(tensor[...]):
            raise ValueError(f"{name} is not what it was; the disk or the memory may be faulty. Nothing was written.")


def _hash(tensor: torch.Tensor) -> str:
    """The SHA-256, in hexadecimal, of a tensor's dtype, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
