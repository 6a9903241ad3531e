"""The terminal chat in terminals of several widths, with pasted text and control sequences, and under a shell."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from conftest import ROOT
from terminal_chat import Chat

from deepseek_vl.serve.terminal.chat import help_text

GREETING = "Grüße, 世界! 🙂🎉 All good."


@pytest.fixture(scope="module", params=[40, 80, 120])
def chat(request: pytest.FixtureRequest, parrot_checkpoint: Path) -> Iterator[Chat]:
    """A chat with the parrot in terminals of 40, 80 and 120 columns."""
    chat = Chat(parrot_checkpoint, "--max_gen_len", "60", size=(50, request.param))
    yield chat
    chat.close()


def unbroken(text: str) -> str:
    """A text without spaces and line breaks, to compare it wherever a narrow terminal breaks lines."""
    return "".join(text.split())


def test_help_is_wrapped_between_words(chat: Chat) -> None:
    columns = chat.columns
    shown = chat.enter("help").split("\n")
    assert shown == help_text(columns).split("\n")
    assert max(map(len, shown)) <= columns
    assert " ".join(shown).split() == help_text(1000).split()


def test_retry_of_nothing_says_so_and_no_more(chat: Chat) -> None:
    chat.enter("new")
    assert unbroken(chat.enter("retry")) == unbroken("Error: There is no answer yet to try again.")


def test_a_command_that_fails_does_not_come_back(chat: Chat) -> None:
    chat.enter("new")
    assert unbroken(chat.enter("save a.png")) == unbroken(
        "Error: Conversations are saved as .json or .jsonl files, not as 'a.png'."
    )
    assert unbroken("There is no data file") in unbroken(chat.enter("load none.json"))


SEQUENCES = {
    "a colour": "\x1b[31m",
    "colours": "\x1b[1;38;5;208m",
    "a mouse": "\x1b[<35;10;5M",
    "half a mouse": "\x1b[<;;M",
    "where the cursor is": "\x1b[12;40R",
    "far away": "\x1b[99999;99999R",
    "a title": "\x1b]0;a title\x07",
    "another end": "\x1b]8;;http://example.org\x1b\\",
    "a move": "\x1b[2J\x1b[H",
    "a reset": "\x1bc",
    "a device string": "\x1bP1$r0m\x1b\\",
    "a bell and nothing": "\x07\x00\x08",
    "eight bits": "\x9b31m\x85",
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_pasted_control_sequence_is_no_part_of_the_message(kind: str, chat: Chat) -> None:
    chat.enter("new")
    chat.press(f"\x1b[200~{SEQUENCES[kind]}Greet me.\x1b[201~")
    chat.wait("the paste", lambda lines: "Greetme." in unbroken("".join(lines)))
    chat.press("\r")
    chat.wait("the answer", lambda lines: unbroken(GREETING) in unbroken("".join(lines)))
    assert "Traceback" not in "\n".join(chat.wait_for_prompt())


KEYS = {**SEQUENCES, "an old mouse": "\x1b[M !!"}


@pytest.mark.parametrize("kind", KEYS)
def test_a_control_sequence_as_keys_does_no_harm(kind: str, chat: Chat) -> None:
    """Control sequences do no harm from a terminal without bracketed paste."""
    chat.enter("new")
    chat.press(KEYS[kind])
    chat.press("\x03")
    chat.wait_for_prompt()
    assert unbroken(chat.ask("Greet me.")) == unbroken(GREETING)
    assert "Unhandled" not in "\n".join([*chat.scrolled_away(), *chat.read()])


def test_that_old_turns_are_left_out_is_said_once(siglip_checkpoint: Path) -> None:
    """This model has 1024 positions."""
    chat = Chat(siglip_checkpoint, "--max_gen_len", "4")
    for number in range(5):
        chat.press(f"{number} " + "~" * 400 + "\r")
        chat.wait(f"answer {number}", lambda lines, number=number: any(f"{number} ~" in line for line in lines))
        chat.wait_for_prompt()
    everything = "\n".join([*chat.scrolled_away(), *chat.read()])
    assert everything.count("no longer fit the model's context") == 1
    chat.close()


# --- bytes that are not text ---


def run(*arguments: str | bytes, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / "cli_chat.py"), "--model_path", "tiny", "--device", "cpu", *arguments]
    return subprocess.run(command, input=input, capture_output=True, timeout=180, check=False)


def test_a_prompt_that_is_not_text_is_one_line() -> None:
    result = run("--prompt", b"Gr\xfc\xdfe")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode() == (
        "cli_chat.py: error: --prompt is not text in utf-8, the encoding of this terminal.\n"
    )


def test_a_line_that_is_not_text_is_said_and_the_chat_goes_on() -> None:
    result = run(input=b"Gr\xfc\xdfe\nHello!\n")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Error: What you have typed is not text in utf-8, the encoding of this terminal.\n" in result.stdout
    assert b"Assistant: Hello! Show me a picture and ask me about it.\n" in result.stdout


def test_keys_that_are_not_text_are_said_and_the_chat_goes_on(parrot_checkpoint: Path) -> None:
    chat = Chat(parrot_checkpoint)
    chat.process.delaybeforesend = None
    os.write(chat.process.child_fd, b"Gr\xfc\xdfe\r")
    chat.wait_for("is not text in utf-8")
    chat.wait_for_prompt()
    assert chat.ask("Greet me.") == GREETING
    chat.close()


# --- the shell ---


@pytest.mark.parametrize("when", ["at the prompt", "during an answer"])
def test_ctrl_z_suspends(when: str, parrot_checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    environment |= {"PS1": "shell> ", "PYTHONUNBUFFERED": "1"}
    shell = pexpect.spawn("bash", ["--norc", "-i"], env=environment, encoding="utf-8", timeout=60)
    shell.expect("shell> ")
    shell.sendline(
        f"{sys.executable} {ROOT / 'cli_chat.py'} --model_path {parrot_checkpoint} --temperature 0 --dtype float32"
    )
    shell.expect("User:")
    if when == "during an answer":
        shell.send("Sing.\r")
        shell.expect("la la la")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.sendline("stty -a; echo still here")
    shell.expect(r"[ ;](-?echo)[ ;]")
    assert shell.match[1] == "echo", "the shell shows what is typed"
    shell.expect("still here\r\n")
    shell.sendline("fg")
    if when == "during an answer":
        shell.expect("la la la")
        shell.send("\x03")
        shell.expect("stopped")
    shell.expect("User:")
    shell.send("new\r")
    shell.expect("New conversation.")
    shell.send("Greet me.\r")
    shell.expect("All good.")
    shell.send("exit\r")
    shell.expect("shell> ")
    shell.close(force=True)


# --- names ---


def test_the_installed_command_shows_its_own_name() -> None:
    command = Path(sys.executable).parent / "deepseek-vl-chat"
    if not command.is_file():
        pytest.skip("the package is not installed")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert shown.startswith("usage: deepseek-vl-chat ")
    wrong = subprocess.run([command, "--prompt", ""], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.stderr == "deepseek-vl-chat: error: --prompt is empty.\n"


def test_an_adapter_is_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run("--model_path", str(tmp_path), "--prompt", "Hi")
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
    assert f"python -m deepseek_vl.train.lora --adapter {tmp_path} --output MERGED" in result.stderr.decode()
