"""`cli_chat.py` and `inference.py` as a user runs them: processes, a real terminal, exit codes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import ROOT, in_terminal, interrupt

USER = re.escape("User [<image_placeholder> indicates an image]: ")


def run_cli(*arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    """Run `cli_chat.py` without a terminal."""
    command = [sys.executable, str(ROOT / "cli_chat.py"), *map(str, arguments)]
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=180, check=False)


def spawn(model_path: Path, **options: Any) -> pexpect.spawn:
    """Start an interactive chat in a terminal; returns it at its first prompt."""
    arguments = [str(ROOT / "cli_chat.py"), "--model_path", str(model_path)]
    arguments += ["--temperature", "0", "--max_gen_len", "8000", "--dtype", "float32", "--device", "cpu"]
    child = in_terminal(arguments, **options)
    child.expect(USER)
    return child


@pytest.fixture(scope="module")
def running_chat(parrot_checkpoint: Path) -> Iterator[pexpect.spawn]:
    """One chat with the parrot for all tests that do not end it."""
    child = spawn(parrot_checkpoint)
    yield child
    child.close(force=True)


@pytest.fixture
def chat(running_chat: pexpect.spawn) -> pexpect.spawn:
    """A chat with the parrot in which nothing was said yet."""
    running_chat.sendline("new")
    running_chat.expect("New conversation.")
    running_chat.expect(USER)
    return running_chat


def ask(chat: pexpect.spawn, text: str) -> str:
    """Send a message; returns the answer."""
    chat.sendline(text)
    chat.expect("Assistant: ")
    chat.expect(USER)
    return chat.before.replace("\r\n", "\n").strip()


# --- one-shot ---


def test_one_shot_prints_the_answer_and_nothing_else(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    for name, path in colours.items():
        result = run_cli(
            "--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32",
            "--image", path, "--prompt", "<image_placeholder>Colour?",
        )  # fmt: skip
        assert (result.returncode, result.stdout, result.stderr) == (0, f"It is {name}.\n", "")


def test_one_shot_prints_multi_byte_characters(parrot_checkpoint: Path) -> None:
    result = run_cli(
        "--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32", "--prompt", "Greet me."
    )
    assert (result.returncode, result.stdout) == (0, "Grüße, 世界! 🙂🎉 All good.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "no/such/dir/", "--prompt", "Hi"], "There is no checkpoint directory 'no/such/dir/'"),
        (["--model_path", "{empty}", "--prompt", "Hi"], "has no config.json"),
        (["--prompt", "Hi", "--image", "no such picture.png"], "'no such picture.png': there is no such file"),
        (["--prompt", "Hi", "--image", "{text}"], "not an image file"),
        (["--prompt", "<image_placeholder>Hi"], "1 <image_placeholder> and 0 images."),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "Hi", "--max_gen_len", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "Hi", "--top_p", "seven"], "argument --top_p"),
        (["--prompt", "Hi", "--device", "toaster"], "Unknown device 'toaster'"),
        (["--prompt", "Hi", "--dtype", "int7"], "Unknown dtype 'int7'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, parrot_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    filled = [argument.format(empty=tmp_path / "empty", text=tmp_path / "text.png") for argument in arguments]
    if "--model_path" not in filled:
        filled += ["--model_path", str(parrot_checkpoint)]
    result = run_cli(*filled)
    assert result.returncode == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("cli_chat.py: error: ")
    assert result.stderr.count("\n") == 1, result.stderr


def test_a_reader_that_goes_away_is_no_traceback(parrot_checkpoint: Path) -> None:
    command = f"{sys.executable} {ROOT / 'cli_chat.py'} --model_path {parrot_checkpoint} --temperature 0 "
    command += "--dtype float32 --max_gen_len 600 --prompt Sing. | head -c 5"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=180, check=False)
    assert (result.stdout, result.stderr) == ("la la", "")


def test_an_encoding_without_these_characters_is_no_error(parrot_checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "cli_chat.py"), "--model_path", str(parrot_checkpoint)]
    command += ["--temperature", "0", "--dtype", "float32", "--prompt", "Greet me."]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert (result.returncode, result.stdout) == (0, "Gr??e, ??! ?? All good.\n")


def test_help_is_quick_and_names_every_flag() -> None:
    result = run_cli("--help")
    flags = [
        "model_path",
        "temperature",
        "top_p",
        "repetition_penalty",
        "max_gen_len",
        "device",
        "dtype",
        "image",
        "prompt",
    ]
    assert result.returncode == 0
    assert all(f"--{flag}" in result.stdout for flag in flags)


# --- interactive ---


def test_two_turns_with_a_picture_each(chat: pexpect.spawn, colours: dict[str, Path]) -> None:
    for name in ("red", "blue"):
        chat.sendline("new")  # the parrot has learnt first turns only
        chat.expect(USER)
        chat.sendline("<image_placeholder>Colour?")
        chat.expect(re.escape("(1/1) Input the image file path: "))
        assert ask(chat, str(colours[name])) == f"It is {name}."


def test_images_stay_in_the_conversation_until_new(chat: pexpect.spawn, colours: dict[str, Path]) -> None:
    chat.sendline("<image_placeholder>Colour?")
    chat.expect("file path: ")
    assert ask(chat, str(colours["red"])) == "It is red."
    ask(chat, "And now?")  # a second turn over the first one's image
    chat.sendline("new")
    chat.expect("New conversation.")
    chat.expect(USER)
    assert ask(chat, "Greet me.") == "Grüße, 世界! 🙂🎉 All good."


def test_paths_with_quotes_spaces_and_mistakes(chat: pexpect.spawn, colours: dict[str, Path]) -> None:
    chat.sendline("<image_placeholder>Colour?")
    chat.expect("file path: ")
    chat.sendline("/no/such/picture.png")
    chat.expect("'/no/such/picture.png': there is no such file")
    chat.expect(re.escape("(1/1) Input the image file path: "))
    chat.sendline(str(ROOT / "setup.py"))
    chat.expect("not an image file")
    chat.expect("file path: ")
    chat.sendline("")
    chat.expect("file path: ")
    assert ask(chat, f"  '{colours['blue']}'   ") == "It is blue."


def test_the_home_directory_is_expanded(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    home = {"HOME": str(colours["red"].parent), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    child = spawn(parrot_checkpoint, env=home)
    child.sendline("<image_placeholder>Colour?")
    child.expect("file path: ")
    assert ask(child, '"~/red square.png"') == "It is red."
    child.close(force=True)


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: pexpect.spawn) -> None:
    chat.sendline("Sing.")
    chat.expect("la la la la")
    interrupt(chat, r"\[stopped\]")
    chat.expect(USER)
    chat.sendline("new")
    chat.expect(USER)
    assert ask(chat, "Greet me.") == "Grüße, 世界! 🙂🎉 All good."


def test_ctrl_c_at_a_prompt_forgets_the_line(chat: pexpect.spawn) -> None:
    chat.send("Half a mess")
    chat.expect("Half a mess")
    interrupt(chat, USER)
    chat.sendline("<image_placeholder>Colour?")
    chat.expect("file path: ")
    interrupt(chat, USER)
    assert ask(chat, "Greet me.") == "Grüße, 世界! 🙂🎉 All good."


def test_stop_words_of_the_template_are_not_shown(chat: pexpect.spawn) -> None:
    assert ask(chat, "What do you say?") == "One thing."


def test_line_editing_and_history(chat: pexpect.spawn) -> None:
    assert ask(chat, "Greet me.X\x7f") == "Grüße, 世界! 🙂🎉 All good."  # backspace
    chat.sendline("new")
    chat.expect(USER)
    assert ask(chat, "\x1b[A\x1b[A") == "Grüße, 世界! 🙂🎉 All good."  # two lines up: the question again


def test_help_and_empty_lines(chat: pexpect.spawn) -> None:
    chat.sendline("help")
    chat.expect("forget the conversation")
    chat.expect(USER)
    chat.sendline("   ")
    chat.expect(USER)


@pytest.mark.parametrize(
    ("at", "how"),
    [("message", "exit"), ("message", "end of input"), ("image path", "exit"), ("image path", "end of input")],
)
def test_leaving(at: str, how: str, parrot_checkpoint: Path) -> None:
    child = spawn(parrot_checkpoint)
    if at == "image path":
        child.sendline("<image_placeholder>Colour?")
        child.expect("file path: ")
    if how == "exit":
        child.sendline("exit")
    else:
        child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_an_error_while_answering_keeps_the_chat(siglip_checkpoint: Path) -> None:
    """This model has 1024 positions."""
    child = spawn(siglip_checkpoint)
    assert "no room for an answer" in ask(child, "~" * 3000)
    assert "Error" not in ask(child, "Hi.")
    child.close(force=True)


def test_images_on_the_command_line_go_with_the_first_message(
    parrot_checkpoint: Path, colours: dict[str, Path]
) -> None:
    result = run_cli(
        "--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32", "--image", colours["blue"],
        input="<image_placeholder>Colour?\nexit\n",
    )  # fmt: skip
    assert result.returncode == 0
    assert "Assistant: It is blue.\n" in result.stdout


def test_messages_from_a_pipe(parrot_checkpoint: Path) -> None:
    result = run_cli("--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32", input="Greet me.\n")
    assert result.returncode == 0
    assert "Assistant: Grüße, 世界! 🙂🎉 All good.\n" in result.stdout


# --- inference.py ---


def test_inference_example(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    command = [sys.executable, str(ROOT / "inference.py"), "--model_path", str(parrot_checkpoint)]
    command += ["--image", str(colours["red"]), "--question", "<image_placeholder>Colour?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, cwd=ROOT)
    assert result.stdout.endswith("User: <image_placeholder>Colour?\n\nAssistant:  It is red.\n")
