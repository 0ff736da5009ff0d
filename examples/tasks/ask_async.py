"""Ask `eightfold serve` several questions at once, with openai's client; answers are printed as they end.

python examples/tasks/ask_async.py http://127.0.0.1:8000/v1 "What is rain?" "What is snow?"
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import AsyncOpenAI


async def main(url: str, *questions: str) -> None:
    """Print each question with its answer."""
    client = AsyncOpenAI(base_url=url, api_key=os.environ.get("EIGHTFOLD_API_KEY", "none"))
    model = (await client.models.list()).data[0].id

    async def answered(question: str) -> str:
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=64
        )
        return f"{question}\n  {answer.choices[0].message.content}"

    for answer in asyncio.as_completed([answered(question) for question in questions]):
        print(await answer)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
