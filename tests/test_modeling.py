"""`MultiModalityCausalLM`: its structure, embeddings, forward pass and gradients, with real checkpoints on disk."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDEN, Batch, embedded, small_config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.projector import MlpProjector


class encoded_images:
    """Within a `with` block, count the images in each call of the vision model."""

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


def test_a_model_of_the_published_vocabulary_without_files_has_its_config_s_tokens() -> None:
    """A model without files takes its special tokens from the config; the vocabulary's size does not matter."""
    sections = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))["1.3b"]
    sections["language_config"] |= {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}
    with torch.device("meta"):
        model = MultiModalityCausalLM(MultiModalityConfig(**sections))
    for generation_config in (model.generation_config, model.language_model.generation_config):
        assert (generation_config.bos_token_id, generation_config.eos_token_id) == (7, 8)
        assert generation_config.pad_token_id == 9


def test_what_is_not_split_are_layers_that_the_model_has(checkpoint: Path) -> None:
    model = MultiModalityCausalLM.from_pretrained(str(checkpoint))
    classes = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "Block"} <= set(model._no_split_modules) <= classes


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
    """With fewer feature positions than the tower's features, the first features are used."""
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
    """With positions counted from each row's first token, as in `generate`, padding changes no logits."""
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


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_has_two_names(siglip_checkpoint: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    """transformers 5.24 renamed `past_key_values` to `cache`; both names are accepted, but not together."""
    model = MultiModalityCausalLM.from_pretrained(siglip_checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(5, 15)[None]
    past = model(input_ids=ids[:, :6], use_cache=True)["past_key_values"]
    both = {"cache": past, "past_key_values": past}
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=ids[:, 6:], **both)
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(input_ids=ids, **both)
    logits = model(input_ids=ids[:, 6:], **{name: past}).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits[:, 6:], rtol=0, atol=1e-4)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generation_goes_on_from_the_cache_of_another(siglip_checkpoint: Path, name: str) -> None:
    model = MultiModalityCausalLM.from_pretrained(siglip_checkpoint, dtype=torch.float32).eval()
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(input_ids=torch.arange(5, 15)[None], max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    expected = model.generate(input_ids=longer, max_new_tokens=5, **options).sequences
    again = model.generate(input_ids=longer, max_new_tokens=5, **options, **{name: first["past_key_values"]})
    assert again.sequences.tolist() == expected.tolist()


@torch.no_grad()
def test_base_model_is_the_body_without_the_head(model, batch) -> None:
    names = list(model.state_dict())
    body = model.base_model
    assert list(model.state_dict()) == names
    assert not [name for name in body.state_dict() if "lm_head" in name]
    assert {id(p) for p in body.parameters()} == {id(p) for n, p in model.named_parameters() if "lm_head" not in n}
    assert body.base_model is body
    assert body.get_decoder() is model.get_decoder() is model.language_model.model
    assert body.training == model.training
    hidden = body(**batch).last_hidden_state
    assert torch.equal(model.language_model.lm_head(hidden), model(**batch).logits)


def test_the_base_model_of_what_the_auto_classes_open(siglip_checkpoint: Path) -> None:
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name, None)
        if auto is not None:  # AutoModelForMultimodalLM is not in all versions
            model = auto.from_pretrained(siglip_checkpoint)
            assert type(model) is MultiModalityCausalLM
            body = model.base_model.requires_grad_(False)
            assert body is not model
            assert {n for n, p in model.named_parameters() if p.requires_grad} == {"language_model.lm_head.weight"}


def test_tied_weights_can_be_asked_of_the_class(siglip_checkpoint: Path) -> None:
    """The class has an empty `all_tied_weights_keys`, for programs that patch remote code; each model has its own."""
    assert MultiModalityCausalLM.all_tied_weights_keys == {}
    config = MultiModalityCausalLM.from_pretrained(siglip_checkpoint).config
    config.language_config.tie_word_embeddings = True
    with torch.device("meta"):
        tied = MultiModalityCausalLM(config)
    assert list(tied.all_tied_weights_keys) == ["language_model.lm_head.weight"]
    assert MultiModalityCausalLM.all_tied_weights_keys == {}


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


# --- training ---


def gradients(model: MultiModalityCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model.zero_grad()
    model(**batch, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# `gradient_checkpointing_enable` is the name before transformers 5.24, which programs and libraries still use.
OLD_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


@OLD_NAME
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
    assert len(runs) == 2  # the second run is in the backward pass
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_towers_of_the_config_stay_frozen_after_loading(hybrid_checkpoint):
    model = MultiModalityCausalLM.from_pretrained(hybrid_checkpoint)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"aligner", "language_model"}


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


@OLD_NAME
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
