"""`VLChatProcessor`: from a conversation and its images to the model's inputs."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, IMAGE_TAG, small_config
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.models import VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput, VLChatProcessorOutput
from deepseek_vl.utils.conversation import Rendered

SYSTEM = VLChatProcessor.system_prompt
TRICKY = "Hello  world\n\n User: 请"  # white space that a SentencePiece-style pre-tokenizer would lose
PER_IMAGE = 4  # features per image of the processors below

# Fields of the outputs, with the dtypes of those that are tensors.
ONE_FIELDS = ["sft_format", "input_ids", "pixel_values", "num_image_tokens"]
BATCH_FIELDS = ["sft_format", "input_ids", "pixel_values", "attention_mask", "images_seq_mask", "images_emb_mask"]
BATCH_DTYPES = {
    "input_ids": torch.int64,
    "pixel_values": torch.float32,
    "attention_mask": torch.int64,
    "images_seq_mask": torch.bool,
    "images_emb_mask": torch.bool,
}


def make_processor(directory: Path, **options) -> VLChatProcessor:
    """A processor of 32-pixel images with the tokenizer of a directory."""
    image_processor = VLMImageProcessor(32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return VLChatProcessor(
        image_processor, load_tokenizer(str(directory)), **{"num_image_tokens": PER_IMAGE, **options}
    )


@pytest.fixture
def processor(small_tokenizer_dir: Path) -> VLChatProcessor:
    return make_processor(small_tokenizer_dir)


def pictures(count: int) -> list[Image.Image]:
    """Images of different sizes and content."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20 + 7 * i, 40 - 5 * i, 3), dtype=np.uint8)) for i in range(count)]


def conversation(content: str, answer: str = "") -> list[dict]:
    """The messages of one turn."""
    return [{"role": "User", "content": content}, {"role": "Assistant", "content": answer}]


def assert_equal(actual, expected):
    """Assert that two outputs have the same type, fields and values."""
    assert type(actual) is type(expected)
    assert list(actual.keys()) == list(expected.keys())
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert actual[key].dtype == value.dtype
            assert torch.equal(actual[key], value)
        else:
            assert actual[key] == value


# The prompt


def test_the_default_system_prompt_is_the_published_one(golden):
    assert golden["prompts"]["text_only"]["sft_format"].startswith(SYSTEM + "\n\nUser: ")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (conversation("Hi"), f"{SYSTEM}\n\nUser: Hi\n\nAssistant:"),
        (conversation("  \n Hi  there\n"), f"{SYSTEM}\n\nUser: Hi  there\n\nAssistant:"),
        (
            [*conversation("a", " b "), *conversation("c", " ")],
            f"{SYSTEM}\n\nUser: a\n\nAssistant: b{EOS}User: c\n\nAssistant:",
        ),
        ([{"role": "User", "content": "Hi"}], f"{SYSTEM}\n\nUser: Hi"),  # the whole is stripped as well
        ([], SYSTEM),
        ([{"role": "Human", "content": "Hi"}, {"role": "Bot", "content": ""}], f"{SYSTEM}\n\nHuman: Hi\n\nBot:"),
    ],
)
def test_a_conversation_is_rendered_with_the_default_system_prompt_and_stripped(processor, messages, expected):
    output = processor(conversations=messages, force_batchify=False)
    assert output.sft_format == expected
    assert output.input_ids.tolist() == processor.tokenizer.encode(expected)


@pytest.mark.parametrize("prompt", ["  \n User: Hi \n\nAssistant:\n ", "", f"User: a{EOS}User: b\n\nAssistant:"])
def test_a_prompt_is_used_verbatim(processor, prompt):
    output = processor(prompt=prompt, force_batchify=False)
    assert output.sft_format == prompt
    assert output.input_ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(output.input_ids[1:]) == prompt


@pytest.mark.parametrize(
    ("sft_format", "system", "expected"),
    [
        ("deepseek", "", "User: a\n\nAssistant: b<｜end▁of▁sentence｜>User: c"),
        ("deepseek", "S", "S\n\nUser: a\n\nAssistant: b<｜end▁of▁sentence｜>User: c"),
        ("llama-2", "", "[INST] a [/INST] b </s><s>[INST] c"),
        ("llama-2", "S", "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c"),
        ("plain", "", "abc"),
        ("alignment", "", "<image>\nb<image>"),
    ],
)
def test_the_sft_template_is_rendered_with_the_given_format_and_system(processor, sft_format, system, expected):
    messages = [*conversation(" a ", "\nb\n"), {"role": "User", "content": "c \n"}]
    rendered = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=messages, sft_format=sft_format, system_prompt=system
    )
    assert rendered == expected


def test_without_format_and_system_the_template_is_deepseeks_alone(processor):
    assert processor.apply_sft_template_for_multi_turn_prompts(conversation("a")) == "User: a\n\nAssistant:"


def test_rendering_leaves_the_callers_messages_as_they_are(processor):
    messages = conversation(" a ")
    processor(conversations=messages)
    assert messages == conversation(" a ")


@pytest.mark.parametrize(
    "both", [{"prompt": "a", "conversations": conversation("a")}, {"prompt": None, "conversations": None}, {}]
)
@pytest.mark.parametrize("call", ["__call__", "process_one"])
def test_exactly_one_of_prompt_and_conversations_is_taken(processor, call, both):
    with pytest.raises(ValueError, match=r"prompt.*conversations"):
        getattr(processor, call)(**both)


def test_arguments_are_keywords_only(processor):
    with pytest.raises(TypeError):
        processor("a prompt")


def test_a_new_chat_template_is_an_empty_conversation_with_the_system_prompt(processor):
    template = processor.new_chat_template()
    assert (template.name, template.system_message, template.messages) == ("deepseek", SYSTEM, [])
    template.append_message("User", "a")
    assert processor.new_chat_template().messages == []


def test_a_new_chat_template_is_in_the_processors_format(small_tokenizer_dir):
    template = make_processor(small_tokenizer_dir, sft_format="llama-2").new_chat_template()
    assert (template.name, template.system_message) == ("llama-2", SYSTEM)


@pytest.mark.parametrize(
    ("system", "expected"),
    [("Answer in rhyme.", "Answer in rhyme.\n\nUser: Hi\n\nAssistant:"), ("", "User: Hi\n\nAssistant:")],
)
def test_a_system_prompt_set_on_an_instance_is_honoured_by_it_alone(processor, small_tokenizer_dir, system, expected):
    processor.system_prompt = system
    assert processor.new_chat_template().system_message == system
    assert processor(conversations=conversation("Hi")).sft_format == [expected]
    assert make_processor(small_tokenizer_dir).new_chat_template().system_message == SYSTEM


# Tokens and images


def test_each_placeholder_becomes_as_many_copies_as_an_image_has_features(processor):
    output = processor.process_one(prompt=f"{IMAGE_TAG}a{IMAGE_TAG}{IMAGE_TAG}b", images=pictures(3))
    a, b = (processor.tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    image = [processor.image_id] * PER_IMAGE
    assert output.input_ids.tolist() == [processor.tokenizer.bos_token_id, *image, a, *image, *image, b]
    assert output.num_image_tokens.tolist() == [PER_IMAGE] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_what_one_conversation_becomes(processor, count):
    images = pictures(count)
    output = processor(conversations=conversation(IMAGE_TAG * count), images=images, force_batchify=False)
    assert type(output) is VLChatProcessorOutput
    assert output.sft_format == f"{SYSTEM}\n\nUser: {IMAGE_TAG * count}\n\nAssistant:"
    assert (output.input_ids.dtype, output.input_ids.ndim) == (torch.int64, 1)
    assert (output.input_ids == processor.image_id).sum() == count * PER_IMAGE
    assert torch.equal(output.pixel_values, processor.image_processor(images)["pixel_values"])
    assert (output.pixel_values.dtype, tuple(output.pixel_values.shape)) == (torch.float32, (count, 3, 32, 32))
    assert (output.num_image_tokens.dtype, output.num_image_tokens.tolist()) == (torch.int32, [PER_IMAGE] * count)


@pytest.mark.parametrize("count", [1, 2])
def test_what_it_becomes_as_a_batch_of_one(processor, count):
    arguments = {"conversations": conversation(IMAGE_TAG * count), "images": pictures(count)}
    one = processor(**arguments, force_batchify=False)
    batch = processor(**arguments)
    assert type(batch) is BatchedVLChatProcessorOutput
    assert {key: batch[key].dtype for key in BATCH_DTYPES} == BATCH_DTYPES
    assert batch.sft_format == [one.sft_format]
    assert torch.equal(batch.input_ids, one.input_ids[None])
    assert torch.equal(batch.pixel_values, one.pixel_values[None])
    assert torch.equal(batch.attention_mask, torch.ones_like(batch.input_ids))
    assert torch.equal(batch.images_seq_mask, batch.input_ids == processor.image_id)
    assert torch.equal(batch.images_emb_mask, torch.ones(1, count, PER_IMAGE, dtype=torch.bool))


@pytest.mark.parametrize("images", [None, []], ids=["None", "empty"])
def test_text_only(processor, images):
    one = processor(conversations=conversation("Hi"), images=images, force_batchify=False)
    assert (one.pixel_values.dtype, tuple(one.pixel_values.shape)) == (torch.float32, (0, 3, 32, 32))
    assert (one.num_image_tokens.dtype, one.num_image_tokens.tolist()) == (torch.int32, [])

    batch = processor(conversations=conversation("Hi"), images=images)
    assert {key: batch[key].dtype for key in BATCH_DTYPES} == BATCH_DTYPES
    assert torch.equal(batch.pixel_values, torch.zeros(1, 1, 3, 32, 32))
    assert torch.equal(batch.images_emb_mask, torch.zeros(1, 1, PER_IMAGE, dtype=torch.bool))
    assert not batch.images_seq_mask.any()


@pytest.mark.parametrize("indices", [[1, 3], (1, 3), torch.tensor([1, 3]), torch.tensor([[1], [3]])], ids=repr)
def test_add_image_token_takes_the_positions_in_every_form(processor, indices):
    image = processor.image_id
    ids, counts = processor.add_image_token(image_indices=indices, input_ids=torch.tensor([7, image, 8, image]))
    assert (ids.dtype, ids.tolist()) == (torch.int64, [7, *[image] * PER_IMAGE, 8, *[image] * PER_IMAGE])
    assert (counts.dtype, counts.tolist()) == (torch.int32, [PER_IMAGE, PER_IMAGE])


@pytest.mark.parametrize("indices", [[], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)])
def test_add_image_token_without_images_changes_nothing(processor, indices):
    ids, counts = processor.add_image_token(indices, torch.tensor([7, 8]))
    assert ids.tolist() == [7, 8]
    assert (counts.dtype, tuple(counts.shape)) == (torch.int32, (0,))


@pytest.mark.parametrize(("tags", "given"), [(0, 1), (1, 0), (1, 2), (2, 1), (3, 0), (0, 2)])
@pytest.mark.parametrize("batched", [True, False])
def test_placeholders_and_images_must_be_as_many(processor, tags, given, batched):
    with pytest.raises(ValueError) as caught:
        processor(prompt="Look: " + IMAGE_TAG * tags, images=pictures(given), force_batchify=batched)
    assert f"{tags} {IMAGE_TAG}" in str(caught.value)
    assert f"{given} images" in str(caught.value)


# Batches


def hand_made(processor: VLChatProcessor, tokens: list[int], counts: list[int], images: int | None):
    """An output as clients build it themselves, with pixels of `images` images; None for no pixels."""
    return VLChatProcessorOutput(
        sft_format="by hand",
        input_ids=torch.tensor(tokens),
        pixel_values=None if images is None else torch.ones(images, *processor.image_processor.default_shape),
        num_image_tokens=torch.tensor(counts, dtype=torch.int32),
    )


def test_rows_are_padded_on_the_left_and_their_images_with_zeros(processor):
    prompts = [f"{IMAGE_TAG} and {IMAGE_TAG}", "Hello, this has no image but is longer", f"{IMAGE_TAG}?"]
    images = [pictures(2), None, pictures(1)]
    items = [processor.process_one(prompt=prompt, images=some) for prompt, some in zip(prompts, images, strict=True)]
    batch = processor.batchify(items)

    assert batch.sft_format == prompts
    assert {key: batch[key].dtype for key in BATCH_DTYPES} == BATCH_DTYPES
    longest = max(len(item) for item in items)
    assert len({len(item) for item in items}) == 3  # so that every row but one is padded
    for row, item in enumerate(items):
        padding = longest - len(item)
        ids = [processor.pad_id] * padding + item.input_ids.tolist()
        assert batch.input_ids[row].tolist() == ids
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(item)
        assert batch.images_seq_mask[row].tolist() == [token == processor.image_id for token in ids]
    assert batch.images_emb_mask.all(-1).tolist() == [[True, True], [False, False], [True, False]]
    assert batch.images_emb_mask.any(-1).tolist() == batch.images_emb_mask.all(-1).tolist()

    assert tuple(batch.pixel_values.shape) == (3, 2, 3, 32, 32)
    assert torch.equal(batch.pixel_values[0], items[0].pixel_values)
    assert torch.equal(batch.pixel_values[2, :1], items[2].pixel_values)
    assert not batch.pixel_values[1].any()
    assert not batch.pixel_values[2, 1].any()


def test_the_images_feature_mask_follows_each_items_own_counts(processor):
    image = processor.image_id
    first = hand_made(processor, [1, image, image, image, 2], [1, 2], 2)
    second = hand_made(processor, [1, *[image] * PER_IMAGE], [PER_IMAGE], 1)
    assert processor.batchify([first, second]).images_emb_mask.int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0]],
    ]


def test_a_hand_made_item_may_have_no_pixels(processor):
    batch = processor.batchify([hand_made(processor, [5, 6, 7], [], None)])
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert torch.equal(batch.pixel_values, torch.zeros(1, 1, 3, 32, 32))
    assert not batch.images_seq_mask.any()
    assert not batch.images_emb_mask.any()


def test_a_hand_made_item_without_pixels_goes_into_one_batch_with_an_image(processor):
    with_image = processor.process_one(prompt=f"{IMAGE_TAG} ok", images=pictures(1))
    batch = processor.batchify([hand_made(processor, [5], [], None), with_image])
    assert batch.images_emb_mask.any(-1).tolist() == [[False], [True]]
    assert torch.equal(batch.pixel_values[1], with_image.pixel_values)
    assert not batch.pixel_values[0].any()


@pytest.mark.parametrize(
    ("positions", "counts", "images", "named"),
    [
        (PER_IMAGE, [PER_IMAGE], None, ("0 images", "1 ")),
        (PER_IMAGE, [PER_IMAGE], 2, ("2 images", "1 ")),
        (0, [], 1, ("1 images", "0 ")),
        (2 * PER_IMAGE, [PER_IMAGE], 1, (f"{2 * PER_IMAGE} {IMAGE_TAG}", f"{PER_IMAGE} features")),
        (0, [PER_IMAGE], 1, (f"0 {IMAGE_TAG}", f"{PER_IMAGE} features")),
        (PER_IMAGE, [], None, (f"{PER_IMAGE} {IMAGE_TAG}", "0 features")),
        (PER_IMAGE, [PER_IMAGE, PER_IMAGE], 2, (f"{PER_IMAGE} {IMAGE_TAG}", f"{2 * PER_IMAGE} features")),
        (PER_IMAGE + 1, [PER_IMAGE + 1], 1, (f"{PER_IMAGE + 1} features", f"{PER_IMAGE}")),
    ],
)
def test_batchify_refuses_an_item_whose_counts_disagree_and_names_both(processor, positions, counts, images, named):
    item = hand_made(processor, [1, *[processor.image_id] * positions], counts, images)
    good = processor.process_one(prompt="fine")
    with pytest.raises(ValueError) as caught:
        processor.batchify([good, item])
    assert "Item 1 " in str(caught.value)
    for count in named:
        assert count in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conversations": {"role": "User", "content": "Hi."}}, "A conversation is a list of messages"),
        ({"prompt": ["a", "b"]}, "A prompt is one text, not a list"),
        ({"prompt": IMAGE_TAG, "images": "images/shapes.png"}, "load them with load_pil_images"),
        ({"prompt": IMAGE_TAG, "images": Path("shapes.png")}, "load them with load_pil_images"),
    ],
)
def test_what_is_of_another_kind_is_a_clear_error(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_an_empty_batch_is_a_value_error(processor):
    with pytest.raises(ValueError, match="empty"):
        processor.batchify([])


def test_batchify_leaves_its_items_as_they_are(processor):
    item = processor.process_one(prompt=f"{IMAGE_TAG} ok", images=pictures(1))
    same = processor.process_one(prompt=f"{IMAGE_TAG} ok", images=pictures(1))
    processor.batchify([item, processor.process_one(prompt="a longer text than the other one")])
    assert_equal(item, same)


def test_with_add_special_token_the_tag_stays_in_front_and_only_the_copies_are_images(small_tokenizer_dir):
    processor = make_processor(small_tokenizer_dir, add_special_token=True)
    one = processor.process_one(prompt=f"{IMAGE_TAG}{IMAGE_TAG}a{IMAGE_TAG}", images=pictures(3))
    image, a = processor.image_id, processor.tokenizer.convert_tokens_to_ids("a")
    run = [image] * (1 + PER_IMAGE)
    assert one.input_ids.tolist() == [processor.tokenizer.bos_token_id, *run, *run, a, *run]
    assert one.num_image_tokens.tolist() == [PER_IMAGE] * 3

    batch = processor.batchify([one])
    copies = [False] + [True] * PER_IMAGE
    assert batch.images_seq_mask[0].tolist() == [False, *copies, *copies, False, *copies]
    assert batch.images_emb_mask.all()
    assert batch.images_seq_mask.sum() == batch.images_emb_mask.sum() == 3 * PER_IMAGE


# The outputs as mappings


@pytest.fixture(params=["one", "batch"])
def output_and_fields(request, processor):
    """A single and a batched output, each with the names of its fields in order."""
    batched = request.param == "batch"
    output = processor(prompt=f"{IMAGE_TAG} ok", images=pictures(1), force_batchify=batched)
    return output, BATCH_FIELDS if batched else ONE_FIELDS


def test_an_output_is_read_as_a_mapping_of_its_fields(output_and_fields):
    output, fields = output_and_fields
    assert list(output.keys()) == list(output) == fields
    assert [key for key, _ in output.items()] == fields
    for key, value, (_, item) in zip(fields, output.values(), output.items(), strict=True):
        assert key in output
        assert output[key] is value
        assert item is value
        assert getattr(output, key) is value
        assert output.get(key) is value


def test_an_output_is_unpacked_as_keyword_arguments(output_and_fields):
    output, fields = output_and_fields
    unpacked = dict(**output)
    assert list(unpacked) == fields
    assert all(unpacked[key] is output[key] for key in fields)
    assert_equal(type(output)(**output), output)


def test_an_output_is_written_as_a_mapping_and_as_an_object(output_and_fields):
    output, fields = output_and_fields
    output["input_ids"] = "by key"
    assert output.input_ids == "by key"
    output.input_ids = "by name"
    assert output["input_ids"] == "by name"
    assert list(output) == fields


def test_an_output_lacks_what_is_no_field(output_and_fields):
    output, _ = output_and_fields
    assert "labels" not in output
    assert output.get("labels") is None
    assert output.get("labels", 3) == 3
    with pytest.raises(KeyError):
        output["labels"]


def test_an_output_is_made_by_position_in_the_order_of_its_fields():
    assert list(VLChatProcessorOutput(*range(4)).items()) == list(zip(ONE_FIELDS, range(4), strict=True))
    assert list(BatchedVLChatProcessorOutput(*range(6)).items()) == list(zip(BATCH_FIELDS, range(6), strict=True))


def test_the_length_is_the_number_of_tokens_and_of_rows(processor):
    one = processor.process_one(prompt="abc")
    assert len(one) == len(processor.tokenizer.encode("abc"))
    assert len(processor.batchify([one] * 3)) == 3


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (("cpu",), torch.bfloat16),
        ((torch.device("cpu"), torch.float16), torch.float16),
        (("cpu", torch.float32), torch.float32),
    ],
)
def test_to_casts_the_pixels_alone_and_returns_the_same_object(processor, arguments, dtype):
    batch = processor(prompt=f"{IMAGE_TAG} ok", images=pictures(1))
    before = dict(batch)
    assert batch.to(*arguments) is batch
    assert {key: batch[key].dtype for key in BATCH_DTYPES} == {**BATCH_DTYPES, "pixel_values": dtype}
    assert batch.sft_format == [f"{IMAGE_TAG} ok"]
    assert torch.equal(batch.pixel_values, before["pixel_values"].to(dtype))
    for key in set(BATCH_DTYPES) - {"pixel_values"}:
        assert torch.equal(batch[key], before[key])


def test_to_moves_every_tensor(processor):
    batch = processor(prompt=f"{IMAGE_TAG} ok", images=pictures(1)).to("meta", dtype=torch.float16)
    assert {key: batch[key].device.type for key in BATCH_DTYPES} == dict.fromkeys(BATCH_DTYPES, "meta")
    assert batch.pixel_values.dtype is torch.float16


# The processor's parts


def test_defaults(small_tokenizer_dir):
    image_processor, tokenizer = VLMImageProcessor(32), load_tokenizer(str(small_tokenizer_dir))
    processor = VLChatProcessor(image_processor, tokenizer)
    assert processor.image_processor is image_processor
    assert processor.tokenizer is tokenizer
    assert processor.image_tag == IMAGE_TAG
    assert processor.num_image_tokens == 576
    assert processor.add_special_token is False
    assert processor.sft_format == "deepseek"
    assert processor.mask_prompt is True
    assert processor.ignore_id == -100


OPTIONS = {
    "image_tag": EOS,  # any token that the vocabulary has
    "num_image_tokens": 144,
    "add_special_token": True,
    "sft_format": "plain",
    "mask_prompt": False,
    "ignore_id": -1,
}


def test_constructor_arguments_are_attributes(small_tokenizer_dir):
    processor = VLChatProcessor(VLMImageProcessor(32), load_tokenizer(str(small_tokenizer_dir)), *OPTIONS.values())
    assert {name: getattr(processor, name) for name in OPTIONS} == OPTIONS


def test_image_token_image_id_and_pad_id(processor):
    vocabulary = processor.tokenizer.get_vocab()
    assert processor.image_token == IMAGE_TAG
    assert processor.image_id == vocabulary[IMAGE_TAG]
    assert processor.pad_id == processor.tokenizer.pad_token_id == vocabulary[EOS]


def test_the_published_tokenizers_ids(published_tokenizer_dir):
    processor = make_processor(published_tokenizer_dir)
    assert processor.tokenizer.convert_ids_to_tokens([100000, 100001]) == [BOS, EOS]
    assert (processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id) == (100000, 100001)
    assert processor.pad_id == 100001
    known = json.loads((published_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["id"] for token in known if token["content"] == IMAGE_TAG] == [processor.image_id]


def test_a_tag_that_the_vocabulary_lacks_is_added_as_a_special_token_and_the_others_stay(small_tokenizer_dir):
    tokenizer = load_tokenizer(str(small_tokenizer_dir))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<earlier>"]})
    before, vocabulary = len(tokenizer), tokenizer.get_vocab()

    processor = VLChatProcessor(VLMImageProcessor(32), tokenizer, image_tag="<my image>", num_image_tokens=2)
    assert (processor.image_id, len(tokenizer)) == (before, before + 1)
    assert tokenizer.get_vocab() == {**vocabulary, "<my image>": before}
    assert {"<earlier>", "<my image>", BOS, EOS} <= set(tokenizer.all_special_tokens)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, EOS)

    output = processor.process_one(prompt="a<my image>b<earlier>", images=pictures(1))
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    assert output.input_ids.tolist() == [tokenizer.bos_token_id, a, before, before, b, vocabulary["<earlier>"]]
    assert tokenizer.decode(output.input_ids, skip_special_tokens=True) == "ab"


def test_a_tag_that_the_vocabulary_has_adds_nothing(small_tokenizer_dir):
    tokenizer = load_tokenizer(str(small_tokenizer_dir))
    vocabulary = tokenizer.get_vocab()
    VLChatProcessor(VLMImageProcessor(32), tokenizer)
    assert tokenizer.get_vocab() == vocabulary


def test_decoding_is_the_tokenizers(processor):
    ids = processor.process_one(prompt=TRICKY).input_ids
    assert processor.decode(ids) == BOS + TRICKY
    assert processor.decode(ids, skip_special_tokens=True) == TRICKY
    assert processor.batch_decode([ids, ids[1:2]], skip_special_tokens=True) == [TRICKY, "H"]


def test_model_input_names_are_those_of_both_parts(processor):
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(processor.model_input_names)


def test_a_processor_survives_pickling(processor):
    """A DataLoader pickles the processor for its workers."""
    processor.system_prompt = "S"
    copy = pickle.loads(pickle.dumps(processor))
    assert type(copy) is VLChatProcessor
    arguments = {"conversations": conversation(f"{IMAGE_TAG} {TRICKY}"), "images": pictures(1)}
    assert_equal(copy(**arguments), processor(**arguments))
    assert copy(**arguments).sft_format == [f"S\n\nUser: {IMAGE_TAG} {TRICKY}\n\nAssistant:"]


@pytest.mark.parametrize("batched", [True, False])
def test_outputs_survive_pickling(processor, batched):
    output = processor(prompt=f"{IMAGE_TAG} ok", images=pictures(1), force_batchify=batched)
    assert_equal(pickle.loads(pickle.dumps(output)), output)


# Files

PUBLISHED_SETTINGS = {
    "add_special_token": False,
    "ignore_id": -100,
    "image_tag": IMAGE_TAG,
    "mask_prompt": True,
    "num_image_tokens": 576,
    "processor_class": "VLChatProcessor",
    "sft_format": "deepseek",
}


@pytest.fixture
def published_layout(small_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """The files of a published checkpoint that concern the processor."""
    directory = tmp_path / "published"
    shutil.copytree(small_tokenizer_dir, directory)
    (directory / "processor_config.json").write_text(json.dumps(PUBLISHED_SETTINGS))
    VLMImageProcessor(32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3).save_pretrained(directory)
    return directory


def read(path: Path):
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("as_type", [str, Path], ids=["str", "Path"])
def test_a_published_directory_is_opened(published_layout, as_type):
    processor = VLChatProcessor.from_pretrained(as_type(published_layout))
    settings = {name: getattr(processor, name) for name in PUBLISHED_SETTINGS if name != "processor_class"}
    assert {**settings, "processor_class": "VLChatProcessor"} == PUBLISHED_SETTINGS
    assert type(processor.image_processor) is VLMImageProcessor
    assert processor.image_processor.to_dict() == read(published_layout / "preprocessor_config.json")
    assert processor.tokenizer.decode(processor.tokenizer.encode(TRICKY)) == BOS + TRICKY


def test_settings_are_read_from_the_file(published_layout):
    (published_layout / "processor_config.json").write_text(json.dumps({**OPTIONS, "processor_class": "X"}))
    processor = VLChatProcessor.from_pretrained(published_layout)
    assert {name: getattr(processor, name) for name in OPTIONS} == OPTIONS


def test_arguments_override_the_file(published_layout):
    processor = VLChatProcessor.from_pretrained(published_layout, num_image_tokens=144)
    assert processor.num_image_tokens == 144
    assert processor.process_one(prompt=IMAGE_TAG, images=pictures(1)).num_image_tokens.tolist() == [144]
    assert processor.sft_format == "deepseek"


def test_a_missing_settings_file_gives_the_defaults(published_layout):
    (published_layout / "processor_config.json").unlink()
    processor = VLChatProcessor.from_pretrained(published_layout)
    assert processor.to_dict() == PUBLISHED_SETTINGS
    assert VLChatProcessor.from_pretrained(published_layout, num_image_tokens=144).num_image_tokens == 144


def test_what_is_saved_has_the_published_layout(published_layout, tmp_path):
    VLChatProcessor.from_pretrained(published_layout).save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved" / "processor_config.json") == PUBLISHED_SETTINGS
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert read(tmp_path / "saved" / name) == read(published_layout / name)
    assert (tmp_path / "saved" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_image_tokens": 5, "add_special_token": True, "ignore_id": -7}, {"image_tag": "<my image>"}],
    ids=["defaults", "other settings", "added tag"],
)
def test_a_saved_processor_is_loaded_as_it_was(small_tokenizer_dir, tmp_path, options):
    processor = make_processor(small_tokenizer_dir, **options)
    processor.save_pretrained(tmp_path)
    loaded = VLChatProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == processor.tokenizer.padding_side == "left"
    arguments = {"conversations": conversation(f"{processor.image_tag} {TRICKY}"), "images": pictures(1)}
    assert_equal(loaded(**arguments), processor(**arguments))


# The tokenizer: every space and newline counts


@pytest.fixture(params=["small", "published"])
def whole_checkpoint(request, tmp_path) -> Path:
    """A checkpoint without weights, whose tokenizer files name `LlamaTokenizerFast` and are byte-level BPE."""
    directory = request.getfixturevalue(f"{request.param}_tokenizer_dir")
    processor = make_processor(directory)
    processor.save_pretrained(tmp_path)
    for file in directory.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    small_config("siglip", len(processor.tokenizer)).save_pretrained(tmp_path)
    assert read(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizerFast"
    return tmp_path


def test_auto_processor_opens_a_checkpoint(whole_checkpoint):
    processor = AutoProcessor.from_pretrained(whole_checkpoint)
    assert type(processor) is VLChatProcessor
    assert processor.num_image_tokens == PER_IMAGE
    assert processor.image_processor.image_size == 32
    assert processor.decode(processor.process_one(prompt=TRICKY).input_ids) == BOS + TRICKY


@pytest.mark.parametrize(
    "opener",
    [
        AutoTokenizer.from_pretrained,
        lambda path: AutoProcessor.from_pretrained(path).tokenizer,
        lambda path: VLChatProcessor.from_pretrained(path).tokenizer,
    ],
    ids=["AutoTokenizer", "AutoProcessor", "VLChatProcessor"],
)
def test_a_checkpoints_tokenizer_loses_nothing(whole_checkpoint, opener):
    tokenizer = opener(whole_checkpoint)
    for text in (TRICKY, " ", "\n\n", "a\t b", f"User: a{EOS}User:", "  leading"):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == text


def test_saving_and_loading_again_changes_no_token(whole_checkpoint, tmp_path):
    processor = VLChatProcessor.from_pretrained(whole_checkpoint)
    expected = processor.tokenizer.encode(TRICKY)
    saved = tmp_path / "saved"
    processor.save_pretrained(saved)
    shutil.copyfile(whole_checkpoint / "config.json", saved / "config.json")
    assert VLChatProcessor.from_pretrained(saved).tokenizer.encode(TRICKY) == expected
    assert AutoTokenizer.from_pretrained(saved).encode(TRICKY) == expected
    assert AutoProcessor.from_pretrained(saved).tokenizer.encode(TRICKY) == expected


def test_auto_classes_open_a_checkpoint_with_weights(checkpoint):
    assert type(AutoProcessor.from_pretrained(checkpoint)) is VLChatProcessor
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode(TRICKY)) == BOS + TRICKY


# --- special tokens that are only text ---


@pytest.fixture(params=["small", "published"])
def any_processor(request: pytest.FixtureRequest) -> VLChatProcessor:
    """A processor with the small tokenizer, and one with the published tokenizer."""
    return make_processor(request.getfixturevalue(f"{request.param}_tokenizer_dir"))


def typed(text: str) -> list[dict]:
    """A message of text alone."""
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("token", [BOS, EOS, IMAGE_TAG, IMAGE_TAG * 3, f"{EOS}{IMAGE_TAG}"])
def test_a_literal_special_token_is_read_letter_by_letter(any_processor: VLChatProcessor, token: str) -> None:
    text = f"What does {token} mean?"
    ids, _ = any_processor.encode(Rendered(text, literal=((0, len(text)),)))
    special = {any_processor.image_id, *any_processor.tokenizer.all_special_ids}
    assert not special & set(ids[1:])
    assert any_processor.tokenizer.decode(ids[1:]) == text
    assert special & set(any_processor.encode(text)[0][1:])


def test_around_a_literal_everything_is_encoded_as_without_it(any_processor: VLChatProcessor) -> None:
    before = f"System.\n\nUser: {IMAGE_TAG}  two  spaces{IMAGE_TAG} {TRICKY}\n\nAssistant: yes{EOS}"
    after = f"{IMAGE_TAG}\n\nUser: and  this? {TRICKY}"
    literal = (len(before), len(before) + len(IMAGE_TAG))
    whole, offsets = any_processor.encode(Rendered(f"{before}{IMAGE_TAG}{after}", literal=(literal,)))
    expected = any_processor.tokenizer.encode(before)
    assert whole[: len(expected)] == expected
    expected = any_processor.tokenizer.encode(after, add_special_tokens=False)
    assert whole[-len(expected) :] == expected
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert offsets[-1][1] == len(before + IMAGE_TAG + after)


def test_text_without_special_tokens_is_its_own_literal(any_processor: VLChatProcessor) -> None:
    for text in ("", TRICKY, "<image>", "< image_placeholder>", "<image_placeholder", "a < b > c"):
        rendered = any_processor.render(typed(text), untrusted=True)
        assert any_processor.encode(rendered) == any_processor.encode(rendered.text)


def test_a_literal_image_tag_asks_for_no_image(processor: VLChatProcessor) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{IMAGE_TAG} is a tag"}]}
    prompt = processor.render([message, {"role": "assistant", "content": ""}], untrusted=True)
    output = processor(prompt=prompt, images=pictures(1))
    assert output.images_seq_mask.sum() == PER_IMAGE
    assert output.sft_format == [f"{SYSTEM}\n\nUser: {IMAGE_TAG}{IMAGE_TAG} is a tag\n\nAssistant:"]
