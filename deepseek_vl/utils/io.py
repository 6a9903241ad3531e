"""Images and checkpoints in: the one place that opens image files and the one place that loads a model."""

import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

from deepseek_vl.bundled import bundled_or_same
from deepseek_vl.utils.native import release_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor


SAFE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Kinds of pictures to decode for strangers: none that calls another program or holds other files."""

SAFE_PIXELS = 40_000_000
"""Of one picture of a stranger's."""

SAFE_IMAGES = 16
"""In one message or request of a stranger's."""


QUANTIZATIONS = {"cpu": ("int8",), "cuda": ("int8", "int4")}
"""The ways to quantise a model's weights when it is loaded, by the kind of device."""


class ImageLoadError(OSError, ValueError):
    """An image cannot be read. An `OSError` as Pillow's own errors are, and a `ValueError` as bad input is."""


class ImageTooLargeError(ImageLoadError):
    """An image has too many pixels to be decoded safely."""


def load_image(source: Any, formats: Sequence[str] | None = None, max_pixels: int | None = None) -> Image.Image:
    """One RGB image, turned upright as its EXIF orientation says if it is read from a file.

    Args:
        source: a path (`str` or `Path`, `~` is expanded), a `data:image/...;base64,` string, bytes, a binary file
            object, or a PIL image.
        formats: the only kinds of files that are read, by Pillow's names (`PNG`, `JPEG`, ...); None for all.
        max_pixels: of an image; None for `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageLoadError: naming the source and the cause: missing, not an image, broken, or truncated.
        ImageTooLargeError: for an image with more pixels than that.
    """
    if max_pixels is None:
        max_pixels = Image.MAX_IMAGE_PIXELS
    if isinstance(source, Image.Image):
        name = repr(getattr(source, "filename", "")) if getattr(source, "filename", "") else "given as a PIL image"
    else:
        name, file = _open_source(source)
    try:
        # Pillow's decoders raise many types on broken files (OSError, SyntaxError, struct.error, ...).
        if isinstance(source, Image.Image):
            _refuse_bomb(name, source, max_pixels)
            source.load()
            return source if source.mode == "RGB" else source.convert("RGB")
        with Image.open(file, formats=formats) as image:
            _refuse_bomb(name, image, max_pixels)
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageLoadError:
        raise
    except FileNotFoundError as error:
        raise ImageLoadError(f"Cannot read image {name}: there is no such file.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageLoadError(f"Cannot read image {name}: not an image file, or of an unknown kind.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"Refused image {name}: {error}") from error
    except OSError as error:
        raise ImageLoadError(f"Cannot read image {name}: {error.strerror or error}.") from error
    except Exception as error:
        raise ImageLoadError(f"Cannot read image {name}: broken file ({error}).") from error


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for error messages, and what `Image.open` takes."""
    if isinstance(source, str) and source.startswith("data:"):
        header, _, payload = source.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ImageLoadError(f"Cannot read image data URL {header[:40]!r}: it must be 'data:image/...;base64,...'.")
        try:
            data = base64.b64decode("".join(payload.split()), validate=True)
        except ValueError as error:  # also what is not ASCII
            raise ImageLoadError(f"Cannot read image in the data URL: not base64 ({error}).") from error
        return "in the data URL", io.BytesIO(data)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageLoadError(f"Cannot read image {source!r}: URLs are not fetched; download it and give its path.")
    if isinstance(source, (str, Path)):
        return repr(str(source)), os.path.expanduser(source)  # noqa: PTH111  Path's raises for unknown users
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "in the given bytes", io.BytesIO(source)
    if hasattr(source, "read"):
        return repr(getattr(source, "name", type(source).__name__)), source
    raise ImageLoadError(f"Cannot read an image from {type(source).__name__}; give a path, bytes, file or PIL image.")


def _refuse_bomb(name: str, image: Image.Image, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageTooLargeError(
            f"Refused image {name}: {width}x{height} pixels, more than the {max_pixels} that are safe to decode "
            "(PIL.Image.MAX_IMAGE_PIXELS)."
        )


def image_data_url(image: Image.Image) -> str:
    """An image as a `data:image/png;base64,` string, which `load_image` reads back pixel for pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


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


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to run on: the one asked for, or the first there is of cuda, mps and cpu.

    Raises:
        ValueError: if the device asked for is not a device, or not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if str(device) == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {str(device)!r}; try auto, cpu, cuda, cuda:1 or mps.") from error
    devices = torch.cuda.device_count() if picked.type == "cuda" else 1
    if not available.get(picked.type, True) or (picked.index or 0) >= devices:
        raise ValueError(f"Device {str(device)!r} is not available on this machine; use --device cpu or auto.")
    return picked


def pick_dtype(device: torch.device, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype to compute in: the one asked for, or bfloat16; float16 on GPUs and float32 on CPUs that lack it.

    A CPU need not multiply matrices of it fast (see `WideningLinear`), only read and convert it.

    Raises:
        ValueError: for a name that is no floating point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        if device.type == "cpu" and not (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return torch.float32
        return torch.bfloat16
    picked = getattr(torch, dtype, None)
    if not isinstance(picked, torch.dtype) or not picked.is_floating_point:
        raise ValueError(f"Unknown dtype {dtype!r}; try auto, bfloat16, float16 or float32.")
    return picked


def check_quantization(device: torch.device, quantize: str | None) -> None:
    """Whether weights can be quantised so, on this device; None is not to quantise.

    Raises:
        ValueError: if they cannot, or there is no such way.
    """
    if quantize is None:
        return
    known = sorted({name for names in QUANTIZATIONS.values() for name in names}, reverse=True)
    if quantize not in known:
        raise ValueError(f"Unknown quantize {quantize!r}; try {' or '.join(known)}.")
    if quantize not in QUANTIZATIONS.get(device.type, ()):
        kinds = " and ".join(kind for kind, names in QUANTIZATIONS.items() if quantize in names)
        raise ValueError(f"Quantised weights ({quantize}) are for {kinds}, not for {device.type}.")
    if device.type == "cuda":
        from deepseek_vl.models.weight_only import check_torchao

        check_torchao()
    elif not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise ValueError(f"This PyTorch has no kernel for quantised weights ({quantize}): it was built without oneDNN.")


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

    from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
    from deepseek_vl.models.attention import use_float32_attention
    from deepseek_vl.models.linear import fastest_linear, quantize_int8, replace_linear

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
        from deepseek_vl.models.weight_only import quantize_weights

        quantize_weights(model.language_model, quantize)
    release_threads()
    return processor.tokenizer, processor, model


def checkpoint_dtype(model_path: str | os.PathLike) -> torch.dtype:
    """The dtype that a checkpoint's config says its weights are stored in; float32 if it says nothing.

    Raises:
        OSError: if there is no such checkpoint.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(os.path.expanduser(bundled_or_same(model_path)))  # noqa: PTH111
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


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
