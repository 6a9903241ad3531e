"""Arguments that the command lines share: the model, and how it samples. Imports nothing heavy.

A sampling parameter is a field of `GenerationSettings`, is applied in `engine/sampling.py`, and has an entry in
`SAMPLING` here, from which the command lines' arguments, the API's field and the page's slider are made.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from deepseek_vl.command_line import add_loading, positive, starting
from deepseek_vl.engine.settings import GenerationSettings

if TYPE_CHECKING:
    from deepseek_vl.engine.engine import Engine
    from deepseek_vl.models import VLChatProcessor

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "deepseek-ai/deepseek-vl-7b-chat"
PAGE_DEFAULTS = GenerationSettings(temperature=0.1, max_new_tokens=2048)
"""The initial values of the web page's sliders, which are the reference's."""


class SamplingParameter(NamedTuple):
    """How users set a field of `GenerationSettings`."""

    help: str  # on the command line
    label: str  # on the page
    slider: tuple[float, float, float]  # minimum, maximum and step on the page
    bounds: Mapping[str, Any]  # of the API's field, as `pydantic.Field` takes them
    type: Any = float


SAMPLING = {
    "top_p": SamplingParameter("nucleus sampling", "Top-p", (0, 1, 0.05), {"ge": 0, "le": 1}),
    "temperature": SamplingParameter("0 is greedy decoding", "Temperature", (0, 1, 0.1), {"ge": 0, "le": 2}),
    "repetition_penalty": SamplingParameter(
        "used when sampling", "Repetition penalty", (0.1, 2, 0.1), {"ge": 0.01, "le": 10}
    ),
}


def add_arguments(parser: argparse.ArgumentParser, defaults: GenerationSettings, **model_path: Any) -> None:
    """Add the arguments for `open_engine` and `settings_of`.

    Args:
        defaults: how answers are generated unless the arguments say otherwise.
        model_path: further options of the argument of this name.
    """
    add = parser.add_argument
    about = "checkpoint directory, id on the Hugging Face Hub, or tiny, which comes with the package"
    add("--model_path", help=about, **model_path)
    add_loading(parser)
    add(
        "--compile",
        action="store_true",
        help="compile the model first, in half a minute: answers are faster then",
    )
    add(
        "--memory_mb", type=positive, metavar="MB",
        help="memory for running answers and for going on with earlier conversations "
        "(default: the weights' size, at least 1024, at most half of what is free)",
    )  # fmt: skip
    add(
        "--max_gen_len", type=positive, default=defaults.max_new_tokens, help="tokens per answer (default: %(default)s)"
    )
    for name, parameter in SAMPLING.items():
        about = f"{parameter.help} (default: %(default)s)"
        add(f"--{name}", type=parameter.type, default=getattr(defaults, name), help=about)


def check_text(text: str, name: str) -> None:
    """Check that typed text is valid in the terminal's encoding.

    Raises:
        ValueError: if it has bytes that are not, which Python keeps as surrogates.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} is not text in {sys.getfilesystemencoding()}, the encoding of this terminal.")


def settings_of(args: argparse.Namespace) -> GenerationSettings:
    """The generation settings that the arguments ask for.

    Raises:
        ValueError: for a value out of range.
    """
    return GenerationSettings(max_new_tokens=args.max_gen_len, **{name: getattr(args, name) for name in SAMPLING})


def open_engine(
    args: argparse.Namespace,
    model_path: str,
    max_rows: int | None = None,
    progress: Callable[[str], None] = logger.info,
) -> tuple[Engine, VLChatProcessor]:
    """Load a model as the arguments say; returns an engine for it, and its processor.

    Args:
        max_rows: how many answers make up a batch; None for the default.
        progress: called with a line of text whenever compiling something begins.

    Raises:
        OSError, ValueError: as `load_pretrained_model` and `Engine.compile` do.
    """
    with starting():
        from deepseek_vl.engine.compiling import check_compile
        from deepseek_vl.engine.engine import Engine
        from deepseek_vl.engine.limits import EngineLimits
        from deepseek_vl.kernels.device import pick_device
        from deepseek_vl.utils.io import load_pretrained_model

        if args.compile:
            check_compile(pick_device(args.device), args.quantize is not None)
        tokenizer, processor, model = load_pretrained_model(model_path, args.device, args.dtype, args.quantize)
    memory_bytes = None if args.memory_mb is None else args.memory_mb << 20
    engine = Engine(model, tokenizer, EngineLimits(max_rows or EngineLimits.max_rows, memory_bytes=memory_bytes))
    if args.compile:
        engine.compile(progress)
    return engine, processor
