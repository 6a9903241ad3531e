"""Decoding untrusted pictures in separate processes.

A few bytes can keep a decoder busy for minutes or make it take gigabytes, and no decoder can be interrupted from
within. So each picture is opened, checked by its header, decoded and shrunk in a process without torch. The process is
killed when its time is over or its client has left, and its memory is limited by the system.

`python -m deepseek_vl.imaging.worker` is that process; `PictureDecoder` starts and talks to it.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, PictureLimits, load_image
from deepseek_vl.imaging.square import Square

_HEAD = struct.Struct(">IQ")
"""The head of each message: the lengths of its JSON and of its bytes."""

_MOST_KEPT_BYTES = 256 << 20
"""A process whose memory has ever exceeded this ends after its answer, so that the system gets the memory back."""


class PictureDecoder:
    """Decodes pictures in separate processes, a few at a time; other pictures wait.

    Args:
        limits: limits of each picture.
        processes: how many pictures are decoded at a time.
    """

    def __init__(self, limits: PictureLimits, processes: int = 2):
        self.limits = limits
        self._processes = processes
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def client(self) -> "PictureClient":
        """A new client, which sends pictures and may leave."""
        return PictureClient(self)

    def decode(self, data: bytes, square: Square | None = None) -> Image.Image:
        """`PictureClient.decode`, for a client that does not leave."""
        return self.client().decode(data, square)

    def close(self) -> None:
        """End the processes; callers that wait for one get an `ImageLoadError`."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for process in idle:
            _end(process)

    def _take(self, client: "PictureClient") -> subprocess.Popen[bytes]:
        with self._changed:
            self._changed.wait_for(lambda: self._busy < self._processes or client.has_left or self._is_closed)
            if client.has_left or self._is_closed:
                raise ImageLoadError("The picture is not decoded: its client has left.")
            self._busy += 1
            if self._idle:
                return self._idle.pop()
        try:
            return _start(self.limits)
        except (EOFError, OSError) as error:
            self._give_back(None)
            raise OSError(f"No process for decoding pictures can be started: {error}.") from error

    def _give_back(self, process: subprocess.Popen[bytes] | None) -> None:
        with self._changed:
            self._busy -= 1
            is_kept = process is not None and not self._is_closed
            if is_kept:
                self._idle.append(process)
            self._changed.notify_all()
        if process is not None and not is_kept:
            _end(process)


class PictureClient:
    """Sends pictures to a `PictureDecoder`, one after the other, until it leaves."""

    def __init__(self, decoder: PictureDecoder):
        self._decoder = decoder
        self._process: subprocess.Popen[bytes] | None = None
        self.has_left = False

    def leave(self) -> None:
        """Stop: a picture that is being decoded is given up at once. May be called from any thread."""
        with self._decoder._changed:
            self.has_left = True
            if self._process is not None:
                self._process.kill()
            self._decoder._changed.notify_all()

    def decode(self, data: bytes, square: Square | None = None) -> Image.Image:
        """A picture's first frame, upright and in RGB: the pixels that `load_image` gives.

        Args:
            data: the file's content.
            square: resize the picture to this square, as the model's image processor would, to save memory; None to
                leave its size.

        Raises:
            ImageLoadError: if the data is not a picture, is broken, or takes too long; and if the client has left.
            OSError: if no process can be started.
            ImageTooLargeError: for a picture beyond the limits, or that takes too much memory.
        """
        limits, is_whole = self._decoder.limits, False
        process = self._decoder._take(self)
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limits.seconds, give_up)
        try:
            with self._decoder._changed:
                self._process = process
            if self.has_left:  # since `_take`
                process.kill()
            timer.start()
            request = {"square": square and dataclasses.asdict(square), "limits": dataclasses.asdict(limits)}
            try:
                _write(process.stdin, request, data)
                reply, pixels = _read(process.stdout)
            except (EOFError, OSError, ValueError) as error:
                if late.is_set():
                    raise ImageLoadError(
                        f"The picture takes more than {limits.seconds:g} seconds to decode."
                    ) from error
                if self.has_left:
                    raise ImageLoadError("The picture is not decoded: its client has left.") from error
                raise ImageTooLargeError("The picture's decoder has failed, or taken too much memory.") from error
            is_whole = not reply["ends"]
        finally:
            timer.cancel()
            with self._decoder._changed:
                self._process = None
            if not is_whole or late.is_set() or self.has_left:
                _end(process)
                self._decoder._give_back(None)
            else:
                self._decoder._give_back(process)
        if "error" in reply:
            raise (ImageTooLargeError if reply["too_large"] else ImageLoadError)(reply["error"])
        return Image.frombytes("RGB", tuple(reply["size"]), pixels)


def _start(limits: PictureLimits) -> subprocess.Popen[bytes]:
    """Start a process, and wait until it is ready to decode. Its standard error is discarded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek_vl.imaging.worker", str(limits.memory_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # The package may not be installed, but only be on this process's path.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))},
        start_new_session=True,  # Ctrl-C in a terminal goes to the command alone, which then ends this
    )
    try:
        _read(process.stdout)  # wait, so that starting does not count as decoding time
    except EOFError:
        _end(process)
        raise
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # closing flushes what was not yet written
            pipe.close()


def _write(file: Any, head: dict[str, Any], data: bytes) -> None:
    text = json.dumps(head).encode()
    file.write(_HEAD.pack(len(text), len(data)) + text)
    file.write(data)
    file.flush()


def _read(file: Any) -> tuple[dict[str, Any], bytes]:
    """Read one message: its JSON object and its bytes.

    Raises:
        EOFError: at the end of the file.
    """
    lengths = _HEAD.unpack(_exactly(file, _HEAD.size))
    text, data = (_exactly(file, length) for length in lengths)
    return json.loads(text), data


def _exactly(file: Any, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def main() -> None:
    """Decode pictures from standard input to standard output, until the input ends."""
    # Text that a library prints must not get between the messages.
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory(int(sys.argv[1]))
    _write(stdout, {}, b"")
    with contextlib.suppress(EOFError):
        while True:
            request, data = _read(stdin)
            values: dict[str, Any] = {**request["limits"], "formats": tuple(request["limits"]["formats"])}
            limits = PictureLimits(**values)
            with _deadline(limits.seconds):
                head, pixels = _decoded(data, limits, request["square"])
            head["ends"] = _peak_memory() > _MOST_KEPT_BYTES
            _write(stdout, head, pixels)
            if head["ends"]:
                return


def _decoded(data: bytes, limits: PictureLimits, square: dict[str, Any] | None) -> tuple[dict[str, Any], bytes]:
    """The answer to a request: size and pixels, or an error."""
    try:
        image = load_image(data, limits)
        if square is not None:
            values: dict[str, Any] = {**square, "background": tuple(square["background"])}
            image = Square(**values).of(image)
        return {"size": image.size}, image.tobytes()
    except MemoryError:
        return {"error": "Refused image: there is too little memory to decode it.", "too_large": True}, b""
    except ValueError as error:
        return {"error": str(error), "too_large": isinstance(error, ImageTooLargeError)}, b""


@contextlib.contextmanager
def _deadline(seconds: float) -> Any:
    """Let the system kill this process if the block takes too long, even if the parent process is gone."""
    if not hasattr(signal, "setitimer"):  # on Windows
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # a system without such a limit, or with a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _peak_memory() -> int:
    """The most memory that this process has ever taken, in bytes; 0 where the system does not say.

    `getrusage` is not used, as it includes the peak of the parent process at the start.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0


if __name__ == "__main__":
    main()
