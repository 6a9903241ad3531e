"""The web page keeps conversations in the browser, and saves and loads them as files."""

import json
import re
from pathlib import Path

import pytest
from conftest import PARROT_ANSWERS, wait_until
from PIL import Image
from web_page import IMAGES, Served, Tab, expect, sync_api

from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import image_data_url, load_image

pytest_plugins = ["web_page"]  # its fixtures

SHAPES = "What colour is the star?"


def upload(tab: Tab, path: Path) -> None:
    tab.page.set_input_files("#conversations input[type=file]", str(path))


def download(tab: Tab, title: str, path: Path) -> Path:
    """Download the newest conversation with this title; returns the file's path."""
    tab.open_side("Conversations")
    with tab.page.expect_download() as event:
        tab.page.get_by_role("button", name=f"Download {title}", exact=True).first.click()
    event.value.save_as(path)
    tab.close_side("Conversations")
    return path


def reload(tab: Tab) -> None:
    tab.page.reload()
    tab.input.wait_for()


def test_a_reload_keeps_the_conversation_and_its_pictures(tab: Tab) -> None:
    tab.send(SHAPES, IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.is_kept("blue")
    answer = tab.answers.inner_text()
    reload(tab)
    tab.sees(answer)
    expect(tab.questions).to_have_text(SHAPES)
    expect(tab.pictures).to_have_count(1)
    assert tab.pictures.evaluate("async (it) => { await it.decode(); return it.naturalWidth }") > 0
    tab.send("Where is it?")
    tab.sees(answer, re.compile("right"))
    tab.is_idle()
    tab.is_kept("right")
    reload(tab)
    tab.sees(answer, re.compile("right"))
    tab.press("Regenerate")
    tab.is_idle()
    tab.sees(answer, re.compile("right"))
    tab.press("Remove")
    tab.sees(answer)
    expect(tab.page.locator("#chat .user.message")).to_have_count(2)


def test_a_reload_while_an_answer_comes_keeps_what_there_was(tab: Tab, parrot: Served) -> None:
    tab.choose_parrot()
    tab.send("Sing.")
    expect(tab.answers).to_contain_text("la la la la")
    tab.is_kept("la la la")
    reload(tab)
    expect(tab.answers).to_contain_text("la la la")
    expect(tab.questions).to_have_text("Sing.")
    tab.is_idle()
    wait_until(lambda: not parrot[0].running, 10.0)


def test_a_reload_before_the_first_token_keeps_the_question(
    tab: Tab, parrot: Served, colours: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tab.choose_parrot()
    held = ChatSession.ask

    def ask(session: ChatSession, *arguments: object) -> object:
        while not session._stopped.wait(0.1):
            pass
        yield from held(session, *arguments)

    monkeypatch.setattr(ChatSession, "ask", ask)
    tab.send("<image_placeholder>Colour?", colours["red"])
    expect(tab.questions).to_have_count(1)
    tab.is_kept("Colour?")
    monkeypatch.undo()
    reload(tab)
    expect(tab.input).to_have_value("<image_placeholder>Colour?")
    expect(tab.page.locator("#message .thumbnail-item")).to_have_count(1)
    tab.choose_parrot()
    tab.press("Send")
    tab.sees("It is red.")


@pytest.mark.parametrize("is_sent", [True, False])
def test_what_is_written_right_after_a_reload_is_not_replaced(tab: Tab, tmp_path: Path, is_sent: bool) -> None:
    """The pictures of the old conversation are still on their way when its user writes on."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.is_idle()
    tab.send("And this?", tmp_path / "broken.png")
    tab.sees(PARROT_ANSWERS["Greet me."], re.compile("cannot be read"))
    tab.is_kept("broken.png")
    held = []
    tab.page.route("**/upload*", lambda route: held.append(route))
    reload(tab)
    if is_sent:
        tab.choose_parrot()
        tab.send("Sing.")
        expect(tab.answers).to_contain_text("la la la la")
    else:
        tab.input.fill("Sing.")
    assert held
    for route in held:
        route.continue_()
    tab.page.unroute("**/upload*")
    if is_sent:
        tab.page.wait_for_timeout(1000)  # for what is not to happen
        expect(tab.questions).to_have_text(["Sing."])
        tab.press("Stop")
        tab.is_idle()
        tab.open_side("Conversations")
        expect(tab.titles()).to_have_text(["Sing.", "Greet me."])
    else:
        tab.sees(PARROT_ANSWERS["Greet me."])
        expect(tab.input).to_have_value("Sing.")
        expect(tab.page.locator("#message .thumbnail-item")).to_have_count(0)


def test_what_comes_all_at_once_is_shown_and_kept(tab: Tab) -> None:
    """A slow browser finds several of the server's messages before it has shown the first."""
    tab.page.route("**/queue/data*", lambda route: route.fulfill(response=route.fetch()))
    tab.send(SHAPES, IMAGES / "shapes.png")
    tab.is_idle(answers=1)
    tab.sees(re.compile("blue"))
    expect(tab.input).to_have_value("")
    expect(tab.page.locator("#message .thumbnail-item")).to_have_count(0)
    tab.is_kept("blue")
    tab.send("Where is it?")
    tab.is_idle(answers=2)
    expect(tab.input).to_have_value("")
    tab.is_kept("right")


def test_an_edited_and_a_removed_turn_stay_so(tab: Tab) -> None:
    tab.choose_parrot()
    for turn in range(2):
        tab.send("Greet me.")
        expect(tab.answers).to_have_count(turn + 1)
        tab.is_idle()
        tab.is_kept("Greet me.", turn + 2)  # one is the title
    tab.press("Remove")
    expect(tab.answers).to_have_count(1)
    tab.is_kept("Greet me.", 2)
    reload(tab)
    expect(tab.answers).to_have_count(1)
    tab.press("Remove")
    expect(tab.answers).to_have_count(0)
    tab.is_kept("Greet me.", 0)
    reload(tab)
    expect(tab.page.locator("#chat .example").first).to_be_visible()
    tab.open_side("Conversations")
    expect(tab.titles()).to_have_count(0)


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_deleted(tab: Tab, parrot: Served) -> None:
    tab.choose_parrot()
    tab.open_side("Conversations")
    tab.send("Sing.")
    expect(tab.titles()).to_have_text(["Sing."])
    tab.press("Delete Sing.")
    expect(tab.titles()).to_have_count(0)
    expect(tab.questions).to_have_count(0)
    wait_until(lambda: not parrot[0].running, 10.0)
    tab.page.wait_for_timeout(500)
    expect(tab.titles()).to_have_count(0)


def test_past_conversations_can_be_opened_renamed_and_deleted(tab: Tab) -> None:
    tab.send(SHAPES, IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.is_idle()
    tab.press("New Conversation")
    expect(tab.questions).to_have_count(0)
    tab.send("Which bar is tallest?", IMAGES / "chart.png")
    expect(tab.answers).to_have_count(1)
    tab.is_idle()
    tab.open_side("Conversations")
    expect(tab.titles()).to_have_text(["Which bar is tallest?", SHAPES])
    expect(tab.titles().first).to_have_attribute("aria-current", "true")
    tab.titles().nth(1).click()
    tab.sees(re.compile("blue"))
    expect(tab.questions).to_have_text(SHAPES)
    expect(tab.titles().nth(1)).to_have_attribute("aria-current", "true")

    tab.press(f"Rename {SHAPES}")
    tab.page.get_by_label("New name").fill("<b>Stars</b> & co")
    tab.page.keyboard.press("Enter")
    expect(tab.titles()).to_have_text(["Which bar is tallest?", "<b>Stars</b> & co"])
    tab.send("Where is it?")
    expect(tab.answers).to_have_count(2)
    tab.is_idle()
    expect(tab.titles()).to_have_text(["<b>Stars</b> & co", "Which bar is tallest?"])
    tab.press("Rename Which bar is tallest?")
    tab.page.get_by_label("New name").fill("Nothing")
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_label("New name")).to_have_count(0)
    expect(tab.titles().nth(1)).to_have_text("Which bar is tallest?")

    tab.press("Delete Which bar is tallest?")
    expect(tab.titles()).to_have_count(1)
    expect(tab.answers).to_have_count(2)
    tab.press("Delete <b>Stars</b> & co")
    expect(tab.titles()).to_have_count(0)
    expect(tab.questions).to_have_count(0)
    reload(tab)
    tab.open_side("Conversations")
    expect(tab.titles()).to_have_count(0)


def test_a_new_tab_begins_anew_and_finds_the_others_conversations(browser: sync_api.Browser, address: str) -> None:
    first = Tab(browser, address)
    first.send(SHAPES, IMAGES / "shapes.png")
    first.sees(re.compile("blue"))
    first.is_kept("blue")
    second = Tab(browser, address, context=first.context)
    expect(second.questions).to_have_count(0)
    second.open_side("Conversations")
    second.titles().first.click()
    second.sees(re.compile("blue"))
    expect(second.pictures).to_have_count(1)
    first.context.close()


def test_the_last_20_are_kept(tab: Tab, tmp_path: Path) -> None:
    for number in range(22):
        path = tmp_path / f"{number}.json"
        messages = [{"role": "User", "content": f"Number {number}?"}, {"role": "Assistant", "content": "Yes."}]
        path.write_text(json.dumps([{"messages": messages}]))
        upload(tab, path)
        expect(tab.questions).to_have_text(f"Number {number}?")
        tab.is_kept(f"Number {number}?")
    tab.open_side("Conversations")
    expect(tab.titles()).to_have_text([f"Number {number}?" for number in range(21, 1, -1)])


def test_downloads_are_what_the_terminal_saves(tab: Tab, tiny: Served, tmp_path: Path) -> None:
    """The terminal loads the page's downloads, and the page loads what the terminal saves."""
    tab.send(SHAPES, IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.is_idle()
    tab.is_kept("blue")
    got = download(tab, SHAPES, tmp_path / "page.json")
    session = ChatSession(*tiny, GenerationSettings())
    session.load(got)
    assert session.messages[0]["content"] == f"<image_placeholder>\n{SHAPES}"
    assert session.messages[0]["images"][0].tobytes() == load_image(IMAGES / "shapes.png").tobytes()
    assert session.messages[1]["content"] == tab.answers.inner_text().strip()
    session.save(tmp_path / "terminal.json")
    saved, downloaded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("terminal", "page"))
    for row in (*saved, *downloaded):
        row["messages"][0]["images"] = [load_image(url).tobytes() for url in row["messages"][0]["images"]]
    assert downloaded == saved

    "".join(session.ask("Where is it?"))
    session.system_prompt = "Be brief."
    for name in ("more.json", "more.jsonl"):
        session.save(tmp_path / name)
        tab.press("New Conversation")
        expect(tab.questions).to_have_count(0)
        upload(tab, tmp_path / name)
        expect(tab.questions).to_have_text([SHAPES, "Where is it?"])
        expect(tab.pictures).to_have_count(1)
        tab.is_kept("Be brief.")
    again = download(tab, SHAPES, tmp_path / "again.json")
    assert json.loads(again.read_text())[0]["system"] == "Be brief."


def test_other_forms_of_rows_can_be_uploaded(tab: Tab, tmp_path: Path) -> None:
    url = image_data_url(Image.new("RGB", (40, 30), "red"))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]},
        {
            "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Red."}],
            "image": url,
        },
        [
            {"role": "User", "content": "<image_placeholder>What is this?", "images": [url]},
            {"role": "Assistant", "content": "Red."},
        ],
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
        upload(tab, tmp_path / f"{number}.jsonl")
        tab.sees("Red.")
        expect(tab.questions).to_contain_text("What is this?")
        expect(tab.pictures).to_have_count(1)
        tab.press("New Conversation")
        expect(tab.questions).to_have_count(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "This is no saved conversation: it is not JSON."),
        ("no JSON\nin two lines", "This is no saved conversation: it is not JSON."),
        ('{"messages": []}\n{"messages": []}\n', "The file has 2 conversations"),
        ("[]", "This is no saved conversation"),
        ('{"messages": [{"role": "<img src=x>", "content": "a"}]}', "'<img src=x>'"),
        ('[{"messages": []}, {"messages": []}]', "2 conversations"),
        ('[[{"role": "user", "content": "<image_placeholder>", "images": ["%s"]}, '
         '{"role": "assistant", "content": "A."}]]' % (IMAGES / "shapes.png"), "must be in the file itself"),
        ('[[{"role": "user", "content": "<image_placeholder>", "images": ["http://127.0.0.1:9/a.png"]}, '
         '{"role": "assistant", "content": "A."}]]', "must be in the file itself"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_conversation_changes_nothing(tab: Tab, tmp_path: Path, content: str, message: str) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.is_idle()
    (tmp_path / "file.json").write_text(content)
    upload(tab, tmp_path / "file.json")
    expect(tab.toast).to_contain_text(message)
    assert tab.toast.locator("img").count() == 0
    tab.sees(PARROT_ANSWERS["Greet me."])


def test_a_browser_without_indexeddb_chats_all_the_same(browser: sync_api.Browser, address: str) -> None:
    with browser.new_context() as context:
        context.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
        tab = Tab(browser, address, context=context)
        tab.send(SHAPES, IMAGES / "shapes.png")
        tab.sees(re.compile("blue"))
        tab.open_side("Conversations")
        expect(tab.page.get_by_text("This browser keeps no conversations")).to_be_visible()
        assert tab.errors == []
