"""Images and checkpoints in: the one place that opens image files and the one place that loads a model."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from deepseek_vl.checkpoints.find import bundled_or_same
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.device import check_quantization, pick_device, pick_dtype
from deepseek_vl.kernels.native import release_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

__all__ = ["load_image", "load_json", "load_pil_images", "load_pretrained_model"]


def load_pil_images(conversations: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The RGB images of a conversation's messages, in reading order.

    Args:
        conversations: messages, some with `images`: a list of anything that `load_image` takes.

    Raises:
        ImageLoadError: see `load_image`.
    """
    images = (message.get("images") or () for message in conversations)
    return [
        load_image(source) for group in images for source in (group if isinstance(group, list | tuple) else [group])
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
        quantize: less time and memory, for answers that are almost the same. On the CPU "int8", for int8 weights and
            inputs in all linear layers; on CUDA GPUs "int8" or "int4", for the language model's weights, by torchao.
            Such a model is for answers: it can neither learn nor be saved.
        kwargs: further arguments of `MultiModalityCausalLM.from_pretrained`; with a `device_map` of its own, `device`
            is not used.

    Returns:
        (tokenizer, processor, model), the model in evaluation mode.

    Raises:
        OSError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if it is not a DeepSeek-VL checkpoint, its weights do not fit its config, or the device, dtype
            or quantisation cannot be had.
    """
    device = pick_device(device)
    check_quantization(device, quantize)
    kwargs["dtype"] = pick_dtype(device, kwargs.pop("torch_dtype", dtype))
    if device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})

    name = bundled_or_same(model_path)
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's raises for unknown users
    is_directory = path.is_dir()
    if is_directory and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a checkpoint directory: it has no config.json.")
    if not is_directory and (path.exists() or not _HUB_ID.fullmatch(str(model_path))):
        raise FileNotFoundError(f"There is no checkpoint directory {str(model_path)!r}.")
    # A bundled model keeps its name, so that what is made from it (an adapter) says so on any machine.
    source = str(path) if is_directory and name == os.fspath(model_path) else str(model_path)

    from deepseek_vl.kernels.attention import use_float32_attention
    from deepseek_vl.kernels.int8 import quantize_int8
    from deepseek_vl.kernels.linear import fastest_linear, replace_linear
    from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor

    try:
        config, _ = MultiModalityConfig.get_config_dict(str(path) if is_directory else source)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        problem = "cannot be read" if is_directory else "is not a directory, and could not be fetched from the Hub"
        raise OSError(f"{source!r} {problem}: {cause}") from error
    if config.get("model_type") != MultiModalityCausalLM.config_class.model_type:
        raise ValueError(
            f"{source!r} is not a DeepSeek-VL checkpoint: its model_type is {config.get('model_type')!r}, not "
            f"{MultiModalityCausalLM.config_class.model_type!r}."
        )
    try:
        processor = VLChatProcessor.from_pretrained(source)
        with _one_thread_for_each_operation():  # several weights are converted at once, each in a thread
            model = MultiModalityCausalLM.from_pretrained(source, **kwargs).eval()
    except json.JSONDecodeError as error:
        raise OSError(f"{source!r} has a broken JSON file, {_broken_json(path)}: {error}.") from error
    except (AttributeError, KeyError, TypeError, UnpicklingError) as error:  # what broken files make the loaders raise
        raise ValueError(f"{source!r} cannot be loaded: {type(error).__name__}: {error}.") from error
    if device.type == "cpu":
        if quantize is None:
            replace_linear(model, fastest_linear(kwargs["dtype"]))
        else:
            quantize_int8(model)
        use_float32_attention(model.language_model)
    elif quantize is not None:
        from deepseek_vl.kernels.weight_only import quantize_weights

        quantize_weights(model.language_model, quantize)
    release_threads()
    return processor.tokenizer, processor, model


@contextlib.contextmanager
def _one_thread_for_each_operation() -> Iterator[None]:
    """PyTorch's operations on CPUs, of the whole process, are not divided among threads inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def _broken_json(directory: Path) -> str:
    """The name of the file in a checkpoint directory that is not JSON."""
    for file in sorted(directory.glob("*.json")):
        try:
            load_json(file)
        except ValueError:
            return file.name
    return "in the download cache"
