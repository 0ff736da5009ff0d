"""Which hub is meant: the one that is named, else that of EIGHTFOLD_HUB, else Hugging Face."""

from __future__ import annotations

import os

from eightfold.errors import ConfigError, one_of
from eightfold.hub.clients import Hub

VARIABLE = "EIGHTFOLD_HUB"
HUBS = ("hf", "modelscope")


def chosen_hub(name: str | None = None) -> Hub:
    """Return the hub of this name; without one, that of the environment.

    Raises:
        ConfigError: no hub has this name.
        DependencyError: its client is not installed.
    """
    given = name or os.environ.get(VARIABLE) or HUBS[0]
    if given not in HUBS:
        raise ConfigError("`hub`" if name else VARIABLE, got=given, expected=one_of(HUBS))
    if given == "hf":
        from eightfold.hub.huggingface import HuggingFace

        return HuggingFace()
    from eightfold.hub.modelscope import ModelScope

    return ModelScope()
