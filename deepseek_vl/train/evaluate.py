"""The command `python -m deepseek_vl.train.evaluate`: count a model's right answers to a file's questions, by type.

Every question is asked in a `ChatSession`, as a user's is, with greedy decoding. An answer is right if it equals the
file's, outer white space aside.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from deepseek_vl.command_line import OneLineParser, add_loading, positive, run_command
from deepseek_vl.data.checks import load_data
from deepseek_vl.data.rows import TrainingRow, read_rows
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.kernels.device import check_quantization, pick_device, pick_dtype
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.utils.io import load_json, load_pil_images, load_pretrained_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

HISTORIES = ("generated", "reference")
OUTPUT_FILES = ("answers.jsonl", "summary.json", "table.md", "confusion.png")
UNTYPED = "answer"
"""The type of all answers where no row has types."""
MOST_WORDS = 30
"""How many confused words are drawn."""


@dataclass(frozen=True)
class EvaluatedAnswer:
    """One question, and what the model said.

    Attributes:
        origin: where the row is from.
        question, expected: the file's.
        answer: the model's, without outer white space.
        type: the question's; None if the answer is not scored, but was needed for the history of a later one.
        right: whether the answer is the expected one.
        error: why there is no answer, such as a prompt that is too long.
        dropped_turns: how many of the oldest turns were left out because the model had no room for them.
    """

    origin: str
    question: str
    expected: str
    answer: str
    type: str | None
    right: bool
    error: str | None = None
    dropped_turns: int = 0


@dataclass(frozen=True)
class Score:
    """How many of the answers asked for are right."""

    right: int
    asked: int

    @property
    def percent(self) -> float:
        """The share of right answers, 0 to 100."""
        return 100 * self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share of right answers, in percent."""
        z, n, share = NormalDist().inv_cdf(0.975), self.asked, self.right / self.asked
        middle = share + z**2 / (2 * n)
        reach = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
        low, high = (100 * (middle + side * reach) / (1 + z**2 / n) for side in (-1, 1))
        return max(0.0, min(low, self.percent)), min(100.0, max(high, self.percent))

    def as_dict(self) -> dict[str, float]:
        """The numbers, for JSON."""
        low, high = self.interval
        return {"right": self.right, "asked": self.asked, "percent": self.percent, "low": low, "high": high}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: every answer, in order."""

    answers: list[EvaluatedAnswer]

    @property
    def scored(self) -> list[EvaluatedAnswer]:
        """The answers that are scored."""
        return [answer for answer in self.answers if answer.type is not None]

    @property
    def scores(self) -> dict[str, Score]:
        """The score of each type, in the order in which the types first occur."""
        asked = Counter(answer.type for answer in self.scored if answer.type is not None)
        right = Counter(answer.type for answer in self.scored if answer.right)
        return {name: Score(right[name], asked[name]) for name in asked}

    @property
    def total(self) -> Score:
        """The score of all types together."""
        return Score(sum(answer.right for answer in self.scored), len(self.scored))

    def table(self) -> str:
        """The scores as lines of aligned text."""
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            for row in rows
        )
        return "\n".join("  ".join(line) for line in lines)

    def markdown(self) -> str:
        """The scores as a Markdown table."""
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])

    def _cells(self) -> list[list[str]]:
        """The table's texts, heading and total included."""
        cells = [["type", "right", "asked", "percent", "95% interval"]]
        for name, score in (*self.scores.items(), ("total", self.total)):
            low, high = score.interval
            shown = f"{score.percent:.1f}", f"{low:.1f} to {high:.1f}"
            cells.append([" ".join(name.split()), str(score.right), str(score.asked), *shown])
        return cells

    def confusion(self, most: int = MOST_WORDS) -> tuple[list[str], list[list[int]]]:
        """Counts of (expected word, given word), compared by position, in answers with the expected number of words.

        Args:
            most: how many words to keep.

        Returns:
            The w words that were most often confused with others; if none was, the words of expected answers that got
            an answer of another length. And [w, w + 1] counts: a row for each word when it was expected, a column for
            each word when it was given, and a last column for given answers with another number of words.
        """
        pairs: Counter[tuple[str, str]] = Counter()
        other: Counter[str] = Counter()
        for answer in self.scored:
            expected, said = answer.expected.split(), answer.answer.split()
            if len(expected) == len(said):
                pairs.update(zip(expected, said, strict=True))
            else:
                other.update(expected)
        confused: Counter[str] = Counter()
        for pair, count in pairs.items():
            if pair[0] != pair[1]:
                confused.update(dict.fromkeys(pair, count))
        words = [word for word, _ in (confused or other).most_common(most)]
        return words, [[*(pairs[row, column] for column in words), other[row]] for row in words]

    def plot(self, path: Path) -> None:
        """Draw the scores, and beside them the confused words if there are any, to a PNG file."""
        import matplotlib
        from matplotlib.figure import Figure

        words, counts = self.confusion()
        side = 2.5 + 0.36 * len(words)
        height = max(3.5, 1.5 + 0.45 * (len(self.scores) + 1), side)
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # words in scripts that the font lacks
            figure = Figure(figsize=(6 + (side + 1 if words else 0), height), layout="constrained")
            if words:
                left, right = figure.subplots(1, 2, width_ratios=[side + 1, 6])
                _draw_confusion(left, words, counts)
            else:
                right = figure.subplots()
            _draw_scores(right, {**self.scores, "total": self.total})
            figure.savefig(path, dpi=120)

    def write(self, directory: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write `answers.jsonl`, `summary.json`, `table.md` and `confusion.png`.

        Args:
            directory: made if it is not there.
            about: further entries of the summary.
        """
        directory.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in self.answers)
        (directory / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = {
            **(about or {}),
            "types": {name: score.as_dict() for name, score in self.scores.items()},
            "total": self.total.as_dict(),
            "errors": sum(answer.error is not None for answer in self.scored),
        }
        text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
        (directory / "summary.json").write_text(text, encoding="utf-8")
        (directory / "table.md").write_text(self.markdown() + "\n", encoding="utf-8")
        self.plot(directory / "confusion.png")


def _draw_confusion(axes: "Axes", words: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """A heat map of `Evaluation.confusion`, coloured by the share of each row."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                colour = "white" if shares[y][x] > 0.5 else "black"
                axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize=8)
    labels = [_label(word) for word in words]
    axes.set_xticks(range(len(labels) + 1), [*labels, "other"], rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.axvline(len(labels) - 0.5, color="grey", linewidth=1)
    axes.set(xlabel="said (other: another number of words)", ylabel="expected", title="Confused words")


def _draw_scores(axes: "Axes", scores: Mapping[str, Score]) -> None:
    """Bars of accuracy with their intervals, the first on top."""
    places, percents = range(len(scores)), [score.percent for score in scores.values()]
    ends = [(score.percent - score.interval[0], score.interval[1] - score.percent) for score in scores.values()]
    colours = ["tab:blue"] * (len(scores) - 1) + ["tab:grey"]
    axes.barh(places, percents, xerr=[*zip(*ends, strict=True)], color=colours, alpha=0.7, capsize=3)
    labels = [f"{_label(name, 30)}\n{score.right}/{score.asked}" for name, score in scores.items()]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="right answers, percent, with 95% intervals", title="Accuracy by type of question")
    axes.grid(axis="x", alpha=0.3)


def _label(text: str, most: int = 16) -> str:
    """Text for an axis: short, and printable."""
    shown = "".join(character if character.isprintable() else "�" for character in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def evaluate(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    rows: Sequence[TrainingRow],
    max_new_tokens: int = 512,
    history: str = "generated",
    limit: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Ask the questions of conversations, and compare the answers with the rows'.

    Scored are the answers that have a type, or, where no row has types, all that are to be learnt. Other questions are
    asked only if the history of a scored one needs their answers.

    Args:
        model: in evaluation mode.
        rows: checked, as `load_data` gives them.
        max_new_tokens: an answer's most tokens.
        history: what stands before later questions: the model's own answers ("generated") or the rows' ("reference").
        limit: ask in the first so many conversations that have something to score; None for all.
        progress: show a bar on standard error.

    Raises:
        ValueError: for a setting out of range, or if there are no rows. A question too long for the model is no error:
            its answer is wrong.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    _check_choices(history, limit)
    if not rows:
        raise ValueError("There are no rows to evaluate on.")
    typed = any(name is not None for row in rows for name in row.types)
    types = [row.types if typed else _untyped(row) for row in rows]
    chosen = [(row, names) for row, names in zip(rows, types, strict=True) if set(names) != {None}][:limit]
    engine = Engine(model, processor.tokenizer)
    answers: list[EvaluatedAnswer] = []
    questions = sum(len(_asked(names, history)) for _, names in chosen)
    with tqdm(total=questions, unit="question", disable=not progress) as bar:
        for row, names in chosen:
            for answer in _ask(engine, processor, row, names, settings, history):
                answers.append(answer)
                bar.update()
    if failed := [answer for answer in answers if answer.error is not None]:
        first = failed[0]
        logger.warning("%d questions got no answer, such as %s: %s", len(failed), first.origin, first.error)
    if dropped := sum(answer.dropped_turns > 0 for answer in answers):
        logger.warning("For %d questions the oldest turns were left out; a smaller answer length gives room.", dropped)
    return Evaluation(answers)


def _untyped(row: TrainingRow) -> tuple[str | None, ...]:
    """The types of a row's answers if no row has types: `UNTYPED` for an answer that is to be learnt, else None."""
    return tuple(UNTYPED if answer.get("weight", 1) else None for answer in row.messages[1::2])


def _check_choices(history: str, limit: int | None) -> None:
    if history not in HISTORIES:
        raise ValueError(f"history must be one of {', '.join(HISTORIES)}, got {history!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")


def _asked(types: Sequence[str | None], history: str) -> list[int]:
    """Which of a row's questions are asked: the scored ones, and those whose answers they build on."""
    scored = [number for number, name in enumerate(types) if name is not None]
    return scored if history == "reference" else list(range(scored[-1] + 1))


def _ask(
    engine: Engine,
    processor: VLChatProcessor,
    row: TrainingRow,
    types: Sequence[str | None],
    settings: GenerationSettings,
    history: str,
) -> Iterator[EvaluatedAnswer]:
    """The answers to one row's questions."""
    session = ChatSession(engine, processor, settings)
    if row.system is not None:
        session.system_prompt = row.system
    messages: list[dict[str, Any]] = [{**message, "images": load_pil_images([message])} for message in row.messages]
    for number in _asked(types, history):
        question, expected = messages[2 * number], messages[2 * number + 1]["content"].strip()
        if history == "reference":
            session.messages = messages[: 2 * number]
        answer, error = "", None
        try:
            answer = "".join(session.ask(question["content"], question["images"])).strip()
        except ValueError as problem:
            error = str(problem)
        yield EvaluatedAnswer(
            row.origin,
            question["content"],
            expected,
            answer,
            types[number],
            answer == expected,
            error,
            session.dropped_turns,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    description = "Ask a DeepSeek-VL model the questions of a file, and count the answers that are the file's."
    parser = OneLineParser(prog="python -m deepseek_vl.train.evaluate", description=description)
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint: a directory, a Hub id, or tiny")
    add("--data", nargs="+", action="extend", required=True, metavar="FILE", help="conversations, as for training")
    add("--output", type=Path, metavar="DIR", help="directory for all answers, the table and a plot")
    add("--skip-bad", action="store_true", help="go on without the bad rows")
    add("--limit", type=int, metavar="N", help="ask in the first N conversations only")
    add(
        "--history",
        choices=HISTORIES,
        default=HISTORIES[0],
        help="what stands before later questions: the model's own answers or the file's (default: %(default)s)",
    )
    add("--max_gen_len", type=positive, default=512, help="tokens per answer (default: %(default)s)")
    add_loading(parser)
    return parser


def check_output(directory: Path, about: Mapping[str, Any]) -> None:
    """Check that an evaluation may be written to a directory: that it replaces none but an earlier one of the same.

    Args:
        about: as in `Evaluation.write`.

    Raises:
        FileExistsError: if there is another evaluation, or a file of someone else's.
    """
    if not (there := [name for name in OUTPUT_FILES if (directory / name).exists()]):
        return
    with contextlib.suppress(OSError, ValueError):  # there is no summary, or it is not JSON
        before = load_json(directory / "summary.json")
        if isinstance(before, dict) and about.items() <= before.items():
            return
    raise FileExistsError(f"{str(directory)!r} has the {there[0]} of something else; choose another --output.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the table; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if not sys.stderr.isatty():
        disable_progress_bar()
    # Errors in the arguments are found before the model is loaded.
    GenerationSettings(max_new_tokens=args.max_gen_len)
    _check_choices(args.history, args.limit)
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    check_quantization(device, args.quantize)
    next(read_rows(args.data), None)
    about = {
        "model": args.model_path,
        "data": args.data,
        "history": args.history,
        "limit": args.limit,
        "max_gen_len": args.max_gen_len,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": args.quantize,
    }
    if args.output:
        import matplotlib  # noqa: F401  its absence is an error before the first question

        check_output(args.output, about)
        args.output.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=args.output).close()
        except OSError as error:
            raise OSError(f"Nothing can be written into {str(args.output)!r}: {error.strerror}.") from error
    _, processor, model = load_pretrained_model(args.model_path, device=device, dtype=dtype, quantize=args.quantize)
    rows, _ = load_data(args.data, processor, skip_bad=args.skip_bad)
    evaluation = evaluate(
        model, processor, rows, args.max_gen_len, args.history, args.limit, progress=sys.stderr.isatty()
    )
    # Types may have characters that the terminal's encoding lacks.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="replace")
    sys.stdout.write(evaluation.table() + "\n")
    if args.output:
        evaluation.write(args.output, about)
        logger.info("Wrote answers.jsonl, summary.json, table.md and confusion.png to %s.", args.output)
    if all(answer.error for answer in evaluation.scored):
        raise ValueError("No question got an answer; see the warning above.")


if __name__ == "__main__":
    raise SystemExit(main())
