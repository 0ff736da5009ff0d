"""Answer a question from the files of a folder, and name the files (retrieval-augmented generation).

The server has no embeddings, and needs none: BM25 ranks the passages by their words, in milliseconds and without a
second model.

    pip install bm25s
    eightfold serve MODEL
    python examples/tasks/ask_folder.py http://127.0.0.1:8000/v1 docs "Which schemes need calibration texts?"
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import bm25s
from openai import OpenAI

SUFFIXES = {".md", ".rst", ".txt"}
PASSAGE = 1200  # characters
PASSAGES = 4
# Words, and each Chinese character for itself, as nothing divides those into words.
TOKEN = r"[^\W\u4e00-\u9fff]+|[\u4e00-\u9fff]"
INSTRUCTION = (
    "Answer the question from these passages only, in one or two sentences. Name the passage that you use by its "
    "number, such as [1]. If they do not say it, say so."
)


@dataclass(frozen=True)
class Passage:
    """Some paragraphs of a file, and the line that they begin in."""

    file: Path
    line: int
    text: str


def passages_of(file: Path) -> list[Passage]:
    """Return a file's paragraphs, joined as long as they are short together."""
    found: list[Passage] = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for match in re.finditer(r"(?:.*\S.*\n?)+", text):
        line = text.count("\n", 0, match.start()) + 1
        if found and len(found[-1].text) + len(match[0]) < PASSAGE:
            found[-1] = Passage(file, found[-1].line, f"{found[-1].text}\n{match[0]}")
        else:
            pieces = range(0, len(match[0]), PASSAGE)
            found += [Passage(file, line, match[0][start : start + PASSAGE]) for start in pieces]
    return found


def best(passages: list[Passage], question: str) -> list[Passage]:
    """Return the passages that share the most telling words with a question, the best first."""
    ranking = bm25s.BM25()
    words = [
        bm25s.tokenize(text, token_pattern=TOKEN, show_progress=False)
        for text in ([p.text for p in passages], question)
    ]
    ranking.index(words[0], show_progress=False)
    order, scores = ranking.retrieve(words[1], k=min(PASSAGES, len(passages)), show_progress=False)
    return [passages[place] for place, score in zip(order[0], scores[0], strict=True) if score > 0]


def main(url: str, folder: str, question: str) -> None:
    """Print the answer and where it comes from."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in SUFFIXES and file.is_file())
    chosen = best([passage for file in files for passage in passages_of(file)], question)
    if not chosen:
        sys.exit(f"nothing in {folder} has a word of the question")
    client = OpenAI(base_url=url, api_key=os.environ.get("EIGHTFOLD_API_KEY", "none"))
    numbered = "\n\n".join(
        f"[{number}] {passage.file.name}\n{passage.text}" for number, passage in enumerate(chosen, 1)
    )
    answer = (
        client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": f"{numbered}\n\nQuestion: {question}"},
            ],
            temperature=0,
            max_tokens=200,
        )
        .choices[0]
        .message.content
        or ""
    )
    print(answer.strip(), end="\n\n")
    for number, passage in enumerate(chosen, 1):
        print(f"{'*' if f'[{number}]' in answer else ' '} [{number}] {passage.file}:{passage.line}")


if __name__ == "__main__":
    main(*sys.argv[1:])
