"""Requests per second of the HTTP API with more and more clients: `python benchmarks/serving.py --model_path tiny`.

The same questions about the same pictures go to a server that batches and to one that answers one at a time; a plot is
written beside the table. Client and server share the machine.
"""

import argparse
import asyncio
import functools
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from measuring import plot, write_json

from deepseek_vl.imaging.open import image_data_url, load_image

START_SECONDS = 600.0
IMAGES = Path(__file__).parents[1] / "images"
QUESTIONS = (
    ("Describe the image.", "shapes.png"),
    ("What colour is the star?", "shapes.png"),
    ("Which bar is tallest?", "chart.png"),
    ("What does it say?", "word.png"),
)


@dataclass
class Measurement:
    """The results of one run: some clients, and a server with a batch size."""

    batch: int
    clients: int
    requests: int
    seconds: float
    tokens: int
    median_latency: float
    slowest_latency: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


@contextmanager
def server(
    model_path: str, batch: int, dtype: str, program: Sequence[str] = ("-m", "deepseek_vl.serve.api")
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A running server: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *program, "--model_path", model_path, "--model_name", "model"]
    command += ["--port", str(port), "--max_batch", str(batch), "--max_waiting", "1000", "--dtype", dtype]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("The server has not started.") from None
                time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait()


@functools.cache
def body(question: str, file: str, max_tokens: int) -> dict:
    """The body of a request that asks a question about a picture."""
    url = image_data_url(load_image(IMAGES / file))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {"model": "model", "messages": messages, "temperature": 0, "max_tokens": max_tokens}


async def measure(address: str, batch: int, clients: int, requests: int, max_tokens: int) -> Measurement:
    """Send `requests` requests from `clients` clients, each of which waits for its answer before the next."""
    waiting = iter(range(requests))
    latencies, tokens = [], 0

    async def client() -> None:
        nonlocal tokens
        async with httpx.AsyncClient(timeout=600) as http:
            for number in waiting:
                begun = time.perf_counter()
                request = body(*QUESTIONS[number % len(QUESTIONS)], max_tokens)
                answer = await http.post(f"{address}/v1/chat/completions", json=request)
                answer.raise_for_status()
                latencies.append(time.perf_counter() - begun)
                tokens += answer.json()["usage"]["completion_tokens"]

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return Measurement(batch, clients, requests, seconds, tokens, statistics.median(latencies), max(latencies))


def draw(measurements: list[Measurement], file: Path) -> None:
    with plot(file) as axes:
        for batch in sorted({m.batch for m in measurements}):
            line = [m for m in measurements if m.batch == batch]
            label = "one at a time" if batch == 1 else f"batches of up to {batch}"
            axes.plot([m.clients for m in line], [m.rate for m in line], "o-", label=label)
        clients = sorted({m.clients for m in measurements})
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, list(map(str, clients)))
        axes.set_xlabel("clients")
        axes.set_ylabel("requests per second")
        axes.set_ylim(bottom=0)
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=200, help="for each number of clients")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--max_batch", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("serving.png"), help="the plot; numbers go to .json")
    args = parser.parse_args()

    measurements = []
    for batch in (1, args.max_batch):
        with server(args.model_path, batch, args.dtype) as (address, _):
            asyncio.run(measure(address, batch, 1, len(QUESTIONS), args.max_tokens))  # a warm-up
            for clients in args.clients:
                measured = asyncio.run(measure(address, batch, clients, args.requests, args.max_tokens))
                measurements.append(measured)
                print(
                    f"batch {batch:3}  clients {clients:3}  {measured.rate:7.2f} requests/s  "
                    f"{measured.tokens / measured.seconds:8.1f} tokens/s  median {measured.median_latency:.2f} s  "
                    f"slowest {measured.slowest_latency:.2f} s",
                    flush=True,
                )
    write_json(measurements, args.output.with_suffix(".json"))
    draw(measurements, args.output)


if __name__ == "__main__":
    main()
