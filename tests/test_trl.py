"""TRL's trainers and PEFT, with the classes that the Auto classes return for the published layout, and our own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, EOS, IMAGE_TAG, make_picture
from PIL import Image

from deepseek_vl import (
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    MultiModalityCausalLM,
    VLChatProcessor,
)
from deepseek_vl.data.rows import TrainingRow
from deepseek_vl.train.collator import TrainingCollator

trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # TRL's own
]

TURNS = [
    [("What is it?", "A picture."), ("So?", "Yes, it is. 🙂")],
    [("And this, at some more length?", "Another one.")],
]
"""Two conversations that begin with a picture each."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    return [Image.open(make_picture(folder / f"{i}.png", (40, 30), seed=i)).convert("RGB") for i in range(2)]


def turns_of(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in conversation
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


@pytest.fixture(scope="module")
def conversations(pictures) -> Any:
    rows = [{"messages": turns_of(turns), "images": [image]} for turns, image in zip(TURNS, pictures, strict=True)]
    return datasets.Dataset.from_list(rows * 2)


@pytest.fixture(scope="module")
def completions(pictures) -> Any:
    rows = [
        {"prompt": turns_of(turns)[:-1], "completion": turns_of(turns)[-1:], "images": [image]}
        for turns, image in zip(TURNS, pictures, strict=True)
    ]
    return datasets.Dataset.from_list(rows * 2)


@pytest.fixture(scope="module")
def preferences(pictures) -> Any:
    no = [{"role": "assistant", "content": "No, and it never was."}]
    rows = [
        {"prompt": turns_of(turns)[:-1], "chosen": turns_of(turns)[-1:], "rejected": no, "images": [image]}
        for turns, image in zip(TURNS, pictures, strict=True)
    ]
    return datasets.Dataset.from_list(rows * 2)


@pytest.fixture(params=["path", "DeepseekVL", "DeepseekVL, transformers' layout"])
def model(request, checkpoint) -> dict[str, Any]:
    """Arguments for a trainer: the path of a checkpoint in the published layout, or a model and its processor."""
    if request.param == "path":
        return {"model": str(checkpoint)}
    directory = checkpoint
    if "layout" in request.param:
        from deepseek_vl.convert import convert

        directory = request.getfixturevalue("tmp_path") / "exported"
        convert(checkpoint, directory, "transformers")
    return {
        "model": DeepseekVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32),
        "processing_class": DeepseekVLProcessor.from_pretrained(directory),
    }


def settings(output: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False, **more,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def our_batch(checkpoint: Path, pictures: list[Image.Image], masked: bool = True) -> dict[str, Any]:
    """The batch of the same conversations that this package's own trainer makes."""
    rows = []
    for turns, image in zip(TURNS, pictures, strict=True):
        messages = [{**message, "role": message["role"].capitalize()} for message in turns_of(turns)]
        messages[0] = {**messages[0], "content": f"{IMAGE_TAG}{messages[0]['content']}", "images": [image]}
        rows.append(TrainingRow(messages))
    processor = VLChatProcessor.from_pretrained(checkpoint)
    processor.mask_prompt = masked
    return TrainingCollator(processor)(rows)


@pytest.mark.parametrize("assistant_only", [True, False])
def test_supervised_fine_tuning(model, checkpoint, conversations, pictures, tmp_path, assistant_only):
    arguments = trl.SFTConfig(**settings(tmp_path, assistant_only_loss=assistant_only))
    trainer = trl.SFTTrainer(args=arguments, train_dataset=conversations, **model)
    if "processing_class" not in model:
        assert type(trainer.model) is MultiModalityCausalLM and type(trainer.processing_class) is VLChatProcessor
    batch = trainer.data_collator([copy.copy(conversations[i]) for i in range(2)])
    ours = our_batch(checkpoint, pictures, masked=assistant_only)
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert (batch["input_ids"] == trainer.processing_class.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
    if assistant_only:  # the same tokens are learnt as in this package's trainer
        assert torch.equal(batch["labels"], ours["labels"])
        end = trainer.processing_class.tokenizer.eos_token_id
        assert (batch["labels"] == end).sum(1).tolist() == [len(turns) for turns in TURNS]
    trainer.model.eval()
    reference = MultiModalityCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = trainer.model(**batch).loss
        expected = reference(**{**ours, "labels": batch["labels"]}).loss
        fused = trainer.model(**batch, fused_lm_head=True).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=0)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert len(losses(trainer)) == 2
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_too_long_conversations_are_cut_and_never_inside_an_image(siglip_checkpoint, conversations, tmp_path):
    arguments = trl.SFTConfig(**settings(tmp_path, assistant_only_loss=True, max_length=90))
    trainer = trl.SFTTrainer(model=str(siglip_checkpoint), args=arguments, train_dataset=conversations)
    batch = trainer.data_collator([copy.copy(conversations[i]) for i in range(2)])
    images = (batch["input_ids"] == trainer.model.config.image_token_id).sum(1)
    assert batch["input_ids"].shape[1] <= 90 and not (images % 16).any()
    trainer.train()


def test_prompts_and_completions(model, completions, tmp_path):
    """Prompts have different lengths: TRL pads the shorter one, and must move its image positions with the tokens."""
    arguments = trl.SFTConfig(**settings(tmp_path))
    trainer = trl.SFTTrainer(args=arguments, train_dataset=completions, **model)
    batch = trainer.data_collator([copy.copy(completions[i]) for i in range(2)])
    tokenizer = trainer.processing_class.tokenizer
    learnt = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == [f" {turns[-1][1]}{EOS}" for turns in TURNS]
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert all(text.startswith(BOS) and text.count(BOS) == 1 for text in texts)
    if "mm_token_type_ids" in batch:
        assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == trainer.model.config.image_token_id)
    trainer.model.eval()
    with torch.no_grad():
        together = trainer.model(**batch).logits
        for i in range(2):
            alone = trainer.data_collator([copy.copy(completions[i])])
            length = alone["input_ids"].shape[1]
            expected = trainer.model(**alone).logits[0]
            torch.testing.assert_close(together[i, :length], expected, rtol=0, atol=1e-4)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_text_without_pictures(model, tmp_path):
    data = datasets.Dataset.from_list([{"messages": turns_of(turns)} for turns in TURNS] * 2)
    arguments = trl.SFTConfig(**settings(tmp_path, assistant_only_loss=True, gradient_checkpointing=False))
    trainer = trl.SFTTrainer(args=arguments, train_dataset=data, **model)
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids[0] == trainer.processing_class.tokenizer.bos_token_id
    trainer.train()
    assert len(losses(trainer)) == 2


def test_preferences_without_a_reference_model(model, checkpoint, preferences, tmp_path):
    is_hybrid = "vision_tower_high" in str(MultiModalityCausalLM.from_pretrained(checkpoint))
    if "processing_class" in model and is_hybrid and model["model"].config.name_or_path == str(checkpoint):
        pytest.skip("by the path TRL opens the reference model in the published form, whose pixels are others")
    arguments = trl.DPOConfig(**settings(tmp_path, beta=0.1))
    trainer = trl.DPOTrainer(args=arguments, train_dataset=preferences, **model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are still equal
    assert log[1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("pictured", [True, False])
def test_group_relative_policy_optimization(model, checkpoint, completions, tmp_path, pictured):
    data = completions.remove_columns(["completion"] if pictured else ["completion", "images"])
    if "processing_class" in model and pictured and getattr(model["model"].config, "is_hybrid", False):
        pytest.skip("TRL hands on pixel_values alone, and this form of the hybrid model has two kinds of pixels")
    rewarded = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        rewarded.extend(completions)
        return [float(len(str(completion)) % 7) for completion in completions]

    arguments = trl.GRPOConfig(
        **settings(tmp_path, num_generations=2, max_completion_length=6, temperature=1.0, beta=0.0)
    )
    trainer = trl.GRPOTrainer(args=arguments, train_dataset=data, reward_funcs=reward, **model)
    trainer.train()
    assert len(rewarded) >= 4 and len(losses(trainer)) == 2


@pytest.mark.parametrize("rows", ["conversations", "preferences"])
def test_adapters(model, rows, request, tmp_path):
    data = request.getfixturevalue(rows)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    kinds = {"conversations": (trl.SFTTrainer, trl.SFTConfig), "preferences": (trl.DPOTrainer, trl.DPOConfig)}
    trainer_class, config_class = kinds[rows]
    more = {"assistant_only_loss": True} if rows == "conversations" else {}
    trainer = trainer_class(
        args=config_class(**settings(tmp_path, **more)), train_dataset=data, peft_config=config, **model
    )  # fmt: skip
    trainer.train()
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    moved = [weight for name, weight in trainer.model.named_parameters() if "lora_B.default" in name]
    assert any(weight.abs().max() > 0 for weight in moved)


@pytest.mark.parametrize("model_class", [MultiModalityCausalLM, DeepseekVLForConditionalGeneration])
def test_the_preparation_of_qlora(model_class, checkpoint, pictures, tmp_path):
    """QLoRA's preparation freezes all weights, and gradients flow through checkpointed layers to the adapters."""
    model = model_class.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model)
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad]
    model.is_loaded_in_4bit = False  # the weights are not in 4 bits: peft is to add ordinary adapters
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).train()
    if model_class is MultiModalityCausalLM:
        batch = VLChatProcessor.from_pretrained(checkpoint)(text=f"{IMAGE_TAG}What?", images=pictures[:1])
    else:
        batch = DeepseekVLProcessor.from_pretrained(checkpoint)(text=f"{IMAGE_TAG}What?", images=pictures[:1])
    loss = adapted(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
