"""The command `python -m recipes.tiny.refine`: trains a small model further, on conversations of the wider world.

The same command resumes a run that was stopped. `made.json` beside the result records what it was made of.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.data.files import whole_file
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from recipes.tiny.photographs import image_files
from recipes.tiny.stages import LONG_SCHEDULE, train_model
from recipes.tiny.world import LengthGrouped, WiderConversations

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "timm", "accelerate", "numpy", "pillow", "matplotlib")
"""Packages whose versions `made.json` records."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m recipes.tiny.refine", description="Train a small model further.")
    add = parser.add_argument
    add("--model_path", default="tiny", help="the model to begin with (default: %(default)s, the bundled one)")
    add("--output", type=Path, required=True, help="directory for the model, its log and plot")
    add(
        "--photographs",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="of which pictures of other things are made",
    )
    add("--steps", type=positive, default=2000, help="of training (default: %(default)s)")
    add("--batch_size", type=positive, default=32, help="per step (default: %(default)s)")
    add("--seed", type=int, default=100, help="of the conversations (default: %(default)s; 1 and 2 are for tests)")
    add("--learning_rate", type=float, default=1.5e-3, help="at its highest (default: %(default)s)")
    add("--save_steps", type=positive, default=250, help="between checkpoints, to go on from (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if (args.output / "log.jsonl").is_file():  # written last
        logger.info("The run in %s is finished; to train it further, give it as --model_path.", args.output)
        return
    photographs = image_files(args.photographs)
    set_seed(args.seed)
    start = Path(find_checkpoint(args.model_path))
    model = MultiModalityCausalLM.from_pretrained(str(start), dtype=torch.float32)
    processor = VLChatProcessor.from_pretrained(str(start))
    conversations = WiderConversations(args.steps * args.batch_size, args.seed, photographs=photographs)
    note_sitting(args, start, len(photographs))
    train_model(
        model,
        processor,
        LengthGrouped(conversations, args.batch_size),
        args.output,
        args,
        LONG_SCHEDULE,
        torch.float16,
    )
    note_result(args.output)


def note_sitting(args: argparse.Namespace, start: Path, photographs: int) -> None:
    """Record in `made.json` what a run is made of, and add an entry for this start of it.

    Args:
        start: the directory of the weights to begin with.
        photographs: how many there are.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "made.json"
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sittings": []}
    names = ("steps", "batch_size", "seed", "learning_rate")
    made.update(
        {
            "from": {"model": args.model_path, "sha256": hash_of_weights(start)},
            "settings": {name: getattr(args, name) for name in names},
            "photographs": photographs,
        }
    )
    made["sittings"].append(
        {
            "started": _now(),
            "commit": _commit(),
            "threads": torch.get_num_threads(),
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    _write(made, path)


def note_result(output: Path) -> None:
    """Record in `made.json` when a run ended, and the hash of its weights."""
    path = output / "made.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    made.update({"finished": _now(), "sha256": hash_of_weights(output)})
    _write(made, path)


def _write(made: dict[str, Any], path: Path) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def hash_of_weights(directory: Path) -> str:
    """SHA-256 of a checkpoint's `model.safetensors`."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str:
    """The checkout's commit, with a plus if there are changes; empty outside a checkout."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude", "*"],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
