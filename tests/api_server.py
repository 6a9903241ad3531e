"""The HTTP API in a server process of its own, for tests that talk to it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
from conftest import ROOT, data_url, wait_until


class Server:
    """A server process and how to reach it."""

    def __init__(self, model_path: str | Path, log: Path, *arguments: str, **environment: str):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deepseek_vl.serve.api", "--model_path", str(model_path),
                 "--model_name", "parrot", "--port", "0", "--device", "cpu", "--dtype", "float32",
                 "--temperature", "0", *arguments],
                stderr=file, stdout=file, cwd=ROOT, env={**os.environ, **environment},
            )  # fmt: skip
        wait_until(lambda: "Uvicorn running on" in self.text() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.text()
        self.url = self.text().split("Uvicorn running on ")[1].split()[0]

    def text(self) -> str:
        return self.log.read_text(errors="replace")  # a progress bar may end in the middle of a character

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str, key: str = "none") -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
        found = (line.rsplit(" ", 1) for line in text.splitlines())
        return next((float(number) for label, number in found if label == name), 0.0)

    def wait_until_idle(self, seconds: float = 5) -> None:
        wait_until(lambda: not self.metric("deepseek_vl_running") + self.metric("deepseek_vl_waiting"), seconds)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def about(question: str, *images: Path) -> list[dict[str, Any]]:
    """The messages of a chat completion that asks one question about some pictures."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(path.read_bytes())}} for path in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
