"""The web page in a real browser."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
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
import uvicorn
from conftest import PARROT_ANSWERS, ROOT, answers_at, slow_jpeg, wait_until
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from web_page import IMAGES, Served, Tab, expect, free_port, sync_api

from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.app_deepseek import main
from deepseek_vl.serve.web.chat import WebChat
from deepseek_vl.serve.web.page import create_page

TAG = "<image_placeholder>"
pytest_plugins = ["web_page"]  # its fixtures


def test_a_picture_a_question_and_a_second_turn(tab: Tab) -> None:
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    expect(tab.pictures).to_have_count(1)
    tab.send("Where is it?")
    tab.sees(re.compile("blue"), re.compile("right"))
    expect(tab.input).to_have_value("")


def test_two_pictures_in_one_message(tab: Tab) -> None:
    tab.send("Which image has the blue star?", IMAGES / "more_shapes.png", IMAGES / "shapes.png")
    tab.sees(re.compile("second"))


def test_an_example_is_put_into_the_input(tab: Tab) -> None:
    tab.page.get_by_role("button", name="Which bar is tallest?").click()
    expect(tab.input).to_have_value("Which bar is tallest?")
    tab.press("Send")
    tab.sees(re.compile("blue"))


def test_regenerate_remove_and_new(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.set("Max generation tokens", 8)
    tab.press("Regenerate")
    expect(tab.status).to_have_text("The answer was cut off after 8 tokens.")
    assert PARROT_ANSWERS["Greet me."].startswith(tab.answers.inner_text().strip())
    tab.set("Max generation tokens", 2048)
    tab.press("Regenerate")
    tab.sees(PARROT_ANSWERS["Greet me."])
    expect(tab.status).to_have_text("")
    expect(tab.questions).to_have_count(1)
    tab.set("Max generation tokens", 16)
    tab.send("What do you say?")
    tab.sees(PARROT_ANSWERS["Greet me."], re.compile("."))
    tab.is_idle()
    tab.press("Remove")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.press("New Conversation")
    expect(tab.questions).to_have_count(0)


def test_enter_sends(tab: Tab) -> None:
    tab.choose_parrot()
    tab.input.fill("Greet me.")
    tab.input.press("Enter")
    tab.sees(PARROT_ANSWERS["Greet me."])


def test_stop_ends_the_generation_and_keeps_what_there_is(tab: Tab, parrot: Served) -> None:
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    expect(tab.answers).to_contain_text("la la la la")
    assert parrot[0].running == 1
    first = tab.answers.inner_text()
    expect(tab.answers).not_to_have_text(first)  # the answer is streamed
    tab.press("Stop")
    wait_until(lambda: not parrot[0].running, 1.0)
    expect(tab.toast).to_have_text("Stopped.")
    assert tab.answers.inner_text().startswith("la la la la")
    tab.press("New Conversation")
    expect(tab.questions).to_have_count(0)
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])


@pytest.mark.parametrize("button", ["New Conversation", "Remove"])
def test_an_answer_that_is_not_wanted_any_more_stays_away(tab: Tab, parrot: Served, button: str) -> None:
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    expect(tab.answers).to_contain_text("la la")
    # Gradio disables the button while an answer comes, but a user may click it just before.
    tab.page.get_by_role("button", name=button, exact=True).evaluate("(it) => { it.disabled = false; it.click() }")
    wait_until(lambda: not parrot[0].running, 5.0)
    expect(tab.questions).to_have_count(0)
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])


def test_stop_while_a_picture_is_decoded_gives_the_message_back(parrot: Served, tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(slow_jpeg())
    chat, tab = WebChat({"parrot": parrot}), SimpleNamespace(session_hash="tab")
    message = {"text": "Colour?", "files": [str(tmp_path / "slow.jpg")]}
    conversation, *_ = chat.send(tab, message, None)
    threading.Timer(1, chat.stop, [tab]).start()
    begun = time.monotonic()
    *_, (conversation, shown, (kept,), *_), _ = chat.answer(tab, conversation, "parrot", 1, 0, 1.1, 64, 4096)
    assert conversation.turns == ()
    assert shown == []
    assert kept["unsent"]["text"] == "Colour?"
    assert time.monotonic() - begun < 8


def test_stop_while_a_message_waits_to_be_answered_gives_it_back(parrot: Served) -> None:
    """The server may have many to answer first."""
    chat, tab = WebChat({"parrot": parrot}), SimpleNamespace(session_hash="tab")
    controls = ("parrot", 1, 0, 1.1, 64, 4096)
    conversation, *_ = chat.send(tab, {"text": "Greet me.", "files": []}, None)
    *_, (answered, *_), _ = chat.answer(tab, conversation, *controls)
    assert [turn.answer for turn in answered.turns] == [PARROT_ANSWERS["Greet me."]]
    asked, *_ = chat.send(tab, {"text": "Sing.", "files": []}, answered)
    assert [turn.text for turn in asked.turns] == ["Greet me.", "Sing."]
    chat.stop(tab)
    ((stays, shown, (kept,), *_),) = chat.answer(tab, asked, *controls)
    assert stays == answered
    assert shown == answered.shown()
    assert kept["unsent"] == {"text": "Sing.", "files": []}


def test_a_tab_that_is_closed_ends_its_generation(browser: sync_api.Browser, address: str, parrot: Served) -> None:
    tab = Tab(browser, address)
    tab.choose_parrot()
    tab.set("Max generation tokens", 4096)
    tab.send("Sing.")
    expect(tab.answers).to_contain_text("la la")
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
        expect(tab.questions).to_contain_text(["Colour?"])
        tab.context.close()


def test_a_broken_file_gives_a_message_and_the_session_goes_on(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((IMAGES / "shapes.png").read_bytes()[:500])
    tab.send("What is this?", tmp_path / "broken.png")
    tab.sees("Error: broken.png cannot be read: it must be a whole PNG, JPEG, WEBP, GIF, BMP picture.")
    expect(tab.input).to_have_value("What is this?")  # the typed message is kept
    tab.press("Remove")
    expect(tab.questions).to_have_count(0)
    tab.is_kept("What is this?", 0)
    tab.page.reload()
    tab.input.wait_for()
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))


def test_removing_a_failure_leaves_what_went_before(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.send("And now?", tmp_path / "broken.png")
    tab.sees(PARROT_ANSWERS["Greet me."], re.compile("broken.png cannot be read"))
    tab.press("Remove")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.press("Regenerate")
    tab.is_idle()
    expect(tab.questions).to_have_text([re.compile("Greet me.")])


def test_what_is_typed_while_an_answer_comes_stays(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Sing.")
    expect(tab.answers).to_contain_text("la la la la")
    tab.input.fill("My next question")
    shown = tab.answers.inner_text()
    expect(tab.answers).not_to_have_text(shown)
    expect(tab.input).to_have_value("My next question")
    tab.input.press("Enter")
    expect(tab.toast).to_have_text("An answer is still coming; press Stop first.")
    expect(tab.input).to_have_value("My next question")
    tab.press("Stop")


def test_old_turns_are_left_out_and_the_page_says_so(tab: Tab) -> None:
    tab.choose_parrot()
    tab.set("Max history tokens", 128)
    for turn in range(2):
        tab.send("Greet me.")
        tab.sees(*[PARROT_ANSWERS["Greet me."]] * (turn + 1))
    expect(tab.status).to_contain_text("The oldest 1 turn(s) are too long")


def test_too_many_pictures_are_refused(tab: Tab) -> None:
    tab.send("What are these?", *[IMAGES / "shapes.png"] * 17)
    tab.sees("Error: The message has 17 images; at most 16 are taken.")


def test_a_hand_made_request_can_name_no_address_and_no_file(address: str) -> None:
    """The server neither fetches addresses nor reads its own files for its clients."""
    config = httpx.get(f"{address}/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    send, restore = (
        next(d for d in config["dependencies"] if d["backend_fn"] and d["inputs"] and kinds[d["inputs"][0]] == kind)
        for kind in ("multimodaltextbox", "html")
    )
    for path in ("http://127.0.0.1:9/a.png", "https://example.org/a.png", str(ROOT / "setup.py"), "file:///etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        row = {"messages": [{"role": "user", "content": TAG, "images": [file]}, {"role": "assistant", "content": "A"}]}
        values = [{"text": "What?", "files": [file]}, None, "tiny", 0.95, 0, 1.1, 64, 1024]
        for event, data in ((send, values), (restore, [{"row": row}])):
            body = {"data": data, "fn_index": event["id"], "session_hash": f"hostile{hash(path)}"}
            assert httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code == 200
            events = httpx.get(
                f"{address}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=30
            )
            last = [json.loads(line[6:]) for line in events.text.splitlines() if line.startswith("data: ")]
            completed = next(event for event in last if event["msg"] == "process_completed")
            assert completed["success"] is False
            assert "def " not in events.text


@pytest.mark.parametrize("path", ["queue/join", "run/predict"])
def test_a_body_that_is_too_large_is_refused(address: str, path: str) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(9):
            yield b"[" + b"0," * ((1 << 19) - 1) + b"0"

    try:
        status = httpx.post(f"{address}/gradio_api/{path}", content=body(), timeout=60).status_code
    except httpx.WriteError:  # it closed the connection while the body came
        status = 413
    assert status == 413
    assert httpx.get(f"{address}/config").status_code == 200


def test_what_a_user_types_is_no_html(tab: Tab) -> None:
    tab.send("<b id='bold'>bold</b> <image_placeholder>?")
    expect(tab.questions).to_contain_text("<b id='bold'>bold</b> <image_placeholder>?")
    expect(tab.page.locator("#bold")).to_have_count(0)
    tab.sees(re.compile("1 <image_placeholder> and 0 images"))


def test_the_sliders_stand_where_the_command_says(tiny: Served, parrot: Served) -> None:
    def sliders(served: Served, *settings: GenerationSettings) -> dict[str, tuple[float, float]]:
        components = [component["props"] for component in create_page({"it": served}, *settings).config["components"]]
        return {props["label"]: (props["value"], props["maximum"]) for props in components if "step" in props}

    assert sliders(tiny) == {
        "Top-p": (0.95, 1), "Temperature": (0.1, 1), "Repetition penalty": (1.1, 2),
        "Max generation tokens": (1024, 1024), "Max history tokens": (1024, 1024),
    }  # fmt: skip
    moved = sliders(parrot, GenerationSettings(top_p=0.5, temperature=1.5, repetition_penalty=1, max_new_tokens=8000))
    assert moved["Top-p"] == (0.5, 1)
    assert moved["Temperature"] == (1.5, 1.5), "beyond the slider's own end"
    assert moved["Max generation tokens"] == (8000, 8000)


# --- the command ---


@pytest.fixture(scope="module")
def guarded(parrot_checkpoint: Path) -> Iterator[int]:
    """The port of a server that was started by the command, with a password."""
    port = free_port()
    command = [sys.executable, str(ROOT / "deepseek_vl" / "serve" / "app_deepseek.py"), "--port", str(port)]
    command += ["--model_path", str(parrot_checkpoint), "--auth", "ada:lovelace"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers_at(f"http://127.0.0.1:{port}/", process), 120)
        yield port
    finally:
        process.terminate()  # so that it takes its uploads with it
        process.wait(60)


def test_a_server_that_ends_takes_its_own_uploads_and_no_others() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    with contextlib.ExitStack() as stack:
        servers, files = [], []
        for _ in range(2):
            port = free_port()
            command = [sys.executable, "-m", "deepseek_vl.serve.app_deepseek", "--model_path", "tiny"]
            command += ["--port", str(port)]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.kill)
            servers.append((process, f"http://127.0.0.1:{port}"))
        for process, url in servers:
            wait_until(lambda: answers_at(f"{url}/", process), 120)  # noqa: B023
            picture = (IMAGES / "shapes.png").read_bytes()
            answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("shapes.png", picture, "image/png")})
            files.append(Path(answer.raise_for_status().json()[0]))
        (first, _), (second, _) = servers
        first.send_signal(signal.SIGINT)
        first.wait(60)
        assert [file.exists() for file in files] == [False, True]
        second.send_signal(signal.SIGTERM)
        second.wait(60)
        assert not files[1].exists()


@pytest.fixture(scope="module")
def below_a_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port and the log file of a server with `--root_path /chat/`, to stand behind a proxy."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, "-m", "deepseek_vl.serve.app_deepseek", "--model_path", "tiny", "--root_path", "/chat/"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=file, stderr=file)
    try:
        wait_until(lambda: answers_at(f"http://127.0.0.1:{port}/", process), 120)
        yield port, log
    finally:
        process.terminate()  # so that it takes its uploads with it
        process.wait(60)


def proxy(port: int, removes_path: bool) -> Starlette:
    """A proxy that serves a server below /chat, and forwards requests with or without that prefix."""
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix("/chat") if removes_path else request.url.path
        url = httpx.URL(path=path or "/", query=request.url.query.encode())
        headers = [(name, value) for name, value in request.headers.raw if name != b"content-length"]
        asked = client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in ("content-length",)}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    return Starlette(routes=[Route("/chat{rest:path}", forward, methods=["GET", "POST", "HEAD"])])


@pytest.mark.parametrize("removes_path", [True, False])
def test_the_page_works_below_a_path(
    browser: sync_api.Browser, below_a_path: tuple[int, Path], removes_path: bool
) -> None:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(proxy(below_a_path[0], removes_path), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 30)
        tab = Tab(browser, f"http://127.0.0.1:{port}/chat/")
        outside: list[str] = []
        tab.page.on("request", lambda request: outside.append(request.url))
        example = tab.page.locator("#chat .example img").first
        assert example.evaluate("async (it) => { await it.decode(); return it.naturalWidth }") > 0
        tab.send("What colour is the star?", IMAGES / "shapes.png")
        tab.sees(re.compile("blue"))
        assert tab.pictures.evaluate("async (it) => { await it.decode(); return it.naturalWidth }") > 0
        tab.is_kept("blue")
        tab.page.reload()
        tab.sees(re.compile("blue"))
        assert not [url for url in outside if not url.startswith((f"http://127.0.0.1:{port}/chat", "data:", "blob:"))]
        tab.context.close()
        assert tab.errors == []
    finally:
        server.should_exit = True
        thread.join(30)


def test_the_address_is_said_with_our_own_options(below_a_path: tuple[int, Path]) -> None:
    port, log = below_a_path
    wait_until(lambda: "The page is at" in log.read_text(), 30)
    said = log.read_text()
    assert f"The page is at http://127.0.0.1:{port}" in said
    assert "--host" in said
    assert "share=True" not in said
    assert "launch()" not in said


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
    """A right password does not wait, not even behind many wrong ones."""

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
        (["--root_path", "chat", "--model_path", "no/such/model/"], "--root_path chat is no path"),
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
