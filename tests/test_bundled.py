"""The bundled model: it is found by its name, it is small, and its answers are right."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, Loaded, messages_of

from deepseek_vl import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.data.checks import load_data
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.serve.inference import load_model
from deepseek_vl.train.evaluate import Evaluation, evaluate
from recipes.tiny.evaluation import data_sets
from recipes.tiny.world import SOMETHING_ELSE, SyntheticWorld, write_conversations

IMAGES = ROOT / "images"


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", device="cpu")


@pytest.fixture
def session(tiny: Loaded) -> ChatSession:
    tokenizer, model, processor = tiny
    return ChatSession(Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=64))


def ask(session: ChatSession, question: str, *names: str) -> str:
    return "".join(session.ask(question, [load_image(IMAGES / f"{name}.png") for name in names])).strip()


def test_it_is_small() -> None:
    files = [file for file in (ROOT / "deepseek_vl" / "bundled" / "tiny").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * 10**6
    assert "model.safetensors" in {file.name for file in files}


def test_its_name_is_a_path_everywhere(tiny: Loaded) -> None:
    processor = VLChatProcessor.from_pretrained("tiny")
    model = MultiModalityCausalLM.from_pretrained("tiny", dtype=tiny[1].dtype).eval()
    inputs = processor(conversations=messages_of("What can you do?"), images=None)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert ids.tolist() == tiny[1].generate(**inputs, max_new_tokens=20, do_sample=False).tolist()


def test_a_directory_of_that_name_is_meant_if_there_is_one(
    siglip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(siglip_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny", device="cpu")[1].config.language_config.hidden_size == 64


@pytest.mark.parametrize(
    ("question", "pictures", "answer"),
    [
        ("What colour is the star?", ["shapes"], "The star is blue."),
        ("What shape is green?", ["shapes"], "square"),
        ("How many red circles are there?", ["shapes"], "two"),
        ("How many circles are there?", ["shapes"], "two circles"),
        ("count the circles", ["shapes"], "two circles"),
        ("number of circles?", ["shapes"], "two circles"),
        ("How many squares are there?", ["shapes"], "one square"),
        ("HOW MANY SQUARES ARE THERE?", ["shapes"], "one square"),
        ("how many objects are there in total?", ["shapes"], "four"),
        ("star color?", ["shapes"], "blue"),
        ("list all shapes", ["shapes"], "a red circle, a green square, a red circle and a blue star"),
        (
            "what is left of the star?",
            ["shapes"],
            "A red circle, a green square and a red circle are left of the star.",
        ),
        ("is there a dog?", ["shapes"], "No, that is not in the picture."),
        ("what is the background colour?", ["word"], "white"),
        ("order the bars by height", ["chart"], "blue, green, red and orange"),
        ("What colour is the word?", ["word"], "blue"),
        ("Where is the square?", ["shapes"], "bottom left"),
        ("Is there a yellow triangle?", ["shapes"], "No, there is no yellow triangle in the picture."),
        ("Which bar is tallest?", ["chart"], "The blue bar is the tallest."),
        ("What does it say?", ["word"], '"HELLO"'),
        ("Which image has the blue star?", ["more_shapes", "shapes"], "second"),
        ("Describe the image.", ["more_shapes"], "purple diamond"),
        ("What can you do?", [], "shapes"),
    ],
)
def test_it_is_right_about_the_sample_pictures(
    session: ChatSession, question: str, pictures: list[str], answer: str
) -> None:
    assert answer in ask(session, question, *pictures)


def test_hardly_a_question_about_the_sample_pictures_is_answered_wrongly(tiny: Loaded) -> None:
    """However it is put, with the pictures before and behind the question."""
    tokenizer, model, processor = tiny
    engine, asked, wrong = Engine(model, tokenizer), 0, []
    for line in (ROOT / "tests" / "pictures" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pictures = [load_image(IMAGES / f"{name}.png") for name in row["images"]]
        for question in row["questions"]:
            for text in (question, question + processor.image_tag * len(pictures)):
                session = ChatSession(engine, processor, GenerationSettings(max_new_tokens=80))
                answer = "".join(session.ask(text, pictures)).strip()
                asked += 1
                if not all(words in answer for words in row["says"]):
                    wrong.append((row["images"], text, answer))
    assert len(wrong) <= 0.03 * asked, wrong


def test_a_second_turn_depends_on_the_first(session: ChatSession) -> None:
    ask(session, "What shape is green?", "shapes")
    assert "bottom left" in ask(session, "Where is it?")


@pytest.fixture(scope="module")
def fresh(tiny: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The bundled model's answers about 250 pictures of a seed that it was not trained on."""
    directory = tmp_path_factory.mktemp("world")
    write_conversations(SyntheticWorld(250, seed=20_241, turns=1), directory)
    _, model, processor = tiny
    rows, _ = load_data(directory / "data.jsonl", processor)
    return evaluate(model, processor, rows, max_new_tokens=64)


def test_it_is_right_about_fresh_pictures(fresh: Evaluation) -> None:
    """A sample of 250 pictures; the README's table has 2,000."""
    assert fresh.total.percent >= 90, fresh.table()


def test_it_is_right_about_pictures_by_another_hand(tiny: Loaded) -> None:
    _, model, processor = tiny
    rows, _ = load_data(ROOT / "tests" / "pictures" / "questions.jsonl", processor)
    evaluation = evaluate(model, processor, rows, max_new_tokens=64)
    assert evaluation.total.percent >= 88, evaluation.table()


@pytest.mark.parametrize(("name", "least"), [("paraphrases", 82), ("paraphrases_unseen", 77)])
def test_it_is_right_about_questions_put_otherwise(tiny: Loaded, name: str, least: int) -> None:
    _, model, processor = tiny
    rows, _ = load_data(ROOT / "tests" / "pictures" / f"{name}.jsonl", processor)
    evaluation = evaluate(model, processor, rows, max_new_tokens=64)
    assert evaluation.total.percent >= least, evaluation.table()


@pytest.mark.parametrize(("name", "least"), [("samples", 94), ("elsewhere", 92), ("drawings", 85), ("things", 86)])
def test_it_knows_its_samples_and_what_it_does_not_know(tiny: Loaded, tmp_path: Path, name: str, least: int) -> None:
    """The sample pictures in all orders, pictures of other things, and things that no training conversation names."""
    _, model, processor = tiny
    write_conversations(data_sets(320, ())[name], tmp_path)
    rows, _ = load_data(tmp_path / "data.jsonl", processor)
    evaluation = evaluate(model, processor, rows, max_new_tokens=80)
    assert evaluation.total.percent >= least, evaluation.table()


def test_it_does_not_deny_pictures_of_its_own_world(fresh: Evaluation) -> None:
    assert not any(answer.answer == SOMETHING_ELSE for answer in fresh.answers)
