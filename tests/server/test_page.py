"""The chat page: its policy, and in a browser what a person does with it."""

from __future__ import annotations

import re
import shutil

import pytest

from eightfold.server.app import policy
from tests.server.running import Running, eventually

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if executable is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser):
    """Open the page of a server; at the end, nothing may have been complained about in the console."""
    opened = []

    def open_(running: Running, *, expects: str | None = None, **options):
        page = browser.new_context(**options).new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(running.url)
        opened.append((page, complaints, expects))
        return page

    yield open_
    for page, complaints, expects in opened:
        page.context.close()
        assert [text for text in complaints if expects is None or expects not in text] == []


def say(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_the_page_may_only_talk_to_its_server(serve):
    raw = serve().http.get("/")
    policies = dict(part.split(" ", 1) for part in raw.headers["content-security-policy"].split("; "))
    assert policies["default-src"] == "'none'" and policies["connect-src"] == "'self'"
    assert "unsafe" not in raw.headers["content-security-policy"]
    # Nothing is named that would be loaded from elsewhere.
    assert set(re.findall(r"https?://[^\s\"')]+", raw.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\son\w+=|innerHTML|\sstyle=", raw.text)


def test_the_policy_names_the_script_and_the_style_by_their_hashes():
    found = policy("<style></style><script>alert(1)</script>")
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in found
    assert "style-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='" in found


def test_a_chat(serve, open_page):
    running = serve(answer="Hello there", seconds=0.03)
    page = open_page(running)
    page.get_by_role("heading", name="tiny").wait_for()
    say(page, "Hi")
    answer = page.locator(".assistant .text")
    answer.wait_for()
    early = answer.text_content()
    page.get_by_text("first after").first.wait_for()
    page.get_by_role("button", name="Send").wait_for()
    assert (answer.text_content(), "Hello there".startswith(early), len(early) < 11) == ("Hello there", True, True)
    assert re.search(r"^11 tokens, [\d.]+ tok/s, first after [\d.]+ s$", page.locator(".facts").text_content())
    assert re.search(r"[\d.]+ tok/s, first after", page.locator("#speed").text_content())
    say(page, "And now?")
    page.locator(".facts").nth(1).get_by_text("tok/s").wait_for()
    prompt = running.engine.tokenizer.decode(running.engine.last[0], keep_special=True)
    assert prompt == "<|user|>Hi</s><|assistant|>Hello there</s><|user|>And now?</s><|assistant|>"


def test_stop_by_button_and_by_key_ends_the_request(serve, open_page):
    running = serve(answer="word " * 40, seconds=0.03)
    page = open_page(running)
    for number, stop in enumerate(
        (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape"))
    ):
        say(page, "Go on")
        page.locator(".assistant").nth(number).locator(".text").wait_for()
        stop()
        page.locator(".facts").nth(number).get_by_text("stopped").wait_for()
        page.get_by_role("button", name="Send").wait_for()
        assert eventually(lambda ends=number + 1: running.engine.ended["aborted"] == ends)  # type: ignore[misc]
        assert page.locator(".assistant .text").nth(number).text_content() in "word " * 40


def test_a_new_chat_forgets_also_while_an_answer_comes(serve, open_page):
    running = serve(answer="word " * 40, seconds=0.02)
    page = open_page(running)
    say(page, "First")
    page.locator(".assistant .text").wait_for()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    assert page.get_by_text("Everything stays").is_visible()
    assert page.evaluate("document.activeElement.id") == "say"
    assert eventually(lambda: not running.engine.open)
    running.engine.answer = "Yes"
    say(page, "Second")
    page.locator(".facts").get_by_text("first after").wait_for()
    assert "First" not in running.engine.tokenizer.decode(running.engine.last[0])


def test_markup_is_shown_as_it_is_and_code_as_code(serve, open_page):
    answer = f"{MARKUP}\n\n```html\n<i>x</i>\n```\nand `<u>`"
    page = open_page(serve(answer=answer))
    say(page, MARKUP)
    page.locator(".facts").get_by_text("first after").wait_for()
    assert page.locator(".user .text").text_content() == MARKUP
    texts = page.locator(".assistant .text").all_text_contents()
    assert [text.strip() for text in texts] == [MARKUP, "and <u>"]
    assert page.locator(".block code").text_content() == "<i>x</i>"
    assert page.locator(".bar span").text_content() == "html"
    assert page.locator(".assistant .text code").text_content() == "<u>"
    assert page.locator("#log img, #log b, #log i, #log u").count() == 0


def test_settings_are_sent_and_kept(serve, open_page):
    running = serve()
    page = open_page(running)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("4")
    page.keyboard.press("Enter")
    assert page.get_by_label("Longest answer").is_hidden()
    page.reload()
    say(page, "Hi")
    page.get_by_text("cut off at its longest").wait_for()
    prompt, params = running.engine.last
    assert running.engine.tokenizer.decode(prompt, keep_special=True).startswith("<|system|>Be kind.</s><|user|>Hi")
    assert (params.temperature, params.max_tokens) == (0.3, 4)


def test_a_key_is_asked_for_where_one_is_needed(serve, open_page):
    page = open_page(serve({"api_key": "open sesame"}), expects="401")
    page.get_by_label("API key").fill("open sesame")
    page.keyboard.press("Tab")
    page.get_by_role("heading", name="tiny").wait_for()
    say(page, "Hi")
    page.get_by_text("first after").first.wait_for()
    page.reload()
    page.get_by_role("heading", name="tiny").wait_for()


def test_an_error_is_shown_and_the_question_can_be_asked_again(serve, open_page):
    from eightfold.errors import InputError

    running = serve(refusal=InputError("prompt", got="<b>nonsense</b>"))
    page = open_page(running, expects="400")
    say(page, "Hi")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").text_content() == "prompt: got <b>nonsense</b>Try again"
    running.engine.refusal = None
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("Hello!").wait_for()
    assert page.locator(".error").count() == 0


def test_a_stream_that_breaks_off_keeps_what_there_was(serve, open_page):
    page = open_page(serve(answer="Hello there", fails_after=5))
    say(page, "Hi")
    page.get_by_role("alert").wait_for()
    assert page.locator(".assistant .text").text_content() == "Hello"
    page.get_by_role("button", name="Send").wait_for()


def test_on_a_phone_nothing_is_cut_off(serve, open_page):
    page = open_page(serve(answer="x" * 200), viewport={"width": 360, "height": 640}, color_scheme="dark")
    page.get_by_role("button", name="Settings").click()
    say(page, "y" * 200)
    page.locator(".facts").get_by_text("first after").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("Send", "New chat", "Settings"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
