"""The chat page in a browser: its policy, a conversation, what is rendered how, and ways on from what fails."""

from __future__ import annotations

import re

import pytest

from eightfold.errors import InputError
from eightfold.server.chat_page import policy
from tests.server.browsing import (
    CHAT,
    answered,
    box,
    events,
    exchange,
    kept,
    prompt_of,
    replace_answers,
    say,
    seed,
    seen,
    turns,
)
from tests.server.running import eventually

MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"


def test_the_page_may_only_talk_to_its_server(serve):
    raw = serve().http.get("/")
    policies = dict(part.split(" ", 1) for part in raw.headers["content-security-policy"].split("; "))
    assert policies["default-src"] == "'none'" and policies["connect-src"] == "'self'"
    assert "unsafe" not in raw.headers["content-security-policy"]
    # Nothing is named that would be loaded from elsewhere.
    assert set(re.findall(r"https?://[^\s\"')]+", raw.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\son\w+=\"|innerHTML|insertAdjacentHTML|\sstyle=", raw.text)


def test_the_policy_names_the_script_and_the_style_by_their_hashes():
    found = policy("<style></style><script>alert(1)</script>")
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in found
    assert "style-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='" in found


def test_a_chat(serve, open_page):
    running = serve(answer="Hello there", seconds=0.03)
    page = open_page(running)
    box(page).fill("Hi")
    box(page).press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    answered(page)
    page.get_by_role("button", name="Send").wait_for()
    assert turns(page) == ["Hi", "Hello there"]
    assert re.search(r"^11 tokens, [\d.]+ tok/s, first after [\d.]+ s$", page.locator(".facts").text_content())
    box(page).fill("And")
    box(page).press("Shift+Enter")
    box(page).press_sequentially("now?")
    box(page).press("Control+Enter")
    answered(page, 2)
    assert prompt_of(running) == "<|user|>Hi</s><|assistant|>Hello there</s><|user|>And\nnow?</s><|assistant|>"
    assert page.title() == "Hi · tiny"


def test_stop_by_button_and_by_key_ends_the_request(serve, open_page):
    running = serve(answer="word " * 40, seconds=0.03, max_model_len=2048)
    page = open_page(running)
    for number, stop in enumerate(
        (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape"))
    ):
        say(page, "Go on")
        page.locator(".assistant").nth(number).locator(".part").wait_for()
        stop()
        page.locator(".facts").nth(number).get_by_text("stopped").wait_for()
        page.get_by_role("button", name="Send").wait_for()
        assert eventually(lambda ends=number + 1: running.engine.ended["aborted"] == ends)  # type: ignore[misc]
        assert page.locator(".markdown").nth(number).inner_text() in "word " * 40


def test_markdown_is_rendered_and_markup_is_text(serve, open_page):
    answer = f"{MARKUP}\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n1. x\n   - y\n\n```html\n<i>x</i>\n```\n# Big\n> said\n\n"
    answer += (
        "`<u>` [go](https://example.com/) ![pic](http://example.com/x.png) [bad](javascript:alert(1)) $a_1$ ~~no~~"
    )
    page = open_page(serve(answer=answer, max_model_len=2048), permissions=["clipboard-read", "clipboard-write"])
    say(page, MARKUP)
    answered(page)
    assert turns(page)[0] == MARKUP
    shown = page.locator(".markdown")
    assert shown.locator("p").first.text_content() == MARKUP
    assert shown.locator("td").all_inner_texts() == ["1", "2"]
    assert shown.locator("td").nth(1).evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    assert shown.locator("ol > li > ul > li").inner_text() == "y"
    assert shown.locator("blockquote").inner_text() == "said"
    assert shown.get_by_role("heading", name="Big", level=3).is_visible()
    assert shown.locator("p code").inner_text() == "<u>"
    assert shown.locator(".formula").inner_text() == "$a_1$" and shown.locator("s").inner_text() == "no"
    links = [[link.get_attribute(name) for name in ("href", "target", "rel")] for link in shown.locator("a").all()]
    assert links == [
        [url, "_blank", "noopener noreferrer"] for url in ("https://example.com/", "http://example.com/x.png")
    ]
    assert page.locator("main :is(img, b, i, u, script)").count() == 0
    assert shown.locator(".bar span").inner_text() == "html"
    shown.get_by_role("button", name="Copy").first.click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "<i>x</i>"
    page.locator(".assistant .foot").get_by_role("button", name="Copy").click()
    assert eventually(lambda: page.evaluate("navigator.clipboard.readText()") == answer)


def test_the_page_copies_only_elements_that_it_knows_whatever_the_server_says(serve, open_page):
    page = open_page(serve(), expects="violates the following Content Security Policy")
    html = (
        "<p id=a onclick=x style=color:red class=right>a<script>alert(1)</script><style>*{}</style>"
        "<img src=/x onerror=y>"
        '<a href="javascript:x">b</a><a href="https://c.d" onclick=x target=_top>c</a><iframe src=/></iframe>'
        '<svg><use href="#i-copy"/></svg><math>m</math></p><form action=/><input></form><constructor>e</constructor>'
    )
    page.route("**/render", lambda route: route.fulfill(json={"rendered": [[{"line": 0, "html": html}]]}))
    say(page, "Hi")
    answered(page)
    assert page.locator(".part").evaluate("part => part.innerHTML") == (
        '<p class="right">ab<a href="https://c.d" target="_blank" rel="noopener noreferrer">c</a>m</p>e'
    )


def test_what_is_rendered_stays_while_an_answer_grows(serve, open_page):
    running = serve(answer="The first.\n\nThe second.\n\n" + "- item *x*\n" * 12, seconds=0.02, max_model_len=2048)
    page = open_page(running)
    say(page, "Hi")
    page.locator(".part li").nth(1).wait_for()
    page.evaluate(
        "() => { const first = document.querySelector('.part p'), item = document.querySelector('.part li');"
        " first.mine = item.mine = true; getSelection().selectAllChildren(item); }"
    )
    answered(page)
    page.locator(".part li").nth(11).wait_for()
    assert page.evaluate("document.querySelector('.part p').mine && document.querySelector('.part li').mine")
    assert page.evaluate("getSelection().toString()") == "item x"


def test_text_that_the_server_does_not_render_is_shown_as_it_is(serve, open_page):
    page = open_page(serve(answer="*a*\n\n*b*"), expects="503")
    page.route("**/render", lambda route: route.fulfill(status=503, body="no"))
    say(page, "Hi")
    answered(page)
    assert page.locator(".rest").text_content() == "*a*\n\n*b*"


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "Let me "}, {"reasoning_content": "see."}, {"content": "*Yes*"}],
        [{"content": "<thi"}, {"content": "nk>\nLet me see."}, {"content": "\n</think>\n\n*Yes*"}],
    ],
)
def test_thoughts_are_folded(serve, open_page, deltas):
    running = serve()
    page = open_page(running)
    replace_answers(page, events(*deltas))
    say(page, "Hi")
    answered(page)
    page.locator(".markdown em").wait_for()
    thoughts = page.locator("details.thoughts")
    assert thoughts.locator("summary").inner_text() == "Thought for 1 s"
    assert not thoughts.get_by_text("Let me see.").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.get_by_text("Let me see.").is_visible()
    say(page, "And?")
    answered(page, 2)
    assert prompt_of(running).startswith("<|user|>Hi</s><|assistant|>*Yes*</s><|user|>And?")
    page.reload()
    assert page.locator("details.thoughts summary").inner_text() == "Thought for 1 s"


def test_thoughts_without_an_answer_are_kept_and_answered_again(serve, open_page):
    page = open_page(serve())
    replace_answers(page, events({"reasoning_content": "Hm."}))
    say(page, "Hi")
    answered(page)
    assert page.locator("summary").first.inner_text() == "Thought for 1 s"
    assert page.locator(".facts").inner_text().endswith("an empty answer")
    page.get_by_role("button", name="Regenerate").click()
    seen(page, "Hello!")
    assert page.locator("details.thoughts").count() == 0


def test_an_earlier_message_is_edited_and_that_can_be_undone(serve, open_page):
    running = serve(answer="Yes", max_model_len=2048)
    page = open_page(running)
    say(page, "First")
    answered(page)
    say(page, "Second")
    answered(page, 2)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    edited = page.get_by_label("Your message, edited")
    assert (
        edited.input_value() == "First" and page.evaluate("document.activeElement.ariaLabel") == "Your message, edited"
    )
    edited.press("Escape")
    assert turns(page) == ["First", "Yes", "Second", "Yes"]
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    running.engine.answer = "Other"
    edited.fill("Firstly")
    edited.press("Enter")
    seen(page, "Other")
    answered(page)
    assert turns(page) == ["Firstly", "Other"]
    assert prompt_of(running) == "<|user|>Firstly</s><|assistant|>"
    page.get_by_role("button", name="Undo").click()
    seen(page, "Second")
    assert turns(page) == ["First", "Yes", "Second", "Yes"]
    assert [each["content"] for each in kept(page)[0]["messages"]] == ["First", "Yes", "Second", "Yes"]
    box(page).press("ArrowUp")
    assert edited.input_value() == "Second"


def test_an_answer_is_regenerated(serve, open_page):
    running = serve(answer="One")
    page = open_page(running)
    say(page, "Hi")
    answered(page)
    running.engine.answer = "Two"
    page.get_by_role("button", name="Regenerate").click()
    seen(page, "Two")
    answered(page)
    assert (turns(page), prompt_of(running)) == (["Hi", "Two"], "<|user|>Hi</s><|assistant|>")
    page.get_by_role("button", name="Undo").click()
    seen(page, "One")
    assert turns(page) == ["Hi", "One"]


def test_an_answer_that_is_undone_while_it_comes_is_not_kept(serve, open_page):
    running = serve(answer="One")
    page = open_page(running)
    say(page, "Hi")
    answered(page)
    running.engine.stuck = True
    page.get_by_role("button", name="Regenerate").dblclick()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Undo").click()
    seen(page, "One")
    running.engine.stuck = False
    say(page, "And?")
    answered(page, 2)
    assert turns(page) == ["Hi", "One", "And?", "One"]
    assert prompt_of(running) == "<|user|>Hi</s><|assistant|>One</s><|user|>And?</s><|assistant|>"
    assert [each["content"] for each in kept(page)[0]["messages"]] == ["Hi", "One", "And?", "One"]


def test_a_refused_message_is_back_in_the_box_with_the_reason(serve, open_page):
    running = serve(refusal=InputError("prompt", got="<b>nonsense</b>"))
    page = open_page(running, expects="400")
    say(page, "Hi")
    page.get_by_role("alert").get_by_text("The server refused it: prompt: got <b>nonsense</b>").wait_for()
    assert (box(page).input_value(), turns(page), kept(page)) == ("Hi", [], [])
    running.engine.refusal = None
    page.get_by_role("button", name="Try again").click()
    answered(page)
    assert turns(page) == ["Hi", "Hello!"] and not page.locator("#notice").is_visible()
    # An edit that is refused is open again, and nothing is lost.
    running.engine.refusal = InputError("prompt", got="nonsense")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Your message, edited").fill("Other")
    page.get_by_label("Your message, edited").press("Enter")
    page.get_by_role("alert").get_by_text("nonsense").wait_for()
    assert page.get_by_label("Your message, edited").input_value() == "Other"
    page.get_by_label("Your message, edited").press("Escape")
    assert turns(page) == ["Hi", "Hello!"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {}}},
            "The server is busy. Try again in 7 s.",
        ),
        ({"status": 503, "json": {"error": {"code": "stopping"}}}, "The server is stopping."),
        ({"status": 502, "body": "<html>"}, "Something is wrong with the server: HTTP 502"),
        (None, "The server cannot be reached."),
    ],
)
def test_a_server_that_cannot_answer_costs_no_message(serve, open_page, how, words):
    page = open_page(serve(), expects="Failed to load resource")
    page.route(CHAT, lambda route: route.fulfill(**how) if how else route.abort())
    say(page, "Hi")
    page.get_by_role("alert").get_by_text(words).wait_for()
    assert box(page).input_value() == "Hi" and turns(page) == []
    page.unroute(CHAT)
    page.get_by_role("button", name="Try again").click()
    answered(page)


@pytest.mark.parametrize("error", ["cut", "event"])
def test_a_stream_that_breaks_off_keeps_what_came_and_goes_on(serve, open_page, error):
    running = serve(answer="Hello there", fails_after=5 if error == "event" else None)
    page = open_page(running)
    if error == "cut":
        replace_answers(page, events({"content": "Hello"}, ends=None, done=False))
    say(page, "Hi")
    words = "The connection broke off." if error == "cut" else "The server broke off: internal error"
    page.locator(".broken").get_by_text(words).wait_for()
    page.reload()
    page.locator(".broken").get_by_text(words).wait_for()
    assert turns(page) == ["Hi", "Hello"]
    running.engine.fails_after, running.engine.answer = None, " again"
    page.unroute(CHAT)
    page.get_by_role("button", name="Continue").click()
    seen(page, "Hello again")
    answered(page)
    assert prompt_of(running) == "<|user|>Hi</s><|assistant|>Hello"
    assert kept(page)[0]["messages"][1]["content"] == "Hello again"
    running.engine.answer = "Hello there"
    page.get_by_role("button", name="Regenerate").click()
    seen(page, "Hello there")


def test_an_answer_that_is_cut_off_can_be_continued_and_a_refusal_leaves_it(serve, open_page):
    page = open_page(serve(), expects="400")
    replace_answers(page, events({"content": "One"}, ends="length"))
    say(page, "Hi")
    page.get_by_text("cut off at its longest").wait_for()
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(status=400, json={"error": {"message": "not so"}}))
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("alert").get_by_text("The server refused it: not so").wait_for()
    assert turns(page) == ["Hi", "One"]
    page.get_by_role("button", name="Continue").wait_for()


def test_a_page_that_is_closed_midway_has_what_came_and_a_way_on(serve, open_page):
    running = serve(answer="word " * 60, seconds=0.03, max_model_len=2048)
    page = open_page(running)
    say(page, "Hi")
    assert eventually(lambda: "was not complete" in str(kept(page)))
    page.reload()
    page.locator(".broken").get_by_text("This answer was not complete when it was last kept.").wait_for()
    assert turns(page)[1].startswith("word")
    assert eventually(lambda: not running.engine.open)
    running.engine.seconds, running.engine.answer = 0, "Done"
    page.get_by_role("button", name="Retry").click()
    seen(page, "Done")


def test_a_message_that_was_never_answered_can_be_asked_again(serve, open_page):
    page = open_page(serve())
    seed(page, [{"role": "user", "content": "Hi"}])
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert turns(page) == ["Hi", "Hello!"]


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_key_is_asked_for_and_the_message_stays(serve, open_page, key):
    page = open_page(serve(), expects="401")
    if key:
        page.evaluate("key => { document.getElementById('key').value = key; }", key)
    refused = {"status": 401, "json": {"error": {"message": "no"}}}
    page.route(CHAT, lambda route: route.fulfill(**refused))
    say(page, "Hi")
    words = "The API key is wrong." if key else "The server asks for an API key."
    page.get_by_role("dialog").get_by_text(words).wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.unroute(CHAT)
    page.get_by_label("API key").fill("open sesame")
    page.get_by_role("button", name="Done").click()
    assert box(page).input_value() == "Hi" and turns(page) == []
    with page.expect_request(CHAT) as asked:
        page.get_by_role("button", name="Send").click()
    assert asked.value.headers["authorization"] == "Bearer open sesame"
    answered(page)


def test_a_server_with_a_key_asks_for_it_at_once(serve, open_page):
    page = open_page(serve({"api_keys": ("open sesame",), "model_names": ("Eightfold",)}), expects="401")
    page.get_by_role("dialog").get_by_text("The server asks for an API key.").wait_for()
    page.get_by_label("API key").fill("open sesame")
    page.keyboard.press("Enter")
    say(page, "Hi")
    answered(page)
    page.reload()
    page.locator("#model").get_by_text("Eightfold").wait_for()


def test_the_context_is_shown_and_the_oldest_turns_are_forgotten(serve, open_page):
    running = serve(answer="y" * 30, max_model_len=256)
    page = open_page(running, expects="400")
    for number in range(4):
        say(page, f"{number}" * 30)
        answered(page, number + 1)
    assert page.get_by_text("The turns above are no longer sent").count() == 1
    assert len(turns(page)) == 8
    prompt = prompt_of(running)
    assert prompt.startswith("<|user|>") and "0" * 30 not in prompt and "3" * 30 in prompt
    used = len(running.engine.last[0]) + 30
    assert page.locator("#used").inner_text() == f"{used} / 256"
    page.reload()
    page.get_by_text("The turns above are no longer sent").wait_for()
    say(page, "z" * 300)
    page.get_by_role("alert").get_by_text("That is too long for this model: 303 tokens").wait_for()
    assert box(page).input_value() == "z" * 300


def test_a_model_without_a_template_says_what_to_do(serve, open_page):
    running = serve()
    running.server.service.template = None
    page = open_page(running)
    page.get_by_role("alert").get_by_text("--chat-template FILE").wait_for()
    assert page.get_by_role("button", name="Send").is_disabled()
    running.server.service.template = running.engine.tokenizer.template_source()
    page.get_by_role("button", name="Look again").click()
    say(page, "Hi")
    answered(page)


def test_an_answer_is_announced_once_and_not_token_by_token(serve, open_page):
    page = open_page(serve(answer="Hello there", seconds=0.02))
    page.evaluate(
        "() => { window.heard = []; const spoken = document.getElementById('spoken');"
        " new MutationObserver(() => heard.push(spoken.textContent)).observe(spoken, {childList: true}); }"
    )
    say(page, "Hi")
    answered(page)
    assert eventually(lambda: len(page.evaluate("heard")) == 2)
    assert page.evaluate("heard") == ["Answering.", "tiny: Hello there"]
    assert page.locator("main [aria-live], main [role=log], main [role=status]").count() == 0


def test_the_place_that_is_read_stays_while_an_answer_grows(serve, open_page):
    running = serve(answer="line\n\n" * 30, seconds=0.01, max_model_len=4096)
    page = open_page(running, viewport={"width": 800, "height": 500})
    seed(page, exchange("Hi", "old\n\n" * 60))
    say(page, "Go on")
    page.locator(".assistant").nth(1).locator(".part").nth(2).wait_for()
    page.evaluate("document.getElementById('main').scrollTop = 100")
    answered(page, 2)
    assert page.evaluate("document.getElementById('main').scrollTop") == 100
    page.get_by_role("button", name="Latest").click()
    assert page.evaluate("main.scrollHeight - main.scrollTop - main.clientHeight") < 60
