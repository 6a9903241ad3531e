"""Files of conversations: the forms they may have, and what is said about rows that cannot be trained on."""

import base64
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import EOS, make_picture

from deepseek_vl.data.checks import check_data, check_row, load_data
from deepseek_vl.data.rows import BadRow, DataError, TrainingRow, parse_row, read_rows
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.utils.io import load_pil_images

TAG = "<image_placeholder>"


@pytest.fixture(scope="module", params=["siglip", "hybrid"])
def processor(request) -> VLChatProcessor:
    """The processor of each kind of model."""
    return VLChatProcessor.from_pretrained(str(request.getfixturevalue(f"{request.param}_checkpoint")))


@pytest.fixture(scope="module")
def one_processor(siglip_checkpoint) -> VLChatProcessor:
    """One processor, where its kind does not matter."""
    return VLChatProcessor.from_pretrained(str(siglip_checkpoint))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with images/a.png, images/b.png, a truncated and a text file called PNG."""
    images = tmp_path / "my data" / "images"
    images.mkdir(parents=True)
    make_picture(images / "a.png", seed=1)
    content = make_picture(images / "b.png", seed=2).read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    (images / "text.png").write_text("not a picture")
    return images.parent


def write(path: Path, *rows: Any) -> Path:
    """A JSON Lines file; text and bytes are written as they are."""
    lines = (row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def user(content: Any, *images: Any, **more: Any) -> dict[str, Any]:
    """A question in the reference's form, without `images` if there are none."""
    return {"role": "User", "content": content, **({"images": list(images)} if images else {}), **more}


def answer(content: Any = "Yes.") -> dict[str, Any]:
    """An answer in the reference's form."""
    return {"role": "Assistant", "content": content}


HI = [user("Hi"), answer()]


# The forms

REFERENCE = [
    user(f"{TAG}A, {TAG}or B?", "images/a.png", "images/b.png"),
    answer("A – 好."),
    user("And here?"),
    answer("B."),
    user(f"This:\n{TAG}", "images/a.png"),
    answer("A."),
]
LLAVA = [
    {"from": role, "value": message["content"].replace(TAG, "<image>")}
    for role, message in zip(["human", "gpt"] * 3, REFERENCE, strict=True)
]
SWIFT = [
    {"role": message["role"].lower(), "content": message["content"].replace(TAG, "<image>")} for message in REFERENCE
]
UNTAGGED = [{"role": message["role"], "content": message["content"]} for message in REFERENCE]
IMAGES = ["images/a.png", "images/b.png", "images/a.png"]


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def openai(*images: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form, with these three image parts."""
    a, b, c = images
    return [
        {"role": "user", "content": [a, text("A, "), b, text("or B?")]},
        {"role": "assistant", "content": "A – 好."},
        {"role": "user", "content": [text("And here?")]},
        {"role": "assistant", "content": [text("B.")]},
        {"role": "user", "content": [{"type": "input_text", "text": "This:\n"}, c]},
        {"role": "assistant", "content": "A."},
    ]


FORMS = {
    "reference, bare": REFERENCE,
    "reference, messages": {"messages": REFERENCE},
    "reference, conversations": {"conversations": REFERENCE, "messages": None, "id": 7},
    "reference, upper case": [{**message, "role": message["role"].upper()} for message in REFERENCE],
    "LLaVA": {"id": "000", "conversations": LLAVA, "image": IMAGES},
    "ShareGPT": {"conversations": LLAVA, "images": IMAGES, "source": "web"},
    "ms-swift": {"messages": SWIFT, "images": IMAGES},
    "ms-swift, objects": {"messages": SWIFT, "images": [{"path": path, "bytes": None} for path in IMAGES]},
    "ms-swift, the reference's tag": {"messages": UNTAGGED, "images": IMAGES},
    "OpenAI": {"messages": openai(*map(image_url, IMAGES))},
    "OpenAI, responses": {"messages": openai(*({"type": "input_image", "image_url": path} for path in IMAGES))},
    "Qwen": {"messages": openai(*({"type": "image", "image": path} for path in IMAGES))},
    "TRL": {"messages": openai(*[{"type": "image"}] * 3), "images": IMAGES},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_row(folder, one_processor, form):
    a, b = (str(folder / "images" / name) for name in ("a.png", "b.png"))
    file = write(folder / "data.jsonl", FORMS[form])
    expected = TrainingRow(
        messages=[
            {"role": "User", "content": f"{TAG}A, {TAG}or B?", "images": [a, b]},
            {"role": "Assistant", "content": "A – 好."},
            {"role": "User", "content": "And here?", "images": []},
            {"role": "Assistant", "content": "B."},
            {"role": "User", "content": f"This:\n{TAG}", "images": [a]},
            {"role": "Assistant", "content": "A."},
        ],
        types=(None, None, None),
        origin=f"{file}:1",
    )
    assert load_data(file, one_processor) == ([expected], [])
    assert expected.images == [a, b, a]


def test_images_are_found_wherever_they_are(folder, one_processor, monkeypatch):
    a = folder / "images" / "a.png"
    monkeypatch.setenv("HOME", str(folder / "images"))
    monkeypatch.chdir(folder.parent)
    encoded = base64.b64encode(a.read_bytes()).decode()
    ways = [
        "images/a.png", "./images/a.png", str(a), "~/a.png", a.as_uri(), f"file://localhost{a.as_uri()[7:]}",
        f"data:image/png;base64,{encoded}", {"bytes": encoded, "path": None}, {"url": "images/a.png"},
    ]  # fmt: skip
    write(folder / "data.jsonl", *([user(TAG, way), answer()] for way in ways))
    rows, _ = load_data("my data/data.jsonl", one_processor)
    pixels = {load_pil_images(row.messages)[0].tobytes() for row in rows}
    assert len(rows) == len(ways) and pixels == {load_pil_images([{"images": [a]}])[0].tobytes()}


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": HI}, None),
        ({"messages": HI, "system": "Be brief."}, "Be brief."),
        ({"messages": HI, "system": ""}, ""),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *LLAVA[2:4]]}, "Be brief."),
        ({"messages": [{"role": "system", "content": [text("Be "), text("brief.")]}, *HI]}, "Be brief."),
        ([{"role": "System", "content": "Be brief."}, *HI], "Be brief."),
    ],
)  # fmt: skip
def test_a_system_text_replaces_the_processors(one_processor, row, system):
    row = parse_row(row, Path(), "here:1")
    assert row.system == system
    expected = {None: one_processor.system_prompt + "\n\nUser", "": "User"}.get(system, f"{system}\n\nUser")
    assert one_processor.render(row.messages, row.system).text.split(":")[0] == expected


@pytest.mark.parametrize(
    ("given", "types"),
    [(None, (None, None)), ("colour", (None, "colour")), (["count", "colour"], ("count", "colour")),
     ([None, "colour"], (None, "colour"))],
)  # fmt: skip
def test_a_row_may_say_the_types_of_its_questions(given, types):
    assert parse_row({"messages": [user("1"), answer(), user("2"), answer()], "type": given}, Path(), "").types == types


def test_where_the_messages_hold_the_images_the_short_tag_is_text():
    for row in (
        [user("Is <image> HTML?"), answer("<image> is not.")],
        {"messages": [user(f"{TAG}Is <image> HTML?", "a.png"), answer("<image> is not.")]},
        {"messages": [user([text("Is <image> HTML?"), image_url("a.png")]), answer("<image> is not.")]},
    ):
        parsed = parse_row(row, Path(), "")
        assert "Is <image> HTML?" in parsed.messages[0]["content"]
        assert parsed.messages[1]["content"] == "<image> is not."


def test_a_json_file_holds_a_list_of_rows(folder, one_processor):
    (folder / "data.json").write_text(json.dumps([*FORMS.values(), [user("Hi")]], indent=2), encoding="utf-8-sig")
    report = check_data(folder / "data.json", one_processor)
    assert [row.origin for row in report.rows] == [f"{folder / 'data.json'}, row {i + 1}" for i in range(len(FORMS))]
    assert [bad.origin for bad in report.bad] == [f"{folder / 'data.json'}, row {len(FORMS) + 1}"]


def test_blank_lines_marks_and_line_breaks_of_other_systems(folder):
    row = json.dumps([user("a\u2028b\x85c"), answer("\U0001f642")], ensure_ascii=False)
    file = write(folder / "data.jsonl", b"\xef\xbb\xbf" + row.encode(), "", "  \r", row + "\r")
    assert [(row.origin, row.messages[0]["content"]) for row in read_rows(file)] == [
        (f"{file}:1", "a\u2028b\x85c"),
        (f"{file}:4", "a\u2028b\x85c"),
    ]


def test_another_image_tag(one_processor):
    row = parse_row({"messages": SWIFT, "images": IMAGES}, Path(), "", image_tag="<picture>")
    assert row.messages[0]["content"] == "<picture>A, <picture>or B?"


# Bad rows

BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{'a': 1}", "not JSON (Expecting property name enclosed in double quotes at column 2); "
                 "each line must be one whole row"),
    "deep": ("[" * 200_000, "not JSON (nested too deeply); each line must be one whole row"),
    "long number": ("9" * 5000, "not JSON (Exceeds the limit"),
    "number": ("7", "the row is a number, not an object or a list of messages"),
    "null": ("null", "the row is null or missing, not an object or a list of messages"),
    "empty list": ([], "the conversation has no messages"),
    "empty object": ({}, 'the row has neither "conversations" nor "messages"'),
    "both": ({"conversations": HI, "messages": HI}, 'the row has both "conversations" and "messages"'),
    "text for messages": ({"messages": "Hi"}, '"messages" is text, not a list of messages'),
    "list of rows": ([{"messages": HI}], "the line is a list of rows; give each row a line, or name the file .json"),
    "message not an object": (["Hi", "Yes."], "message 1 is text, not an object"),
    "no role": ([{"content": "Hi"}], 'message 1 has neither "role" nor "from"'),
    "unknown role": ([*HI, {"role": "tool", "content": "1"}],
                     "the role of message 3 is 'tool'; it must be user, assistant or system"),
    "null content": ([user("Hi"), answer(None)], '"content" of message 2 is null or missing, not text'),
    "no value": ({"conversations": [{"from": "human"}]}, '"value" of message 1 is null or missing, not text'),
    "number as content": ([user(5), answer()], '"content" of message 1 is a number, not text'),
    "half a character": ('[{"role": "user", "content": "\\ud83d"}]',
                         "\"content\" of message 1 has half a surrogate pair, '\\ud83d', which is no character"),
    "unknown part": ([user([{"type": "video_url"}]), answer()],
                     "message 1 has a part of type 'video_url'; it must be text, image or image_url"),
    "part without text": ([user([{"type": "text"}]), answer()],
                          '"text" of a part of message 1 is null or missing, not text'),
    "same role": ([user("Hi"), user("Hi"), answer()], "messages 1 and 2 are both the user's; they must alternate"),
    "same role after system": ({"messages": [{"role": "system", "content": "S"}, *HI, answer()]},
                               "messages 3 and 4 are both the assistant's; they must alternate"),
    "assistant first": ([answer(), *HI], "message 1 is the assistant's; a conversation begins with the user's"),
    "no answer": ([*HI, user("And?")], "the last message is the user's; the answer to learn is missing"),
    "empty answer": ([user("Hi"), answer(" \n")], "message 2, the assistant's, is empty"),
    "empty question": ([user(""), answer()], "message 1, the user's, is empty"),
    "system only": ([{"role": "system", "content": "S"}], "the conversation has a system message only"),
    "system later": ([*HI, {"role": "system", "content": "S"}], "message 3 is the system's; that must be the first"),
    "two systems": ({"system": "S", "messages": [{"role": "system", "content": "S"}, *HI]},
                    'there is a system message and a "system" text; keep one of them'),
    "system not text": ({"system": ["S"], "messages": HI}, '"system" is a list, not text'),
    "system with image": ({"system": TAG, "messages": HI}, f"the system text holds {TAG}; images belong in the user's"),
    "types": ({"messages": HI, "type": ["a", "b"]}, '"type" has 2 entries for 1 answers'),
    "type not text": ({"messages": HI, "type": 3}, '"type" is a number, not text'),
    "special token": ([user("Hi"), answer(f"Yes.{EOS}")],
                      f"message 2 holds the special token {EOS}; the template adds it, so remove it"),
    "too long": ([user("Hi"), answer("yes " * 200)], "too long: "),
    # Tags and images
    "tag without image": ([user(f"{TAG}Hi"), answer()], f"message 1 has 1 tag {TAG} and no images; give one image"),
    "more tags": ([user(f"{TAG}{TAG}Hi", "images/a.png"), answer()], f"message 1 has 2 tags {TAG} and 1 image;"),
    "more images": ([*HI, user("Hi", "images/a.png"), answer()],
                    f"message 3 has no {TAG} and 1 image; write {TAG} where each image belongs"),
    "forgotten tag": ({"messages": HI, "images": ["images/a.png", "images/b.png"]},
                      "the conversation has no <image> and 2 images; write <image> where each image belongs"),
    "fewer tags": ({"messages": SWIFT, "images": [*IMAGES, "images/a.png"]},
                   "the conversation has 3 tags <image> and 4 images; write <image> where each image belongs"),
    "fewer images": ({"conversations": LLAVA, "image": "images/a.png"},
                     "the conversation has 3 tags <image> and 1 image; give one image per tag"),
    "forgotten images": ({"messages": SWIFT}, "message 1 has 2 tags <image> and no images; give one image per tag"),
    "tag in answer": ([user("Hi"), answer(TAG)], "message 2 is the assistant's and holds an image; images belong in"),
    "short tag in answer": ({"conversations": [LLAVA[2], {"from": "gpt", "value": "<image>"}]},
                            "message 2 is the assistant's and holds an image; images belong in"),
    "image of an answer": ([user("Hi"), {**answer(), "images": ["images/a.png"]}], "message 2 is the assistant's and"),
    "images in two places": ({"messages": [user(TAG, "images/a.png"), answer()], "images": ["images/a.png"]},
                             "there are images in the messages and beside them; give all in one place"),
    "image and images": ({"messages": HI, "image": "images/a.png", "images": ["images/a.png"]},
                         'the row has both "image" and "images"; give its images under one of them'),
    "image is a number": ([user(TAG, 3), answer()], "image 1 of message 1 is a number, not a path"),
    "image is empty": ({"messages": SWIFT, "images": ["images/a.png", "", ""]}, "image 2 of the row is an empty path"),
    "image is nothing": ({"messages": SWIFT, "images": [{}]}, "image 1 of the row has no path"),
    "image bytes": ({"messages": SWIFT, "images": [{"bytes": "?"}]},
                    '"bytes" of image 1 of the row is not base64 text'),
    "image missing": ([user(TAG, "images/c.png"), answer()], "/my data/images/c.png': there is no such file."),
    "image truncated": ([user(TAG, "images/truncated.png"), answer()], "/truncated.png': "),
    "image is text": ([user(TAG, "images/text.png"), answer()],
                      "/text.png': not an image file, or of an unknown kind."),
    "image is a directory": ([user(TAG, "images"), answer()], "/my data/images': "),
    "image on the web": ([user([image_url("https://a.b/c.png"), text("Hi")]), answer()],
                         "Cannot read image 'https://a.b/c.png': URLs are not fetched; download it and give its path."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_reason(folder, one_processor, name):
    row, reason = BAD_ROWS[name]
    file = write(folder / "data.jsonl", HI, "", row, HI)
    with pytest.raises(DataError) as caught:
        load_data(file, one_processor, max_length=200)
    first, bad, advice = str(caught.value).splitlines()
    assert first == "1 of 3 rows cannot be trained on:"
    assert bad.startswith(f"  {file}:3: ") and reason in bad
    assert advice == "Correct them, or train without them: --skip-bad."


def test_bad_rows_can_be_skipped_but_not_all_of_them(folder, one_processor, caplog):
    file = write(folder / "data.jsonl", HI, *(row for row, _ in BAD_ROWS.values()), HI)
    with caplog.at_level(logging.WARNING):
        rows, bad = load_data([file], one_processor, max_length=200, skip_bad=True)
    assert [row.origin for row in rows] == [f"{file}:1", f"{file}:{len(BAD_ROWS) + 2}"]
    assert [row.origin for row in bad] == [f"{file}:{i + 2}" for i in range(len(BAD_ROWS))]
    assert caplog.messages == [f"Left out {len(BAD_ROWS)} bad rows of {len(BAD_ROWS) + 2}, such as {bad[0]}"]

    with pytest.raises(DataError) as caught:
        load_data(write(folder / "bad.jsonl", *["1"] * 25), one_processor, skip_bad=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 23 and lines[0] == "25 of 25 rows cannot be trained on:" and lines[-2] == "  and 5 more"
    assert lines[-1] == "Correct them (--check lists all); no row is left to train on."


def test_good_data_are_loaded_without_a_word(folder, one_processor, caplog):
    load_data(write(folder / "data.jsonl", *FORMS.values()), one_processor, skip_bad=True)
    assert not caplog.messages


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.jsonl", None, FileNotFoundError, "There is no data file '.*missing.jsonl'"),
        ("images", None, IsADirectoryError, "is a directory; name the data files in it"),
        ("latin.jsonl", json.dumps(HI) + "\n[ü]\n", DataError, r"latin.jsonl' is not UTF-8 text \(line 2\); save it"),
        ("latin.json", "[\n\nü]\n", DataError, r"latin.json' is not UTF-8 text \(line 3\); save it"),
        ("rows.json", "{}\n{}\n", DataError, r"is not JSON \(Extra data at line 2, column 1\); name a file with"),
        ("long.json", "9" * 5000, DataError, r"is not JSON \(Exceeds the limit"),
        ("row.json", json.dumps({"messages": HI}), DataError, "row.json' is an object, not a list of rows; name"),
        ("empty.jsonl", "\n", DataError, "There are no rows in .*empty.jsonl"),
        ("empty.json", "[]", DataError, "There are no rows in .*empty.json"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_even_when_bad_rows_are_skipped(
    folder, one_processor, name, content, error, message
):
    if content is not None:
        (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(error, match=message):
        load_data(folder / name, one_processor, skip_bad=True)


# Order, lengths and numbers


def test_hundreds_of_rows_of_several_files_keep_their_order(folder, one_processor):
    paths = [make_picture(folder / "images" / f"{i}.png", (8 + 40 * (i % 3), 8), seed=i) for i in range(30)]
    files = [
        write(
            folder / f"{letter}.jsonl", *([user(f"{TAG}{letter}{i}", str(paths[i % 30])), answer()] for i in range(n))
        )
        for letter, n in (("b", 150), ("a", 100))
    ]
    rows, _ = load_data(files, one_processor)
    expected = [f"{TAG}b{i}" for i in range(150)] + [f"{TAG}a{i}" for i in range(100)]
    assert [row.messages[0]["content"] for row in rows] == expected
    assert [row.origin for row in rows][149:151] == [f"{files[0]}:150", f"{files[1]}:1"]
    assert all(row.images == [str(paths[i % 150 % 30])] for i, row in enumerate(rows))


@pytest.mark.parametrize("special", [False, True])
def test_lengths_are_those_of_the_processed_conversation(folder, processor, special, monkeypatch):
    monkeypatch.setattr(processor, "add_special_token", special)
    report = check_data(write(folder / "data.jsonl", REFERENCE, HI, HI[:1]), processor)
    expected = [
        len(processor(conversations=row.messages, images=load_pil_images(row.messages), force_batchify=False))
        for row in report.rows
    ]
    assert report.lengths == expected and report.images == 3
    shortest, longest = sorted(expected)
    assert report.summary() == (
        "2 good rows, 1 bad; 4 answers, 3 images; "
        f"tokens per row: shortest {shortest}, median {shortest}, longest {longest}"
    )

    row = report.rows[0]
    assert check_row(row, processor, longest) == longest
    with pytest.raises(DataError, match=f"^too long: {longest} tokens, --max_length is {longest - 1}$"):
        check_row(row, processor, longest - 1)
    bad = check_data(folder / "data.jsonl", processor, longest - 1).bad
    assert bad[0] == BadRow(row.origin, f"too long: {longest} tokens, --max_length is {longest - 1}")


def test_a_row_made_in_python_is_checked_the_same_way(folder, processor):
    images = load_pil_images([{"images": [folder / "images" / "a.png"]}])
    row = TrainingRow([{"role": "User", "content": f"{TAG}Hi", "images": images}, answer()], origin="made")
    assert row.types == (None,) and check_row(row, processor) > processor.num_image_tokens
    with pytest.raises(DataError, match="message 1 has 1 tag"):
        check_row(replace(row, messages=[user(TAG), answer()]), processor)
    with pytest.raises(DataError, match="there is no such file"):
        check_row(replace(row, messages=[user(TAG, "nowhere.png"), answer()]), processor)


def test_truncation_needs_an_answer_that_begins(processor: VLChatProcessor, tmp_path: Path) -> None:
    """A longer row is good then, unless there would be nothing to learn."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps([user("Hi"), answer("yes " * 200)]) + "\n", encoding="utf-8")
    rows, _ = load_data(path, processor)
    asked = len(processor(conversations=[user("Hi"), answer("")], force_batchify=False))
    assert load_data(path, processor, asked + 1, truncate=True) == (rows, [])
    with pytest.raises(DataError, match=f"the first answer begins after {asked} tokens, --max_length is {asked}"):
        load_data(path, processor, asked, truncate=True)
