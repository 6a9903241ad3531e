"""Hostile and broken requests: each gets a clear 4xx, or a right answer if it is valid, and does no harm.

Names are resolved and connections opened by test doubles: every connection goes to a server on loopback.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import http.server
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx
import jinja2
import psutil
import pytest
import uvicorn
from conftest import data_url, png_that_declares, wait_until
from PIL import Image

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.limits import EngineLimits, RequestLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.api.app import create_app
from deepseek_vl.serve.api.connection import connections
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fetch import ImageFetcher, checked_domain, is_public
from deepseek_vl.serve.api.service import Service
from deepseek_vl.serve.inference import load_model
from deepseek_vl.serve.listening import names_of

PUBLIC = "93.184.216.34"


def png(colour: str = "red", size: tuple[int, int] = (50, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def jpeg_cut_off() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(file, "JPEG")
    return file.getvalue()[:3000]


class Origin(http.server.BaseHTTPRequestHandler):
    """The web server behind every URL of these tests."""

    seen: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        self.seen.append((self.headers["Host"], self.path))
        redirects = {
            "/to-private": "http://internal.example/red.png",
            "/to-loopback": "http://127.0.0.1:80/red.png",
            "/to-metadata": "http://169.254.169.254/latest/meta-data",
            "/to-file": "file:///etc/passwd",
            "/to-elsewhere": "http://elsewhere.example/red.png",
            "/to-backslash": "http:\\\\internal.example\\red.png",
            "/round": "/round",
            "/once": "/red.png",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.1)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(bytes(2**16))
        elif self.path == "/error":
            self.send_response(500)
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png() if self.path.startswith("/red.png") else b"<svg/>")

    def log_message(self, *args: Any) -> None:
        pass


class Dialler(httpcore.AsyncNetworkBackend):
    """Record each address, and connect to the `Origin` on loopback instead."""

    def __init__(self, port: int):
        self.port = port
        self.dialled: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.dialled.append((host, port))
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, *args, **kwargs)


class Names:
    """Resolve names from a table; `rebind.example` is public at the first look-up and private afterwards."""

    table = {
        "pictures.example": [PUBLIC],
        "sub.pictures.example": [PUBLIC],
        "elsewhere.example": [PUBLIC],
        "internal.example": ["10.0.0.7"],
        "metadata.example": ["169.254.169.254"],
        "mixed.example": [PUBLIC, "127.0.0.1"],
        "six.example": ["::ffff:127.0.0.1"],
    }

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host == "rebind.example":
            return [PUBLIC] if self.asked.count(host) == 1 else ["127.0.0.1"]
        if host in self.table:
            return self.table[host]
        try:  # numeric addresses, in every notation that the system's resolver reads, need no look-up
            return [address[0] for *_, address in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]
        except socket.gaierror:
            try:
                return [socket.inet_ntoa(socket.inet_aton(host))]
            except OSError:
                raise socket.gaierror(f"{host} is not known") from None


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service):
        self.service = service
        config = uvicorn.Config(
            create_app(service), port=0, log_level="warning", http=connections(service.limits), ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started, 60)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def post(self, content: bytes | dict[str, Any], **kwargs: Any) -> httpx.Response:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **kwargs.pop("headers", {})}
        return httpx.post(self.url, content=content, headers=headers, timeout=60, **kwargs)

    def is_well(self) -> None:
        """Assert that the next request is answered correctly, and that no request holds a place."""
        answer = self.post(asking("Colour?", data_url(png("blue"))))
        assert answer.json()["choices"][0]["message"]["content"] == "It is blue."
        assert self.service.places_taken == 0

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


def asking(text: str, *urls: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": "parrot",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": 20,
        **fields,
    }


@pytest.fixture(scope="module")
def origin() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def start(parrot_checkpoint: Path, origin: int) -> Iterator[Start]:
    tokenizer, model, processor = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    engine = Engine(model, tokenizer)
    running: list[Running] = []

    def begin(key: str | None = None, names: frozenset[str] | None = None, **fetcher: Any) -> Running:
        limits = RequestLimits(
            head_seconds=1.5, body_bytes=2**22, body_seconds=1.5, bodies_bytes=2**24, fetch_seconds=1.5,
            fetch_bytes=2**20, refusal_seconds=0.5, refusals=4, send_seconds=2,
        )  # fmt: skip
        fetcher = ImageFetcher(**{"resolve": Names(), "dialler": Dialler(origin), "limits": limits, **fetcher})
        settings = GenerationSettings(max_new_tokens=50)
        service = Service("parrot", engine, processor, settings, key, names, limits, fetcher)
        running.append(Running(service))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def closed(start: Start) -> Running:
    """A server with the default settings: it fetches no URLs."""
    return start()


@pytest.fixture(scope="module")
def opened(start: Start) -> Running:
    """A server that fetches images from public addresses."""
    return start(allowed=True)


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": "Greet me.", **fields}]}


RED = data_url(png())
BOMB = data_url(png_that_declares(50_000, 50_000))
SMALL_BOMB = data_url(png_that_declares(8000, 8000))
REFUSED: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "no body": (b"", 400, "not JSON"),
    "bad JSON": (b'{"model": "parrot", ', 400, "not JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "not JSON in UTF-8"),
    "NaN": (b'{"model": "parrot", "messages": [], "temperature": NaN}', 400, "not JSON"),
    "deep nesting": (b"[" * 200_000, 400, "nested deeper than 64"),
    "deep nesting inside": (b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}", 400, "nested deeper than 64"),
    "closed before it opens": (b"]" * 4_000_000, 400, "not JSON"),
    "a million zeros": (message(content=[0] * 1_000_000), 400, "more than 20000 names and values"),
    "a million messages": ({"model": "parrot", "messages": [{}] * 1_000_000}, 400, "more than 20000 names"),
    "a million stop words": (asking("hi", stop=["a"] * 800_000), 400, "more than 20000 names"),
    "a million unknown keys": ({str(i): 0 for i in range(300_000)}, 400, "more than 20000 names"),
    "a million of the same key": (b"{" + b'"a":0,' * 600_000 + b'"a":0}', 400, "more than 20000 names"),
    "9,000 unknown keys": (asking("hi", **{str(i): 0 for i in range(9000)}), 400, "Unsupported parameter '0'"),
    "15,000 wrong parts": (message(content=[0] * 15_000), 400, "'messages.0.content.0'"),
    "commas": (b"," * 4_000_000, 400, "not JSON"),
    "space behind": (b"{}" + b" " * 4_000_000, 400, "'model': Field required"),
    "backslashes": (b'{"model": "' + b"\\\\" * 1_000_000 + b'"}', 400, "more than 1000000 backslashes"),
    "a string without end": (b'{"model": "' + b'\\"' * 900_000, 400, "not JSON"),
    "a long key": ({"k" * 4_000_000: 1, **asking("hi")}, 400, "Unsupported parameter 'kkk"),
    "a long role": (message(role="k" * 4_000_000), 400, "'messages.0': 'role' should be one of 'system',"),
    "a list": (b"[]", 400, "The request: "),
    "null": (b"null", 400, "The request: "),
    "a number of 10,000 digits": (b'{"model": ' + b"9" * 10_000 + b"}", 400, "more than 1000 digits"),
    "a fraction of 4 MB": (b'{"model": 0.' + b"9" * 4_000_000 + b"}", 400, "more than 1000 digits"),
    "infinity": (b'{"model": "parrot", "messages": [], "temperature": 1e999}', 400, "number that is too large: "),
    "no messages": ({"model": "parrot"}, 400, "'messages': Field required"),
    "empty messages": ({"model": "parrot", "messages": []}, 400, "'messages'"),
    "messages as text": ({"model": "parrot", "messages": "hi"}, 400, "'messages'"),
    "a message as text": ({"model": "parrot", "messages": ["hi"]}, 400, "'messages.0'"),
    "unknown role": (message(role="king"), 400, "'messages.0'"),
    "no role": ({"model": "parrot", "messages": [{"content": "hi"}]}, 400, "'messages.0'"),
    "content is a number": (message(content=5), 400, "'messages.0.content'"),
    "content is null": (message(content=None), 400, "'messages.0.content'"),
    "no content": (message(content=""), 400, "A user message is empty"),
    "white space": (message(content=" \n\t"), 400, "A user message is empty"),
    "unknown part": (message(content=[{"type": "input_audio", "input_audio": {}}]), 400, "'messages.0.content.0'"),
    "image from the assistant": (
        message(role="assistant", content=[{"type": "image_url", "image_url": {"url": RED}}]),
        400,
        "'messages.0.content.0",
    ),
    "the assistant's turn": (
        {"model": "parrot", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        400,
        "continue_final_message has it continued",
    ),
    "a late system message": (
        {"model": "parrot", "messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        400,
        "has a place for system messages at the beginning only",
    ),
    "unknown field": (asking("hi", tool=[0]), 400, "Unsupported parameter 'tool'"),
    "unknown field inside": (message(audio="x"), 400, "Unsupported parameter 'messages.0.audio'"),
    "prototype": (asking("hi", __proto__={"a": 1}), 400, "Unsupported parameter '__proto__'"),
    "many answers": (asking("hi", n=9), 400, "'n'"),
    "logprobs": (asking("hi", logprobs=1), 400, "'logprobs'"),
    "negative tokens": (asking("hi", max_tokens=-1), 400, "'max_tokens'"),
    "tokens as text": (asking("hi", max_tokens="5"), 400, "'max_tokens'"),
    "tokens as a boolean": (asking("hi", max_tokens=True), 400, "'max_tokens'"),
    "two limits": (asking("hi", max_completion_tokens=7), 400, "max_tokens and max_completion_tokens differ"),
    "temperature": (asking("hi", temperature=-1), 400, "'temperature'"),
    "top_p": (asking("hi", top_p=-0.1), 400, "'top_p'"),
    "seed": (asking("hi", seed=2**70), 400, "'seed'"),
    "stop words": (asking("hi", stop=["a"] * 5), 400, "'stop'"),
    "stream as text": (asking("hi", stream="yes"), 400, "'stream'"),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not JSON in UTF-8"),
    "lone surrogate as a key": (b'{"\\udfff": 1}', 400, "not JSON in UTF-8"),
    "a prompt of a million characters": (asking("word " * 200_000), 400, "positions"),
    "a prompt that is too long to be tokenized": (asking("a" * 4_000_000), 400, "4000"),
    "a number beyond all": (b'{"model": "parrot", "messages": [], "user": 1e999}', 400, "too large: 1e999."),
    "a body of 100 MB": (b" " * 100_000_000, 413, "larger than 4194304 bytes"),
    "a thousand images": (asking("hi", *[RED] * 1000), 400, "1000 images; at most 16"),
    "decompression bomb": (asking("hi", BOMB), 400, "more than 40000000 pixels"),
    "a bomb below Pillow's limit": (asking("hi", SMALL_BOMB), 400, "more than 40000000 pixels"),
    "SVG": (asking("hi", data_url(b"<svg/>", "image/svg+xml")), 400, "Image 1 cannot be read"),
    "EPS": (asking("hi", data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "Image 1 cannot"),
    "a million escapes": (asking("hi", "data:image/png," + "%00" * 1_000_001), 400, "Image 1 cannot be read"),
    "truncated JPEG": (asking("hi", data_url(jpeg_cut_off(), "image/jpeg")), 400, "Image 1 cannot be read"),
    "truncated PNG": (asking("hi", data_url(png()[:40])), 400, "Image 1 cannot be read"),
    "the second image": (asking("hi", RED, data_url(b"")), 400, "Image 2 cannot be read"),
    "HTML": (asking("hi", data_url(b"<html>")), 400, "Image 1 cannot be read"),
    "not base64": (asking("hi", "data:image/png;base64,????"), 400, "Image 1 cannot be read"),
    "no base64": (asking("hi", "data:image/png,abc"), 400, "Image 1 cannot be read"),
    "data of no image": (asking("hi", "data:text/html;base64,aGk="), 400, "Image 1 cannot be read"),
    "an empty URL": (asking("hi", ""), 400, "This is no picture"),
    "a path": (asking("hi", "/etc/passwd"), 400, "This is no picture"),
    "file://": (asking("hi", "file:///etc/passwd"), 400, "This is no picture"),
    "a URL where none is fetched": (asking("hi", "http://pictures.example/red.png"), 400, "not fetched"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(closed: Running, name: str) -> None:
    content, status, words = REFUSED[name]
    answer = closed.post(content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert len(error["message"]) < 300
    # Errors reveal neither the machine nor the messages of libraries.
    assert not any(
        leak in answer.text for leak in ("Traceback", "/work", "site-packages", "object at 0x", "PIL", "BytesIO")
    )
    closed.is_well()


URLS = {
    "loopback": ("http://127.0.0.1/red.png", "not a public address"),
    "loopback by name": ("http://localhost/red.png", ""),
    "metadata": ("http://169.254.169.254/latest/meta-data/", "not a public address"),
    "metadata by name": ("http://metadata.example/", "not a public address"),
    "a name that resolves to a private address": ("http://internal.example/red.png", "not a public address"),
    "a name with a public and a private address": ("http://mixed.example/red.png", "not a public address"),
    "IPv4 in IPv6": ("http://six.example/red.png", "not a public address"),
    "IPv6 loopback": ("http://[::1]/red.png", "not a public address"),
    "IPv6 unspecified": ("http://[::]/red.png", "not a public address"),
    "NAT64": ("http://[64:ff9b::7f00:1]/red.png", "not a public address"),
    "6to4": ("http://[2002:7f00:1::]/red.png", "not a public address"),
    "link-local": ("http://[fe80::1]/red.png", "not a public address"),
    "decimal": ("http://2130706433/red.png", "not a public address"),
    "octal": ("http://0177.0.0.1/red.png", ""),
    "hexadecimal": ("http://0x7f.1/red.png", "not a public address"),
    "short": ("http://127.1/red.png", "not a public address"),
    "zero": ("http://0/red.png", "not a public address"),
    "userinfo": ("http://pictures.example@127.0.0.1/red.png", "user name"),
    "userinfo the other way": ("http://127.0.0.1@pictures.example/red.png", "user name"),
    "a password": ("http://a:b@pictures.example/red.png", "user name"),
    "backslash": ("http://pictures.example\\@127.0.0.1/red.png", "backslash"),
    "backslashes": ("http:\\\\127.0.0.1\\red.png", "backslash"),
    "white space": ("http://pictures.example /red.png", "spaces"),
    "a header in the path": ("http://pictures.example/\r\nHost: 127.0.0.1", "control characters"),
    "no host": ("http:///red.png", ""),
    "no such name": ("http://nowhere.example/red.png", "cannot be reached"),
    "a port that is none": ("http://pictures.example:99999/red.png", "a port that is none"),
    "file": ("file:///etc/passwd", "neither http nor https"),
    "ftp": ("ftp://pictures.example/red.png", "neither http nor https"),
    "gopher": ("gopher://127.0.0.1:6379/_INFO", "neither http nor https"),
    "a local path": ("../images/red.png", "neither http nor https"),
    "redirect to a private name": ("http://pictures.example/to-private", "not a public address"),
    "redirect to loopback": ("http://pictures.example/to-loopback", "not a public address"),
    "redirect to the metadata": ("http://pictures.example/to-metadata", "not a public address"),
    "redirect to a file": ("http://pictures.example/to-file", "neither http nor https"),
    "redirect with backslashes": ("http://pictures.example/to-backslash", "backslash"),
    "redirect without end": ("http://pictures.example/round", "more than 3 times"),
    "an endless body": ("http://pictures.example/endless", "larger than 1048576 bytes"),
    "a slow body": ("http://pictures.example/slow", "within 1.5 seconds"),
    "an error": ("http://pictures.example/error", "status 500"),
    "no picture": ("http://pictures.example/page", "Image 1 cannot be read"),
}


@pytest.mark.parametrize("name", URLS)
def test_urls_refused_where_urls_are_fetched(opened: Running, name: str) -> None:
    url, words = URLS[name]
    dialler = opened.service.fetcher.dialler
    dialler.dialled.clear()
    answer = opened.post(asking("Colour?", url))
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert {host for host, _ in dialler.dialled} <= {PUBLIC}
    opened.is_well()


@pytest.mark.parametrize("path", ["/red.png", "/once", "/red.png?a=b&c=%20d"])
def test_a_public_image_is_fetched(opened: Running, path: str) -> None:
    Origin.seen.clear()
    answer = opened.post(asking("Colour?", f"http://pictures.example{path}"))
    assert answer.json()["choices"][0]["message"]["content"] == "It is red."
    assert Origin.seen[0] == ("pictures.example", path)


def test_an_allowed_domain_has_subdomains_and_no_lookalikes(start: Start) -> None:
    server = start(allowed=True, domains=("pictures.example",))
    for host in ("pictures.example", "sub.pictures.example", "PICTURES.example", "pictures.example."):
        Names.table.setdefault(host.rstrip(".").lower() + ".", [PUBLIC])
        assert server.post(asking("Colour?", f"http://{host}/red.png")).status_code == 200
    for host in ("elsewhere.example", "notpictures.example", "pictures.example.elsewhere.example"):
        answer = server.post(asking("Colour?", f"http://{host}/red.png"))
        assert "domain is not among those" in answer.json()["error"]["message"]
    answer = server.post(asking("Colour?", "http://pictures.example/to-elsewhere"))
    assert "domain is not among those" in answer.json()["error"]["message"]


@pytest.mark.parametrize("allowed", ["Bücher.example", "xn--bcher-kva.example"])
def test_an_allowed_domain_may_have_letters_beyond_ascii(start: Start, allowed: str) -> None:
    assert checked_domain("हिन्दी.भारत") == "xn--j2bd4cyah0f.xn--h2brj9c"  # with marks, which are no letters
    server = start(allowed=True, domains=(checked_domain(allowed),))
    Names.table["xn--bcher-kva.example"] = Names.table["bucher.example"] = [PUBLIC]
    for host in ("bücher.example", "BÜCHER.example", "xn--bcher-kva.example"):
        assert server.post(asking("Colour?", f"http://{host}/red.png")).status_code == 200
    assert server.post(asking("Colour?", "http://bucher.example/red.png")).status_code == 400


# --- named after advisories against other servers ---


@pytest.mark.parametrize("url", ["http://internal.example/red.png", "http://pictures.example/to-private"])
def test_cve_2025_6242_server_side_request_forgery(opened: Running, url: str) -> None:
    """A media URL, or its redirect, must not reach into the server's own network."""
    opened.service.fetcher.dialler.dialled.clear()
    assert opened.post(asking("Colour?", url)).status_code == 400
    assert "10.0.0.7" not in {host for host, _ in opened.service.fetcher.dialler.dialled}
    opened.is_well()


def test_cve_2026_24779_two_parsers_see_two_hosts(start: Start) -> None:
    """The check and the HTTP client must read the same host in a URL."""
    server = start(allowed=True, domains=("pictures.example",))
    for url in (
        "http://internal.example\\@pictures.example/red.png",
        "http://pictures.example\\.internal.example/red.png",
        "http://internal.example#@pictures.example/red.png",
        "http://internal.example?@pictures.example/red.png",
        "http://pictures.example:80@internal.example/red.png",
        "http://pictures.example%2f@internal.example/red.png",
        "http://internal.example%23.pictures.example/red.png",
    ):
        answer = server.post(asking("Colour?", url))
        assert answer.status_code == 400, url
    assert server.service.fetcher.dialler.dialled == []


def test_cve_2026_24779_dns_rebinding(start: Start) -> None:
    """A second look-up of the name would give a private address: the address that was checked is the one dialled."""
    server = start(allowed=True)
    answer = server.post(asking("Colour?", "http://rebind.example/red.png"))
    assert answer.json()["choices"][0]["message"]["content"] == "It is red."
    assert server.service.fetcher.resolve.asked == ["rebind.example"]
    assert server.service.fetcher.dialler.dialled == [(PUBLIC, 80)]
    assert server.post(asking("Colour?", "http://rebind.example/red.png")).status_code == 400
    assert len(server.service.fetcher.dialler.dialled) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 200), (2, 2)])
def test_cve_2026_22773_tiny_images_do_not_end_the_server(closed: Running, size: tuple[int, int]) -> None:
    """A picture whose sides were taken for channels killed another server's engine."""
    answer = closed.post(asking("Colour?", data_url(png(size=size))))
    assert answer.status_code == 200
    closed.is_well()


def test_cve_2026_22778_errors_tell_no_addresses(closed: Running) -> None:
    """Another server passed on a decoder's error with an object's address, which helps to break ASLR."""
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", png()[:60], b"GIF89a", b"RIFF\0\0\0\0WEBP", bytes(100)):
        answer = closed.post(asking("Colour?", data_url(data)))
        assert answer.status_code == 400
        assert "0x" not in answer.text
        assert "cannot identify" not in answer.text
    closed.is_well()


@pytest.mark.parametrize("n", [9, 10**9, 10**400, -1, 0, "1", [1], 1.5, True])
def test_cve_2026_34756_many_answers_are_not_begun(closed: Running, n: Any) -> None:
    """A huge `n` made another server copy a request `n` times before any check."""
    begun = time.monotonic()
    answer = closed.post(asking("Colour?", RED, n=n))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert time.monotonic() - begun < 5
    closed.is_well()


@pytest.mark.parametrize("kind", ["video/jpeg", "image/png"])
def test_cve_2026_34755_frames_in_a_data_url(closed: Running, kind: str) -> None:
    """Another server decoded and kept thousands of frames, separated by commas in one data URL."""
    frames = ",".join([RED.partition(",")[2]] * 5000)
    begun = time.monotonic()
    answer = closed.post(asking("Colour?", f"data:{kind};base64,{frames}"))
    assert answer.status_code == 400
    assert "Image 1 cannot be read" in answer.json()["error"]["message"]
    assert time.monotonic() - begun < 5
    closed.is_well()


def test_cve_2026_5497_of_a_picture_with_thousands_of_frames_the_first_is_seen(closed: Running) -> None:
    file = io.BytesIO()
    first, *others = [Image.new("P", (50, 40), number % 2) for number in range(3000)]
    for frame in (first, *others):
        frame.putpalette([255, 0, 0, 0, 0, 255])
    first.save(file, "GIF", save_all=True, append_images=others)
    assert Image.open(io.BytesIO(file.getvalue())).n_frames == 3000
    begun = time.monotonic()
    answer = closed.post(asking("Colour?", data_url(file.getvalue(), "image/gif")))
    assert answer.json()["choices"][0]["message"]["content"] == "It is red."
    assert time.monotonic() - begun < 8
    closed.is_well()


def test_cve_2026_44222_a_typed_placeholder_is_text(closed: Running) -> None:
    """More image placeholders in the text than images ended another server's engine."""
    tag = closed.service.processor.image_tag
    for question, *pictures in (
        (tag, ),
        (f"{tag}Colour?",),
        (tag * 50,),
        (f"{tag}{tag}Colour?", RED),
        (f"Colour?{tag}", RED, RED),
        (tag[:-1], RED),
    ):  # fmt: skip
        answer = closed.post(asking(question, *pictures))
        assert answer.status_code == 200, answer.text
        plain = closed.post(asking("Colour?", *pictures)).json()["usage"]["prompt_tokens"]
        assert answer.json()["usage"]["prompt_tokens"] - plain < 16 * 50
    roles = [
        {"role": "system", "content": tag},
        {"role": "user", "content": "Greet me."},
        {"role": "assistant", "content": tag},
        {"role": "user", "content": "Greet me."},
    ]
    assert closed.post({"model": "parrot", "messages": roles, "max_tokens": 5}).status_code == 200
    assert closed.post(asking("Colour?", stop=[tag])).status_code == 200
    closed.is_well()


def test_cve_2026_34753_each_address_of_many_is_checked(opened: Running) -> None:
    """Another server checked the URLs of single requests, but not those of batches."""
    dialler = opened.service.fetcher.dialler
    good, bad = "http://pictures.example/red.png", "http://internal.example/red.png"
    for urls in ((bad, good), (good, bad), (good,) * 8 + (bad,)):
        dialler.dialled.clear()
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]} for url in urls]
        answer = opened.post({"model": "parrot", "messages": messages})
        assert answer.status_code == 400
        assert "not a public address" in answer.json()["error"]["message"]
        assert {host for host, _ in dialler.dialled} <= {PUBLIC}
    opened.is_well()


def test_ghsa_94f4_hr76_p5j6_no_way_around_the_key(start: Start) -> None:
    """The key is checked for the path that is routed, however the path and Host are written."""
    server = start(key="sesame")
    question = json.dumps(asking("Greet me.")).encode()
    targets = [
        "/v1/models", "//v1/models", "/v1/models/", "/health/../v1/models", "/health/..%2fv1/models", "/%76%31/models",
        "/v1/models?/health", "/v1/models#/health", "/v1/models;/health", "/V1/models", "/health/", "/health%2f",
        "/health%00", "http://x/v1/models", "http://x/health/../metrics", "/metrics", "/openapi.json", "/docs", "*",
    ]  # fmt: skip
    heads = [
        "", "X-Original-URL: /health\r\n", "X-Rewrite-URL: /health\r\n", "X-Forwarded-Prefix: /health\r\n",
        "X-HTTP-Method-Override: OPTIONS\r\n", "Authorization: Bearer \r\n", "Authorization: Basic c2VzYW1l\r\n",
        "Authorization: Bearer sesam\r\n", "Authorization: Bearer sesame sesame\r\n", "Cookie: key=sesame\r\n",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n",
    ]  # fmt: skip
    hosts = ["x", "x/health?", "x/health#", "/health", "x:80/health?a="]
    requests = [(method, "/v1/models", "x", "") for method in ("GET", "HEAD", "OPTIONS", "PUT", "TRACE", "HEALTH")]
    requests += [("GET", target, "x", "") for target in targets] + [("GET", "/v1/models", "x", head) for head in heads]
    requests += [("POST", "/v1/chat/completions", host, head) for host in hosts for head in heads[:2]]

    def ask(method: str, target: str, host: str, head: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            body = f"Content-Type: application/json\r\nContent-Length: {len(question)}\r\n" if method == "POST" else ""
            lines = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{head}{body}\r\n".encode()
            connection.sendall(lines + (question if body else b""))
            return connection.recv(10_000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # as many wrong keys as may wait at a time
        for request, answer in zip(requests, pool.map(ask, *zip(*requests, strict=True)), strict=True):
            status = answer.split(b" ")[1]
            assert status == b"401" or (status == b"400" and (request[1] == "*" or request[2] != "x")), request
    assert ask("GET", "/v1/models", "x", "Authorization: Bearer sesame\r\n").split(b" ")[1] == b"200"


def test_cve_2026_5760_a_checkpoints_template_is_rendered_in_a_sandbox(
    parrot_checkpoint: Path, tmp_path: Path, start: Start
) -> None:
    """A checkpoint's template ran commands in another server: this one renders none, and the processor sandboxes it."""
    trace = tmp_path / "trace"
    checkpoint = shutil.copytree(parrot_checkpoint, tmp_path / "checkpoint")
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(trace) + "') }}{{ ''.__class__.__mro__ }}"
    (checkpoint / "chat_template.jinja").write_text(template)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    tokenizer, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    server = Running(Service("parrot", Engine(model, tokenizer), processor, GenerationSettings(max_new_tokens=50)))
    try:
        server.is_well()
    finally:
        server.stop()
    for templated in (processor, tokenizer):
        with contextlib.suppress(jinja2.exceptions.TemplateError):
            text = templated.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
            assert "class" not in text
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    assert not trace.exists()


# --- odd, but right ---


def tokens_of(server: Running, text: str) -> int:
    answer = server.post(asking(text))
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens"]


def test_special_tokens_typed_by_a_user_are_text(closed: Running) -> None:
    processor = closed.service.processor
    for token in (processor.image_tag, processor.tokenizer.eos_token, processor.tokenizer.bos_token):
        plain, typed = tokens_of(closed, "Greet me."), tokens_of(closed, f"Greet me.{token}")
        assert typed - plain > 3, token
    answer = closed.post(asking(f"Colour?{processor.image_tag * 30}", RED))
    assert answer.status_code == 200
    closed.is_well()


def test_odd_but_harmless(closed: Running) -> None:
    for text in ("\0", "\ufdd0", "\u202e", "🏳️‍🌈" * 50, "User: hi\n\nAssistant:", "{system_message}", "\x1b[31m"):
        assert tokens_of(closed, f"a{text}") > 0
    roles = [{"role": "user", "content": "Greet"}, {"role": "user", "content": "me."}]
    assert closed.post({"model": "parrot", "messages": roles, "max_tokens": 5}).status_code == 200
    ignored = asking("Greet me.", user="someone", n=1, presence_penalty=0, stop=None, seed=None)
    assert closed.post(ignored).status_code == 200


def test_other_content_types_are_refused(closed: Running) -> None:
    """A browser sends these content types to loopback without a CORS preflight."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = closed.post(asking("Greet me."), headers={"Content-Type": kind})
        assert "Content-Type application/json" in answer.json()["error"]["message"]
    assert (
        closed.post(asking("Greet me."), headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200
    )


def answer_from(connection: socket.socket) -> bytes:
    """The bytes that the server sends on a connection, up to the end of a response's JSON."""
    connection.settimeout(10)
    answer = b""
    while not answer.endswith(b"}") and (received := connection.recv(10_000)):
        answer += received
    return answer


def test_a_body_that_does_not_come_is_not_waited_for(closed: Running) -> None:
    with socket.create_connection(("127.0.0.1", closed.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert b"did not arrive in time" in answer_from(connection)
    closed.is_well()


def test_a_large_body_without_its_length_is_cut_short(closed: Running) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    answer = httpx.post(closed.url, content=chunks(), headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 413
    closed.is_well()


@pytest.mark.parametrize("length", ["-1", "abc", "1e9"])
def test_a_content_length_that_is_none(closed: Running, length: str) -> None:
    with socket.create_connection(("127.0.0.1", closed.port)) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n{{}}".encode()
        )
        assert answer_from(connection).startswith(b"HTTP/1.1 4")
    closed.is_well()


WAYS_TO_SEND_HALF = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "half a head behind an answer": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n",
    "half a body behind its answer": b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
}


@pytest.mark.parametrize("name", WAYS_TO_SEND_HALF)
def test_a_connection_on_which_little_comes_is_closed(closed: Running, name: str) -> None:
    with socket.create_connection(("127.0.0.1", closed.port)) as connection:
        connection.settimeout(0.2)
        connection.sendall(WAYS_TO_SEND_HALF[name])
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - begun < 15:
                with contextlib.suppress(TimeoutError):
                    if connection.recv(10_000) == b"":
                        break
                if name != "nothing":
                    connection.sendall(b"a")
        assert time.monotonic() - begun < 12
    closed.is_well()


def test_a_slow_head_that_is_in_time_is_answered(closed: Running) -> None:
    with socket.create_connection(("127.0.0.1", closed.port)) as connection:
        for part in (b"GET /health HT", b"TP/1.1\r\nHo", b"st: x\r\n\r\n"):
            connection.sendall(part)
            time.sleep(0.2)
        assert answer_from(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_takes_nothing_is_let_go(closed: Running) -> None:
    """The client asks for so many answers without reading that they fill all buffers on the way."""
    question = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", closed.port))
        connection.settimeout(30)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                connection.sendall(question * 1000)
    closed.is_well()


def test_all_bodies_together_are_bounded(closed: Running) -> None:
    """Clients that each hold back the last bytes of 4 MB: at most 16 MB are kept, and further requests get a 503."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 4194304\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", closed.port), timeout=10)) for _ in range(5)
        ]
        for connection in connections[:4]:
            connection.sendall(head + b" " * (2**22 - 20))
        wait_until(lambda: closed.service.bodies_bytes > 2**24 - 2000, 10)
        connections[4].sendall(head + b" " * 2000)
        answer = answer_from(connections[4])
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
    wait_until(lambda: closed.service.bodies_bytes == 0, 10)
    closed.is_well()


def test_nobody_waits_for_bad_bodies(closed: Running) -> None:
    bodies = [content for name, (content, *_) in REFUSED.items() if "million" in name or "MB" in name]
    bodies = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in bodies]
    health = closed.url.replace("v1/chat/completions", "health")
    waited = []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        posted = [pool.submit(closed.post, body) for body in bodies * 3]
        while not all(post.done() for post in posted):
            begun = time.monotonic()
            assert httpx.get(health, timeout=30).status_code == 200
            waited.append(time.monotonic() - begun)
            time.sleep(0.05)
    assert {post.result().status_code for post in posted} <= {400, 413, 503}
    assert max(waited) < 3


def test_wrong_keys_wait_and_a_right_one_does_not(start: Start) -> None:
    """Wrong keys beyond the number that may wait are refused at once."""
    server = start(key="sesame")
    models = server.url.replace("chat/completions", "models")

    def ask(key: str) -> tuple[httpx.Response, float]:
        begun = time.monotonic()
        return httpx.get(models, headers={"Authorization": f"Bearer {key}"}, timeout=30), time.monotonic() - begun

    answer, seconds = ask("open")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert seconds >= 0.5
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        wrong = [pool.submit(ask, "open") for _ in range(40)]
        assert ask("sesame")[0].status_code == 200
        answers = [guess.result()[0] for guess in wrong]
    assert {answer.status_code for answer in answers} == {401, 429}
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}


def test_pixels_of_requests_that_wait_are_few(closed: Running, parrot_checkpoint: Path) -> None:
    """A few requests are prepared ahead of the engine; the others wait without pixels."""
    engine = Engine(closed.service.engine.model, closed.service.engine.tokenizer, EngineLimits(max_rows=1))
    service = Service("parrot", engine, closed.service.processor, GenerationSettings(temperature=0))
    server = Running(service)
    colours = ["red", "blue"] * 20
    waiting = []
    try:
        with concurrent.futures.ThreadPoolExecutor(len(colours)) as pool:
            answers = [pool.submit(server.post, asking("Colour?", data_url(png(colour)))) for colour in colours]
            while not all(answer.done() for answer in answers):
                waiting.append(engine.waiting)
                time.sleep(0.005)
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    finally:
        server.stop()
    assert texts == [f"It is {colour}." for colour in colours]
    assert 1 <= max(waiting) <= service.limits.prepared


def test_a_client_that_leaves_while_pictures_are_embedded_costs_the_rest_nothing(closed: Running) -> None:
    """What limits such work is held until the picture that is being encoded is done; the others are not begun."""
    vision, begun, go_on = closed.service.engine.model.vision_model, [], threading.Event()

    def wait(*_: Any) -> None:
        begun.append(time.monotonic())
        go_on.wait(30)

    free = closed.service.preparing._value
    hook = vision.register_forward_pre_hook(wait)
    try:
        body = json.dumps({"model": "parrot", "input": [RED] * 4}).encode()
        with socket.create_connection(("127.0.0.1", closed.port)) as client:
            head = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "", ""]
            client.sendall("\r\n".join(head).encode() + body)
            wait_until(lambda: len(begun) == 1, 60)
        time.sleep(0.5)
        assert closed.service.preparing._value == free - 1
        go_on.set()
        wait_until(lambda: closed.service.preparing._value == free, 10)
        time.sleep(0.5)
        assert len(begun) == 1
    finally:
        go_on.set()
        hook.remove()
    closed.is_well()


def test_a_text_does_not_wait_for_pictures(closed: Running) -> None:
    limited, closed.service.preparing = closed.service.preparing, asyncio.Semaphore(0)
    try:
        assert closed.post(message()).status_code == 200
    finally:
        closed.service.preparing = limited


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a" * 4_000_000}, "The prompt has 4000000 characters, too many for the"),
        ({"messages": asking("hi", *[RED] * 17)["messages"]}, "17 images; at most 16"),
    ],
)
def test_too_much_to_tokenize_is_refused(
    closed: Running, body: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(closed.service.processor), "encode", None)  # nothing is tokenized
    answer = httpx.post(closed.url.replace("v1/chat/completions", "tokenize"), json=body, timeout=60)
    assert answer.status_code == 400 and expected in answer.json()["error"]["message"]


def test_retry_after_follows_the_queue(start: Start) -> None:
    """Retry-After is the mean time that a request holds a place, divided by the number of places."""
    service = start().service
    service.limits = dataclasses.replace(service.limits, waiting=0)
    places = service.engine.limits.max_rows
    for seconds, said in ((0, 1), (8, 1), (160, 10), (1601, 101)):
        service.seconds_in_place, service.places_taken = seconds, places
        with pytest.raises(APIError, match="Too many requests are waiting") as refused, service.place():
            pass
        assert refused.value.headers == {"Retry-After": str(said)}
    service.seconds_in_place, service.places_taken = 0, 0
    with service.place():
        time.sleep(0.1)
    assert 0.1 <= service.seconds_in_place < 5


@pytest.mark.slow
@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.long)])
def test_the_server_does_as_its_openapi_says(siglip_checkpoint: Path, tmp_path: Path, examples: int) -> None:
    """Every route, with data that fit its description and data that do not, with a key and without."""
    tokenizer, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    model.config.language_config.max_position_embeddings = 200  # so that answers are short, whatever `max_tokens` is
    limits = RequestLimits(refusal_seconds=0.01)
    settings = GenerationSettings(max_new_tokens=8)
    service = Service("random", Engine(model, tokenizer), processor, settings, "sesame", names_of("127.0.0.1"), limits)
    server = Running(service)
    # A request that fits the schema may still be invalid: a conversation that ends with the model's turn, no picture.
    statuses = ["2xx", "400", "404", "413"]
    config = f"[checks.positive_data_acceptance]\nexpected-statuses = {json.dumps(statuses)}\n"
    (tmp_path / "schemathesis.toml").write_text(config)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks=all",
        "--phases=examples,coverage,fuzzing", "--mode=all", f"--max-examples={examples}", "--seed=1", "--no-color",
        "--header=Authorization: Bearer sesame", "--request-timeout=60", "--continue-on-failure",
        "--generation-database=none",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3600)
        assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
        answers = httpx.get(f"http://127.0.0.1:{server.port}/metrics", headers={"Authorization": "Bearer sesame"}).text
        for route in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/version"):
            assert f'route="{route}",status="200"}}' in answers, answers
    finally:
        server.stop()


def test_memory_does_not_grow(closed: Running) -> None:
    process = psutil.Process()

    def abuse() -> None:
        for content, status, _ in REFUSED.values():
            assert closed.post(content).status_code == status
        gc.collect()  # httpx keeps requests in reference cycles, and one of them has 100 MB

    abuse()
    before = process.memory_info().rss
    for _ in range(2):
        abuse()
    assert process.memory_info().rss - before < 150 * 2**20


def test_public_addresses() -> None:
    for address in (PUBLIC, "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"):
        assert is_public(address)
    for address in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.0.1", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1",
        "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:db8::1",
    ):  # fmt: skip
        assert not is_public(address), address


def test_an_address_of_the_system_s_own_resolver_is_checked_too() -> None:
    with pytest.raises(Exception, match="not a public address"):
        asyncio.run(ImageFetcher(allowed=True).fetch("http://localhost:1/red.png"))
