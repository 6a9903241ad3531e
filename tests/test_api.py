"""The HTTP API: a real server process, the real `openai` client, concurrent clients and clients that disconnect."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from api_server import Server, about
from conftest import PARROT_ANSWERS, ROOT, data_url, slow_jpeg, wait_until
from PIL import Image

from deepseek_vl.serve.api.__main__ import main
from deepseek_vl.serve.listening import names_of

COLOUR = "Colour?"


def test_an_answer_about_a_picture_and_one_about_text(server: Server, colours: dict[str, Path]) -> None:
    client = server.client()
    for name, path in colours.items():
        answer = client.chat.completions.create(model="parrot", messages=about(COLOUR, path))
        assert answer.choices[0].message.content == f"It is {name}."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens > 16
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "Greet me."}])
    assert text.choices[0].message.content == PARROT_ANSWERS["Greet me."]
    assert text.object == "chat.completion"
    assert text.id.startswith("chatcmpl-")


def test_a_stream_is_the_same_answer_in_pieces(server: Server, colours: dict[str, Path]) -> None:
    stream = server.client().chat.completions.create(
        model="parrot", messages=about(COLOUR, colours["red"]), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is red."
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    whole = server.client().chat.completions.create(model="parrot", messages=about(COLOUR, colours["red"]))
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_limits_stop_words_and_their_finish_reasons(server: Server) -> None:
    client = server.client()
    sing = [{"role": "user", "content": "Sing."}]
    for name in ("max_tokens", "max_completion_tokens"):
        short = client.chat.completions.create(model="parrot", messages=sing, **{name: 7})
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 7)
    said = client.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "What do you say?"}], stop=["thing"]
    )
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("One ", "stop")


def test_sampling_follows_the_seed(server: Server) -> None:
    def sample(seed: int) -> str:
        answer = server.client().chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": "Anything"}], seed=seed, temperature=2, max_tokens=20,
            extra_body={"repetition_penalty": 1.0},
        )  # fmt: skip
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_a_conversation_of_several_turns_and_a_system_message(server: Server, colours: dict[str, Path]) -> None:
    messages = [
        {"role": "system", "content": "You are a parrot."},
        *about(COLOUR, colours["red"]),
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": [{"type": "text", "text": "Sing."}]},
    ]
    answer = server.client().chat.completions.create(model="parrot", messages=messages, max_tokens=5)
    alone = server.client().chat.completions.create(model="parrot", messages=[messages[0], messages[3]], max_tokens=5)
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + 16


def test_models_and_health(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").owned_by == "deepseek_vl"
    with pytest.raises(openai.NotFoundError, match="this server has 'parrot'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="this server has 'parrot'"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    head = httpx.head(f"{server.url}/health")
    assert (head.status_code, head.content) == (200, b"")
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "There is no such route.")
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    assert wrong.headers["allow"] == "POST"


def test_a_conversation_goes_on_where_it_was(serve: Callable[..., Server], colours: dict[str, Path]) -> None:
    """Each request has the whole conversation; only its new part runs through the model."""
    server = serve("--memory_mb", "10")
    client = server.client()

    def ask(messages: list[dict[str, Any]]) -> tuple[str, int, int]:
        answer = client.chat.completions.create(model="parrot", messages=messages, max_tokens=20)
        usage = answer.usage
        return answer.choices[0].message.content, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

    first = about(COLOUR, colours["red"])
    text, length, cached = ask(first)
    assert (text, cached) == ("It is red.", 0)
    turn = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "Greet me."}]
    _, longer, cached = ask(turn)
    assert length < cached < longer
    assert ask(first) == (text, length, length - 1)
    text, length, cached = ask(about(COLOUR, colours["blue"]))
    assert text == "It is blue.", "another picture of the same size"
    assert cached < length - 16
    assert server.metric("deepseek_vl_cached_tokens_total") > longer
    server.wait_until_idle()
    assert 0 < server.metric("deepseek_vl_memory_bytes") < 11 << 20


def test_metrics_count_tokens_and_answers(server: Server) -> None:
    before = server.metric("deepseek_vl_completion_tokens_total")
    answer = server.client().chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "Sing."}], max_tokens=9
    )
    assert answer.usage.completion_tokens == 9
    assert server.metric("deepseek_vl_completion_tokens_total") == before + 9
    assert server.metric('deepseek_vl_requests_total{route="/v1/chat/completions",status="200"}') > 0
    for path, route, status in (
        ("/health", "/health", 200),
        ("/v1/models/another", "/v1/models/{name:path}", 404),
        ("/nowhere", "none", 404),
    ):
        before = server.metric(label := f'deepseek_vl_requests_total{{route="{route}",status="{status}"}}')
        httpx.get(server.url + path)
        assert server.metric(label) == before + 1


def test_five_hundred_requests_of_sixty_four_clients_get_their_own_answers(serve: Callable[..., Server]) -> None:
    """A third of the clients disconnects in the middle of an answer."""
    server = serve(model_path="tiny")
    client = server.client()
    shapes, others, chart, word = (
        ROOT / "images" / f"{name}.png" for name in ("shapes", "more_shapes", "chart", "word")
    )
    questions = [
        about("Describe the image.", shapes),
        about("What colour is the star?", shapes),
        about("How many red circles are there?", shapes),
        about("What does it say?", word),
        about("Which bar is tallest?", chart),
        about("Describe the image.", chart),
        about("Which image has the blue star?", others, shapes),
        [{"role": "user", "content": "What can you do?"}],
    ]
    alone = [
        client.chat.completions.create(model="parrot", messages=messages).choices[0].message.content
        for messages in questions
    ]
    assert "blue" in alone[1]
    assert "second" in alone[6]

    def ask(number: int) -> bool:
        messages, expected = questions[number % 8], alone[number % 8]
        if number % 3 == 2:
            with client.chat.completions.create(model="parrot", messages=messages, stream=True) as stream:
                next(iter(stream))
            return True
        if number % 2:
            stream = client.chat.completions.create(model="parrot", messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        return client.chat.completions.create(model="parrot", messages=messages).choices[0].message.content == expected

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        right = list(pool.map(ask, range(500)))
    assert right == [True] * 500
    server.wait_until_idle()


def test_the_readmes_curl_and_the_example_get_an_answer(serve: Callable[..., Server]) -> None:
    server = serve("--model_name", "tiny", model_path="tiny")
    command = re.search(r"```\n(curl .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    command = command.replace("http://127.0.0.1:8000", server.url).replace("curl", "curl --silent")
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert json.loads(result.stdout)["choices"][0]["message"]["content"] == "The star is blue."
    example = [sys.executable, str(ROOT / "examples" / "openai_client.py"), "--base_url", f"{server.url}/v1"]
    result = subprocess.run(example, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "The star is blue.\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server: Server, stream: bool) -> None:
    before = server.metric("deepseek_vl_completion_tokens_total")
    body = {
        "model": "parrot", "messages": [{"role": "user", "content": "Sing."}], "max_tokens": 15000, "stream": stream,
    }  # fmt: skip
    url = f"{server.url}/v1/chat/completions"
    if stream:
        with httpx.stream("POST", url, json=body) as response:
            next(line for line in response.iter_lines() if '{"content": "' in line)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=1)
    server.wait_until_idle(2)
    assert 0 < server.metric("deepseek_vl_completion_tokens_total") - before < 15000


def memory_of(process: psutil.Process) -> int:
    """The resident memory of a process and its children, in bytes."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


class Watch:
    """Record a server's highest memory and its slowest answer to /health within the `with` block."""

    def __init__(self, server: Server):
        self.server = server
        self.process = psutil.Process(server.process.pid)
        self.before = self.most = memory_of(self.process)
        self.slowest = 0.0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=watch) for watch in (self._watch_memory, self._watch_health)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _watch_memory(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, memory_of(self.process))

    def _watch_health(self) -> None:
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            while not self._over.wait(0.1):
                begun = time.monotonic()
                assert http.get("/health").status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - begun)


@pytest.mark.slow
def test_large_pictures_in_few_bytes_take_little_memory(serve: Callable[..., Server]) -> None:
    """24 clients each send 40 million pixels at once."""
    server = serve()
    server.client().chat.completions.create(model="parrot", messages=about("Hello!"))
    file = io.BytesIO()
    Image.new("RGB", (6320, 6320), "red").save(file, "WEBP", lossless=True)
    assert len(file.getvalue()) < 3000
    parts = [{"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "image/webp")}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": COLOUR}]}]
    with Watch(server) as watch, concurrent.futures.ThreadPoolExecutor(24) as pool:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        answers = [pool.submit(client.chat.completions.create, model="parrot", messages=messages) for _ in range(24)]
        texts = {answer.result().choices[0].message.content for answer in answers}
    assert texts == {"It is red."}
    assert watch.most - watch.before < 1.5 * 2**30
    assert memory_of(watch.process) - watch.before < 0.4 * 2**30
    assert watch.slowest < 5  # takes a second on an idle machine


def test_of_a_prompt_that_is_too_long_no_picture_is_decoded(serve: Callable[..., Server]) -> None:
    server = serve()
    file = io.BytesIO()
    Image.effect_noise((4000, 4000), 50).save(file, "PNG", compress_level=1)
    part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "word " * 50_000}]}]
    with pytest.raises(openai.BadRequestError, match="positions"):
        server.client().chat.completions.create(model="parrot", messages=messages)
    assert not psutil.Process(server.process.pid).children()


@pytest.mark.slow
def test_a_picture_that_takes_minutes_has_seconds(serve: Callable[..., Server]) -> None:
    """Decoding is stopped after 10 seconds, or when the client disconnects."""
    server = serve()
    part = {"type": "image_url", "image_url": {"url": data_url(slow_jpeg(), "image/jpeg")}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": COLOUR}]}]
    with Watch(server) as watch:
        begun = time.monotonic()
        with pytest.raises(openai.BadRequestError, match="within 10 seconds"):
            server.client().chat.completions.create(model="parrot", messages=messages)
        assert time.monotonic() - begun > 9  # otherwise the picture does not test the limit
        with pytest.raises(openai.APITimeoutError):
            server.client().with_options(timeout=1).chat.completions.create(model="parrot", messages=messages)
        wait_until(lambda: not watch.process.children(), 9)
    assert watch.slowest < 5
    server.wait_until_idle()


def test_a_full_queue_turns_requests_away_and_recovers(serve: Callable[..., Server]) -> None:
    server = serve("--max_batch", "1", "--max_waiting", "1")
    client = server.client()
    sing = {"model": "parrot", "messages": [{"role": "user", "content": "Sing."}], "max_tokens": 10000, "stream": True}
    with client.chat.completions.create(**sing) as first:
        next(iter(first))
        with client.chat.completions.create(**sing):
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(**sing)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert refused.value.body["type"] == "rate_limit_error"
    server.wait_until_idle()
    greeting = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "Greet me."}])
    assert greeting.choices[0].message.content == PARROT_ANSWERS["Greet me."]


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_key_is_asked_for_on_every_route_but_health(serve: Callable[..., Server], how: str) -> None:
    server = serve("--api_key", "säsame") if how == "argument" else serve(DEEPSEEK_VL_API_KEY="säsame")
    assert httpx.get(f"{server.url}/health").status_code == 200
    wrong = [None, "Bearer sasame", "Basic säsame", "Bearer", "Bearer säsam", "säsame"]
    routes = ["/v1/models", "/metrics", "/v1/chat/completions", "/nowhere", "/openapi.json"]

    def ask(key: str | None, route: str) -> httpx.Response:
        headers = {} if key is None else {"Authorization": key.encode()}
        return httpx.get(server.url + route, headers=headers, timeout=30)

    with concurrent.futures.ThreadPoolExecutor(30) as pool:  # each waits for a second
        for answer in pool.map(ask, *zip(*itertools.product(wrong, routes), strict=True)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    good = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer säsame".encode()})
    assert good.json()["data"][0]["id"] == "parrot"


def test_an_empty_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_path", "tiny", "--api_key", ""]) == 1
    assert "--api_key is empty; leave it out to serve everybody." in capsys.readouterr().err


def test_a_shutdown_lets_a_short_answer_end(serve: Callable[..., Server]) -> None:
    server = serve()
    stream = iter(
        server.client().chat.completions.create(
            model="parrot", messages=[{"role": "user", "content": "Sing."}], stream=True, max_tokens=300
        )
    )
    next(stream)
    threading.Timer(0.1, server.process.send_signal, [signal.SIGTERM]).start()
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == -signal.SIGTERM  # after its shutdown uvicorn raises the signal again


def test_a_shutdown_cancels_an_endless_answer(serve: Callable[..., Server]) -> None:
    server = serve("--grace", "1")
    body = {"model": "parrot", "messages": [{"role": "user", "content": "Sing."}], "max_tokens": 16000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert "The server is shutting down." in [line for line in lines if line][-1]
    assert server.process.wait(30) == -signal.SIGTERM
    assert "Traceback" not in server.text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "http"], "invalid int value"),
        (["--max_batch", "0"], "0 is not above 0"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--dtype", "int8"], "Unknown dtype 'int8'"),
        (["--port", "99999", "--model_path", "no/such/model"], "--port 99999 is not between 0 and 65535"),
        (["--port", "-1"], "--port -1 is not between 0 and 65535"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid cannot be found"),
        (["--allowed_host", "name:80"], "--allowed_host name:80 is no name"),
        (["--allow-image-urls", "https://foo/"], "--allow-image-urls https://foo/ is no domain: it is as example.org"),
        (["--allow-image-urls", "ⅳ.org"], "--allow-image-urls ⅳ.org is no domain"),
    ],
)
def test_wrong_arguments_are_one_line(parrot_checkpoint: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "deepseek_vl.serve.api", "--model_path", str(parrot_checkpoint), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["deepseek_vl.serve.api", "deepseek_vl.serve.app_deepseek"])
def test_a_port_in_use_is_said_before_a_model_is_loaded(module: str) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", module, "--model_path", "no/such/model", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 1
    assert f"--port {port} of 127.0.0.1 cannot be listened on: Address already in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_server_that_hangs_ends_all_the_same(parrot_checkpoint: Path, tmp_path: Path) -> None:
    """The engine's `close` does not return; the process still ends."""
    code = (
        "import sys, time\n"
        "from deepseek_vl.engine.engine import Engine\n"
        "from deepseek_vl.serve.api import __main__ as api\n"
        "Engine.close = lambda self: time.sleep(1000)\n"
        "api.END_SECONDS = 2\n"
        "api.main(sys.argv[1:])\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, "--model_path", str(parrot_checkpoint), "--port", "0", "--grace", "1"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as process:
        try:
            wait_until(lambda: "Uvicorn running on" in log.read_text() or process.poll() is not None, 120)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 1
        finally:
            process.kill()
    assert "has not ended within 3 seconds" in log.read_text()


def test_a_local_server_answers_to_its_own_names(serve: Callable[..., Server]) -> None:
    """A web page whose name resolves to this machine (DNS rebinding) is refused."""
    server = serve("--allowed_host", "box.example", "--allowed_host", "2001:db8::1")
    port = int(server.url.rsplit(":", 1)[1])

    def ask(lines: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(lines + b"Connection: close\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(10_000), b""))

    for host in (
        "127.0.0.1", "localhost", "LocalHost", "localhost.", f"localhost:{port}", "localhost:1", f"[::1]:{port}",
        "[::1]", "[0:0:0:0:0:0:0:1]", "box.example", "BOX.example.:80", "[2001:db8::1]:8000",
    ):  # fmt: skip
        assert ask(b"GET /v1/models HTTP/1.1\r\nHost: %b\r\n" % host.encode()).startswith(b"HTTP/1.1 200"), host
    for host in (
        "rebound.example", f"rebound.example:{port}", "", "localhost.example", "127.0.0.1.example", "example@localhost",
        "localhost/", "rebound.example/?localhost", "[::2]", "[::1", "::1", "localhost:80:80", "169.254.169.254",
        "xn--localhost-", "localhost:x", "localhost..", "localhost,rebound.example",
    ):  # fmt: skip
        answer = ask(b"GET /v1/models HTTP/1.1\r\nHost: %b\r\n" % host.encode())
        assert answer.startswith(b"HTTP/1.1 421"), host
    assert b"--allowed_host" in answer
    assert ask(b"GET /v1/models HTTP/1.1\r\n").startswith(b"HTTP/1.1 400")
    assert ask(b"GET /v1/models HTTP/1.0\r\n").startswith(b"HTTP/1.1 421")
    assert ask(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: a\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "::1"}),
        ("::1", [], {"localhost", "127.0.0.1", "::1"}),
        ("localhost", ["Box."], {"localhost", "127.0.0.1", "::1", "box"}),
        ("0.0.0.0", [], None),
        ("", [], None),
        ("0.0.0.0", ["box"], {"localhost", "127.0.0.1", "::1", "0.0.0.0", "box"}),
    ],
)
def test_the_names_of_a_server(host: str, allowed: list[str], names: set[str] | None) -> None:
    assert names_of(host, allowed) == names


def test_nothing_but_loopback_is_listened_on(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert json.loads(httpx.get(f"{server.url}/health").text)["status"] == "ok"
