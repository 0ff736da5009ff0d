"""What the tests of the chat page do in a browser."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CHAT = "**/v1/chat/completions"


def box(page: Any) -> Any:
    """Return the box in which a message is written."""
    return page.get_by_label("Message", exact=True)


def say(page: Any, text: str) -> None:
    box(page).fill(text)
    page.get_by_role("button", name="Send").click()


def answered(page: Any, number: int = 1) -> None:
    """Wait until so many answers are complete, and rendered."""
    page.locator(".assistant:not(.coming) .facts").nth(number - 1).get_by_text("first after").wait_for()


def seen(page: Any, text: str) -> None:
    """Wait until the conversation has a text."""
    page.locator("main").get_by_text(text, exact=True).wait_for()


def turns(page: Any) -> list[str]:
    """Return the texts of all turns."""
    return page.locator(".user > .text, .markdown").all_inner_texts()


def prompt_of(running: Any) -> str:
    """Return what the engine was asked last."""
    return running.engine.tokenizer.decode(running.engine.last[0], keep_special=True)


def kept(page: Any) -> list[dict[str, Any]]:
    """Return the chats that the browser keeps, the oldest first."""
    found = page.evaluate(
        "Object.entries(localStorage).filter(([k]) => k.startsWith('eightfold.chat.')).map(([, v]) => v)"
    )
    return sorted(map(json.loads, found), key=lambda chat: chat["updated"])


def seed(page: Any, messages: list[dict[str, Any]], **fields: Any) -> None:
    """Have a page open a chat that is kept."""
    chat = {"id": "seed", "title": "A chat", "revision": "1", "updated": 1, "messages": messages, **fields}
    page.evaluate("chat => localStorage.setItem('eightfold.chat.seed', chat)", json.dumps(chat))
    page.evaluate("sessionStorage.setItem('eightfold.open', 'seed')")
    page.reload()
    page.locator(".turn").nth(len(messages) - 1).wait_for()


def exchange(question: str, answer: str, **fields: Any) -> list[dict[str, Any]]:
    """Return a message and the answer to it."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


def events(*deltas: dict[str, Any] | None, ends: str | None = "stop", done: bool = True) -> str:
    """Return the body of a stream."""
    found = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if ends:
        found.append({"choices": [{"index": 0, "delta": {}, "finish_reason": ends}]})
    lines = [f"data: {json.dumps(each)}\n\n" for each in found]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""])


def replace_answers(page: Any, *bodies: str) -> None:
    """Have the next requests for answers be answered with these streams, and later ones by the server."""
    left = list(bodies)

    def handle(route: Any) -> None:
        if left:
            route.fulfill(body=left.pop(0), content_type="text/event-stream")
        else:
            route.continue_()

    page.route(CHAT, handle)


def picture(page: Any, name: str) -> None:
    """Write a picture into the folder that EIGHTFOLD_PICTURES names, if it names one."""
    folder = os.environ.get("EIGHTFOLD_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
