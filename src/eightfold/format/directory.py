"""Which files a model directory has: the weights that are meant, and what accompanies them.

Tokenizer, chat template, generation settings and licence are carried over byte for byte. Nothing is executed:
Python files travel as data for other readers, and only a tokenizer's and those that config.json's `auto_map` names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError, plural, shortlist
from eightfold.files import read_json
from eightfold.format.safetensors import TensorInfo, read_header
from eightfold.values import shorten

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")

_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe"})
_WORDS = ("tokenizer", "tokenization", "generation")  # tokenizer.model.v3, tokenization_own.py, ...
_NOT_TEXT = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".pkl"})
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATE_DIRECTORY = "additional_chat_templates"


def list_sidecars(source: Path) -> list[Path]:
    """Return the files of a model directory that accompany its weights, sorted by name."""
    found = [path for path in source.iterdir() if path.is_file() and _is_sidecar(path.name)]
    templates = source / _TEMPLATE_DIRECTORY
    if templates.is_dir():
        found += [path for path in templates.glob("*.jinja") if path.is_file()]
    return sorted(found)


def _is_sidecar(name: str) -> bool:
    if name.startswith(".") or name == "config.json":
        return False
    if name.endswith(".index.json") or name.startswith(("quant_model_description", "eightfold_")):
        return False
    if any(word in name for word in _WORDS) and Path(name).suffix not in _NOT_TEXT:
        return True
    return Path(name).suffix in _SUFFIXES or name.upper().startswith(_LICENCES)


def carried_over(source: Path) -> set[str]:
    """Return the names, as paths inside a model directory, of the files that a copy of it would get."""
    return {path.relative_to(source).as_posix() for path in list_sidecars(source)} | {
        path.name for path in source.glob("*.py")
    }


def copy_sidecars(source: Path, target: Path) -> list[Path]:
    """Copy every sidecar into the target directory; return the copies."""
    copies = []
    for path in list_sidecars(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append(copy)
    return copies


def resolve_auto_map(raw: dict[str, Any], source: Path) -> tuple[dict[str, Any], list[Path], str | None]:
    """Decide what becomes of config.json's `auto_map`.

    Returns:
        The config to write, the Python files to copy with it, and a note for the user when the map was left out.
    """
    auto_map = raw.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return raw, [], None
    files = {file for target in auto_map.values() for file in _module_files(target)}
    # A path inside the map would name a file outside the directory; it counts as absent.
    absent = sorted(name for name in files if Path(name).name != name or not (source / name).is_file())
    if absent:
        kept = {key: value for key, value in raw.items() if key != "auto_map"}
        return kept, [], f'config.json: "auto_map" left out, because {", ".join(absent)} is not in its directory'
    return raw, [source / name for name in sorted(files)], None


def _module_files(target: Any) -> list[str]:
    # For tokenizers: the slow and the fast one, of which one may be null.
    names = [name for name in target if name is not None] if isinstance(target, list) else [target]
    return [f"{str(name).split('--')[-1].rpartition('.')[0]}.py" for name in names]


def require_directory(directory: Path) -> None:
    """Refuse what is no directory, and say what it may have been meant to be.

    Raises:
        CheckpointError: it is a file, it looks like a name on a hub, or it is not there.
    """
    if directory.is_dir():
        return
    if directory.exists():
        raise CheckpointError(
            "model",
            where=directory,
            got="a file",
            expected="a directory with config.json and safetensors files",
            action="For a .gguf file run: eightfold import-gguf FILE DIR" if directory.suffix == ".gguf" else "",
        )
    if _HUB_ID.match(str(directory)) and not directory.parent.exists():
        raise CheckpointError(
            f"no directory {directory}",
            got="what looks like a hub id",
            expected="a directory on this machine",
            action=f"Download it first: hf download {directory} --local-dir {directory.name}",
        )
    raise CheckpointError(f"no directory {directory}", expected="a model directory", action="Check the path.")


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Read the headers of a model's weights; return its tensors by name.

    Raises:
        CheckpointError: no weights, a shard that is missing or damaged, or files that contradict each other.
    """
    index = _find_index(directory)
    weight_map = _read_index(index) if index else {}
    files = sorted(set(weight_map.values())) if index else _weight_files(directory)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(directory / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name}",
                    where=directory,
                    got=f"it in {tensors[name].file.name} and in {file}",
                    expected="it in one file",
                    action="Remove the file that does not belong to this model.",
                )
            tensors[name] = info
    misplaced = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if misplaced:
        raise CheckpointError(
            f"{len(misplaced)} tensors are not in the shard that the index names",
            where=index,
            got=shortlist(misplaced),
            expected="an index that fits its files",
            action="Fetch the directory again.",
        )
    return tensors


def _find_index(directory: Path) -> Path | None:
    indexes = [path for path in sorted(directory.glob("*.safetensors.index.json")) if not path.name.startswith(".")]
    if len(indexes) > 1:
        raise CheckpointError(
            "shard indexes",
            where=directory,
            got=shortlist(path.name for path in indexes),
            expected="at most one",
            action="Remove the one that does not belong to this model.",
        )
    return indexes[0] if indexes else None


def _weight_files(directory: Path) -> list[str]:
    """Return the names of the weight files of a directory without an index."""
    files = [path.name for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(".")]
    if not files:
        pickles = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        raise CheckpointError(
            "weights",
            where=directory,
            got=f"only {shortlist(pickles, 3)}" if pickles else "no *.safetensors",
            expected="safetensors files",
            action="Pickles can run code and are not read; save the model as safetensors first." if pickles else "",
        )
    # Some publishers put a second copy in their own naming beside the usual file.
    return ["model.safetensors"] if "model.safetensors" in files else files


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> file name; every file is there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            '"weight_map"', where=index, got=shorten(json.dumps(weight_map)), expected="tensor name -> file name"
        )
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError("shard name", where=index, got=outside[0], expected="a file in the same directory")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{plural(len(absent), 'shard')} missing of {len(shards)}",
            where=index.parent,
            got=f"no {shortlist(absent)}",
            expected="every file that the index names",
            action="Fetch the missing files.",
        )
    return weight_map
