"""Loading images and checkpoints, with the reference's functions."""

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from deepseek_vl.checkpoints.find import find_checkpoint, take_hub_arguments
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.device import check_quantization, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

__all__ = ["load_image", "load_json", "load_pil_images", "load_pretrained_model"]


def load_pil_images(
    conversations: Sequence[Mapping[str, Any]], open_image: Callable[[Any], Image.Image] = load_image
) -> list[Image.Image]:
    """The RGB images of a conversation's messages, in reading order.

    Args:
        conversations: messages, some with `images`: a list of anything that `open_image` takes.
        open_image: opens one of them.

    Raises:
        ImageLoadError: see `load_image`.
        ValueError: if it is given something else than messages.
    """
    conversations = list(conversations)
    if not all(isinstance(message, Mapping) for message in conversations):
        raise ValueError("load_pil_images takes a list of messages, as [{'role': ..., 'content': ..., 'images': ...}].")
    images = (message.get("images") or () for message in conversations)
    return [
        open_image(source) for group in images for source in (group if isinstance(group, list | tuple) else [group])
    ]


def load_json(filepath: str | Path) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(filepath).read_text(encoding="utf-8"))


def load_pretrained_model(
    model_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    **kwargs: Any,
) -> tuple["PreTrainedTokenizerBase", "VLChatProcessor", "MultiModalityCausalLM"]:
    """Load a checkpoint for inference.

    Args:
        model_path: a directory, an id on the Hugging Face Hub, or the name of a model that comes with the package.
        device: see `pick_device`.
        dtype: see `pick_dtype`.
        quantize: "int8" or "int4" for less time and memory, with answers that are almost the same. On CPUs "int8" uses
            int8 weights and inputs in all linear layers, and "int4" uses int4 weights in the language model's layers
            and int8 in the others. On CUDA GPUs both quantise the language model's weights, by torchao. Quantised
            models can neither be trained nor saved.
        kwargs: further arguments of `MultiModalityCausalLM.from_pretrained`; if there is a `device_map`, the weights
            are placed by it.

    Returns:
        (tokenizer, processor, model), the model in evaluation mode.

    Raises:
        OSError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if it is not a DeepSeek-VL checkpoint, its weights do not fit its config, or the device, dtype
            or quantisation is not available.
    """
    device = pick_device(device)
    check_quantization(device, quantize)
    kwargs["dtype"] = pick_dtype(device, kwargs.pop("torch_dtype", dtype))
    if device.type != "cpu" and quantize is None:
        kwargs.setdefault("device_map", {"": device})
    is_placed = "device_map" in kwargs

    # Find the files.
    name = os.fspath(model_path)
    directory = Path(find_checkpoint(name, take_hub_arguments(kwargs)))
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ValueError(
                f"{name!r} is a LoRA adapter, not a model; merge it, and give the result: python -m "
                f"deepseek_vl.train.lora --adapter {shlex.quote(name)} --output MERGED"
            )
        raise FileNotFoundError(f"{name!r} is not a checkpoint directory: it has no config.json.")

    # Imported late, as it takes long: a wrong path is reported at once.
    from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

    with errors_that_name(name, directory):
        # Read config and processor.
        check_model_type(name, directory)
        processor = VLChatProcessor.from_pretrained(directory)

        # Build and fill.
        model = MultiModalityCausalLM.from_pretrained(directory, **kwargs).eval()
        # Adapters record this as their base: it must not be the directory of a download, or of a bundled model.
        model.config.name_or_path = os.path.expanduser(name)  # noqa: PTH111  Path's raises for unknown users

    _make_fast(model, device, quantize, is_placed)
    return processor.tokenizer, processor, model


def _make_fast(model: "MultiModalityCausalLM", device: torch.device, quantize: str | None, is_placed: bool) -> None:
    """Give a model this device's kernels, and quantised weights, in place.

    Args:
        is_placed: whether the weights are on their final device. If not, each layer is moved to the GPU when it is
            quantised, so that the GPU never holds the whole unquantised model.
    """
    from deepseek_vl.kernels.attention import use_fastest_attention

    use_fastest_attention(model.language_model)
    if device.type == "cpu":
        from deepseek_vl.kernels.int4 import Int4Linear
        from deepseek_vl.kernels.int8 import Int8Linear
        from deepseek_vl.kernels.layers import replace_layers
        from deepseek_vl.kernels.policy import kernel_for
        from deepseek_vl.kernels.quantized import quantize_layers

        replace_layers(model, kernel_for("linear", model.dtype))
        if quantize == "int4":  # the head and the tower would lose most by int4, and get int8
            quantize_layers(model.language_model.model, Int4Linear)
        if quantize is not None:
            quantize_layers(model, Int8Linear)
    elif quantize is not None:
        from deepseek_vl.kernels.weight_only import quantize_weights

        quantize_weights(model.language_model, quantize, None if is_placed else device)
        if not is_placed:
            model.to(device)


def check_model_type(name: str, directory: Path) -> None:
    """Check that a checkpoint's config is that of a DeepSeek-VL model.

    Raises:
        ValueError: if it is another model's.
    """
    from deepseek_vl.checkpoints.layout_configs import TRANSFORMERS_TYPES
    from deepseek_vl.models import MultiModalityConfig

    config, ours = load_json(directory / "config.json"), MultiModalityConfig.model_type
    if not isinstance(config, dict):
        raise ValueError(f"{name!r} is no checkpoint: its config.json is not an object with names and values.")
    model_type = config.get("model_type")
    if model_type not in (ours, *TRANSFORMERS_TYPES):
        raise ValueError(f"{name!r} is not a DeepSeek-VL checkpoint: its model_type is {model_type!r}, not {ours!r}.")


@contextlib.contextmanager
def errors_that_name(source: str, directory: Path) -> Iterator[None]:
    """Turn the loaders' errors about broken files into errors that name the checkpoint or the file.

    Raises:
        OSError: for a `.json` file that is not JSON.
        ValueError: for other errors.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        file = next(filter(_is_broken_json, sorted(directory.glob("*.json"))), directory)
        raise OSError(f"{str(file)!r} is not JSON: {error}.") from error
    except (AttributeError, KeyError, TypeError, UnpicklingError, StrictDataclassError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{source!r} cannot be loaded: {type(error).__name__}: {cause}.") from error


def _is_broken_json(file: Path) -> bool:
    try:
        load_json(file)
    except ValueError:
        return True
    return False
