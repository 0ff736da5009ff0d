"""LangChain's ChatOpenAI on `eightfold serve`: a chain, a stream, and an object of a schema.

pip install langchain-openai     # tried with 1.7.4
eightfold serve MODEL
python examples/tasks/with_langchain.py http://127.0.0.1:8000/v1 "Paris"
"""

from __future__ import annotations

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field


class Place(BaseModel):
    """Facts of a place."""

    name: str = Field(max_length=40)
    country: str = Field(max_length=40)
    sights: list[str] = Field(min_length=1, max_length=3)


def main(url: str, place: str) -> None:
    """Print a sentence, a stream and facts of a place."""
    key = os.environ.get("EIGHTFOLD_API_KEY", "none")
    name = OpenAI(base_url=url, api_key=key).models.list().data[0].id
    model = ChatOpenAI(base_url=url, api_key=key, model=name, temperature=0, max_tokens=200)

    chain = ChatPromptTemplate.from_template("Say in one sentence what {place} is.") | model | StrOutputParser()
    print("invoke:", chain.invoke({"place": place}))

    print("stream:", end=" ", flush=True)
    for piece in model.stream(f"Name three things to see in {place}, in one line."):
        print(piece.content, end="", flush=True)
    print()

    facts = model.with_structured_output(Place).invoke(f"What are the sights of {place}?")
    print("structured:", facts.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
