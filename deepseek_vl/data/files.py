"""Writing files so that a reader never sees one half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end of the block.

    Until then an existing file stays as it is, even if the process is killed. After an exception the temporary file is
    removed.

    Raises:
        OSError: in one line with the file's name, if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error
        raise
