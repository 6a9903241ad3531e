"""The bundled model's recipe: its tokenizer, its size, and its three stages, which learn, resume and can be loaded."""

import copy
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import muon
from torch import nn
from transformers import TrainingArguments, set_seed

from deepseek_vl.kernels.policy import multiplies_fast
from deepseek_vl.utils.io import load_pretrained_model
from recipes.tiny.__main__ import main
from recipes.tiny.model import IMAGE_TOKENS, make_model, make_processor
from recipes.tiny.optimizer import Float32Muon
from recipes.tiny.world import Captions

pytestmark = pytest.mark.skipif(
    not hasattr(TrainingArguments, "train_sampling_strategy"), reason="the recipe needs transformers 5.2 or newer"
)
ROOT = Path(__file__).parents[3]
"""The checkout, from which the recipe is run."""

STEPS = ["--batch_size", "2", "--maps", "2", "--captions", "5", "--conversations", "1", "--hard_conversations", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the recipe, run with a few small steps."""
    output = tmp_path_factory.mktemp("tiny")
    assert main(["--output", str(output), *STEPS]) == 0
    return output


def test_the_tokenizer_keeps_text_and_spells_what_is_quoted(run: Path) -> None:
    tokenizer, processor, _ = load_pretrained_model(run / "tiny", device="cpu")
    for text in ("Grüße, 世界! 🙂\n\n  spaces\ttabs", 'It says "HELLO" and "world".', "What colour is the star?"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize('It says "Star".')[-6:] == ['Ġ"', "S", "t", "a", "r", '".']
    assert len(tokenizer.tokenize("What colour is the star?")) == 6
    assert len(tokenizer.tokenize(processor.system_prompt)) < 60
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


def test_the_tokenizer_is_the_bundled_model_s(run: Path) -> None:
    bundled = ROOT / "deepseek_vl/bundled/tiny/tokenizer.json"
    assert (run / "tokenizer/tokenizer.json").read_bytes() == bundled.read_bytes()


def test_the_result_is_small_and_can_be_opened(run: Path) -> None:
    assert (run / "tiny/model.safetensors").stat().st_size < 12e6
    assert {str(weight.dtype) for weight in load_file(run / "tiny/model.safetensors").values()} == {"torch.float16"}
    _, processor, model = load_pretrained_model(run / "tiny", device="cpu")
    image = Captions(1)[0].images[0]
    inputs = processor(prompt="User: <image_placeholder>Hi.\n\nAssistant:", images=[image]).to("cpu", model.dtype)
    assert inputs.images_seq_mask.sum() == IMAGE_TOKENS
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3


def test_the_same_command_after_the_end_changes_nothing(run: Path) -> None:
    def files() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (run / "tiny").rglob("*.*")}

    before = files()
    assert main(["--output", str(run), *STEPS]) == 0
    assert files() == before


def test_killed_in_front_of_the_last_files_it_writes_the_same(run: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(run, tmp_path / "out"))
    for path in (output / "tiny").iterdir():
        if path.is_file():
            path.unlink()
    assert main(["--output", str(output), *STEPS]) == 0
    assert (output / "tiny/model.safetensors").read_bytes() == (run / "tiny/model.safetensors").read_bytes()
    assert {path.name for path in (output / "tiny").iterdir()} == {path.name for path in (run / "tiny").iterdir()}


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--output", str(tmp_path), *STEPS]) == 1
    assert "without accelerate launch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_stages_leave_their_log_and_plot(run: Path) -> None:
    for stage in ("maps", "captions", "tiny"):
        assert (run / stage / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert (run / stage / "log.jsonl").exists()


@pytest.mark.parametrize(
    "checkpoint", ["captions/checkpoint-3", pytest.param("tiny/checkpoint-1", marks=pytest.mark.long)]
)
def test_killed_it_goes_on_and_ends_bit_for_bit_as_unbroken(run: Path, tmp_path: Path, checkpoint: str) -> None:
    command = [sys.executable, "-m", "recipes.tiny", "--output", str(tmp_path / "out"), *STEPS]
    checkpoint = tmp_path / "out" / checkpoint
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--save_steps", "1"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        while not (checkpoint / "trainer_state.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (checkpoint.parent / "model.safetensors").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"Going on from {checkpoint.parent}" in done.stderr
    for stage in ("maps", "captions", "tiny"):
        whole, again = (load_file(directory / stage / "model.safetensors") for directory in (run, tmp_path / "out"))
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.skipif(multiplies_fast(torch.bfloat16), reason="layers are compiled only where training is in float32")
def test_without_a_compiler_it_says_so_and_learns_the_same(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.tiny", "--output", str(tmp_path / "out"), *STEPS],
        env={**os.environ, "CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    said = [line for line in done.stderr.splitlines() if "cannot be compiled here" in line]
    assert len(said) == 2  # one from each stage that trains a language model
    assert "Traceback" not in done.stderr
    set_seed(0)
    begun = make_model(len(make_processor(0, tmp_path / "tokenizer").tokenizer)).language_model.state_dict()
    compiled, plain = (load_file(directory / "captions/model.safetensors") for directory in (run, tmp_path / "out"))
    for name, weight in begun.items():
        moved, moved_plainly = (stage[f"language_model.{name}"] - weight for stage in (compiled, plain))
        assert (moved - moved_plainly).norm() < 0.05 * moved.norm(), name


def test_muon_in_float32_is_timm_s_with_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both optimizers give the same weights after 20 steps, and can be saved and loaded in between."""
    learnt = []
    for kind in (Float32Muon, muon.Muon):
        if kind is muon.Muon:
            in_float32 = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
            monkeypatch.setattr(muon, "zeropower_via_newtonschulz", in_float32)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 32))
        frozen = nn.Parameter(torch.ones(4, 4))
        matrices, vectors = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
        groups = [
            {"params": [*matrices, frozen], "lr": 1e-2, "weight_decay": 0.02},
            {"params": vectors, "lr": 5e-3, "use_fallback": True},
        ]
        optimizer = kind(groups, lr=1e-2, nesterov=True, betas=(0.9, 0.98))
        for _ in range(20):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.zero_grad()
            (model(torch.randn(64, 48)) - 1).square().mean().backward()
            optimizer.step()
        assert torch.equal(frozen, torch.ones(4, 4))
        learnt.append(list(model.parameters()))
    assert all(torch.equal(ours, timms) for ours, timms in zip(*learnt, strict=True))


def test_what_a_stage_learnt_is_where_the_next_begins(run: Path) -> None:
    """A few small steps move a weight much less than two random weights differ."""
    seen = load_file(run / "maps/model.safetensors")["tower.blocks.0.attn.qkv.weight"]
    captions = load_file(run / "captions/model.safetensors")
    talked = load_file(run / "tiny/model.safetensors")
    name = "vision_model.vision_tower.blocks.0.attn.qkv.weight"
    assert not torch.equal(captions[name], seen)
    assert not torch.equal(talked[name], captions[name].half())
    assert (captions[name] - seen).std() < 0.1 * seen.std()
    assert (talked[name].float() - captions[name]).std() < 0.1 * seen.std()


def test_captions_have_no_system_prompt_and_no_question() -> None:
    for row in Captions(20, seed=1):
        assert row.system == ""
        assert [message["content"].strip() for message in row.messages[:1]] == ["<image_placeholder>"]
        assert row.types == ("description",)


@pytest.mark.parametrize("flag", ["--maps", "--captions", "--batch_size"])
def test_numbers_below_one_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), flag, "0"])
    assert "0 is not above 0" in capsys.readouterr().err
