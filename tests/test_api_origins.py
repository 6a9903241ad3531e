"""Cross-origin requests (`--allow_origin`) of pages in a real browser."""

import http.server
import inspect
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PARROT_ANSWERS, ROOT
from starlette.middleware.cors import CORSMiddleware

from deepseek_vl.serve.listening import checked_origin

GREETING = PARROT_ANSWERS["Greet me."]
ASK = """async ([url, key, stream]) => {
    const headers = {"Content-Type": "application/json", "Authorization": `Bearer ${key}`, "X-Stainless-Lang": "js"};
    const messages = [{role: "user", content: "Greet me."}];
    try {
        const body = JSON.stringify({model: "parrot", messages, stream});
        const answer = await fetch(`${url}/v1/chat/completions`, {method: "POST", headers, body});
        return [answer.status, await answer.text()];
    } catch (error) {
        return [0, String(error)];
    }
}"""


class Page(http.server.BaseHTTPRequestHandler):
    """An empty page of another origin."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>elsewhere</title>")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pages() -> Iterator[list[str]]:
    """The addresses of two pages, each of an origin that is not the server's."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_address[1]}" for server in servers]
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., tuple[int, str]]]:
    """A function that asks a server from a page in a browser; returns the status and the text."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def from_page(page_url: str, url: str, key: str = "sesame", stream: bool = False) -> tuple[int, str]:
            page = browser.new_page()
            try:
                page.goto(page_url)
                return tuple(page.evaluate(ASK, [url, key, stream]))
            finally:
                page.close()

        yield from_page
        browser.close()


def test_a_page_of_an_allowed_origin_may_ask(serve: Any, pages: list[str], ask: Callable[..., tuple[int, str]]) -> None:
    """A page of an allowed origin gets whole and streamed answers with a key, and can read errors."""
    allowed, other = pages
    server = serve("--allow_origin", allowed, "--allow_origin", "https://example.com", "--api_key", "sesame")
    status, text = ask(allowed, server.url)
    assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, GREETING)
    status, text = ask(allowed, server.url, stream=True)
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    status, text = ask(allowed, server.url, key="wrong")
    assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
    assert ask(other, server.url)[0] == 0, "the browser keeps it from the page"


def test_no_page_may_ask_by_default(serve: Any, pages: list[str], ask: Callable[..., tuple[int, str]]) -> None:
    server = serve()
    assert ask(pages[0], server.url)[0] == 0
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": pages[0]})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = httpx.options(
        f"{server.url}/v1/chat/completions", headers={"Origin": pages[0], "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 405


def test_every_page_may_ask_where_all_are_allowed(
    serve: Any, pages: list[str], ask: Callable[..., tuple[int, str]]
) -> None:
    server = serve("--allow_origin", "*")
    for page in pages:
        assert ask(page, server.url)[0] == 200


def test_the_headers_of_a_preflight(serve: Any) -> None:
    server = serve(
        "--allow_origin", "HTTP://LocalHost:3000", "--allow_origin", "https://b.example:443", "--api_key", "k"
    )

    def preflight(origin: str, method: str = "POST", headers: str = "authorization,content-type,x-stainless-os") -> Any:
        return httpx.options(
            f"{server.url}/v1/chat/completions",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": headers,
            },
        )

    for origin in ("http://localhost:3000", "https://b.example"):
        answer = preflight(origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers
        answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin, "Authorization": "Bearer k"})
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-expose-headers"] == "Retry-After"
        missing = httpx.get(f"{server.url}/nowhere", headers={"Origin": origin, "Authorization": "Bearer k"})
        assert (missing.status_code, missing.headers["access-control-allow-origin"]) == (404, origin)
    for origin in (
        "http://localhost:3001",
        "https://localhost:3000",
        "null",
        "http://b.example",
        "https://b.example.c",
    ):
        assert "access-control-allow-origin" not in preflight(origin).headers
    assert preflight("http://localhost:3000", "DELETE").status_code == 400
    if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
        private = {"Origin": "https://b.example", "Access-Control-Request-Method": "GET"}
        private["Access-Control-Request-Private-Network"] = "true"
        answer = httpx.options(f"{server.url}/v1/models", headers=private)
        assert answer.headers["access-control-allow-private-network"] == "true"
    # The Host header is checked in preflights as well.
    rebound = httpx.options(
        f"{server.url}/v1/models",
        headers={"Host": "rebound.example", "Origin": "http://localhost:3000", "Access-Control-Request-Method": "GET"},
    )
    assert rebound.status_code == 421


@pytest.mark.parametrize(
    ("origin", "checked"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("HTTPS://Example.com:443", "https://example.com"),
        ("http://example.com:80", "http://example.com"),
        ("http://[::1]:5173", "http://[::1]:5173"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_origins_are_written_as_browsers_write_them(origin: str, checked: str) -> None:
    assert checked_origin(origin) == checked


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "http://a/", "http://a/b", "http://", "http://a@b", "", "a", "http://a b"]
)
def test_what_is_no_origin_is_said_in_one_line(parrot_checkpoint: Path, origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        checked_origin(origin)
    if origin in ("localhost:3000", "http://a/"):
        command = [
            sys.executable,
            "-m",
            "deepseek_vl.serve.api",
            "--model_path",
            str(parrot_checkpoint),
            "--allow_origin",
            origin,
        ]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
