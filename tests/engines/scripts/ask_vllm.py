"""Asks a served model through OpenAI's own client, whole and streamed: ask_vllm.py URL PROMPT

Prints {"whole": ..., "streamed": ..., "pieces": ..., "chat": ...}.
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI


def main() -> None:
    url, prompt = sys.argv[1:]
    client = OpenAI(base_url=url, api_key="none")
    (model,) = [each.id for each in client.models.list()]
    asked = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True) if piece.choices]
    messages = [{"role": "user", "content": "Say hello."}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    answer = chat.choices[0].message.content
    print(json.dumps({"whole": whole, "streamed": "".join(pieces), "pieces": len(pieces), "chat": answer}))


if __name__ == "__main__":
    main()
