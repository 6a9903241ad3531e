"""Helpers for tests of training: run the command, write its data, read its output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from safetensors.torch import load_file

from deepseek_vl.train.__main__ import main

TAG = "<image_placeholder>"
ERROR = "python -m deepseek_vl.train: error: "


def train(*arguments: Any) -> int:
    """Run the command in this process on the CPU; returns its exit code."""
    try:
        return main([str(argument) for argument in (*arguments, "--device", "cpu")])
    except SystemExit as error:
        return error.code


def write(path: Path, *rows: Any) -> Path:
    """Write rows to a JSON Lines file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_mixed(folder: Path) -> Path:
    """Write `MIXED`, forwards and then backwards, and its two pictures; returns the data file."""
    for i in range(2):
        make_picture(folder / f"{i}.png", seed=i)
    return write(folder / "mixed.jsonl", *MIXED, *MIXED[::-1])


def row(question: str, answer: str, *images: str) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    return [
        {"role": "User", "content": question, "images": list(images)},
        {"role": "Assistant", "content": answer},
    ]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint's directory."""
    return load_file(directory / "model.safetensors")


def changed(directory: Path, base: Path) -> set[str]:
    """The names of the weights that differ from the base's in any bit."""
    before = weights(base)
    return {name for name, weight in weights(directory).items() if not torch.equal(weight, before[name])}


def log(directory: Path, key: str) -> list[float]:
    """All values of a key in a run's log, in order."""
    entries = map(json.loads, (directory / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry[key] for entry in entries if key in entry]


def refusal(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """Run the command, which must fail; returns the error line that ends its output."""
    capsys.readouterr()
    assert train(*arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(ERROR), last
    return last.removeprefix(ERROR)


MIXED = [
    row("Count.", "One, two, three, four, five, six, seven, eight, nine, ten, and so on."),
    row(f"{TAG}Colour?", "Many.", "0.png"),
    row("Yes?", "No."),
    row(f"{TAG}{TAG}Same?", "They are not the same at all.", "0.png", "1.png"),
]
"""Conversations with answers of different lengths, and with none, one and two of the pictures 0.png and 1.png."""
