"""Hooks of mkdocs for the site: texts that lie outside docs/ as pages, and links that leave docs/."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Files of the repository -> the pages that hold them, by a line that is nothing but a link to the file.
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "index.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
_HELD = re.compile(r"^\[[^\]]*\]\(\.\./([\w.]+\.md)\)$", re.MULTILINE)
# Definitions of links to the repository's own pages of releases, which the site does not have.
_ELSEWHERE = re.compile(r"^\[[^\]]+\]: \.\./\.\./.*\n?", re.MULTILINE)
# Pictures that the README makes smaller; the site has room for the whole.
_IMAGE = re.compile(r'^<img [^>]*src="([^"]+)" alt="([^"]+)">$', re.MULTILINE)
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def led(text: str, folder: str) -> str:
    """Lead the links of a text in a folder of the repository to the site's pages; of others only the words stay.

    The plugin for languages wants names without the language's ending, and finds the page of the language at hand.
    """

    def link(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        place = os.path.normpath(f"{folder}/{path}" if folder else path)
        if place in PAGES:
            return f"[{words}]({PAGES[place]}{mark}{anchor})"
        if not place.startswith("docs/") or place == "docs/log.md" or place.endswith(".py"):
            return words
        return f"{image}[{words}]({place.removeprefix('docs/').replace('.zh.md', '.md')}{mark}{anchor})"

    parts = _CODE.split(_IMAGE.sub(r"![\2](\1)", _ELSEWHERE.sub("", text)))
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the files that a page holds, and lead the links."""
    parts = _HELD.split(markdown)
    for i, part in enumerate(parts):
        parts[i] = led((ROOT / part).read_text(encoding="utf-8"), "") if i % 2 else led(part, "docs")
    held = "".join(parts)
    # The site has a switch of languages of its own.
    return re.sub(r"^\[(?:English|简体中文)\]\(index\.md\)\n+", "", held, flags=re.MULTILINE)
