"""The engine: streaming, stopping, stop words, errors, sampling."""

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARROT_ANSWERS, ROOT, Loaded, messages_of, wait_until
from PIL import Image
from transformers import StoppingCriteriaList

from deepseek_vl.data.checks import load_data
from deepseek_vl.engine.chat import ChatSession, with_image_tags
from deepseek_vl.engine.detokenizer import StopWordFilter
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import AnswerStream
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.inference import (
    GenerationSettings,
    StoppingCriteriaSub,
    convert_conversation_to_prompts,
    deepseek_generate,
    generate,
    load_model,
    stream_answer,
)
from deepseek_vl.serve.markdown import safe_markdown
from deepseek_vl.utils.conversation import get_conv_template

LONG = GenerationSettings(max_new_tokens=4000)


@pytest.fixture(scope="module")
def parrot(parrot_checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) of the model that knows its answers by heart."""
    return load_model(str(parrot_checkpoint), device="cpu", dtype="float32")


def ask(parrot: Loaded, question: str, *images: Image.Image, **settings: Any) -> AnswerStream:
    """The stream of the parrot's answer to a question."""
    _, model, processor = parrot
    return stream_answer(model, processor, messages_of(question, *images), GenerationSettings(**settings))


def generating_threads() -> list[threading.Thread]:
    """The threads of engines that are running."""
    return [thread for thread in threading.enumerate() if thread.name == "deepseek_vl-generate"]


def wait_until_idle(seconds: float = 5.0) -> None:
    """Wait until no generation is running; fail after some seconds."""
    wait_until(lambda: not generating_threads(), seconds)


def test_load_model_has_the_references_order(parrot: Loaded) -> None:
    tokenizer, model, processor = parrot
    assert isinstance(model, MultiModalityCausalLM)
    assert isinstance(processor, VLChatProcessor)
    assert tokenizer is processor.tokenizer


def test_multi_byte_characters_arrive_whole(parrot: Loaded) -> None:
    """The small tokenizer splits every one of these characters over several tokens."""
    pieces = list(ask(parrot, "Greet me."))
    assert "".join(pieces) == " " + PARROT_ANSWERS["Greet me."]
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_answers_are_about_the_picture(parrot: Loaded, colours: dict[str, Path]) -> None:
    for name, path in colours.items():
        assert "".join(ask(parrot, "<image_placeholder>Colour?", load_image(path))) == f" It is {name}."


def test_pieces_joined_are_the_models_greedy_answer(checkpoint: Path, picture: Path) -> None:
    tokenizer, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    messages = messages_of("<image_placeholder>Describe it.", load_image(picture))
    inputs = processor(conversations=messages, images=messages[0]["images"])
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs.input_ids.shape[1] :]
    stream = stream_answer(model, processor, messages, GenerationSettings(max_new_tokens=60))
    assert "".join(stream) == tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.completion_tokens == len(ids)
    assert stream.prompt_tokens == inputs.input_ids.shape[1]


@pytest.mark.parametrize("stop", [["User:"], ["\n\nUser:"], ["zzz", "\n\nU"], ["not there", "User: and"]])
def test_stop_words_are_matched_on_the_text(parrot: Loaded, stop: list[str]) -> None:
    answer = " " + PARROT_ANSWERS["What do you say?"]
    stream = ask(parrot, "What do you say?", stop=tuple(stop))
    pieces = list(stream)
    assert "".join(pieces) == answer[: min(answer.find(word) for word in stop if word in answer)]
    assert stream.finish_reason == "stop"
    wait_until_idle(0.5)


def test_without_its_stop_word_the_answer_goes_on(parrot: Loaded) -> None:
    assert "".join(ask(parrot, "What do you say?", stop=("Nobody:",))) == " " + PARROT_ANSWERS["What do you say?"]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_word_across_pieces_is_never_shown_in_part(cut: int) -> None:
    text, word = "Answer. User: rest", "User:"
    stop = StopWordFilter([word, "Uther"])
    shown, met = "", False
    for start in range(0, len(text), cut):
        piece, met = stop.feed(text[start : start + cut])
        shown += piece
        assert not any(shown.endswith(word[:n]) for n in range(1, len(word)))
        if met:
            break
    assert met
    assert shown == "Answer. "


def test_what_only_looks_like_a_stop_word_is_shown_in_the_end() -> None:
    stop = StopWordFilter(["User:"])
    assert stop.feed("I am a Us") == ("I am a ", False)
    assert stop.feed("e") == ("", False)
    assert stop.feed("ful Use") == ("Useful ", False)
    assert stop.flush() == "Use"


def test_finish_reasons(parrot: Loaded) -> None:
    whole = ask(parrot, "Greet me.")
    assert whole.finish_reason is None
    list(whole)
    cut = ask(parrot, "Sing.", max_new_tokens=7)
    list(cut)
    assert (whole.finish_reason, cut.finish_reason, cut.completion_tokens) == ("stop", "length", 7)


def test_stop_from_another_thread_ends_within_one_token(parrot: Loaded) -> None:
    _, model, processor = parrot
    stream = stream_answer(model, processor, messages_of("Sing."), LONG)
    next(stream)
    threading.Thread(target=stream.stop).start()
    list(stream)
    assert stream.finish_reason == "cancelled"
    tokens_at_stop = stream.completion_tokens
    wait_until_idle()
    assert stream.completion_tokens == tokens_at_stop < 4000


@pytest.mark.parametrize("how", ["with", "close the generator", "drop"])
def test_a_reader_that_leaves_ends_the_generation(parrot: Loaded, how: str) -> None:
    tokenizer, model, processor = parrot
    if how == "with":
        with stream_answer(model, processor, messages_of("Sing."), LONG) as stream:
            next(stream)
    elif how == "close the generator":
        inputs = processor(conversations=messages_of("Sing."), images=None)
        pieces: Iterator[str] = generate(model, tokenizer, inputs, max_gen_len=4000)
        next(pieces)
        pieces.close()
    else:
        stream = stream_answer(model, processor, messages_of("Sing."), LONG)
        next(stream)
        del stream
        gc.collect()
    wait_until_idle()


def test_stopping_before_it_begins_generates_nothing(parrot: Loaded) -> None:
    stream = ask(parrot, "Sing.")
    stream.close()
    assert list(stream) == []
    assert not generating_threads()


def test_an_error_in_the_generation_reaches_the_reader(parrot: Loaded) -> None:
    _, model, processor = parrot
    hook = model.language_model.model.layers[1].register_forward_hook(fail_on_third_call())
    try:
        stream = stream_answer(model, processor, messages_of("Greet me."), LONG)
        with pytest.raises(ArithmeticError, match="a layer failed"):
            list(stream)
    finally:
        hook.remove()
    wait_until_idle()
    assert list(stream) == []


def fail_on_third_call() -> Any:
    """A forward hook that raises when it is called the third time."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("a layer failed")

    return hook


def test_two_streams_at_once_do_not_mix(parrot: Loaded, colours: dict[str, Path]) -> None:
    streams = {
        name: ask(parrot, "<image_placeholder>Colour?", load_image(path)) for name, path in list(colours.items()) * 1
    }
    answers = dict.fromkeys(streams, "")
    for _ in range(20):
        for name, stream in streams.items():
            answers[name] += next(stream, "")
    assert answers == {name: f" It is {name}." for name in colours}


def test_sampling_follows_the_seed(checkpoint: Path) -> None:
    _, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")

    def sample(seed: int, **settings: Any) -> str:
        stream_settings = GenerationSettings(max_new_tokens=30, seed=seed, **settings)
        return "".join(stream_answer(model, processor, messages_of("Hello?"), stream_settings))

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0)
    assert sample(1, temperature=1.0) != sample(2, temperature=1.0)
    # A nucleus of one token is the same as greedy decoding.
    assert sample(1, temperature=1.0, top_p=0.0, repetition_penalty=1.0) == sample(2, temperature=0.0)


def test_greedy_takes_no_notice_of_top_p_and_repetition_penalty(checkpoint: Path) -> None:
    _, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    answers = {
        "".join(
            stream_answer(
                model,
                processor,
                messages_of("Hello?"),
                GenerationSettings(max_new_tokens=40, temperature=0, top_p=top_p, repetition_penalty=penalty),
            )
        )
        for top_p, penalty in ((0.95, 1.1), (0.1, 5.0))
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p must be between 0 and 1, got 1.5"),
        ({"temperature": 1.0, "repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


def test_a_prompt_without_room_for_an_answer(checkpoint: Path) -> None:
    _, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=r"The prompt has \d{4,} tokens and the model 1024 positions"):
        stream_answer(model, processor, messages_of("word " * 1000), LONG)


def test_the_answer_ends_where_the_positions_end(checkpoint: Path) -> None:
    _, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    room = 1024 - len(processor(conversations=messages_of("a" * 900), images=None).input_ids[0])
    stream = stream_answer(model, processor, messages_of("a" * 900), LONG)
    list(stream)
    assert stream.completion_tokens <= room


def test_greedy_decoding_minds_no_sampling_setting(parrot: Loaded) -> None:
    assert "".join(ask(parrot, "Greet me.", top_p=7, repetition_penalty=-1)) == " " + PARROT_ANSWERS["Greet me."]


def test_one_stop_word_need_not_be_in_a_list() -> None:
    """A text is a sequence of texts, too: its letters."""
    assert GenerationSettings(stop="User:").stop == GenerationSettings(stop=["User:"]).stop == ("User:",)


@pytest.mark.parametrize("stop_words", [None, "One", ["One"]])
def test_stop_words_may_be_none_one_or_several(parrot: Loaded, stop_words: Any) -> None:
    tokenizer, model, processor = parrot
    inputs = processor(conversations=messages_of("What do you say?"), images=None)
    answer = "".join(generate(model, tokenizer, inputs, stop_words=stop_words))
    assert answer == (" " + PARROT_ANSWERS["What do you say?"] if stop_words is None else " ")


def test_a_program_may_end_with_an_unfinished_stream(parrot_checkpoint: Path) -> None:
    code = f"""
from deepseek_vl.serve.inference import GenerationSettings, load_model, stream_answer
_, model, processor = load_model({str(parrot_checkpoint)!r}, device="cpu", dtype="float32")
messages = [{{"role": "User", "content": "Sing."}}, {{"role": "Assistant", "content": ""}}]
stream = stream_answer(model, processor, messages, GenerationSettings(max_new_tokens=8000))
print(next(stream))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "l")


def test_a_program_does_not_end_while_the_engine_frees_the_model(parrot_checkpoint: Path) -> None:
    """The engine's thread is the last that refers to the model; freeing it takes as long as it does for large ones."""
    code = f"""
import threading, time
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import AnswerStream
from deepseek_vl.serve.inference import GenerationSettings, load_model

begun = threading.Event()
class Slow:
    def __del__(self):
        begun.set()
        time.sleep(1)
        print("freed", flush=True)

remember = Engine._remember
def remember_slowly(engine, row):
    time.sleep(1)  # meanwhile the other thread forgets the engine
    remember(engine, row)

Engine._remember = remember_slowly
def answer():
    tokenizer, model, processor = load_model({str(parrot_checkpoint)!r}, device="cpu", dtype="float32")
    model.slow = Slow()
    messages = [{{"role": "User", "content": "Greet me."}}, {{"role": "Assistant", "content": ""}}]
    inputs = processor(conversations=messages)
    print("".join(AnswerStream(Engine(model, tokenizer), inputs, GenerationSettings(max_new_tokens=80))), flush=True)

answer()
begun.wait(20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (result.returncode, result.stdout.split("\n")[-2:]) == (0, ["freed", ""])


def test_a_batch_is_refused(parrot: Loaded) -> None:
    tokenizer, model, processor = parrot
    item = processor(conversations=messages_of("Greet me."), images=None, force_batchify=False)
    with pytest.raises(ValueError, match="one conversation, got a batch of 2"):
        AnswerStream(Engine(model, tokenizer), processor.batchify([item, item]), LONG)


def test_generate_and_deepseek_generate_have_the_references_signatures(
    parrot: Loaded, colours: dict[str, Path]
) -> None:
    tokenizer, model, processor = parrot
    prompts = messages_of("<image_placeholder>Colour?", load_image(colours["red"]))
    inputs = processor(conversations=prompts, images=prompts[0]["images"])
    direct = generate(
        vl_gpt=model,
        tokenizer=tokenizer,
        prepare_inputs=inputs,
        max_gen_len=256,
        temperature=0,
        repetition_penalty=1.1,
        top_p=0.95,
        stop_words=["User:"],
    )
    chat = deepseek_generate(
        prompts=prompts,
        vl_gpt=model,
        vl_chat_processor=processor,
        tokenizer=tokenizer,
        stop_words=["red"],
        max_length=256,
        temperature=0,
        top_p=1.0,
        repetition_penalty=1.1,
    )
    assert "".join(direct) == " It is red."
    assert "".join(chat) == " It is "


def test_convert_conversation_to_prompts(colours: dict[str, Path]) -> None:
    image = load_image(colours["red"])
    conversation = get_conv_template("deepseek")
    conversation.append_message("User", ("<image_placeholder>Colour?", image))
    conversation.append_message("Assistant", "It is red.")
    conversation.append_message("User", "Sure?")
    conversation.append_message("Assistant", None)
    assert convert_conversation_to_prompts(conversation) == [
        {"role": "User", "content": "<image_placeholder>Colour?", "images": [image]},
        {"role": "Assistant", "content": "It is red."},
        {"role": "User", "content": "Sure?", "images": []},
        {"role": "Assistant", "content": ""},
    ]


def test_stopping_criteria_sub(parrot: Loaded) -> None:
    tokenizer, model, _ = parrot
    rows = torch.tensor([[1, 5, 6], [5, 6, 7], [5, 6, 6]])
    assert StoppingCriteriaSub([torch.tensor([5, 6])])(rows, None).tolist() == [True, False, False]
    assert StoppingCriteriaSub([torch.tensor([6]), torch.tensor([7])])(rows, None).tolist() == [True, True, True]
    assert StoppingCriteriaSub([torch.tensor(6)], encounters=2)(rows, None).tolist() == [False, False, True]
    assert StoppingCriteriaSub()(rows, None).tolist() == [False, False, False]
    assert StoppingCriteriaSub([torch.arange(9)])(rows, None).tolist() == [False, False, False]

    prompt = torch.tensor([tokenizer.encode("la la")])
    free = model.language_model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0]
    criteria = StoppingCriteriaList([StoppingCriteriaSub([free[-4:-2]])])
    stopped = model.language_model.generate(
        input_ids=prompt, max_new_tokens=8, do_sample=False, stopping_criteria=criteria
    )[0]
    assert stopped[-2:].tolist() == free[-4:-2].tolist()


# --- Markdown of models and strangers ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use List<int> & co.", "Use List&lt;int> &amp; co."),
        ("`List<int>` and ``a ` <b>``", "`List<int>` and ``a ` <b>``"),
        ("```cpp\nvector<int> v;\n```\nx < y", "```cpp\nvector<int> v;\n```\nx &lt; y"),
        ("```\nan answer that is <cut", "```\nan answer that is <cut"),
        ("$$a < b$$ and \\(c & d\\)", "$$a < b$$ and \\(c & d\\)"),
        ("![x](http://example.org/?secret)", "!\\[x](http://example.org/?secret)"),
        ("[a link](http://example.org)", "[a link](http://example.org)"),
        ("", ""),
    ],
)
def test_html_is_shown_and_images_are_not_fetched(text: str, expected: str) -> None:
    assert safe_markdown(text) == expected


# --- ChatSession ---


@pytest.fixture
def session(parrot: Loaded) -> ChatSession:
    """A fresh chat with the parrot."""
    tokenizer, model, processor = parrot
    return ChatSession(Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=200))


def test_a_session_remembers_turns_and_images(session: ChatSession, colours: dict[str, Path]) -> None:
    image = load_image(colours["blue"])
    assert "".join(session.ask("<image_placeholder>Colour?", [image])).strip() == "It is blue."
    list(session.ask("Greet me."))
    assert [(m["role"], m["content"]) for m in session.messages[:3]] == [
        ("User", "<image_placeholder>Colour?"),
        ("Assistant", "It is blue."),
        ("User", "Greet me."),
    ]
    assert session.messages[0]["images"] == [image]
    session.reset()
    assert session.messages == []


def test_a_session_stops_at_the_templates_stop_words(session: ChatSession) -> None:
    list(session.ask("What do you say?"))
    assert session.messages[-1]["content"] == "One thing."


def test_a_stopped_answer_stays_as_far_as_it_got(session: ChatSession) -> None:
    pieces = session.ask("Sing.")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert session.messages[-1]["content"].startswith(shown.strip())
    wait_until_idle()


def test_a_failed_message_leaves_the_session_as_it_was(session: ChatSession, parrot: Loaded) -> None:
    list(session.ask("Greet me."))
    before = list(session.messages)
    with pytest.raises(ValueError, match="2 <image_placeholder> and 0 images"):
        list(session.ask("<image_placeholder><image_placeholder>"))
    hook = parrot[1].language_model.model.layers[0].register_forward_hook(fail_on_third_call())
    with pytest.raises(ArithmeticError):
        list(session.ask("Sing."))
    hook.remove()
    assert session.messages == before


def test_a_message_without_an_answer_leaves_no_trace(session: ChatSession) -> None:
    session.settings = GenerationSettings(stop=(" Gr",))
    assert list(session.ask("Greet me.")) == []
    assert session.messages == []


def test_an_answer_that_spells_the_image_tag_does_not_ask_for_an_image(session: ChatSession) -> None:
    pieces = session.ask("Greet me.")
    next(pieces)
    session.processor.image_tag, tag = "All", session.processor.image_tag  # a word of the answer
    list(pieces)
    session.processor.image_tag = tag
    assert session.messages[-1]["content"] == "Grüße, 世界! 🙂🎉  good."


def test_images_without_a_tag_are_put_in_front() -> None:
    assert with_image_tags("Compare.", 2, "<image>") == "<image>\n<image>\nCompare."
    assert with_image_tags("A <image> here", 1, "<image>") == "A <image> here"
    assert with_image_tags("A <image> here", 2, "<image>") == "<image>\nA <image> here"
    with pytest.raises(ValueError, match="1 <image> and 0 images"):
        with_image_tags("<image>", 0, "<image>")


def test_the_oldest_turns_are_dropped_when_the_context_is_full(siglip_checkpoint: Path, picture: Path) -> None:
    """The context has 1024 positions; each turn takes about 170 and an image."""
    tokenizer, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    session = ChatSession(Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=4))
    answered = 0
    for turn in range(8):
        answer = "".join(session.ask(f"Turn {turn}: <image_placeholder>" + "x" * 150, [load_image(picture)]))
        answered += bool(answer.strip())
        assert session.count_tokens([]) < session.count_tokens(session.messages)
    assert session.dropped_turns >= 2
    assert answered >= 6
    assert len(session.messages) == 2 * answered, "the history itself keeps every turn"
    with pytest.raises(ValueError, match="no room for an answer"):
        list(session.ask("y" * 1500))


@pytest.mark.parametrize("turns", [1, 2, 3, 30, 3000])
def test_as_few_turns_are_dropped_as_must_be(siglip_checkpoint: Path, turns: int) -> None:
    tokenizer, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    session = ChatSession(Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=4), 200)
    question, answer = {"role": "User", "content": "word " * 10, "images": []}, {"role": "Assistant", "content": "So."}
    session.messages = [question, answer] * turns
    list(session.ask("Why?"))
    asked = [{**question, "content": "Why?"}, {**answer, "content": ""}]

    def length(kept: int) -> int:
        return session.count_tokens([*[question, answer] * kept, *asked])

    kept = turns - session.dropped_turns
    assert length(kept) <= 200 and (kept == turns or length(kept + 1) > 200)


def test_a_message_that_is_too_long_opens_no_picture(session: ChatSession) -> None:
    opened = []
    session.open_image = opened.append
    with pytest.raises(ValueError, match="no room for an answer"):
        list(session.ask("y" * 100_000, ["a.png"]))
    assert opened == []


def test_count_tokens_is_the_processors_length(session: ChatSession, colours: dict[str, Path]) -> None:
    messages = messages_of("<image_placeholder>Colour?", load_image(colours["red"]))
    inputs = session.processor(conversations=messages, images=messages[0]["images"])
    assert session.count_tokens(messages) == inputs.input_ids.shape[1]


def test_a_session_says_how_its_answer_ended(session: ChatSession) -> None:
    assert session.answer is None
    list(session.ask("Greet me."))
    assert session.answer.finish_reason == "stop"
    session.reset()
    list(session.ask("Sing."))
    assert (session.answer.finish_reason, session.answer.completion_tokens) == ("length", 200)


def test_retry_takes_the_answers_place(session: ChatSession) -> None:
    with pytest.raises(ValueError, match="no answer yet"):
        list(session.retry())
    list(session.ask("Greet me."))
    before = list(session.messages)
    assert "".join(session.retry()).strip() == PARROT_ANSWERS["Greet me."]
    assert session.messages == before


def test_an_answer_stays_where_there_is_no_other(session: ChatSession) -> None:
    session.messages = [
        {"role": "User", "content": "~" * 20_000, "images": []},
        {"role": "Assistant", "content": "That is long."},
    ]
    before = list(session.messages)
    with pytest.raises(ValueError, match="no room for an answer"):
        list(session.retry())
    assert session.messages == before


def test_special_tokens_that_a_user_types_are_text(session: ChatSession) -> None:
    end = session.processor.tokenizer.eos_token
    list(session.ask(f"A{end}B"))
    assert session.messages[0]["content"] == f"A{end}B"
    plain = session.count_tokens([{"role": "User", "content": "AB"}])
    assert session.count_tokens([{"role": "User", "content": f"A{end}B"}]) > plain + 5  # spelt out


def test_old_turns_are_left_out_beyond_the_history_wanted(session: ChatSession, colours: dict[str, Path]) -> None:
    list(session.ask("<image_placeholder>Colour?", [load_image(colours["red"])]))
    list(session.ask("Greet me."))
    assert session.dropped_turns == 0
    session.max_history_tokens = session.count_tokens([{"role": "User", "content": "Greet me."}])
    assert "".join(session.ask("Greet me.")).strip() == PARROT_ANSWERS["Greet me."]
    assert session.dropped_turns == 2
    assert len(session.messages) == 6  # they are left out of the prompt, but kept


def test_a_saved_session_is_training_data_and_goes_on(
    session: ChatSession, colours: dict[str, Path], tmp_path: Path
) -> None:
    image = load_image(colours["blue"])
    list(session.ask("<image_placeholder>Colour?", [image]))
    list(session.ask("Greet me."))
    for name in ("chat.json", "chat.jsonl"):
        session.save(tmp_path / name)
        row = next(iter(load_data(tmp_path / name, session.processor)[0]))
        assert [message["content"] for message in row.messages] == [m["content"] for m in session.messages]
        other = ChatSession(session.engine, session.processor, session.settings)
        other.load(tmp_path / name)
        assert [(m["role"], m["content"]) for m in other.messages] == [
            (m["role"], m["content"]) for m in session.messages
        ]
        assert other.messages[0]["images"][0].tobytes() == image.tobytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chat.json", "chat.jsonl"]


def test_a_loaded_system_text_is_the_sessions(session: ChatSession, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "row.jsonl").write_text(json.dumps({"system": "Be brief.", "messages": messages}))
    session.load(tmp_path / "row.jsonl")
    assert session.system_prompt == "Be brief."
    session.save(tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text())["system"] == "Be brief."
    session.reset()
    assert session.system_prompt == session.processor.system_prompt


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has 0 conversations"),
        ('{"messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]}\n' * 2,
         "has 2 conversations"),
        ("# Notes\n\nSome text.\n", ":1: not JSON"),
        ("not JSON", "not JSON"),
        ('[{"role": "user", "content": "Hi."}]', "the answer to learn is missing"),
        ('[{"role": "user", "content": "<image_placeholder>", "images": ["none.png"]}, '
         '{"role": "assistant", "content": "Hi."}]', "there is no such file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_loaded_changes_nothing(
    text: str, error: str, session: ChatSession, tmp_path: Path
) -> None:
    list(session.ask("Greet me."))
    before = list(session.messages)
    (tmp_path / "row.jsonl").write_text(text)
    with pytest.raises(ValueError, match=error):
        session.load(tmp_path / "row.jsonl")
    assert session.messages == before


def test_html_like_text_survives_saving_and_loading(session: ChatSession, tmp_path: Path) -> None:
    session.messages = [
        {"role": "User", "content": "What does <image> do?", "images": []},
        {"role": "Assistant", "content": "<image> is no HTML tag."},
    ]
    before = list(session.messages)
    session.save(tmp_path / "chat.jsonl")
    session.load(tmp_path / "chat.jsonl")
    assert [message["content"] for message in session.messages] == [message["content"] for message in before]


def test_other_data_are_not_overwritten(session: ChatSession, tmp_path: Path) -> None:
    list(session.ask("Greet me."))
    for text in ("[]\n[]\n", '{"key": "value"}', "notes"):
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(ValueError, match="is there, and is no saved conversation"):
            session.save(tmp_path / "data.jsonl")
        assert (tmp_path / "data.jsonl").read_text() == text
    session.save(tmp_path / "chat.json")
    session.save(tmp_path / "chat.json")


def test_a_session_can_be_stopped_from_another_thread(session: ChatSession) -> None:
    session.stop()  # does nothing while no answer runs
    pieces = session.ask("Sing.")
    next(pieces)
    threading.Thread(target=session.stop).start()
    assert len(list(pieces)) < 190
    assert session.answer.finish_reason == "cancelled"
    session.reset()
    assert "".join(session.ask("Greet me.")).strip() == PARROT_ANSWERS["Greet me."]
