"""The web page in a real browser."""

import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from conftest import PARROT_ANSWERS, ROOT, answers_at, slow_jpeg, wait_until

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from deepseek_vl.engine.engine import Engine  # noqa: E402
from deepseek_vl.engine.settings import GenerationSettings  # noqa: E402
from deepseek_vl.models import VLChatProcessor  # noqa: E402
from deepseek_vl.serve.app_deepseek import main  # noqa: E402
from deepseek_vl.serve.inference import load_model  # noqa: E402
from deepseek_vl.serve.web.chat import WebChat  # noqa: E402
from deepseek_vl.serve.web.page import create_page, launch  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
IMAGES = ROOT / "images"
Served = tuple[Engine, VLChatProcessor]


@pytest.fixture(scope="module")
def tiny() -> Served:
    tokenizer, model, processor = load_model("tiny", device="cpu", dtype="float32")
    return Engine(model, tokenizer), processor


@pytest.fixture(scope="module")
def parrot(parrot_checkpoint: Path) -> Served:
    """The parrot, so slow that a song of its does not end by itself within a test."""
    tokenizer, model, processor = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    return Engine(model, tokenizer), processor


@pytest.fixture(scope="module")
def address(tiny: Served, parrot: Served) -> Iterator[str]:
    """A server whose first model is the bundled one."""
    page = create_page({"tiny": tiny, "parrot": parrot})
    port = free_port()
    launch(page, "127.0.0.1", port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    page.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs {CHROMIUM} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a browser, as its user handles it."""

    def __init__(self, browser: sync_api.Browser, address: str, **options: object):
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.goto(address)
        self.input = self.page.locator("#message textarea")
        self.input.wait_for()

    def choose_model(self, name: str) -> None:
        self.page.get_by_label("Model").click()
        self.page.get_by_role("option", name=name).click()

    def choose_parrot(self) -> None:
        """The model whose answers are known, with greedy decoding."""
        self.choose_model("parrot")
        self.set("Temperature", 0)

    def set(self, slider: str, value: float) -> None:
        self.page.get_by_label(f"number input for {slider}").fill(str(value))
        self.page.get_by_label(f"number input for {slider}").press("Tab")

    def add(self, *files: Path) -> None:
        self.page.set_input_files("#message input[type=file]", [str(file) for file in files])
        sync_api.expect(self.page.locator("#message .thumbnail-item")).to_have_count(len(files))

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def send(self, text: str, *files: Path) -> None:
        if files:
            self.add(*files)
        self.input.fill(text)
        self.press("Send")

    @property
    def answers(self) -> sync_api.Locator:
        return self.page.locator("#chat .bot.message, #chat .message.bot")

    @property
    def questions(self) -> sync_api.Locator:
        return self.page.locator("#chat .user.message, #chat .message.user")

    def sees(self, *answers: str | re.Pattern[str]) -> None:
        """Wait until the answers are these."""
        sync_api.expect(self.answers).to_have_text(list(answers), timeout=30_000)


@pytest.fixture
def tab(browser: sync_api.Browser, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.context.close()


def test_a_picture_a_question_and_a_second_turn(tab: Tab) -> None:
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    sync_api.expect(tab.page.locator("#chat img")).to_have_count(1)
    tab.send("Where is it?")
    tab.sees(re.compile("blue"), re.compile("right"))
    sync_api.expect(tab.input).to_have_value("")


def test_two_pictures_in_one_message(tab: Tab) -> None:
    tab.send("Which image has the blue star?", IMAGES / "more_shapes.png", IMAGES / "shapes.png")
    tab.sees(re.compile("second"))


def test_an_example_is_put_into_the_input(tab: Tab) -> None:
    tab.page.get_by_text("Which bar is tallest?").click()
    sync_api.expect(tab.input).to_have_value("Which bar is tallest?")
    tab.press("Send")
    tab.sees(re.compile("blue"))


def test_regenerate_remove_and_new(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.set("Max generation tokens", 8)
    tab.press("Regenerate")
    sync_api.expect(tab.page.locator("#status")).to_have_text("The answer was cut off after 8 tokens.")
    assert PARROT_ANSWERS["Greet me."].startswith(tab.answers.inner_text().strip())
    tab.set("Max generation tokens", 2048)
    tab.press("Regenerate")
    tab.sees(PARROT_ANSWERS["Greet me."])
    sync_api.expect(tab.questions).to_have_count(1)
    tab.send("What do you say?")
    tab.sees(PARROT_ANSWERS["Greet me."], re.compile("."))
    tab.press("Remove Last Turn")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.press("New Conversation")
    sync_api.expect(tab.questions).to_have_count(0)
    tab.press("Regenerate")
    sync_api.expect(tab.page.locator("#status")).to_have_text("There is no answer yet to generate again.")
    tab.press("Send")
    sync_api.expect(tab.page.locator("#status")).to_have_text("Write a message, or add an image.")


def test_enter_sends(tab: Tab) -> None:
    tab.choose_parrot()
    tab.input.fill("Greet me.")
    tab.input.press("Enter")
    tab.sees(PARROT_ANSWERS["Greet me."])


def test_stop_ends_the_generation_and_keeps_what_there_is(tab: Tab, parrot: Served) -> None:
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    sync_api.expect(tab.answers).to_contain_text("la la la la")
    assert parrot[0].running == 1
    first = tab.answers.inner_text()
    sync_api.expect(tab.answers).not_to_have_text(first)  # it streams
    tab.press("Stop")
    wait_until(lambda: not parrot[0].running, 1.0)
    sync_api.expect(tab.page.locator("#status")).to_have_text("Stopped.")
    assert tab.answers.inner_text().startswith("la la la la")
    tab.press("New Conversation")
    sync_api.expect(tab.questions).to_have_count(0)
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])


@pytest.mark.parametrize("button", ["New Conversation", "Remove Last Turn"])
def test_an_answer_that_is_not_wanted_any_more_stays_away(tab: Tab, parrot: Served, button: str) -> None:
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    sync_api.expect(tab.answers).to_contain_text("la la")
    tab.press(button)
    wait_until(lambda: not parrot[0].running, 5.0)
    sync_api.expect(tab.questions).to_have_count(0)
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])


def test_stop_while_a_picture_is_decoded_is_no_fault_of_the_picture(parrot: Served, tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(slow_jpeg())
    chat, tab = WebChat({"parrot": parrot}), SimpleNamespace(session_hash="tab")
    message = {"text": "Colour?", "files": [str(tmp_path / "slow.jpg")]}
    threading.Timer(1, chat.stop, [tab]).start()
    begun = time.monotonic()
    *_, (turns, *_) = chat.send(tab, message, [], "parrot", 1, 0, 1.1, 64, 4096)
    assert turns[-1].error == "There was no answer."
    assert time.monotonic() - begun < 8


def test_a_tab_that_is_closed_ends_its_generation(browser: sync_api.Browser, address: str, parrot: Served) -> None:
    tab = Tab(browser, address)
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    sync_api.expect(tab.answers).to_contain_text("la la")
    tab.context.close()
    wait_until(lambda: not parrot[0].running, 10.0)


def test_two_users_have_their_own_conversations(
    browser: sync_api.Browser, address: str, colours: dict[str, Path]
) -> None:
    tabs = {name: Tab(browser, address) for name in colours}
    for tab in tabs.values():
        tab.choose_parrot()
    for name, tab in tabs.items():
        tab.send("<image_placeholder>Colour?", colours[name])
    for name, tab in tabs.items():
        tab.sees(f"It is {name}.")
        sync_api.expect(tab.questions).to_contain_text(["Colour?"])
        tab.context.close()


def test_a_broken_file_gives_a_message_and_the_session_goes_on(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((IMAGES / "shapes.png").read_bytes()[:500])
    tab.send("What is this?", tmp_path / "broken.png")
    tab.sees("Error: broken.png cannot be read: it must be a whole PNG, JPEG, WEBP, GIF, BMP picture.")
    sync_api.expect(tab.input).to_have_value("What is this?")  # nothing is lost
    tab.press("Remove Last Turn")
    sync_api.expect(tab.questions).to_have_count(0)
    tab.page.reload()
    tab.input.wait_for()
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))


def test_removing_a_failure_leaves_what_went_before(tab: Tab, tmp_path: Path) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.set("Max generation tokens", 0)
    tab.send("And now?")
    tab.sees(PARROT_ANSWERS["Greet me."], re.compile("max_new_tokens must be at least 1"))
    tab.press("Remove Last Turn")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.set("Max generation tokens", 2048)
    tab.press("Regenerate")
    sync_api.expect(tab.questions).to_have_text([re.compile("Greet me.")])


def test_what_is_typed_while_an_answer_comes_stays(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Sing.")
    sync_api.expect(tab.answers).to_contain_text("la la la la")
    tab.input.fill("My next question")
    shown = tab.answers.inner_text()
    sync_api.expect(tab.answers).not_to_have_text(shown)
    sync_api.expect(tab.input).to_have_value("My next question")
    tab.press("Send")
    sync_api.expect(tab.page.locator("#status")).to_have_text("An answer is still coming; press Stop first.")
    sync_api.expect(tab.input).to_have_value("My next question")
    tab.press("Stop")


def test_settings_that_cannot_be_are_a_message(tab: Tab) -> None:
    tab.set("Max generation tokens", 0)
    tab.send("Hello.")
    tab.sees(re.compile("max_new_tokens must be at least 1"))


def test_old_turns_are_left_out_and_the_page_says_so(tab: Tab) -> None:
    tab.choose_parrot()
    tab.set("Max history tokens", 128)
    for turn in range(2):
        tab.send("Greet me.")
        tab.sees(*[PARROT_ANSWERS["Greet me."]] * (turn + 1))
    sync_api.expect(tab.page.locator("#status")).to_contain_text("The oldest 1 turn(s) are too long")


def test_too_many_pictures_are_refused(tab: Tab) -> None:
    tab.send("What are these?", *[IMAGES / "shapes.png"] * 17)
    tab.sees("Error: The message has 17 images; at most 16 are taken.")


def test_a_hand_made_request_can_name_no_address_and_no_file(address: str) -> None:
    """Neither does the server fetch for its clients, nor read its own files for them."""
    config = httpx.get(f"{address}/config").json()
    send = next(d for d in config["dependencies"] if len(d["outputs"]) == 4 and d["inputs"])
    for path in ("http://127.0.0.1:9/a.png", "https://example.org/a.png", str(ROOT / "setup.py"), "file:///etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        values = [{"text": "What?", "files": [file]}, None, "tiny", 0.95, 0, 1.1, 64, 4096]
        body = {"data": values, "fn_index": send["id"], "session_hash": f"hostile{hash(path)}"}
        assert httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code == 200
        events = httpx.get(
            f"{address}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=30
        )
        last = [json.loads(line[6:]) for line in events.text.splitlines() if line.startswith("data: ")]
        completed = next(event for event in last if event["msg"] == "process_completed")
        assert completed["success"] is False
        assert "def " not in events.text


def test_what_a_user_types_is_no_html(tab: Tab) -> None:
    tab.send("<b id='bold'>bold</b> <image_placeholder>?")
    sync_api.expect(tab.questions).to_contain_text("<b id='bold'>bold</b> <image_placeholder>?")
    sync_api.expect(tab.page.locator("#bold")).to_have_count(0)
    tab.sees(re.compile("1 <image_placeholder> and 0 images"))


def test_on_a_phone_everything_is_within_reach(browser: sync_api.Browser, address: str) -> None:
    tab = Tab(browser, address)
    tab.page.set_viewport_size({"width": 390, "height": 844})
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.context.close()


def test_the_sliders_stand_where_the_command_says(tiny: Served) -> None:
    def sliders(*settings: GenerationSettings) -> dict[str, tuple[float, float]]:
        components = [component["props"] for component in create_page({"tiny": tiny}, *settings).config["components"]]
        return {props["label"]: (props["value"], props["maximum"]) for props in components if "step" in props}

    assert sliders() == {
        "Top-p": (0.95, 1), "Temperature": (0.1, 1), "Repetition penalty": (1.1, 2),
        "Max generation tokens": (2048, 4096), "Max history tokens": (4096, 4096),
    }  # fmt: skip
    moved = sliders(GenerationSettings(top_p=0.5, temperature=1.5, repetition_penalty=1, max_new_tokens=8000))
    assert moved["Top-p"] == (0.5, 1)
    assert moved["Temperature"] == (1.5, 1.5), "beyond the slider's own end"
    assert moved["Max generation tokens"] == (8000, 8000)


# --- the command ---


@pytest.fixture(scope="module")
def guarded(parrot_checkpoint: Path) -> Iterator[int]:
    """The port of a server that was started by its command and asks for a password."""
    port = free_port()
    command = [sys.executable, str(ROOT / "deepseek_vl" / "serve" / "app_deepseek.py"), "--port", str(port)]
    command += ["--model_path", str(parrot_checkpoint), "--auth", "ada:lovelace"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers_at(f"http://127.0.0.1:{port}/", process), 120)
        yield port
    finally:
        process.kill()
        process.wait(10)


def test_auth_keeps_strangers_out(browser: sync_api.Browser, guarded: int) -> None:
    assert httpx.get(f"http://127.0.0.1:{guarded}/config").status_code == 401
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{guarded}")
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill("lovelace")
        page.get_by_role("button", name="Login").click()
        page.locator("#message textarea").wait_for(timeout=30_000)


def test_a_wrong_password_waits_and_a_right_one_does_not(guarded: int) -> None:
    """Nor does it behind many wrong ones."""

    def log_in(password: str) -> tuple[int, float]:
        begun = time.monotonic()
        form = {"username": "ada", "password": password}
        answer = httpx.post(f"http://127.0.0.1:{guarded}/login", data=form, timeout=60)
        return answer.status_code, time.monotonic() - begun

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        wrong = [pool.submit(log_in, "byron") for _ in range(16)]
        status, seconds = log_in("lovelace")
        assert status == 200
        assert seconds < min(guess.result()[1] for guess in wrong)
    assert {guess.result()[0] for guess in wrong} == {400}
    assert min(guess.result()[1] for guess in wrong) >= 1


def test_the_page_answers_to_its_own_names(guarded: int) -> None:
    for host, status in (("127.0.0.1", 200), (f"LOCALHOST:{guarded}", 200), ("rebound.example", 421), ("", 421)):
        assert httpx.get(f"http://127.0.0.1:{guarded}/", headers={"Host": host}).status_code == status, host


def test_it_listens_on_this_machine_only(guarded: int) -> None:
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == guarded]
    assert {address.ip for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "no/such/model/"], "There is no checkpoint directory"),
        (["--auth", "ada"], "--auth is a name and a password"),
        (["--port", "many"], "argument --port"),
        (["--port", "99999", "--model_path", "no/such/model/"], "--port 99999 is not between 0 and 65535"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid cannot be found"),
        (["--allowed_host", "http://name"], "--allowed_host http://name is no name"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:  # from argparse
        code = error.code
    assert code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("app_deepseek.py: error") == 1
