"""The recipe of a small model: `python -m recipes.tiny --output DIR` trains one from nothing.

A tokenizer is learnt from the synthetic world's sentences. A small vision tower learns from segmentation maps of
pictures; the published models begin with pretrained towers instead. Then a small model of the 1.3B's architecture
learns, as in the paper's last two stages, first from captions and then from conversations, of which the later ones have
more hard questions.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, Subset
from transformers import set_seed

from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.models import MultiModalityCausalLM
from recipes.tiny.model import make_model, make_processor
from recipes.tiny.segmentation import SegmentationModel
from recipes.tiny.stages import LONG_SCHEDULE, SCHEDULE, train_model, train_vision_tower
from recipes.tiny.world import Captions, HardQuestions, LengthGrouped, SyntheticWorld

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The recipe's command line."""
    parser = OneLineParser(prog="python -m recipes.tiny", description="Make a small model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the models, their logs and plots")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the world (default: %(default)s)")
    parser.add_argument("--maps", type=positive, default=5000, help="steps on segmentation maps (default: %(default)s)")
    parser.add_argument("--captions", type=positive, default=1500, help="steps on captions (default: %(default)s)")
    parser.add_argument(
        "--conversations", type=positive, default=1500, help="steps on conversations (default: %(default)s)"
    )
    parser.add_argument(
        "--hard_conversations",
        type=positive,
        default=3900,
        help="then, steps on conversations with more of what is hard (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="per step (default: %(default)s)")
    parser.add_argument(
        "--save_steps", type=positive, default=500, help="between checkpoints, to go on from (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="at its highest (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model, or go on where the same command was stopped; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.device_count() > 1:
        raise ValueError(
            "The recipe is one process's on one device, or it would see everything twice: start it without accelerate "
            "launch, with CUDA_VISIBLE_DEVICES set to one GPU."
        )
    set_seed(args.seed)
    processor = make_processor(args.seed, args.output / "tokenizer")
    maps, captions, tiny = (args.output / name for name in ("maps", "captions", "tiny"))
    if not _is_done(captions):
        model = make_model(len(processor.tokenizer))
        if not _is_done(maps):
            train_vision_tower(model.vision_model.vision_tower, processor, maps, args)
        SegmentationModel(model.vision_model.vision_tower).load_state_dict(load_file(maps / "model.safetensors"))
        described = LengthGrouped(Captions(args.captions * args.batch_size, args.seed), args.batch_size)
        train_model(model, processor, described, captions, args, SCHEDULE)
    if not _is_done(tiny):
        model = MultiModalityCausalLM.from_pretrained(str(captions), dtype=torch.float32)
        easy, hard = args.conversations * args.batch_size, args.hard_conversations * args.batch_size
        first = LengthGrouped(SyntheticWorld(easy, args.seed), args.batch_size)
        later = Subset(LengthGrouped(HardQuestions(easy + hard, args.seed), args.batch_size), range(easy, easy + hard))
        train_model(model, processor, ConcatDataset([first, later]), tiny, args, LONG_SCHEDULE, torch.float16)
    logger.info("Chat with it: python cli_chat.py --model_path %s", tiny)


def _is_done(stage: Path) -> bool:
    return (stage / "log.jsonl").is_file()  # written last


if __name__ == "__main__":
    sys.exit(main())
