"""Attribution: which regions of the pictures each token of an answer attends to."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import messages_of
from PIL import Image

from deepseek_vl.engine import attribution
from deepseek_vl.engine.attribution import TokenAttribution, attribute_answer
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.inference import load_model

SHAPES = Path(__file__).resolve().parents[1] / "images" / "shapes.png"


def answered(question: str, answer: str, *images: Image.Image) -> list[dict]:
    asked, last = messages_of(question, *images)
    return [asked, {**last, "content": answer}]


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (count, 40, 30, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.mark.parametrize(("count", "at_a_time"), [(1, attribution.SCORES), (2, attribution.SCORES), (2, 1)])
def test_it_is_the_attention_of_the_model(
    own_model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    count: int,
    at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Maps equal the attention that transformers' eager implementation returns, averaged over layers and heads."""
    monkeypatch.setattr(attribution, "SCORES", at_a_time)
    messages = answered("<image_placeholder>" * count + "What is this?", "A boat, and two more.", *pictures(count))
    tokens = attribute_answer(own_model, processor, messages)
    assert "".join(token.text for token in tokens) == "A boat, and two more."
    assert all(len(token.maps) == count for token in tokens)
    assert all(map_.shape == (4, 4) and map_.dtype == np.float32 for token in tokens for map_ in token.maps)

    inputs = processor(prompt=processor.render(messages), images=messages[0]["images"])
    own_model.set_attn_implementation("eager")
    with torch.no_grad():
        embeds = own_model.prepare_inputs_embeds(**inputs)
        attentions = own_model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    mean = torch.stack(attentions)[:, 0].mean((0, 1))[:, inputs.images_seq_mask[0]]  # [T, count * 16]
    ids = inputs.input_ids[0].tolist()
    first = len(ids) - 1 - ids[::-1].index(tokens[-1].token_id) - len(tokens) + 1
    assert ids[first : first + len(tokens)] == [token.token_id for token in tokens]
    for i, token in enumerate(tokens):
        expected = mean[first + i - 1].view(count, 4, 4).numpy()
        np.testing.assert_allclose(np.stack(token.maps), expected / expected.max(), rtol=1e-3, atol=1e-4)


def test_characters_of_several_tokens(model: MultiModalityCausalLM, processor: VLChatProcessor) -> None:
    said = "Grüße, 世界! 🙂🎉 All good."
    tokens = attribute_answer(model, processor, answered("<image_placeholder>Greet me.", said, *pictures(1)))
    assert "".join(token.text for token in tokens) == said
    assert any(token.text == "" for token in tokens), "the first bytes of a character"


def test_an_answer_can_have_looked_at_an_earlier_turns_picture() -> None:
    tokenizer, model, processor = load_model("tiny", device="cpu", dtype="float32")
    session = ChatSession(Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=64))
    "".join(session.ask("What colour is the star?", [SHAPES]))
    said = "".join(session.ask("Where is it?")).strip()
    tokens = session.attribution()
    assert "".join(token.text for token in tokens) == said
    assert {len(token.maps) for token in tokens} == {1}
    assert len(session.messages) == 4


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be the assistant's"),
        (answered("<image_placeholder>What?", "", *pictures(1)), "must be the assistant's"),
        (answered("What?", "Nothing."), "no picture"),
        (answered("<image_placeholder>What?", "word " * 2000, *pictures(1)), "more than the 1024 positions"),
    ],
)
def test_what_cannot_be_is_said(
    model: MultiModalityCausalLM, processor: VLChatProcessor, messages: list[dict], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_answer(model, processor, messages)


def test_an_int8_model_has_it_too() -> None:
    messages = answered("<image_placeholder>What colour is the star?", "The star is blue.", load_image(SHAPES))
    maps = []
    for options in ({}, {"quantize": "int8"}):
        _, model, processor = load_model("tiny", device="cpu", dtype="float32", **options)
        maps.append([token.maps[0] for token in attribute_answer(model, processor, messages)])
    np.testing.assert_allclose(maps[1], maps[0], atol=0.3)


def test_a_session_without_an_answer_says_so() -> None:
    tokenizer, model, processor = load_model("tiny", device="cpu", dtype="float32")
    session = ChatSession(Engine(model, tokenizer), processor, GenerationSettings())
    with pytest.raises(ValueError, match="no answer yet"):
        session.attribution()


def test_in_the_toy_world_it_looks_at_the_right_thing(one_thread: None) -> None:
    """The maps of the whole answer and of the word that answers peak in the box of the shape that was asked about."""
    pytest.importorskip("matplotlib")  # the recipe needs it
    from recipes.tiny.world import draw, sample_picture
    from recipes.tiny.world.questions import ask_colour, ask_shape

    tokenizer, model, processor = load_model("tiny", device="cpu", dtype="float32")
    engine, rng = Engine(model, tokenizer), random.Random("where it looked")
    asked = whole = word = 0
    while asked < 100:
        picture = sample_picture(rng, "shapes")
        turn = rng.choice((ask_colour, ask_shape))(picture, rng)
        if turn is None or len(picture.shapes) < 2:
            continue
        session = ChatSession(engine, processor, GenerationSettings(max_new_tokens=40))
        "".join(session.ask(turn.question, [draw(picture)]))
        tokens = session.attribution()
        asked += 1
        whole += is_inside(np.mean([token.maps[0] for token in tokens], axis=0), picture, turn.topic)
        answer = turn.topic.colour if turn.type == "colour" else turn.topic.kind
        word += is_inside(np.mean([token.maps[0] for token in spelling(tokens, answer)], axis=0), picture, turn.topic)
    print(f"the peak is in the right object: {whole / asked:.1%} of answers, {word / asked:.1%} of words")
    assert whole >= 0.8 * asked
    assert word >= 0.8 * asked


def spelling(tokens: list[TokenAttribution], word: str) -> list[TokenAttribution]:
    """The tokens that spell the last occurrence of a word; all tokens if it does not occur."""
    text = "".join(token.text for token in tokens)
    start = text.rfind(word)
    if start < 0:
        return tokens
    ends = np.cumsum([len(token.text) for token in tokens])
    return [
        token
        for token, end in zip(tokens, ends, strict=True)
        if end > start and end - len(token.text) < start + len(word)
    ]


def is_inside(map_: np.ndarray, picture: object, shape: object) -> bool:
    """Whether the centre of the region with the largest weight is in a shape's box."""
    side = len(map_)
    row, column = np.unravel_index(map_.argmax(), map_.shape)
    square = max(picture.width, picture.height)
    x = (column + 0.5) * square / side - (square - picture.width) / 2
    y = (row + 0.5) * square / side - (square - picture.height) / 2
    reach = max(shape.radius, 0.5 * square / side)  # a shape may be smaller than a region
    return abs(x - shape.x) <= reach and abs(y - shape.y) <= reach
