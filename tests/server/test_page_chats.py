"""The chat page in a browser: chats that are kept, settings, and how it looks and is used on every screen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.browsing import (
    answered,
    box,
    events,
    exchange,
    kept,
    picture,
    prompt_of,
    replace_answers,
    say,
    seed,
    seen,
    turns,
)
from tests.server.running import eventually

SCREENS: dict[str, Any] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True},
    "landscape": {"viewport": {"width": 667, "height": 340}, "has_touch": True, "is_mobile": True},
}
RICH = """# Tea and coffee

Both contain **caffeine**, but *how* they act differs: see [this page](https://example.com/).

| drink | caffeine per cup | steeping | notes about the drink |
|:------|----:|:--:|---|
| coffee | 95 mg | 4 min | bitter, roasted, and by most accounts essential in the morning |
| tea | 28 mg | 2 min | grassy |

1. Boil the water
   - not quite boiling for `green` tea

> A quote about tea.

```python
def steep(minutes: float, temperature: int = 80) -> str:
    return f"tea after {minutes} min at {temperature} C, or so it is said by people who have waited for it"
```

\\(t_1 = \\frac{\\ln 2}{k}\\) 日本語の文章もきれいに折り返されます。とても長い文章なので、画面の端で折り返されます。

هذه فقرة باللغة العربية تبدأ من اليمين.
"""
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 6


def titles(page):
    return page.locator("#list li > button").all_inner_texts()


def open_list(page):
    if page.locator("#menu").is_visible():
        page.locator("#menu").click()


def test_chats_are_kept_named_and_opened_again(serve, open_page):
    running = serve()
    page = open_page(running)
    say(page, "The first chat, with a long name that goes on and on and on")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    assert turns(page) == [] and page.get_by_text("What is on your mind?").is_visible()
    assert page.evaluate("document.activeElement.id") == "say"
    say(page, "Second")
    answered(page)
    assert titles(page) == ["Second", "The first chat, with a long name that goes on a…"]
    page.reload()
    seen(page, "Hello!")
    assert turns(page) == ["Second", "Hello!"]
    page.get_by_role("button", name="The first chat").click()
    seen(page, "The first chat, with a long name that goes on and on and on")
    say(page, "More")
    answered(page, 2)
    assert prompt_of(running).startswith("<|user|>The first chat")
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Rename this chat").fill("Mine")
    page.keyboard.press("Enter")
    page.locator("#title").get_by_text("Mine").wait_for()
    assert titles(page) == ["Mine", "Second"] and page.get_by_role("heading", name="Mine", level=1).is_visible()
    other = open_page(running, beside=page)
    assert titles(other) == ["Mine", "Second"] and turns(other) == []


def test_a_new_chat_begins_also_while_an_answer_comes(serve, open_page):
    running = serve(answer="word " * 60, seconds=0.02, max_model_len=2048)
    page = open_page(running)
    say(page, "First")
    page.locator(".part").wait_for()
    page.keyboard.press("Control+Shift+O")
    assert eventually(lambda: not running.engine.open)
    running.engine.answer = "Yes"
    say(page, "Second")
    answered(page)
    assert "First" not in prompt_of(running) and turns(page) == ["Second", "Yes"]
    page.get_by_role("button", name="First").click()
    page.get_by_role("button", name="Continue").wait_for()
    assert turns(page)[1] in "word " * 60


def test_an_answer_that_was_left_does_not_end_the_next(serve, open_page):
    running = serve(stuck=True)
    page = open_page(running)
    say(page, "First")
    assert eventually(lambda: len(running.engine.open) == 1)
    page.keyboard.press("Control+Shift+O")
    say(page, "Second")
    assert eventually(lambda: running.engine.ended["aborted"] == 1 and len(running.engine.open) == 1)
    page.get_by_role("button", name="First").wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    running.engine.stuck = False
    answered(page)
    assert turns(page) == ["Second", "Hello!"]
    page.get_by_role("button", name="First").click()
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert turns(page) == ["First", "Hello!"]


def test_a_chat_is_deleted_only_when_that_is_confirmed(serve, open_page):
    page = open_page(serve())
    seed(page, exchange("Hi", "Hello"))
    page.get_by_role("button", name="Delete").click()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    page.keyboard.press("Enter")
    assert len(kept(page)) == 1 and turns(page) == ["Hi", "Hello"]
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("What is on your mind?").wait_for()
    assert (kept(page), titles(page)) == ([], [])


def test_a_chat_is_exported_as_a_line_for_run_and_as_markdown(serve, open_page, tmp_path, model):
    from eightfold.cli.batch_input import OwnBatch, read_batch

    page = open_page(serve(), accept_downloads=True)
    page.evaluate("localStorage.setItem('eightfold.system', 'Be kind.')")
    seed(page, [*exchange('A "question"\n日本', "An *answer*", reasoning="hm", facts="2 tokens"), *exchange("B", "C")])
    for name in ("JSON", "Markdown"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export as {name}").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
    assert (tmp_path / "A chat.md").read_text() == (
        '# A chat\n\n## You\n\nA "question"\n日本\n\n## tiny\n\nAn *answer*\n\n## You\n\nB\n\n## tiny\n\nC\n'
    )
    batch = read_batch(tmp_path / "A chat.jsonl", {}, ())
    assert isinstance(batch, OwnBatch)
    messages: Any = batch.requests[0].prompt
    assert len(batch) == 1
    assert [(each["role"], each["content"]) for each in messages] == [
        ("system", "Be kind."),
        ("user", 'A "question"\n日本'),
        ("assistant", "An *answer*"),
        ("user", "B"),
        ("assistant", "C"),
    ]


def test_two_tabs_do_not_destroy_what_the_other_keeps(serve, open_page):
    running = serve(answer="Yes")
    one = open_page(running)
    seed(one, exchange("Hi", "Hello"))
    two = open_page(running, beside=one)
    say(two, "Another chat")
    answered(two)
    assert eventually(lambda: titles(one) == ["Another chat", "A chat"])
    # Both have the same chat open: what one adds, the other shows.
    two.get_by_role("button", name="A chat", exact=True).click()
    seen(two, "Hello")
    say(one, "From one")
    answered(one, 2)
    assert eventually(lambda: turns(two) == ["Hi", "Hello", "From one", "Yes"])
    # Both go on in it at the same time: both are kept.
    running.engine.stuck = True
    say(one, "One more")
    one.get_by_role("button", name="Stop").wait_for()
    two.get_by_text("This has no answer yet.").wait_for()
    say(two, "Two more")
    two.get_by_role("button", name="Stop").wait_for()
    running.engine.stuck = False
    answered(one, 3)
    answered(two, 3)
    found = [[each["content"] for each in chat["messages"]][4:] for chat in kept(one)]
    assert sorted(filter(None, found)) == [["One more", "Two more", "Yes"], ["One more", "Yes"]]
    assert titles(one)[:2] in (["A chat (copy)", "A chat"], ["A chat", "A chat (copy)"])


def test_a_full_storage_is_told_and_the_chat_goes_on(serve, open_page):
    page = open_page(serve())
    page.evaluate("localStorage.setItem('eightfold.chat.large', 'x'.repeat(3_999_900))")
    say(page, "Hi")
    page.get_by_role("alert").get_by_text("The browser’s storage is full: this chat is not kept.").wait_for()
    answered(page)
    assert turns(page) == ["Hi", "Hello!"] and titles(page) == ["Hi"]
    page.evaluate("localStorage.removeItem('eightfold.chat.large')")
    say(page, "And?")
    answered(page, 2)
    assert len(kept(page)[0]["messages"]) == 4


def test_a_browser_that_keeps_nothing_says_so(serve, open_page, browser):
    running = serve()
    page = open_page(running)
    page.context.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});"
    )
    page.reload()
    page.get_by_text("This browser keeps nothing for this page").wait_for()
    say(page, "Hi")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    say(page, "Other")
    answered(page)
    page.get_by_role("button", name="Hi", exact=True).click()
    seen(page, "Hello!")
    assert turns(page) == ["Hi", "Hello!"] and titles(page) == ["Hi", "Other"]


def test_what_other_programs_or_versions_have_kept_does_no_harm(serve, open_page):
    page = open_page(serve())
    for at, text in enumerate(("", "{", "[]", "null", '{"messages": 1}', '{"messages": [{}]}', '{"title": 1}')):
        page.evaluate("([at, text]) => localStorage.setItem('eightfold.chat.' + at, text)", [at, text])
    page.reload()
    say(page, "Hi")
    answered(page)
    assert titles(page) == ["Hi"]


def test_a_draft_survives_a_reload(serve, open_page):
    page = open_page(serve())
    box(page).fill("Half a sen")
    page.reload()
    assert box(page).input_value() == "Half a sen"


def test_settings_are_sent_kept_and_reset(serve, open_page):
    running = serve({"model_names": ("tiny", "other")})
    page = open_page(running)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Top-p").fill("0.5")
    page.get_by_label("Longest answer").fill("4")
    page.get_by_label("Model").select_option("other")
    page.get_by_label("Longest answer").press("Enter")
    assert page.get_by_label("Longest answer").is_hidden()
    page.reload()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hi")
    page.get_by_text("cut off at its longest").wait_for()
    prompt, params = running.engine.last
    assert running.engine.tokenizer.decode(prompt, keep_special=True).startswith("<|system|>Be kind.</s><|user|>Hi")
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 4)
    assert asked.value.post_data_json["model"] == "other"
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hi")
    answered(page, 2)
    assert {name: asked.value.post_data_json.get(name) for name in ("temperature", "top_p", "max_tokens")} == {
        "temperature": 0.7,
        "top_p": None,
        "max_tokens": None,
    }


def test_a_setting_that_cannot_be_is_named(serve, open_page):
    page = open_page(serve())
    page.get_by_role("button", name="Settings").click()
    for name, text in (("Temperature", "3"), ("Top-p", "0"), ("Longest answer, in tokens", "1.5")):
        usual = page.get_by_label(name).input_value()
        page.get_by_label(name).fill(text)
        page.get_by_role("button", name="Done").click()
        page.get_by_role("alert").get_by_text(f"{name}: expected").wait_for()
        page.get_by_label(name).fill(usual)
    page.get_by_label("Temperature").fill("9")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").input_value() == "0.7"


def test_on_a_touch_screen_enter_begins_a_line(serve, open_page):
    page = open_page(serve(), **SCREENS["phone"])
    box(page).press_sequentially("Hi")
    box(page).press("Enter")
    assert box(page).input_value() == "Hi\n"


def test_everything_can_be_reached_by_keyboard(serve, open_page):
    page = open_page(serve())
    seed(page, exchange("Hi", "```\ncode\n```"))
    page.locator(".skip").focus()
    reached = []
    for _ in range(15):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.ariaLabel || e.id || e.textContent.trim())(document.activeElement)"))
    assert reached == [
        *("new", "A chat", "Rename", "Export as JSON", "Export as Markdown", "Delete", "Settings"),
        *("Edit", "Copy", "Copy", "Code", "Copy", "Regenerate", "Message", "Send"),
    ]
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "gear"


@pytest.mark.parametrize("screen", SCREENS)
def test_every_screen(serve, open_page, screen):
    """Nothing is cut off or in the way, on any screen; and the pictures."""
    page = open_page(serve(max_model_len=2048, answer="Hello!"), **SCREENS[screen])
    width, height = SCREENS[screen]["viewport"].values()

    def check(name):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        picture(page, f"{screen}-{name}")
        require_accessible(page)

    check("empty")
    seed(
        page, [*exchange(LONG, RICH, facts="200 tokens, 31.0 tok/s"), *exchange("Long?", LONG, ends="length")], used=900
    )
    for name in ("Send", "Settings"):
        found = page.get_by_role("button", name=name).bounding_box()
        assert 0 <= found["x"] <= width - found["width"] and 0 <= found["y"] <= height - found["height"]
    for selector in (".turn", ".turn .text", ".part", ".block", ".wide", "#context", "h1"):
        for found in page.locator(selector).all():
            place = found.bounding_box()
            assert place["x"] >= 0 and place["x"] + place["width"] <= width, selector
    arabic = page.get_by_text("هذه فقرة")
    assert arabic.evaluate("e => [getComputedStyle(e).direction, getComputedStyle(e).textAlign]") == ["rtl", "start"]
    page.evaluate("document.getElementById('main').scrollTop = 0")
    check("answer")
    page.evaluate("document.getElementById('main').scrollTop = 1e6")
    check("end")
    page.get_by_role("button", name="Settings").click()
    check("settings")
    page.keyboard.press("Escape")
    open_list(page)
    check("chats")
    page.get_by_role("button", name="Delete").click()
    check("question")
    page.keyboard.press("Escape")
    if page.locator("#drawer").is_visible():
        page.keyboard.press("Escape")
    replace_answers(page, events({"reasoning_content": "Hm."}, {"content": "Broken"}, ends=None, done=False))
    say(page, "Break")
    page.locator(".broken").wait_for()
    page.locator(".user").last.get_by_role("button", name="Edit").click()
    page.evaluate("notice('The server is busy. Try again in 7 s.', [['Try again', () => {}]])")
    check("errors")


def require_accessible(page):
    """Check roles, names and contrast with axe-core, where it is installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page.wait_for_timeout(200)  # a colour that is fading has not its contrast yet
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found] == []


def test_motion_is_reduced_where_that_is_asked_for(serve, open_page):
    running = serve(answer="word " * 60, seconds=0.02, max_model_len=2048)
    page = open_page(running, reduced_motion="reduce")
    say(page, "Hi")
    page.locator(".coming").wait_for()
    assert page.evaluate("document.getAnimations({subtree: true}).length") == 0
