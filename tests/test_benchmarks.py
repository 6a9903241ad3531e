"""The benchmarks with a miniature model: every table has its rows, with the right contenders."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

OURS, PEER = "ours, default dtype", "transformers, float32"
ROWS = {
    "first-token": {"first token": {PEER, OURS}, "per token": {PEER, OURS}},
    "turns": {"second turn's first token": {PEER, OURS}},
    "text-only": {"text-only first token": {"ours, after a blank image", OURS}},
    "encode": {"encode an image": {PEER, "ours, float32"}},
    "batch": {f"captions, {OURS}": {f"{OURS}, one after the other", f"{OURS}, 2 at once"}},
    "load": {"load": {PEER, OURS, "cli_chat.py to its prompt"}},
    "preprocess": {f"preprocess to {side} px": {"step by step", "ours"} for side in (384, 1024)},
}
"""For each table, the quantities it measures and the contenders of each."""

LIMITED = ("first-token", "encode", "preprocess")
"""The tables whose rows have the machine's limit."""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of `benchmarks/` importable."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def speed(benchmarks: None) -> ModuleType:
    import speed

    return speed


@pytest.fixture
def contenders(benchmarks: None) -> ModuleType:
    import contenders

    return contenders


SHORT = ("first-token", "batch", "load")
"""The tables that are always tried; the others take as long, and have little of their own."""


@pytest.mark.parametrize(
    "table", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in ROWS]
)
def test_a_table_has_its_rows_in_json_and_a_plot(
    table: str, siglip_checkpoint: Path, hybrid_checkpoint: Path, tmp_path: Path
) -> None:
    path = hybrid_checkpoint if table == "encode" else siglip_checkpoint
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--model_path", str(path), "--table", table]
    command += ["--size", "small", "--device", "cpu", "--peer_dtypes", "float32", "--output", str(tmp_path / "it.png")]
    result = subprocess.run([*command, "--quantize"], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr

    rows = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))
    quantities = {row["quantity"] for row in rows}
    assert {name: {row["contender"] for row in rows if row["quantity"] == name} for name in quantities} == ROWS[table]
    assert len(result.stdout.splitlines()) == len(rows)
    for row in rows:
        assert row["value"] > 0
        assert row["contender"] in result.stdout
        assert (row["ratio"] is None) == row["is_peer"]
        assert (row["limit"] is not None) == (table in LIMITED)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_quantised_and_compiled_models_have_rows_of_their_own(siglip_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--model_path", str(siglip_checkpoint)]
    command += ["--table", "first-token", "--size", "small", "--device", "cpu", "--peer_dtypes", "float32"]
    command += ["--quantize", "int8", "--compile", "--output", str(tmp_path / "it.png")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]
    rows = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))
    limits = {row["contender"]: row["limit"] for row in rows if row["unit"] == "s" and "token" in row["quantity"]}
    assert limits["ours, int8"] < limits["ours, default dtype"], "its weights are narrower"
    assert limits["ours, default dtype, compiled"] == limits["ours, default dtype"]
    assert "ours, int8, compiled" not in limits, "on a CPU there is none"


def test_captions_by_the_command_and_by_the_engine_are_compared(siglip_checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "captioning.py"), "--model_path", str(siglip_checkpoint)]
    command += ["--device", "cpu", "--dtype", "float32", "--pictures", "6", "--max_tokens", "4", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["engine", "caption_many", "ratio"]
    assert all(float(line[1]) > 0 for line in lines)
    result = subprocess.run([*command, "--memory"], capture_output=True, text=True, check=True, timeout=600)
    assert "MiB resident" in result.stdout.splitlines()[-1]


def test_answers_of_a_form_and_of_any_are_compared(siglip_checkpoint: Path) -> None:
    pytest.importorskip("llguidance")
    command = [sys.executable, str(ROOT / "benchmarks" / "structured.py"), "--model_path", str(siglip_checkpoint)]
    command += ["--device", "cpu", "--dtype", "float32", "--rows", "1", "2", "--tokens", "6", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    lines = result.stdout.splitlines()
    assert len(lines) == 8
    assert lines[0].split()[:3] == ["1", "rows", "any"]
    assert all(float(line.split()[-1]) > 0 for line in lines)


def test_ratios_are_to_the_best_peer(speed: ModuleType) -> None:
    Row = speed.Row
    rows = [
        Row("time", "slow peer", 8.0, is_peer=True),
        Row("time", "peer", 6.0, is_peer=True),
        Row("time", "ours", 2.0),
        Row("rate", "peer", 6.0, "tokens/s", is_peer=True),
        Row("rate", "ours", 9.0, "tokens/s"),
        Row("alone", "ours", 1.0),
    ]
    assert [row.ratio for row in speed.with_ratios(rows)] == [None, None, 3.0, None, 1.5, None]


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_the_contenders_have_the_same_weights_and_the_same_prompt(
    kind: str, request: pytest.FixtureRequest, contenders: ModuleType
) -> None:
    path = str(request.getfixturevalue(f"{kind}_checkpoint"))
    processor = contenders.chat_processor(path)
    messages = contenders.question(processor, 150, [contenders.picture(1)])
    inputs = processor(conversations=messages, images=messages[0]["images"])
    assert 150 <= inputs.input_ids.shape[1] <= 160
    answers = {}
    for name in contenders.CONTENDERS:
        result = contenders.open_contender(name, model_path=path, device="cpu", dtype="float32").answer(messages, 6)
        assert result["first"] > 0 and result["each"] > 0
        answers[name] = result["answer"].strip()
    assert answers["ours"] == answers["transformers"] != ""


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_operations_are_at_least_two_per_weight_and_token(
    kind: str, request: pytest.FixtureRequest, contenders: ModuleType
) -> None:
    path = str(request.getfixturevalue(f"{kind}_checkpoint"))
    model = contenders.open_contender("ours", model_path=path, device="cpu", dtype="float32").model
    layers = sum(weight.numel() for weight in model.get_decoder().layers.parameters() if weight.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    encode, language = contenders.operations(path, 40)
    tokens, attention = 16, 4 * 16**2 * 48 * 2
    blocks = [module for name, module in model.vision_model.named_modules() if name.endswith("vision_tower.blocks")]
    siglip = sum(weight.numel() for weight in blocks[0].parameters() if weight.ndim == 2)
    assert encode >= 2 * tokens * siglip + attention
    assert 2 * 40 * layers + 2 * head < language < 2.2 * 40 * layers + 2 * head
    assert contenders.bytes_per_token(model) >= 4 * (layers + head)


def test_where_the_time_goes_is_said_by_part(siglip_checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "where_time_goes.py"), "--model_path", str(siglip_checkpoint)]
    result = subprocess.run([*command, "--tokens", "4", "--dtype", "float32"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [f"{name}, float32", phase] for name in ("ours", "transformers") for phase in ("first token", "per token")
    ]
    for _, phase, *numbers in rows:
        vision, language_model, _, rest, whole = map(float, numbers)
        assert (vision > 0) == (phase == "first token")
        assert 0 < language_model < whole
        assert rest > 0
