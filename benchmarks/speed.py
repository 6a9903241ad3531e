"""This package beside transformers' own classes, and both beside the machine's limit.

    python benchmarks/speed.py --model_path DIR --table first-token turns

One command per table, or for several: the same weights (a checkpoint in the reference's layout; random ones will do,
see `benchmarks/random_checkpoint.py`), the same inputs, one contender after the other, each in a process of its
own. Ratios say how many times better than the best peer. The limit is the time that the machine's fastest matrix
product, or reading the weights once, would take. Numbers go to a .json file beside the plot.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import plot, write_json

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sizes:
    """Sizes in tokens, and `batches` (images at once), `repeats`, `matrix` (its side), `memory` (bytes to read)."""

    prompt: int = 640
    answer: int = 17
    follow_up: int = 20
    text: int = 60
    caption: int = 64
    batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 3
    matrix: int = 4096
    memory: int = 2**29


SIZES = {
    "published": Sizes(),
    "small": Sizes(80, 4, 8, 60, 4, batches=(1, 2), repeats=1, matrix=256, memory=2**20),
}
"""`published` for real models; `small` for miniature models, to try the benchmark itself."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        quantity: what was measured.
        contender: the contender that was measured.
        value, unit: the result; rates (`tokens/s`) are better if higher, times if lower.
        is_peer: whether the others are compared with this contender.
        memory: the peak of memory in use beyond the weights, in bytes.
        limit: the machine's best possible value, in the same unit.
        ratio: how many times better than the best peer.
        read: the bytes of weights that are read in that time.
    """

    quantity: str
    contender: str
    value: float
    unit: str = "s"
    is_peer: bool = False
    memory: int | None = None
    limit: float | None = None
    ratio: float | None = None
    read: int | None = None


@dataclass(frozen=True)
class Setup:
    """The options of the command line."""

    model_path: str
    exported: str | None
    device: str
    quantize: Sequence[str]
    peer_dtypes: Sequence[str]
    compiled: bool
    sizes: Sizes
    llama_cpp: Sequence[str]
    mmproj: str | None

    def ours(self, dtype: str = "auto") -> dict[str, dict[str, Any]]:
        """Contenders of this package by label: plain, with quantised weights, and compiled where that is possible."""
        plain = {"name": "ours", "model_path": self.model_path, "device": self.device, "dtype": dtype}
        label = "default dtype" if dtype == "auto" else dtype
        ours = {f"ours, {label}": plain, **{f"ours, {kind}": {**plain, "quantize": kind} for kind in self.quantize}}
        if self.compiled:
            is_gpu = self.device.startswith("cuda")
            can_be = {name: contender for name, contender in ours.items() if is_gpu or "quantize" not in contender}
            ours |= {f"{name}, compiled": {**contender, "compiled": True} for name, contender in can_be.items()}
        return ours

    def peers(self, *dtypes: str) -> dict[str, dict[str, Any]]:
        """Contenders of transformers' own class by label, in these dtypes or else in those of the command line."""
        peer = {"name": "transformers", "model_path": self.model_path, "device": self.device}
        return {f"transformers, {dtype}": {**peer, "dtype": dtype} for dtype in dtypes or self.peer_dtypes}


def command(run: str, **arguments: Any) -> list[str]:
    """The command line that runs a function of `contenders.py`."""
    return [sys.executable, str(Path(__file__).with_name("contenders.py")), json.dumps({"run": run, **arguments})]


def result_of(run: str, **arguments: Any) -> dict[str, Any]:
    """Run a function of `contenders.py` in another process; returns its result."""
    done = subprocess.run(command(run, **arguments), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_until(line: str, arguments: Sequence[str]) -> float:
    """Seconds from a program's start until its output has a text; the program is then killed.

    Raises:
        SystemExit: if the program ends without printing the text.
    """
    begun = time.perf_counter()
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as program:
        seen = ""
        while line not in seen:
            character = program.stdout.read(1)  # character by character, as a prompt has no line end
            if not character:
                raise SystemExit(f"{' '.join(arguments)} has ended without {line!r}.")
            seen += character
        seconds = time.perf_counter() - begun
        program.kill()
    return seconds


def machine_limits(setup: Setup) -> dict[str, Any]:
    """The operations of a prompt with an image, and the machine's rates, by `contenders.limits`."""
    sizes = setup.sizes
    return result_of(
        "limits",
        model_path=setup.model_path,
        device=setup.device,
        prompt=sizes.prompt,
        matrix=sizes.matrix,
        memory=sizes.memory,
    )


def best_rate(limits: dict[str, Any], contender: dict[str, Any]) -> float:
    """The rate of matrix products for a contender's limit: float32's for float32, else the fastest of all dtypes."""
    rates = limits["multiply"]
    is_float32 = contender["dtype"] == "float32" and "quantize" not in contender
    return rates["float32"] if is_float32 else max(rates.values())


def first_token(setup: Setup) -> Iterator[Row]:
    """Time to the first token of a prompt with an image, and time per token afterwards."""
    limits = machine_limits(setup)
    arguments = {"prompt": setup.sizes.prompt, "answer": setup.sizes.answer}
    for label, contender in {**setup.peers(), **setup.ours()}.items():
        is_peer = contender["name"] != "ours"
        result = result_of("first_token", contender=contender, **arguments)
        limit = limits["first"] / best_rate(limits, contender)
        yield Row("first token", label, result["first"], "s", is_peer, result["memory"], limit)
        if result["each"] is not None:
            yield _per_token(label, result, limits, is_peer)
    for file in setup.llama_cpp:
        results = result_of(
            "llama_cpp_first_token", model=file, mmproj=setup.mmproj, model_path=setup.model_path, **arguments
        )
        for what, result in results.items():
            label = f"llama.cpp, {Path(file).stem}, {what}"
            operations = limits["first"] if what == "with the picture" else limits["first"] - limits["encode"]
            limit = operations / max(limits["multiply"].values())
            yield Row("first token", label, result["first"], "s", True, None, limit)
            if result["each"] is not None:
                yield _per_token(label, result, limits, True)


def _per_token(label: str, result: dict[str, Any], limits: dict[str, Any], is_peer: bool) -> Row:
    limit = result["read"] / limits["read"]
    return Row("per token", label, result["each"], "s", is_peer, None, limit, read=result["read"])


def turns(setup: Setup) -> Iterator[Row]:
    """Time to the first token of the second answer about an image."""
    arguments = {"prompt": setup.sizes.prompt, "follow_up": setup.sizes.follow_up}
    first_answer = None
    for label, contender in {**setup.ours(), **setup.peers()}.items():
        is_peer = contender["name"] != "ours"
        said = first_answer if is_peer else None
        result = result_of("second_turn", contender=contender, first_answer=said, **arguments)
        first_answer = first_answer or result["first_answer"]
        yield Row("second turn's first token", label, result["first"], "s", is_peer)


def text_only(setup: Setup) -> Iterator[Row]:
    """Time to the first token of a prompt without images, also with the blank one that the reference encodes."""
    ours = setup.ours()
    contenders = {"ours, after a blank image": (next(iter(ours.values())), True)}
    contenders |= {label: (contender, False) for label, contender in ours.items()}
    for label, (contender, blank) in contenders.items():
        result = result_of("text_only", contender=contender, prompt=setup.sizes.text, blank=blank)
        yield Row("text-only first token", label, result["first"], "s", blank)


def encode(setup: Setup) -> Iterator[Row]:
    """Time of the vision towers and the projector on one image."""
    limits = machine_limits(setup)
    for label, contender in {**setup.peers("float32"), **setup.ours("float32")}.items():
        is_peer = contender["name"] != "ours"
        result = result_of("encode", contender=contender, repeats=setup.sizes.repeats)
        limit = limits["encode"] / best_rate(limits, contender)
        yield Row("encode an image", label, result["seconds"], "s", is_peer, result["memory"], limit)


def batch(setup: Setup) -> Iterator[Row]:
    """Rate of captions of several images at once, compared with one after the other."""
    sizes = setup.sizes
    for label, contender in setup.ours().items():
        result = result_of(
            "batch", contender=contender, sizes=sizes.batches, prompt=sizes.prompt, caption=sizes.caption
        )
        for count, rate in result["rates"].items():
            name = f"{label}, {count} at once" if int(count) > 1 else f"{label}, one after the other"
            yield Row(f"captions, {label}", name, rate, "tokens/s", count == "1")


def load(setup: Setup) -> Iterator[Row]:
    """Time from a program's start until the model is loaded, with the files in the disk's cache."""
    with tempfile.TemporaryDirectory() as directory:
        exported = setup.exported
        if exported is None:
            exported = str(Path(directory) / "exported")
            convert = [sys.executable, "-m", "deepseek_vl.convert", setup.model_path, exported, "--to", "transformers"]
            subprocess.run(convert, check=True, cwd=ROOT)
        device = "cpu" if setup.device == "auto" else setup.device
        peers = {
            label: command("load", contender={**contender, "model_path": exported, "device": device})
            for label, contender in setup.peers().items()
        }
        ours = {label: command("load", contender=contender) for label, contender in setup.ours().items()}
        chat = [sys.executable, "cli_chat.py", "--model_path", setup.model_path, "--device", setup.device]
        for label, arguments in {**peers, **ours, "cli_chat.py to its prompt": chat}.items():
            line = "User:" if arguments is chat else "ready"
            seconds = min(seconds_until(line, arguments) for _ in range(setup.sizes.repeats))
            yield Row("load", label, seconds, "s", label in peers)


def preprocess(setup: Setup) -> Iterator[Row]:
    """Time from a 1080p picture to pixel values on one core; the limit is the time of Pillow's resize alone."""
    repeats = 10 * setup.sizes.repeats
    for image_size, do_normalize in ((384, True), (1024, False)):
        result = result_of("preprocess", image_size=image_size, do_normalize=do_normalize, repeats=repeats)
        quantity = f"preprocess to {image_size} px"
        yield Row(quantity, "step by step", 1000 * result["step by step"], "ms", True, None, 1000 * result["resize"])
        yield Row(quantity, "ours", 1000 * result["ours"], "ms", False, None, 1000 * result["resize"])


TABLES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "first-token": first_token,
    "turns": turns,
    "text-only": text_only,
    "encode": encode,
    "batch": batch,
    "load": load,
    "preprocess": preprocess,
}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with `ratio` filled in, from the best peer's value of the same quantity."""
    result = []
    for row in rows:
        peers = [peer.value for peer in rows if peer.is_peer and peer.quantity == row.quantity]
        ratio = None
        if peers and not row.is_peer:
            ratio = row.value / max(peers) if row.unit.endswith("/s") else min(peers) / row.value
        result.append(Row(**{**vars(row), "ratio": ratio}))
    return result


def line(row: Row) -> str:
    """A row as a line of text."""
    parts = [f"{row.quantity:26s} {row.contender:44s} {row.value:9.4g} {row.unit:8s}"]
    parts.append(f"{row.ratio:6.2f}x" if row.ratio is not None else " " * 7)
    if row.limit is not None:
        parts.append(f"  limit {row.limit:.3g} {row.unit} ({row.limit / row.value:.0%})")
    if row.read is not None:
        parts.append(f"  {row.read / row.value / 1e9:.1f} GB/s")
    if row.memory is not None:
        parts.append(f"  working memory {row.memory / 1e9:.2f} GB")
    return "".join(parts).rstrip()


def draw(rows: Sequence[Row], file: Path) -> None:
    """Plot each contender's ratio to the best peer as a bar, and the machine's limit as a mark."""
    compared = [row for row in rows if row.ratio is not None]
    with plot(file, (7, 1 + 0.35 * len(compared))) as axes:
        names = [f"{row.quantity}: {row.contender}" for row in compared]
        axes.barh(names, [row.ratio for row in compared], color="tab:blue", label="measured")
        limited = [(name, row) for name, row in zip(names, compared, strict=True) if row.limit]
        if limited:
            ratios = [row.ratio * row.value / row.limit for _, row in limited]
            axes.plot(ratios, [name for name, _ in limited], "k|", markersize=12, label="the machine's limit")
        axes.axvline(1, color="grey", linewidth=1)
        axes.set_xlabel("times the best peer")
        axes.invert_yaxis()
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="a checkpoint's directory, in the reference's layout")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--exported", help="for load: the same in transformers' layout, if it was converted already")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize", nargs="*", default=["int8"], help="kinds to measure too (default: int8)")
    parser.add_argument("--compile", action="store_true", help="measure compiled models too")
    parser.add_argument("--peer_dtypes", nargs="+", default=["float32", "bfloat16"], help="of transformers' class")
    parser.add_argument("--llama_cpp", nargs="+", default=[], metavar="FILE.gguf", help="the same model in llama.cpp")
    parser.add_argument("--mmproj", metavar="FILE.gguf", help="its vision tower, to measure it with the picture too")
    parser.add_argument("--size", choices=SIZES, default="published", help="of the inputs")
    parser.add_argument("--output", type=Path, default=Path("speed.png"), help="the plot; numbers go to .json")
    args = parser.parse_args()

    model_path = str(Path(args.model_path).resolve())
    setup = Setup(
        model_path,
        args.exported,
        args.device,
        args.quantize,
        args.peer_dtypes,
        args.compile,
        SIZES[args.size],
        [str(Path(file).resolve()) for file in args.llama_cpp],
        args.mmproj and str(Path(args.mmproj).resolve()),
    )
    rows: list[Row] = []
    for name in args.table:
        measured = []
        for row in TABLES[name](setup):
            measured.append(row)
            print(line(row), file=sys.stderr, flush=True)
        rows += with_ratios(measured)
    print(*map(line, rows), sep="\n")
    write_json(rows, args.output.with_suffix(".json"))
    draw(rows, args.output)


if __name__ == "__main__":
    main()
