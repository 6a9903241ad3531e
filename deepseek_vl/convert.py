"""Write a checkpoint in the other layout: `python -m deepseek_vl.convert SRC DST --to {reference,transformers}`.

"reference" is the layout in which DeepSeek published the models, "transformers" that of transformers' `deepseek_vl` and
`deepseek_vl_hybrid` classes. What the new layout has no place for is kept in DST/other_layout, so that converting back
gives every file as it was.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek_vl.checkpoints import convert as checkpoints
from deepseek_vl.checkpoints.names import LAYOUTS
from deepseek_vl.command_line import OneLineParser, run_command
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig
from deepseek_vl.models.clip_encoder import tower_fields
from deepseek_vl.utils.conversation import DEEPSEEK_CHAT_TEMPLATE

logger = logging.getLogger(__name__)


def convert(source: str | Path, destination: str | Path, layout: str) -> int:
    """`checkpoints.convert.convert` for this package's model; returns how many tensors there are."""
    architecture = checkpoints.Architecture(_weights, tower_fields, DEEPSEEK_CHAT_TEMPLATE)
    return checkpoints.convert(source, destination, layout, architecture)


def _weights(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MultiModalityCausalLM(MultiModalityConfig(**config)).state_dict()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m deepseek_vl.convert", description="Write a checkpoint in the other layout.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint's directory, or tiny")
    parser.add_argument("destination", metavar="DST", help="a directory that does not exist yet")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="DeepSeek's own layout, or that of transformers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a checkpoint; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    count = convert(args.source, args.destination, args.to)
    logger.info("Wrote %s; all %d tensors are what they were (names, shapes, SHA-256).", args.destination, count)


if __name__ == "__main__":
    sys.exit(main())
