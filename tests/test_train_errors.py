"""Training: a full disk, extending a finished run, and an adapter's model card."""

import json
import logging
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from training import ERROR, log, train, weights, write_mixed

from deepseek_vl.serve.inference import GenerationSettings, stream_answer
from deepseek_vl.train.lora import main as merge_command
from deepseek_vl.utils.io import load_pretrained_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows with none, one and two pictures."""
    return write_mixed(tmp_path_factory.mktemp("data"))


@pytest.fixture
def options(siglip_checkpoint, data) -> list[Any]:
    """A short training of the small SigLIP model, in float32."""
    return [
        "--model_path", siglip_checkpoint, "--data", data, "--dtype", "float32", "--learning_rate", 1e-3,
        "--workers", 0, "--logging_steps", 1, "--batch_size", 2,
    ]  # fmt: skip


# A full disk


def on_small_disk(directory: Path, *script: str) -> subprocess.CompletedProcess:
    """Run shell commands that mount a small disk at `directory`, in a namespace of their own; skips if they cannot."""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", "\n".join(script)]
    try:
        probe = subprocess.run([*command[:-1], f"mount -t tmpfs none {directory}"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare, of Linux")
    if probe.returncode:
        pytest.skip(f"cannot mount a disk here: {probe.stderr.decode().strip()}")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


A_FEW = [("600k", []), ("4m", []), ("24k", ["--lora"])]
THE_OTHERS = [
    (size, more)
    for more in ([], ["--lora"])
    for size in ("24k", "600k", "1300k", "2200k", "4m", "5m")
    if (size, more) not in A_FEW
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "more"), [*A_FEW, *(pytest.param(*other, marks=pytest.mark.long) for other in THE_OTHERS)], ids=str
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_later(options, tmp_path, size, more):
    """The disk may be full within a checkpoint's weights, the optimizer's state, the result or a line of JSON."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    arguments = [*options, "--max_steps", 4, "--save_steps", 2, "--device", "cpu", *more]
    command = shlex.join(
        map(str, [sys.executable, "-m", "deepseek_vl.train", *arguments, "--output", disk / "out"])
    )  # fmt: skip
    result = on_small_disk(
        disk,
        f"mount -t tmpfs -o size={size} none {disk} || exit 9",
        f"OMP_NUM_THREADS=1 {command} 2> {tmp_path}/first; echo first $?",
        f"mount -o remount,size=64m {disk} || exit 9",
        f"OMP_NUM_THREADS=1 {command} 2> {tmp_path}/second; echo second $?",
        f"cp -r {disk}/out {kept}",
    )
    first, second = (tmp_path / "first").read_text(), (tmp_path / "second").read_text()
    assert result.stdout.split()[-1] == "0", second[-2000:]
    if "first 1" in result.stdout:
        assert "Traceback" not in first, first[-3000:]
        # A progress bar may precede or follow it on its line.
        (error,) = re.findall(rf"{re.escape(ERROR)}(.*)", first)
        assert error.startswith("nothing more can be written (")
        assert error.endswith("make room, then give the same command again")
    else:  # the disk was large enough, as for adapters
        assert more or size == "5m"
    assert train(*arguments, "--output", tmp_path / "whole") == 0
    file = "adapter_model.safetensors" if more else "model.safetensors"
    resumed, whole = (load_file(directory / file) for directory in (kept, tmp_path / "whole"))
    assert not [name for name in whole if not torch.equal(resumed[name], whole[name])]
    assert log(kept, "loss") == log(tmp_path / "whole", "loss")


# A longer run


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_a_finished_run_that_is_extended_keeps_to_the_longer_schedule(options, tmp_path, schedule, caplog):
    """The first step too has the longer schedule's rate; the checkpoint's is that of the old schedule's end."""
    options = [*options, "--schedule", schedule, "--learning_rate", 1e-3]
    assert train(*options, "--output", tmp_path / "out", "--max_steps", 20) == 0
    if schedule in ("cosine", "linear"):
        assert log(tmp_path / "out", "learning_rate")[-1] < 1e-4
    before = weights(tmp_path / "out")
    assert train(*options, "--output", tmp_path / "out", "--max_steps", 40) == 0
    assert "The run was planned for 20 steps; from here on its learning rate is that of a run of 40." in caplog.messages
    assert train(*options, "--output", tmp_path / "whole", "--max_steps", 40) == 0
    extended, whole = (log(tmp_path / name, "learning_rate") for name in ("out", "whole"))
    assert extended[20:] == whole[20:] and len(extended) == 40
    if schedule == "cosine":  # four steps of warm-up, then half a cosine; the log has each step's rate
        expected = [5e-4 * (1 + math.cos(math.pi * (step - 4) / 36)) for step in range(20, 40)]
        assert extended[20:] == pytest.approx(expected, rel=1e-6)
    # The steps are not much smaller than the rates in the log.
    moved = max(float((weight - before[name]).abs().max()) for name, weight in weights(tmp_path / "out").items())
    assert moved > sum(extended[20:]) / 10


@pytest.mark.parametrize("first", [["--epochs", 0.5], ["--max_steps", 3]])
def test_a_run_of_a_part_of_an_epoch_goes_on_to_the_whole(options, tmp_path, first, caplog):
    assert train(*options, "--output", tmp_path / "out", *first) == 0
    planned = len(log(tmp_path / "out", "loss"))
    assert train(*options, "--output", tmp_path / "out", "--epochs", 1) == 0
    assert train(*options, "--output", tmp_path / "whole", "--epochs", 1) == 0
    steps = len(log(tmp_path / "whole", "loss"))
    assert len(log(tmp_path / "out", "loss")) == steps > planned
    assert f"The run was planned for {planned} steps; from here on its learning rate is that of a run of {steps}." in (
        caplog.messages
    )
    caplog.clear()
    assert train(*options, "--output", tmp_path / "out", "--epochs", 1) == 0
    assert any(message.endswith("is finished; there is nothing to do.") for message in caplog.messages)


def test_the_constant_schedule_has_no_warm_up(options, tmp_path, caplog, capsys):
    options = [*options, "--schedule", "constant", "--output", tmp_path / "out", "--max_steps", 20]
    assert train(*options, "--warmup_steps", 4) == 1
    assert "--schedule constant has no warm-up; use constant_with_warmup." in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert train(*options) == 0
    assert any("constant schedule with 0 steps of warm-up" in message for message in caplog.messages)
    assert set(log(tmp_path / "out", "learning_rate")) == {1e-3}


def test_the_first_step_of_an_extended_run_has_the_schedules_rate(options, tmp_path):
    options = [*options, "--schedule", "cosine", "--warmup_steps", 0]
    assert train(*options, "--output", tmp_path / "out", "--max_steps", 2) == 0
    before = weights(tmp_path / "out")
    state = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    assert torch.load(state, weights_only=True)["param_groups"][0]["lr"] == 0
    assert train(*options, "--output", tmp_path / "out", "--max_steps", 3) == 0
    rate = 5e-4 * (1 + math.cos(math.pi * 2 / 3))
    after = weights(tmp_path / "out")
    steps = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if "layers" in name])
    assert rate / 3 < steps[steps > 0].median() < 3 * rate


# An adapter


def test_an_adapter_says_what_it_is_and_no_absolute_path(siglip_checkpoint, options, tmp_path, monkeypatch):
    shutil.copytree(siglip_checkpoint, tmp_path / "models" / "small")
    monkeypatch.chdir(tmp_path)
    options = [
        *options,
        "--model_path",
        "models/small",
        "--lora",
        "--lora_rank",
        4,
        "--max_steps",
        2,
        "--save_steps",
        1,
    ]
    assert train(*options, "--output", "runs/adapter") == 0
    adapter = tmp_path / "runs" / "adapter"
    for directory in (adapter, *adapter.glob("checkpoint-*")):
        for name in ("README.md", "adapter_config.json", "processor_config.json", "tokenizer_config.json"):
            assert str(tmp_path) not in (directory / name).read_text(), (directory, name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../models/small"
    card = (adapter / "README.md").read_text()
    assert "More Information Needed" not in card
    assert '\nbase_model: "../../models/small"\n' in card
    assert "adapters of rank 4 for 16 linear layers (projector, language)" in card
    assert "trained on 8 conversations for 2 steps" in card
    assert train(*options, "--output", "runs/adapter") == 0  # the run is finished, nothing is trained
    assert (adapter / "README.md").read_text() == card

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the base's relative path does not depend on the working directory
    for source in ("adapter", "adapter/checkpoint-1"):
        target = source.replace("/", "-")
        assert merge_command(["--adapter", f"../runs/{source}", "--output", target]) == 0
        load_pretrained_model(target, device="cpu")
    shutil.move(tmp_path / "models" / "small", tmp_path / "models" / "other")
    assert merge_command(["--adapter", "../runs/adapter", "--output", "third"]) == 1
    assert merge_command(["--adapter", "../runs/adapter", "--output", "third", "--model_path", "../models/other"]) == 0


def test_an_adapter_of_the_bundled_model_names_it(data, tmp_path, recwarn):
    options = ["--model_path", "tiny", "--data", data, "--lora", "--max_steps", 1, "--workers", 0]
    assert train(*options, "--output", tmp_path / "adapter") == 0
    assert not [warning for warning in recwarn if "Could not find a config file" in str(warning.message)]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert merge_command(["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0


def test_the_cards_code_runs(siglip_checkpoint, options, tmp_path):
    adapter = tmp_path / "adapter"
    assert train(*options, "--output", adapter, "--lora", "--max_steps", 1) == 0
    card = (adapter / "README.md").read_text(encoding="utf-8")
    code = textwrap.dedent(card[card.index("    from deepseek_vl.utils.io import") :])
    names: dict[str, Any] = {}
    exec(code.replace('"BASE"', repr(str(siglip_checkpoint))).replace('"THIS_DIRECTORY"', repr(str(adapter))), names)
    messages = [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": ""}]
    model, settings = names["model"].eval().get_base_model(), GenerationSettings(max_new_tokens=4)
    assert any("lora_" in name for name, _ in model.named_parameters())
    with stream_answer(model, names["processor"], messages, settings) as answer:
        assert isinstance("".join(answer), str)
