"""`python -m deepseek_vl.check`: a good checkpoint passes every check, and each defect is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from deepseek_vl import check
from deepseek_vl.check import Checkpoint, check_images, check_tokenizer, check_weights, main
from deepseek_vl.convert import convert

CPU = ("--device", "cpu")
NAMES = ("weights", "tokenizer", "images", "answer")


def marks(report: str) -> dict[str, str]:
    """The mark of each check in a report, `ok` or `WRONG`, by the check's name."""
    words = [line.split() for line in report.splitlines() if line.startswith(("ok ", "WRONG "))]
    return {name: mark for mark, name, *_ in words}


def test_the_command_finds_nothing_wrong_with_the_bundled_model() -> None:
    command = [sys.executable, "-m", "deepseek_vl.check", "tiny", *CPU]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    assert marks(result.stdout) == dict.fromkeys(NAMES, "ok")
    assert "a red circle on the left and a blue square on the right" in result.stdout
    assert f"PyTorch {torch.__version__}" in result.stdout
    assert result.stdout.endswith("All is well.\n")


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
@pytest.mark.parametrize("layout", ["reference", "transformers"])
def test_both_architectures_in_both_layouts_are_well(
    kind: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(f"{kind}_checkpoint")
    if layout == "transformers":
        convert(path, tmp_path / "exported", layout)
        path = tmp_path / "exported"
    assert main([str(path), *CPU, "--dtype", "float32"]) == 0
    assert marks(capsys.readouterr().out) == dict.fromkeys(NAMES, "ok")


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def settings(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return apply


def truncate(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def lose_spaces(directory: Path) -> None:
    """Make a tokenizer's file drop spaces, as `LlamaTokenizerFast` of transformers 5 does."""
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


NORM = "language_model.model.norm.weight"
BREAKS: dict[str, tuple[Callable[[Path], None], set[str], str]] = {
    # name of a defect: a function that makes it in a checkpoint, the checks that notice it, and their words
    "a weight is missing": (weights(lambda tensors: tensors.pop(NORM)), {"weights", "answer"}, f"1 missing: {NORM}"),
    "a weight too many": (
        *(weights(lambda tensors: tensors.update(extra=torch.ones(1))), {"weights", "answer"}),
        "1 unknown: extra",
    ),
    "another shape": (
        *(weights(lambda tensors: tensors.update({NORM: torch.ones(3)})), {"weights", "answer"}),
        f"1 of another shape: {NORM} [3] instead of",
    ),
    "not a number": (
        *(weights(lambda tensors: tensors[NORM].fill_(float("nan"))), {"answer"}),
        f"numbers in {NORM} that are infinite or none",
    ),
    "cut short": (truncate, {"weights", "answer"}, "broken or truncated"),
    "spaces are lost": (lose_spaces, {"tokenizer"}, "see tokenizer.json"),
    "another image size": (
        *(settings("preprocessor_config.json", image_size=48), {"images", "answer"}),
        "image_size is 48 instead of",
    ),
    "another model": (settings("config.json", model_type="llava"), set(NAMES), "its model_type is 'llava'"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_wrong_is_named(
    broken: str, siglip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, noticed, message = BREAKS[broken]
    directory = shutil.copytree(siglip_checkpoint, tmp_path / "checkpoint")
    breaks(directory)
    assert main([str(directory), *CPU, "--dtype", "float32"]) == 1
    report = capsys.readouterr().out
    assert marks(report) == {name: "WRONG" if name in noticed else "ok" for name in NAMES}
    assert message in report
    assert report.endswith(f"Wrong: {', '.join(name for name in NAMES if name in noticed)}.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "There is no checkpoint directory 'nowhere/at/all'"),
        (["tiny", "--device", "abacus"], "Unknown device 'abacus'"),
        (["tiny", "--dtype", "int8"], "Unknown dtype 'int8'"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def as_published(
    siglip_checkpoint: Path, published_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A miniature that `check` takes for the 1.3B model: its tokenizer and image processor are the published ones."""
    directory = shutil.copytree(siglip_checkpoint, tmp_path / "published")
    shutil.copytree(published_tokenizer_dir, directory, dirs_exist_ok=True)
    (published,) = (model for model in check.PUBLISHED.values() if model.name.endswith("1.3B"))
    settings("preprocessor_config.json", **published.images)(directory)
    size = Checkpoint(str(directory), None).parameters
    monkeypatch.setattr(check, "PUBLISHED", {size: published})
    return directory


def test_a_published_model_is_recognised(as_published: Path) -> None:
    checkpoint = Checkpoint(str(as_published), None)
    assert "as many as DeepSeek-VL 1.3B" in check_weights(checkpoint)
    assert "published ids" in check_tokenizer(checkpoint)
    assert "384 x 384 pixels, as published" in check_images(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is"), ({"do_normalize": False}, "do_normalize is False")],
)
def test_what_differs_from_the_published_images_is_named(
    as_published: Path, changes: dict[str, Any], message: str
) -> None:
    settings("preprocessor_config.json", **changes)(as_published)
    with pytest.raises(ValueError, match=message):
        check_images(Checkpoint(str(as_published), None))


def test_a_published_model_with_another_tokenizer_is_wrong(as_published: Path, small_tokenizer_dir: Path) -> None:
    shutil.copytree(small_tokenizer_dir, as_published, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"instead of \[5726, 25, 2461"):
        check_tokenizer(Checkpoint(str(as_published), None))


@pytest.mark.parametrize(("size", "name"), [("1.3b", "DeepSeek-VL 1.3B"), ("7b", "DeepSeek-VL 7B")])
def test_the_sizes_are_those_of_the_published_configs(size: str, name: str, tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests" / "golden" / "configs.json").read_text(encoding="utf-8"))[size]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "multi_modality"}), encoding="utf-8")
    assert Checkpoint(str(tmp_path), None).published.name == name
