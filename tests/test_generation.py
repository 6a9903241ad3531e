"""`generate` of `MultiModalityCausalLM` and of its language model, with real checkpoints on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, embedded
from PIL import Image

from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

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
    """The end token is the tokenizer's, not the language config's (Llama's 2): row 0 ends at once, row 1 goes on."""
    batch = make_batch(1, 0)
    eos, other = processor.tokenizer.eos_token_id, 77
    assert own_model.config.language_config.eos_token_id != eos
    last = own_model(**batch_with_positions(batch), output_hidden_states=True).hidden_states[-1][:, -1]
    last = F.normalize(last, dim=-1)
    own_model.language_model.lm_head.weight.zero_()
    own_model.language_model.lm_head.weight[eos] = last[0]  # each row chooses its own token
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
    """Only the prompt has to fit into the context, as in transformers."""
    model = MultiModalityCausalLM.from_pretrained(str(siglip_checkpoint), dtype=torch.float32)
    model.config.language_config.max_position_embeddings = 12
    ids = torch.arange(10)[None]
    assert model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).shape == (1, 16)


def test_an_output_that_is_not_unpacked_is_said(model, batch):
    with pytest.raises(ValueError, match=r"generate\(\*\*inputs\)"):
        model.generate(batch, max_new_tokens=2)


def test_ids_without_a_batch_are_said(model):
    with pytest.raises(ValueError, match=r"input_ids must be \[b, T\], not \[3\]; make a batch with batchify"):
        model.generate(input_ids=torch.tensor([5, 6, 7]), max_new_tokens=1)
