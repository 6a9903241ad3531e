"""The commands and snippets in the README, the documentation and the notebook run.

Blocks that a page marks as `bash` or `python` are run unchanged, in order: commands in a folder that has the checkout's
files, snippets in one session per page. A block without a mark cannot be run unchanged: `NOT_AS_THEY_STAND` names the
file that runs something equivalent, or the page says "not run here".
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SNIPPETS = {
    "README.md": "",
    "docs/python.md": "The star is blue.",
    "docs/checkpoints.md": "parameters",
}
"""Pages whose snippets are run, with the end of what they print."""

COMMANDS = {
    "docs/terminal.md": 2,
    "docs/checkpoints.md": 2,
    "docs/engines.md": 1,
    "docs/tiny.md": 1,
}
"""Pages whose commands are run, with the number of commands."""

NEEDED = {
    "docs/engines.md": ("gguf",),
    "docs/tiny.md": ("matplotlib",),
    "docs/training.md": ("peft", "matplotlib"),
}
"""Modules that a page's test needs."""

OWN_TESTS = {"docs/captions.md", "docs/training.md", "docs/trl.md", "docs/api.md", "docs/engines.md"}
"""Pages with a test of their own: here, in test_api_answers.py, test_api_fields.py or test_export.py."""

NOT_AS_THEY_STAND = {
    # the beginning of a command: the file that runs something equivalent
    "python3 -m venv": ".ci/run",
    ".ci/run": ".ci/run",
    'pip install -e ".[docs]" && mkdocs serve': ".ci/run",
    "curl http://127.0.0.1:8000": "tests/test_api.py",
    "python -m deepseek_vl.serve.api": "tests/api_server.py",
    "python deepseek_vl/serve/app_deepseek.py": "tests/web_page.py",
    "pip install vllm": ".ci/vllm",
    "vllm serve": "tests/test_vllm.py",
    "python benchmarks/speed.py": "tests/test_benchmarks.py",
    "python benchmarks/random_checkpoint.py": "tests/test_full_size.py",
    "python -m recipes.tiny --output": "recipes/tiny/tests/test_tiny.py",
    "python -m recipes.tiny.evaluation": "recipes/tiny/tests/test_refine.py",
    "python -m recipes.tiny.photographs": "recipes/tiny/tests/test_refine.py",
    "python -m recipes.tiny.refine": "recipes/tiny/tests/test_refine.py",
    "python -m deepseek_vl.train.evaluate": "tests/test_evaluate.py",
}


def blocks(page: Path | str, language: str) -> list[str]:
    """The blocks of a page that are marked with a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The commands of a page, without those that set up an environment."""
    lines = [line for block in blocks(page, "bash") for line in block.strip().splitlines()]
    return [line for line in lines if not line.startswith("python3 -m venv")]


def run_in(directory: Path, command: str) -> str:
    """Run a command and return what it printed."""
    command = command.replace("deepseek-vl-caption", "python -m deepseek_vl.caption", 1)
    assert command.startswith("python ")
    result = subprocess.run(
        command.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True, timeout=300,
        cwd=directory, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with links to the checkout's files, into which commands may write."""
    for name in ("examples", "images", "recipes", "tests", "cli_chat.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def need(page: str) -> None:
    for module in NEEDED.get(page, ()):
        pytest.importorskip(module)


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_snippets_run(page: str, checkout: Path) -> None:
    """A page's snippets run in order and in one session, as in a notebook."""
    need(page)
    command = [sys.executable, "-c", "\n".join(blocks(page, "python"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=checkout, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(SNIPPETS[page])


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_run(page: str, checkout: Path) -> None:
    need(page)
    shown = commands(page)
    assert len(shown) == COMMANDS[page]
    for command in shown:
        run_in(checkout, command)


@pytest.mark.long
def test_the_walk_through_of_training_teaches(checkout: Path) -> None:
    """Of 100 questions none is right before and most are after, the loss falls, and the chat's answer is right."""
    need("docs/training.md")
    *walk, chat, check = commands("docs/training.md")
    for command in walk:
        run_in(checkout, command)
    assert run_in(checkout, chat).strip().splitlines()[-1].endswith("The hexagon is purple.")
    run_in(checkout, check)
    files = {"answers.jsonl", "confusion.png", "summary.json", "table.md"}
    assert {path.name for path in (checkout / "hexagons-after").iterdir()} == files
    before, after = (
        json.loads((checkout / f"hexagons-{when}" / "summary.json").read_text(encoding="utf-8"))
        for when in ("before", "after")
    )
    assert before["total"]["right"] == 0
    assert after["total"]["right"] >= 60
    card = (checkout / "hexagons-lora" / "README.md").read_text(encoding="utf-8")
    assert "for 30 linear layers (projector, language)" in card
    log = (checkout / "hexagons-lora" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [step["loss"] for step in map(json.loads, log) if "loss" in step]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_that_it_is_not(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    if blocks(page, "python"):
        assert name in SNIPPETS or name in OWN_TESTS
    if commands(name):
        assert name in COMMANDS or name in OWN_TESTS
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if block[1] or "not run here" in text[: block.start()].rsplit("\n\n", 2)[-2]:
            continue
        for line in block[2].splitlines():
            if re.match(r"(python3?|pip|curl|vllm|ollama|llama-\S+|\.ci/\w+)( |$)", line):
                place = next((file for start, file in NOT_AS_THEY_STAND.items() if line.startswith(start)), None)
                assert place, f"{line}: no test runs it, and the page does not say so"
                assert (ROOT / place).exists()


def test_trl_trains_on_a_row_as_the_page_shows(checkout: Path) -> None:
    pytest.importorskip("trl")
    from PIL import Image

    (checkout / "pictures").mkdir()
    Image.new("RGB", (20, 20), "red").save(checkout / "pictures/0.png")
    row = json.loads(blocks("docs/training.md", "json")[0].splitlines()[2])
    row["images"] = [str(checkout / "pictures/0.png")]
    (checkout / "data.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (snippet,) = blocks("docs/trl.md", "python")
    if not torch.cuda.is_available():
        with_gpu, without = re.findall(r"SFTConfig\(.*?\)", (ROOT / "docs/trl.md").read_text(encoding="utf-8"))
        snippet = snippet.replace(with_gpu, without)
    command = [sys.executable, "-c", snippet.replace("CHECKPOINT", "tiny")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=checkout, check=False)
    assert result.returncode == 0, result.stderr
    assert "'train_loss': " in result.stdout


def test_the_notebook_runs_from_top_to_bottom() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "chat.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    for answer in ("The star is blue.", "second", "The blue bar is the tallest.", "HELLO"):
        assert answer in shown


def test_the_commands_for_many_pictures_run(checkout: Path) -> None:
    """The commands and snippets of `docs/captions.md` run; those with Ray only where it is installed."""
    pytest.importorskip("pyarrow")
    page = "docs/captions.md"
    shown = commands(page)
    assert len(shown) == 5
    for command in shown:
        if "--ray" not in command or importlib.util.find_spec("ray"):
            run_in(checkout, command)
    rows = [json.loads(line) for line in (checkout / "captions.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert json.loads(blocks(page, "json")[0]) in rows
    assert (checkout / "captions.csv").exists() and (checkout / "captions.parquet").exists()

    snippets = "\n".join(blocks(page, "python"))
    result = subprocess.run(
        [sys.executable, "-c", snippets], capture_output=True, text=True, timeout=300, cwd=checkout, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(list((ROOT / "tests" / "pictures").glob("*.png"))) + 1
    assert "looks most like" in lines[-1]


def test_the_data_it_shows_are_four_forms_of_the_same(siglip_checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    from deepseek_vl import VLChatProcessor
    from deepseek_vl.data.checks import load_data

    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images/0.png")
    (tmp_path / "data.jsonl").write_text(blocks("docs/training.md", "json")[0], encoding="utf-8")
    rows, _ = load_data(tmp_path / "data.jsonl", VLChatProcessor.from_pretrained(str(siglip_checkpoint)))
    texts = [[" ".join(message["content"].split()) for message in row.messages] for row in rows]
    texts = [[text.replace("> ", ">") for text in row] for row in texts]
    assert texts == [["<image_placeholder>What shape is red?", "The red shape is a hexagon."]] * 4
