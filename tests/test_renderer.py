"""The renderer: training and inference give the same prompt, for every template and at every door."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, EOS, IMAGE_TAG, Loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.data.rows import TrainingRow, parse_row
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.models import VLChatProcessor, VLMImageProcessor
from deepseek_vl.serve.api.chat import ChatCompletionRequest
from deepseek_vl.serve.api.parse import parse
from deepseek_vl.serve.api.service import Service
from deepseek_vl.serve.inference import load_model, stream_answer
from deepseek_vl.train.collator import NOT_LEARNT, encode_row
from deepseek_vl.train.evaluate import evaluate
from deepseek_vl.utils.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    get_conv_template,
    register_conv_template,
    render,
)

SYSTEM = VLChatProcessor.system_prompt
OTHERS = [
    Conversation("human-bot", roles=("Human", "Bot"), sep_style=SeparatorStyle.DeepSeek, sep="\n", sep2=EOS),
    Conversation(
        "framed",
        system_template="<{{sys}}>{system_message}</{{sys}}>\n",
        roles=("<Q>", "<A>"),
        sep_style=SeparatorStyle.LLAMA2,
        sep="\n",
        sep2=f" {EOS}\n",
    ),
    Conversation("fixed", system_template="Talk.", roles=("Q", "A"), sep_style=SeparatorStyle.DeepSeek, sep2="$"),
    Conversation("alone", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", sep2=EOS),
]
NAMES = ["deepseek", "llama-2", "llava_llama2", "plain", "alignment", *(template.name for template in OTHERS)]


@pytest.fixture(scope="module", autouse=True)
def templates() -> Iterator[None]:
    """Register users' templates for these tests."""
    for template in OTHERS:
        register_conv_template(template)
    yield
    for template in OTHERS:
        del conv_templates[template.name]


def make_processor(directory: Path, **options: Any) -> VLChatProcessor:
    return VLChatProcessor(VLMImageProcessor(32), load_tokenizer(str(directory)), num_image_tokens=4, **options)


@pytest.fixture(scope="module", params=["small", "published"])
def processor(request: pytest.FixtureRequest) -> VLChatProcessor:
    """A processor with the small tokenizer, and one with the published tokenizer."""
    return make_processor(request.getfixturevalue(f"{request.param}_tokenizer_dir"))


def turns(*texts: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# --- roles ---


@pytest.mark.parametrize("roles", [("user", "assistant"), ("User", "ASSISTANT"), ("Human", "Bot"), ("HUMAN", "bot")])
def test_roles_are_the_templates_own(roles: tuple[str, str]) -> None:
    messages = turns("a", "b", "c", "", roles=roles)
    assert render(messages, "human-bot").text == f"Human: a\nBot: b{EOS}Human: c\nBot:"


@pytest.mark.parametrize("role", ["system", "System", "SYSTEM"])
@pytest.mark.parametrize("name", NAMES)
def test_a_system_message_stands_where_the_template_has_it(name: str, role: str) -> None:
    expected = render(turns("a", "b", "c", ""), name, "Be kind.")
    assert render([{"role": role, "content": "Be kind."}, *turns("a", "b", "c", "")], name, "Another.") == expected


def test_a_system_message_in_words_where_it_cannot_be() -> None:
    messages = [*turns("a", "b"), {"role": "System", "content": "S"}]
    with pytest.raises(
        ValueError, match=r"^The role of message 3 is 'System'; .* only that of the first may be system"
    ):
        render(messages, "deepseek")
    with pytest.raises(ValueError, match="message 1 is 'tool'; it must be user or assistant"):
        render([{"role": "tool", "content": "a"}], "deepseek")


def test_the_references_own_call_takes_roles_as_they_are(processor: VLChatProcessor) -> None:
    messages = [{"role": "System", "content": "S"}, *turns("a", "b", roles=("Human", "Robot"))]
    rendered = processor.apply_sft_template_for_multi_turn_prompts(messages, "deepseek", "")
    assert rendered == f"System: S\n\nHuman: a{EOS}Robot: b"


# --- what is learnt ---


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_learnt_from_where_its_question_ends(name: str) -> None:
    texts = ("a", "b b", "c", "Bot: d", "e", "f")
    rendered = render(turns(*texts), name, "S")
    assert len(rendered.learnt) == 3
    for i, (start, end) in zip((1, 3, 5), rendered.learnt, strict=True):
        assert rendered.text[:start] == render(turns(*texts[:i], ""), name, "S").text
        assert rendered.text[:end].strip() == render(turns(*texts[: i + 1]), name, "S").text
        assert rendered.text[start:end].startswith(texts[i], -len(rendered.text[start:end].lstrip()))


# --- literal text ---


def test_a_token_that_becomes_special_later_stays_text(small_tokenizer_dir: Path) -> None:
    processor = make_processor(small_tokenizer_dir)
    messages = turns(f"What is <|ref|> and {EOS}?", "")
    prompt = processor.render(messages, untrusted=True)
    before, _ = processor.encode(prompt)
    processor.tokenizer.add_tokens([AddedToken("<|ref|>", normalized=False, special=True)], special_tokens=True)
    assert processor.encode(prompt)[0] == before
    assert processor.encode(processor.render(messages, untrusted=True))[0] == before
    assert len(processor.encode(processor.render(messages))[0]) < len(before)  # in trusted text it is a special token


def test_a_token_that_is_half_the_templates_is_text(small_tokenizer_dir: Path) -> None:
    processor = make_processor(small_tokenizer_dir)
    prompt = processor.render(turns("hi there", f"b{IMAGE_TAG}", "c", ""), "", untrusted=True)
    before, _ = processor.encode(prompt)
    processor.tokenizer.add_tokens([AddedToken("User: hi", normalized=False)], special_tokens=True)
    assert processor.tokenizer.encode(prompt.text) != before
    assert processor.encode(prompt)[0] == before


@pytest.mark.parametrize("text", [EOS, BOS, f"{EOS}User: {EOS}", f"é{EOS} 世", "no token at all"])
@pytest.mark.parametrize("name", ["deepseek", "human-bot", "framed"])
def test_the_templates_own_tokens_stay_special(processor: VLChatProcessor, name: str, text: str) -> None:
    rendered = render(turns(text, text, text, ""), name, "S", untrusted=True)
    ids, offsets = processor.encode(rendered)
    assert ids.count(processor.tokenizer.eos_token_id) == 1  # only the one after the answer
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert processor.tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == rendered.text
    place = ids.index(processor.tokenizer.eos_token_id)
    assert rendered.text[slice(*offsets[place])] == EOS
    assert offsets[place][0] >= rendered.literal[1][1]


def test_text_runs_across_the_border_of_what_is_literal(processor: VLChatProcessor) -> None:
    for text in (" the", "n't you", "  two", f"{IMAGE_TAG}x"):
        rendered = render(turns(text, "of", ""), "alone", untrusted=True)
        assert processor.encode(rendered)[0] == processor.tokenizer.encode(rendered.text)


def test_parts_say_what_is_an_image(processor: VLChatProcessor) -> None:
    content = [{"type": "image"}, {"type": "text", "text": f" {IMAGE_TAG}?"}]
    for untrusted, tags in ((True, 1), (False, 2)):
        rendered = processor.render([{"role": "user", "content": content}], "", untrusted=untrusted)
        assert rendered.text == f"User: {IMAGE_TAG} {IMAGE_TAG}?"
        assert processor.encode(rendered)[0].count(processor.image_id) == tags
    rendered = processor.render(turns(f"{IMAGE_TAG}{EOS}"), "", untrusted=True)
    ids, _ = processor.encode(rendered)
    assert ids.count(processor.image_id) == 1 and processor.tokenizer.eos_token_id not in ids
    output = processor(prompt=rendered, images=[Image.new("RGB", (4, 4))])
    assert output.sft_format == [rendered.text] and output.images_seq_mask.sum() == 4
    assert processor.count_tokens(rendered) == output.input_ids.shape[1]


def test_a_strangers_system_text_is_literal_and_the_servers_own_is_not(processor: VLChatProcessor) -> None:
    special = processor.tokenizer.eos_token_id
    for name in ("deepseek", "framed"):
        own = render(turns("a"), name, f"S{EOS}", untrusted=True)
        theirs = render([{"role": "system", "content": f"S{EOS}"}, *turns("a")], name, untrusted=True)
        assert own.text == theirs.text
        assert processor.encode(own)[0].count(special) == 1
        assert processor.encode(theirs)[0].count(special) == 0


def test_an_answer_may_come_first() -> None:
    """A first message of the assistant ends as answers do, although templates count even and odd messages."""
    messages = turns("q", "Hi.", "A", "")[1:]
    system = [{"role": "system", "content": "S"}]
    assert render(messages, "deepseek").text == f"Assistant: Hi.{EOS}User: A\n\nAssistant:"
    assert render([*system, *messages], "deepseek").text == f"S\n\nAssistant: Hi.{EOS}User: A\n\nAssistant:"
    assert render(messages, "human-bot").text == f"Bot: Hi.{EOS}Human: A\nBot:"
    assert render([*system, *messages], "framed").text == f"<{{sys}}>S</{{sys}}>\n<A> Hi. {EOS}\n<Q> A\n<A>"


# --- the Jinja template ---

TEXTS = st.text(st.sampled_from("ab \n\t:<>{}é世🙂|%'\"\\"), max_size=12)
PARTS = st.one_of(st.just({"type": "image"}), st.builds(lambda text: {"type": "text", "text": text}, TEXTS))
CONTENTS = st.one_of(TEXTS, st.lists(PARTS, max_size=4))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_apply_chat_template_is_the_renderer(name: str, bare_processor: VLChatProcessor, data: Any) -> None:
    processor, roles = bare_processor, get_conv_template(name).roles
    processor.sft_format = name
    processor.system_prompt = data.draw(st.sampled_from(["", SYSTEM, " S \n", "{{ 'x' }}\"é"]))
    names = [st.sampled_from([*neutral, own or neutral[0]]) for neutral, own in zip(
        (("user", "User"), ("assistant", "ASSISTANT")), roles, strict=True)]  # fmt: skip
    messages = [
        {"role": data.draw(names[i % 2]), "content": content}
        for i, content in enumerate(data.draw(st.lists(CONTENTS, min_size=1, max_size=5)), data.draw(st.integers(0, 1)))
    ]
    if data.draw(st.booleans()):
        messages.insert(0, {"role": data.draw(st.sampled_from(["system", "System"])), "content": data.draw(CONTENTS)})
    asks = data.draw(st.booleans())
    rendered = processor.apply_chat_template(messages, add_generation_prompt=asks)
    expected = processor.render([*messages, *(turns("", "")[1:] if asks else [])])
    assert rendered == BOS + expected.text
    options = {"add_generation_prompt": asks, "return_assistant_tokens_mask": True}
    _, spans = render_jinja_template([messages], chat_template=processor.chat_template, **options)
    assert tuple(spans[0]) == expected.learnt


@pytest.fixture(scope="module")
def bare_processor(small_tokenizer_dir: Path) -> VLChatProcessor:
    """A processor with an unusual image tag, for tests that change its format."""
    return make_processor(small_tokenizer_dir, image_tag='<my "image">')


def test_apply_chat_template_refuses_what_the_renderer_does(processor: VLChatProcessor) -> None:
    for messages in ([*turns("a", "b"), {"role": "system", "content": "S"}], [{"role": "tool", "content": "a"}]):
        with pytest.raises(ValueError, match="it must be user or assistant, and only that of the first"):
            processor.render(messages)
        with pytest.raises(Exception, match="it must be user or assistant, and only that of the first"):
            processor.apply_chat_template(messages)


# --- what is trained is what is asked ---


class Recorder(VLChatProcessor):
    """A processor that keeps the prompts it has processed."""

    prompts: list[tuple[str, list[int]]] = []

    def process_one(self, *args: Any, **kwargs: Any) -> Any:
        output = super().process_one(*args, **kwargs)
        self.prompts.append((output.sft_format, output.input_ids.tolist()))
        return output


@pytest.fixture(scope="module")
def parrot(parrot_checkpoint: Path) -> Loaded:
    tokenizer, model, _ = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    processor = Recorder.from_pretrained(str(parrot_checkpoint))
    return tokenizer, model, processor


def by_chat(parrot: Loaded, row: TrainingRow) -> None:
    session = ChatSession(Engine(parrot[1], parrot[0]), parrot[2], GenerationSettings(max_new_tokens=1))
    session.messages = [*([{"role": "System", "content": row.system}] if row.system else []), *row.messages[:-2]]
    list(session.ask(row.messages[-2]["content"]))


def by_saved_chat(parrot: Loaded, row: TrainingRow, directory: Path) -> None:
    session = ChatSession(Engine(parrot[1], parrot[0]), parrot[2], GenerationSettings(max_new_tokens=1))
    session.messages = row.messages
    session.system_prompt = row.system or session.system_prompt
    session.save(directory / "chat.json")
    session.load(directory / "chat.json")
    list(session.retry())


def by_evaluation(parrot: Loaded, row: TrainingRow) -> None:
    evaluate(parrot[1], parrot[2], [row], max_new_tokens=1, history="reference")


def by_api(parrot: Loaded, row: TrainingRow) -> None:
    system = [{"role": "system", "content": row.system}] if row.system else []
    messages = [{"role": message["role"].lower(), "content": message["content"]} for message in row.messages[:-1]]
    request = parse(json.dumps({"model": "parrot", "messages": [*system, *messages]}).encode(), ChatCompletionRequest)
    service = Service("parrot", Engine(parrot[1], parrot[0]), parrot[2], GenerationSettings())
    (question,) = request.questions(service)
    service.generations(question, [], [print])


def by_stream(parrot: Loaded, row: TrainingRow) -> None:
    system = [{"role": "system", "content": row.system}] if row.system else []
    messages = [*system, *row.messages[:-1], {"role": "assistant", "content": ""}]
    stream_answer(parrot[1], parrot[2], messages, GenerationSettings())


def by_template(parrot: Loaded, row: TrainingRow) -> None:
    system = [{"role": "system", "content": row.system}] if row.system else []
    messages = [*system, *row.messages[:-1]]
    parrot[2](prompt=parrot[2].apply_chat_template(messages, add_generation_prompt=True))


DOORS: list[Callable[..., None]] = [by_chat, by_saved_chat, by_evaluation, by_api, by_stream, by_template]


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("name", ["deepseek", "llama-2", "human-bot", "framed", "alone"])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_trained_is_what_is_asked(
    parrot: Loaded, door: Callable[..., None], name: str, system: str | None, tmp_path: Path
) -> None:
    processor = parrot[2]
    processor.sft_format = name
    messages = turns("Hello. ", "Good day.", "And you?", "Fine, thanks.", roles=("User", "Assistant"))
    row = dataclasses.replace(parse_row(messages, tmp_path, "row"), system=system)
    trained = encode_row(row, processor)
    learnt = (trained.labels != NOT_LEARNT).tolist()
    answer_begins = max(i for i in range(1, len(learnt)) if learnt[i] and not learnt[i - 1])

    processor.prompts = []
    door(parrot, row, *([tmp_path] if door is by_saved_chat else []))
    prompt, ids = processor.prompts[-1]
    assert trained.item.sft_format.startswith(prompt.removeprefix(BOS))
    assert trained.item.input_ids[:answer_begins].tolist() == ids
    assert ("User:" in prompt) == (name == "deepseek")


def test_a_system_message_is_never_dropped_from_a_chat(parrot: Loaded) -> None:
    processor = parrot[2]
    processor.sft_format, processor.prompts = "deepseek", []
    session = ChatSession(
        Engine(parrot[1], parrot[0]), processor, GenerationSettings(max_new_tokens=1), max_history_tokens=60
    )
    session.messages = [{"role": "system", "content": "Be kind."}, *turns("a" * 90, "b", "c", "d")]
    list(session.ask("Hello."))
    assert session.dropped_turns == 1
    assert processor.prompts[-1][0] == f"Be kind.\n\nUser: c\n\nAssistant: d{EOS}User: Hello.\n\nAssistant:"
