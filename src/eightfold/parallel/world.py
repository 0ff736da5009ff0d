"""Which of several processes this one is, as torchrun says in the environment, and whether they go together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eightfold.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class World:
    """The processes that work on one thing.

    Attributes:
        rank: of this process, from 0 on; rank 0 talks to the user.
        size: how many there are.
        local_rank: among those of this host.
        local_size: how many are on this host.
        address: of rank 0's host.
        port: where torchrun's store listens; it also tells runs apart.
        run: what tells this start from an earlier one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    run: str = ""

    @classmethod
    def of_environment(cls) -> World:
        """Read the environment; without torchrun's variables this is the only process.

        Raises:
            ConfigError: they make no sense.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        rank = _number("RANK", None)
        local_size, local_rank = _number("LOCAL_WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
        if rank >= size or local_rank >= local_size or local_size > size:
            got = f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size}"
            raise ConfigError("processes", got=got, expected="ranks below their number", action=_START)
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            port=_number("MASTER_PORT", None),
            run=f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}",
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_one_host(self) -> bool:
        return self.local_size == self.size

    @property
    def speaks(self) -> bool:
        """Whether this process reports its errors: one on every host does, before the ranks have met."""
        return self.is_first or (self.local_rank == 0 and not self.is_one_host)


_START = "Start them with torchrun --nproc_per_node N -m eightfold ..."


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isascii() or not text.isdigit() or (name.endswith("SIZE") and int(text) < 1):
        raise ConfigError(name, got=text or "nothing", expected="a number", action=_START)
    return int(text)


def require_alike(
    expected: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]], advice: Mapping[str, str]
) -> None:
    """Compare what has to be the same in all processes with what rank 0 has.

    Args:
        expected: what rank 0 has, by name.
        others: for each other process, what a message calls it and what it has.
        advice: by name, what a user can do about a difference.

    Raises:
        CheckpointError: a process has another model.
        ConfigError: something else differs.
    """
    for process, found in others:
        for name, value in expected.items():
            if (theirs := found.get(name)) != value:
                raise (CheckpointError if name in ("checkpoint", "source") else ConfigError)(
                    f"{name} of {process}",
                    got=_difference(theirs, value),
                    expected=f"{_difference(value, theirs)}, as rank 0 has",
                    action=advice.get(name, "Start all processes with the same options."),
                )


def _difference(value: Any, other: Any) -> str:
    """Return a value; of a table, the entries that another one does not have."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{key} {value[key]}" for key in value if value[key] != other.get(key))[:200] or "less"
    return str(value)
