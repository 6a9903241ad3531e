"""Check a checkpoint before anything else: `python -m deepseek_vl.check PATH`.

It compares the files with what the config says and with what is known of the published models, has the model answer a
question about a picture, and prints a report that can be pasted into an issue. The exit code is 0 if all is well.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from PIL import Image, ImageDraw

import deepseek_vl
from deepseek_vl.checkpoints.convert import weight_files
from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.checkpoints.names import as_reference
from deepseek_vl.checkpoints.read import unread_weights
from deepseek_vl.checkpoints.tensors import Slice, dtype_of, shape_of
from deepseek_vl.command_line import OneLineParser, add_loading, one_line, run_command
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.kernels.device import pick_device, pick_dtype
from deepseek_vl.kernels.policy import cpu_info
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from deepseek_vl.models.image_processing_vlm import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from deepseek_vl.serve.inference import stream_answer
from deepseek_vl.utils.io import check_model_type, errors_that_name, load_pretrained_model

QUESTION = "Describe the image."
MOST_TOKENS = 64

SAMPLE = "User: What is  this?\n\nA 1,024 px picture: 图片 😀"
SAMPLE_IDS = (5726, 25, 2461, 317, 207, 437, 30, 185, 185, 32, 207, 16, 11, 15, 17, 19, 51778, 5743, 25, 207, 13058)
SAMPLE_IDS += (89662,)
"""The sample's ids with the published tokenizer. The class that its files name loses spaces and newlines on
transformers 5."""

SPECIAL_IDS = {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001, "<image_placeholder>": 100015}


@dataclass(frozen=True)
class Published:
    """What is known of a published model: its name, and its image processor's settings."""

    name: str
    images: Mapping[str, Any]


PUBLISHED = {
    1_975_235_584: Published(
        "DeepSeek-VL 1.3B",
        {
            "image_size": 384,
            "image_mean": IMAGENET_INCEPTION_MEAN,
            "image_std": IMAGENET_INCEPTION_STD,
            "do_normalize": True,
            "background_color": (127, 127, 127),
        },
    ),
    7_343_990_017: Published(
        "DeepSeek-VL 7B",
        {
            "image_size": 1024,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "do_normalize": False,
            "background_color": (122, 116, 104),
        },
    ),
}
"""The published models, by their number of parameters."""


class Checkpoint:
    """A checkpoint to check: its config, the weights that the config asks for, and its processor.

    Args:
        name: the directory, Hub id or bundled model's name, as it was given.
        args: `device`, `dtype` and `quantize`, for `load_pretrained_model`.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        self.directory = Path(find_checkpoint(name))

    @cached_property
    def config(self) -> MultiModalityConfig:
        """The model's config.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        with errors_that_name(self.name, self.directory):
            check_model_type(self.name, self.directory)
            return MultiModalityConfig.from_pretrained(self.directory)

    @cached_property
    def model(self) -> MultiModalityCausalLM:
        """The model that the config describes, without weights.

        Raises:
            OSError, ValueError: if it cannot be built.
        """
        with errors_that_name(self.name, self.directory), torch.device("meta"):
            return MultiModalityCausalLM(self.config)

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        """The weights that the config asks for, on the meta device; raises as `model`."""
        return self.model.state_dict()

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(weight.numel() for weight in self.expected.values())

    @property
    def published(self) -> Published | None:
        """The published model with the same number of parameters, or None."""
        return PUBLISHED.get(self.parameters)

    @cached_property
    def processor(self) -> VLChatProcessor:
        """The model's processor.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        with errors_that_name(self.name, self.directory):
            return VLChatProcessor.from_pretrained(self.directory)


def check_weights(checkpoint: Checkpoint) -> str:
    """Check the names and shapes of the tensors in the files; of safetensors files only the headers are read."""
    files = weight_files(checkpoint.directory)
    found = as_reference(unread_weights(files), checkpoint.expected)
    problems = {
        "missing": sorted(checkpoint.expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - checkpoint.expected.keys()),
        "of another shape": [
            f"{name} {shape_of(found[name])} instead of {list(weight.shape)}"
            for name, weight in checkpoint.expected.items()
            if name in found and shape_of(found[name]) != list(weight.shape)
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names)
        )
    size = f"as many as {checkpoint.published.name}" if checkpoint.published else "a size of its own"
    count = f"{len(files)} file{'s' * (len(files) > 1)}"
    return (
        f"{len(found)} tensors of {_dtypes(found)} in {count}, with the config's names and shapes; "
        f"{checkpoint.parameters:,} parameters, {size}"
    )


def _dtypes(tensors: Mapping[str, Slice | torch.Tensor]) -> str:
    names = {str(dtype_of(tensor)).removeprefix("torch.") for tensor in tensors.values()}
    return " and ".join(sorted(names))


def check_tokenizer(checkpoint: Checkpoint) -> str:
    """Check a sentence's token ids: the published ones, or for other models, ids that decode to the sentence."""
    tokenizer = checkpoint.processor.tokenizer
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    if checkpoint.published is None:
        again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if again != SAMPLE:
            raise ValueError(f"{SAMPLE!r} becomes {again!r}: see tokenizer.json.")
        return f"{len(tokenizer):,} tokens, with which a sentence comes back as it was"
    if tuple(ids) != SAMPLE_IDS:
        raise ValueError(f"{SAMPLE!r} has the ids {ids} instead of {list(SAMPLE_IDS)}: see tokenizer.json.")
    for token, token_id in SPECIAL_IDS.items():
        if tokenizer.convert_tokens_to_ids(token) != token_id:
            raise ValueError(f"{token} has the id {tokenizer.convert_tokens_to_ids(token)} instead of {token_id}.")
    return f"{len(tokenizer):,} tokens, with the published ids"


def check_images(checkpoint: Checkpoint) -> str:
    """Check the image processor's settings: the published ones, or for other models, the tower's image size."""
    images = checkpoint.processor.image_processor
    vision: Any = checkpoint.model.vision_model
    side = getattr(vision, "vision_tower_high", vision).image_size
    known = checkpoint.published.images if checkpoint.published else {"image_size": side}
    for name, value in known.items():
        actual = getattr(images, name)
        if (tuple(actual) if isinstance(value, tuple) else actual) != value:
            raise ValueError(f"{name} is {actual} instead of {value}: see preprocessor_config.json.")
    whose = "as published" if checkpoint.published else "as the tower has"
    return f"{images.image_size} x {images.image_size} pixels, {whose}"


def check_answer(checkpoint: Checkpoint) -> str:
    """Load the model as every other use does, and check that it answers a question about a picture."""
    args, begun = checkpoint.args, time.perf_counter()
    _, processor, model = load_pretrained_model(checkpoint.name, args.device, args.dtype, args.quantize)
    loaded = time.perf_counter()
    for name, parameter in model.named_parameters() if args.quantize is None else ():
        if not parameter.isfinite().all():
            raise ValueError(f"There are numbers in {name} that are infinite or none.")
    messages = [
        {"role": "User", "content": f"<image_placeholder>{QUESTION}", "images": [picture()]},
        {"role": "Assistant", "content": ""},
    ]
    settings, pieces, asked, first = GenerationSettings(max_new_tokens=MOST_TOKENS), [], time.perf_counter(), 0.0
    with stream_answer(model, processor, messages, settings) as stream:
        for piece in stream:
            first = first or time.perf_counter()
            pieces.append(piece)
    ended, tokens = time.perf_counter(), stream.completion_tokens
    if not (answer := "".join(pieces).strip()):
        raise ValueError("The answer is empty.")
    each = f", {(ended - first) / (tokens - 1):.3f} s for each further token" if tokens > 1 else ""
    return (
        f"{answer!r}\n{'':18}to {QUESTION!r} about a red circle beside a blue square; "
        f"loaded in {loaded - begun:.1f} s, first words after {first - asked:.2f} s{each}; "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    )


def picture() -> Image.Image:
    """The picture that the model is asked about: a red circle on the left, a blue square on the right."""
    image = Image.new("RGB", (480, 360), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((60, 110, 200, 250), "red")
    pen.rectangle((290, 120, 410, 240), "blue")
    return image


CHECKS: tuple[tuple[str, Callable[[Checkpoint], str]], ...] = (
    ("weights", check_weights),
    ("tokenizer", check_tokenizer),
    ("images", check_images),
    ("answer", check_answer),
)


def machine() -> str:
    """Versions and hardware, in two lines."""
    versions = f"deepseek_vl {deepseek_vl.__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    memory = psutil.virtual_memory().total / 2**30
    processor = cpu_info("model name") or platform.processor() or platform.machine()
    hardware = f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        hardware += f"; {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{versions}, transformers {transformers.__version__}, {platform.platform()}\n{hardware}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m deepseek_vl.check", description="Check a checkpoint, and report.")
    parser.add_argument("model_path", metavar="PATH", help="a directory, an id on the Hugging Face Hub, or tiny")
    add_loading(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a checkpoint; returns the exit code: 0 if all is well, otherwise 1."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> int:
    pick_dtype(pick_device(args.device), args.dtype)  # if this fails, it is no fault of the checkpoint's
    checkpoint = Checkpoint(args.model_path, args)
    print(f"{checkpoint.name}\n{machine()}\n")
    wrong = []
    for name, check in CHECKS:
        try:
            said, mark = check(checkpoint), "ok"
        except Exception as error:  # whatever it is, it belongs in the report
            is_ours = isinstance(error, (OSError, ValueError))
            said, mark = one_line(error) if is_ours else f"{type(error).__name__}: {one_line(error)}", "WRONG"
            wrong.append(name)
        print(f"{mark:<6} {name:<10} {said}", flush=True)
    print(f"\nWrong: {', '.join(wrong)}." if wrong else "\nAll is well.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
