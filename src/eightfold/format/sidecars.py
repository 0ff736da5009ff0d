"""The files beside the weights: tokenizer, chat template, generation settings, licence.

They are carried over byte for byte. Nothing is executed: Python files travel as data for other readers, and only a
tokenizer's and those that config.json's `auto_map` names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented as the reference tool does."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
