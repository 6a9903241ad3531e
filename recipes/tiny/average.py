"""The command `python -m recipes.tiny.average`: the mean of several checkpoints' weights.

Runs that began with the same weights differ in what they know best; their mean is often right about more than each of
them (Wortsman et al. 2022, "Model soups").
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deepseek_vl.checkpoints.write import appearing_whole
from deepseek_vl.command_line import OneLineParser, run_command
from recipes.tiny.refine import hash_of_weights

SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""The files beside the weights, which are taken from the first checkpoint."""


def average(checkpoints: Sequence[Path], output: Path) -> None:
    """Write the mean of checkpoints' weights, computed in float32 and stored in the first one's dtypes.

    Args:
        checkpoints: directories with the same model in one `model.safetensors` each.
        output: a new directory; `made.json` in it has the checkpoints' hashes.

    Raises:
        ValueError: if the checkpoints are of different models.
    """
    weights = [load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in weights]
    for checkpoint, found in zip(checkpoints, shapes, strict=True):
        if found != shapes[0]:
            raise ValueError(f"{str(checkpoint)!r} has another model than {str(checkpoints[0])!r}.")
    mean = {
        name: torch.stack([each[name].float() for each in weights]).mean(0).to(tensor.dtype)
        for name, tensor in weights[0].items()
    }
    with appearing_whole(output) as directory:
        for name in SETTINGS:
            shutil.copyfile(checkpoints[0] / name, directory / name)
        save_file(mean, directory / "model.safetensors", metadata={"format": "pt"})
        hashes = [hash_of_weights(checkpoint) for checkpoint in checkpoints]
        made = {"mean_of": hashes, "sha256": hash_of_weights(directory)}
        (directory / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the mean; returns the exit code."""
    parser = OneLineParser(prog="python -m recipes.tiny.average", description="The mean of several checkpoints.")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="directories that `recipes.tiny.refine` wrote")
    parser.add_argument("--output", type=Path, required=True, help="new directory for the result")

    def run(args: argparse.Namespace) -> None:
        average(args.checkpoints, args.output)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
