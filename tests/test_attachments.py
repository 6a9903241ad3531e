"""Paths of images in messages that are typed in the terminal."""

from pathlib import Path

import pytest
from conftest import make_picture

from deepseek_vl.imaging.open import ImageLoadError
from deepseek_vl.serve.terminal.attachments import take_images

TAG = "<image_placeholder>"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures and a space in its name."""
    directory = tmp_path / "my pictures"
    directory.mkdir()
    for name in ("a.png", "b.JPG", "red square.png", "it's (1).webp"):
        make_picture(directory / name)
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize(
    ("text", "expected", "sources"),
    [
        ("What is this? {here}/a.png", "What is this?", ["{here}/a.png"]),
        ("{here}/a.png What is this?", "What is this?", ["{here}/a.png"]),
        ("{here}/red square.png What is this?", "What is this?", ["{here}/red square.png"]),
        ("{here}/a.png {here}/b.JPG Which?", "Which?", ["{here}/a.png", "{here}/b.JPG"]),
        ("a.png Which? b.JPG", "Which?", ["a.png", "b.JPG"]),
        ("Is a.png like 'red square.png', or not?", f"Is {TAG} like {TAG}, or not?", ["a.png", "red square.png"]),
        ("b.JPG\nIs it like ./a.png ?", f"{TAG}\nIs it like {TAG} ?", ["b.JPG", "./a.png"]),
        ("Which has the star? b.JPG, a.png", "Which has the star?", ["b.JPG", "a.png"]),
        ("b.JPG,a.png, Which?", "Which?", ["b.JPG", "a.png"]),
        ("Compare b.JPG and a.png", f"Compare {TAG} and {TAG}", ["b.JPG", "a.png"]),
        (
            "How do b.JPG, 'red square.png' and a.png differ?",
            f"How do {TAG}, {TAG} and {TAG} differ?",
            ["b.JPG", "red square.png", "a.png"],
        ),
        ("b.JPG and a.png: which is red?", f"{TAG} and {TAG}: which is red?", ["b.JPG", "a.png"]),
        ('Why is it called "my a.png" here?', 'Why is it called "my a.png" here?', []),
        (f"{TAG}What? a.png", f"{TAG}What?", ["a.png"]),
        ("What is in (a.png)?", f"What is in ({TAG})?", ["a.png"]),
        ("{here}/it\\'s\\ \\(1\\).webp", "", ["{here}/it's (1).webp"]),
        ("https://example.org/x/a%20b.png?w=1 What?", "What?", ["https://example.org/x/a%20b.png?w=1"]),
        ("What is https://example.org/a.png?", "What is " + TAG + "?", ["https://example.org/a.png"]),
        ("See https://example.org/page, please.", "See https://example.org/page, please.", []),
        ("The logo.png that I do not have", "The logo.png that I do not have", []),
        ("A .png is 3.5 MB; what's a .gif?", "A .png is 3.5 MB; what's a .gif?", []),
        ("Write it as http://[your-host]/x.png here", "Write it as http://[your-host]/x.png here", []),
        ('Is <img src="/static/logo.png"> valid?', 'Is <img src="/static/logo.png"> valid?', []),
        ("", "", []),
    ],
)
def test_images_are_taken_out_of_the_text(text: str, expected: str, sources: list[str], here: Path) -> None:
    result = take_images(text.replace("{here}", str(here)), TAG)
    assert result == (expected, [source.replace("{here}", str(here)) for source in sources])


@pytest.mark.parametrize(
    "path",
    ["/no/such.png", "./such.png", "~/no/such.jpeg", "'/no such/a.png'", "file:///no.gif", "no/a.png", '"my a.png"'],
)
def test_a_path_that_leads_nowhere_is_an_error(path: str, here: Path) -> None:
    with pytest.raises(ImageLoadError, match="there is no such file"):
        take_images(f"What is {path}?", TAG)


def test_a_very_long_text_is_no_trouble(here: Path) -> None:
    for text in ("word " * 20_000 + "x" * 5_000 + ".png", " ".join(f"IMG_{i:04}.png" for i in range(400)) + " ."):
        assert take_images(text, TAG) == (text, [])
