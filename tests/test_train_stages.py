"""The trainable parts and learning rates of each stage, and adapters: their layers, and merging them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_TAG, make_picture
from safetensors.torch import load_file

from deepseek_vl.data.rows import TrainingRow
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.train import lora
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.lora import add_lora, merge
from deepseek_vl.train.stages import NEVER_USED, PARTS, STAGES, parameter_groups, part_of, parts_of, set_trainable
from deepseek_vl.utils.io import load_pretrained_model

SIGLIP = {"siglip": "vision_model.vision_tower.", "hybrid": "vision_model.vision_tower_low."}
SAM = "vision_model.vision_tower_high."
LEARNS = {
    "adaptor": dict.fromkeys(SIGLIP, ("aligner.",)),
    "pretrain": dict.fromkeys(SIGLIP, ("aligner.", "language_model.")),
    "sft": {kind: (prefix, "aligner.", "language_model.") for kind, prefix in SIGLIP.items()},
}
"""For each stage and kind of model, the prefixes of the names of trainable parameters (paper, section 3.3)."""
CHOICES = [("siglip", "projector"), ("siglip", "siglip"), ("siglip", "language"), ("hybrid", "projector"),
           ("hybrid", "siglip"), ("hybrid", "language"), ("hybrid", "sam")]  # fmt: skip
"""Every part of every kind of model."""


@pytest.fixture(params=["siglip", "hybrid"])
def kind(request) -> str:
    """Each kind of model."""
    return request.param


@pytest.fixture
def directory(request, kind) -> Path:
    """The checkpoint of that kind."""
    return request.getfixturevalue(f"{kind}_checkpoint")


@pytest.fixture
def model(directory) -> MultiModalityCausalLM:
    """A fresh model of that kind."""
    return load_pretrained_model(directory, device="cpu", dtype="float32")[2].train()


def make_batch(directory: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Two conversations with three images."""
    images = [make_picture(folder / f"{i}.png", seed=i) for i in range(3)]
    rows = [
        TrainingRow(
            [
                {"role": "User", "content": f"{IMAGE_TAG * len(part)}What is it?", "images": part},
                {"role": "Assistant", "content": "A thing of many colours."},
            ]
        )
        for part in (images[:1], images[1:])
    ]
    return TrainingCollator(VLChatProcessor.from_pretrained(str(directory)))(rows)


@pytest.fixture
def batch(directory, tmp_path) -> dict[str, torch.Tensor]:
    """A batch for the model."""
    return make_batch(directory, tmp_path)


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The gradient of each parameter after one backward pass; None without one."""
    model(**batch, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def unused(name: str) -> bool:
    return any(part in name for part in NEVER_USED)


# Stages


def test_every_parameter_is_of_one_part_or_never_used(kind, model, batch):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    reached = {name for name, gradient in gradients(model, batch).items() if gradient is not None}
    names = [name for name, _ in model.named_parameters()]
    assert {name for name in names if unused(name)} == set(names) - reached
    for name in names:
        parts = [part for part, prefixes in PARTS.items() if name.startswith(prefixes)]
        assert unused(name) or parts == [part_of(name)], name
        assert not unused(name) or part_of(name) is None
    assert parts_of(model) == (tuple(PARTS) if kind == "hybrid" else ("siglip", "projector", "language"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_all_of_its_parts_and_nothing_else(kind, model, batch, stage):
    set_trainable(model, STAGES[stage].parts)
    learning = 0
    for name, gradient in gradients(model, batch).items():
        if name.startswith(LEARNS[stage][kind]) and not unused(name):
            assert gradient is not None and gradient.any(), name
            learning += 1
        else:
            assert gradient is None, name
    assert learning > 2


@pytest.mark.parametrize(("kind", "part"), CHOICES)
def test_each_part_can_learn_alone(kind, model, batch, part):
    set_trainable(model, parts_of(model))
    set_trainable(model, [part])
    prefix = {"siglip": SIGLIP[kind], "sam": SAM, "projector": "aligner.", "language": "language_model."}[part]
    for name, gradient in gradients(model, batch).items():
        if name.startswith(prefix) and not unused(name):
            assert gradient is not None and gradient.any(), name
        else:
            assert gradient is None, name


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("siglip", ["sam"], "There is no part 'sam' to train; this model has siglip, projector, language."),
        ("hybrid", ["projector", "head"], "no part 'head' to train; this model has sam, siglip, projector, language."),
        ("hybrid", [], "Nothing would learn; give at least one of the parts sam, siglip, projector, language."),
    ],
)
def test_parts_that_are_not_there(kind, model, parts, message):
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError) as caught:
        set_trainable(model, parts)
    assert message in str(caught.value)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_each_part_has_its_rate_and_vectors_are_not_decayed(kind, model):
    set_trainable(model, parts_of(model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, {"siglip": 2e-3, "sam": 0.0}, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert {names[parameter] for parameter in grouped} == {name for name in names.values() if not unused(name)}
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            rate = 2e-3 if name.startswith(SIGLIP[kind]) else 0.0 if name.startswith(SAM) else 1e-3
            assert group["lr"] == rate, name
            is_vector = "norm" in name or name.endswith(".bias")
            assert not is_vector or group["weight_decay"] == 0, name
            assert parameter.ndim < 2 or group["weight_decay"] == 0.1, name


def test_only_what_learns_is_in_the_optimizer(model):
    set_trainable(model, ["projector"])
    grouped = {parameter for group in parameter_groups(model, 1e-3, {}, 0.1) for parameter in group["params"]}
    assert grouped == set(model.aligner.parameters())


# LoRA

LAYERS = {
    ("siglip", "siglip"): 2 * 4, ("siglip", "projector"): 2, ("siglip", "language"): 2 * 7,
    ("hybrid", "siglip"): 2 * 4, ("hybrid", "projector"): 3, ("hybrid", "language"): 2 * 7, ("hybrid", "sam"): 3 * 4,
}  # fmt: skip
"""The number of linear layers in each part of the miniature models."""


@pytest.mark.parametrize(("kind", "part"), CHOICES)
def test_adapters_are_on_every_linear_layer_of_the_chosen_part_and_they_alone_learn(kind, model, batch, part):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = add_lora(model, [part], rank=4, alpha=8, dropout=0.0)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * LAYERS[kind, part]
    for name, gradient in gradients(adapted, batch).items():
        if name in learning:
            assert "lora_" in name and part_of(name) == part
            assert gradient is not None and (gradient.any() or "lora_A" in name), name  # B starts as zeros
        else:
            assert gradient is None, name
    assert {part_of(name) for name in learning} == {part}
    for name, parameter in adapted.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_adapters_on_several_parts(kind, model):
    adapted = add_lora(model, parts_of(model))
    learning = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * sum(count for (of, _), count in LAYERS.items() if of == kind)
    groups = parameter_groups(adapted, 1e-3, {"projector": 5e-4}, weight_decay=0.0)
    assert sorted(group["lr"] for group in groups) == [5e-4] + [1e-3] * (len(parts_of(model)) - 1)


def test_no_adapters_on_parts_that_are_not_there(siglip_checkpoint):
    model = load_pretrained_model(siglip_checkpoint, device="cpu", dtype="float32")[2]
    with pytest.raises(ValueError, match="There is no part 'sam' to adapt; this model has siglip, projector, language"):
        add_lora(model, ["sam"])


def train_adapter(base: Path, output: Path) -> torch.nn.Module:
    """Save an adapter of all parts with random weights, as the trainer does after training; returns its model."""
    _, processor, model = load_pretrained_model(base, device="cpu", dtype="float32")
    adapted = add_lora(model, parts_of(model), rank=4, alpha=8).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(output)
    processor.save_pretrained(str(output))
    return adapted


@pytest.fixture(params=["float32", "bfloat16"])
def base(request, directory, tmp_path) -> Path:
    """A checkpoint of each kind, stored in float32 and in bfloat16."""
    copy = tmp_path / "base"
    shutil.copytree(directory, copy)
    model = load_pretrained_model(directory, device="cpu", dtype=request.param)[2]
    model.save_pretrained(copy)
    return copy


def test_merging_gives_a_checkpoint_that_answers_as_the_adapter_does(base, tmp_path):
    adapted = train_adapter(base, tmp_path / "adapter")
    batch = make_batch(base, tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged")

    stored, of_base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert {name: (weight.dtype, weight.shape) for name, weight in stored.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in of_base.items()
    }
    _, _, merged = load_pretrained_model(tmp_path / "merged", device="cpu", dtype="float32")
    _, _, plain = load_pretrained_model(base, device="cpu", dtype="float32")
    with torch.no_grad():
        expected, logits, before = (each(**batch).logits for each in (adapted, merged, plain))
    scale = expected.abs().max()
    tolerance = (1e-5 if next(iter(stored.values())).dtype == torch.float32 else 0.05) * scale
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(tolerance))
    assert (before - expected).abs().max() > 10 * tolerance


def test_the_base_may_have_moved(directory, tmp_path, capsys):
    shutil.copytree(directory, tmp_path / "base")
    train_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert lora.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m deepseek_vl.train.lora: error: ") and str(tmp_path / "base") in error
    assert lora.main([*arguments, "--model_path", str(tmp_path / "elsewhere")]) == 0
    load_pretrained_model(tmp_path / "merged", device="cpu", dtype="float32")


def test_what_cannot_be_merged(siglip_checkpoint, hybrid_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no LoRA adapter: it has no adapter_config"):
        merge(siglip_checkpoint, tmp_path / "merged")
    train_adapter(siglip_checkpoint, tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit"):
        merge(tmp_path / "adapter", tmp_path / "merged", str(hybrid_checkpoint))
    assert not (tmp_path / "merged").exists()

    config = tmp_path / "adapter" / "adapter_config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it belongs to; give --model_path"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    config.write_text(whole[:20])
    with pytest.raises(OSError, match=r"adapter_config.json' is not JSON"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    config.write_text(whole)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors, the adapter's weights"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "elsewhere").rename(tmp_path / "adapter" / "adapter_model.safetensors")

    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; choose a new directory"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert [file.read_text() for file in (tmp_path / "merged").iterdir()] == ["mine"]
