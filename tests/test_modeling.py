"""`MultiModalityCausalLM`: forward, generation, loading and saving, with real checkpoints on disk."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, make_picture, small_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.models.projector import MlpProjector

Batch = BatchedVLChatProcessorOutput

needs_safe_torch_load = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="transformers refuses .bin files below torch 2.6, for CVE-2025-32434",
)
FILE_FORMATS = ["safetensors", pytest.param("bin", marks=needs_safe_torch_load)]


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> VLChatProcessor:
    return VLChatProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MultiModalityCausalLM:
    """Shared by the module's tests, which leave it as it is."""
    return MultiModalityCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def own_model(checkpoint: Path) -> MultiModalityCausalLM:
    """A test's own, to change."""
    return MultiModalityCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("pictures")
    return [make_picture(directory / f"{seed}.png", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def make_batch(processor: VLChatProcessor, picture_files: list[Path]) -> Callable[..., Batch]:
    """A batch with so many images per row."""
    remaining_words = ["What is this?", "Tell me a story about a boat.", "Why?"]

    def make(*image_counts: int) -> Batch:
        files = iter(picture_files)
        rows = []
        for count, words in zip(image_counts, remaining_words, strict=False):
            conversation = [
                {"role": "User", "content": "<image_placeholder>" * count + words},
                {"role": "Assistant", "content": ""},
            ]
            images = [Image.open(next(files)).convert("RGB") for _ in range(count)]
            rows.append(processor(conversations=conversation, images=images, force_batchify=False))
        return processor.batchify(rows)

    return make


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """Rows with two images, none, and one: padding and blank slots."""
    return make_batch(2, 0, 1)


class encoded_images:
    """Counts the images that the vision model is given, call by call, within a `with` block."""

    def __init__(self, model: MultiModalityCausalLM):
        self.model = model

    def __enter__(self) -> list[int]:
        calls: list[int] = []
        self.hook = self.model.vision_model.register_forward_hook(
            lambda module, args, output: calls.append(len(args[0]))
        )
        return calls

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()


# --- structure ---


@pytest.mark.parametrize(("name", "tower"), [("1.3b", CLIPVisionTower), ("7b", HybridVisionTower)])
def test_parameters_have_the_published_names_and_shapes(name, tower):
    sections = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))[name]
    published = json.loads((GOLDEN / "state_dict.json").read_text(encoding="utf-8"))[name]
    with torch.device("meta"):
        model = MultiModalityCausalLM(MultiModalityConfig(**sections))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert type(model.vision_model) is tower
    assert type(model.aligner) is MlpProjector
    assert type(model.language_model) is LlamaForCausalLM


@pytest.mark.parametrize("name", ["1.3b", "7b"])
def test_the_published_vocabulary_s_special_tokens_are_known_without_a_tokenizer(name):
    """The published language configs carry Llama's 1 and 2 by oversight."""
    sections = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))[name]
    with torch.device("meta"):
        model = MultiModalityCausalLM(MultiModalityConfig(**sections))
    for generation_config in (model.generation_config, model.language_model.generation_config):
        assert generation_config.bos_token_id == 100000
        assert generation_config.eos_token_id == 100001


# --- embeddings ---


@torch.no_grad()
def test_image_features_overwrite_the_embeddings_of_image_positions_in_order(model, batch):
    embeds = model.prepare_inputs_embeds(**batch)
    words = model.language_model.model.embed_tokens(batch.input_ids)
    assert embeds.shape == words.shape == (3, batch.input_ids.shape[1], 64)
    assert torch.equal(embeds[~batch.images_seq_mask], words[~batch.images_seq_mask])
    real = [batch.pixel_values[0, 0], batch.pixel_values[0, 1], batch.pixel_values[2, 0]]
    expected = torch.cat([model.aligner(model.vision_model(image[None]))[0] for image in real])
    assert expected.shape == (3 * 16, 64)
    torch.testing.assert_close(embeds[batch.images_seq_mask], expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_only_features_marked_real_are_used(model, make_batch):
    """A processor that was given fewer features than the tower makes keeps the first of them."""
    batch = copy.deepcopy(make_batch(1))
    batch.images_emb_mask[0, 0, 10:] = False
    positions = batch.images_seq_mask[0].nonzero().flatten()
    batch.images_seq_mask[0, positions[10:]] = False
    embeds = model.prepare_inputs_embeds(**batch)
    features = model.get_image_features(batch.pixel_values[0])[0]
    assert torch.equal(embeds[0, positions[:10]], features[:10])
    assert torch.equal(embeds[0, positions[10:]], model.get_input_embeddings()(batch.input_ids[0, positions[10:]]))


@pytest.mark.parametrize(("image_counts", "encoded"), [((0,), []), ((0, 0), []), ((1,), [1]), ((2, 0, 1), [3])])
@torch.no_grad()
def test_only_real_images_are_encoded_and_none_without(model, make_batch, image_counts, encoded):
    batch = make_batch(*image_counts)
    assert batch.pixel_values.shape[:2] == (len(image_counts), max(1, *image_counts, 0))
    for run in (
        lambda: model.prepare_inputs_embeds(**batch),
        lambda: model(**batch),
        lambda: model.generate(**batch, max_new_tokens=3, do_sample=False),
    ):
        with encoded_images(model) as calls:
            run()
        assert calls == encoded


@torch.no_grad()
def test_a_blank_slot_changes_nothing_for_the_row(model, make_batch):
    alone, together = make_batch(0), make_batch(0, 1)
    embeds = model.prepare_inputs_embeds(**together)
    own = together.attention_mask[0].bool()
    assert torch.equal(embeds[0, own], model.prepare_inputs_embeds(**alone)[0])


@torch.no_grad()
def test_without_pixels_a_text_needs_no_pixel_tensor(model, make_batch):
    batch = make_batch(0)
    embeds = model.prepare_inputs_embeds(batch.input_ids, None, batch.images_seq_mask, batch.images_emb_mask)
    assert torch.equal(embeds, model.get_input_embeddings()(batch.input_ids))
    assert torch.equal(model(batch.input_ids).logits, model(inputs_embeds=embeds).logits)


@torch.no_grad()
def test_negative_ids_are_embedded_as_zero_and_the_caller_s_tensor_is_untouched(model, make_batch):
    batch = copy.deepcopy(make_batch(1))
    zeros = batch.input_ids.clone()
    batch.input_ids[batch.images_seq_mask] = -200
    batch.input_ids[0, 0], zeros[0, 0] = -1, 0
    given = batch.input_ids.clone()
    embeds = model.prepare_inputs_embeds(**batch)
    logits = model(**batch).logits
    plain = model(torch.tensor([[-5, 3]])).logits
    assert torch.equal(batch.input_ids, given)
    assert torch.equal(embeds, model.prepare_inputs_embeds(**{**batch, "input_ids": zeros}))
    assert torch.equal(logits, model(**{**batch, "input_ids": zeros}).logits)
    assert torch.equal(plain, model(torch.tensor([[0, 3]])).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_pixels_of_another_dtype_are_cast_to_the_model_s(model, batch, dtype):
    given = batch.pixel_values.to(dtype)
    embeds = model.prepare_inputs_embeds(**{**batch, "pixel_values": given})
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, model.prepare_inputs_embeds(**{**batch, "pixel_values": given.float()}))


@torch.no_grad()
def test_a_bfloat16_model_takes_float32_pixels(own_model, batch):
    own_model.to(torch.bfloat16)
    embeds = own_model.prepare_inputs_embeds(**batch)
    assert embeds.dtype == torch.bfloat16
    rounded = {**batch, "pixel_values": batch.pixel_values.bfloat16()}
    assert torch.equal(embeds, own_model.prepare_inputs_embeds(**rounded))
    assert own_model(**batch).logits.dtype == torch.bfloat16


def test_gradients_reach_pixels_and_embeddings(own_model, make_batch):
    batch = make_batch(1, 0)
    pixels = batch.pixel_values.clone().requires_grad_()
    embeds = own_model.prepare_inputs_embeds(**{**batch, "pixel_values": pixels})
    embeds.retain_grad()
    own_model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits[0, -1].pow(2).sum().backward()
    assert (pixels.grad[0] != 0).float().mean() > 0.99
    assert (pixels.grad[1] == 0).all()  # the blank slot
    assert torch.equal((embeds.grad[0] != 0).any(dim=-1), batch.attention_mask[0].bool())  # all but padding
    assert (embeds.grad[1] == 0).all()


# --- errors ---


def too_long(length: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.zeros(1, length, dtype=torch.int64),
        "pixel_values": None,
        "images_seq_mask": torch.zeros(1, length, dtype=torch.bool),
        "images_emb_mask": torch.zeros(1, 1, 16, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    ("method", "with_masks"),
    [("prepare_inputs_embeds", True), ("forward", True), ("generate", True), ("forward", False), ("generate", False)],
)
def test_a_prompt_longer_than_the_positions_is_an_error_with_both_lengths(model, method, with_masks):
    inputs = too_long(1025)
    if not with_masks:
        inputs = {"input_ids": inputs["input_ids"]}
    options = {"max_new_tokens": 1, "do_sample": False} if method == "generate" else {}
    with pytest.raises(ValueError, match=r"1025.*1024"):
        getattr(model, method)(**inputs, **options)


def test_a_prompt_as_long_as_the_positions_is_embedded(model):
    assert model.prepare_inputs_embeds(**too_long(1024)).shape == (1, 1024, 64)


@pytest.mark.parametrize("method", ["prepare_inputs_embeds", "forward", "generate"])
def test_image_positions_and_features_that_differ_in_number_are_an_error_with_both(model, make_batch, method):
    batch = copy.deepcopy(make_batch(1))
    batch.images_seq_mask[0, batch.images_seq_mask[0].nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"15.*16"):
        getattr(model, method)(**batch)


def test_image_positions_without_features_are_an_error(model, make_batch):
    batch = copy.deepcopy(make_batch(1))
    batch.images_emb_mask[:] = False
    with pytest.raises(ValueError, match=r"16.*0"):
        model.prepare_inputs_embeds(**batch)


def test_another_number_of_features_than_the_tower_gives_is_an_error_with_both(model, make_batch):
    batch = copy.deepcopy(make_batch(1))
    batch.images_emb_mask = torch.ones(1, 1, 9, dtype=torch.bool)
    batch.images_seq_mask[0, batch.images_seq_mask[0].nonzero()[9:]] = False
    with pytest.raises(ValueError, match=r"16.*9"):
        model.prepare_inputs_embeds(**batch)


def test_image_positions_without_pixels_are_an_error(model, make_batch):
    with pytest.raises(ValueError, match="pixel_values"):
        model.prepare_inputs_embeds(**{**make_batch(1), "pixel_values": None})


@pytest.mark.parametrize("missing", [["images_seq_mask"], ["images_emb_mask"], ["images_seq_mask", "images_emb_mask"]])
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_pixels_without_masks_are_an_error_that_names_them(model, make_batch, missing, method):
    inputs = {name: value for name, value in make_batch(1).items() if name not in missing}
    with pytest.raises(ValueError, match=missing[0]):
        getattr(model, method)(**inputs)


@pytest.mark.parametrize("given", [(), ("input_ids", "inputs_embeds")])
def test_forward_takes_exactly_one_of_ids_and_embeddings(model, given):
    inputs = {"input_ids": torch.tensor([[1, 2]]), "inputs_embeds": torch.zeros(1, 2, 64)}
    with pytest.raises(ValueError, match=r"input_ids.*inputs_embeds"):
        model(**{name: inputs[name] for name in given})


# --- forward ---


@torch.no_grad()
def test_forward_on_ids_and_pixels_equals_forward_on_prepared_embeddings(model, batch):
    embeds = model.prepare_inputs_embeds(**batch)
    logits = model(**batch).logits
    assert logits.shape == (*batch.input_ids.shape, model.config.language_config.vocab_size)
    assert torch.equal(logits, model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits)
    expected = model.language_model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_the_answer_depends_on_the_picture(model, batch):
    other = {**batch, "pixel_values": batch.pixel_values.flip(-1)}
    difference = (model(**batch).logits - model(**other).logits)[:, -1].abs().amax(dim=-1)
    assert difference[0] > 1e-3
    assert difference[1] == 0  # the row without images
    assert difference[2] > 1e-3


@torch.no_grad()
def test_padding_does_not_change_a_row(model, make_batch):
    """As `generate` runs it: positions counted from each row's first token."""
    together, alone = make_batch(1, 2), make_batch(1)
    own = together.attention_mask[0].bool()
    assert not own[0]
    positions = (together.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**together, position_ids=positions).logits
    torch.testing.assert_close(logits[0, own], model(**alone).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_position_ids_reach_the_language_model(model, batch):
    positions = 3 * torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    logits = model(**batch, position_ids=positions).logits
    assert torch.equal(logits, model.language_model(**embedded(model, batch), position_ids=positions).logits)
    assert (logits - model(**batch).logits).abs().max() > 1e-2


@torch.no_grad()
def test_loss_is_the_shifted_cross_entropy_of_the_labels(model, batch):
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100).masked_fill(batch.images_seq_mask, -100)
    output = model(**batch, labels=labels)
    terms = []
    for row in range(3):
        for position in range(labels.shape[1] - 1):
            target = labels[row, position + 1]
            if target != -100:
                terms.append(-torch.log_softmax(output.logits[row, position], dim=-1)[target])
    assert len(terms) > 50
    torch.testing.assert_close(output.loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)
    assert model(**batch).loss is None


@pytest.mark.parametrize(
    ("logits_to_keep", "expected"),
    [
        (0, slice(None)),
        (1, slice(-1, None)),
        (3, slice(-3, None)),
        (torch.tensor([0, 5]), [0, 5]),
        (torch.tensor([7]), [7]),
    ],
    ids=["all", "last", "last three", "two indices", "one index"],
)
@torch.no_grad()
def test_logits_to_keep(model, batch, logits_to_keep, expected):
    kept = model(**batch, logits_to_keep=logits_to_keep).logits
    torch.testing.assert_close(kept, model(**batch).logits[:, expected], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 4])
@torch.no_grad()
def test_continuing_from_past_key_values_equals_the_whole(model, batch, tokens_at_once):
    whole = model(**batch).logits
    length = batch.input_ids.shape[1]
    start = length - 8  # after every image
    assert not batch.images_seq_mask[:, start:].any()
    first = {**batch, "input_ids": batch.input_ids[:, :start], "images_seq_mask": batch.images_seq_mask[:, :start]}
    output = model(**{**first, "attention_mask": batch.attention_mask[:, :start]}, use_cache=True)
    pieces = [output.logits]
    for end in range(start + tokens_at_once, length + 1, tokens_at_once):
        output = model(
            input_ids=batch.input_ids[:, end - tokens_at_once : end],
            attention_mask=batch.attention_mask[:, :end],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        pieces.append(output.logits)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole[real], rtol=0, atol=1e-4)


@torch.no_grad()
def test_use_cache_false_returns_no_cache(model, batch):
    assert model(**batch, use_cache=False).past_key_values is None


@torch.no_grad()
def test_eager_attention_reaches_the_decoder_and_returns_its_maps(checkpoint, model, make_batch):
    eager = MultiModalityCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    assert eager.language_model.config._attn_implementation == "eager"
    assert eager.config.language_config._attn_implementation == "eager"
    assert eager.language_model.model.layers[0].self_attn.config._attn_implementation == "eager"
    batch = make_batch(1)
    length = batch.input_ids.shape[1]
    output = eager(**batch, output_attentions=True)
    assert len(output.attentions) == 2
    for attention in output.attentions:
        assert attention.shape == (1, 4, length, length)
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 4, length))
        assert (attention.triu(1) == 0).all()
    torch.testing.assert_close(output.logits, model(**batch).logits, rtol=0, atol=1e-4)
    assert eager(**batch).attentions is None


@torch.no_grad()
def test_attn_implementation_reaches_the_decoder_through_the_auto_class_too(siglip_checkpoint):
    eager = AutoModelForCausalLM.from_pretrained(
        siglip_checkpoint, trust_remote_code=True, attn_implementation="eager"
    ).eval()
    output = eager.language_model(torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert [attention.shape for attention in output.attentions] == [(1, 4, 3, 3)] * 2


@torch.no_grad()
def test_hidden_states_on_request(model, batch):
    output = model(**batch, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(*batch.input_ids.shape, 64)] * 3
    assert torch.equal(output.hidden_states[0], model.prepare_inputs_embeds(**batch))
    assert torch.equal(model.language_model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(**batch).hidden_states is None


# --- generation ---


def embedded(model: MultiModalityCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    """What downstream tools give to `language_model.generate`."""
    return {"inputs_embeds": model.prepare_inputs_embeds(**batch), "attention_mask": batch.attention_mask}


DECODING = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
}


@pytest.mark.parametrize("decoding", DECODING)
@torch.no_grad()
def test_generate_on_the_processor_s_output_is_the_prompt_and_the_language_model_s_answer(model, batch, decoding):
    options = {"max_new_tokens": 6, **DECODING[decoding]}
    torch.manual_seed(0)
    output = model.generate(**batch, **options)
    torch.manual_seed(0)
    answers = model.language_model.generate(**embedded(model, batch), **options)
    assert answers.shape[1] == 6
    assert torch.equal(output, torch.cat([batch.input_ids, answers], dim=1))


@torch.no_grad()
def test_greedy_generation_takes_the_most_likely_token_each_time(model, make_batch):
    batch = make_batch(1)
    output = model.generate(**batch, max_new_tokens=4, do_sample=False)
    embeds = embedded(model, batch)["inputs_embeds"]
    for token in output[0, batch.input_ids.shape[1] :]:
        assert token == model(inputs_embeds=embeds).logits[0, -1].argmax()
        embeds = torch.cat([embeds, model.get_input_embeddings()(token[None, None])], dim=1)


@torch.no_grad()
def test_generate_takes_ids_by_position_and_embeddings(model):
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(expected[:, :3], ids)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
    embeds = model.get_input_embeddings()(ids)
    answer = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, expected[:, 3:])


@torch.no_grad()
def test_generation_stops_at_the_tokenizer_s_end_token(own_model, processor, make_batch):
    """The language config's own eos is Llama's 2. Row 0 ends at once, row 1 goes on."""
    batch = make_batch(1, 0)
    eos, other = processor.tokenizer.eos_token_id, 77
    assert own_model.config.language_config.eos_token_id != eos
    last = own_model(**batch_with_positions(batch), output_hidden_states=True).hidden_states[-1][:, -1]
    last = F.normalize(last, dim=-1)
    own_model.language_model.lm_head.weight.zero_()
    own_model.language_model.lm_head.weight[eos] = last[0]  # each row's own direction wins
    own_model.language_model.lm_head.weight[other] = last[1]
    for answers in (
        own_model.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch.input_ids.shape[1] :],
        own_model.language_model.generate(**embedded(own_model, batch), max_new_tokens=3, do_sample=False),
    ):
        assert answers[0].tolist() == [eos] + [processor.pad_id] * (answers.shape[1] - 1)
        assert answers[1, 0] == other
        assert answers.shape[1] > 1
    alone = {name: value[:1] for name, value in batch.items()}
    answer = own_model.generate(**alone, max_new_tokens=3, do_sample=False)
    assert answer[0, batch.input_ids.shape[1] :].tolist() == [eos]


def batch_with_positions(batch: Batch) -> dict[str, Any]:
    return {**batch, "position_ids": (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)}


def test_special_tokens_are_the_tokenizer_s(model, processor):
    tokenizer = processor.tokenizer
    for generation_config in (model.generation_config, model.language_model.generation_config):
        assert generation_config.bos_token_id == tokenizer.bos_token_id
        assert generation_config.eos_token_id == tokenizer.eos_token_id
        assert generation_config.pad_token_id == tokenizer.pad_token_id


# --- training ---


def gradients(model: MultiModalityCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model.zero_grad()
    model(**batch, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_gives_the_same_gradients(own_model, batch, options):
    own_model.train()
    expected = gradients(own_model, batch)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in expected
    assert "aligner.layers.1.weight" in expected or "aligner.layers.0.weight" in expected
    own_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    runs = []
    own_model.language_model.model.layers[0].self_attn.register_forward_hook(lambda *arguments: runs.append(1))
    actual = gradients(own_model, batch)
    assert len(runs) == 2  # once more in the backward pass
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_towers_of_the_config_stay_frozen_after_loading(hybrid_checkpoint):
    model = MultiModalityCausalLM.from_pretrained(hybrid_checkpoint)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    towers = [n for n, p in model.named_parameters() if "vision_tower_" in n and p.requires_grad]
    assert trained == {"vision_model", "aligner", "language_model"}  # of the first only the unused norms
    assert towers == []


def test_embeddings_can_be_got_set_and_resized(own_model, batch):
    language_model = own_model.language_model
    assert own_model.get_input_embeddings() is language_model.model.embed_tokens
    assert own_model.get_output_embeddings() is language_model.lm_head
    assert own_model.get_decoder() is language_model.model
    size = own_model.config.language_config.vocab_size
    old_embedding = own_model.get_input_embeddings().weight.detach().clone()
    old_head = own_model.get_output_embeddings().weight.detach().clone()
    with torch.no_grad():
        expected = own_model(**batch).logits

    own_model.resize_token_embeddings(size + 5)

    assert own_model.config.language_config.vocab_size == size + 5
    assert own_model.get_input_embeddings().weight.shape == (size + 5, 64)
    assert own_model.get_output_embeddings().weight.shape == (size + 5, 64)
    assert torch.equal(language_model.model.embed_tokens.weight[:size], old_embedding)
    assert torch.equal(language_model.lm_head.weight[:size], old_head)
    assert language_model.lm_head.weight.data_ptr() != language_model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        logits = own_model(**batch).logits
    assert logits.shape[-1] == size + 5
    torch.testing.assert_close(logits[..., :size], expected, rtol=0, atol=1e-5)

    replacement = nn.Embedding(size + 5, 64)
    own_model.set_input_embeddings(replacement)
    assert language_model.model.embed_tokens is replacement


# --- loading ---


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def assert_weights_are(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.device.type != "meta", name
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.cpu(), expected[name]), name


def test_every_weight_comes_from_the_file_and_none_is_initialised(checkpoint):
    torch.manual_seed(123)
    model, info = MultiModalityCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert_weights_are(model, weights_of(checkpoint))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_rotary_frequencies_which_no_file_has_are_llama_s(model):
    expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.language_model.model.rotary_emb.inv_freq, expected)


def test_a_loaded_model_is_in_eval_mode(model):
    assert not any(module.training for module in model.modules())


def test_auto_model_gives_our_class(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model) is MultiModalityCausalLM
    assert_weights_are(model, weights_of(checkpoint))


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_path_may_be_a_string_or_a_path(siglip_checkpoint, path_type):
    assert_weights_are(
        MultiModalityCausalLM.from_pretrained(path_type(siglip_checkpoint)), weights_of(siglip_checkpoint)
    )


@pytest.fixture
def editable(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def half_checkpoint(editable: Path) -> Path:
    """Weights and config as published: float16, said in the language config only."""
    weights = {name: value.half() for name, value in weights_of(editable).items()}
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    edit_config(editable, language_dtype="float16")
    return editable


def edit_config(directory: Path, language_dtype: str | None = None) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for section in (config, config["language_config"]):
        for key in ("dtype", "torch_dtype"):
            section.pop(key, None)
    if language_dtype:
        config["language_config"]["torch_dtype"] = language_dtype
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("arguments", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}], ids=str)
def test_the_default_dtype_is_the_checkpoint_s(half_checkpoint, arguments):
    model = MultiModalityCausalLM.from_pretrained(half_checkpoint, **arguments)
    assert model.dtype == torch.float16
    assert_weights_are(model, weights_of(half_checkpoint))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_the_weights_own_if_the_config_is_silent(editable, saved):
    weights = {name: value.to(saved) for name, value in weights_of(editable).items()}
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    edit_config(editable)
    assert_weights_are(MultiModalityCausalLM.from_pretrained(editable), weights)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16", "float32"], ids=str)
def test_the_dtype_can_be_given_and_converts_the_file_s_float16_exactly(half_checkpoint, argument, dtype):
    model = AutoModelForCausalLM.from_pretrained(half_checkpoint, trust_remote_code=True, **{argument: dtype})
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == model.language_model.dtype == expected
    assert_weights_are(model, {name: value.to(expected) for name, value in weights_of(half_checkpoint).items()})


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
@torch.no_grad()
def test_device_map_places_every_weight(checkpoint, model, batch, device_map):
    pytest.importorskip("accelerate")
    placed = MultiModalityCausalLM.from_pretrained(checkpoint, device_map=device_map).eval()
    if isinstance(device_map, dict):
        assert placed.device.type == device_map[""]
    assert_weights_are(placed, weights_of(checkpoint))
    inputs = copy.deepcopy(batch).to(placed.device, torch.float32)
    torch.testing.assert_close(placed(**inputs).logits.cpu(), model(**batch).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@torch.no_grad()
def test_a_saved_model_loads_exactly(model, batch, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) if max_shard_size == "100KB" else (len(files) == 1)
    assert weights_of(tmp_path).keys() == model.state_dict().keys()
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path).eval()
    assert_weights_are(loaded, model.state_dict())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    for name in ("vision_config", "aligner_config", "language_config"):
        assert loaded.config.to_diff_dict()[name] == model.config.to_diff_dict()[name]


def write_bin(directory: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(weights.items())[i::shards])
        torch.save(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


@needs_safe_torch_load
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_load(editable, shards):
    weights = weights_of(editable)
    write_bin(editable, weights, shards)
    assert_weights_are(MultiModalityCausalLM.from_pretrained(editable), weights)


@needs_safe_torch_load
@pytest.mark.parametrize("shards", [1, 3])
def test_float16_bin_files_load_as_bfloat16(editable, shards):
    weights = {name: value.half() for name, value in weights_of(editable).items()}
    write_bin(editable, weights, shards)
    model = MultiModalityCausalLM.from_pretrained(editable, dtype=torch.bfloat16)
    assert_weights_are(model, {name: value.bfloat16() for name, value in weights.items()})


# --- strictness ---

SIGLIP_KEYS = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.o_proj.weight",
    "aligner.layers.2.bias",
    "vision_model.vision_tower.blocks.1.norm1.weight",
    "vision_model.vision_tower.attn_pool.latent",
]
HYBRID_KEYS = [
    "vision_model.high_layer_norm.weight",
    "vision_model.vision_tower_low.vision_tower.pos_embed",
    "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples",
    "vision_model.vision_tower_high.vision_tower.blocks.0.attn.rel_pos_h",
    "vision_model.vision_tower_high.vision_tower.neck_hd.0.weight",
    "aligner.high_up_proj.weight",
]


@pytest.fixture
def edit_weights(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A copy of a checkpoint with its weights edited, as one safetensors or one `.bin` file."""

    def edit(kind: str, file_format: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        directory = Path(
            shutil.copytree(request.getfixturevalue(f"{kind}_checkpoint"), tmp_path / f"{kind}-{file_format}")
        )
        weights = weights_of(directory)
        change(weights)
        if file_format == "bin":
            write_bin(directory, weights, shards=1)
        else:
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    yield edit


KEYS = [*(("siglip", key) for key in SIGLIP_KEYS), *(("hybrid", key) for key in HYBRID_KEYS)]


@pytest.mark.parametrize(("kind", "key"), KEYS)
@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_a_missing_key_is_an_error_that_names_it(edit_weights, kind, key, file_format):
    path = edit_weights(kind, file_format, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


@pytest.mark.parametrize("file_format", FILE_FORMATS)
@pytest.mark.parametrize(
    "key",
    [
        "language_model.model.layers.2.mlp.up_proj.weight",
        "vision_model.vision_tower.head.weight",
        "aligner.layers.4.weight",
        "optimizer_step",
    ],
)
def test_an_extra_key_is_an_error_that_names_it(edit_weights, key, file_format):
    path = edit_weights("siglip", file_format, lambda weights: weights.update({key: torch.zeros(2)}))
    with pytest.raises(ValueError, match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_wrong_shape_is_an_error_that_names_the_key(edit_weights, kind, key):
    path = edit_weights(kind, "safetensors", lambda weights: weights.update({key: torch.zeros(3, 5)}))
    with pytest.raises((ValueError, RuntimeError), match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


def test_the_auto_class_is_as_strict(edit_weights):
    key = "vision_model.vision_tower.pos_embed"
    path = edit_weights("siglip", "safetensors", lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=re.escape(key)):
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


# --- a CLIP tower from transformers as the vision model ---


@torch.no_grad()
def test_a_model_on_a_clip_tower_saves_and_loads(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    clip = CLIPVisionModel(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    config = small_config("siglip", 100)
    config.vision_config.params = type(config.vision_config.params)(
        {"model_name": str(tmp_path / "clip"), "image_size": 16, "select_feature": "patch", "select_layer": -2}
    )
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_weights_are(loaded, model.state_dict())
    pixels = torch.rand(2, 3, 16, 16)
    features = loaded.get_image_features(pixels)
    assert features.shape == (2, 4, 64)
    assert torch.equal(features, model.get_image_features(pixels))


@torch.no_grad()
def test_a_fresh_model_on_a_clip_tower_keeps_the_clip_weights(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    clip = CLIPVisionModel(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    config = small_config("siglip", 100)
    config.vision_config.params = type(config.vision_config.params)({"model_name": str(tmp_path / "clip")})
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config)
    assert_weights_are(model.vision_model.vision_tower, clip.state_dict())


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_gradient_checkpointing_reaches_the_towers(kind):
    """Every block is run a second time in the backward pass, with the same gradients."""
    torch.manual_seed(0)
    model = MultiModalityCausalLM(small_config(kind, 100)).train()
    model.vision_model.requires_grad_(True)
    size = 32 if kind == "siglip" else 64
    pixels = torch.rand(1, 3, size, size)
    blocks = [module for module in model.vision_model.modules() if type(module).__name__ in ("Block", "SAMBlock")]
    runs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        model.zero_grad()
        runs.clear()
        model.get_image_features(pixels).square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()], len(runs)

    plain, plain_runs = gradients()
    model.gradient_checkpointing_enable()
    checkpointed, checkpointed_runs = gradients()
    assert (plain_runs, checkpointed_runs) == (len(blocks), 2 * len(blocks))
    for expected, actual in zip(plain, checkpointed, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_an_offloaded_vision_tower_encodes(kind, request, picture, tmp_path):
    """accelerate keeps such parameters on the meta device and brings their values when they are needed."""
    directory = request.getfixturevalue(f"{kind}_checkpoint")
    processor = VLChatProcessor.from_pretrained(directory)
    pixels = processor.image_processor(Image.open(picture))["pixel_values"]
    expected = MultiModalityCausalLM.from_pretrained(directory).get_image_features(pixels)
    device_map = {"vision_model": "disk", "aligner": "cpu", "language_model": "cpu"}
    offloaded = MultiModalityCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(offloaded.get_image_features(pixels), expected)


@torch.no_grad()
def test_a_half_precision_clip_checkpoint_makes_a_float32_model(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(clip_config).half().save_pretrained(tmp_path)
    config = small_config("siglip", 100)
    config.vision_config.params = {"model_name": str(tmp_path), "image_size": 16}
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_image_features(torch.rand(1, 3, 16, 16)).shape == (1, 4, 64)
    model.vision_model.bfloat16()  # parts may also be given dtypes of their own
    assert model.get_image_features(torch.rand(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize("assistance", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_is_right_for_text_and_refused_with_images(siglip_checkpoint, picture, assistance):
    processor = VLChatProcessor.from_pretrained(siglip_checkpoint)
    model = MultiModalityCausalLM.from_pretrained(siglip_checkpoint)
    helper = {
        "assistant_model": MultiModalityCausalLM.from_pretrained(siglip_checkpoint),
        "prompt_lookup_num_tokens": 3,
    }
    arguments = {assistance: helper[assistance], "max_new_tokens": 12, "do_sample": False}

    text = processor(prompt="User: one two one two one\n\nAssistant:")
    expected = model.generate(**text, max_new_tokens=12, do_sample=False)
    assert model.generate(**text, **arguments).tolist() == expected.tolist()

    inputs = processor(prompt="<image_placeholder>?", images=[Image.open(picture)])
    with pytest.raises(ValueError, match="without images"):
        model.generate(**inputs, **arguments)


def test_negative_ids_with_a_repetition_penalty(siglip_checkpoint):
    model = MultiModalityCausalLM.from_pretrained(siglip_checkpoint)
    ids = torch.tensor([[5, -1, 7]])
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, repetition_penalty=1.1).shape == (1, 5)
    assert ids.tolist() == [[5, -1, 7]]


def test_an_answer_may_go_on_behind_the_last_position(siglip_checkpoint: Path) -> None:
    """Only the prompt has to fit: that is transformers' own rule."""
    model = MultiModalityCausalLM.from_pretrained(str(siglip_checkpoint), dtype=torch.float32)
    model.config.language_config.max_position_embeddings = 12
    ids = torch.arange(10)[None]
    assert model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).shape == (1, 16)


def test_what_is_not_split_are_layers_that_the_model_has(checkpoint: Path) -> None:
    model = MultiModalityCausalLM.from_pretrained(str(checkpoint))
    classes = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "Block"} <= set(model._no_split_modules) <= classes
