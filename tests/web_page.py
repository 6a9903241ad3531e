"""The web page in a browser, as its user sees and handles it; and servers of it."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from deepseek_vl.engine.engine import Engine  # noqa: E402
from deepseek_vl.models import VLChatProcessor  # noqa: E402
from deepseek_vl.serve.inference import load_model  # noqa: E402
from deepseek_vl.serve.web.page import create_page, launch  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
IMAGES = ROOT / "images"
WIDE, PHONE = (1280, 800), (390, 844)
Served = tuple[Engine, VLChatProcessor]
expect = sync_api.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session", autouse=True)
def _own_uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give these tests an upload folder of their own, as a server that ends deletes its whole folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield


@pytest.fixture(scope="module")
def tiny() -> Served:
    tokenizer, model, processor = load_model("tiny", device="cpu", dtype="float32")
    return Engine(model, tokenizer), processor


@pytest.fixture(scope="module")
def parrot(parrot_checkpoint: Path) -> Served:
    """The parrot, so slow that a song of its does not end by itself within a test."""
    tokenizer, model, processor = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    model.language_model.lm_head.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    return Engine(model, tokenizer), processor


@pytest.fixture(scope="module")
def address(tiny: Served, parrot: Served) -> Iterator[str]:
    """A server whose first model is the bundled one."""
    page = create_page({"tiny": tiny, "parrot": parrot})
    yield launch(page, "127.0.0.1", free_port())
    page.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs {CHROMIUM} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a browser, as its user handles it.

    Args:
        size: of the window.
        context: the browser's memory, where another tab has one.
        options: of the browser's context.

    Attributes:
        errors: what the page's scripts have raised.
    """

    def __init__(
        self,
        browser: sync_api.Browser,
        address: str,
        size: tuple[int, int] = WIDE,
        context: sync_api.BrowserContext | None = None,
        **options: object,
    ):
        width, height = size
        self.context = context or browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.input = self.page.get_by_role("textbox", name="Message", exact=True)
        self.input.wait_for()

    def open_side(self, name: str) -> None:
        """Unfold the settings or the conversations."""
        toggle = self.page.get_by_role("button", name=name, exact=True)
        if toggle.get_attribute("aria-expanded") != "true":
            toggle.click()
            expect(toggle).to_have_attribute("aria-expanded", "true")

    def close_side(self, name: str) -> None:
        """Fold them away."""
        toggle = self.page.get_by_role("button", name=name, exact=True)
        if toggle.get_attribute("aria-expanded") == "true":
            toggle.click()
            expect(toggle).to_have_attribute("aria-expanded", "false")

    def choose_model(self, name: str) -> None:
        self.open_side("Settings")
        self.page.get_by_role("combobox", name="Model").click()
        self.page.get_by_role("option", name=name).click()
        self.close_side("Settings")

    def choose_parrot(self) -> None:
        """The model whose answers are known, with greedy decoding."""
        self.choose_model("parrot")
        self.set("Temperature", 0)

    def set(self, slider: str, value: float) -> None:
        self.open_side("Settings")
        number = self.page.get_by_label(f"number input for {slider}")
        number.fill(str(value))
        number.press("Tab")
        self.close_side("Settings")

    def limits(self, slider: str) -> tuple[float, float, float]:
        """The least, the largest and the present value of a slider."""
        number = self.page.get_by_label(f"number input for {slider}")
        least, most = (float(number.get_attribute(name)) for name in ("min", "max"))
        return least, most, float(number.input_value())

    def add(self, *files: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.press("Add pictures")
        chooser.value.set_files([str(file) for file in files])
        expect(self.page.locator("#message .thumbnail-item")).to_have_count(len(files))

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def send(self, text: str, *files: Path) -> None:
        if files:
            self.add(*files)
        self.input.fill(text)
        self.press("Send")

    def is_idle(self, answers: int | None = None) -> None:
        """Wait until no answer comes. Right after a click at Send, say how many answers there will be."""
        if answers is not None:
            expect(self.answers).to_have_count(answers)
        expect(self.page.get_by_role("button", name="Send", exact=True)).to_be_visible()

    @property
    def answers(self) -> sync_api.Locator:
        return self.page.locator("#chat .bot.message")

    @property
    def questions(self) -> sync_api.Locator:
        """The texts that were asked."""
        return self.page.locator("#chat .user.message:not(.component)")

    @property
    def pictures(self) -> sync_api.Locator:
        """The pictures in the chat."""
        return self.page.locator("#chat .user.message img")

    @property
    def toast(self) -> sync_api.Locator:
        """A message that is for a moment."""
        return self.page.get_by_test_id("toast-text")

    @property
    def status(self) -> sync_api.Locator:
        return self.page.locator("#status")

    def sees(self, *answers: str | re.Pattern[str]) -> None:
        """Wait until the answers are these."""
        expect(self.answers).to_have_text(list(answers))

    def titles(self) -> sync_api.Locator:
        """The names of the conversations that are kept."""
        return self.page.locator("#conversations .title")

    def is_kept(self, text: str, times: int | None = None) -> None:
        """Wait until the browser has kept an answer (or a question) with this text; or has the text so many times."""
        self.page.wait_for_function(
            """async ([text, times]) => {
                const database = await new Promise((resolve) => {
                    const request = indexedDB.open("deepseek-vl", 1);
                    request.onsuccess = () => resolve(request.result);
                });
                const store = database.transaction("conversations").objectStore("conversations");
                const kept = await new Promise((resolve) => {
                    const request = store.getAll();
                    request.onsuccess = () => resolve(request.result);
                });
                database.close();
                const found = JSON.stringify(kept).split(text).length - 1;
                return times === null ? found > 0 : found === times;
            }""",
            arg=[text, times],
        )


@pytest.fixture
def tab(browser: sync_api.Browser, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.context.close()
    assert tab.errors == []
