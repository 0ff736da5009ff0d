"""Models that hold models, which pydantic writes with $defs and $ref."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, Field


class City(str, Enum):
    """An enumeration, which is a definition of its own."""

    LONDON = "London"
    PARIS = "Paris"


class Address(BaseModel):
    """Where somebody lives."""

    city: City
    postcode: str = Field(max_length=10)


class Child(BaseModel):
    """Somebody's child."""

    name: str = Field(max_length=20)
    age: int
    address: Address


class Parent(BaseModel):
    """A person with children."""

    name: str = Field(max_length=20)
    age: int
    address: Address
    children: list[Child] = Field(max_length=2)


class Answer(BaseModel):
    """An answer to a question."""

    answer: str = Field(max_length=60)


def is_ada(parent: Parent) -> str:
    """Require what the text says of Ada and return it."""
    assert isinstance(parent, Parent), parent
    assert (parent.name, parent.address.city) == ("Ada", City.LONDON), parent
    return parent.model_dump_json()
