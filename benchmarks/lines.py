"""How large is the source? Lines, modules and functions of src/, or of other folders.

    python benchmarks/lines.py [FOLDER ...] [--rooms]

A line counts as code if it holds a token that is neither comment nor docstring: blank lines, comments and docstrings
do not. A function is as long as its lines from `def` to the last one, all of them.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent

_SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


@dataclass
class Size:
    """The size of some modules; `functions` holds the length of each function."""

    modules: int = 0
    lines: int = 0
    code: int = 0
    functions: list[int] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one more module."""
        tree = ast.parse(text)
        self.modules += 1
        self.lines += len(text.splitlines())
        self.code += len(code_lines(text, tree))
        self.functions += function_lengths(tree)

    def __str__(self) -> str:
        median, long = quantile(self.functions, 0.5), quantile(self.functions, 0.9)
        return (
            f"{self.lines:6} lines, {self.code:6} of code, {self.modules:3} modules; {len(self.functions):4} functions "
            f"with a median of {median}, 90 % up to {long}, longest {max(self.functions, default=0)} lines"
        )


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that are neither blank nor comment nor docstring."""
    found = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            docstring = node.body[0]
            found.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return found


def function_lengths(tree: ast.Module) -> Iterator[int]:
    """Yield the length of every function and method in lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def quantile(values: Sequence[int], share: float) -> int:
    """Return the least value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * share) - 1, 0)] if ordered else 0


def main() -> None:
    """Print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "src"])
    parser.add_argument("--rooms", action="store_true", help="also the size of each folder with modules")
    args = parser.parse_args()
    total, rooms = Size(), dict[str, Size]()
    for folder in args.folders:
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            total.add(text)
            parent = path.relative_to(folder).parent
            rooms.setdefault(str(parent), Size()).add(text)
    if args.rooms:
        for name, size in rooms.items():
            print(f"{name:30} {size}")
    print(f"{'total':30} {total}" if args.rooms else total)


if __name__ == "__main__":
    main()
