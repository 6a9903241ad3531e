"""`python -m deepseek_vl.train.evaluate`: the parrot answers questions that it has learnt, and some that it has not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import ROOT, in_terminal, interrupt, make_picture
from PIL import Image

from deepseek_vl.data.rows import TrainingRow, parse_row
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.train.evaluate import EvaluatedAnswer, Evaluation, Score, evaluate, main
from deepseek_vl.utils.io import load_pretrained_model

COMMAND = ["-m", "deepseek_vl.train.evaluate"]
FILES = ["answers.jsonl", "confusion.png", "summary.json", "table.md"]
GREETING = "Grüße, 世界! 🙂🎉 All good."
COLOUR = "<image_placeholder>Colour?"


@pytest.fixture(scope="module")
def parrot(parrot_checkpoint: Path) -> tuple[Any, Any]:
    """The parrot's model and processor."""
    _, processor, model = load_pretrained_model(parrot_checkpoint, device="cpu", dtype="float32")
    return model, processor


def turn(question: str, answer: str, *images: Path) -> list[dict[str, Any]]:
    """A question and its answer, in the reference's form."""
    asked = {"role": "User", "content": question, "images": [str(image) for image in images]}
    return [asked, {"role": "Assistant", "content": answer}]


def write(path: Path, *rows: Any) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model_path: Path | str, data: Path, *more: Any) -> list[str]:
    """The command's arguments, for a CPU."""
    options = ["--model_path", model_path, "--data", data, "--device", "cpu", "--dtype", "float32", *more]
    return [str(option) for option in options]


def records(directory: Path) -> list[dict[str, Any]]:
    """The answers that an evaluation wrote."""
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def answer(expected: str, said: str, type: str | None = "answer") -> EvaluatedAnswer:
    """An `EvaluatedAnswer`, as if a model had said it."""
    return EvaluatedAnswer("file.jsonl:1", "What?", expected, said, type, expected == said)


# --- the command ---


def test_the_command_prints_a_table_and_writes_files(
    parrot_checkpoint: Path, colours: dict[str, Path], tmp_path: Path
) -> None:
    data = write(
        tmp_path / "data.jsonl",
        {"type": "colour", "messages": turn(COLOUR, "It is red.", colours["red"])},
        {"type": "colour", "messages": turn(COLOUR, "It is red.", colours["blue"])},
        {"type": "greeting", "messages": turn("Greet me.", f"\n {GREETING} ")},
    )
    output = tmp_path / "new" / "result"
    command = [sys.executable, *COMMAND, *arguments(parrot_checkpoint, data, "--output", output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)

    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "type      right  asked  percent   95% interval\n"
        "colour        1      2     50.0    9.5 to 90.5\n"
        "greeting      1      1    100.0  20.7 to 100.0\n"
        "total         2      3     66.7   20.8 to 93.9\n"
    )
    assert "%|" not in result.stderr, "a progress bar without a terminal"
    assert sorted(file.name for file in output.iterdir()) == FILES
    assert (output / "table.md").read_text(encoding="utf-8") == (
        "| type | right | asked | percent | 95% interval |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| colour | 1 | 2 | 50.0 | 9.5 to 90.5 |\n"
        "| greeting | 1 | 1 | 100.0 | 20.7 to 100.0 |\n"
        "| total | 2 | 3 | 66.7 | 20.8 to 93.9 |\n"
    )
    assert records(output)[1] == {
        "origin": f"{data}:2",
        "question": COLOUR,
        "expected": "It is red.",
        "answer": "It is blue.",
        "type": "colour",
        "right": False,
        "error": None,
        "dropped_turns": 0,
    }
    assert records(output)[2]["answer"] == records(output)[2]["expected"] == GREETING
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert (summary["model"], summary["data"]) == (str(parrot_checkpoint), [str(data)])
    assert (summary["history"], summary["device"], summary["dtype"]) == ("generated", "cpu", "float32")
    assert summary["types"]["colour"] == Score(1, 2).as_dict()
    assert summary["total"]["right"] == 2
    with Image.open(output / "confusion.png") as image:
        image.load()
        assert (image.format, image.width > image.height) == ("PNG", True)


def test_in_a_terminal_there_is_a_bar_and_ctrl_c_ends(parrot_checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", turn("Sing.", "la"))
    options = arguments(parrot_checkpoint, data, "--max_gen_len", 16000, "--output", tmp_path / "result")
    child = in_terminal([*COMMAND, *map(str, options)], cwd=str(ROOT))
    child.expect("0/1 .*question")
    interrupt(child, "stopped")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in child.before
    assert not list((tmp_path / "result").iterdir())


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", turn("Greet me.", GREETING))
    command = [sys.executable, *COMMAND, *arguments(tmp_path / "nowhere", data)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("python -m deepseek_vl.train.evaluate: error: There is no checkpoint directory")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "missing.jsonl"], "There is no data file 'missing.jsonl'."),
        (["--limit", 0], "limit must be at least 1, got 0."),
        (["--device", "abacus"], "Unknown device 'abacus'"),
        (["--dtype", "float33"], "Unknown dtype 'float33'"),
        (["--output", __file__], "File exists"),
        (["--output", "/proc"], "Nothing can be written into '/proc'"),
    ],
)
def test_wrong_arguments_are_found_before_the_model_is_loaded(
    more: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", turn("Greet me.", GREETING))
    assert main(arguments(tmp_path / "nowhere", data, *more)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_no_answer_at_all_is_an_error(
    parrot_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the processor's file is missing, so that every picture has the wrong number of features."""
    shutil.copytree(parrot_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    make_picture(tmp_path / "a.png")
    data = write(tmp_path / "data.jsonl", turn("<image_placeholder>What?", "Red.", tmp_path / "a.png"))
    assert main(arguments(tmp_path / "model", data)) == 1
    assert "No question got an answer" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--history", "none"], ["--limit", "few"], ["--max_gen_len", 0], ["--nonsense"]])
def test_arguments_of_the_wrong_kind(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments(tmp_path, tmp_path, *more))
    assert caught.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_another_evaluation_and_foreign_files_are_not_replaced(
    parrot_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", turn("Greet me.", GREETING))
    output = tmp_path / "result"
    output.mkdir()
    (output / "answers.jsonl").write_text("mine")
    assert main(arguments(parrot_checkpoint, data, "--output", output)) == 1
    assert "has the answers.jsonl of something else" in capsys.readouterr().err
    assert (output / "answers.jsonl").read_text() == "mine"
    (output / "answers.jsonl").unlink()
    for _ in range(2):
        assert main(arguments(parrot_checkpoint, data, "--output", output)) == 0
    assert main(arguments(parrot_checkpoint, data, "--output", output, "--history", "reference")) == 1
    assert json.loads((output / "summary.json").read_text())["history"] == "generated"


def test_bad_rows_are_listed_or_left_out(
    parrot_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write(
        tmp_path / "data.jsonl",
        turn("Greet me.", GREETING),
        turn("Greet me.", "")[:1],
        turn(COLOUR, "It is red.", tmp_path / "missing.png"),
    )
    assert main(arguments(parrot_checkpoint, data)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{data}:2: the last message is the user's" in captured.err
    assert f"{data}:3: Cannot read image" in captured.err

    assert main(arguments(parrot_checkpoint, data, "--skip-bad")) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["answer", "1", "1"]
    assert "Left out 2 bad rows of 3" in caplog.text


def test_several_files_in_several_forms(
    parrot_checkpoint: Path, colours: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = str(colours["red"])
    first = write(
        tmp_path / "first.jsonl",
        {
            "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "It is red."}],
            "image": red,
        },
    )
    second = tmp_path / "second.json"
    parts = [{"type": "image_url", "image_url": {"url": red}}, {"type": "text", "text": "Colour?"}]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It is red."}]
    second.write_text(json.dumps([{"messages": asked}]))
    output = tmp_path / "result"
    assert main(arguments(parrot_checkpoint, first, "--data", second, "--output", output)) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["total", "2", "2"]
    assert [record["origin"] for record in records(output)] == [f"{first}:1", f"{second}, row 1"]
    assert sorted(file.name for file in output.iterdir()) == FILES


# --- what is asked, and how ---


def test_what_has_no_type_is_asked_for_its_answer_only(parrot: tuple[Any, Any], colours: dict[str, Path]) -> None:
    rows = [
        TrainingRow(turn("Greet me.", "no") + turn("Sing.", "no"), types=(None, "follow-up")),
        TrainingRow(turn("Greet me.", GREETING)),
        TrainingRow(turn(COLOUR, "It is blue.", colours["blue"]) + turn("Sing.", "no"), types=("colour", None)),
    ]
    evaluation = evaluate(*parrot, rows, max_new_tokens=40)
    assert [(a.question, a.type) for a in evaluation.answers] == [
        ("Greet me.", None),
        ("Sing.", "follow-up"),
        (COLOUR, "colour"),
    ]
    assert evaluation.answers[0].answer == GREETING
    assert evaluation.scores == {"follow-up": Score(0, 1), "colour": Score(1, 1)}
    assert evaluation.total == Score(1, 2)

    with_reference = evaluate(*parrot, rows, max_new_tokens=40, history="reference")
    assert [a.question for a in with_reference.answers] == ["Sing.", COLOUR]


def test_without_types_every_answer_counts(parrot: tuple[Any, Any]) -> None:
    rows = [TrainingRow(turn("Greet me.", GREETING) + turn("Greet me.", "no")), TrainingRow(turn("Greet me.", "no"))]
    evaluation = evaluate(*parrot, rows, max_new_tokens=40)
    assert [a.right for a in evaluation.answers] == [True, False, False]
    assert evaluation.scores == {"answer": Score(1, 3)}


def test_history_is_the_models_own_answer_or_the_files(parrot: tuple[Any, Any], colours: dict[str, Path]) -> None:
    model, processor = parrot
    session = ChatSession(Engine(model, processor.tokenizer), processor, GenerationSettings(max_new_tokens=40))
    list(session.ask(COLOUR, [load_image(colours["red"])]))
    assert session.messages[1]["content"] == "It is red."
    after_its_own = "".join(session.ask("Greet me.")).strip()
    session.messages = [session.messages[0], {**session.messages[1], "content": "It is blue."}]
    after_the_files = "".join(session.ask("Greet me.")).strip()
    assert after_its_own != after_the_files, "the parrot takes no notice of what was said before"

    first = turn(COLOUR, "It is blue.", colours["red"])
    rows = [
        TrainingRow(first + turn("Greet me.", after_its_own)),
        TrainingRow(first + turn("Greet me.", after_the_files)),
    ]
    generated = evaluate(*parrot, rows, max_new_tokens=40)
    reference = evaluate(*parrot, rows, max_new_tokens=40, history="reference")
    assert [a.right for a in generated.answers] == [False, True, False, False]
    assert [a.right for a in reference.answers] == [False, False, False, True]


def test_a_rows_system_text_is_used(parrot: tuple[Any, Any]) -> None:
    model, processor = parrot
    usual = processor.system_prompt
    rows = [TrainingRow(turn("Greet me.", GREETING), system=system) for system in (usual, "", "You sing.", None)]
    evaluation = evaluate(model, processor, rows, max_new_tokens=40)
    assert [a.right for a in evaluation.answers] == [True, False, False, True]
    assert processor.system_prompt == usual


def test_limit_counts_conversations_with_something_to_score(parrot: tuple[Any, Any]) -> None:
    untyped = [{"messages": turn("Sing.", "no")}]
    typed = [{"messages": turn("Greet me.", GREETING), "type": name} for name in "abc"]
    rows = [parse_row(row, Path(), "") for row in untyped + typed]
    assert list(evaluate(*parrot, rows, limit=2).scores) == ["a", "b"]
    assert list(evaluate(*parrot, rows, limit=9).scores) == ["a", "b", "c"]


def test_answers_end_at_the_settings_length(parrot: tuple[Any, Any]) -> None:
    (sung,) = evaluate(*parrot, [TrainingRow(turn("Sing.", "la la"))], max_new_tokens=5).answers
    assert len(sung.answer) < 40


def test_a_question_without_room_is_a_wrong_answer(parrot: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    long = TrainingRow(turn("word " * 17000, "What?"), origin="file.jsonl:7")
    evaluation = evaluate(*parrot, [long, TrainingRow(turn("Greet me.", GREETING))])
    assert [(a.right, a.answer) for a in evaluation.answers] == [(False, ""), (True, GREETING)]
    assert "leaves no room for an answer" in evaluation.answers[0].error
    assert "1 questions got no answer, such as file.jsonl:7" in caplog.text


def test_turns_without_room_are_left_out(
    parrot: tuple[Any, Any], colours: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    row = TrainingRow(
        turn("Greet me.", "word " * 17000) + turn(COLOUR, "It is red.", colours["red"]), types=(None, "colour")
    )
    evaluation = evaluate(*parrot, [row], history="reference")
    assert [(a.right, a.dropped_turns) for a in evaluation.answers] == [(True, 1)]
    assert "oldest turns were left out" in caplog.text


def test_what_evaluate_refuses(parrot: tuple[Any, Any]) -> None:
    row = TrainingRow(turn("Greet me.", GREETING))
    with pytest.raises(ValueError, match="no rows"):
        evaluate(*parrot, [])
    with pytest.raises(ValueError, match="history must be one of generated, reference"):
        evaluate(*parrot, [row], history="none")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate(*parrot, [row], limit=0)


# --- what comes of it ---


@pytest.mark.parametrize(
    ("right", "asked", "percent", "low", "high"),
    [(0, 10, 0, 0, 27.75), (8, 10, 80, 49.02, 94.33), (10, 10, 100, 72.25, 100), (500, 1000, 50, 46.91, 53.09)],
)
def test_scores(right: int, asked: int, percent: float, low: float, high: float) -> None:
    score = Score(right, asked)
    assert score.percent == percent
    assert score.interval == pytest.approx((low, high), abs=0.01)
    assert 0 <= score.interval[0] <= percent <= score.interval[1] <= 100


def test_types_keep_their_order_and_the_table_its_shape() -> None:
    evaluation = Evaluation([answer("a", "a", "z"), answer("a", "b", "x|y\n2"), answer("a", "a", "z")])
    assert list(evaluation.scores) == ["z", "x|y\n2"]
    lines = evaluation.table().splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["type", "z", "x|y 2", "total"]
    assert len({len(line) for line in lines}) == 1
    assert evaluation.markdown().splitlines()[3].startswith("| x\\|y 2 | 0 | 1 |")


def test_confused_words_are_counted_place_by_place() -> None:
    evaluation = Evaluation(
        [
            answer("It is red.", "It is red."),
            answer("It is red.", "It is blue."),
            answer("It is red.", "It is blue."),
            answer("It is blue.", "It is green."),
            answer("It is red.", "No."),
            answer("It is red.", "It is grey.", None),  # not scored
        ]
    )
    words, counts = evaluation.confusion()
    assert words == ["blue.", "red.", "green."]
    assert counts == [[0, 0, 1, 0], [2, 1, 0, 1], [0, 0, 0, 0]]
    assert evaluation.confusion(most=2) == (["blue.", "red."], [[0, 0, 0], [2, 1, 1]])


def test_confusion_without_words_taken_for_others() -> None:
    assert Evaluation([answer("a b", "a b")]).confusion() == ([], [])
    assert Evaluation([answer("a b", "a  b")]).confusion() == ([], [])
    assert Evaluation([answer("a b", "")]).confusion() == (["a", "b"], [[0, 0, 1], [0, 0, 1]])


def test_plots(tmp_path: Path) -> None:
    """Answers with any characters can be drawn; without wrong answers there is only the bar chart."""
    odd = ["$x^$", "\\frac", "世界", "🙂", "w" * 300, "\x07", "100%", "{}"]
    cases = {
        "right": [answer("a", "a", name) for name in ("x", "$\\odd$ " * 9)],
        "wrong": [answer(word, "a") for word in odd],
        "many": [answer(f"w{i}", f"w{i + 1}") for i in range(100)],
        "lengths": [answer("a b", "")],
        "spaces": [answer("a b", "a  b")],
    }
    sizes = {}
    for name, answers in cases.items():
        Evaluation(answers).plot(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.format == "PNG"
            sizes[name] = image.size
    assert sizes["right"][0] == sizes["spaces"][0] < sizes["lengths"][0] < sizes["many"][0] < 3000
