"""Training data: the rows of files, checked against a processor."""

import logging
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deepseek_vl.data.decoding import data_files
from deepseek_vl.data.errors import BadRow, DataError
from deepseek_vl.data.messages import check_tags
from deepseek_vl.data.rows import TrainingRow, read_rows
from deepseek_vl.imaging.open import ImageLoadError, load_image

if TYPE_CHECKING:
    from deepseek_vl.models import VLChatProcessor

logger = logging.getLogger(__name__)

LISTED = 20
"""How many bad rows an error lists."""


@dataclass(frozen=True)
class DataReport:
    """The result of checking files of rows.

    Attributes:
        rows: the good rows, in order.
        bad: the bad rows, in order.
        lengths: the number of tokens of each good row, with the images' positions.
    """

    rows: list[TrainingRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of images in the good rows."""
        return sum(len(row.images) for row in self.rows)

    def summary(self) -> str:
        """One line of numbers."""
        answers = sum(len(row.types) for row in self.rows)
        text = f"{len(self.rows)} good rows, {len(self.bad)} bad; {answers} answers, {self.images} images"
        if not self.lengths:
            return text
        shortest, median, longest = min(self.lengths), statistics.median_low(self.lengths), max(self.lengths)
        return f"{text}; tokens per row: shortest {shortest}, median {median}, longest {longest}"


def load_data(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    processor: "VLChatProcessor",
    max_length: int | None = None,
    skip_bad: bool = False,
    truncate: bool = False,
) -> tuple[list[TrainingRow], list[BadRow]]:
    """Read and check every row, before training.

    Args:
        paths: one file, or several.
        processor: renders and counts tokens.
        max_length: most tokens in a row; None for any number.
        skip_bad: log a warning about bad rows, and go on without them.
        truncate: longer rows are good as long as an answer begins within `max_length`.

    Returns:
        The good rows, and the bad ones that `skip_bad` left out.

    Raises:
        DataError: listing the bad rows, if there are any and not `skip_bad`; if no row is good; if a file has no rows.
        OSError: if a file is missing or cannot be opened.
    """
    report = check_data(paths, processor, max_length, truncate)
    if report.bad and not (skip_bad and report.rows):
        raise DataError(_list_bad(report))
    if report.bad:
        total = len(report.rows) + len(report.bad)
        logger.warning("Left out %d bad rows of %d, such as %s", len(report.bad), total, report.bad[0])
    end = processor.tokenizer.eos_token
    if not processor.render(report.rows[0].messages).text.endswith(end):
        logger.warning(
            "The template %r ends answers without %s: when to stop is not learnt.", processor.sft_format, end
        )
    return report.rows, report.bad


def _list_bad(report: DataReport) -> str:
    """The text of the error about bad rows."""
    total = len(report.rows) + len(report.bad)
    lines = [f"{len(report.bad)} of {total} rows cannot be trained on:", *(f"  {bad}" for bad in report.bad[:LISTED])]
    advice = "Correct them"
    if len(report.bad) > LISTED:
        lines.append(f"  and {len(report.bad) - LISTED} more")
        advice += " (--check lists all)"
    advice += ", or train without them: --skip-bad." if report.rows else "; no row is left to train on."
    return "\n".join([*lines, advice])


def check_data(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    processor: "VLChatProcessor",
    max_length: int | None = None,
    truncate: bool = False,
) -> DataReport:
    """Read and check every row; bad rows are no error here. Each image file is opened once, several at a time.

    The arguments are those of `load_data`.

    Raises:
        DataError: for a file that has no rows, or cannot be read as rows.
        OSError: if a file is missing or cannot be opened.
    """
    check_tokenizer(processor)
    read: list[TrainingRow | BadRow] = []
    for file in data_files(paths):
        if not (rows := list(read_rows(file, processor.image_tag))):
            raise DataError(f"There are no rows in {file}.")
        read += rows
    sources = list(dict.fromkeys(source for row in read if isinstance(row, TrainingRow) for source in row.images))
    if sources:
        logger.info("Checking %d images.", len(sources))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = dict(zip(sources, pool.map(_image_problem, sources), strict=True))

    report = DataReport()
    for row in read:
        if isinstance(row, BadRow):
            report.bad.append(row)
            continue
        try:
            length = check_row(row, processor, max_length, truncate, problems.__getitem__)
        except DataError as error:
            report.bad.append(BadRow(row.origin, str(error)))
        else:
            report.rows.append(row)
            report.lengths.append(length)
    return report


def check_tokenizer(processor: "VLChatProcessor") -> None:
    """Check that the tokenizer can tell where in a text its tokens are.

    Raises:
        DataError: if it cannot.
    """
    if not processor.tokenizer.is_fast:
        raise DataError("Training needs a tokenizer with a tokenizer.json (a fast one), to find the answers' tokens.")


def _image_problem(source: Any) -> str | None:
    """Why an image cannot be used, None if it can. The whole file is decoded, so that truncation shows."""
    try:
        load_image(source)
    except ImageLoadError as error:
        return str(error)
    return None


def check_row(
    row: TrainingRow,
    processor: "VLChatProcessor",
    max_length: int | None = None,
    truncate: bool = False,
    image_problem: Callable[[Any], str | None] = _image_problem,
) -> int:
    """Check one row against a processor: every image opens, each has its tag, and the row is not too long.

    Args:
        row: the row.
        processor: see `load_data`.
        max_length: see `load_data`.
        truncate: see `load_data`.
        image_problem: says why an image cannot be used, or None.

    Returns:
        The row's number of tokens, with the images' positions.

    Raises:
        DataError: with the reason.
    """
    tag = processor.image_tag
    added = set(processor.tokenizer.all_special_tokens) - {tag}
    for number, message in enumerate(row.messages, 1):
        check_tags(f"message {number}", message["content"].count(tag), len(message.get("images") or ()), tag)
        if held := [token for token in added if token in message["content"]]:
            raise DataError(f"message {number} holds the special token {held[0]}; the template adds it, so remove it")
    if held := [token for token in added if token in (row.system or "")]:
        raise DataError(f"the system text holds the special token {held[0]}; the template adds it, so remove it")
    if tag in (row.system or ""):
        raise DataError(f"the system text holds {tag}; images belong in the user's messages")
    for source in row.images:
        if problem := image_problem(source):
            raise DataError(problem)
    length = processor.count_tokens(processor.render(row.messages, row.system))
    if max_length is not None and length > max_length:
        if not truncate:
            raise DataError(f"too long: {length} tokens, --max_length is {max_length}")
        first = next(i for i, message in enumerate(row.messages) if i % 2 and message.get("weight", 1))
        unanswered = [*row.messages[:first], {**row.messages[first], "content": ""}]
        if (asked := processor.count_tokens(processor.render(unanswered, row.system))) >= max_length:
            raise DataError(f"too long: the first answer begins after {asked} tokens, --max_length is {max_length}")
    return length
