"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum
from typing import Literal


class Backend(str, Enum):
    """What computes."""

    reference = "reference"


class Dynamic(str, Enum):
    """How W8A8_DYNAMIC quantizes a token."""

    asymmetric = "asymmetric"
    symmetric = "symmetric"

    @property
    def mode(self) -> Literal["asymmetric", "symmetric"]:
        """The same as the reference backend spells it."""
        return self.value
