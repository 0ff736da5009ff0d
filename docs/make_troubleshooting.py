"""Write the tables of docs/troubleshooting.md and troubleshooting.zh.md: the errors that the code can raise, by topic.

    python docs/make_troubleshooting.py

They go between `<!-- errors: TOPIC -->` and `<!-- /errors -->`. The script walks the places in src/eightfold where an
error of errors.py is made. What is put into a message when it is raised stands in capitals. next_steps.zh.json has the
next steps in Chinese. `--check` writes nothing and fails when a page is not up to date with the code.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pages import table

from eightfold import errors

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "eightfold"
KINDS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.EightfoldError)
}
MARKED = re.compile(r"(<!-- errors: (\w+) -->\n).*?(<!-- /errors -->)", re.DOTALL)
PAGES = {DOCS / "troubleshooting.md": "en", DOCS / "troubleshooting.zh.md": "zh"}
PARTS = ("what", "where", "got", "expected", "action")


# Topic -> modules and folders whose errors belong to it; the first topic that has a module takes it.
TOPICS: dict[str, tuple[str, ...]] = {
    "tokenizers": ("tokenizer", "vocabulary", "template", "messages", "dialects", "contents"),
    "config": (
        "config",
        "rope",
        "experts",
        "architectures",
        "layouts",
        "families",
        "text_part",
        "linear",
        "scheme",
        "model/layers",
        "model/reference",
    ),
    "output": (
        "format/output",
        "format/target",
        "format/journal",
        "exporters/one_file",
        "quant/run",
        "quant/identity",
        "quant/pipeline",
        "contents",
    ),
    "calibration": (
        "quant/dataset",
        "quant/recipe",
        "quant/recipe_file",
        "quant/choice",
        "quant/within",
        "quant/budget",
        "cli/quantizing",
        "cli/calibrating",
        "cli/outcomes",
        "msmodelslim",
        "quant/ask",
        "quant/asked",
        "quant/wishes",
    ),
    "weights": ("quant",),
    "formats": (
        "exporters",
        "importers",
        "check",
        "format/compressed",
        "format/engines",
        "format/gguf_layout",
        "cli/exporting",
    ),
    "directory": ("format", "files", "values", "report", "evaluate", "cli/measuring"),
    "hubs": ("hub", "cli/pushing"),
    "processes": ("parallel", "engine/distributed"),
    "requests": (
        "engine",
        "server",
        "lm_eval",
        "cli/batch",
        "cli/batch_input",
        "cli/batch_output",
        "cli/chatting",
        "cli/running",
    ),
    "other": ("",),
}
WORDS = {
    "en": ("message", "expected", "next step", "see above"),
    "zh": ("报错", "期望（expected）", "下一步", "见上文"),
}
CHINESE: dict[str, str] = json.loads((DOCS / "next_steps.zh.json").read_text(encoding="utf-8"))
KNOWN_LATER = re.compile(r"[A-Z_]+\.?|\.\.\.")  # a next step of which only a run knows a word


def constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Return the module's names that stand for a text."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def spelt(node: ast.expr, known: dict[str, ast.expr]) -> str:
    """Return an expression as a message shows it: texts as they are, everything else as a word in capitals."""
    if isinstance(node, ast.Constant):
        return "" if node.value is None else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(spelt(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return spelt(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spelt(node.left, known) + spelt(node.right, known)
    if isinstance(node, ast.IfExp):
        choices = [text for text in (spelt(node.body, known), spelt(node.orelse, known)) if text]
        return " | ".join(dict.fromkeys(choices))
    if isinstance(node, ast.Name) and node.id in known:
        return spelt(known[node.id], {})
    return word(node)


def word(node: ast.expr) -> str:
    """Return a word in capitals for what only a run knows."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").upper()
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").upper()
    if isinstance(node, ast.Subscript):
        return word(node.value)
    if isinstance(node, ast.Call):
        inner = [arg for arg in node.args if not isinstance(arg, ast.Constant)]
        return word(inner[0]) if inner else word(node.func)
    return "..."


def errors_of(path: Path) -> Iterator[dict[str, str]]:
    """Yield the parts of each error that a module makes, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = constants(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in sorted(calls, key=lambda node: node.lineno):
        if call.func.id in KINDS and call.args and not isinstance(call.args[0], ast.Starred):  # type: ignore[attr-defined]
            given = {"what": call.args[0], **{one.arg: one.value for one in call.keywords if one.arg in PARTS}}
            yield {name: " ".join(spelt(node, known).split()) for name, node in given.items()}


def topic_of(module: str) -> str:
    """Return the first topic that names a module or a folder it lies in; the last one has the rest."""
    return next(
        topic
        for topic, places in TOPICS.items()
        if any(place in ("", module) or module.startswith(f"{place}/") for place in places)
    )


def code(text: str) -> str:
    """Return a text as code in a table's cell."""
    return f"`` {text} ``".replace("|", r"\|") if "`" in text else f"`{text}`".replace("|", r"\|")


@functools.cache
def errors_by_topic() -> dict[str, list[tuple[str, str, str]]]:
    """Return for each topic the messages, what they expect and what they advise, each once and sorted."""
    found: dict[str, set[tuple[str, str, str]]] = {topic: set() for topic in TOPICS}
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).with_suffix("").as_posix()
        for parts in errors_of(path) if module != "errors" else ():
            message = parts["what"] + (f" in {parts['where']}" if parts.get("where") else "")
            message += f": got {parts['got']}" if parts.get("got") else ""
            if re.search(r"[a-z]", message):
                found[topic_of(module)].add((message, parts.get("expected", ""), parts.get("action", "")))
    return {topic: sorted(rows) for topic, rows in found.items()}


def said(action: str, language: str) -> str:
    """Return a next step in a page's language, as a table's cell; in English where it has no translation yet."""
    if language == "zh" and KNOWN_LATER.fullmatch(action):
        return "见报错末尾"
    return (CHINESE.get(action, action) if language == "zh" else action).replace("|", r"\|")


def fill(text: str, language: str) -> str:
    """Return a page with the table of each topic made anew.

    Raises:
        ValueError: the page has not each topic once.
    """
    *head, above = WORDS[language]

    def made(match: re.Match[str]) -> str:
        rows = errors_by_topic()[match[2]]
        cells = (
            (code(what), code(expected) if expected else "", said(action, language) or above)
            for what, expected, action in rows
        )
        return f"{match[1]}\n" + "\n".join(table(head, cells)) + f"\n{match[3]}"

    topics = [match[2] for match in MARKED.finditer(text)]
    if topics != list(TOPICS):
        raise ValueError(f"topics of the page: got {topics}, expected {list(TOPICS)}")
    return MARKED.sub(made, text)


def stale() -> list[Path]:
    """Return the pages that filling would change."""
    return [
        page for page, language in PAGES.items() if fill(page.read_text("utf-8"), language) != page.read_text("utf-8")
    ]


def main() -> int:
    """Write both pages, or with --check tell whether they are up to date."""
    is_check = "--check" in sys.argv[1:]
    for page in stale():
        if is_check:
            print(f"{page} is not up to date; run: python {sys.argv[0]}", file=sys.stderr)
        else:
            page.write_text(fill(page.read_text("utf-8"), PAGES[page]), encoding="utf-8")
    return int(is_check and bool(stale()))


if __name__ == "__main__":
    sys.exit(main())
