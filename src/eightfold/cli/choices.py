"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from eightfold.cli import console


class Backend(str, Enum):
    """What computes."""

    auto = "auto"
    native = "native"
    reference = "reference"

    def resolve(self) -> Backend:
        """Return which of the two is meant; that the fast one is not there is said in a note.

        Raises:
            UnsupportedError: native was asked for and was not built.
        """
        from eightfold.model.native import core

        if self is Backend.native:
            core.require()
        if self is Backend.native or (self is Backend.auto and core.is_built()):
            if core.extension.available_isas() == ["scalar"]:
                console.note("this CPU has neither AVX2 nor AVX-512: plain C++ computes, which is slow.")
            return Backend.native
        if self is Backend.reference:
            return self
        console.note(
            "the native backend is not used: it was installed without a C++ compiler. The reference backend is slow."
        )
        return Backend.reference


class AttentionMode(str, Enum):
    """What a prompt's tokens attend over when keys and values are int8."""

    cache = "cache"
    mindie = "mindie"

    @property
    def mode(self) -> Literal["cache", "mindie"]:
        """The same as the reference backend spells it."""
        return self.value


class TokensAs(str, Enum):
    """How the tokens of a text are computed where prompts and answers differ."""

    prompt = "prompt"
    generated = "generated"

    @property
    def origin(self) -> Literal["prompt", "generated"]:
        """The same as the reference backend spells it."""
        return self.value


class Dynamic(str, Enum):
    """How W8A8_DYNAMIC quantizes a token."""

    asymmetric = "asymmetric"
    symmetric = "symmetric"

    @property
    def mode(self) -> Literal["asymmetric", "symmetric"]:
        """The same as the reference backend spells it."""
        return self.value
