"""Captions per second of the batch command's loop beside the engine's own: `python benchmarks/captioning.py`.

The same pictures are asked about once by handing all of them to the engine, and once by `caption_many`, which reads
them ahead and writes a journal. Each is measured in turn, several times, and the fastest of each counts.

`--memory` instead asks about all pictures once by `caption_many`, and prints the process's memory on the way;
`--resume` measures how long it takes to open a journal of 100,000 rows.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from deepseek_vl import load_pretrained_model
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.batch.caption import Caption, Question, caption_many
from deepseek_vl.serve.batch.inputs import find_pictures, key_of
from deepseek_vl.serve.batch.journal import Journal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe is in the checkout, not in the package
from recipes.tiny.world import draw, sample_picture

PROMPT = "Describe the image."
RESUMED_ROWS = 100_000


def write_pictures(directory: Path, count: int) -> list[Path]:
    """Write pictures of the bundled model's toy world; returns their paths."""
    paths = [directory / f"{number:05}.png" for number in range(count)]
    for number, path in enumerate(paths):
        draw(sample_picture(random.Random(number), "shapes")).save(path)
    return paths


def by_the_engine(engine: Engine, processor: VLChatProcessor, paths: Sequence[Path], tokens: int) -> int:
    """Submit all pictures to the engine, and wait; returns the number of tokens of all answers."""
    question = Question(engine, processor, PROMPT, GenerationSettings(max_new_tokens=tokens))
    generations = []
    for path in paths:
        generation = Generation(engine, question.about(load_image(path)), question.settings, ignore)
        engine.submit(generation)
        generations.append(generation)
    for generation in generations:
        generation.done.wait()
    return sum(len(generation.token_ids) for generation in generations)


def ignore(item: object) -> None:
    if item is not END and not isinstance(item, str):
        raise SystemExit(f"The engine failed: {item!r}")


def by_caption_many(
    engine: Engine, processor: VLChatProcessor, paths: Sequence[Path], tokens: int, output: Path
) -> Iterator[Caption]:
    """The answers of `caption_many` in the order they end, each also written to a journal."""
    settings = GenerationSettings(max_new_tokens=tokens)
    with Journal(output, {}) as journal:
        for index, answer in caption_many(engine.model, processor, paths, PROMPT, settings, engine):
            journal.add({"path": str(paths[index]), "caption": answer.text, "error": None})
            yield answer


def compare_rates(
    model: MultiModalityCausalLM, processor: VLChatProcessor, paths: Sequence[Path], tokens: int, repeats: int
) -> None:
    rates: dict[str, list[float]] = {"engine": [], "caption_many": []}
    for repeat in range(repeats + 1):
        counts = set()
        for name, measured in rates.items():
            engine = Engine(model, processor.tokenizer)  # a new one, with an empty cache
            begun = time.perf_counter()
            if name == "engine":
                counts.add(by_the_engine(engine, processor, paths, tokens))
            else:
                output = paths[0].parent / f"{repeat}.jsonl"
                answers = by_caption_many(engine, processor, paths, tokens, output)
                counts.add(sum(answer.completion_tokens for answer in answers))
            if repeat:  # the first one is a warm-up
                measured.append(len(paths) / (time.perf_counter() - begun))
            engine.close()
        if len(counts) > 1:
            print(f"The answers differ: {sorted(counts)} tokens.")
    fastest = {name: max(measured) for name, measured in rates.items()}
    for name, rate in fastest.items():
        print(f"{name:12}  {rate:7.2f} pictures/s  (runs: {', '.join(f'{each:.2f}' for each in rates[name])})")
    print(f"{'ratio':12}  {fastest['caption_many'] / fastest['engine']:7.3f}")


def show_memory(model: MultiModalityCausalLM, processor: VLChatProcessor, paths: Sequence[Path], tokens: int) -> None:
    process, engine = psutil.Process(), Engine(model, processor.tokenizer)
    answers = by_caption_many(engine, processor, paths, tokens, paths[0].parent / "memory.jsonl")
    for number, _ in enumerate(answers, 1):
        if number % max(len(paths) // 10, 1) == 0:
            resident, kept = process.memory_info().rss / 2**20, engine.memory_used / 2**20
            print(f"{number:6} pictures  {resident:8.1f} MiB resident  {kept:6.1f} MiB in the engine", flush=True)


def show_resumption(directory: Path) -> None:
    paths = [directory / f"{number:06}.png" for number in range(RESUMED_ROWS)]
    for path in paths:
        path.touch()
    with Journal(directory / "journal.jsonl", {}) as journal:
        for path in paths:
            journal.add({"path": str(path), "caption": "A caption of about this length. " * 4, "error": None})
    begun = time.perf_counter()
    pictures = find_pictures([str(directory)])
    found = time.perf_counter()
    with Journal(directory / "journal.jsonl", {}) as journal:
        left = [picture for picture in pictures if picture.key not in journal]
    read = time.perf_counter()
    if left or key_of(str(paths[0])) not in journal:
        raise SystemExit("Rows are missing.")
    print(f"{len(pictures)} pictures found in {found - begun:.2f} s, {journal.rows} rows read in {read - found:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if args.resume:
            show_resumption(Path(directory))
            return
        paths = write_pictures(Path(directory), args.pictures)
        _, processor, model = load_pretrained_model(args.model_path, args.device, args.dtype)
        if args.memory:
            show_memory(model, processor, paths, args.max_tokens)
        else:
            compare_rates(model, processor, paths, args.max_tokens, args.repeats)


if __name__ == "__main__":
    main()
