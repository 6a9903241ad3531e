"""Both processors as other libraries' trainers call them: texts, chat templates, masks; and models with the result."""

from typing import Any

import pytest
import torch
from conftest import BOS, EOS, IMAGE_TAG, make_picture
from packaging.version import Version
from PIL import Image
from transformers import __version__ as transformers_version

from deepseek_vl import (
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    MultiModalityCausalLM,
    VLChatProcessor,
)
from deepseek_vl.data.rows import TrainingRow
from deepseek_vl.train.collator import NOT_LEARNT, encode_row

FEATURES = 16
"""Positions per image in all of the tests' models."""


@pytest.fixture(scope="module", params=[VLChatProcessor, DeepseekVLProcessor], ids=["VLChat", "DeepseekVL"])
def processor(request, siglip_checkpoint) -> Any:
    return request.param.from_pretrained(siglip_checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    return [Image.open(make_picture(folder / f"{i}.png", (40, 30), seed=i)).convert("RGB") for i in range(3)]


def ids_of(processor: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
    ids = processor(*args, **kwargs)["input_ids"]
    return ids.tolist() if hasattr(ids, "tolist") else ids


# Arguments


def test_the_begin_token_is_there_once_whoever_brings_it(processor, pictures):
    bos = processor.tokenizer.bos_token_id
    plain = ids_of(processor, text="Hello.")[0]
    assert plain[0] == bos and plain.count(bos) == 1
    assert ids_of(processor, text=f"{BOS}Hello.")[0] == plain
    assert ids_of(processor, text=f"{BOS}Hello.", add_special_tokens=False)[0] == plain
    assert ids_of(processor, text="Hello.", add_special_tokens=False)[0] == plain[1:]
    messages = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith(BOS) and text.count(BOS) == 1
    whole = ids_of(processor, text=text, images=pictures[0])
    tokenized = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokenized["input_ids"] == whole and whole[0].count(bos) == 1
    if isinstance(processor, VLChatProcessor):
        assert processor(prompt=text, images=pictures[:1]).input_ids.tolist() == whole
        assert processor(prompt=text.removeprefix(BOS), images=pictures[:1]).input_ids.tolist() == whole


def test_a_begin_token_that_a_user_writes_is_text(siglip_checkpoint):
    processor = VLChatProcessor.from_pretrained(siglip_checkpoint)
    messages = [{"role": "user", "content": f"{BOS}Hi"}, {"role": "assistant", "content": ""}]
    for system in ("", "S"):
        ids, _ = processor.encode(processor.render(messages, system, untrusted=True))
        assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_padding(processor):
    texts = ["Hi", "A longer text than that."]
    short, long = ids_of(processor, text=texts, padding=False, return_tensors=None)
    assert len(short) < len(long)
    pad = processor.tokenizer.pad_token_id
    filling = [pad] * (len(long) - len(short))
    for padding in ({}, {"padding": True}, {"padding": "longest"}, {"text_kwargs": {"padding": True}}):
        assert ids_of(processor, text=texts, padding_side="left", **padding) == [filling + short, long]
    batch = processor(text=texts, padding_side="right")
    assert batch["input_ids"].tolist() == [short + filling, long]
    assert batch["attention_mask"].tolist() == [[1] * len(short) + [0] * len(filling), [1] * len(long)]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    room = len(long) + 7
    assert processor(text=texts, padding="max_length", max_length=room)["input_ids"].shape == (2, room)
    assert processor(text=texts, pad_to_multiple_of=32)["input_ids"].shape[1] % 32 == 0
    assert ids_of(processor, text=texts[1], return_tensors="np") == [long]
    with pytest.raises(ValueError, match=r"make no tensor; give padding=True, or return_tensors=None"):
        processor(text=texts, padding=False, return_tensors="pt")


@pytest.mark.parametrize("how", [{"truncation": True}, {"truncation": "longest_first"}, {}], ids=str)
def test_truncation_never_leaves_part_of_an_image(processor, pictures, how):
    text = f"A{IMAGE_TAG}b{IMAGE_TAG}c"
    whole = processor(text=text, images=pictures[:2])
    ids = whole["input_ids"][0].tolist()
    tag = processor.tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    for room in range(1, len(ids) + 2):
        cut = processor(text=text, images=pictures[:2], max_length=room, **how)
        kept = cut["input_ids"][0].tolist()
        assert kept == ids[: len(kept)] and len(kept) <= room
        assert kept.count(tag) % FEATURES == 0
        images = kept.count(tag) // FEATURES
        assert ("pixel_values" in cut) == (images > 0)
        if images:
            assert torch.equal(cut["pixel_values"].flatten(0, -4), whole["pixel_values"].flatten(0, -4)[:images])
        assert len(kept) == min(room, len(ids)) or room - len(kept) < FEATURES
    assert ids_of(processor, text=text, images=pictures[:2], max_length=5, truncation=False)[0] == ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 3}, "does not take stride; it takes add_special_tokens, max_length, pad"),
        ({"text_kwargs": {"truncation_side": "left"}}, "does not take truncation_side"),
        ({"videos": ["a.mp4"], "audio": [1]}, "does not take audio, videos"),
        ({"padding": "shortest"}, "padding must be True, False, 'longest', .*, not 'shortest'"),
        ({"padding": "max_length"}, "padding='max_length' needs a max_length"),
        ({"padding_side": "top"}, "padding_side must be 'left' or 'right', not 'top'"),
        ({"truncation": "only_second"}, "truncation must be one of"),
        ({"videos": None, "audio": None, "return_attention_mask": True, "do_sample_frames": False}, None),
    ],
    ids=str,
)
def test_what_is_not_taken_is_refused_by_its_name(processor, arguments, message):
    if message is None:
        assert ids_of(processor, text="Hi", **arguments) == ids_of(processor, text="Hi")
        return
    with pytest.raises(ValueError, match=message):
        processor(text="Hi", **arguments)


def test_texts_and_images_must_be_as_many(processor, pictures):
    with pytest.raises(ValueError, match=f"The prompt has 1 {IMAGE_TAG} and 2 images were given; there must"):
        processor(text=f"{IMAGE_TAG}Hi", images=pictures[:2])
    batch = processor(text=[f"{IMAGE_TAG}a", "b", f"{IMAGE_TAG}{IMAGE_TAG}"], images=[[pictures[0]], [], pictures[1:]])
    counts = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TAG)).sum(1).tolist()
    assert counts == [FEATURES, 0, 2 * FEATURES]


# What is learnt, as the chat template has it

CONVERSATION = [
    ("Look.", "At what? 🙂"),
    (f"This {IMAGE_TAG}, or {IMAGE_TAG}?", "Both."),
    ("  So?\n", "\n Show more. "),
]


def messages_of(pictures: list[Image.Image]) -> tuple[list[dict[str, Any]], TrainingRow]:
    """A conversation in transformers' form, and as a row of the trainer."""
    remaining = iter(pictures)
    theirs, ours = [], []
    for question, answer in CONVERSATION:
        content = []
        for i, text in enumerate(question.split(IMAGE_TAG)):
            if i:
                content.append({"type": "image", "image": next(remaining)})
            content.append({"type": "text", "text": text})
        theirs += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        images = [part["image"] for part in content if part["type"] == "image"]
        ours += [
            {"role": "User", "content": question, "images": images},
            {"role": "Assistant", "content": answer},
        ]
    return theirs, TrainingRow(ours)


@pytest.mark.skipif(Version(transformers_version) < Version("5.18"), reason="masks of older versions are misplaced")
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_assistants_tokens_are_those_that_the_trainer_learns(processor, siglip_checkpoint, pictures, padding_side):
    """The masks select the tokens that the trainer learns, also after images, and without answers of weight 0."""
    theirs, row = messages_of(pictures)
    chat = VLChatProcessor.from_pretrained(siglip_checkpoint)
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    for withheld in (None, 1, 3):
        if withheld is not None:
            theirs[withheld]["weight"] = row.messages[withheld]["weight"] = 0
        expected = encode_row(row, chat)
        output = processor.apply_chat_template(
            [theirs, short], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": padding_side, "add_special_tokens": False},
        )  # fmt: skip
        length = len(expected.labels)
        assert output["input_ids"][0, :length].tolist() == expected.item.input_ids.tolist()
        learnt = torch.where(output["assistant_masks"].bool(), output["input_ids"], NOT_LEARNT)
        assert learnt[0, :length].tolist() == expected.labels.tolist()
        text = processor.tokenizer.decode(learnt[1][learnt[1] != NOT_LEARNT])
        assert text == f" Yes.{EOS}"


def test_a_template_that_was_set_is_used_and_saved_and_ours_is_not_saved(siglip_checkpoint, tmp_path):
    processor = VLChatProcessor.from_pretrained(siglip_checkpoint)
    assert "{%- generation -%}" in processor.chat_template
    processor.system_prompt = "Be brief."
    assert "Be brief." in processor.chat_template
    processor.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "chat_template.jinja").exists()
    processor.chat_template = "{{ messages[0].content }}!"
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    processor.save_pretrained(tmp_path / "theirs")
    assert VLChatProcessor.from_pretrained(tmp_path / "theirs").chat_template == processor.chat_template


# Models


@pytest.fixture(scope="module")
def loaded(checkpoint) -> tuple[VLChatProcessor, MultiModalityCausalLM]:
    """A processor and a float32 model of each kind."""
    return (
        VLChatProcessor.from_pretrained(checkpoint),
        MultiModalityCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(),
    )


TEXTS = [f"{IMAGE_TAG}What is this?", "Hello.", f"Between {IMAGE_TAG} and {IMAGE_TAG}?"]


def test_texts_and_prompts_are_the_same_to_the_model(loaded, pictures):
    processor, model = loaded
    batch = processor(text=TEXTS, images=pictures)
    assert batch.keys() == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    groups = (pictures[:1], [], pictures[1:])
    items = [processor.process_one(prompt=text, images=group) for text, group in zip(TEXTS, groups, strict=True)]
    masked = processor.batchify(items)
    assert torch.equal(batch["mm_token_type_ids"].bool(), masked.images_seq_mask)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, model(**masked).logits, rtol=0, atol=1e-5
        )  # fmt: skip
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), model.generate(**masked, **options))


def test_features_that_are_there_already_need_only_the_token_types(loaded, pictures):
    processor, model = loaded
    batch = processor(text=f"{IMAGE_TAG}What is this?", images=pictures[:1])
    named = {name: batch[name] for name in ("input_ids", "mm_token_type_ids")}
    features = model.get_image_features(batch["pixel_values"][0])
    embeds = model.prepare_inputs_embeds(**named, image_features=features)
    torch.testing.assert_close(embeds, model.prepare_inputs_embeds(**batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="There are 16 image tokens and 8 image features"):
        model.prepare_inputs_embeds(**named, image_features=features[:, :8])


@pytest.mark.parametrize("names", [("images_seq_mask",), ("mm_token_type_ids",)])
def test_ids_longer_than_the_masks_are_a_completion_without_images(loaded, pictures, names):
    processor, model = loaded
    prompt = f"{IMAGE_TAG}What is this?"
    completion = processor.tokenizer(" It is.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = processor(prompt=f"{prompt} It is.", images=pictures[:1])
    if names == ("images_seq_mask",):
        batch = dict(processor(prompt=prompt, images=pictures[:1]))
    else:
        batch = dict(processor(text=prompt, images=pictures[:1]))
    batch["input_ids"] = torch.cat([batch["input_ids"], completion], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert torch.equal(batch["input_ids"], whole.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**whole).logits, rtol=0, atol=1e-5)
        embeds = model.prepare_inputs_embeds(**batch)
    torch.testing.assert_close(embeds, model.prepare_inputs_embeds(**whole), rtol=0, atol=1e-5)


def test_the_other_processors_batch_is_taken_where_pixels_are_the_same(siglip_checkpoint, pictures):
    """Trainers open a reference model by its path, and give it the batches of the trained model's processor."""
    model = MultiModalityCausalLM.from_pretrained(siglip_checkpoint, dtype=torch.float32).eval()
    theirs = DeepseekVLProcessor.from_pretrained(siglip_checkpoint)(text=TEXTS, images=pictures, padding_side="left")
    ours = VLChatProcessor.from_pretrained(siglip_checkpoint)(text=TEXTS, images=pictures)
    assert theirs["pixel_values"].ndim == 4
    with torch.no_grad():
        torch.testing.assert_close(model(**theirs).logits, model(**ours).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="There are 48 image tokens and 32 image features"):
        model(**{**theirs, "pixel_values": theirs["pixel_values"][:2]})


def test_positions_and_images_that_do_not_fit_are_still_an_error(loaded, pictures):
    processor, model = loaded
    batch = dict(processor(text=f"{IMAGE_TAG}What?", images=pictures[:1]))
    short = {name: batch[name][:, :-12] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with pytest.raises(ValueError, match=r"images_seq_mask has \[\d+\] image positions in its rows"):
        model(**{**batch, **short})
    with pytest.raises(ValueError, match="The prompt has 16 image positions, but no pixel_values"):
        model(**{**batch, "pixel_values": None})


def test_the_config_names_the_image_token_and_does_not_write_it(loaded, tmp_path):
    processor, model = loaded
    assert model.config.image_token_id == processor.image_id
    model.config.save_pretrained(tmp_path)
    assert "image_token_id" not in (tmp_path / "config.json").read_text()


def test_what_no_forward_pass_uses_asks_for_no_gradient(checkpoint):
    for model in (
        MultiModalityCausalLM.from_pretrained(checkpoint),
        DeepseekVLForConditionalGeneration.from_pretrained(checkpoint),
        DeepseekVLForConditionalGeneration(DeepseekVLForConditionalGeneration.from_pretrained(checkpoint).config),
    ):
        frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
        parts = {"attn_pool", "high_layer_norm", "low_layer_norm"}
        unused = {name for name, _ in model.named_parameters() if parts & set(name.split("."))}
        assert unused and unused <= frozen
        if not isinstance(model, MultiModalityCausalLM):
            assert frozen == unused


# VLChatProcessor's own call


def ask(text: Any) -> list[dict[str, Any]]:
    return [{"role": "User", "content": text}, {"role": "Assistant", "content": None}]


def test_several_conversations_at_once(loaded, pictures):
    processor, _ = loaded
    conversations = [ask(text) for text in TEXTS]
    groups = (pictures[:1], [], pictures[1:])
    items = [
        processor(conversations=messages, images=group, force_batchify=False)
        for messages, group in zip(conversations, groups, strict=True)
    ]
    expected = processor.batchify(items)
    for images in (pictures, list(groups)):
        batch = processor(conversations=conversations, images=images)
        assert batch.sft_format == expected.sft_format
        for name in ("input_ids", "pixel_values", "attention_mask", "images_seq_mask", "images_emb_mask"):
            assert torch.equal(batch[name], expected[name]), name
    alone = processor(conversations=conversations, images=pictures, force_batchify=False)
    assert [item.input_ids.tolist() for item in alone] == [item.input_ids.tolist() for item in items]
    with pytest.raises(ValueError, match=f"There are 1 images more than {IMAGE_TAG} in the conversations"):
        processor(conversations=conversations[:2], images=pictures[:2])
    with pytest.raises(ValueError, match="Text 1 has 1 image tags, and 0 images were given for it"):
        processor(conversations=conversations, images=[[], pictures[:1], pictures[1:]])


def test_images_in_a_list_for_each_text_go_to_that_text(loaded, pictures):
    processor, _ = loaded
    groups = [pictures[:1], [], pictures[1:]]
    assert torch.equal(
        processor(text=TEXTS, images=groups).pixel_values, processor(text=TEXTS, images=pictures).pixel_values
    )
    with pytest.raises(ValueError, match="Text 1 has 1 image tags, and 0 images were given for it"):
        processor(text=TEXTS, images=[[], pictures[:1], pictures[1:]])


def test_a_content_may_be_parts_or_none(loaded, pictures):
    processor, _ = loaded
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    expected = processor(conversations=[*ask(f"{IMAGE_TAG}What?")[:1], {"role": "Assistant", "content": ""}],
                         images=pictures[:1])  # fmt: skip
    batch = processor(conversations=ask(parts), images=pictures[:1])
    assert batch.sft_format == expected.sft_format and torch.equal(batch.input_ids, expected.input_ids)
    without = processor(conversations=[ask(parts)[0], {"role": "Assistant"}], images=pictures[:1])
    assert without.sft_format == batch.sft_format
    assert processor.render([{"role": "user", "content": None}]).text.endswith("User:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "video"}], "A part of a content is of type 'video'; it must be"),
        ([{"type": "text"}], "A part of a content is of type 'text'; it must be"),
        (["Hi"], "A part of a content is 'Hi'; it must be"),
    ],
)
def test_other_parts_are_refused_in_words(loaded, content, message):
    with pytest.raises(ValueError, match=message):
        loaded[0](conversations=ask(content))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conversations": "Hi"}, "A conversation is a list of messages"),
        ({"conversations": [{"content": "Hi"}]}, "A conversation is a list of messages"),
        ({"conversations": [["Hi"]]}, "A conversation is a list of messages"),
        ({"conversations": ask("Hi"), "truncation": True, "max_length": 3}, "^truncation, max_length: not taken with"),
        (
            {"prompt": "Hi", "add_special_tokens": False},
            "^add_special_tokens: not taken with a prompt or conversations",
        ),
        ({"prompt": "Hi", "do_normalize": False}, "^do_normalize: not taken with a prompt or conversations"),
        ({"prompt": "Hi", "padding": "max_length"}, "^padding: not taken with a prompt or conversations"),
        ({"prompt": "Hi", "system_prompt": "S"}, "system_prompt is of conversations; a prompt is used as it is"),
    ],
)
def test_other_calls_are_refused_in_words(loaded, arguments, message):
    with pytest.raises(ValueError, match=message):
        loaded[0](**arguments)


def test_a_system_prompt_of_one_call(loaded):
    processor, _ = loaded
    before = processor(conversations=ask("Hi")).sft_format
    brief = processor(conversations=ask("Hi"), system_prompt="Be brief.").sft_format
    assert brief == ["Be brief.\n\nUser: Hi\n\nAssistant:"]
    assert processor(conversations=ask("Hi"), system_prompt="").sft_format == ["User: Hi\n\nAssistant:"]
    both = processor(conversations=[ask("Hi"), ask("So?")], system_prompt="S").sft_format
    assert both == ["S\n\nUser: Hi\n\nAssistant:", "S\n\nUser: So?\n\nAssistant:"]
    assert processor(conversations=ask("Hi"), padding=True, return_tensors="pt").sft_format == before
