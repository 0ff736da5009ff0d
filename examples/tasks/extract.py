"""Turn free texts into objects of one schema: each line of a file becomes a validated line of JSON.

The server holds every answer to the schema, so there is nothing to repair; pydantic then checks what it returns. Change
`Order` into what you look for: names and descriptions of its fields are all that the model is told.

    eightfold serve MODEL
    python examples/tasks/extract.py http://127.0.0.1:8000/v1 mails.txt > orders.jsonl
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field

MAX_TOKENS = 1024
INSTRUCTION = "Extract the order from the text. Use only what the text says."


class Item(BaseModel):
    """A product of an order. Limits of length keep a small model from writing for ever."""

    product: str = Field(max_length=40)
    quantity: int = Field(ge=1, le=10000)


class Order(BaseModel):
    """What a text says of an order."""

    customer: str = Field(max_length=40, description="who orders")
    city: str | None = Field(max_length=40, description="where to deliver to, if the text says so")
    items: list[Item] = Field(min_length=1, max_length=8)
    urgency: Literal["normal", "urgent"]


def extract(client: OpenAI, model: str, text: str) -> Order:
    """Return the order of a text.

    Raises:
        LengthFinishReasonError: the answer was cut off, so it is no whole object.
    """
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}],
        response_format=Order,
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    order = answer.choices[0].message.parsed
    assert order is not None  # without tools and refusals there is always one
    return order


def main(url: str, file: str) -> None:
    """Print the order of each line, in their order; a line without one is told on stderr."""
    client = OpenAI(base_url=url, api_key=os.environ.get("EIGHTFOLD_API_KEY", "none"))
    model = client.models.list().data[0].id
    for number, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            print(extract(client, model, text).model_dump_json(), flush=True)
        except LengthFinishReasonError:
            print(f"line {number}: the answer is longer than max_tokens", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
