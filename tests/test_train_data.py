"""Files of conversations: their forms, and the errors for rows that cannot be trained on."""

import base64
import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
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
    """A directory with images/a.png, images/b.png, a truncated PNG and a text file named like one."""
    images = tmp_path / "my data" / "images"
    images.mkdir(parents=True)
    make_picture(images / "a.png", seed=1)
    content = make_picture(images / "b.png", seed=2).read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    (images / "text.png").write_text("not a picture")
    return images.parent


def write(path: Path, *rows: Any) -> Path:
    """Write rows to a JSON Lines file; text and bytes are written unchanged."""
    lines = (row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def tar_of(name: str, row: Any) -> bytes:
    """A tar archive of one file of one row."""
    content = json.dumps(row).encode()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


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
    """The test conversation in OpenAI's form, with three image parts."""
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
    "ms-swift, query": {
        "query": SWIFT[4]["content"], "response": "A.", "images": IMAGES,
        "history": [[SWIFT[0]["content"], "A – 好."], ["And here?", "B."]],
    },
    "Alpaca": {
        "instruction": "This:", "input": "<image>", "output": "A.", "images": IMAGES,
        "history": [[SWIFT[0]["content"], "A – 好."], ["And here?", "B."]],
    },
    "notes and empty values": {
        "messages": [{**message, "turn_id": "a", "tool_calls": None} for message in SWIFT], "images": IMAGES,
        "videos": [], "tools": None, "image_id": "x", "datasetName": "", "source": "web", "width_list": [1, 2],
        "has_image": True, "skip_prompt_formatting": False, "target_language": "de", "use_case": 3,
        "metadata": {"by": "hand"}, "quality_score": 0.5, "rows": 3, "system": None, "type": None,
    },
    "weights of 1": {
        "messages": [{**message, "weight": 1, "loss": True, "loss_scale": 1.0} if i % 2 else {**message, "weight": 0}
                     for i, message in enumerate(SWIFT)],
        "images": IMAGES,
    },
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


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"query": "Hi", "response": "Yes.", "history": None, "system": "S"}, "Hi"),
        ({"instruction": "Add.", "input": "", "output": "Yes."}, "Add."),
        ({"instruction": "Add.", "input": "1 + 1", "output": "Yes."}, "Add.\n1 + 1"),
        ({"instruction": "", "input": "1 + 1", "output": "Yes."}, "1 + 1"),
        ({"prompt": "Hi", "completion": "Yes."}, "Hi"),
        ({"question": "Hi", "answer": "Yes.", "question_id": "7"}, "Hi"),
        ({"question": "Hi", "answer": "Yes.", "num_images": 0, "has_image": False, "redacted": False}, "Hi"),
    ],
)
def test_a_question_and_its_answer_may_have_keys_of_their_own(row, question):
    parsed = parse_row(row, Path(), "here:1")
    assert parsed.system == row.get("system")
    assert [(message["role"], message["content"]) for message in parsed.messages] == [
        ("User", question), ("Assistant", "Yes."),
    ]  # fmt: skip


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss_scale": 0}])
def test_an_answer_that_is_not_to_be_learnt_has_no_weight(key):
    row = {"conversations": [*LLAVA[2:4], LLAVA[2], {**LLAVA[3], **key, "weight": key.get("weight")}]}
    assert [message.get("weight") for message in parse_row(row, Path(), "").messages] == [None, None, None, 0]


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
    # Fields that would be ignored without an error
    "weight in parts": ([user("Hi"), {**answer(), "weight": 0.5}],
                        '"weight" of message 2 is 0.5; an answer is learnt (1 or true) or it is not (0 or false)'),
    "weight as text": ([user("Hi"), {**answer(), "loss": "false"}], "\"loss\" of message 2 is 'false'; an answer is"),
    "weights that disagree": ([user("Hi"), {**answer(), "weight": 0, "loss": True}],
                              "'weight' and 'loss' of message 2 do not agree; keep one of them"),
    "weight of a question": ([user("Hi", weight=1), answer()],
                             "message 1 is the user's and is to be learnt, as its 'weight' says; only answers are"),
    "no weight at all": ([user("Hi"), {**answer(), "weight": 0}], "there is nothing to learn: no answer has a weight"),
    "weight of the row": ({"messages": HI, "weight": 0}, 'the row has "weight", which is not used in training;'),
    "videos": ({"messages": HI, "videos": ["a.mp4"]}, 'the row has "videos", which is not used in training; remove the '
                                                      'key, or the row (notes may stand under "metadata")'),
    "audios": ({"messages": HI, "audios": ["a.wav"]}, 'the row has "audios", which'),
    "tools": ({"messages": HI, "tools": "[]"}, 'the row has "tools", which'),
    "tool calls": ([user("Hi"), {**answer(), "tool_calls": [{"id": "1"}]}], 'message 2 has "tool_calls", which'),
    "tool calls without text": ([user("Hi"), {**answer(None), "tool_calls": [{"id": "1"}]}],
                                'message 2 has "tool_calls", which'),
    "reasoning": ([user("Hi"), {**answer(), "reasoning_content": "Hm."}], 'message 2 has "reasoning_content", which'),
    "image of a message": ([user("Hi", **{"image": "images/a.png"}), answer()], 'message 1 has "image", which'),
    "audio of a part": ([user([{**text("Hi"), "audio": "a.wav"}]), answer()], 'a part of message 1 has "audio", which'),
    "box of an image": ({"messages": SWIFT, "images": [{"path": "images/a.png", "crop": "left"}] * 3},
                        'image 1 of the row has "crop", which'),
    "rejected answer": ({"messages": HI, "rejected_response": "No."}, 'the row has "rejected_response", which'),
    "rejected messages": ({"messages": HI, "rejectedMessages": HI}, 'the row has "rejectedMessages", which'),
    "KTO": ({"messages": HI, "label": False}, 'the row has "label", which'),
    "Axolotl's switch": ([user("Hi"), {**answer(), "train": False}], 'message 2 has "train", which'),
    "a switch of an answer": ([user("Hi"), {**answer(), "ignore": True}], 'message 2 has "ignore", which'),
    "another switch": ([user("Hi"), {**answer(), "final": False}], 'message 2 has "final", which'),
    "a switch as a number": ([user("Hi"), {**answer(), "target": 0}], 'message 2 has "target", which'),
    "a verdict": ({"messages": HI, "is_correct": False}, 'the row has "is_correct", which'),
    "thoughts": ({"messages": HI, "extra": {"thinking": "Hm."}}, 'the row has "extra", which'),
    "lost images": ({"messages": [user("<image>What?", images=[]), answer()], "images": []},
                    "message 1 has 1 tag <image> and no images; give one image per tag"),
    "lost parts": ({"messages": [user([text("<image>What?")]), answer()]}, "message 1 has 1 tag <image> and no images"),
    "an image that is said to be there": ({"messages": HI, "has_image": True}, 'the row has "has_image", but no image'),
    "an image by number": ({"question": "What?", "answer": "A cat.", "image_id": 7},
                           'the row has "image_id", but no image; give its path as "image", or remove the key'),
    "an image by name": ({"messages": HI, "pictureSource": "a.png"}, 'the row has "pictureSource", but no image'),
    "two sources": ([user([{"type": "image", "path": "a.png", "url": "b.png"}]), answer()],
                    "the image of message 1 has 'path' and 'url'; keep one of them"),
    "preferences": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, 'the row has "chosen", which'),
    "another form": ({"text": "Hi", "id": 3}, "give the messages under one of them, not under 'text', 'id'"),
    "boxes": ({"messages": HI, "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}, 'the row has "objects", which'),
    "video's number": ({"messages": HI, "video_id": 3}, 'the row has "video_id", which'),
    "a query beside": ({"messages": HI, "query": "Hi"}, 'the row has "query", which'),
    "query alone": ({"query": "Hi"}, '"response" is null or missing, not text'),
    "output alone": ({"output": "Hi", "input": "a"}, '"instruction" is null or missing, not text'),
    "list as prompt": ({"prompt": HI[:1], "completion": HI[1:]}, '"prompt" is a list, not text'),
    "input as a number": ({"instruction": "Hi", "input": 3, "output": "Yes."}, '"input" is a number, not text'),
    "history of texts": ({"query": "Hi", "response": "Yes.", "history": ["a", "b"]},
                         '"history" is not a list of [question, answer] pairs'),
    "another encoding": (json.dumps([user("Grüße"), answer()], ensure_ascii=False).encode("latin-1"),
                         "not UTF-8 text (byte 33 of the line); save the file as UTF-8"),
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
        ("latin.json", "[\n\nü]\n", DataError, r"latin.json' is not UTF-8 text \(line 3\); save it"),
        ("rows.json", "{}\n{}\n", DataError, r"is not JSON \(Extra data at line 2, column 1\); name a file with"),
        ("long.json", "9" * 5000, DataError, r"is not JSON \(Exceeds the limit"),
        ("row.json", json.dumps({"messages": HI}), DataError, "row.json' is an object, not a list of rows; name"),
        ("empty.jsonl", "\n", DataError, "There are no rows in .*empty.jsonl"),
        ("none.jsonl", "", DataError, "There are no rows in .*none.jsonl"),
        ("none.json", "", DataError, "There are no rows in .*none.json"),
        ("a.csv", 'messages,images\n"[1, 2]",a.png\n', DataError, "a.csv' is CSV, not JSON Lines; write one row per"),
        ("b.jsonl", 'q;a\n"x\ny";z\n', DataError, "b.jsonl' is CSV, not JSON Lines; write one row per line"),
        ("one.csv", "text\nHi\n", DataError, "one.csv' is CSV, not JSON Lines"),
        ("c.json", "q\ta\nx\tz\n", DataError, "c.json' is a table with tabs, not JSON Lines"),
        ("list.jsonl", json.dumps([{"messages": HI}], indent=1), DataError,
         "has one list over several lines, as printed for people; name the file .json"),
        ("rows.jsonl", json.dumps({"messages": HI}, indent=1) * 2, DataError,
         "has a row over several lines, as printed for people; give each row one line of its own"),
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


def gzipped(content: bytes) -> bytes:
    """Compressed without the time, so that tests have the same names in every process that collects them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\0", "is a ZIP archive or an Excel sheet; unpack it"),
        (b"(\xb5/\xfd\x04", "is compressed with Zstandard; decompress it"),
        ("\ufeff[]".encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        ("[]\n".encode("utf-16-le"), "is binary, or UTF-16 text; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is an image; a row names it"),
        (b"<rows>\n<row/>", "is XML or HTML, not JSON Lines; write one row per line as JSON"),
        (b"- messages:\n  - role: user\n", "is YAML, not JSON Lines"),
        (b"SQLite format 3\0", "is an SQLite database; export its rows as JSON Lines"),
        (gzipped(json.dumps(HI).encode() * 99)[:-20], "is broken or cut off"),
        (gzipped(json.dumps(HI).encode() * 99)[:-20] + b"x" * 20, "is broken or cut off"),
        (b"PAR1 but not really", "is Parquet that cannot be read"),
        (gzipped(b"PAR1 as well"), "is compressed Parquet; decompress it"),
        (gzipped(b"PK\x03\x04\x14\0"), "is a ZIP archive or an Excel sheet; unpack it"),
        (gzipped(tar_of("rows/a_rather_long_name.jsonl", HI)), "is a tar archive; unpack it"),
        (tar_of("rows/a_rather_long_name.jsonl", HI), "is a tar archive; unpack it"),
        (b"question,answer\nHow, exactly,So\nWhat,That\n", "is CSV, not JSON Lines"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_what_it_is(folder, one_processor, content, message):
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    (folder / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"data.jsonl' {message}"):
        load_data(folder / "data.jsonl", one_processor, skip_bad=True)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.gz", "rows.json.gz"])
def test_compressed_files_are_read(folder, one_processor, compress, name):
    rows = [{"messages": SWIFT, "images": IMAGES}, HI]
    text = json.dumps(rows) if name == "rows.json.gz" else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_bytes(compress(text.encode()))
    found, _ = load_data(folder / name, one_processor)
    assert [row.messages for row in found] == [parse_row(row, folder, "").messages for row in rows]
    assert found[1].origin == (f"{folder / name}, row 2" if name == "rows.json.gz" else f"{folder / name}:2")


def test_parquet_is_read_pictures_and_all(folder, one_processor):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    picture = (folder / "images" / "a.png").read_bytes()
    rows = [
        {"messages": [{**SWIFT[4], "weight": None}, {**SWIFT[5], "weight": None}],
         "images": [{"bytes": picture, "path": "elsewhere.png"}], "id": 1},
        {"messages": [{"role": "user", "content": "Hi", "weight": None}, {**SWIFT[3], "weight": 0.0},
                      {"role": "user", "content": "So?", "weight": None}, {**SWIFT[3], "weight": 1.0}], "images": None},
        {"messages": [{"role": "user", "content": "Hi", "weight": None}], "images": None},
    ]  # fmt: skip
    write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    report = check_data(folder / "data.parquet", one_processor)
    assert [row.origin for row in report.rows] == [f"{folder / 'data.parquet'}, row {i}" for i in (1, 2)]
    assert load_pil_images(report.rows[0].messages)[0].tobytes() == load_pil_images(
        [{"images": [folder / "images" / "a.png"]}]
    )[0].tobytes()  # fmt: skip
    assert [message.get("weight") for message in report.rows[1].messages] == [None, 0, None, None]
    assert [bad.origin for bad in report.bad] == [f"{folder / 'data.parquet'}, row 3"]


def test_one_line_in_another_encoding_is_one_bad_row(folder, one_processor):
    file = write(
        folder / "data.jsonl", HI, json.dumps([user("Grüße"), answer()], ensure_ascii=False).encode("cp1252"), HI
    )
    report = check_data(file, one_processor)
    assert [row.origin for row in report.rows] == [f"{file}:1", f"{file}:3"]
    assert [bad.origin for bad in report.bad] == [f"{file}:2"]


def test_one_empty_file_of_several_is_an_error(folder, one_processor):
    files = [write(folder / "data.jsonl", HI), write(folder / "empty.jsonl")]
    with pytest.raises(DataError, match=r"^There are no rows in .*empty\.jsonl\.$"):
        check_data(files, one_processor)


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
    """With `truncate`, a longer row is accepted if something of an answer that is learnt remains."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps([user("Hi"), answer("yes " * 200)]) + "\n", encoding="utf-8")
    rows, _ = load_data(path, processor)
    asked = len(processor(conversations=[user("Hi"), answer("")], force_batchify=False))
    assert load_data(path, processor, asked + 1, truncate=True) == (rows, [])
    with pytest.raises(DataError, match=f"the first answer begins after {asked} tokens, --max_length is {asked}"):
        load_data(path, processor, asked, truncate=True)

    row = [user("Hi"), {**answer("Hello."), "weight": 0}, user("So?"), answer("yes " * 200)]
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    asked = len(processor(conversations=[*row[:3], answer("")], force_batchify=False))
    load_data(path, processor, asked + 1, truncate=True)
    with pytest.raises(DataError, match=f"the first answer begins after {asked} tokens, --max_length is {asked}"):
        load_data(path, processor, asked, truncate=True)
