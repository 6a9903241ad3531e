"""The models that come with the package: each directory beside this file."""

import os
from pathlib import Path


def bundled_or_same(name_or_path: str | os.PathLike) -> str:
    """The directory of a bundled model for its name, unless there is a checkpoint directory of that name; any other
    path or Hub id as it is."""
    name = os.fspath(name_or_path)
    bundled = Path(__file__).parent / name
    is_name = bundled.parent == Path(__file__).parent and (bundled / "config.json").is_file()
    return str(bundled) if is_name and not (Path(name) / "config.json").is_file() else name
