"""Hours of mixed load on the HTTP API: `python benchmarks/soak.py --model_path tiny --minutes 60`.

Clients hold conversations that grow, ask about pictures, stream, leave halfway, and send what is broken, while now and
then a step of the server's engine finds no memory. Every answer is compared with the one that the server gave when it
had nothing else to do. At the end: wrong answers, lost requests, and how the memory of server and children went.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from measuring import plot, write_json
from serving import IMAGES, server

from deepseek_vl.imaging.open import image_data_url, load_image

FAULTS_EVERY = 500
"""On average one of this many steps fails."""

CALM_STEPS = 64
"""The number of steps after a failure that do not fail, because the failed step's rows are then retried one by one."""

SAMPLE_SECONDS = 5.0
WARM_UP = 1 / 6
"""The part of the time that the slope leaves out, because caches fill."""

QUESTIONS = (
    "Describe the image.",
    "What colour is the star?",
    "How many shapes are there?",
    "Which bar is tallest?",
    "What does it say?",
    "Is there a circle?",
)
FILES = ("shapes.png", "chart.png", "word.png", "more_shapes.png")
BROKEN = (
    b"{",
    b'{"model": "model", "messages": []}',
    b'{"model": "model", "messages": [' + b"0," * 30_000 + b"0]}",
    json.dumps(
        {
            "model": "model",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
                }
            ],
        }
    ).encode(),
)


@dataclass
class Outcome:
    """The result of a run: the number of requests by outcome, and the relative growth of memory."""

    minutes: float
    clients: int
    counts: dict[str, int]
    growth: float


@dataclass
class Script:
    """A conversation, with the answers that the server gives when it has nothing else to do.

    Attributes:
        questions: the user's messages, as the API's `content`.
        answers: the answers to the questions asked so far.
        max_tokens: the most tokens of each answer.
    """

    questions: list[list[dict[str, Any]]]
    max_tokens: int
    answers: list[str] = field(default_factory=list)

    def body(self, turn: int, stream: bool = False) -> dict[str, Any]:
        """The body of the request for one turn's answer."""
        messages: list[dict[str, Any]] = []
        for question, answer in zip(self.questions[:turn], self.answers, strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self.questions[turn]})
        return {
            "model": "model",
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": stream,
        }


def scripts(count: int, turns: int, generator: random.Random) -> list[Script]:
    """`count` random conversations of at most `turns` turns."""
    urls = [image_data_url(load_image(IMAGES / file)) for file in FILES]

    def question(first: bool) -> list[dict[str, Any]]:
        images = generator.choice((1, 1, 2)) if first else generator.choice((0, 0, 1))
        parts = [{"type": "image_url", "image_url": {"url": generator.choice(urls)}} for _ in range(images)]
        return [*parts, {"type": "text", "text": generator.choice(QUESTIONS)}]

    return [
        Script([question(i == 0) for i in range(generator.randint(1, turns))], generator.choice((8, 24, 64)))
        for _ in range(count)
    ]


async def answer_of(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> str | None:
    """The text of an answer; None if the client leaves, after `leave_after` pieces of a stream.

    Raises:
        httpx.HTTPError: if the answer is an error or incomplete.
    """
    if not body["stream"]:
        response = (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        return response.json()["choices"][0]["message"]["content"]
    text, pieces = "", 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise httpx.ReadError(event["error"]["message"])
                text += event["choices"][0]["delta"].get("content") or ""
                pieces += 1
            if leave_after is not None and pieces > leave_after:
                return None
    raise httpx.ReadError("The stream has ended early.")


async def client(address: str, told: Sequence[Script], until: float, seed: int, counts: Counter[str]) -> None:
    """Hold the conversations of random scripts until a time, and now and then disconnect or send a broken request."""
    whims = random.Random(seed)
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        while time.monotonic() < until:
            if whims.random() < 0.05:
                refused = await http.post(
                    "/v1/chat/completions", content=whims.choice(BROKEN), headers={"Content-Type": "application/json"}
                )
                counts["refused" if refused.status_code == 400 else "wrongly received"] += 1
                continue
            script = whims.choice(told)
            for turn, expected in enumerate(script.answers):
                leaves = whims.randint(0, 10) if whims.random() < 0.1 else None
                body = script.body(turn, stream=leaves is not None or whims.random() < 0.5)
                try:
                    text = await answer_of(http, body, leaves)
                except httpx.HTTPError as error:
                    counts["lost"] += 1
                    print(f"lost: {error!r}", flush=True)
                    break
                if text is None:
                    counts["left"] += 1
                    break
                counts["right" if text.strip() == expected.strip() else "wrong"] += 1
                if time.monotonic() > until:
                    return


class Memory:
    """Sample the memory of a process and its children within a `with` block.

    Attributes:
        seconds: the time of each sample, from the start.
        megabytes: the resident memory in each sample.
    """

    def __init__(self, process: psutil.Process):
        self.seconds: list[float] = []
        self.megabytes: list[float] = []
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            total = 0
            for member in (self._process, *self._process.children(recursive=True)):
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.seconds.append(time.monotonic() - self._begun)
            self.megabytes.append(total / 2**20)

    def growth(self) -> float:
        """The growth of memory after the warm-up, by least squares, relative to its mean."""
        seconds, megabytes = np.array(self.seconds), np.array(self.megabytes)
        counted = seconds >= WARM_UP * seconds[-1]
        slope, _ = np.polyfit(seconds[counted], megabytes[counted], 1)
        return float(slope * (seconds[-1] - seconds[counted][0]) / megabytes[counted].mean())


async def soak(address: str, process: psutil.Process, args: argparse.Namespace) -> tuple[Counter[str], Memory]:
    """Record each script's answers, then let the clients load the server; returns their counts and the memory."""
    told = scripts(args.scripts, args.turns, random.Random(args.seed))
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        for script in told:
            for turn in range(len(script.questions)):
                script.answers.append(await answer_of(http, script.body(turn)))
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * args.minutes
    with Memory(process) as memory:
        await asyncio.gather(*(client(address, told, until, seed, counts) for seed in range(args.clients)))
    return counts, memory


def serve_with_faults() -> None:
    """Run the server's command with random out-of-memory errors in decoding steps; a retry succeeds."""
    from deepseek_vl.engine.decode_step import Step
    from deepseek_vl.serve.api.__main__ import main

    plain, faults, calm = Step.__call__, random.Random(0), 0

    def step(self: Step, *args: Any) -> torch.Tensor:
        nonlocal calm
        calm -= 1
        if calm < 0 and faults.random() < 1 / FAULTS_EVERY:
            calm = CALM_STEPS
            raise torch.OutOfMemoryError("injected by benchmarks/soak.py")
        return plain(self, *args)

    Step.__call__ = step
    sys.exit(main())


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        del sys.argv[1]
        serve_with_faults()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="tiny")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--scripts", type=int, default=60, help="different conversations")
    parser.add_argument("--turns", type=int, default=5, help="the most of a conversation")
    parser.add_argument("--memory_mb", type=int, default=64, help="the server's budget: what it keeps soon fills it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("soak.png"), help="the plot; numbers go to .json")
    args = parser.parse_args()

    # float32, because only there are answers in a batch the same as alone, token for token.
    program = [__file__, "--serve", "--memory_mb", str(args.memory_mb)]
    with server(args.model_path, 16, "float32", program) as (address, process):
        counts, memory = asyncio.run(soak(address, psutil.Process(process.pid), args))
    growth = memory.growth()
    print(*(f"{name}: {count}" for name, count in sorted(counts.items())), sep="\n")
    print(f"memory: {memory.megabytes[0]:.0f} MB at first, {memory.megabytes[-1]:.0f} MB at last, growth {growth:+.2%}")
    write_json([Outcome(args.minutes, args.clients, dict(counts), growth)], args.output.with_suffix(".json"))
    with plot(args.output) as axes:
        axes.plot([second / 60 for second in memory.seconds], memory.megabytes)
        axes.set_xlabel("minutes")
        axes.set_ylabel("MB, server and children")
        axes.set_ylim(bottom=0)
    if counts["wrong"] or counts["lost"] or counts["wrongly received"] or growth > 0.02:
        sys.exit(1)


if __name__ == "__main__":
    main()
