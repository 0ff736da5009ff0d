"""What Eightfold asks of a hub, and what it says when that fails."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from eightfold.errors import CheckpointError, DependencyError, EightfoldError, OutputError, shortlist
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import JOURNAL_NAME
from eightfold.hub.names import HubId


class Listing(NamedTuple):
    """The files of a model at one moment.

    Attributes:
        revision: the commit; where a hub does not tell, the revision that was asked for.
        sizes: bytes of each file, by its path in the repository.
    """

    revision: str
    sizes: Mapping[str, int]


class NotReached(Exception):
    """The hub did not answer, or is not to be asked; what the cache holds may do."""


class Hub(Protocol):
    """A hub. Every method raises an EightfoldError in one line for what the user can change, with no token in it.

    NotReached, where a method says so, is its caller's: a cache may do instead.
    """

    title: str

    def listing(self, model: HubId) -> Listing:
        """Return the files of a model. Raises NotReached without a network."""

    def cached(self, model: HubId) -> Path | None:
        """Return the directory that was fetched earlier, without asking the hub."""

    def space(self, model: HubId, listing: Listing, names: Sequence[str]) -> tuple[Path, int]:
        """Return where the cache is, and how many bytes of these files it lacks."""

    def fetch(self, model: HubId, listing: Listing, names: Sequence[str]) -> Path:
        """Fetch some files, the missing bytes of them; return the directory. Raises NotReached."""

    def publish(self, model: HubId, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
        """Make these files, by path in the repository, the content of a model; return its address.

        Raises NotReached without a network.
        """


def is_offline() -> bool:
    """Whether hubs are not to be asked; Hugging Face's variable counts for both."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def missing_client(package: str) -> DependencyError:
    """Return what to say where a hub's client is not installed."""
    return DependencyError(
        f"a hub id needs {package}", got="none installed", action="Install it: pip install 'eightfold[hub]'"
    )


def no_model(model: HubId, hub: Hub, got: str, action: str = "") -> CheckpointError:
    """Return the refusal of an id that is no model, or none for this user."""
    return CheckpointError(f"model {model} on {hub.title}", got=got, expected="a model", action=action)


def require_ours(model: HubId, hub: Hub, names: Collection[str]) -> None:
    """Refuse to write over a model that eightfold has not published.

    Args:
        model: where to.
        hub: whose.
        names: of the files that are there.

    Raises:
        OutputError: there is another model.
    """
    there = [name for name in names if name.endswith((".safetensors", ".bin", ".gguf")) or name == CONFIG_NAME]
    if there and JOURNAL_NAME not in names:
        raise OutputError(
            f"model {model} on {hub.title}",
            got=f"one that eightfold did not publish ({shortlist(sorted(there), 3)})",
            expected="a new name, or a model that `eightfold push` has published",
            action="Choose another name.",
        )


def require_private(model: HubId, hub: Hub, is_private: bool) -> None:
    """Refuse to publish for everybody what was meant for a few.

    Raises:
        OutputError: the model is there, and public.
    """
    if not is_private:
        raise OutputError(
            f"model {model} on {hub.title}",
            got="one that everybody sees",
            expected="a private one",
            action="Change it on its page, choose another name, or leave out `private`.",
        )


def failed(model: HubId, hub: Hub, error: BaseException) -> EightfoldError:
    """Return what to say of an answer that is no use."""
    got = f"{type(error).__name__}: {error}"
    return CheckpointError(f"model {model} on {hub.title}", got=got, expected="its files", action="Try again later.")


def first_line(error: BaseException) -> str:
    """Return what a client met, without what it wrapped around it."""
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__
