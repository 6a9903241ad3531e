"""What the README and the notebook show runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run() -> None:
    """In order and in one session, as in a notebook."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 5
    command = [sys.executable, "-c", "\n".join(snippets)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert "star" in result.stdout
    assert result.stdout.strip().endswith("parameters")


def test_the_notebook_runs_from_top_to_bottom() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "chat.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    for answer in ("The star is blue.", "second", "The blue bar is the tallest.", "HELLO"):
        assert answer in shown


def test_the_way_from_data_to_a_chat_runs(tmp_path: Path) -> None:
    """The commands of the chapter on fine-tuning, one after the other."""
    chapter = re.search(r"\n## Fine-tune.*?\n## ", README, re.DOTALL).group()
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", chapter, re.DOTALL) for line in block.strip().splitlines()
    ]
    assert len(commands) == 7
    for name in ("examples", "cli_chat.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        assert command.startswith("python ")
        command = command.replace("python", sys.executable, 1)
        result = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert {path.name for path in (tmp_path / "hexagons-scores").iterdir()} == {
        "answers.jsonl", "confusion.png", "summary.json", "table.md",
    }  # fmt: skip


def test_the_commands_for_many_pictures_run(tmp_path: Path) -> None:
    """What `docs/captions.md` shows; with Ray where it is installed."""
    pytest.importorskip("pyarrow")
    page = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) == 5
    for name in ("examples", "images", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        if "--ray" in command and importlib.util.find_spec("ray") is None:
            continue
        command = command.replace("deepseek-vl-caption", "python -m deepseek_vl.caption", 1)
        command = command.replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, capture_output=True, timeout=300, cwd=tmp_path, check=True)
    shown = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL).group(1))
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert shown in rows
    assert (tmp_path / "captions.csv").exists() and (tmp_path / "captions.parquet").exists()

    snippets = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    result = subprocess.run(
        [sys.executable, "-c", snippets], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=True
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
    (tmp_path / "data.jsonl").write_text(re.search(r"```json\n(.*?)```", README, re.DOTALL).group(1), encoding="utf-8")
    rows, _ = load_data(tmp_path / "data.jsonl", VLChatProcessor.from_pretrained(str(siglip_checkpoint)))
    texts = [[" ".join(message["content"].split()) for message in row.messages] for row in rows]
    texts = [[text.replace("> ", ">") for text in row] for row in texts]
    assert texts == [["<image_placeholder>What shape is red?", "The red shape is a hexagon."]] * 4
