"""Untrusted pictures: headers are checked, decoding runs in another process, and resizing gives the same pixels."""

import base64
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from conftest import png_that_declares, saved, slow_jpeg
from PIL import Image

from deepseek_vl.engine.limits import PICTURES
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, load_image
from deepseek_vl.imaging.square import Square
from deepseek_vl.imaging.worker import PictureDecoder
from deepseek_vl.models import VLMImageProcessor

SQUARE = Square(side=384, min_size=14, background=(127, 127, 127))


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    decoder = PictureDecoder(PICTURES)
    yield decoder
    decoder.close()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


FILES = {
    "png": saved(noise(700, 500), "PNG"),
    "palette": saved(noise(300, 500).quantize(64), "PNG"),
    "transparent": saved(noise(90, 60, "RGBA"), "PNG"),
    "grey": saved(noise(500, 20, "L"), "PNG"),
    "jpeg": saved(noise(1100, 30), "JPEG"),
    "turned": saved(noise(640, 480), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "webp": saved(noise(384, 384), "WEBP", lossless=True),
    "animation": saved(noise(50, 70), "GIF", save_all=True, append_images=[noise(50, 70).rotate(90)]),
    "bmp": saved(noise(33, 47), "BMP"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_are_those_of_load_image(name: str, decoder: PictureDecoder) -> None:
    expected = load_image(FILES[name])
    assert decoder.decode(FILES[name]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("side", [384, 1024])
def test_shrunk_at_once_it_gives_the_model_the_same_pixels(name: str, side: int, decoder: PictureDecoder) -> None:
    processor = VLMImageProcessor(side)
    square = decoder.decode(FILES[name], Square(side, processor.min_size, processor.background_color))
    assert square.size == (side, side)
    np.testing.assert_array_equal(processor.resize(square), processor.resize(load_image(FILES[name])))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (png_that_declares(20_000, 10), "a side longer than 16384"),
        (png_that_declares(1, 16_000), "one side more than 200 times the other"),
        (png_that_declares(7000, 7000), "more than 40000000"),
        (saved(noise(9, 9), "TIFF"), "unknown kind"),
        (saved(noise(9, 9), "ICO"), "unknown kind"),
        (FILES["png"][:5000], "truncated"),
        (b"", "unknown kind"),
        (b"GIF89a" + bytes(30), "unknown kind"),
    ],
)
def test_the_header_says_what_is_not_decoded(data: bytes, cause: str, decoder: PictureDecoder) -> None:
    begun = time.monotonic()
    with pytest.raises(ImageLoadError, match=cause):
        decoder.decode(data, SQUARE)
    assert time.monotonic() - begun < 5


def test_a_picture_that_takes_too_long_is_given_up() -> None:
    decoder = PictureDecoder(replace(PICTURES, seconds=1))
    begun = time.monotonic()
    with pytest.raises(ImageLoadError, match="more than 1 seconds"):
        decoder.decode(slow_jpeg(), SQUARE)
    assert time.monotonic() - begun < 8
    assert decoder.decode(FILES["bmp"], SQUARE).size == (384, 384)  # a new process decodes the next picture
    decoder.close()
    assert no_child_is_busy()


def test_a_client_that_leaves_takes_its_picture_along(decoder: PictureDecoder) -> None:
    client = decoder.client()
    threading.Timer(0.5, client.leave).start()
    begun = time.monotonic()
    with pytest.raises(ImageLoadError, match="left"):
        client.decode(slow_jpeg(), SQUARE)
    assert time.monotonic() - begun < 5
    assert no_child_is_busy()
    with pytest.raises(ImageLoadError, match="left"):
        client.decode(FILES["bmp"])


def test_who_waits_for_a_place_can_leave() -> None:
    decoder = PictureDecoder(replace(PICTURES, seconds=20), processes=1)
    first, second = decoder.client(), decoder.client()
    outcomes: list[str] = []

    def decode(client: object, name: str) -> None:
        with pytest.raises(ImageLoadError):
            client.decode(slow_jpeg(), SQUARE)
        outcomes.append(name)

    threads = [threading.Thread(target=decode, args=pair) for pair in ((first, "first"), (second, "second"))]
    threads[0].start()
    time.sleep(0.5)
    threads[1].start()
    time.sleep(0.2)
    second.leave()
    threads[1].join(5)
    assert outcomes == ["second"]
    first.leave()
    threads[0].join(5)
    assert outcomes == ["second", "first"]
    decoder.close()


def memory_of_decoders() -> int:
    """The resident memory of all decoders in bytes, except of forks that still share their parent's memory."""
    total = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "deepseek_vl.imaging.worker" in child.cmdline():
                total += child.memory_info().rss
    return total


def test_memory_is_bounded_and_comes_back() -> None:
    """Six pictures of 40 million pixels in 2 KB each: few are decoded at a time, and their memory is freed."""
    data = saved(Image.new("RGB", (6320, 6320)), "WEBP", lossless=True)
    assert len(data) < 3000
    decoder = PictureDecoder(replace(PICTURES, seconds=60))
    before = psutil.Process().memory_info().rss
    threads = [threading.Thread(target=decoder.decode, args=(data, SQUARE)) for _ in range(6)]
    for thread in threads:
        thread.start()
    highest = 0
    while any(thread.is_alive() for thread in threads):
        highest = max(highest, memory_of_decoders())
        time.sleep(0.05)
    assert 100 << 20 < highest < 1400 << 20
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert memory_of_decoders() < 400 << 20
    decoder.close()


def test_ordinary_pictures_take_one_process() -> None:
    """The decoder's limit does not count its parent's memory, of which this test has more than a decoder may keep."""
    ballast = np.ones(300 << 20, dtype=np.uint8)
    decoder = PictureDecoder(PICTURES)
    before = set(psutil.Process().children())
    workers = set()
    for name in FILES:
        decoder.decode(FILES[name], SQUARE)
        workers |= set(psutil.Process().children()) - before
    assert len(workers) == 1
    assert ballast.all()
    decoder.close()


def test_too_little_memory_is_an_error_of_the_picture() -> None:
    decoder = PictureDecoder(replace(PICTURES, memory_bytes=200 << 20))
    with pytest.raises(ImageTooLargeError, match="memory"):
        decoder.decode(saved(Image.new("RGB", (6320, 6320)), "PNG"), SQUARE)
    assert decoder.decode(FILES["jpeg"], SQUARE).size == (384, 384)
    decoder.close()


def test_it_needs_no_torch_and_ends_with_its_parent() -> None:
    code = """
import sys, time
from deepseek_vl.engine.limits import PICTURES
from deepseek_vl.imaging.worker import PictureDecoder
import base64
decoder = PictureDecoder(PICTURES)
decoder.decode(base64.b64decode(sys.argv[1]))
assert "torch" not in sys.modules
print(decoder._idle[0].pid, flush=True)
time.sleep(100)
"""
    arguments = [sys.executable, "-c", code, base64.b64encode(FILES["bmp"]).decode()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(10)


def test_libraries_noise_stays_away(decoder: PictureDecoder, capfd: pytest.CaptureFixture[str]) -> None:
    broken = bytearray(FILES["jpeg"])
    broken[-400:-200] = bytes(200)
    for data in (bytes(broken), FILES["webp"][:-300]):
        try:
            decoder.decode(data)
        except ImageLoadError as error:
            assert len(str(error)) < 200
    assert capfd.readouterr() == ("", "")


def no_child_is_busy() -> bool:
    """Whether this process's children use no CPU time."""
    children = psutil.Process().children()
    used = [sum(child.cpu_times()[:2]) for child in children]
    time.sleep(0.5)
    return all(sum(c.cpu_times()[:2]) - u < 0.2 for c, u in zip(children, used, strict=True) if c.is_running())


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        (RAMP.astype(np.uint16), "PNG"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
    ],
)
def test_more_than_8_bits_are_scaled(numbers: np.ndarray, kind: str, tmp_path: Path) -> None:
    Image.fromarray(numbers).save(tmp_path / "scan", kind)
    grey = np.asarray(load_image(tmp_path / "scan"))[..., 0]
    assert np.abs(grey - RAMP / 256).max() < 2
    direct = np.asarray(load_image(Image.fromarray(numbers)))[..., 0]
    np.testing.assert_array_equal(direct, grey)


def test_8_bits_in_wider_numbers_stay_as_they_are() -> None:
    numbers = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(numbers)))[..., 0], numbers)


BMP = base64.b64encode(FILES["bmp"]).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/bmp;base64,{BMP}",
        f"DATA:IMAGE/BMP;BASE64,{BMP}",
        f"data:;base64,{BMP}",
        f"data:text/plain;charset=utf-8;base64,{BMP}",
        f"data:image/png; base64,{BMP.rstrip('=')}",
        f"data:image/bmp;base64,{BMP[:40]}\n  {BMP[40:]}",
        f"data:image/bmp;base64,{quote(BMP)}",
        f"data:image/bmp,{quote(FILES['bmp'])}",
    ],
)
def test_data_urls_are_judged_by_their_bytes(url: str) -> None:
    assert load_image(url).tobytes() == load_image(FILES["bmp"]).tobytes()


@pytest.mark.parametrize("source", ["data:" + "secret" * 9000, f"data:image/png;base64,{'sec-ret' * 9000}", BMP * 9])
def test_an_error_does_not_repeat_the_payload(source: str) -> None:
    with pytest.raises(ImageLoadError) as error:
        load_image(source)
    assert len(str(error.value)) < 250
    assert "secretsecret" not in str(error.value)
