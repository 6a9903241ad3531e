"""Captions of many pictures: each picture has exactly one, even if runs are killed or fail."""

import csv
import io
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest
from conftest import ROOT, Loaded, in_terminal, interrupt, make_picture, messages_of, saved, wait_until
from PIL import Image

from deepseek_vl.caption import main
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import PromptTooLongError
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import ImageLoadError, load_image
from deepseek_vl.serve.batch.caption import READ_AHEAD, Caption, caption_many
from deepseek_vl.serve.batch.inputs import find_pictures, key_of, open_picture
from deepseek_vl.serve.batch.journal import Journal, read_rows
from deepseek_vl.serve.inference import load_model, stream_answer

PROMPT = "Describe the image."
SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(one_thread: None) -> Loaded:
    return load_model("tiny", device="cpu", dtype="float32")


@pytest.fixture
def engine(tiny: Loaded) -> Iterator[Engine]:
    """An engine of the bundled model with at most three rows in its batch."""
    engine = Engine(tiny[1], tiny[0], EngineLimits(max_rows=3))
    yield engine
    engine.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with seven pictures at two depths, a broken picture, a text file and a hidden file."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "deeper").mkdir(parents=True)
    for number in range(4):
        make_picture(folder / f"{number}.png", seed=number)
    for number in range(4, 7):
        make_picture(folder / "deep" / "deeper" / f"{number}.JPG", seed=number)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    return folder


def command(*arguments: str | os.PathLike, **options: Any) -> list[str]:
    """The command line that runs the command in another process."""
    return [sys.executable, "-m", "deepseek_vl.caption", *in_process(*arguments, **options)]


def in_process(*arguments: str | os.PathLike, prompt: str = PROMPT, length: int = 8) -> list[str]:
    """Arguments for `main`: these and the ones that all tests share."""
    model = ["--model_path", "tiny", "--device", "cpu", "--dtype", "float32", "--max_gen_len", str(length)]
    return [*map(os.fspath, arguments), *model, "--prompt", prompt]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path))


def names(paths: list[str | os.PathLike], **options: Any) -> list[str]:
    return [picture.name for picture in find_pictures([os.fspath(path) for path in paths], **options)]


# As a library


def test_every_picture_has_the_answer_that_it_has_alone(tiny: Loaded, engine: Engine, pictures: Path) -> None:
    _, model, processor = tiny
    files = sorted(pictures.rglob("*.png")) + sorted(pictures.rglob("*.JPG"))
    answers = dict(caption_many(model, processor, files, PROMPT, SHORT, engine))
    assert sorted(answers) == list(range(len(files)))
    for file, answer in zip(files, (answers[i] for i in range(len(files))), strict=True):
        if file.name in ("broken.png", ".hidden.png"):
            assert isinstance(answer, ImageLoadError)
            assert file.name in str(answer)
            continue
        messages = messages_of(f"{processor.image_tag}\n{PROMPT}", load_image(file))
        with stream_answer(model, processor, messages, SHORT) as stream:
            text = "".join(stream).strip()
            alone = Caption(text, stream.prompt_tokens, stream.completion_tokens, stream.finish_reason)
        assert answer == alone


def test_pictures_are_read_a_few_ahead_and_no_memory_is_kept_of_them(tiny: Loaded, engine: Engine) -> None:
    taken, most = 0, 0

    def images() -> Iterator[Image.Image]:
        nonlocal taken
        for number in itertools.count():  # an endless stream of pictures
            taken += 1
            yield Image.new("RGB", (40, 40), (number * 37 % 256, number % 256, 90))

    kept = set()
    answers = caption_many(*tiny[1:], images(), PROMPT, SHORT, engine)
    for ended, (_, answer) in enumerate(answers, 1):
        most = max(most, taken - ended)
        assert isinstance(answer, Caption)
        if ended > 10:
            kept.add(engine.memory_used - sum(row.reserved_bytes for row in list(engine._rows)))
        if ended == 40:
            break
    answers.close()
    assert most <= engine.limits.max_rows + READ_AHEAD
    assert len(kept) == 1, "what is kept does not grow"
    assert engine.running == engine.waiting == 0, "nothing goes on that nobody waits for"


def test_the_beginning_that_all_prompts_share_runs_once(tiny: Loaded, engine: Engine) -> None:
    cached = []
    submit = engine.submit
    engine.submit = lambda generation: (cached.append(generation), submit(generation))
    images = [Image.new("RGB", (40, 40), (20 * number, 0, 0)) for number in range(10)]
    assert len(list(caption_many(*tiny[1:], images, PROMPT, SHORT, engine))) == 10
    assert [generation.keeps for generation in cached].count(True) == 1
    assert cached[-1].cached_tokens > 20


def test_a_prompt_that_does_not_fit_is_refused_at_once(tiny: Loaded) -> None:
    with pytest.raises(PromptTooLongError, match="1024 positions"):
        caption_many(*tiny[1:], [], "word " * 2000)
    with pytest.raises(ValueError, match="2 <image_placeholder>"):
        caption_many(*tiny[1:], [], "<image_placeholder><image_placeholder>")


def test_an_error_of_the_generator_or_the_engine_ends_it(
    tiny: Loaded, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images() -> Iterator[Image.Image]:
        yield Image.new("RGB", (40, 40))
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        list(caption_many(*tiny[1:], images(), PROMPT, SHORT, engine))
    monkeypatch.setattr(tiny[1].language_model.lm_head, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(caption_many(*tiny[1:], [Image.new("RGB", (40, 40))], PROMPT, SHORT, engine))
    assert engine.running == engine.waiting == 0


# What is asked about


def test_folders_globs_and_lists_name_each_picture_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures.parent)
    expected = [f"pictures/{name}" for name in ("0.png", "1.png", "2.png", "3.png", "broken.png")]
    expected += [f"pictures/deep/deeper/{number}.JPG" for number in (4, 5, 6)]
    assert names(["pictures"]) == expected
    assert names(["./pictures/", pictures, "pictures/*.png", "pictures/0.png"]) == expected
    assert names(["pictures/**/*.JPG"]) == expected[5:]
    assert names(["pictures/[12].png"]) == expected[1:3]
    listed = pictures / "list.txt"
    listed.write_bytes(b"0.png\r\n\ndeep\nnothing.png\n")
    assert names(["pictures/list.txt"]) == [expected[0], *expected[5:], "nothing.png"]
    make_picture(pictures / "new\nline.png")
    listed.write_bytes(b"new\nline.png\0" + b"1.png\0")
    assert names([listed]) == [str(pictures / "new\nline.png"), str(pictures / "1.png")]
    listed.write_text("pictures/2.png", encoding="utf-8-sig")
    assert names([listed]) == ["pictures/2.png"], "or from the current folder"
    make_picture(pictures / "a[1].png")
    assert names(["pictures/a[1].png"]) == ["pictures/a[1].png"], "a file's name is no pattern"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_in_utf_16_names_its_pictures_alone(tmp_path: Path, encoding: str) -> None:
    """PowerShell writes such lists. Read as bytes, their NULs would leave single letters, among them `/` and `.`."""
    for name in ("a.png", "b.png", "größe.png"):
        make_picture(tmp_path / name)
    listed = tmp_path / "list.txt"
    mark = {"utf-16-le": b"", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    listed.write_bytes(mark + f"../{tmp_path.name}/a.png\r\ngröße.png\r\n".encode(encoding))
    if encoding == "utf-16-le":  # without a mark
        with pytest.raises(ValueError, match="is UTF-16 text; save it as UTF-8"):
            names([listed])
    else:
        assert names([listed]) == [str(tmp_path / "a.png"), str(tmp_path / "größe.png")]


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageLoadError, match="no regular file"):
        open_picture(find_pictures([str(tmp_path)])[0])


def test_links_in_circles_and_links_to_folders(pictures: Path) -> None:
    (pictures / "deep" / "round").symlink_to(pictures)
    other = pictures.parent / "other"
    other.mkdir()
    make_picture(other / "linked.png")
    (pictures / "elsewhere").symlink_to(other)
    (pictures / "gone.png").symlink_to(pictures / "nothing.png")
    found = {Path(name).name: name for name in names([pictures])}
    expected = {"0.png", "1.png", "2.png", "3.png", "4.JPG", "5.JPG", "6.JPG", "broken.png", "gone.png", "linked.png"}
    assert found.keys() == expected
    with pytest.raises(ImageLoadError, match="no such file"):
        open_picture(find_pictures([found["gone.png"]])[0])


@pytest.mark.parametrize("missing", ["nothing", "nothing/*.png"])
def test_what_is_missing_is_one_clear_error(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(in_process(tmp_path / missing, "--output", tmp_path / "out.jsonl")) == 1
    error = capsys.readouterr().err.strip()
    assert missing in error
    assert "\n" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no pictures in"):
        find_pictures([str(tmp_path)])


def shard_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def test_the_pictures_of_a_shard(tmp_path: Path) -> None:
    content = [saved(Image.new("RGB", (30, 20), colour), "PNG") for colour in ("red", "lime")]
    shard = shard_of(
        tmp_path / "shard.tar",
        {"000.png": content[0], "000.txt": b"red", "a/001.png": content[1], "002.png": b"broken"},
    )
    found = find_pictures([str(shard)])
    assert [picture.name for picture in found] == [f"{shard}/{name}" for name in ("000.png", "a/001.png", "002.png")]
    assert [open_picture(picture).getpixel((5, 5)) for picture in found[:2]] == [(255, 0, 0), (0, 255, 0)]
    with pytest.raises(ImageLoadError, match=r"shard\.tar/002\.png"):
        open_picture(found[2])


def test_a_shard_that_ends_early_gives_what_it_has_and_an_error(tmp_path: Path) -> None:
    picture = saved(Image.effect_noise((60, 60), 90), "PNG")
    shard = shard_of(tmp_path / "shard.tar", {f"{number}.png": picture for number in range(3)})
    shard.write_bytes(shard.read_bytes()[: len(picture) + 2500])
    errors = []
    for picture in find_pictures([str(shard)]):
        try:
            open_picture(picture)
        except ImageLoadError as error:
            errors.append(str(error))
    assert errors
    assert all("shard.tar" in error for error in errors)


def test_pictures_in_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    make_picture(tmp_path / "beside.png", (30, 20))
    contents = [saved(Image.new("RGB", (30, 20), (9 * number, 0, 0)), "PNG") for number in range(7)]
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(7)), "jpg": contents}), file, row_group_size=3)
    found = find_pictures([str(file)])
    assert [picture.name for picture in found] == [f"{file}#{number}" for number in range(7)]
    assert [open_picture(picture).getpixel((5, 5))[0] for picture in found] == [9 * number for number in range(7)]

    structs = [{"bytes": contents[3], "path": None}, {"bytes": None, "path": "beside.png"}, None]
    parquet.write_table(pyarrow.table({"image": structs, "thumbnail": contents[:3]}), file)
    found = find_pictures([str(file)])
    assert open_picture(found[0]).getpixel((5, 5)) == (27, 0, 0)
    assert open_picture(found[1]).size == (30, 20)
    with pytest.raises(ImageLoadError, match=r"#2.*no picture"):
        open_picture(found[2])
    assert open_picture(find_pictures([str(file)], "thumbnail")[2]).getpixel((5, 5)) == (18, 0, 0)
    with pytest.raises(ValueError, match=r"no column 'photo'; it has 'image', 'thumbnail'"):
        find_pictures([str(file)], "photo")
    parquet.write_table(pyarrow.table({"a": contents, "b": contents}), file)
    with pytest.raises(ValueError, match="--image_column"):
        find_pictures([str(file)])
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ImageLoadError, match="no Parquet file"):
        open_picture(find_pictures([str(file)])[0])


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install '\.\[caption\]'"):
        find_pictures([str(tmp_path / "data.parquet")])


# The output

QUESTION = {"model": "tiny", "prompt": PROMPT}


def row(number: int) -> dict[str, Any]:
    """A row for a journal."""
    return {"path": f"{number}.png", "caption": f"caption\n{number} ü", "error": None}


def test_a_last_line_that_is_not_whole_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, QUESTION) as journal:
        for number in range(3):
            journal.add(row(number))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (0, 5, first - 1, first, first + 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path, QUESTION) as journal:
            for number in range(3):
                if key_of(f"{number}.png") not in journal:
                    journal.add(row(number))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"a list\nof mine\n", b"mine", b'{"format": "another"}\n', b"[]\n"])
def test_another_file_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Line 1 of .*mine.* another --output"):
        Journal(path, QUESTION)
    assert path.read_bytes() == content


def test_a_line_in_the_middle_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, QUESTION) as journal:
        journal.add(row(1))
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match="Line 3"):
        Journal(path, QUESTION)


def test_answers_to_another_question_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_picture(tmp_path / "a.png")
    with Journal(tmp_path / "out.jsonl", {**QUESTION, "prompt": "How?"}):
        pass
    with Journal(tmp_path / "out.jsonl", {**QUESTION, "prompt": "Why?"}) as journal:  # the journal had no rows yet
        journal.add(row(1))
    assert main(in_process(tmp_path / "a.png", "--output", tmp_path / "out.jsonl")) == 1
    error = capsys.readouterr().err
    assert "prompt was 'Why?', not 'Describe the image.'" in error
    assert "max_gen_len was None, not 8" in error


def test_a_second_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_picture(tmp_path / "a.png")
    with Journal(tmp_path / "out.jsonl", QUESTION):
        result = subprocess.run(
            command(tmp_path / "a.png", "--output", tmp_path / "out.jsonl"),
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
    assert result.returncode == 1
    assert "Another command is writing to" in result.stderr
    assert "\n" not in result.stderr.strip()


@pytest.mark.parametrize("output", ["nothing/out", "folder", "/dev/full"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    assert main([*in_process(tmp_path / "a.png", "--output", tmp_path / output), "--model_path", "nothing"]) == 1
    assert output.removesuffix("/out") in capsys.readouterr().err


def test_a_hundred_thousand_rows_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, QUESTION) as journal:
        for number in range(100_000):
            journal.add(row(number))
    with Journal(path, QUESTION) as journal:
        assert journal.rows == 100_000
        assert key_of("99999.png") in journal


def test_a_full_disk_is_one_line_and_what_was_written_is_whole(pictures: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system writes a part of a line, then fails."""
    output = tmp_path / "out.jsonl"
    long = tmp_path.joinpath(*["long" * 60] * 3)  # rows of 1,000 bytes: PyTorch's own files stay below the limit
    long.mkdir(parents=True)
    pictures = pictures.rename(long / "pictures")
    limited = subprocess.run(
        command(pictures, "--output", output),
        capture_output=True, text=True, check=False, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert limited.returncode == 1
    assert "Traceback" not in limited.stderr
    assert "the same command goes on" in limited.stderr.splitlines()[-1]
    kept = output.read_bytes()
    assert kept.endswith(b"}\n")
    assert len(rows_of(output)) >= 1
    subprocess.run(command(pictures, "--output", output), check=True, capture_output=True, cwd=ROOT)
    assert output.read_bytes().startswith(kept)
    assert sorted(row["path"] for row in rows_of(output)) == sorted(names([pictures]))


# The command


def test_a_run_and_what_is_made_of_it(pictures: Path, capsys: pytest.CaptureFixture) -> None:
    odd = pictures / os.fsdecode(b"new\nline \xff.png")
    make_picture(pictures / "x.png", seed=9).rename(odd)
    (pictures / "3.txt").write_text("mine")
    output, table = pictures / "out.jsonl", pictures / "out.csv"
    arguments = in_process(pictures, "--output", output, "--export", table, "--sidecar")
    assert main(arguments) == 0
    rows = {row["path"]: row for row in rows_of(output)}
    assert sorted(rows) == sorted(names([pictures]))
    assert len(rows) == 9
    broken = rows[str(pictures / "broken.png")]
    assert broken["caption"] is None
    assert "broken.png" in broken["error"]
    good = [row for row in rows.values() if row["caption"] is not None]
    assert len(good) == 8
    assert all(row["prompt_tokens"] == 129 and 0 < row["completion_tokens"] <= 8 for row in good)

    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        read = list(csv.DictReader(file))
    assert [{name: value or None for name, value in row.items()} for row in read] == [
        {name: None if value is None else str(value) for name, value in row.items()} for row in rows.values()
    ]
    for row in good:
        text = Path(row["path"]).with_suffix(".txt").read_text(encoding="utf-8")
        assert text == ("mine" if row["path"].endswith("3.png") else row["caption"])
    assert not (pictures / "broken.txt").exists()

    before = output.read_bytes()
    (pictures / "0.txt").unlink()
    assert main([*arguments, "--device", "nothing"]) == 0, "no model is loaded where nothing is left to ask"
    assert output.read_bytes() == before
    assert (pictures / "0.txt").exists()


def test_the_same_glob_again_asks_about_pictures_only(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(pictures)
    for _ in range(2):  # the second time, a shell's glob names the captions and the output as well
        named = sorted(path.name for path in pictures.iterdir() if path.suffix != ".md" and path.name[0] != ".")
        assert main(in_process(*named, "--output", "out.jsonl", "--sidecar")) == 0
        assert len(rows_of(Path("out.jsonl"))) == 8
    assert names(["*.txt", "1.png"]) == ["1.png"]
    for name in ("2.jfif", "3.Png", "9.JPE"):
        shutil.copy("1.png", name)
        Path(name).with_suffix(".txt").write_text("A caption.")
    assert names(["*.txt", "1.png"]) == ["1.png"]
    assert (pictures / "deep" / "deeper" / "4.txt").exists()


def test_the_same_command_in_another_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        make_picture(tmp_path / folder / "a.png", seed=len(folder))
        monkeypatch.chdir(tmp_path / folder)
        assert main(in_process("a.png", "--output", tmp_path / "out.jsonl", "--sidecar")) == (folder == "there")
    assert "folder was 'here', not 'there'" in capsys.readouterr().err
    assert not (tmp_path / "there" / "a.txt").exists()
    assert main(in_process(tmp_path / "there" / "a.png", "--output", tmp_path / "all.jsonl")) == 0
    monkeypatch.chdir(tmp_path)
    assert main(in_process(tmp_path / "there", "--output", tmp_path / "all.jsonl")) == 0, "absolute paths are the same"


def test_a_sidecar_that_cannot_be_written_keeps_none_from_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        make_picture(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").mkdir()
    assert main(in_process(tmp_path, "--output", tmp_path / "out.jsonl", "--sidecar")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 text files cannot be written. " in error
    assert f"Is a directory: '{tmp_path / 'b.txt'}'" in error
    assert (tmp_path / "a.txt").exists() and (tmp_path / "c.txt").exists()


def test_parquet_has_the_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from deepseek_vl.serve.batch.export import export

    with Journal(tmp_path / "out.jsonl", QUESTION) as journal:
        journal.add({**row(1), "prompt_tokens": 3})
        journal.add({"path": os.fsdecode(b"\xff.png"), "caption": None, "error": "broken"})
    export(tmp_path / "out.jsonl", tmp_path / "out.parquet")
    first, second = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert (first["path"], first["caption"], first["prompt_tokens"]) == ("1.png", "caption\n1 ü", 3)
    assert (second["path"], second["error"]) == (r"\xff.png", "broken")


def test_exports_and_sidecars_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = saved(Image.new("RGB", (20, 20)), "PNG")
    shard = shard_of(tmp_path / "shard.tar", {"a.png": content})
    for name in ("a.png", "a.webp", "a.csv"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "mine.csv").write_text("name,price\n")
    (tmp_path / "mine.parquet").write_text("no Parquet")
    for arguments, expected in (
        ([shard, "--sidecar"], "shard.tar/a.png' is none"),
        ([tmp_path / "a.png", tmp_path / "a.webp", "--sidecar"], "would share"),
        ([tmp_path / "a.png", "--export", tmp_path / "out.json"], ".csv or .parquet"),
        ([tmp_path / "a.png", "--export", tmp_path / "nothing" / "out.csv"], "make it first"),
        ([tmp_path / "a.png", tmp_path / "a.csv", "--export", tmp_path / "a.csv"], "would replace an input"),
        ([tmp_path / "a.png", "--export", tmp_path / "mine.csv"], "is no table of captions"),
        ([tmp_path / "a.png", "--export", tmp_path / "mine.parquet"], "is no table of captions"),
    ):
        assert main(in_process(*arguments, "--output", tmp_path / "out.jsonl")) == 1
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "mine.csv").read_text() == "name,price\n"


def test_a_prompt_in_another_encoding_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_picture(tmp_path / "a.png")
    prompt = os.fsdecode("Größe?".encode("latin-1"))
    assert main(in_process(tmp_path / "a.png", "--output", tmp_path / "out.jsonl", prompt=prompt)) == 1
    assert "--prompt is not text in utf-8" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_that_is_too_long_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_picture(tmp_path / "a.png")
    assert main(in_process(tmp_path / "a.png", "--output", tmp_path / "out.jsonl", prompt="word " * 2000)) == 1
    assert "1024 positions" in capsys.readouterr().err
    assert rows_of(tmp_path / "out.jsonl") == []


def test_ctrl_c_ends_in_one_line_and_the_rest_comes_later(tmp_path: Path) -> None:
    for number in range(60):
        make_picture(tmp_path / f"{number}.png", seed=number)
    output = tmp_path / "out.jsonl"
    process = in_terminal(command(tmp_path, "--output", output, "--max_batch", "2", length=200)[1:], cwd=ROOT)

    def has_rows() -> bool:
        process.expect(pexpect.TIMEOUT, timeout=0.05)  # the output must be read, or the terminal's buffer fills up
        return output.exists() and output.read_bytes().count(b"\n") > 2

    wait_until(has_rows, 120, "a row")
    interrupt(process, "deepseek-vl-caption: stopped")
    process.expect(process.crlf)
    process.wait()
    assert process.exitstatus == 130
    assert "Traceback" not in process.before
    done = len(rows_of(output))
    assert 1 < done < 60
    with Journal(output, json.loads(output.read_bytes().splitlines()[0])) as journal:
        assert journal.rows == done


def killed_runs(arguments: list[str], output: Path, seconds: float, while_writing: Collection[int], seed: int) -> None:
    """Run a command eight times, killing it at random moments within `seconds`, and then once to its end."""
    rng = random.Random(seed)
    for kill in range(8):
        before = output.stat().st_size if output.exists() else 0
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        if kill in while_writing:
            wait_until(lambda: output.exists() and output.stat().st_size > before, 240, "a row")  # noqa: B023
            time.sleep(rng.uniform(0, 0.3))
        else:  # at any moment, also before the first row
            time.sleep(rng.uniform(0, seconds))
        assert process.poll() is None, "it has ended before it is killed"
        process.kill()
        process.wait()
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def many_pictures(tmp_path: Path) -> Path:
    """150 pictures, three of them broken."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(150):
        make_picture(folder / f"{number:03}.png", seed=number)
    for number in (7, 70, 140):
        (folder / f"{number:03}.png").write_bytes(b"broken")
    return folder


def check_each_once(folder: Path, output: Path) -> None:
    rows = rows_of(output)
    assert sorted(row["path"] for row in rows) == sorted(map(str, folder.iterdir()))
    broken = {Path(row["path"]).stem for row in rows if row["error"] is not None}
    assert broken == {"007", "070", "140"}
    assert all(row["caption"] for row in rows if row["error"] is None)


@pytest.mark.slow
def test_each_picture_once_though_killed_eight_times(many_pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    killed_runs(command(many_pictures, "--output", output, "--max_batch", "2"), output, 2.5, (1, 3, 5, 7), seed=1)
    check_each_once(many_pictures, output)


# On Ray


def test_ray_that_is_not_there_names_the_extra(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(in_process(pictures, "--output", pictures / "out.jsonl", "--ray")) == 1
    assert "pip install '.[ray]'" in capsys.readouterr().err


def test_on_ray_a_checkpoint_that_is_missing_is_one_line(pictures: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("ray.data")
    arguments = in_process(pictures, "--output", pictures / "out.jsonl", "--ray")
    assert main([*arguments, "--model_path", "/nothing"]) == 1
    assert "There is no checkpoint directory '/nothing'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.long
def test_each_picture_once_though_killed_eight_times_on_ray(many_pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    output = tmp_path / "out.jsonl"
    killed_runs(command(many_pictures, "--output", output, "--ray"), output, 5.0, (2, 6), seed=2)
    check_each_once(many_pictures, output)


@pytest.mark.long
def test_what_an_actor_was_asked_that_dies_is_asked_again(many_pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    output = tmp_path / "out.jsonl"
    driver = subprocess.Popen(command(many_pictures, "--output", output, "--ray"), stderr=subprocess.PIPE, cwd=ROOT)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") > 1, 240, "a row")
    workers = psutil.Process(driver.pid).children(recursive=True)
    actors = [process for process in workers if any("Captioner" in part for part in process.cmdline())]
    assert actors
    for actor in actors:
        actor.kill()
    _, error = driver.communicate()
    assert driver.returncode == 0, error
    check_each_once(many_pictures, output)
