"""The outputs are the reference's: integers bit for bit, floats to rounding.

`golden/` holds what the reference computed on seven images and five prompts. The model cases run the published towers
at full width (few layers) in float32, on weights that `golden/recipe.py` draws.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from benchmarks.random_checkpoint import published_image_processor
from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.utils.io import load_pil_images

IMAGES = ["landscape", "portrait", "square", "strip", "tiny", "grey", "alpha"]
PROMPTS = ["one_image", "two_images", "image_last", "two_turns", "text_only"]
CASES = [
    ("siglip_small", "one_image"),
    ("siglip_small", "two_images"),
    ("siglip_small", "two_turns"),
    ("siglip_small", "one_image+two_images"),
    ("hybrid_small", "one_image"),
    ("hybrid_small", "image_last"),
]
TOWER_IMAGES = {"siglip_small": ["landscape", "square"], "hybrid_small": ["portrait"]}
BASE = {"siglip_small": "1.3b", "hybrid_small": "7b"}


def golden_image(name: str) -> Any:
    """A golden image as the library loads it."""
    return load_pil_images([{"images": [GOLDEN / "images" / f"{name}.png"]}])[0]


@pytest.fixture(scope="module")
def processors(published_tokenizer_dir: Path) -> dict[str, VLChatProcessor]:
    """The published processors, with the published tokenizer."""
    tokenizer = load_tokenizer(str(published_tokenizer_dir))
    return {size: VLChatProcessor(published_image_processor(size), tokenizer) for size in ("1.3b", "7b")}


@pytest.fixture(scope="module")
def models(golden: dict[str, Any]) -> dict[str, MultiModalityCausalLM]:
    """The golden models, filled with the recipe's weights."""
    sys.path.insert(0, str(GOLDEN))
    from recipe import load_recipe_weights

    sys.path.pop(0)
    return {
        name: load_recipe_weights(MultiModalityCausalLM(MultiModalityConfig(**model["config"]))).eval()
        for name, model in golden["models"].items()
    }


@pytest.mark.parametrize("size", ["1.3b", "7b"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_processor(size: str, name: str, golden: dict[str, Any], golden_arrays: dict[str, np.ndarray]) -> None:
    expected = golden["image_processor"][f"{size}/{name}"]
    processor = published_image_processor(size)
    square = processor.resize(golden_image(name))
    assert square.dtype == np.uint8
    assert list(square.shape) == expected["shape"]
    assert hashlib.sha256(square.tobytes()).hexdigest() == expected["sha256_uint8_chw"]
    assert list(processor.background_color) == expected["background"]

    pixels = processor(golden_image(name), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels[:, ::37, ::41], golden_arrays[f"px/{size}/{name}"])
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), expected["mean"], atol=1e-5)
    np.testing.assert_allclose(pixels.std(axis=(1, 2)), expected["std"], atol=1e-3)


def process(processor: VLChatProcessor, prompt: dict[str, Any]) -> Any:
    """A golden conversation, processed but not batched."""
    images = [golden_image(name) for message in prompt["conversation"] for name in message.get("images", [])]
    return processor(conversations=prompt["conversation"], images=images, force_batchify=False)


def runs(mask: torch.Tensor) -> list[list[int]]:
    """[start, length] of each run of True values; adjacent images are one run."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
    return [[start, end - start] for start, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_and_tokens(name: str, processors: dict[str, VLChatProcessor], golden: dict[str, Any]) -> None:
    prompt = golden["prompts"][name]
    processor = processors["1.3b"]
    output = process(processor, prompt)
    assert output.sft_format == prompt["sft_format"]
    assert processor.tokenizer.encode(output.sft_format) == prompt["text_ids"]
    assert len(output) == prompt["length"]
    assert runs(output.input_ids == processor.image_id) == prompt["image_runs"]


def test_batch(processors: dict[str, VLChatProcessor], golden: dict[str, Any]) -> None:
    expected, processor = golden["batch"], processors["1.3b"]
    batch = processor.batchify([process(processor, golden["prompts"][name]) for name in expected["names"]])
    assert list(batch.input_ids.shape) == expected["input_ids_shape"]
    assert (batch.attention_mask == 0).sum(dim=1).tolist() == expected["pad_lengths"]
    assert batch.input_ids[:, :8].tolist() == expected["first_ids"]
    assert [runs(row) for row in batch.images_seq_mask] == expected["seq_runs"]
    assert batch.images_emb_mask.sum(dim=-1).tolist() == expected["emb_mask_sums"]
    assert list(batch.pixel_values.shape) == expected["pixel_values_shape"]
    assert batch.sft_format == expected["sft_format"]


def batch_of(case: str, processor: VLChatProcessor, golden: dict[str, Any]) -> BatchedVLChatProcessorOutput:
    """The left-padded batch of a golden case, whose name joins its prompts' names with '+'."""
    return processor.batchify([process(processor, golden["prompts"][name]) for name in case.split("+")])


@pytest.mark.parametrize(("name", "case"), CASES)
@torch.inference_mode()
def test_model(
    name: str,
    case: str,
    models: dict[str, MultiModalityCausalLM],
    processors: dict[str, VLChatProcessor],
    golden: dict[str, Any],
    golden_arrays: dict[str, np.ndarray],
) -> None:
    model, processor = models[name], processors[BASE[name]]
    expected = golden["models"][name]["cases"][case]
    batch = batch_of(case, processor, golden)

    embeds = model.prepare_inputs_embeds(**batch)
    assert list(embeds.shape) == expected["embeds_shape"]
    np.testing.assert_allclose(embeds[:, ::7, ::5], golden_arrays[f"embeds/{name}/{case}"], atol=2e-4, rtol=0)

    logits = model.language_model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits[:, -1]
    np.testing.assert_allclose(logits[:, ::101], golden_arrays[f"logits/{name}/{case}"], atol=2e-3, rtol=0)
    top = logits.topk(20)
    assert top.indices.tolist() == expected["top20_ids"]
    np.testing.assert_allclose(top.values, expected["top20_logits"], atol=2e-3, rtol=0)

    # As callers of the reference do, with the token ids they pass.
    tokenizer = processor.tokenizer
    answer = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=16,
        do_sample=False,
        use_cache=True,
    )
    assert answer.tolist() == expected["greedy"]
    # Directly from the processor's output.
    whole = model.generate(**batch, max_new_tokens=16, do_sample=False)
    assert whole[:, batch.input_ids.shape[1] :].tolist() == expected["greedy"]


@pytest.mark.parametrize("name", ["siglip_small", "hybrid_small"])
@torch.inference_mode()
def test_tower_and_aligner(
    name: str,
    models: dict[str, MultiModalityCausalLM],
    golden: dict[str, Any],
    golden_arrays: dict[str, np.ndarray],
) -> None:
    model, expected = models[name], golden["models"][name]
    images = [golden_image(image) for image in TOWER_IMAGES[name]]
    pixels = published_image_processor(BASE[name])(images)["pixel_values"]
    features = model.vision_model(pixels)
    if name == "hybrid_small":
        named = {"tower/hybrid_small/high": features[0], "tower/hybrid_small/low": features[1]}
    else:
        named = {"tower/siglip_small": features}
    named[f"aligner/{name}"] = model.aligner(features)
    assert list(named[f"aligner/{name}"].shape) == expected["aligner_shape"]
    for key, value in named.items():
        np.testing.assert_allclose(value[:, ::13, ::17], golden_arrays[key], atol=2e-4, rtol=0, err_msg=key)
