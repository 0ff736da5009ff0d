"""What a hub calls a model, and where its cache keeps it.

    ORG/NAME              the newest commit of the main branch
    ORG/NAME@REVISION     a branch, a tag or a commit

A path that exists is a path, whatever it looks like. `./ORG/NAME`, absolute paths and FOLDER/FILE.gguf are never ids.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from eightfold.errors import ConfigError
from eightfold.format.journal import partial_path

# Letters as both hubs allow them, and no name that a path has a meaning for.
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]{{0,200}}))?", re.ASCII)

# How huggingface_hub (models--ORG--NAME) and modelscope-hub (models/ORG--NAME) lay out their caches.
_SNAPSHOT = re.compile(r"(?:models--|models/)(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[^/]+)$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubId(NamedTuple):
    """A model of a hub: `ORG/NAME`, and the revision that is asked for, empty for the newest."""

    name: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def parse_id(text: str) -> HubId:
    """Return what `ORG/NAME` or `ORG/NAME@REVISION` means.

    Raises:
        ConfigError: it is neither.
    """
    match = _ID.fullmatch(text)
    if match is None or ".." in text:
        raise ConfigError("hub id", got=text, expected="ORG/NAME, such as Qwen/Qwen3-0.6B, or ORG/NAME@REVISION")
    return HubId(match["name"], match["revision"] or "")


def id_of(path: Path) -> HubId | None:
    """Return what a path means if it is the id of a model on a hub; None for whatever is here, or no id."""
    is_here = os.path.lexists(path) or partial_path(path).exists()  # unfinished: its command is named elsewhere
    is_path = is_here or ".." in str(path) or path.suffix == ".gguf"
    return None if is_path or _ID.fullmatch(str(path)) is None else parse_id(str(path))


def origin_of(directory: Path) -> HubId | None:
    """Return which model, at which commit or revision, a directory of a hub's cache holds; None for any other."""
    match = _SNAPSHOT.search(os.path.realpath(directory))
    return HubId(f"{match['owner']}/{match['name']}", match["revision"]) if match else None


def is_commit(revision: str) -> bool:
    """Whether a revision can never mean something else."""
    return _COMMIT.fullmatch(revision) is not None


def title_of(directory: Path) -> str:
    """Return what a model is called: its name on the hub that it was fetched from, or that of its directory."""
    origin = origin_of(directory)
    return origin.name if origin else directory.resolve().name
