"""Caption many pictures: `python -m deepseek_vl.caption PATH... --model_path M --prompt TEXT --output FILE`.

The output is JSON Lines, a row per picture, written as the answers come. The same command, given again, continues where
the last one stopped, whatever stopped it.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.arguments import add_arguments, check_text, open_engine, settings_of
from deepseek_vl.serve.batch.export import check_export, check_sidecars, export, write_sidecars
from deepseek_vl.serve.batch.inputs import PictureSource, find_pictures, open_picture
from deepseek_vl.serve.batch.journal import OF_RELATIVE_PATHS, Journal, row_of
from deepseek_vl.serve.batch.ray import LOCAL, caption_on_ray, check_ray
from deepseek_vl.utils.conversation import IMAGE_TAG

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="deepseek-vl-caption", description="Caption many pictures.")
    add = parser.add_argument
    add(
        "paths", nargs="+", metavar="PATH",
        help="pictures, folders of them, globs, .txt files of paths, .tar shards, .parquet files",
    )  # fmt: skip
    add("--prompt", required=True, help="the question about every picture")
    add("--output", required=True, metavar="FILE", help="JSON Lines; what it has already is not asked again")
    add("--export", type=Path, metavar="FILE", help="write the output as .csv or .parquet as well, at the end")
    add("--sidecar", action="store_true", help="write each caption to a .txt file beside its picture, at the end")
    add("--image_column", metavar="NAME", help="of Parquet files (default: image, or the only one that has bytes)")
    add("--max_batch", type=positive, default=EngineLimits.max_rows, help="answers at a time (default: %(default)s)")
    add(
        "--ray", nargs="?", const=LOCAL, metavar="ADDRESS",
        help="ask on Ray: on the cluster at ADDRESS (auto: the one that runs here), or else on this machine",
    )  # fmt: skip
    add(
        "--ray_cores", type=positive, default=4, metavar="N",
        help="cores of each of Ray's actors, where there are no GPUs (default: %(default)s)",
    )  # fmt: skip
    add_arguments(parser, GenerationSettings(), required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Caption pictures; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    if not args.prompt.strip():
        raise ValueError("--prompt is empty.")
    check_text(args.prompt, "--prompt")
    if args.prompt.count(IMAGE_TAG) > 1:
        raise ValueError(f"--prompt has {args.prompt.count(IMAGE_TAG)} {IMAGE_TAG}; each picture is asked about alone.")
    directory = os.path.realpath(os.path.expanduser(args.model_path))  # noqa: PTH111  Path's raises for unknown users
    if Path(directory, "config.json").is_file():
        args.model_path = directory  # absolute: the next command, or an actor, may start elsewhere
    output = os.path.abspath(args.output)  # noqa: PTH100
    found = find_pictures(args.paths, args.image_column)
    pictures = [picture for picture in found if picture.file != output]  # a shell's glob may name it
    if args.export is not None:
        check_export(args.export, {output, *(picture.file for picture in pictures)})
    if args.sidecar:
        check_sidecars(pictures)
    if args.ray is not None:
        check_ray()
    with Journal(args.output, _question(args, pictures)) as journal:
        left = [picture for picture in pictures if picture.key not in journal]
        logger.info("%d pictures, %d of them to be asked about.", len(pictures), len(left))
        if left:
            rows = (_rows if args.ray is None else caption_on_ray)(args, settings, left)
            for row in _with_progress(rows, len(left)):
                journal.add(row)
        if args.export is not None:
            export(args.output, args.export)
        if args.sidecar:
            write_sidecars(args.output, pictures)
        logger.info("%s has %d rows, %d of them errors.", args.output, journal.rows, journal.errors)


def _question(args: argparse.Namespace, pictures: Sequence[PictureSource]) -> dict[str, Any]:
    """What must be the same for all answers in one output file; where paths are relative, also the current folder."""
    names = ("prompt", "dtype", "quantize", "image_column", "max_gen_len", "temperature", "top_p", "repetition_penalty")
    question = {"model": args.model_path, **{name: getattr(args, name) for name in names}}
    if not all(os.path.isabs(picture.name) for picture in pictures):  # noqa: PTH117
        # From the output's folder, so that all of it may be moved.
        question[OF_RELATIVE_PATHS] = os.path.relpath(Path.cwd(), Path(args.output).absolute().parent)
    return question


def _rows(
    args: argparse.Namespace, settings: GenerationSettings, pictures: Sequence[PictureSource]
) -> Iterator[dict[str, Any]]:
    logger.info("Loading %s ...", args.model_path)
    engine, processor = open_engine(args, args.model_path, args.max_batch)
    from deepseek_vl.serve.batch.caption import caption_many

    answers = caption_many(engine.model, processor, pictures, args.prompt, settings, engine, open_picture)
    for index, answer in answers:
        yield row_of(pictures[index].name, answer)


def _with_progress(rows: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows, and log every few seconds how many there are, how many come in a second, and the time left."""
    begun = told = 0.0
    for number, row in enumerate(rows, 1):
        yield row
        now = time.monotonic()
        begun, told = begun or now, told or now
        if number > 1 and (now - told >= PROGRESS_SECONDS or number == count):
            rate = (number - 1) / max(now - begun, 1e-6)
            left = int((count - number) / rate)
            time_left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            logger.info("%d of %d, %.2f a second, %s left", number, count, rate, time_left)
            told = now


if __name__ == "__main__":
    sys.exit(main())
