"""Training in several processes, and the messages at a run's start."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_picture
from PIL import Image
from training import log, train, weights, write_mixed

from deepseek_vl import DeepseekVLProcessor, VLChatProcessor
from deepseek_vl.utils.io import load_pretrained_model

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    "--max_steps", 4, "--dtype", "float32", "--device", "cpu", "--learning_rate", 1e-3, "--warmup_steps", 0,
    "--logging_steps", 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows with none, one and two pictures."""
    return write_mixed(tmp_path_factory.mktemp("data"))


def launch(*command: Any) -> str:
    """Run `accelerate launch`; returns its standard error."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *command]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


COMMAND = ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "deepseek_vl.train"]
TWO_PROCESSES = ["--num_processes", 2, "--multi_gpu"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("siglip", marks=pytest.mark.long), "hybrid"])
def test_two_processes_learn_what_one_does(request, data, tmp_path, kind):
    """Two processes on CPUs learn the same as one, with some batches without images."""
    options = ["--model_path", request.getfixturevalue(f"{kind}_checkpoint"), "--data", data, *OPTIONS]
    assert train(*options, "--output", tmp_path / "one", "--batch_size", 2, "--workers", 0) == 0
    launch(*TWO_PROCESSES, *COMMAND, *options, "--output", tmp_path / "two", "--batch_size", 1)

    assert log(tmp_path / "two", "loss") == pytest.approx(log(tmp_path / "one", "loss"), rel=1e-3)
    of_one, of_two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert of_two.keys() == of_one.keys()
    for name, weight in of_two.items():
        torch.testing.assert_close(weight.float(), of_one[name].float(), rtol=0.02, atol=2e-3, msg=name)
    load_pretrained_model(tmp_path / "two", device="cpu")
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_processes", 2, "--cpu"], "in float32, 1 process."),  # accelerate silently starts one process
        (TWO_PROCESSES, "in float32, 2 processes, each with all weights."),
    ],
    ids=["one process", "two processes"],
)
def test_the_start_says_how_many_processes_there_are(siglip_checkpoint, data, tmp_path, flags, said):
    heard = launch(
        *flags, *COMMAND, "--model_path", siglip_checkpoint, "--data", data, "--output", tmp_path / "out", *OPTIONS
    )  # fmt: skip
    assert heard.count(said) == heard.count("Training on cpu") == 1


@pytest.mark.parametrize("more", [[], ["--lora"]], ids=str)
def test_a_run_says_what_it_is_about_to_do(hybrid_checkpoint, data, tmp_path, more, caplog):
    options = [
        "--model_path", hybrid_checkpoint, "--data", data, "--eval_data", data, *OPTIONS, "--workers", 0,
        "--batch_size", 2, "--gradient_accumulation", 2, "--train", "siglip", "projector", "--part_rate", "siglip=1e-4",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert train(*options, "--output", tmp_path / "out", *more) == 0
    model = load_pretrained_model(hybrid_checkpoint, device="cpu", dtype="float32")[2]
    start = next(i for i, text in enumerate(caplog.messages) if text.startswith("Training on"))
    where, what, how = caplog.messages[start : start + 3]
    assert where == "Training on cpu (1 threads) in float32, 1 process."
    assert how == "8 examples and 8 for evaluation; 4 steps of 4; cosine schedule with 0 steps of warm-up."
    if more:
        assert "siglip (" in what and "learning rate 0.0001" in what and "projector (" in what
        return
    siglip = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "vision_tower_low" in name and "attn_pool" not in name
    )
    projector = sum(weight.numel() for weight in model.aligner.parameters())
    assert what == (
        f"Of {model.num_parameters():,} parameters learn: siglip ({siglip:,} parameters, learning rate 0.0001), "
        f"projector ({projector:,} parameters, learning rate 0.001)."
    )


BY_HAND = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import deepseek_vl

torch.set_num_threads(1)
dist.init_process_group("gloo")
batch = torch.load(sys.argv[3], weights_only=True)
model = getattr(deepseek_vl, sys.argv[1]).from_pretrained(sys.argv[2], dtype=torch.float32).train()
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
for _ in range(3):  # a weight that no loss depends on is an error in the second step
    loss = parallel(**batch).loss
    loss.backward()
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing, missing
    optimizer.step()
    optimizer.zero_grad()
print("loss", loss.item())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["MultiModalityCausalLM", "DeepseekVLForConditionalGeneration"])
@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_data_parallel_training_written_by_hand(request, kind, model_class, tmp_path):
    """Plain DistributedDataParallel trains all parameters, without `find_unused_parameters`."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    picture = Image.open(make_picture(tmp_path / "a.png"))
    if model_class == "MultiModalityCausalLM":
        processor = VLChatProcessor.from_pretrained(checkpoint)
        batch = dict(processor(prompt="<image_placeholder>What?", images=[picture]))
        del batch["sft_format"]
    else:
        processor = DeepseekVLProcessor.from_pretrained(checkpoint)
        batch = dict(processor(text="<image_placeholder>What?", images=picture))
    batch["labels"] = batch["input_ids"].clone()
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "by_hand.py").write_text(BY_HAND, encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "by_hand.py",
        model_class, checkpoint, tmp_path / "batch.pt",
    ]  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("loss") == 2
