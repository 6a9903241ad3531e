"""Code written for the original runs unchanged: the lines that notebooks and downstream tools copy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.processing_vlm import VLChatProcessorOutput
from deepseek_vl.utils.io import load_pil_images


def conversation_about(*pictures: Path, question: str = "Describe each stage of this image.") -> list[dict[str, Any]]:
    """A conversation of one question, in the original's form."""
    return [
        {
            "role": "User",
            "content": "<image_placeholder>" * len(pictures) + question,
            "images": [str(picture) for picture in pictures],
        },
        {"role": "Assistant", "content": ""},
    ]


def load(path: Path) -> tuple[VLChatProcessor, MultiModalityCausalLM]:
    """Load as the model card does, but on the CPU in float32, so that results can be compared."""
    vl_chat_processor: VLChatProcessor = VLChatProcessor.from_pretrained(str(path))
    vl_gpt: MultiModalityCausalLM = AutoModelForCausalLM.from_pretrained(str(path), trust_remote_code=True)
    return vl_chat_processor, vl_gpt.to(torch.float32).eval()


def answer_ids(vl_gpt: MultiModalityCausalLM, prepare_inputs: Any, tokenizer: Any, **kwargs: Any) -> torch.Tensor:
    """Generate an answer with the model card's two calls; returns its ids."""
    inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
    return vl_gpt.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=prepare_inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"max_new_tokens": 24, "do_sample": False, "use_cache": True, **kwargs},
    )


def test_the_model_cards_example(checkpoint: Path, picture: Path) -> None:
    model_path = str(checkpoint)
    vl_chat_processor: VLChatProcessor = VLChatProcessor.from_pretrained(model_path)
    tokenizer = vl_chat_processor.tokenizer

    vl_gpt: MultiModalityCausalLM = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
    vl_gpt = vl_gpt.to(torch.bfloat16).eval()

    conversation = conversation_about(picture)
    pil_images = load_pil_images(conversation)
    prepare_inputs = vl_chat_processor(conversations=conversation, images=pil_images, force_batchify=True).to(
        vl_gpt.device
    )
    inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
    outputs = vl_gpt.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=prepare_inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=16,
        do_sample=False,
        use_cache=True,
    )
    answer = tokenizer.decode(outputs[0].cpu().tolist(), skip_special_tokens=True)

    assert inputs_embeds.dtype == torch.bfloat16
    assert 1 <= outputs.shape[1] <= 16
    assert answer
    assert prepare_inputs["sft_format"][0].endswith(
        "User: <image_placeholder>Describe each stage of this image.\n\nAssistant:"
    )


def test_an_output_built_by_hand_is_batched(siglip_checkpoint: Path, picture: Path) -> None:
    """Some clients tokenize for themselves and only use `batchify`."""
    processor, model = load(siglip_checkpoint)
    conversation = conversation_about(picture)
    images = load_pil_images(conversation)

    prompt = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=conversation, sft_format=processor.sft_format, system_prompt=processor.system_prompt
    )
    input_ids = torch.LongTensor(processor.tokenizer.encode(prompt))
    image_indices = (input_ids == processor.image_id).nonzero()
    input_ids, num_image_tokens = processor.add_image_token(image_indices=image_indices, input_ids=input_ids)
    pixel_values = processor.image_processor(images, return_tensors="pt").pixel_values
    by_hand = VLChatProcessorOutput(
        sft_format=prompt, input_ids=input_ids, pixel_values=pixel_values, num_image_tokens=num_image_tokens
    )
    batch = processor.batchify([by_hand])

    usual = processor(conversations=conversation, images=images)
    for key in usual.keys():  # noqa: SIM118  the clients' own way
        assert torch.equal(batch[key], usual[key]) if isinstance(usual[key], torch.Tensor) else batch[key] == usual[key]
    assert (
        answer_ids(model, batch, processor.tokenizer).tolist() == answer_ids(model, usual, processor.tokenizer).tolist()
    )


def test_only_the_processor_is_loaded(siglip_checkpoint: Path, tmp_path: Path) -> None:
    """The processor loads without weights, for data pipelines."""
    directory = tmp_path / "processor_only"
    directory.mkdir()
    for file in siglip_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    processor = VLChatProcessor.from_pretrained(str(directory))
    output = processor(conversations=conversation_about(question="Hello?"), images=[])
    assert processor.tokenizer.decode(output.input_ids[0], skip_special_tokens=True) == output.sft_format[0]


def test_a_batch_of_three_answers_like_three_single_prompts(checkpoint: Path, tmp_path: Path) -> None:
    """Rows with one, two and no image, of different lengths."""
    processor, model = load(checkpoint)
    one, two = make_picture(tmp_path / "a.png", seed=1), make_picture(tmp_path / "b.png", (40, 120), seed=2)
    conversations = [
        conversation_about(one),
        conversation_about(one, two, question="Which of these two pictures is the brighter one, and why?"),
        conversation_about(question="Hi."),
    ]
    items = [processor(conversations=c, images=load_pil_images(c), force_batchify=False) for c in conversations]
    together = answer_ids(model, processor.batchify(items), processor.tokenizer)
    alone = [answer_ids(model, processor.batchify([item]), processor.tokenizer)[0] for item in items]
    assert len({tuple(ids.tolist()) for ids in alone}) == 3, "the three prompts should have different answers"
    for row, ids in zip(together, alone, strict=True):
        assert row[: len(ids)].tolist() == ids.tolist()
        assert (row[len(ids) :] == processor.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("part", ["language_model", "whole model"])
def test_lora_is_applied_saved_and_loaded_again(
    part: str, siglip_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    processor, model = load(siglip_checkpoint)
    plain = copy.deepcopy(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inputs = processor(conversations=conversation_about(picture), images=load_pil_images(conversation_about(picture)))

    def logits(model: MultiModalityCausalLM) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    if part == "language_model":
        model.language_model = get_peft_model(model.language_model, config)
        adapted = logits(model)
        assert answer_ids(model, inputs, processor.tokenizer).shape[1] >= 1
        model.language_model.save_pretrained(tmp_path / "lora")
        again = copy.deepcopy(plain)
        again.language_model = PeftModel.from_pretrained(again.language_model, tmp_path / "lora")
    else:
        wrapped = get_peft_model(model, config)
        adapted = logits(wrapped)
        assert wrapped.generate(**inputs, max_new_tokens=2).shape[1] > inputs.input_ids.shape[1]
        wrapped.save_pretrained(tmp_path / "lora")
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")

    assert not torch.allclose(adapted, logits(plain), atol=1e-2)
    torch.testing.assert_close(logits(again), adapted)


def test_device_map_auto(siglip_checkpoint: Path, picture: Path) -> None:
    processor, model = load(siglip_checkpoint)
    spread = AutoModelForCausalLM.from_pretrained(
        str(siglip_checkpoint), device_map="auto", dtype=torch.float32, trust_remote_code=True
    )
    conversation = conversation_about(picture)
    inputs = processor(conversations=conversation, images=load_pil_images(conversation)).to(
        spread.device, dtype=torch.float32
    )
    expected = answer_ids(model, inputs, processor.tokenizer)
    assert answer_ids(spread, inputs, processor.tokenizer).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated")
def test_parts_can_be_moved_hooked_and_traced(checkpoint: Path, picture: Path) -> None:
    processor, model = load(checkpoint)
    model.vision_model.to("cpu")
    model.aligner.to("cpu")
    model.language_model.to("cpu")
    inputs = processor(conversations=conversation_about(picture), images=load_pil_images(conversation_about(picture)))

    seen: dict[str, Any] = {}
    tower = getattr(model.vision_model, "vision_tower_low", model.vision_model).vision_tower
    tower.blocks[0].register_forward_hook(lambda module, args, output: seen.update(block=output.shape))
    model.language_model.model.layers[1].register_forward_hook(lambda module, args, output: seen.update(layer=output))
    model(**inputs)
    assert seen["block"] == (1, 16, 48)
    hidden = seen["layer"][0] if isinstance(seen["layer"], tuple) else seen["layer"]
    assert hidden.shape[-1] == 64

    with torch.no_grad():
        traced = torch.jit.trace(model.vision_model, inputs.pixel_values[0], check_trace=False)
        outputs, expected = traced(inputs.pixel_values[0]), model.vision_model(inputs.pixel_values[0])
    for output, value in zip(*(x if isinstance(x, tuple) else (x,) for x in (outputs, expected)), strict=True):
        torch.testing.assert_close(output, value)


def test_gradients_reach_pixels_and_embeddings(checkpoint: Path, picture: Path) -> None:
    processor, model = load(checkpoint)
    inputs = processor(conversations=conversation_about(picture), images=load_pil_images(conversation_about(picture)))
    inputs["pixel_values"] = inputs.pixel_values.requires_grad_()
    embeds = model.prepare_inputs_embeds(**inputs)
    embeds.retain_grad()
    model.language_model(inputs_embeds=embeds, attention_mask=inputs.attention_mask).logits[:, -1].sum().backward()
    assert inputs.pixel_values.grad.abs().sum() > 0
    assert (embeds.grad.abs().sum(dim=-1) > 0).all()
    assert embeds.grad.shape == embeds.shape


def test_tokens_are_added_and_embeddings_resized(siglip_checkpoint: Path, picture: Path) -> None:
    processor, model = load(siglip_checkpoint)
    processor.tokenizer.add_tokens(["<box>", "</box>"])
    model.language_model.resize_token_embeddings(len(processor.tokenizer))
    conversation = conversation_about(picture, question="<box>1</box>")
    inputs = processor(conversations=conversation, images=load_pil_images(conversation))
    assert inputs.input_ids.max() == len(processor.tokenizer) - 1
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer)


def test_continuing_from_a_cache_gives_the_same_answer(checkpoint: Path, picture: Path) -> None:
    """A second turn continues from the first turn's cache; each has an image."""
    processor, model = load(checkpoint)
    first = conversation_about(picture)
    inputs = processor(conversations=first, images=load_pil_images(first))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    second = [
        *first[:1],
        {"role": "Assistant", "content": "A gradient."},
        *conversation_about(picture, question="And this?"),
    ]
    longer = processor(conversations=second, images=load_pil_images(second))
    assert torch.equal(longer.input_ids[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    expected = model.generate(**longer, max_new_tokens=12, do_sample=False)
    assert (
        model.generate(**longer, max_new_tokens=12, do_sample=False, past_key_values=cache).tolist()
        == expected.tolist()
    )
