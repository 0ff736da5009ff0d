"""A model of a hub as a directory on this machine.

Fetched are config.json, weights in safetensors, and what `quantize` takes along: tokenizer, templates, generation
settings, licences. Code, pickles and the rest stay where they are: nothing that is fetched could be executed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from eightfold.errors import CapacityError, CheckpointError, shortlist
from eightfold.format.directory import CONFIG_NAME, is_sidecar
from eightfold.format.journal import JOURNAL_NAME
from eightfold.hub.choice import chosen_hub
from eightfold.hub.clients import Hub, Listing, NotReached, no_model
from eightfold.hub.names import HubId, id_of, is_commit
from eightfold.values import size_text

_WEIGHTS = ".safetensors"
_OURS = ("quant_model_description", "eightfold_report")


def local_model(path: Path) -> Path:
    """Return the directory of a model: a path as it is, the id of a hub fetched into that hub's cache.

    Raises:
        EightfoldError: the id is none of a model, or it cannot be fetched; see fetched().
    """
    model = id_of(path)
    return path if model is None else fetched(model, chosen_hub())


def fetched(model: HubId, hub: Hub, note: Callable[[str], None] = lambda text: None) -> Path:
    """Fetch what is missing of a model, and return its directory in the hub's cache.

    Args:
        model: whose newest commit is taken, unless it names a revision.
        hub: that is asked.
        note: is told when the hub was not reached and the cache serves.

    Raises:
        CheckpointError: it is not there, not for this user, no model, or not in the cache while the hub is not reached.
        CapacityError: the disk of the cache is too small.
    """
    try:
        listing = hub.listing(model)
        names = model_files(listing.sizes)
        _require_model(model, hub, listing, names)
        _require_space(model, hub, listing, names)
        directory = hub.fetch(model, listing, names)
    except NotReached as error:
        found = hub.cached(model)
        if found is None or not any(found.glob(f"*{_WEIGHTS}")):  # a first fetch may have been stopped
            raise CheckpointError(
                f"no directory {model} here, and {hub.title} cannot be asked for it",
                got=str(error),
                expected="a model that is here, or that was fetched before",
                action="Check the name and the network.",
            ) from None
        note(f"{hub.title} was not asked ({error}): {model} is taken as it was fetched before, from {found}.")
        return found
    if is_commit(listing.revision) and directory.name != listing.revision:
        raise CheckpointError(
            f"model {model} on {hub.title}",
            got=f"commit {directory.name[:12]} after {listing.revision[:12]}: it changed while it was fetched",
            expected="one commit",
            action="Run the same command again.",
        )
    return directory


def model_files(names: Iterable[str]) -> list[str]:
    """Return the files to fetch of those in a repository, sorted."""
    given = sorted(names)
    weights = [name for name in given if name.endswith(_WEIGHTS) and "/" not in name and not _is_adapter(name)]
    # Mistral's own layout counts only where there is no other.
    weights = [name for name in weights if not name.startswith("consolidated")] or weights
    return sorted({*weights, *filter(_accompanies, given)})


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter_model")


def _accompanies(name: str) -> bool:
    if name.endswith(".py") or _is_adapter(name):
        return False
    if name.startswith("additional_chat_templates/"):
        return name.count("/") == 1 and name.endswith(".jinja")
    if "/" in name:
        return False
    is_ours = name == JOURNAL_NAME or (name.startswith(_OURS) and name.endswith(".json"))
    return name == CONFIG_NAME or name.endswith(".index.json") or is_ours or is_sidecar(name)


def _require_model(model: HubId, hub: Hub, listing: Listing, names: list[str]) -> None:
    """Refuse a repository without a model that can be read here."""
    given = sorted(listing.sizes)
    ggufs = [name for name in given if name.endswith(".gguf")]
    has_weights = any(name.endswith(_WEIGHTS) for name in names)
    if CONFIG_NAME in given and has_weights:
        return
    absent = "safetensors" if CONFIG_NAME in given else CONFIG_NAME
    action = "A model has both in the repository's top folder."
    if "adapter_config.json" in given:
        action = "It is an adapter: merge it into its model first."
    elif ggufs:
        action = f"Fetch a file ({shortlist(ggufs, 2)}) and run: eightfold import FILE DIR"
    raise no_model(model, hub, f"no {absent} among {len(given)} files ({shortlist(given, 4)})", action)


def _require_space(model: HubId, hub: Hub, listing: Listing, names: list[str]) -> None:
    """Refuse a model that the cache's disk cannot take, before the first byte."""
    cache, missing = hub.space(model, listing, names)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise CapacityError(
            f"model {model}: the disk of {cache} is too small",
            got=f"{size_text(free)} free",
            expected=f"{size_text(missing)}",
            action="Free some space, or point HF_HOME or MODELSCOPE_CACHE to another disk.",
        )
