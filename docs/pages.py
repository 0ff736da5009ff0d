"""Pages whose tables a script writes, between `<!-- tables -->` and `<!-- /tables -->`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MARKED = re.compile(r"(<!-- tables -->\n).*?(<!-- /tables -->)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page, and what makes its tables."""

    path: Path
    tables: Callable[[], str]
    words: Mapping[str, str] = field(default_factory=dict)  # headings and whole cells -> what this page says instead

    def fill(self, text: str) -> str:
        """Return the page's text with its tables made anew.

        Raises:
            ValueError: the text has not exactly one marked place.
        """
        made = "\n".join(map(self._said, self.tables().split("\n")))
        filled, places = _MARKED.subn(lambda match: f"{match[1]}\n{made}\n{match[2]}", text)
        if places != 1:
            raise ValueError(f"marked places in {self.path.name}: got {places}, expected 1")
        return filled

    def _said(self, line: str) -> str:
        """Return a line of the tables in the page's words."""
        parts = re.split(r"(^#+ |^\| | \| | \|$)", line)
        return "".join(self.words.get(part, part) for part in parts)

    def is_up_to_date(self) -> bool:
        """Whether filling the page would change nothing."""
        text = self.path.read_text(encoding="utf-8")
        return self.fill(text) == text

    def main(self, description: str) -> int:
        """Write the page, or with --check tell whether it is up to date."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
        if not parser.parse_args().check:
            self.path.write_text(self.fill(self.path.read_text(encoding="utf-8")), encoding="utf-8")
        elif not self.is_up_to_date():
            print(f"{self.path} is not up to date; run: python {sys.argv[0]}", file=sys.stderr)
            return 1
        return 0


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table and an empty one."""
    cells = list(head)
    yield f"| {' | '.join(cells)} |"
    yield "|" + "---|" * len(cells)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
