"""The command `python -m deepseek_vl.train`: what it learns, what it writes, resuming, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from training import ERROR, MIXED, TAG, changed, log, refusal, row, train, weights, write, write_mixed

from deepseek_vl.data.rows import read_rows
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.lora import merge
from deepseek_vl.train.trainer import last_checkpoint
from deepseek_vl.utils.io import load_pretrained_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAM, SIGLIP = "vision_model.vision_tower_high.", "vision_model.vision_tower_low."
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
CORNERS = {"top left": (4, 4), "top right": (36, 4), "bottom left": (4, 36), "bottom right": (36, 36)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training data: squares.jsonl (16 pictures with descriptions), mixed.jsonl, few.jsonl, and bad.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for colour, rgb in COLOURS.items():
        for corner, (x, y) in CORNERS.items():
            picture = Image.new("RGB", (64, 64), (235, 235, 235))
            picture.paste(rgb, (x, y, x + 24, y + 24))
            picture.save(folder / f"{colour} {corner}.png")
            rows.append(row(f"{TAG}What is where?", f"A {colour} square at the {corner}.", f"{colour} {corner}.png"))
    write(folder / "squares.jsonl", *rows)
    write_mixed(folder)
    write(folder / "few.jsonl", *MIXED[:3])
    bad = [row(f"{TAG}What?", "It.", "missing.png"), row("Hi", ""), row("Long", "very " * 1100)]
    write(folder / "bad.jsonl", MIXED[0], *bad, MIXED[1])
    return folder


@pytest.fixture(scope="module")
def base(hybrid_checkpoint, tmp_path_factory) -> Path:
    """The miniature hybrid model, stored in bfloat16."""
    directory = tmp_path_factory.mktemp("base") / "hybrid"
    shutil.copytree(hybrid_checkpoint, directory)
    load_pretrained_model(hybrid_checkpoint, device="cpu", dtype="bfloat16")[2].save_pretrained(directory)
    return directory


@pytest.fixture
def start(siglip_checkpoint, folder, tmp_path) -> Callable[..., int]:
    """A function that trains the miniature SigLIP model for two steps in float32; arguments add to or replace these."""

    def run(*arguments: Any) -> int:
        return train(
            "--model_path", siglip_checkpoint, "--data", folder / "mixed.jsonl", "--output", tmp_path / "out",
            "--dtype", "float32", "--warmup_steps", 0, "--learning_rate", 1e-3, "--workers", 0, "--logging_steps", 1,
            *([] if "--epochs" in arguments else ["--max_steps", 2]), *arguments,
        )  # fmt: skip

    return run


# Learning


@pytest.fixture(scope="module")
def trained(base, folder, tmp_path_factory) -> Path:
    """The output of supervised fine-tuning on the 16 squares."""
    output = tmp_path_factory.mktemp("trained") / "out"
    code = train(
        "--model_path", base, "--data", folder / "squares.jsonl", "--output", output, "--stage", "sft",
        "--learning_rate", 3e-3, "--max_steps", 90, "--batch_size", 8, "--dtype", "float32", "--workers", 0,
    )  # fmt: skip
    assert code == 0
    return output


def test_the_whole_architecture_learns_16_pictures_by_heart(trained, folder):
    assert log(trained, "loss")[-1] < 0.05
    tokenizer, processor, model = load_pretrained_model(trained, device="cpu", dtype="float32")
    engine = Engine(model, tokenizer)
    for item in read_rows(folder / "squares.jsonl"):
        question, expected = item.messages
        session = ChatSession(engine, processor, GenerationSettings(max_new_tokens=40))
        answer = "".join(session.ask(question["content"], [Image.open(path) for path in item.images]))
        assert answer.strip() == expected["content"]


def test_sam_is_left_as_it_was_bit_for_bit(trained, base):
    different = changed(trained, base)
    assert not [name for name in different if name.startswith(SAM)]
    learnt = [name for name in weights(base) if not name.startswith(SAM) and "attn_pool." not in name]
    matrices = {name for name in learnt if weights(base)[name].ndim > 1}
    assert matrices <= different and {name.split(".")[0] for name in different} == {
        "vision_model",
        "aligner",
        "language_model",
    }


def test_the_result_is_a_checkpoint_as_published(trained, base):
    for file in base.iterdir():
        assert (trained / file.name).is_file(), file.name
    of_base, of_result = weights(base), weights(trained)
    assert {name: (weight.dtype, weight.shape) for name, weight in of_result.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in of_base.items()
    }
    assert {weight.dtype for weight in of_result.values()} == {torch.bfloat16}
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((trained / name).read_text()) == json.loads((base / name).read_text())
    configs = [json.loads((directory / "config.json").read_text()) for directory in (base, trained)]
    for token in ("bos", "eos", "pad"):  # transformers' trainer writes these in both places
        for config in (configs[1], configs[1]["language_config"]):
            config.pop(f"{token}_token_id", None)
    assert configs[1].pop("use_cache", True) is True
    assert configs[1] == configs[0]
    text = "Grüße, 世界! 🙂\n\n  spaces"
    before, after = (VLChatProcessor.from_pretrained(str(directory)).tokenizer for directory in (base, trained))
    assert after.encode(text) == before.encode(text)


def test_the_course_of_the_run_is_written_and_drawn(trained):
    losses, steps = log(trained, "loss"), log(trained, "step")
    assert len(losses) == 22 and steps[:22] == list(range(4, 89, 4))  # 90 steps: a line for each twentieth
    assert losses[0] > 10 * losses[11] > 10 * losses[-1]
    assert all(later < earlier * 2 for earlier, later in pairwise(losses))
    with Image.open(trained / "loss.png") as image:
        assert image.format == "PNG" and image.width > 400
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))


# Resuming


def state_cut(checkpoint: Path) -> None:
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text()[:100])


def without_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def test_a_killed_run_goes_on_and_ends_bit_for_bit_as_an_unbroken_one(base, folder, tmp_path, caplog):
    arguments = [
        "--model_path", base, "--data", folder / "squares.jsonl", "--dtype", "float32", "--max_steps", 12,
        "--batch_size", 4, "--save_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-3, "--workers", 1,
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "deepseek_vl.train", *map(str, arguments), "--output", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], cwd=ROOT, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        while not (killed / "checkpoint-6" / "trainer_state.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()
    last = last_checkpoint(killed)
    for number, damage in ((998, state_cut), (999, without_state)):  # as if killed while the checkpoint was written
        shutil.copytree(last, killed / f"checkpoint-{number}")
        damage(killed / f"checkpoint-{number}")

    assert train(*arguments, "--output", whole) == 0
    assert not [text for text in caplog.messages if text.startswith("Going on from")]
    assert train(*arguments, "--output", killed) == 0
    assert f"Going on from {last}." in caplog.messages
    assert weights(killed).keys() == weights(whole).keys()
    assert not changed(killed, whole) and changed(whole, base)
    assert log(killed, "loss") == log(whole, "loss") and log(killed, "step")[:12] == list(range(1, 13))
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


@pytest.mark.parametrize("damage", [state_cut, without_state])
def test_a_checkpoint_that_was_not_written_to_its_end_is_deleted(trained, tmp_path, damage, caplog):
    assert last_checkpoint(tmp_path) is None
    for number in (9, 90, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
        shutil.copy(trained / "checkpoint-90" / "trainer_state.json", tmp_path / f"checkpoint-{number}")
    assert last_checkpoint(tmp_path).name == "checkpoint-100"
    damage(tmp_path / "checkpoint-100")
    assert last_checkpoint(tmp_path).name == "checkpoint-90"
    assert caplog.messages == [f"{tmp_path / 'checkpoint-100'} was not written to its end; it is deleted."]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "checkpoint-90"]


@pytest.mark.parametrize("more", [["--lora"], ["--pack", "--gradient_accumulation", "2"]], ids=" ".join)
def test_a_run_in_two_halves_is_a_whole_one(start, tmp_path, more):
    schedule = ["--schedule", "constant", "--batch_size", 2, *more]
    for output, steps in (("halves", 2), ("halves", 4), ("whole", 4)):
        assert start(*schedule, "--output", tmp_path / output, "--max_steps", steps) == 0
    file = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    halves, whole = (load_file(tmp_path / output / file) for output in ("halves", "whole"))
    assert halves.keys() == whole.keys()
    assert not [name for name in whole if not torch.equal(halves[name], whole[name])]
    assert log(tmp_path / "halves", "loss") == log(tmp_path / "whole", "loss")


@pytest.mark.parametrize("more", [[], ["--max_steps", 1, "--schedule", "constant"]], ids=str)
def test_the_same_command_after_the_end_changes_nothing(start, tmp_path, more):
    assert start(*more) == 0
    before = weights(tmp_path / "out")
    assert start(*more) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path / "out").items())
    (tmp_path / "out/log.jsonl").unlink()  # as if killed before the last files were written
    assert start(*more) == 0
    assert (tmp_path / "out/log.jsonl").exists()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path / "out").items())


def test_a_finished_run_without_checkpoints_is_not_overwritten(start, tmp_path, capsys):
    assert start("--max_steps", 1) == 0
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert start("--max_steps", 1) == 1
    assert "holds a finished run without checkpoints" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before


def test_only_what_the_trainer_left_half_written_is_deleted(start, tmp_path):
    """The last two finished checkpoints stay, and so do directories that the trainer has not written."""
    assert start("--max_steps", 1) == 0
    kept = [tmp_path / "out/checkpoint-best", tmp_path / "out/checkpoint-merged-7"]
    for directory in kept:
        directory.mkdir()
        os.utime(directory, (0, 0))
    for steps in (2, 3):
        assert start("--max_steps", steps) == 0
    numbered = [tmp_path / f"out/checkpoint-{step}" for step in (2, 3)]
    assert sorted((tmp_path / "out").glob("checkpoint-*")) == sorted(kept + numbered)


def test_a_batch_without_images_teaches_the_projector_nothing(start, folder, tmp_path, request):
    """It does not fail either, as it would if the projector had no gradient."""
    rows = [[{"role": "User", "content": "Hi."}, {"role": "Assistant", "content": "Hello."}]] * 4
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert start("--data", path, "--stage", "adaptor", "--max_steps", 2) == 0
    base = weights(Path(json.loads((tmp_path / "out/run.json").read_text())["model_path"]))
    assert all(torch.equal(weight, base[name]) for name, weight in weights(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [("--stage", "adaptor", "'sft'"), ("--batch_size", 3, "4"), ("--data", "few.jsonl", "mixed.jsonl']")],
)
def test_another_run_in_the_same_directory_is_refused(start, folder, tmp_path, capsys, flag, value, was):
    assert start("--max_steps", 1) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert start(flag, folder / value if flag == "--data" else value) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{ERROR}'{tmp_path / 'out'}' holds a run with other arguments ({flag} was ")
    assert was in error and error.endswith("repeat them to resume it, or choose another --output.")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files


def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(start, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert start() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"{ERROR}'{tmp_path / 'out'}' is not empty and holds no run; choose another --output."
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("notes.txt", "mine")]


def test_a_run_that_never_began_can_be_corrected(start, folder, tmp_path):
    assert start("--data", folder / "no such file.jsonl") == 1
    assert start("--data", folder / "few.jsonl", "--batch_size", 2) == 0
    noted = json.loads((tmp_path / "out" / "run.json").read_text())
    assert noted["data"] == [str(folder / "few.jsonl")] and noted["batch_size"] == 2


# Data


def test_check_names_every_bad_row_and_trains_nothing(siglip_checkpoint, folder, tmp_path, capsys):
    file = folder / "bad.jsonl"
    assert train("--model_path", siglip_checkpoint, "--data", file, "--output", tmp_path / "out", "--check") == 1
    *bad, summary = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in bad] == [f"{file}:2", f"{file}:3", f"{file}:4"]
    assert "missing.png': there is no such file" in bad[0] and "is empty" in bad[1] and "too long" in bad[2]
    assert summary.startswith("2 good rows, 3 bad; 2 answers, 1 images;")
    assert not (tmp_path / "out").exists()


def test_check_is_content_with_good_data(siglip_checkpoint, folder, capsys):
    files = [folder / "mixed.jsonl", folder / "squares.jsonl"]
    assert train("--model_path", siglip_checkpoint, "--data", *files, "--check") == 0
    assert re.fullmatch(
        r"24 good rows, 0 bad; 24 answers, 22 images; tokens per row: shortest \d+, median \d+, longest \d+\n",
        capsys.readouterr().out,
    )
    assert train("--model_path", siglip_checkpoint, "--data", files[0], "--check", "--eval_data", files[1]) == 0
    assert capsys.readouterr().out.startswith("24 good rows")


def test_check_and_training_agree_on_what_is_too_long(siglip_checkpoint, folder, tmp_path, start, capsys):
    file = write(folder / "long.jsonl", row("Long", "very " * 1100), row("Hi", "Yes."))
    assert train("--model_path", siglip_checkpoint, "--data", file, "--check", "--truncate") == 0
    assert start("--data", file, "--truncate", "--max_steps", 1) == 0
    assert train("--model_path", siglip_checkpoint, "--data", file, "--check") == 1
    assert "--max_length is 1024" in capsys.readouterr().out
    assert start("--data", file, "--output", tmp_path / "other") == 1


def test_bad_data_are_refused_unless_they_are_to_be_skipped(start, folder, tmp_path, capsys):
    file = folder / "bad.jsonl"
    assert start("--data", file) == 1
    error = capsys.readouterr().err
    assert f"{ERROR}3 of 5 rows cannot be trained on:\n  {file}:2: " in error and f"\n  {file}:4: " in error
    assert error.endswith("Correct them, or train without them: --skip-bad.\n")
    assert start("--data", file, "--skip-bad") == 0
    assert len(log(tmp_path / "out", "loss")) == 2


# Options


@pytest.mark.parametrize(
    "options",
    [["--gradient_checkpointing"], ["--gradient_checkpointing", "--lora"], ["--gradient_accumulation", 2], ["--pack"],
     ["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--lora"], ["--truncate", "--max_length", 130],
     ["--schedule", "constant"], ["--epochs", 0.5], ["--workers", 2]],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
@pytest.mark.parametrize("model", ["siglip", "hybrid"])
def test_options(request, start, tmp_path, model, options):
    directory = request.getfixturevalue(f"{model}_checkpoint")
    assert start("--model_path", directory, "--batch_size", 2, *options) == 0
    losses = log(tmp_path / "out", "loss")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    if "--lora" in options:
        merge(tmp_path / "out", tmp_path / "merged")
    assert changed(tmp_path / ("merged" if "--lora" in options else "out"), directory)


@pytest.mark.parametrize(
    "option",
    [["--gradient_checkpointing"], ["--pack"], ["--workers", 2]],
    ids=lambda option: " ".join(map(str, option)),
)
def test_options_that_change_nothing_of_what_is_learnt(start, tmp_path, option):
    assert start() == 0 and start(*option, "--output", tmp_path / "other") == 0
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        assert log(tmp_path / "other", key) == pytest.approx(log(tmp_path / "out", key), rel=tolerance), key


def test_accumulating_two_batches_is_one_of_twice_the_size(start, siglip_checkpoint, tmp_path):
    assert start("--batch_size", 4, "--output", tmp_path / "whole") == 0
    assert start("--batch_size", 2, "--gradient_accumulation", 2) == 0
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        assert log(tmp_path / "out", key) == pytest.approx(log(tmp_path / "whole", key), rel=tolerance), key
    before, whole, halves = (weights(path) for path in (siglip_checkpoint, tmp_path / "whole", tmp_path / "out"))
    learnt = torch.cat([(whole[name] - before[name]).flatten() for name in before])
    difference = torch.cat([(halves[name] - whole[name]).flatten() for name in before])
    assert difference.norm() < 0.02 * learnt.norm()


def test_evaluation_gives_the_models_loss(start, folder, tmp_path):
    assert start("--eval_data", folder / "few.jsonl", "--eval_steps", 1) == 0
    losses = log(tmp_path / "out", "eval_loss")
    assert len(losses) == 2
    _, processor, model = load_pretrained_model(tmp_path / "out", device="cpu", dtype="float32")
    with torch.no_grad():
        expected = model(**TrainingCollator(processor)(list(read_rows(folder / "few.jsonl")))).loss
    assert losses[-1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train", "siglip", "--part_rate", "siglip=1e-2"], {SIGLIP}),
        (["--train", "siglip", "projector", "--part_rate", "siglip=0"], {"aligner."}),
        (["--train", "sam", "projector"], {SAM, "aligner."}),
        (["--stage", "adaptor"], {"aligner."}),
        (["--stage", "pretrain"], {"aligner.", "language_model."}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_only_the_chosen_parts_learn(hybrid_checkpoint, folder, tmp_path, options, expected):
    code = train(
        "--model_path", hybrid_checkpoint, "--data", folder / "squares.jsonl", "--output", tmp_path / "out",
        "--dtype", "float32", "--max_steps", 1, "--warmup_steps", 0, "--workers", 0, *options,
    )  # fmt: skip
    assert code == 0
    prefixes = (SAM, SIGLIP, "aligner.", "language_model.")
    names = changed(tmp_path / "out", hybrid_checkpoint)
    assert {prefix for name in names for prefix in prefixes if name.startswith(prefix)} == expected
    assert all(name.startswith(tuple(expected)) for name in names)


def test_a_parts_rate_scales_its_steps(start, siglip_checkpoint, tmp_path):
    """Adam's first step changes every weight that has a gradient by the learning rate."""
    assert start("--max_steps", 1, "--train", "projector", "language", "--part_rate", "projector=1e-4") == 0
    before, after = weights(siglip_checkpoint), weights(tmp_path / "out")
    for name, rate in (("aligner.layers.0.weight", 1e-4), ("language_model.model.layers.0.mlp.up_proj.weight", 1e-3)):
        assert (after[name] - before[name]).abs().median().item() == pytest.approx(rate, rel=0.02)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "/no/such/model"], "There is no checkpoint directory '/no/such/model'."),
        (["--data", "/no/such/data.jsonl"], "There is no data file '/no/such/data.jsonl'."),
        (["--eval_data", "/no/such/data.jsonl"], "There is no data file '/no/such/data.jsonl'."),
        (["--max_length", "0"], "--max_length must be from 1 to the model's 1024 positions, not 0."),
        (["--max_length", "2000"], "--max_length must be from 1 to the model's 1024 positions, not 2000."),
        (["--dtype", "float16"], "Training in float16 needs a CUDA device; use --dtype bfloat16 or float32."),
        (["--dtype", "int"], "argument --dtype: invalid choice: 'int'"),
        (["--train", "head"], "argument --train: invalid choice: 'head'"),
        (["--train", "sam"], "There is no part 'sam' to train; this model has siglip, projector, language."),
        (["--train", "sam", "--lora"], "There is no part 'sam' to adapt; this model has siglip, projector, language."),
        (["--stage", "rlhf"], "argument --stage: invalid choice: 'rlhf'"),
        (["--part_rate", "head=1"], "'head=1' is not PART=RATE with a PART of sam, siglip, projector, language"),
        (["--part_rate", "siglip=fast"], "'fast' in 'siglip=fast' is not a number"),
        (["--schedule", "steep"], "argument --schedule: invalid choice: 'steep'"),
        (["--weight_decay", "nan"], "argument --weight_decay: nan is not 0 or above"),
        (["--workers", "-1"], "argument --workers: -1 is below 0"),
        (["--seed", "-1"], "argument --seed: -1 is below 0"),
        (["--warmup_steps", "-3"], "argument --warmup_steps: -3 is below 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(siglip_checkpoint, folder, tmp_path, capsys, arguments, message):
    usual = ["--model_path", siglip_checkpoint, "--data", folder / "few.jsonl", "--output", tmp_path / "out"]
    assert message in refusal(capsys, *usual, *arguments)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_no_output_is_an_error_in_one_line(siglip_checkpoint, folder, capsys):
    arguments = ("--model_path", siglip_checkpoint, "--data", folder / "few.jsonl")
    assert refusal(capsys, *arguments) == "Give --output, the directory for the result."


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "is not a DeepSeek-VL checkpoint: its model_type is 'llama'"),
        ("[]", "its config.json is not an object"),
        ('{"model_type": ', "config.json' is not JSON"),
    ],
)
def test_the_check_looks_at_the_checkpoint_too(siglip_checkpoint, folder, tmp_path, capsys, config, message):
    shutil.copytree(siglip_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    usual = ["--model_path", tmp_path / "model", "--data", folder / "few.jsonl", "--check"]
    assert message in refusal(capsys, *usual)


@pytest.mark.parametrize("arguments", [["--model_path", "/no/such/model"], ["--max_length", "0"]], ids=" ".join)
def test_errors_of_the_check_are_one_line_too(siglip_checkpoint, folder, capsys, arguments):
    refusal(capsys, "--model_path", siglip_checkpoint, "--data", folder / "few.jsonl", "--check", *arguments)
