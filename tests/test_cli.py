"""`cli_chat.py` and `inference.py` as a user runs them: processes, a real terminal, exit codes."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pexpect
import pytest
from conftest import ROOT, in_terminal
from terminal_chat import PATH, USER, Chat

from deepseek_vl.data.rows import read_rows
from deepseek_vl.imaging.open import load_image


def run_cli(*arguments: str | Path, input: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run `cli_chat.py` without a terminal."""
    command = [sys.executable, str(ROOT / "cli_chat.py"), *map(str, arguments)]
    data = input.encode() if isinstance(input, str) else input
    result = subprocess.run(command, input=data, capture_output=True, timeout=180, check=False)
    return subprocess.CompletedProcess(command, result.returncode, result.stdout.decode(), result.stderr.decode())


@pytest.fixture(scope="module")
def running_chat(parrot_checkpoint: Path) -> Iterator[Chat]:
    """A chat with the parrot, shared by the tests that do not end it."""
    chat = Chat(parrot_checkpoint)
    yield chat
    chat.close()


@pytest.fixture
def chat(running_chat: Chat) -> Chat:
    """A new conversation in the shared chat with the parrot."""
    assert running_chat.enter("new") == "New conversation."
    return running_chat


# --- one-shot ---


def test_one_shot_prints_the_answer_and_nothing_else(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    for name, path in colours.items():
        result = run_cli(
            "--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32",
            "--image", path, "--prompt", "<image_placeholder>Colour?",
        )  # fmt: skip
        assert (result.returncode, result.stdout, result.stderr) == (0, f"It is {name}.\n", "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(parrot_checkpoint: Path, closed: str) -> None:
    command = f"{sys.executable} cli_chat.py --model_path {parrot_checkpoint} --temperature 0 --dtype float32 "
    command += f"--prompt 'Greet me.' {closed}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("Gr" in result.stdout) == (closed in ("<&-", "2>&-"))


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
        (["--json"], "--json is for --prompt"),
        (["--image", "-"], "needs --prompt"),
        (["--prompt", "Hi", "--repetition_penalty", "1e-38"], "repetition_penalty must be from 0.01 to 100"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "Hi", "--max_gen_len", "0"], "argument --max_gen_len: 0 is not above 0"),
        (["--prompt", "Hi", "--top_p", "seven"], "argument --top_p"),
        (["--prompt", "Hi", "--device", "toaster"], "Unknown device 'toaster'"),
        (["--prompt", "Hi", "--dtype", "int7"], "Unknown dtype 'int7'"),
        (["--prompt", "Hi", "--quantize", "int3"], "Unknown quantize 'int3'; try int8 or int4."),
        (["--prompt", "Hi", "--device", "cpu", "--quantize", "int8", "--compile"], "leave --compile out"),
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


def test_one_shot_as_json(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    arguments = ["--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32", "--json"]
    result = run_cli(*arguments, "--image", colours["red"], "--prompt", "<image_placeholder>Colour?")
    answer = json.loads(result.stdout)
    assert (answer["model"], answer["answer"], answer["finish_reason"]) == (
        str(parrot_checkpoint),
        "It is red.",
        "stop",
    )
    assert answer["usage"]["prompt_tokens"] > 16
    cut_short = json.loads(run_cli(*arguments, "--max_gen_len", 7, "--prompt", "Sing.").stdout)
    assert (cut_short["finish_reason"], cut_short["usage"]["completion_tokens"]) == ("length", 7)


def test_an_image_from_standard_input(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    arguments = ["--model_path", parrot_checkpoint, "--temperature", 0, "--dtype", "float32", "--image", "-"]
    question = ["--prompt", "<image_placeholder>Colour?"]
    assert run_cli(*arguments, *question, input=colours["blue"].read_bytes()).stdout == "It is blue.\n"
    broken = run_cli(*arguments, *question, input=b"GIF89a")
    assert (broken.returncode, broken.stderr.count("\n")) == (1, 1)
    assert "Standard input is no image" in broken.stderr


def test_a_hub_id_that_cannot_be_fetched_is_one_line() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "cli_chat.py"), "--model_path", "nobody/no-such-model", "--prompt", "Hi"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "'nobody/no-such-model' is not a directory, and could not be fetched from the Hub" in result.stderr


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


def test_with_int8_weights_the_answer_is_the_same() -> None:
    result = run_cli(
        "--model_path", "tiny", "--temperature", 0, "--quantize", "int8",
        "--image", ROOT / "images" / "shapes.png", "--prompt", "<image_placeholder>What colour is the star?",
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "The star is blue.\n", "")


def test_a_compiled_model_says_that_it_compiles_and_answers_the_same() -> None:
    chat = Chat("tiny", "--compile", "--image", str(ROOT / "images" / "shapes.png"), patience=180)
    try:
        assert "Compiling the language model ..." in chat.read()
        assert chat.ask("What colour is the star?").strip() == "The star is blue."
    finally:
        chat.close()


def test_without_a_compiler_compiling_is_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "cli_chat.py"), "--model_path", "tiny", "--device", "cpu", "--compile"]
    result = subprocess.run(
        [*command, "--prompt", "Hi"], capture_output=True, text=True, timeout=180, check=False, env=environment
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "cli_chat.py: error: The model cannot be compiled on this machine: " in result.stderr


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
        "quantize",
        "compile",
        "image",
        "prompt",
        "json",
    ]
    assert result.returncode == 0
    assert all(f"--{flag}" in result.stdout for flag in flags)


def test_a_question_from_a_pipe_about_a_picture() -> None:
    command = f"echo 'What colour is the star?' | {sys.executable} cli_chat.py --model_path tiny --temperature 0"
    command += " --image images/shapes.png"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=180, check=True, cwd=ROOT)
    assert "Assistant: The star is blue.\n" in result.stdout
    assert "\x1b" not in result.stdout


# --- interactive ---

GREETING = "Grüße, 世界! 🙂🎉 All good."


def test_two_turns_with_two_pictures() -> None:
    chat = Chat("tiny", cwd=str(ROOT))
    assert chat.enter("What colour is the star? images/shapes.png").splitlines() == [
        "[image 1: images/shapes.png, 480x360]",
        "Assistant: The star is blue.",
    ]
    assert chat.ask("Which bar is tallest? images/chart.png") == "The blue bar is the tallest."
    chat.close()


def test_a_picture_asked_for(chat: Chat, colours: dict[str, Path]) -> None:
    for name in ("red", "blue"):
        chat.enter("new")  # the parrot has learnt first turns only
        assert chat.enter("<image_placeholder>Colour?", f"(1/1) {PATH}") == ""
        assert chat.ask(str(colours[name])) == f"It is {name}."


def test_images_stay_in_the_conversation_until_new(chat: Chat, colours: dict[str, Path], tmp_path: Path) -> None:
    chat.enter("<image_placeholder>Colour?", PATH)
    assert chat.ask(str(colours["red"])) == "It is red."
    chat.ask("Greet me.")  # a second turn about the first turn's image
    assert chat.enter(f"save {tmp_path / 'chat.json'}").startswith("Saved 2 turn(s)")
    first = json.loads((tmp_path / "chat.json").read_text())[0]["messages"][0]
    assert load_image(first["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert chat.enter("new") == "New conversation."
    assert chat.ask("Greet me.") == GREETING


def test_paths_with_quotes_spaces_and_mistakes(chat: Chat, colours: dict[str, Path]) -> None:
    chat.enter("<image_placeholder>Colour?", PATH)
    assert "'/no/such/picture.png': there is no such file" in chat.enter("/no/such/picture.png", PATH)
    assert "not an image file" in chat.enter(str(ROOT / "setup.py"), PATH)
    assert chat.enter("", PATH) == ""
    assert chat.ask(f"  '{colours['blue']}'   ") == "It is blue."


@pytest.mark.parametrize(
    "written",
    [
        "{path} Colour?",  # spaces and all, as it is typed
        "Colour? {path}",
        "'{path}' Colour?",  # as GNOME's terminal drops a file
        '"{path}"  Colour?',
        "{escaped} Colour?",  # as macOS' terminal does
        "file://{percent} Colour?",
        "<image_placeholder>Colour? {path}",
    ],
)
def test_a_path_in_the_message_brings_the_image(written: str, chat: Chat, colours: dict[str, Path]) -> None:
    path = colours["red"]
    forms = {"path": path, "escaped": str(path).replace(" ", r"\ "), "percent": str(path).replace(" ", "%20")}
    answer = chat.enter(written.format(**forms))
    # The parrot has learnt this question without a line break between image and text, so its answer is not checked.
    assert answer.startswith(f"[image 1: {path}, 50x40]\nAssistant: ")
    if written.startswith("<image_placeholder>"):
        assert answer.endswith("It is red.")


def test_an_image_without_a_word_waits_for_the_message(chat: Chat, colours: dict[str, Path]) -> None:
    shown = chat.enter(str(colours["blue"]))
    assert shown == f"[image 1: {colours['blue']}, 50x40]\n1 image(s) will go with your next message."
    assert chat.ask("<image_placeholder>Colour?") == "It is blue."


def test_an_image_from_the_web(chat: Chat, colours: dict[str, Path]) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(colours["red"].parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert chat.ask(f"<image_placeholder>Colour? {base}/red%20square.png") == "It is red."
        chat.enter("new")
        assert "answers with status 404" in chat.fail(f"What is {base}/none.png")
        chat.enter("<image_placeholder>Colour?", PATH)
        assert chat.ask(f"{base}/blue%20square.png") == "It is blue."
        server.shutdown()


def test_a_message_that_cannot_be_sent_is_there_to_be_mended(chat: Chat, colours: dict[str, Path]) -> None:
    wrong = str(colours["red"]).replace("red", "rod").replace(" ", r"\ ")
    chat.press("\x0c")
    chat.press(f"<image_placeholder>Colour? {wrong}\r")
    chat.wait_for("there is no such file")
    chat.wait_for_prompt(wrong)
    chat.press("\x1b[D" * len("od\\ square.png") + "\x7f" + "re" + "\x1b[3~" + "\r")
    chat.wait_for("It is red.")
    chat.wait_for_prompt()


def test_the_home_directory_is_expanded(parrot_checkpoint: Path, colours: dict[str, Path]) -> None:
    home = {"HOME": str(colours["red"].parent), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "xterm"}
    chat = Chat(parrot_checkpoint, env=home)
    chat.enter("<image_placeholder>Colour?", PATH)
    assert chat.ask('"~/red square.png"') == "It is red."
    chat.close()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: Chat) -> None:
    chat.press("Sing.\r")
    chat.wait_for("la la la la")
    chat.press("\x03")
    chat.wait_for("[stopped]")
    chat.wait_for_prompt()
    chat.enter("new")
    assert chat.ask("Greet me.") == GREETING


def test_ctrl_c_at_a_prompt_forgets_the_line(chat: Chat) -> None:
    chat.press("Half a mess")
    chat.wait_for("Half a mess")
    chat.press("\x03")
    chat.wait_for_prompt()
    chat.enter("<image_placeholder>Colour?", PATH)
    chat.press("\x03")
    chat.wait_for_prompt()
    assert chat.ask("Greet me.") == GREETING


def test_stop_words_of_the_template_are_not_shown(chat: Chat) -> None:
    assert chat.ask("What do you say?") == "One thing."


def test_line_editing(chat: Chat) -> None:
    assert chat.ask("Greet me.X\x7f") == GREETING  # backspace
    chat.enter("new")
    assert chat.ask("\x1b[A\x1b[A") == GREETING  # two lines up: the question again


def test_history_outlives_the_chat(parrot_checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color"}
    for keys in ("Greet me.", "\x1b[A\x1b[A"):  # the history ends with `exit`, hence two lines up
        chat = Chat(parrot_checkpoint, env=environment)
        assert chat.ask(keys) == GREETING
        chat.press("exit\r")
        chat.process.expect(pexpect.EOF)
    assert (tmp_path / "deepseek_vl" / "history").stat().st_mode & 0o077 == 0


def test_tab_completes_the_paths_of_images(chat: Chat, colours: dict[str, Path]) -> None:
    directory = colours["red"].parent
    (directory / "blue notes.txt").write_text("no image")
    chat.press(f"<image_placeholder>Colour? {directory.parent}/my\t")
    chat.wait_for_prompt("/my pictures/")
    chat.press("bl\t")  # only one picture's name begins with these letters
    chat.wait_for_prompt("blue square.png")
    chat.press("\r")
    chat.wait_for("It is blue.")
    chat.wait_for_prompt()


def test_retry_and_undo(chat: Chat, tmp_path: Path) -> None:
    assert "no message to take back" in chat.enter("undo")
    assert chat.enter("retry") == "Error: There is no answer yet to try again."
    assert chat.ask("Greet me.") == GREETING
    assert chat.ask("retry") == GREETING
    chat.ask("What do you say?")
    assert chat.enter("undo") == "The last message is taken back."
    chat.enter(f"save {tmp_path / 'chat.jsonl'}")
    question, answer = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert question == {"role": "User", "content": "Greet me.", "images": []}
    assert answer == {"role": "Assistant", "content": GREETING}


def test_save_and_load(chat: Chat, colours: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "my chat.json"
    assert "no conversation yet" in chat.enter(f"save '{file}'")
    chat.ask(f"<image_placeholder>Colour? {colours['red']}")
    assert chat.enter(f"save '{file}'") == f"Saved 1 turn(s) to {file}."
    assert len(list(read_rows(file))) == 1
    chat.enter("new")
    assert chat.enter(f"load '{file}'").endswith("The last answer was:\nAssistant: It is red.")
    assert chat.ask("retry") == "It is red."  # the image has come back
    for name, reason in (("photo.png", "not as"), ("no/such/chat.json", "Cannot write")):
        assert reason in chat.enter(f"save {tmp_path / name}")
    assert not (tmp_path / "photo.png").exists()
    assert "There is no data file" in chat.enter(f"load {tmp_path / 'none.json'}")
    assert chat.enter("undo") == "The last message and its 1 image(s) are taken back."


def test_help_empty_lines_and_words_that_are_no_command(chat: Chat) -> None:
    assert "forget the conversation" in chat.enter("help")
    assert chat.enter("   ") == ""
    assert "Assistant:" in chat.enter("save the whales, don't forget the pandas")
    assert chat.enter("save") == "save needs the name of a .json or .jsonl file."
    assert "there is no such file" in chat.fail("/no/such.png")


def test_an_answer_is_shown_as_markdown(chat: Chat, tmp_path: Path) -> None:
    answer = "A **bold** word.\nA second line.\n\n- one\n- two\n\n```python\nx  =  1\n\ny = 2\n```\n\nThe end.\x07"
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    shown = chat.enter(f"load {tmp_path / 'chat.jsonl'}").partition("Assistant: ")[2].split("\n")
    assert [line.strip() for line in shown] == [
        "A bold word.", "A second line.", "• one", "• two", "x  =  1", "y = 2", "The end."
    ]  # fmt: skip


def test_an_answer_that_begins_with_code_and_speaks_of_html(chat: Chat, tmp_path: Path) -> None:
    answer = "```python\nx = 1\n```\n\nUse List<int> and the <image> tag."
    messages = [{"role": "user", "content": "Hi.", "images": []}, {"role": "assistant", "content": answer}]
    (tmp_path / "my chat.jsonl").write_text(json.dumps({"messages": messages}))
    shown = chat.enter(f"load {tmp_path / 'my chat.jsonl'}").split("\n")  # a path with a space and without quotes
    assert [line.strip() for line in shown[1:]] == ["Assistant:", "x = 1", "Use List<int> and the <image> tag."]


def test_a_long_answer_is_whole_in_a_low_terminal(parrot_checkpoint: Path) -> None:
    """An answer that is taller than the screen is printed completely and once.

    Text that is typed while it comes does not disturb it, and appears at the next prompt.
    """
    chat = Chat(parrot_checkpoint, "--max_gen_len", "300", size=(8, 60))
    chat.press("Sing.\r")
    chat.wait_for("la la")
    chat.press("typed ahead " * 10)
    screen = chat.wait("what was typed ahead", lambda lines: " ".join(lines).endswith("typed ahead"))
    everything = " ".join([*chat.scrolled_away(), *screen])
    assert everything.count("Assistant:") == 1
    answer = everything.partition("Assistant: ")[2].partition("User:")[0]
    chat.close()
    arguments = ["--temperature", 0, "--dtype", "float32", "--max_gen_len", 300, "--prompt", "Sing."]
    assert answer.split() == run_cli("--model_path", parrot_checkpoint, *arguments).stdout.split()


@pytest.mark.parametrize(
    ("at", "how"),
    [("message", "exit"), ("message", "end of input"), ("image path", "exit"), ("image path", "end of input")],
)
def test_leaving(at: str, how: str, parrot_checkpoint: Path) -> None:
    chat = Chat(parrot_checkpoint)
    if at == "image path":
        chat.enter("<image_placeholder>Colour?", PATH)
    chat.press("exit\r" if how == "exit" else "\x04")
    chat.process.expect(pexpect.EOF)
    chat.process.close()
    assert chat.process.exitstatus == 0


def test_an_error_while_answering_keeps_the_chat(siglip_checkpoint: Path) -> None:
    """This model has 1024 positions."""
    chat = Chat(siglip_checkpoint)
    chat.press("~" * 3000 + "\r")
    chat.wait_for("no room for an answer")
    chat.press("\x03")
    chat.wait_for_prompt()
    assert "Error" not in chat.enter("Hi.")
    chat.close()


def test_a_dumb_terminal_gets_plain_text(parrot_checkpoint: Path) -> None:
    arguments = [str(ROOT / "cli_chat.py"), "--model_path", str(parrot_checkpoint), "--temperature", "0"]
    process = in_terminal([*arguments, "--dtype", "float32"], env={**os.environ, "TERM": "dumb"})
    process.expect(re.escape(USER))
    process.sendline("Greet me.")
    process.expect(re.escape(f"Assistant: {GREETING}\r\n"))
    assert "\x1b" not in process.before + process.after
    process.close(force=True)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "Cannot read image 'none.png': there is no such file."),
        (["--question", "Colour?"], "The prompt has 0 <image_placeholder> and 1 images were given"),
        (["--model_path", "/no/such/model"], "There is no checkpoint directory '/no/such/model'."),
    ],
)
def test_what_the_example_cannot_do_is_one_line(
    parrot_checkpoint: Path, colours: dict[str, Path], arguments: list[str], message: str
) -> None:
    command = [sys.executable, str(ROOT / "inference.py"), "--model_path", str(parrot_checkpoint)]
    command += ["--image", str(colours["red"]), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"inference.py: error: {message}")
    assert "Traceback" not in result.stderr
