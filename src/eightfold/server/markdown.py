"""Markdown as HTML, a block at a time, for the chat page.

markdown-it-py renders CommonMark with tables and struck-out text. HTML in a text stays text, and so do formulas. The
page takes what comes from here for a stranger's all the same, and copies only elements that it knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

_SCHEMES = ("http:", "https:", "mailto:")
_CLOSINGS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_ENDS = {"\\[": re.compile(r"\\\][ \t]*$", re.M), "$$": re.compile(r"\$\$[ \t]*$", re.M)}
_LONGEST_FORMULA = 2000
_DOLLARS = re.compile(r"\$(?![\s$])[^$`\n]{0,200}?(?<![\s\\])\$(?!\d)")  # between two that do not look like prices
_DEPTH = "links"  # in the environment of a rendering: how many links are open


def blocks_of(text: str) -> list[dict[str, Any]]:
    """Return the blocks of a Markdown text: paragraphs, lists, tables and so on.

    A text that grows changes its last two blocks only ("2" below a list may become its item "2."), so that whoever
    shows it can send the text from there on. References to links that are defined further down are the exception.

    Returns:
        The blocks in order, as {"line": where the block begins, from 0, "html": ...}.
    """
    markdown, env = _markdown(), dict[str, Any]()
    tokens, found, begin = markdown.parse(text, env), list[dict[str, Any]](), 0
    for at, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:
            html = markdown.renderer.render(tokens[begin : at + 1], markdown.options, env)
            found.append({"line": (tokens[begin].map or [0])[0], "html": html})
            begin = at + 1
    return found


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: url.strip().lower().startswith(_SCHEMES)  # type: ignore[method-assign]
    markdown.inline.ruler.before("escape", "formula", _formula)
    interrupted = ["paragraph", "reference", "blockquote", "list"]
    markdown.block.ruler.before("fence", "formulas", _formulas, {"alt": interrupted})
    rules = {
        "formulas": _formulas_html,
        "formula": _formula_html,
        "image": _image_html,
        "link_open": _link_html,
        "link_close": _link_html,
    }
    for name, rule in (rules | {"th_open": _cell_html, "td_open": _cell_html}).items():
        markdown.add_render_rule(name, rule)
    return markdown


def _formulas(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    """Leave lines from \\[ or $$ on as they are: one of them may look like a list or the line under a heading."""
    begin, last = state.bMarks[line] + state.tShift[line], line
    ends = _ENDS.get(state.src[begin : begin + 2])
    match = ends.search(state.src, begin + 3, begin + _LONGEST_FORMULA) if ends else None
    if match is None or state.is_code_block(line):
        return False
    while state.eMarks[last] < match.start():
        last += 1
        if last >= end or state.isEmpty(last) or state.sCount[last] < state.blkIndent:
            return False
    if not silent:
        token = state.push("formulas", "", 0)
        token.content, token.map = state.getLines(line, last + 1, state.blkIndent, False), [line, last + 1]
        state.line = last + 1
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    """Leave LaTeX as it is written: Markdown would take its underscores and backslashes for its own."""
    begin = state.pos
    closing = _CLOSINGS.get(state.src[begin : begin + 2])
    if closing is not None:
        last = state.src.find(closing, begin + 2, min(begin + _LONGEST_FORMULA, state.posMax))
        end = last + 2 if last > begin + 2 else -1
    else:
        match = _DOLLARS.match(state.src, begin, state.posMax)
        end = match.end() if match else -1
    if end < 0:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.src[begin:end]
    state.pos = end
    return True


def _formula_html(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    return f'<span class="formula">{escapeHtml(tokens[at].content)}</span>'


def _formulas_html(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    return f"<p>{_formula_html(self, tokens, at, options, env)}</p>\n"


def _link_html(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    env[_DEPTH] = env.get(_DEPTH, 0) + tokens[at].nesting
    return self.renderToken(tokens, at, options, env)


def _image_html(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    """Show a link to an image: the page loads nothing from elsewhere."""
    token = tokens[at]
    name = escapeHtml(self.renderInlineAsText(token.children or [], options, env) or "image")
    return name if env.get(_DEPTH) else f'<a href="{escapeHtml(str(token.attrs["src"]))}">{name}</a>'


def _cell_html(self: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
    """Say how a cell is aligned by its class: a style would be against the page's policy."""
    side = str(tokens[at].attrs.get("style", "")).rpartition(":")[2]
    return f'<{tokens[at].tag} class="{side}">' if side else f"<{tokens[at].tag}>"
