"""A text of which there may be more to come, and steps over it that wait for what they need.

A step is a generator: it yields when what it needs is not there yet. What it returns depends on the text alone, and not
on the pieces in which that came.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

MAX_DEPTH = 64  # of brackets in a call, as in a request

T = TypeVar("T")
Reading = Generator[None, None, T]

_SPACE = re.compile(r"\s*")


class Source:
    """A text that grows.

    Attributes:
        text: what has come and is not used up.
        at: where the reader is.
        has_ended: whether there will be no more.
    """

    def __init__(self) -> None:
        self.text, self.at, self.has_ended = "", 0, False

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Go past what a pattern of single characters matches; return it."""
        begin = self.at
        while True:
            self.at = match.end() if (match := pattern.match(self.text, self.at)) else self.at
            if self.at < len(self.text) or self.has_ended:
                return self.text[begin : self.at]
            yield

    def peek(self) -> Reading[str]:
        """Go past white space; return the character behind it, or nothing at the end."""
        yield from self.run(_SPACE)
        return self.text[self.at : self.at + 1]

    def take(self, *markers: str) -> Reading[str]:
        """Go past one of several markers, if one stands here; return it, or nothing."""
        while True:
            here = self.text[self.at : self.at + max(map(len, markers))]
            if not self.has_ended and any(len(here) < len(each) and each.startswith(here) for each in markers):
                yield
                continue
            found = max((each for each in markers if here.startswith(each)), key=len, default="")
            self.at += len(found)
            return found

    def ends(self, marker: str) -> Reading[bool]:
        """Go past a marker behind white space; return whether it stands here, or no more of the text than begins it."""
        if not (yield from self.peek()) or (yield from self.take(marker)):
            return True
        is_cut = self.has_ended and marker.startswith(self.text[self.at :])
        self.at = len(self.text) if is_cut else self.at
        return is_cut

    def until(self, marker: str) -> Reading[str | None]:
        """Go past the next marker; return what stands before it, or None where there is none."""
        begin = look = self.at
        while (end := self.text.find(marker, look)) < 0:
            if self.has_ended:
                return None
            look = max(len(self.text) - len(marker) + 1, begin)
            yield
        self.at = end + len(marker)
        return self.text[begin:end]

    def bracketed(self, quotes: str) -> Reading[str | None]:
        """Go past a value in brackets, of which those in quotes do not count; None where it has no end, or is too deep.

        A value that is no JSON or Python is found too, as long as its brackets are balanced.
        """
        begin, depth, quote = self.at, 0, ""
        outside = re.compile(rf"[\[\](){{}}{quotes}]")
        while True:
            pattern = _within(quote) if quote else outside
            match = pattern.search(self.text, self.at)
            if match is None or (match[0] == "\\" and match.end() == len(self.text)):
                if self.has_ended:
                    return None
                self.at = len(self.text) if match is None else match.start()
                yield
                continue
            self.at, symbol = match.end(), match[0]
            if symbol == "\\":
                self.at += 1
            elif symbol in quotes:
                quote = "" if quote else symbol
            else:
                depth += 1 if symbol in "[({" else -1
                if depth > MAX_DEPTH:
                    return None
                if depth <= 0:
                    return self.text[begin : self.at]


def _within(quote: str) -> re.Pattern[str]:
    return re.compile(rf"[\\{quote}]")
