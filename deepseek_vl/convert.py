"""Write a checkpoint in another layout: `python -m deepseek_vl.convert SRC DST --to {reference,transformers,gguf}`.

"reference" is the layout in which DeepSeek published the models, "transformers" that of transformers' `deepseek_vl` and
`deepseek_vl_hybrid` classes. What the new layout has no place for is kept in DST/other_layout, so that converting back
gives every file as it was. "gguf" writes the files that llama.cpp runs.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek_vl.checkpoints import convert as checkpoints
from deepseek_vl.checkpoints.names import GGUF, GGUF_TYPES, LAYOUTS
from deepseek_vl.command_line import OneLineParser, run_command
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig
from deepseek_vl.models.clip_encoder import tower_fields
from deepseek_vl.utils.conversation import DEEPSEEK_CHAT_TEMPLATE
from deepseek_vl.utils.io import check_model_type, errors_that_name

logger = logging.getLogger(__name__)


def convert(source: str | Path, destination: str | Path, layout: str) -> int:
    """Convert a checkpoint, as `checkpoints.convert.convert` does, and return its number of tensors."""
    return checkpoints.convert(source, destination, layout, ARCHITECTURE)


def _weights(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MultiModalityCausalLM(MultiModalityConfig(**config)).state_dict()


ARCHITECTURE = checkpoints.Architecture(_weights, tower_fields, DEEPSEEK_CHAT_TEMPLATE)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m deepseek_vl.convert", description="Write a checkpoint in another layout.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint's directory, its id on the Hub, or tiny")
    parser.add_argument("destination", metavar="DST", help="a directory that does not exist yet")
    layouts = (*LAYOUTS, GGUF)
    parser.add_argument("--to", choices=layouts, required=True, help="DeepSeek's own, transformers', or llama.cpp's")
    parser.add_argument("--type", choices=GGUF_TYPES, help="of the language model's weights in gguf (default: f16)")
    parser.add_argument("--language_only", action="store_true", help="gguf without the vision tower")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a checkpoint; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if args.to != GGUF and (args.type or args.language_only):
        raise ValueError("--type and --language_only belong to --to gguf.")
    source = Path(args.source)
    with errors_that_name(args.source, source):
        if (source / "config.json").is_file():
            check_model_type(args.source, source)
        (_export if args.to == GGUF else _rewrite)(args)


def _rewrite(args: argparse.Namespace) -> None:
    count = convert(args.source, args.destination, args.to)
    logger.info("Wrote %s; all %d tensors are what they were (names, shapes, SHA-256).", args.destination, count)


def _export(args: argparse.Namespace) -> None:
    try:
        from deepseek_vl.checkpoints import gguf
    except ImportError as error:
        raise ValueError("--to gguf needs the package gguf: pip install '.[gguf]'.") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file, by a name that is soon another
    count = gguf.export(args.source, args.destination, ARCHITECTURE, args.type or "f16", args.language_only)
    logger.info("Wrote %s; all %d tensors were read back as written (SHA-256).", args.destination, count)


if __name__ == "__main__":
    sys.exit(main())
