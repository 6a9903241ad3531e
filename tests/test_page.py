"""The web page's looks and handling: wide and on a phone, light and dark, by keyboard, and what is copied."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PARROT_ANSWERS
from hypothesis import given
from hypothesis import strategies as st
from web_page import IMAGES, PHONE, WIDE, Served, Tab, expect, sync_api

from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.imaging.open import image_data_url, load_image
from deepseek_vl.serve.web.marks import marked, unmarked

pytest_plugins = ["web_page"]  # its fixtures

ATTRACTED = "http://127.0.0.1:9/"
"""Where nothing may be fetched from."""

WRITTEN = [
    "a < b && c > d",
    "a<b and c>d, 1 &lt; 2 &amp; &#60;",
    "![x](y)",
    f"![x [y]]({ATTRACTED}pixel.png) and ![z](<{ATTRACTED}z.png>)",
    f"![x][r]\n\n[r]: {ATTRACTED}pixel.png",
    "<b id='active'>bold</b> <i>?",
    f"<img id='active' src='{ATTRACTED}x.png'>",
    "<script id='active'>document.title = 'stolen'</script>",
    "<svg id='active' onload='document.title = 1'></svg><iframe id='active' src='/'></iframe>",
    "<style id='active'>* { display: none }</style>",
    "<!-- <b id='active'>x</b> -->",
    "<b\nid='active'>x</b>",
    "`<b id='active'>code</b>`",
    "\\`<b id='active'>x</b>\\`",
    "``` a`b\n<b id='active'>x</b>\n```",
    "> ```\n<b id='active'>x</b>",
    "    <b id='active'>indented</b>",
    "```python\nif a < b:\n\tprint('<b id=\"active\">')\n```",
    "one:\n    two\n\tthree\n  four",
    "$$<b id='active'>x</b>$$ \\(<i id='active'>y</i>\\)",
    "```\n$$<b id='active'>x</b>$$\n```",
    f"```mermaid\n<img id='active' src='{ATTRACTED}x.png'>\n```",
    f"```mermaid\ngraph TD; A[\"&lt;img id='active' src='{ATTRACTED}x.png'&gt;\"]\n```",
    "[x](javascript:alert(1)) [y](<b id='active'>)",
    '[x](http://x/$$"id="active$$)',
    'src="/file=x" %%%LATEX_BLOCK_0%%%',
    "\u2064<b id='active'>\u2064\u2064</b>\u2064",
    "<a id='active' href='/logout'>x</a><form id='active'></form><input id='active'>",
]


@pytest.fixture(params=["wide", "phone"])
def sized(request: pytest.FixtureRequest, browser: sync_api.Browser, address: str) -> Tab:
    """A tab of either size."""
    tab = Tab(browser, address, {"wide": WIDE, "phone": PHONE}[request.param])
    yield tab
    tab.context.close()
    assert tab.errors == []


def copied(tab: Tab, message: sync_api.Locator) -> str:
    """What the button at a message copies."""
    tab.page.evaluate("navigator.clipboard.writeText('nothing yet')")
    row = message.locator("xpath=ancestor::*[contains(@class, 'message-row')]")
    row.locator("xpath=following-sibling::*[1]").get_by_role("button", name="Copy message").click()
    tab.page.wait_for_function("async () => await navigator.clipboard.readText() != 'nothing yet'")
    return tab.page.evaluate("navigator.clipboard.readText()")


def upload(tab: Tab, path: Path, row: object) -> None:
    """Upload a conversation."""
    path.write_text(json.dumps(row), encoding="utf-8")
    tab.page.set_input_files("#conversations input[type=file]", str(path))


# --- copying ---


def test_what_is_copied_is_what_was_written_and_nothing_of_it_is_html(
    browser: sync_api.Browser, address: str, tmp_path: Path
) -> None:
    tab = Tab(browser, address, permissions=["clipboard-read", "clipboard-write"])
    fetched: list[str] = []
    tab.page.on("request", lambda request: fetched.append(request.url))
    messages = [{"role": role, "content": text} for text in WRITTEN for role in ("user", "assistant")]
    upload(tab, tmp_path / "written.json", [{"messages": messages}])
    expect(tab.answers).to_have_count(len(WRITTEN))
    tab.page.wait_for_timeout(500)  # for what might become of it
    for number, text in enumerate(WRITTEN):
        assert copied(tab, tab.questions.nth(number)) == text
        assert copied(tab, tab.answers.nth(number)) == text
    assert tab.page.locator("#active, #chat .message :is(iframe, form, script, style)").count() == 0
    assert tab.page.locator("#chat .message img").count() == 0
    assert tab.page.locator("#chat [href^='javascript']").count() == 0
    assert tab.page.locator("#chat").evaluate("(chat) => chat.outerHTML.includes('\\u2064\\u003c')") is False
    assert not [url for url in fetched if url.startswith(ATTRACTED)]
    for number in (0, 2, 5, 6, 7, 11):
        expect(tab.answers.nth(number)).to_have_text(WRITTEN[number], use_inner_text=True)
    tab.press("Copy conversation")
    tab.page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('logout')")
    everything = tab.page.evaluate("navigator.clipboard.readText()")
    assert all(text in everything for text in WRITTEN)
    tab.context.close()
    assert tab.errors == []


@given(st.text(alphabet="<>&!;[](){}`$%\"'\\/#? =:aAbms1\u2064\n"))
def test_marks_come_out_as_they_went_in(text: str) -> None:
    assert unmarked(marked(text)) == text
    assert re.search(r"<[A-Za-z/!?]|!\[|&#?\w+;", marked(text)) is None


def test_what_is_typed_is_shown_copied_and_edited_as_it_is(browser: sync_api.Browser, address: str) -> None:
    tab = Tab(browser, address, permissions=["clipboard-read", "clipboard-write"])
    tab.choose_parrot()
    text = "Is <b>a</b> < b? ![x](y) &lt;"
    tab.send(text)
    tab.is_idle(answers=1)
    expect(tab.questions).to_have_text(text)
    assert tab.questions.locator("[data-testid=user]").get_attribute("aria-label").endswith(text)
    assert copied(tab, tab.questions) == text
    tab.questions.evaluate("(it) => getSelection().selectAllChildren(it)")
    tab.page.keyboard.press("Control+C")
    assert tab.page.evaluate("navigator.clipboard.readText()").strip() == text
    tab.press("Edit")
    expect(tab.page.get_by_label("Your message")).to_have_value(text)
    tab.context.close()


# --- messages and what can be done with them ---


def test_editing_a_message_answers_it_anew(sized: Tab, colours: dict[str, Path]) -> None:
    sized.choose_parrot()
    sized.send("<image_placeholder>What?", colours["red"])
    sized.is_idle(answers=1)
    sized.send("Greet me.")
    sized.is_idle(answers=2)
    sized.page.get_by_role("button", name="Edit").first.click()
    sized.page.get_by_label("Your message").fill("<image_placeholder>Colour?")
    sized.press("Submit")
    sized.sees("It is red.")
    expect(sized.questions).to_have_text(["<image_placeholder>Colour?"])
    expect(sized.pictures).to_have_count(1)


def test_an_edit_that_fails_leaves_the_conversation_and_is_not_lost(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.is_idle()
    tab.press("Edit")
    tab.page.get_by_label("Your message").fill("<image_placeholder> and no image")
    tab.press("Submit")
    expect(tab.status).to_contain_text("1 <image_placeholder> and 0 images")
    tab.sees(PARROT_ANSWERS["Greet me."])
    expect(tab.questions).to_have_text(["Greet me."])
    expect(tab.input).to_have_value("<image_placeholder> and no image")


def test_one_button_is_send_and_then_stop(sized: Tab, parrot: Served) -> None:
    sized.choose_parrot()
    sized.send("Sing.")
    stop = sized.page.get_by_role("button", name="Stop", exact=True)
    expect(stop).to_be_visible()
    expect(sized.page.get_by_role("button", name="Send", exact=True)).to_have_count(0)
    expect(sized.answers).to_contain_text("la la")
    stop.click()
    sized.is_idle()
    expect(stop).to_have_count(0)


def test_stop_before_the_first_token_gives_the_message_back(
    tab: Tab, colours: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.is_idle()

    def ask(session: ChatSession, *_: object) -> Iterator[str]:
        while not session._stopped.wait(0.1):
            pass
        yield from ()

    with monkeypatch.context() as patched:
        patched.setattr(ChatSession, "ask", ask)
        tab.send("<image_placeholder>Colour?", colours["red"])
        expect(tab.questions).to_have_count(2)
        tab.press("Stop")
        tab.is_idle()
    expect(tab.questions).to_have_text(["Greet me."])
    expect(tab.page.locator("#chat")).not_to_contain_text("Error")
    expect(tab.input).to_have_value("<image_placeholder>Colour?")
    expect(tab.page.locator("#message .thumbnail-item")).to_have_count(1)
    tab.press("Send")
    tab.sees(PARROT_ANSWERS["Greet me."], "It is red.")


def test_messages_for_a_moment_go_away(tab: Tab) -> None:
    tab.press("Send")
    expect(tab.toast).to_have_text("Write a message, or add an image.")
    expect(tab.toast).to_have_count(0)
    expect(tab.status).to_have_text("")


def test_pictures_are_thumbnails_side_by_side_and_open_large(sized: Tab) -> None:
    sized.send("Which image has the blue star?", IMAGES / "more_shapes.png", IMAGES / "shapes.png")
    sized.sees(re.compile("second"))
    expect(sized.pictures).to_have_count(2)
    first, second = (sized.pictures.nth(i).bounding_box() for i in range(2))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    assert second["x"] + second["width"] <= sized.page.viewport_size["width"]
    sized.page.get_by_role("button", name="Picture 2 of 2").click()
    large = sized.page.get_by_role("dialog").locator("img")
    expect(large).to_be_visible()
    assert large.evaluate("(it) => it.complete && it.naturalWidth > 0")
    box = large.bounding_box()
    assert box["height"] > 1.5 * second["height"]
    assert box["x"] >= 0 and box["x"] + box["width"] <= sized.page.viewport_size["width"]
    sized.page.keyboard.press("Escape")
    expect(sized.page.get_by_role("dialog")).to_have_count(0)
    expect(sized.page.get_by_role("button", name="Picture 2 of 2")).to_be_focused()


def test_pictures_can_be_dropped_and_pasted(tab: Tab) -> None:
    for number, (event, kind, key) in enumerate(
        (("drop", "DragEvent", "dataTransfer"), ("paste", "ClipboardEvent", "clipboardData")), start=1
    ):
        tab.input.evaluate(
            """async (field, [url, event, kind, key]) => {
                const data = new DataTransfer();
                data.items.add(new File([await (await fetch(url)).blob()], "shapes.png", {type: "image/png"}));
                field.dispatchEvent(new window[kind](event, {[key]: data, bubbles: true, cancelable: true}));
            }""",
            [image_data_url(load_image(IMAGES / "shapes.png")), event, kind, key],
        )
        expect(tab.page.locator("#message .thumbnail-item")).to_have_count(number)
    tab.send("Which image has the blue star?")
    expect(tab.answers).to_have_count(1)
    expect(tab.pictures).to_have_count(2)


# --- settings ---


def test_no_slider_has_a_value_that_is_refused(tab: Tab, tiny: Served, parrot: Served) -> None:
    def move_all(end: int) -> None:
        """Every slider to its least or largest value."""
        tab.open_side("Settings")
        for slider in tab.page.locator("#settings-side input[type=range]").all():
            slider.focus()
            slider.press("Home" if end == 0 else "End")
        tab.close_side("Settings")

    for model, (engine, _) in (("tiny", tiny), ("parrot", parrot)):
        tab.choose_model(model)
        for name in ("Max generation tokens", "Max history tokens"):
            expect(tab.page.get_by_label(f"number input for {name}")).to_have_attribute(
                "max", str(min(4096, engine.positions))
            )
            least, most, value = tab.limits(name)
            assert least <= value <= most <= engine.positions
        for end in (0, 1):
            for temperature in (0, 1):
                move_all(end)
                tab.set("Temperature", temperature)
                tab.send("Greet me.")
                expect(tab.answers).to_have_count(1)
                expect(tab.page.locator("#chat")).not_to_contain_text("Error")
                with contextlib.suppress(sync_api.TimeoutError):  # if it has not ended by itself
                    tab.page.get_by_role("button", name="Stop", exact=True).click(timeout=1000)
                tab.is_idle()
                tab.press("New Conversation")
                expect(tab.questions).to_have_count(0)
    expect(tab.page.get_by_text("is greater than maximum")).to_have_count(0)


def test_the_settings_and_the_conversations_are_folded_away(sized: Tab) -> None:
    for side, inside in (
        ("Settings", sized.page.get_by_role("combobox", name="Model")),
        ("Conversations", sized.page.get_by_text("Upload a")),
    ):
        expect(inside).not_to_be_visible()
        sized.open_side(side)
        expect(inside).to_be_in_viewport(ratio=1)
        sized.page.keyboard.press("Escape")
        expect(inside).not_to_be_visible()


# --- layout ---


def boxes(tab: Tab, *selectors: str) -> list[dict[str, float]]:
    return [tab.page.locator(selector).first.bounding_box() for selector in selectors]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE, (320, 568), (844, 390)], ids=["wide", "phone", "small", "across"])
def test_everything_is_within_the_window(
    browser: sync_api.Browser, address: str, size: tuple[int, int], scheme: str
) -> None:
    tab = Tab(browser, address, size, color_scheme=scheme, has_touch=size == PHONE)
    width, height = size

    def check() -> None:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.page.evaluate("document.documentElement.scrollHeight") <= height
        chat, box = boxes(tab, "#chat", "#message")
        assert box["y"] + box["height"] <= height
        assert chat["y"] + chat["height"] <= box["y"] + 1
        field, send = boxes(tab, "#message textarea", "#message .submit-button, #message .stop-button")
        assert send["x"] >= field["x"] + field["width"] - 1
        assert abs((send["y"] + send["height"] / 2) - (field["y"] + field["height"] / 2)) < 12, "beside the box"

    check()
    clipped = "(it) => { const c = document.createElement('canvas').getContext('2d'); const s = getComputedStyle(it);"
    clipped += "c.font = s.font; return c.measureText(it.placeholder).width > it.clientWidth }"
    assert not tab.input.evaluate(clipped), "the placeholder is whole"
    if height > 500:
        cards = tab.page.locator("#chat .example")
        assert cards.count() == 5
        expect(cards.first.locator("img")).to_be_visible()
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.is_idle()
    check()
    tab.add(IMAGES / "shapes.png", IMAGES / "chart.png", IMAGES / "word.png")
    check()
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness > 127) == (scheme == "light")
    tab.context.close()
    assert tab.errors == []


def test_dark_and_light_can_be_chosen_and_stay(browser: sync_api.Browser, address: str) -> None:
    tab = Tab(browser, address, color_scheme="light")
    brightness = "parseInt(getComputedStyle(document.querySelector('gradio-app')).backgroundColor.match(/\\d+/)[0])"
    assert tab.page.evaluate(brightness) > 127
    tab.page.wait_for_timeout(500)
    tab.open_side("Settings")
    tab.page.get_by_label("Dark").check()
    tab.page.wait_for_function(f"{brightness} < 127")
    tab.page.reload()
    tab.page.wait_for_function(f"{brightness} < 127")
    tab.open_side("Settings")
    tab.page.get_by_label("System").check()
    tab.page.wait_for_function(f"{brightness} > 127")
    tab.context.close()
    assert tab.errors == []


def test_the_empty_chat_has_its_examples_in_the_middle(tab: Tab) -> None:
    chat, cards = boxes(tab, "#chat", "#chat .examples")
    assert abs((cards["x"] + cards["width"] / 2) - (chat["x"] + chat["width"] / 2)) < 12
    assert chat["height"] > 0.7 * tab.page.viewport_size["height"]


# --- by keyboard ---


def focused(tab: Tab) -> str:
    """The name of what has the focus."""
    return tab.page.evaluate(
        """() => {
            const it = document.activeElement;
            return it === document.body ? "" : it.ariaLabel || it.innerText || "";
        }"""
    )


def tab_to(tab: Tab, name: str, keys: str = "Tab") -> None:
    """Press Tab until something has the focus."""
    for _ in range(60):
        if re.search(name, focused(tab)):
            return
        tab.page.keyboard.press(keys)
    pytest.fail(f"Tab does not lead to {name}, but to {focused(tab)!r}")


def test_the_keyboard_alone_suffices(tab: Tab) -> None:
    keyboard = tab.page.keyboard
    tab_to(tab, "Which bar is tallest")
    keyboard.press("Enter")
    expect(tab.input).to_have_value("Which bar is tallest?")
    tab_to(tab, "^Message$")
    keyboard.press("Enter")
    tab.sees(re.compile("blue"))
    tab.is_idle()
    expect(tab.input).to_be_focused()
    tab_to(tab, "^Picture 1 of 1", "Shift+Tab")
    keyboard.press("Enter")
    expect(tab.page.get_by_role("dialog")).to_be_visible()
    keyboard.press("Escape")
    tab_to(tab, "^Edit$")
    keyboard.press("Enter")
    expect(tab.page.get_by_label("Your message")).to_be_focused()
    keyboard.press("Control+A")
    keyboard.type("How many bars are there?")
    tab_to(tab, "^Submit$")
    keyboard.press("Enter")
    tab.sees(re.compile("bars"))
    tab.is_idle()
    tab_to(tab, "^Settings$", "Shift+Tab")
    keyboard.press("Enter")
    tab_to(tab, "Temperature")
    keyboard.press("Escape")
    tab_to(tab, "^New Conversation$")
    keyboard.press("Enter")
    expect(tab.questions).to_have_count(0)
    tab_to(tab, "^Send$")
    keyboard.press("Enter")
    expect(tab.toast).to_be_visible()
    expect(tab.input).to_be_focused()


def test_everything_that_can_be_pressed_has_a_name(tab: Tab) -> None:
    tab.send("What colour is the star?", IMAGES / "shapes.png")
    tab.sees(re.compile("blue"))
    tab.is_idle()
    tab.add(IMAGES / "shapes.png")
    for side in ("Settings", "Conversations"):
        tab.open_side(side)
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")]
            .filter((it) => it.checkVisibility({visibilityProperty: true}) && it.type !== "file")
            .filter((it) => !(it.ariaLabel || it.innerText.trim() || it.title || it.labels?.length))
            .map((it) => it.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert tab.page.locator("html").get_attribute("lang")


# --- where it looked ---


def test_where_it_looked_is_over_the_pictures(sized: Tab) -> None:
    sized.send("What colour is the star?", IMAGES / "shapes.png")
    sized.sees(re.compile("blue"))
    sized.is_idle()
    sized.press("Where it looked")
    dialog = sized.page.get_by_role("dialog")
    expect(dialog.locator("canvas")).to_have_count(1)
    words = dialog.locator(".word")
    assert dialog.locator(".words").inner_text() == sized.answers.inner_text().strip()
    pixels = "(it) => [...it.getContext('2d').getImageData(0, 0, it.width, it.height).data].join()"
    whole = dialog.locator("canvas").evaluate(pixels)
    words.last.focus()
    expect(words.last).to_be_focused()
    assert dialog.locator("canvas").evaluate(pixels) != whole
    box = dialog.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= sized.page.viewport_size["width"]
    sized.page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_where_it_looked_needs_a_picture(tab: Tab) -> None:
    tab.choose_parrot()
    tab.send("Greet me.")
    tab.sees(PARROT_ANSWERS["Greet me."])
    tab.is_idle()
    tab.press("Where it looked")
    expect(tab.toast).to_have_text("There is no answer about a picture yet.")


# --- pictures of it ---


@pytest.mark.parametrize("name", ["empty", "wide", "two_pictures", "dark", "phone", "phone_empty", "where_it_looked"])
def test_what_it_looks_like(browser: sync_api.Browser, address: str, name: str, tmp_path: Path) -> None:
    """Draws the pictures of docs/page.md, into the directory that SCREENSHOTS names."""
    scheme = "dark" if name == "dark" else "light"
    tab = Tab(browser, address, PHONE if name.startswith("phone") else WIDE, color_scheme=scheme)
    if name == "two_pictures":
        tab.send("Which image has the blue star?", IMAGES / "shapes.png", IMAGES / "more_shapes.png")
        tab.sees(re.compile("first"))
    elif not name.endswith("empty"):
        tab.send("What colour is the star?", IMAGES / "shapes.png")
        tab.sees(re.compile("blue"))
        tab.is_idle()
        tab.send("Describe the image.")
        expect(tab.answers).to_have_count(2)
    tab.is_idle()
    if name == "wide":
        tab.open_side("Conversations")
        expect(tab.titles()).to_have_count(1)
    if name == "where_it_looked":
        tab.press("Where it looked")
        expect(tab.page.get_by_role("dialog").locator("canvas")).to_have_count(1)
    tab.page.wait_for_timeout(800)  # transitions
    directory = Path(os.environ.get("SCREENSHOTS", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    tab.page.screenshot(path=str(path))
    assert 5_000 < path.stat().st_size < 150_000
    tab.context.close()
