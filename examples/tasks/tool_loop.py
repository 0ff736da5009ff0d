"""Let a model call Python functions until it can answer.

A tool is a class: its docstring and fields are what the model is told, and `run` is what happens. What goes wrong in a
tool is told to the model, which may try again. The last round offers no tools, so that there is an answer.

    eightfold serve MODEL            # one that knows tools, such as Qwen2.5-1.5B-Instruct
    python examples/tasks/tool_loop.py http://127.0.0.1:8000/v1 "What do 3 lamps cost?"
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

SYSTEM = (
    "You answer for a shop. Look things up with the tools, do not guess. "
    "Once you have a result, answer in a plain sentence."
)
ROUNDS = 5
MAX_TOKENS = 256  # of each round
SHOP = {"lamp": (12, 19.5), "chair": (4, 49.0), "table": (0, 120.0)}  # product -> pieces, price


class Stock(BaseModel):
    """How many pieces of a product are in stock."""

    product: str = Field(description="one word in the singular, such as chair")

    def run(self) -> dict[str, Any]:
        """Look the product up."""
        return {"pieces": entry(self.product)[0]}


class Cost(BaseModel):
    """What some pieces of a product cost together."""

    product: str = Field(description="one word in the singular, such as chair")
    pieces: int = Field(ge=1, le=1000)

    def run(self) -> dict[str, Any]:
        """Multiply."""
        return {"cost": f"{entry(self.product)[1] * self.pieces:.2f} EUR"}


TOOLS = {tool.__name__: tool for tool in (Stock, Cost)}


def entry(product: str) -> tuple[int, float]:
    """Return pieces and price of a product."""
    if product not in SHOP:
        raise ValueError(f"no product {product!r}; there are {', '.join(SHOP)}")
    return SHOP[product]


def result_of(name: str, arguments: str) -> str:
    """Run a tool; return its result, or what went wrong, as JSON."""
    try:
        return json.dumps(TOOLS[name].model_validate_json(arguments).run())
    except Exception as error:
        return json.dumps({"error": str(error)})


def answer(client: OpenAI, model: str, question: str) -> str:
    """Ask, run what the model calls and send the results back, until it answers or the rounds are used up."""
    offered = [pydantic_function_tool(tool) for tool in TOOLS.values()]
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    for _ in range(ROUNDS):
        said = client.chat.completions.create(
            model=model, messages=messages, tools=offered, temperature=0, max_tokens=MAX_TOKENS
        )
        message: Any = said.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for call in message.tool_calls:
            result = result_of(call.function.name, call.function.arguments)
            print(f"  {call.function.name}({call.function.arguments}) -> {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    said = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS)
    return said.choices[0].message.content or ""


def main(url: str, question: str) -> None:
    """Print the answer, and the calls on stderr."""
    client = OpenAI(base_url=url, api_key=os.environ.get("EIGHTFOLD_API_KEY", "none"))
    print(answer(client, client.models.list().data[0].id, question))


if __name__ == "__main__":
    main(*sys.argv[1:])
