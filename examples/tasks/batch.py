"""Answer each line of a file with a model in this process.

python examples/tasks/batch.py MODEL prompts.txt > answers.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eightfold import LLM, SamplingParams


def main(model: str, prompts: str) -> None:
    """Print one JSON object for each prompt, in their order."""
    lines = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    answers = LLM(model).generate(lines, SamplingParams(max_tokens=64))
    for prompt, answer in zip(lines, answers, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer.outputs[0].text}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
