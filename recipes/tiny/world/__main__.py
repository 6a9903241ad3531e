"""The command `python -m recipes.tiny.world`: write conversations about the synthetic world as files."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from deepseek_vl.command_line import OneLineParser, run_command
from recipes.tiny.world.dataset import SyntheticWorld, write_conversations

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the conversations; returns the exit code."""
    parser = OneLineParser(prog="python -m recipes.tiny.world", description="Draw pictures and ask about them.")
    parser.add_argument("--output", type=Path, required=True, help="directory for data.jsonl and images/")
    parser.add_argument("--rows", type=int, default=1000, help="conversations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the small model learns from 0 (default: %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=6, help="questions per conversation; 1 for one or its follow-up (default: 6)"
    )

    def run(args: argparse.Namespace) -> None:
        logger.info("Wrote %s", write_conversations(SyntheticWorld(args.rows, args.seed, args.turns), args.output))

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
