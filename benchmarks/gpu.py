"""This package on one GPU beside transformers' own classes, in under five minutes: one command, one table.

    python benchmarks/gpu.py --tokenizer DIR --output gpu.json

Models of the published shapes with random weights are made on the GPU, so nothing is downloaded and no checkpoint is
needed but a tokenizer. Prompts have 640 tokens with one picture that nobody has encoded before. Per token is over the
answer's tokens behind the first, at lengths of keys that no thread has seen before. Each part prints its rows as it
ends; what a part raises is printed, and the next one begins.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import picture, question
from measuring import fastest, now
from random_checkpoint import PUBLISHED_CONFIGS, published_image_processor

from deepseek_vl.checkpoints.layout_configs import to_transformers
from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.command_line import OneLineParser, run_command
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import Generation
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.kernels.attention import use_fastest_attention
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from deepseek_vl.models.clip_encoder import tower_fields

GPU = torch.device("cuda")
PROMPT, ANSWER, MANY = 640, 64, 64
"""Tokens of a prompt and of an answer, and how many answers at once."""

PARTS = ("transformers", "plain", "graphs", "compiled", "memory")


class Table:
    """Rows of quantity, contender, value and unit, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, quantity: str, contender: str, value: float, unit: str) -> None:
        """One number."""
        self.rows.append({"quantity": quantity, "contender": contender, "value": value, "unit": unit})
        print(f"{contender:>28} | {quantity:<44} | {value:10.2f} {unit}", flush=True)


def copy_bandwidth() -> float:
    """Bytes per second that a copy on the GPU reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), GPU, 5)


def random_model(size: str, dtype: torch.dtype) -> MultiModalityCausalLM:
    """A model of a published size, on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with GPU:
            model = MultiModalityCausalLM(MultiModalityConfig(**PUBLISHED_CONFIGS[size]))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(dtype).eval()


def token_bytes(model: MultiModalityCausalLM) -> int:
    """Of the weights that a token reads."""
    body = model.language_model
    return sum(p.nbytes for p in body.parameters()) - body.get_input_embeddings().weight.nbytes


class Timed:
    """One answer through an engine, and when each of its tokens was known."""

    def __init__(self, engine: Engine, inputs: Any, tokens: int, keeps: bool = False):
        self.generation = Generation(engine, inputs, GenerationSettings(max_new_tokens=tokens), lambda _: None, keeps)
        self.ticks: list[float] = []
        advance = self.generation.advance

        def noting(token_id: int) -> bool:
            self.ticks.append(time.perf_counter())
            return advance(token_id)

        self.generation.advance = noting
        self._begun = time.perf_counter()
        engine.submit(self.generation)

    def wait(self) -> "Timed":
        """Until it has ended."""
        self.generation.done.wait()
        return self

    @property
    def first(self) -> float:
        """Milliseconds until the first token."""
        return 1000 * (self.ticks[0] - self._begun)

    @property
    def each(self) -> float:
        """Milliseconds for each of the others."""
        return 1000 * (self.ticks[-1] - self.ticks[0]) / max(len(self.ticks) - 1, 1)


@functools.cache
def conversation(processor: VLChatProcessor, tokens: int) -> list[dict[str, Any]]:
    """`question` about one picture."""
    return question(processor, tokens, [picture(0)])


def measure_ours(name: str, engine: Engine, processor: VLChatProcessor, table: Table, limit: float, many: bool) -> None:
    """First and other tokens, the second turn, and many answers at once."""
    model = engine.model

    def inputs(seed: int, tokens: int = PROMPT, turns: Sequence[dict[str, Any]] = ()) -> Any:
        asked, end = conversation(processor, tokens)
        return processor(conversations=[asked, *turns, end], images=[picture(seed)])

    for seed in (1, 2):
        Timed(engine, inputs(seed), 8).wait()
    first, each = [], []
    for seed in range(3, 6):
        timed = Timed(engine, inputs(seed, PROMPT + 70 * (seed - 3)), ANSWER).wait()
        first.append(timed.first)
        each.append(timed.each)
    table.add("first token", name, min(first), "ms")
    table.add("first token, slowest of 3", name, max(first), "ms")
    table.add("per token", name, min(each), "ms")
    table.add("per token, share of the copy bandwidth", name, 100 * limit / (min(each) / 1000), "%")
    turns = [{"role": "Assistant", "content": "It is."}, {"role": "User", "content": "And what is beside it there?"}]
    firsts, seconds = [], []
    for seed in range(10, 13):
        firsts.append(Timed(engine, inputs(seed), 1, keeps=True).wait().first)
        timed = Timed(engine, inputs(seed, turns=turns), 2, keeps=True).wait()
        seconds.append(timed.first)
    table.add("second turn's first token", name, min(seconds), "ms")
    table.add("first turn's over second turn's", name, min(firsts) / min(seconds), "x")
    pixels = processor.image_processor([picture(1)])["pixel_values"].to(GPU, model.dtype)
    with torch.inference_mode():
        table.add("encode an image", name, 1000 * fastest(lambda: model.get_image_features(pixels), GPU, 5), "ms")
    if many:
        prompts = [inputs(20 + i) for i in range(MANY)]
        for answer in [Timed(engine, prompt, 4) for prompt in prompts]:  # so that there are graphs
            answer.wait()
        begun = now(GPU)
        answers = [Timed(engine, prompt, 8 * ANSWER) for prompt in prompts]  # longer than the prompts take
        tokens = sum(len(answer.wait().ticks) for answer in answers)
        seconds_in_all = now(GPU) - begun
        start, end = max(answer.ticks[0] for answer in answers), min(answer.ticks[-1] for answer in answers)
        together = sum(start < tick <= end for answer in answers for tick in answer.ticks)
        table.add(f"{MANY} answers at once, prompts too", name, tokens / seconds_in_all, "tokens/s")
        if end > start:
            table.add(f"{MANY} answers, while all run", name, together / (end - start), "tokens/s")


def measure_transformers(size: str, dtype: torch.dtype, processor: VLChatProcessor, table: Table) -> None:
    """transformers' class, eager."""
    import transformers

    images = processor.image_processor.to_dict()
    config = to_transformers(PUBLISHED_CONFIGS[size], images, processor.image_id, tower_fields)
    model_class = getattr(transformers, config["architectures"][0])
    with GPU:
        model = model_class(model_class.config_class.from_dict(config)).to(GPU, dtype).eval()
    name = "transformers, eager"

    @torch.inference_mode()
    def answer(seed: int, tokens: int, prompt: int) -> tuple[float, float]:
        ids = processor(conversations=conversation(processor, prompt), images=[picture(seed)])
        pixels = ids["pixel_values"][0].to(GPU, dtype)
        inputs = {"input_ids": ids["input_ids"].to(GPU), "attention_mask": ids["attention_mask"].to(GPU)}
        if size.startswith("7b"):
            inputs["high_res_pixel_values"] = pixels
            pixels = torch.nn.functional.interpolate(pixels.float(), (384, 384), mode="bilinear").to(dtype)
        ticks: list[float] = []
        hook = model.get_output_embeddings().register_forward_hook(lambda *_: ticks.append(now(GPU)))
        begun = now(GPU)
        model.generate(**inputs, pixel_values=pixels, max_new_tokens=tokens, do_sample=False)
        hook.remove()
        return 1000 * (ticks[0] - begun), 1000 * (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1)

    answer(1, 8, PROMPT)
    runs = [answer(seed, ANSWER, PROMPT + 70 * (seed - 3)) for seed in range(3, 6)]
    table.add("first token", name, min(first for first, _ in runs), "ms")
    table.add("per token", name, min(each for _, each in runs), "ms")


def measure_memory(size: str, processor: VLChatProcessor, table: Table) -> None:
    """The most that is allocated with one picture and 4,096 tokens, loading included, for each kind of weights."""
    from deepseek_vl.kernels.weight_only import quantize_weights

    for kind in (None, "int8", "int4"):
        with freed():
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device("meta"):
                    model = MultiModalityCausalLM(MultiModalityConfig(**PUBLISHED_CONFIGS[size])).eval()
            finally:
                torch.set_default_dtype(torch.float32)
            torch.cuda.reset_peak_memory_stats()
            model.to_empty(device=GPU if kind is None else "cpu")
            for weight in itertools.chain(model.parameters(), model.buffers()):
                weight.data.fill_(0.01)
            if kind is not None:
                quantize_weights(model.language_model, kind, GPU)
                model.to(GPU)
            loading = torch.cuda.max_memory_allocated()
            use_fastest_attention(model.language_model)
            engine = Engine(model, processor.tokenizer)
            messages = question(processor, 4096 - 32, [picture(1)])
            inputs = processor(conversations=messages, images=[picture(1)])
            timed = Timed(engine, inputs, 4096 - inputs["input_ids"].shape[1]).wait()
            name = f"{size}, {kind or 'bfloat16'}"
            table.add("weights, and the most while they come", name, loading / 1e9, "GB")
            table.add("one picture, 4,096 tokens", name, torch.cuda.max_memory_allocated() / 1e9, "GB")
            table.add("per token at 4,096", name, timed.each, "ms")
            engine.close()
            del model, engine


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Afterwards the GPU's memory is free again."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="benchmarks/gpu.py", description="This package on one GPU, in one table.")
    add = parser.add_argument
    add("--tokenizer", required=True, help="a directory with the published tokenizer")
    add("--size", choices=("1.3b", "7b"), nargs="+", default=["1.3b"], help="(default: 1.3b)")
    add("--parts", choices=PARTS, nargs="+", default=list(PARTS[:-1]), help="(default: all but memory)")
    add("--dtype", default="bfloat16", help="(default: %(default)s)")
    add("--output", type=Path, help="a .json file for the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ValueError("This benchmark needs a CUDA GPU.")
    logging.basicConfig(level=logging.WARNING)
    table, dtype = Table(), getattr(torch, args.dtype)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    bandwidth = copy_bandwidth()
    table.add("copy bandwidth, read and written", "the GPU", bandwidth / 1e9, "GB/s")
    for size in args.size:
        processor = VLChatProcessor(published_image_processor(size), load_tokenizer(args.tokenizer))
        if "transformers" in args.parts:
            attempt(measure_transformers, size, dtype, processor, table)
        if {"plain", "graphs", "compiled"} & set(args.parts):
            attempt(measure_steps, size, dtype, args.parts, processor, table, bandwidth)
        if "memory" in args.parts:
            attempt(measure_memory, size, processor, table)
        if args.output:
            args.output.write_text(json.dumps(table.rows, indent=1) + "\n", encoding="utf-8")


def measure_steps(
    size: str, dtype: torch.dtype, parts: Sequence[str], processor: VLChatProcessor, table: Table, bandwidth: float
) -> None:
    """This package one kernel at a time, from graphs, and from graphs of compiled layers."""
    from deepseek_vl.engine.decode_step import Step

    model = random_model(size, dtype)
    use_fastest_attention(model.language_model)
    limit = token_bytes(model) / bandwidth
    for part in ("plain", "graphs", "compiled"):
        if part not in parts:
            continue
        engine, name = Engine(model, processor.tokenizer, EngineLimits(max_rows=MANY)), f"{size}, {part}"
        if part == "plain":
            engine.use(Step())
        elif part == "compiled":
            begun = now(GPU)
            engine.compile()
            table.add("compiling", name, now(GPU) - begun, "s")
        attempt(measure_ours, name, engine, processor, table, limit, part != "plain" and size == "1.3b")
        engine.close()


def attempt(part: Callable[..., None], *arguments: Any) -> None:
    """Run a part, and print what it raises."""
    with freed():
        try:
            part(*arguments)
        except Exception:
            traceback.print_exc(file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
