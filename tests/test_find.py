"""Where checkpoints come from: the Hub (here a server that behaves like it), its download cache, and bundled names."""

import hashlib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file

import deepseek_vl.models
from deepseek_vl import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    MultiModalityCausalLM,
    MultiModalityConfig,
    VLChatProcessor,
    VLMImageProcessor,
)
from deepseek_vl.checkpoints.find import HUB_SECONDS
from deepseek_vl.convert import main as convert_command
from deepseek_vl.utils.io import load_pretrained_model

ID = "some-owner/some-model"
QUICK = HUB_SECONDS + 5
"""Seconds within which an unreachable Hub is reported; huggingface_hub and transformers alone need 24 to 40."""


class Hub(ThreadingHTTPServer):
    """A server with the part of the Hub's interface that downloads use; a model's revisions are local directories."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.revisions: dict[str, Path] = {}
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        api = re.fullmatch(rf"/api/models/{ID}/(revision|tree)/([^/?]+)(\?.*)?", self.path)
        file = re.fullmatch(rf"/{ID}/resolve/([^/]+)/(.+)", self.path)
        if api and (directory := self._directory(api[2])):
            commit = commit_of(directory)
            files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(directory)) for path in files]
            entries = [
                {"type": "file", "oid": etag_of(path), "size": path.stat().st_size, "path": name}
                for path, name in zip(files, names, strict=True)
            ]
            siblings = [{"rfilename": name} for name in names]
            info = {"id": ID, "modelId": ID, "sha": commit, "private": False, "tags": [], "siblings": siblings}
            self._answer(json.dumps(info if api[1] == "revision" else entries).encode())
        elif file and (directory := self._directory(file[1])) and (directory / file[2]).is_file():
            if self.command == "GET":
                self.server.downloads.append(file[2])
            path = directory / file[2]
            self._answer(path.read_bytes(), {"ETag": f'"{etag_of(path)}"', "X-Repo-Commit": commit_of(directory)})
        elif self.path == "/":
            self._answer(b"")
        else:
            self._answer(
                b"", {"X-Error-Code": "RepoNotFound" if self.path.startswith("/api") else "EntryNotFound"}, 404
            )

    def _directory(self, revision: str) -> Path | None:
        commits = {commit_of(directory): directory for directory in self.server.revisions.values()}
        return self.server.revisions.get(revision) or commits.get(revision)

    def _answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def commit_of(directory: Path) -> str:
    return hashlib.sha1(str(directory).encode()).hexdigest()


def etag_of(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Allow downloads, into an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct downloads to an address, as HF_ENDPOINT does if it is set before huggingface_hub is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch, siglip_checkpoint: Path) -> Iterator[Hub]:
    """A Hub with the miniature model as its only one."""
    with Hub() as server:
        server.revisions["main"] = siglip_checkpoint
        point_to(server.url, monkeypatch)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["nobody listens", "nobody answers"])
def no_hub(request: pytest.FixtureRequest, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub's address that refuses connections, or accepts them and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        point_to(f"http://127.0.0.1:{listener.getsockname()[1]}", monkeypatch)
        if request.param == "nobody listens":
            listener.close()
        yield


# --- the Hub ---


def test_a_processor_needs_no_weights(hub: Hub) -> None:
    processor = VLChatProcessor.from_pretrained(ID)
    assert processor.num_image_tokens == 16
    assert "tokenizer.json" in hub.downloads
    assert not any("model" in name for name in hub.downloads if name != "tokenizer.model"), hub.downloads


def test_a_model_is_downloaded_once_and_keeps_its_name(hub: Hub, siglip_checkpoint: Path) -> None:
    _, _, model = load_pretrained_model(ID, device="cpu", dtype="float32")
    assert model.config.name_or_path == ID
    for name, weight in load_file(siglip_checkpoint / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert len(hub.downloads) == len(set(hub.downloads))
    hub.downloads.clear()
    assert MultiModalityCausalLM.from_pretrained(ID).config.name_or_path == ID
    assert DeepseekVLForConditionalGeneration.from_pretrained(ID).config.name_or_path == ID
    assert not hub.downloads


def test_a_model_of_the_hub_is_converted_by_its_id(hub: Hub, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert convert_command([ID, str(tmp_path / "reference"), "--to", "transformers"]) == 0
    assert load_pretrained_model(tmp_path / "reference", device="cpu")[2].num_parameters() > 0
    assert convert_command([ID, str(tmp_path / "gguf"), "--to", "gguf"]) == 0
    name = gguf.GGUFReader(tmp_path / "gguf" / "model-f16.gguf").fields["general.name"].contents()
    assert name == ID.rpartition("/")[2]


def test_without_safetensors_the_bin_file_is_downloaded(hub: Hub, siglip_checkpoint: Path, tmp_path: Path) -> None:
    directory = hub.revisions["main"] = tmp_path / "bin"
    directory.mkdir()
    for path in siglip_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(siglip_checkpoint / "model.safetensors"), directory / "pytorch_model.bin")
    assert MultiModalityCausalLM.from_pretrained(ID).num_parameters() > 0
    assert hub.downloads.count("pytorch_model.bin") == 1


def test_revision_and_subfolder_are_of_all_files(hub: Hub, siglip_checkpoint: Path, tmp_path: Path) -> None:
    inner = hub.revisions["other"] = tmp_path / "other"
    (inner / "inner").mkdir(parents=True)
    for path in siglip_checkpoint.iterdir():
        (inner / "inner" / path.name).write_bytes(path.read_bytes())
    settings = json.loads((siglip_checkpoint / "processor_config.json").read_text())
    (inner / "inner" / "processor_config.json").write_text(json.dumps({**settings, "num_image_tokens": 7}))
    _, processor, model = load_pretrained_model(ID, device="cpu", revision="other", subfolder="inner")
    assert processor.num_image_tokens == 7
    assert model.config.name_or_path == ID


def test_what_is_in_the_download_cache_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, siglip_checkpoint: Path
) -> None:
    load_pretrained_model(ID, device="cpu")
    hub.shutdown()
    hub.server_close()
    start = time.monotonic()
    _, processor, _ = load_pretrained_model(ID, device="cpu")
    assert VLChatProcessor.from_pretrained(ID).num_image_tokens == processor.num_image_tokens == 16
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert MultiModalityConfig.from_pretrained(ID).language_config.hidden_size == 64
    assert time.monotonic() - start < 2 * QUICK


def test_a_cache_that_another_program_has_filled_is_taken(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without the weights is used for a processor; a model from it is an error that names the file."""
    import huggingface_hub

    huggingface_hub.snapshot_download(ID, allow_patterns=["config.json", "*tokenizer*", "*processor*"])
    hub.shutdown()
    hub.server_close()
    assert VLChatProcessor.from_pretrained(ID).num_image_tokens == 16
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_pretrained_model(ID, device="cpu")


def test_a_model_that_the_hub_does_not_have_is_an_error_in_one_line(hub: Hub) -> None:
    with pytest.raises(OSError, match="'some-owner/unknown' is not a directory, and could not be fetched") as caught:
        load_pretrained_model("some-owner/unknown", device="cpu")
    assert "\n" not in str(caught.value)


OPENERS = {
    "load_pretrained_model": lambda name: load_pretrained_model(name, device="cpu"),
    **{
        opener.__name__: opener.from_pretrained
        for opener in (
            MultiModalityCausalLM,
            MultiModalityConfig,
            VLChatProcessor,
            VLMImageProcessor,
            DeepseekVLForConditionalGeneration,
            DeepseekVLConfig,
            DeepseekVLProcessor,
            DeepseekVLImageProcessor,
        )
    },
}


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_it_is_said_at_once_and_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    for opener in ("load_pretrained_model", "VLChatProcessor"):
        start = time.monotonic()
        with pytest.raises(
            OSError, match=f"'{ID}' .*does not answer, and the download cache does not have it"
        ) as caught:
            OPENERS[opener](ID)
        assert time.monotonic() - start < QUICK
        assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("no_hub", ["nobody listens"], indirect=True)
@pytest.mark.usefixtures("no_hub")
def test_every_class_says_it_at_once(opener: str) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match="does not answer"):
        OPENERS[opener](ID)
    assert time.monotonic() - start < QUICK


def test_the_chat_says_it_once() -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "cli_chat.py", "--model_path", ID],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "http://127.0.0.1:9 does not answer" in done.stderr


# --- names of bundled models ---

AUTO_CLASSES = {
    "AutoConfig": "MultiModalityConfig",
    "AutoImageProcessor": "VLMImageProcessor",
    "AutoProcessor": "VLChatProcessor",
    "AutoModel": "MultiModalityCausalLM",
    "AutoModelForCausalLM": "MultiModalityCausalLM",
    "AutoModelForImageTextToText": "MultiModalityCausalLM",
    "AutoModelForMultimodalLM": "MultiModalityCausalLM",
}


@pytest.mark.parametrize("auto", AUTO_CLASSES)
@pytest.mark.parametrize("no_hub", ["nobody listens"], indirect=True)
@pytest.mark.usefixtures("no_hub")
def test_auto_classes_open_the_bundled_model_by_its_name(auto: str) -> None:
    if not hasattr(transformers, auto):
        pytest.skip("not in this version of transformers")
    start = time.monotonic()
    opened = getattr(transformers, auto).from_pretrained("tiny")
    assert type(opened).__name__ == AUTO_CLASSES[auto]
    if auto.startswith("AutoModel"):
        assert opened.config.name_or_path == "tiny"
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("no_hub", ["nobody listens"], indirect=True)
@pytest.mark.usefixtures("no_hub")
def test_the_auto_tokenizer_opens_the_bundled_model_by_its_name() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained("tiny")
    assert tokenizer.encode("A star.") == VLChatProcessor.from_pretrained("tiny").tokenizer.encode("A star.")


def test_a_directory_of_that_name_is_meant_by_auto_classes_too(
    siglip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(siglip_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert transformers.AutoConfig.from_pretrained("tiny").language_config.hidden_size == 64


def test_auto_classes_are_changed_once() -> None:
    before = transformers.AutoConfig.from_pretrained.__func__
    importlib.reload(deepseek_vl.models)
    assert transformers.AutoConfig.from_pretrained.__func__ is before
    assert before.__doc__ == before.__wrapped__.__doc__
