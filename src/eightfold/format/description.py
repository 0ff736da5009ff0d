"""quant_model_description.json: a flat object of a few global keys and one entry for each tensor.

{"version": "1.0.0", "model_quant_type": "W8A8", "model.layers.0.self_attn.q_proj.weight": "W8A8", ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eightfold.errors import CheckpointError, one_of, shortlist
from eightfold.files import MAX_LIST_BYTES, has_file, read_json
from eightfold.scheme import DESCRIPTION_VERSION, LINEAR_TENSORS, QuantType
from eightfold.values import shown

SHORT_NAME = "quant_model_description.json"
_PREFIX = "quant_model_description"


@dataclass(frozen=True)
class Description:
    """What the description file says."""

    path: Path
    model_quant_type: str
    tags: Mapping[str, str]  # tensor name -> type, as written


def find_description(directory: Path) -> Path | None:
    """Return the directory's description file: the short name, else the only suffixed one, else None."""
    short = directory / SHORT_NAME
    if has_file(short):
        return short
    suffixed = sorted(directory.glob(f"{_PREFIX}_*.json"))
    if len(suffixed) > 1:
        raise CheckpointError(
            "description",
            where=directory,
            got=shortlist(path.name for path in suffixed),
            expected=f"one, or {SHORT_NAME}",
            action="Keep the one that belongs to the weights.",
        )
    return suffixed[0] if suffixed else None


def read_description(path: Path) -> Description:
    """Read a description file.

    Raises:
        CheckpointError: not a JSON object, or no model_quant_type.
    """
    raw = read_json(path, MAX_LIST_BYTES)
    model_type = raw.get("model_quant_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            '"model_quant_type"',
            where=path,
            got=shown(model_type) if model_type is not None else "nothing",
            expected=f"a type such as {one_of(kind.value for kind in LINEAR_TENSORS)}",
        )
    tags = {key: value for key, value in raw.items() if isinstance(value, str) and "." in key}
    return Description(path, model_type, tags)


def render_description(model_quant_type: QuantType, tags: Mapping[str, QuantType]) -> str:
    """Render the file's text: the global keys, then one entry for each tensor, in the given order."""
    content = {"version": DESCRIPTION_VERSION, "model_quant_type": model_quant_type.value}
    if QuantType.C8 in tags.values():
        # One reader knows only the first, another only the second.
        content.update({"kv_cache_type": QuantType.C8.value, "kv_quant_type": QuantType.C8.value})
    if QuantType.FAQUANT in tags.values():
        content["fa_quant_type"] = QuantType.FAQUANT.value
    content.update({name: tag.value for name, tag in tags.items()})
    return json.dumps(content, indent=4) + "\n"


def check_entries(description: Description, stored: Iterable[str]) -> None:
    """Check that stored tensors and description entries are the same set.

    Raises:
        CheckpointError: names all tensors on one side only.
    """
    names = set(stored)
    without_entry = sorted(names - set(description.tags))
    without_tensor = sorted(set(description.tags) - names)
    if without_tensor:
        raise CheckpointError(
            "tensors that the description names",
            where=description.path.parent,
            got=f"{len(without_tensor)} missing ({shortlist(without_tensor)})",
            expected="every one in a safetensors file",
            action="Fetch the directory again.",
        )
    if without_entry:
        raise CheckpointError(
            "entries",
            where=description.path,
            got=f"none for {shortlist(without_entry)}",
            expected="one for each tensor",
        )
