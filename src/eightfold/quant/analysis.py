"""What an analysis has found: the loss of each group of linears with each type, their inputs, and what was chosen.

Plain values, without torch, so that a page or a table can be made of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightfold.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class GroupLoss:
    """Linears that share an input, and so a type.

    Attributes:
        layer: index.
        group: title of the group inside its layer, as families.InputGroup has it, such as qkv or down.
        linears: full names of the modules.
        bytes: stored bytes that a token reads, by type (a value of QuantType).
        loss: KL divergence at the model's end in nats when this group alone has the type: estimated; FLOAT is 0.
    """

    layer: int
    group: str
    linears: tuple[str, ...]
    bytes: Mapping[str, int]
    loss: Mapping[str, float]


@dataclass(frozen=True)
class InputRange:
    """The input of a group of linears in the float model.

    Attributes:
        layer: index.
        group: title of the group.
        lo: smallest value of all tokens.
        hi: largest value.
        ordinary: largest magnitude of all tokens but the loudest ones.
        channels: those with the largest inputs, largest first: (channel, largest |x|).
        tokens: those with the largest inputs, largest first: (sample, position, text, largest |x|).
    """

    layer: int
    group: str
    lo: float
    hi: float
    ordinary: float
    channels: tuple[tuple[int, float], ...] = ()
    tokens: tuple[tuple[int, int, str, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """The type (a value of QuantType) that a linear got, and why."""

    linear: str
    type: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """All that was found about a model.

    Attributes:
        model: name of its directory.
        scheme: value of the QuantType that was asked for.
        target: reader whose types were considered; None for all static.
        samples: how many calibration samples there were.
        tokens: and how many tokens they have.
        float_bytes: tensors of the float model.
        out_bytes: tensors of the quantized one; None where nothing was chosen.
        groups: losses, by layer.
        ranges: inputs, by layer.
        choices: of every linear, where something was chosen.
        kl: mean KL divergence on held-out text, in nats; None where it was not measured.
        top1: share of positions with the same likeliest token, measured beside `kl`.
        held_out_tokens: predictions on which both were measured.
    """

    model: str
    scheme: str
    target: str | None
    samples: int
    tokens: int
    float_bytes: int
    out_bytes: int | None = None
    groups: tuple[GroupLoss, ...] = ()
    ranges: tuple[InputRange, ...] = ()
    choices: tuple[Choice, ...] = ()
    kl: float | None = None
    top1: float | None = None
    held_out_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what from_json() reads; it can be written as JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Analysis:
        """Return the analysis that to_json() gave, perhaps after a way through a file.

        Raises:
            CheckpointError: of another format, or incomplete.
        """
        if found.get("format") != FORMAT:
            raise CheckpointError("format of an analysis", got=found.get("format"), expected=FORMAT)
        try:
            values = {name: value for name, value in found.items() if name != "format"}
            values["groups"] = tuple(
                GroupLoss(**{**each, "linears": tuple(each["linears"])}) for each in found["groups"]
            )
            values["ranges"] = tuple(map(read_range, found["ranges"]))
            values["choices"] = tuple(Choice(**each) for each in found["choices"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "analysis", got=f"{type(error).__name__}: {error}", expected="all its fields"
            ) from None


def read_range(found: Mapping[str, Any]) -> InputRange:
    """Return the range of plain values, lists in place of tuples."""
    channels = tuple((int(channel), float(size)) for channel, size in found["channels"])
    tokens = tuple((int(sample), int(at), str(text), float(size)) for sample, at, text, size in found["tokens"])
    return InputRange(**{**found, "channels": channels, "tokens": tokens})
