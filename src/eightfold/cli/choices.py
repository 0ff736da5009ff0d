"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from eightfold.cli import console
from eightfold.errors import UnsupportedError


class Backend(str, Enum):
    """What computes."""

    auto = "auto"
    native = "native"
    reference = "reference"

    def resolve(self, needs_reference: str = "") -> Backend:
        """Return which of the two is meant; what was not asked for by name is said in a note.

        Args:
            needs_reference: what the native backend cannot do of what was asked; empty if it can do all.

        Raises:
            UnsupportedError: native was asked for and cannot be had.
        """
        if self is Backend.reference:
            return self
        from eightfold.native import core

        if self is Backend.native:
            core.extension()
            if needs_reference:
                raise UnsupportedError(
                    "--backend native",
                    got=needs_reference,
                    expected="something else",
                    action="Use --backend reference.",
                )
            return self
        reason = needs_reference or ("" if core.is_built() else "it was installed without a C++ compiler")
        if reason:
            console.note(f"the native backend is not used: {reason}. The reference backend is slow.")
        return Backend.reference if reason else Backend.native


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
