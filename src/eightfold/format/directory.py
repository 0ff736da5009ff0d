"""Which files a model directory has: the weights that are meant, what accompanies them, and what it is if no model.

Weights are those that transformers takes: model.safetensors, else the shards that model.safetensors.index.json names.
Other names come after these. Where that was a choice, a note says so.

Tokenizer, chat template, generation settings and licence are carried over byte for byte. Nothing is executed: Python
files travel as data for other readers, and only a tokenizer's and those that config.json's `auto_map` names. A link is
followed only inside the directory, or to the blobs of its Hugging Face cache, so that nobody publishes a file of their
own that a stranger's link points to. Weights may be links to anywhere: they are parsed, not copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from eightfold.architectures import Names
from eightfold.errors import CheckpointError, EightfoldError, UnsupportedError, plural, shortlist
from eightfold.files import MAX_LIST_BYTES, has_file, open_regular, read_json, refuse_pointer, require_regular
from eightfold.format.safetensors import TensorInfo, read_header
from eightfold.scheme import weight_name
from eightfold.values import shorten

CONFIG_NAME = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_WHOLE = "model.safetensors"
_INDEX = ".safetensors.index.json"
_QUANTIZED = "quant_model_weight"  # how the weights of this format begin
_FOREIGN = ("adapter_model", "consolidated")  # an adapter's; Mistral's and Meta's own names and layout
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")

_PICKLES = (".bin", ".pt", ".pth")

_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe"})
_WORDS = ("tokenizer", "tokenization", "generation")  # tokenizer.model.v3, tokenization_own.py, ...
_NOT_TEXT = frozenset({".safetensors", *_PICKLES, ".gguf", ".pkl"})
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATE_DIRECTORY = "additional_chat_templates"

# What GPTQ and AWQ, compressed-tensors, DeepSeek's float8 and bitsandbytes call a weight or what goes with it.
_QUANTIZED_ELSEWHERE = (".qweight", ".weight_packed", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")

# Beside a model they tell loaders that it is something else: an adapter, or weights of another format.
_MISLEADING = frozenset(
    {
        CONFIG_NAME,  # written anew
        ADAPTER_CONFIG,
        "hf_quant_config.json",
        "model_index.json",
        "modules.json",
        "params.json",
        "quant_config.json",
        "quantize_config.json",
    }
)

_SAVE_AGAIN = "Load it with transformers' AutoModelForCausalLM and write it with save_pretrained."
_START_FLOAT = "Start from the model's unquantized weights."
_MERGE = (
    "Merge the adapter first: load it with peft, call merge_and_unload() and write the result with save_pretrained."
)


# --- what accompanies the weights


def list_sidecars(source: Path) -> list[Path]:
    """Return the files of a model directory that accompany its weights, sorted by name.

    Raises:
        CheckpointError: one is a link to somewhere else or to nothing, no regular file, or a Git LFS pointer.
    """
    templates = source / _TEMPLATE_DIRECTORY
    names = [path for path in source.iterdir() if is_sidecar(path.name)]
    names += templates.glob("*.jinja") if templates.is_dir() else ()
    found = sorted(path for path in names if not path.is_dir())
    for path in found:
        _require_own(path, source)
    return found


def is_sidecar(name: str) -> bool:
    """Whether a file of a model directory accompanies its weights, by its name."""
    if name.startswith(".") or name in _MISLEADING:
        return False
    if name.endswith(".index.json") or name.startswith(("quant_model_description", "eightfold_")):
        return False
    if any(word in name for word in _WORDS) and Path(name).suffix not in _NOT_TEXT:
        return True
    return Path(name).suffix in _SUFFIXES or name.upper().startswith(_LICENCES)


def _require_own(path: Path, source: Path) -> None:
    """Refuse what would publish a file that is not the model's."""
    require_regular(path)
    home = Path(os.path.realpath(source))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(
            path.relative_to(source).as_posix(),
            where=source,
            got=f"a link to {real}",
            expected="a file of the model",
            action="Replace the link by the file that is meant, or remove it.",
        )
    with os.fdopen(open_regular(path), "rb") as file:
        refuse_pointer(file.read(64), path)


def carried_over(source: Path) -> set[str]:
    """Return the names, as paths inside a model directory, of the files that a copy of it would get."""
    return {path.relative_to(source).as_posix() for path in list_sidecars(source)} | {
        path.name for path in source.glob("*.py")
    }


def copy_files(paths: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files of a model directory, as list_sidecars() and resolve_auto_map() return them, to the same names."""
    import shutil

    for path in paths:
        _require_own(path, source)  # once more: time has passed
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with os.fdopen(open_regular(path), "rb") as file, copy.open("wb") as written:
            shutil.copyfileobj(file, written)


def resolve_auto_map(raw: dict[str, Any], source: Path) -> tuple[dict[str, Any], list[Path], str | None]:
    """Decide what becomes of config.json's `auto_map`.

    Returns:
        The config to write, the Python files to copy with it, and a note for the user when the map was left out.

    Raises:
        CheckpointError: as list_sidecars().
    """
    auto_map = raw.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return raw, [], None
    files = {file for target in auto_map.values() for file in _module_files(target)}
    # A path inside the map would name a file outside the directory; it counts as absent.
    absent = sorted(name for name in files if Path(name).name != name or not has_file(source / name))
    if absent:
        kept = {key: value for key, value in raw.items() if key != "auto_map"}
        return kept, [], f'config.json: "auto_map" left out, because {shortlist(absent)} is not in its directory'
    modules = [source / name for name in sorted(files)]
    for module in modules:
        _require_own(module, source)
    return raw, modules, None


def _module_files(target: Any) -> list[str]:
    # For tokenizers: the slow and the fast one, of which one may be null.
    names = [name for name in target if name is not None] if isinstance(target, list) else [target]
    return [f"{str(name).split('--')[-1].rpartition('.')[0]}.py" for name in names]


# --- what a directory is


def require_model(directory: Path) -> None:
    """Refuse what is no model directory, and say what it may have been meant to be.

    Raises:
        CheckpointError: it is a file, it is not there, or it holds something else.
    """
    if not directory.is_dir():
        raise _no_directory(directory)
    if os.path.lexists(directory / CONFIG_NAME):
        return
    if (found := _adapter(directory)) is not None:
        raise found
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    snapshots = sorted(directory.glob("snapshots/*/config.json"))
    folders = sorted(directory.glob("*/config.json"))
    if ggufs:
        got, action = f"only {shortlist(ggufs, 2)}", f"Run: eightfold import-gguf {directory / ggufs[0]} DIR"
    elif snapshots:
        got, action = "a cache of Hugging Face", f"The model is in {snapshots[-1].parent}"
    elif folders:
        got, action = f"models in {len(folders)} folders", f"Name the one that is meant, such as {folders[-1].parent}"
    elif (directory / "params.json").is_file():
        got, action = "weights in the publisher's own layout (params.json)", "Fetch the model in transformers' layout."
    else:
        return  # said of config.json by whoever reads it
    raise CheckpointError("model", where=directory, got=got, expected="config.json and safetensors", action=action)


def _no_directory(directory: Path) -> CheckpointError:
    if directory.is_symlink() and not directory.exists():
        return CheckpointError(
            f"no directory {directory}",
            got=f"a link to {directory.readlink()}, which is not there",
            expected="one",
            action="Check the link, or mount the disk that it leads to.",
        )
    if directory.exists():
        return CheckpointError(
            "model",
            where=directory,
            got="a file",
            expected="a directory with config.json and safetensors files",
            action="For a .gguf file run: eightfold import-gguf FILE DIR" if directory.suffix == ".gguf" else "",
        )
    return CheckpointError(f"no directory {directory}", expected="a model directory", action="Check the path.")


def _adapter(directory: Path) -> CheckpointError | None:
    """Return what to say of an adapter without a model."""
    if not any(os.path.lexists(directory / name) for name in (ADAPTER_CONFIG, *_adapter_files(directory))):
        return None
    base = ""
    if has_file(directory / ADAPTER_CONFIG):
        name = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = f" of {shorten(name)}" if isinstance(name, str) and name else ""
    got = f"a LoRA adapter{base} without its model"
    return CheckpointError("model", where=directory, got=got, expected="a whole model", action=_MERGE)


def _adapter_files(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("adapter_model.*")]


def explain_names(directory: Path, names: Collection[str], embedding: str = Names.embedding) -> EightfoldError | None:
    """Return what to say of weights that are not named as those of a model; None where the names are not the reason.

    Args:
        directory: of the model, for the message.
        names: of its tensors, or of some of them.
        embedding: the module that such a model has.
    """

    def refused(got: str, action: str) -> CheckpointError:
        return CheckpointError(
            "tensor names",
            where=directory,
            got=got,
            expected='the names of a model, "model.layers.0. ..."',
            action=action,
        )

    if lora := [name for name in names if ".lora_" in name or ".base_layer." in name or ".modules_to_save." in name]:
        return refused(f"tensors of a LoRA adapter ({shortlist(lora, 2)})", _MERGE)
    if foreign := [name for name in names if name.endswith(_QUANTIZED_ELSEWHERE)]:
        return refused(f"weights that another tool has quantized ({shortlist(foreign, 2)})", _START_FLOAT)
    tail = weight_name(embedding).removeprefix("model.")
    if weight_name(embedding) in names:
        return None
    for name in names:
        if name == tail:
            return refused(f'names without the prefix "model." ({name})', _SAVE_AGAIN)
        if name.endswith("." + tail):
            prefix = name.removesuffix(tail)
            action = _MERGE if prefix.startswith("base_model.") else _SAVE_AGAIN
            return refused(f'names that begin with "{prefix}" ({name})', action)
        if name.endswith("tok_embeddings.weight"):
            return refused(f"the publisher's own names ({name})", "Fetch the model in transformers' layout.")
    return None


def unknown_tensors(directory: Path, names: list[str], expected: str) -> EightfoldError:
    """Return what to say of tensors that no model of this architecture has."""
    what = f"{plural(len(names), 'tensor')} unknown"
    if all(not name.startswith(("model.", "lm_head.")) for name in names):
        got = f"a value head or the like ({shortlist(names)})"
        action = "Drop it, if the model is to generate text. " + _SAVE_AGAIN
        return UnsupportedError(what, where=directory, got=got, expected=expected, action=action)
    action = "config.json may lack a setting such as attention_bias."
    return UnsupportedError(what, where=directory, got=shortlist(names), expected=expected, action=action)


# --- weights


def read_tensors(
    directory: Path, config: Mapping[str, Any], *, is_quantized: bool
) -> tuple[dict[str, TensorInfo], str]:
    """Read the headers of a model's weights.

    Args:
        directory: the model.
        config: config.json, which may name the file that is meant.
        is_quantized: whether there is a description; weights that are named as this format names them are then meant.

    Returns:
        Tensors by name; and a note for the user where there was a choice of weights, else an empty text.

    Raises:
        CheckpointError: no weights, a shard that is missing or damaged, or files that contradict each other.
    """
    found = sorted(
        path.name
        for path in directory.iterdir()
        if path.name.endswith((".safetensors", _INDEX)) and not path.name.startswith(".")
    )
    meant = _meant(directory, found, config, is_quantized)
    index = directory / meant[0] if meant[0].endswith(_INDEX) else None
    weight_map = _read_index(index) if index else {}
    files = sorted(set(weight_map.values())) if index else meant
    left = [name for name in found if name not in (*files, *meant) and not name.startswith("adapter_model")]
    note = ""
    if left:
        note = f"weights are read from {shortlist(meant, 2)}; not read: {shortlist(left, 3)}"
    return _read_headers(directory, files, weight_map, index), note


def _meant(directory: Path, found: list[str], config: Mapping[str, Any], is_quantized: bool) -> list[str]:
    """Return the index, or the files of weights, that are meant, of all that are there."""
    explicit = config.get("transformers_weights")
    if is_quantized:
        found = [name for name in found if name.startswith(_QUANTIZED)] or found
    elif isinstance(explicit, str) and explicit in found:
        return [explicit]
    for name in (_WHOLE, f"model{_INDEX}"):
        if name in found:
            return [name]
    found = [name for name in found if not name.startswith(_FOREIGN)] or [
        name for name in found if not name.startswith("adapter_model")
    ]
    indexes = [name for name in found if name.endswith(_INDEX)]
    if len(indexes) > 1:
        raise CheckpointError(
            "shard indexes",
            where=directory,
            got=shortlist(indexes),
            expected="at most one",
            action="Remove the one that does not belong to this model.",
        )
    if not found:
        raise _no_weights(directory)
    return indexes or _one_set(directory, found)


def _one_set(directory: Path, files: list[str]) -> list[str]:
    """Return the shards of the only set that is numbered, else all files."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in files:
        if part := _PART.fullmatch(name):
            sets.setdefault((part[1], int(part[2])), []).append(name)
    if len(sets) > 1:
        raise CheckpointError(
            "weights",
            where=directory,
            got=f"shards of {len(sets)} sets ({shortlist((shards[0] for shards in sets.values()), 3)})",
            expected="one set, or an index",
            action="Remove those that do not belong to this model.",
        )
    for (stem, count), shards in sets.items():
        absent = [name for i in range(1, count + 1) if (name := _part(stem, i, count)) not in shards]
        if absent:
            raise _missing_shards(directory, absent, count, f"every file of {stem}")
        return shards
    return files


def _part(stem: str, i: int, count: int) -> str:
    return f"{stem}-{i:05d}-of-{count:05d}.safetensors"


def _missing_shards(directory: Path, absent: list[str], count: int, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{plural(len(absent), 'shard')} missing of {count}",
        where=directory,
        got=f"no {shortlist(absent)}",
        expected=expected,
        action="Fetch the missing files.",
    )


def _no_weights(directory: Path) -> CheckpointError:
    if (found := _adapter(directory)) is not None:
        return found
    pickles = [path.name for path in directory.iterdir() if path.suffix in _PICKLES]
    return CheckpointError(
        "weights",
        where=directory,
        got=f"only {shortlist(pickles, 3)}" if pickles else "no *.safetensors",
        expected="safetensors files",
        action=f"Pickles can run code and are not read. {_SAVE_AGAIN}" if pickles else "",
    )


def _read_headers(
    directory: Path, files: list[str], weight_map: Mapping[str, str], index: Path | None
) -> dict[str, TensorInfo]:
    """Return the tensors of all files, each of which lies where the index says."""
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


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> file name; every file is there."""
    weight_map = read_json(index, MAX_LIST_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            '"weight_map"',
            where=index,
            got=shorten(json.dumps(weight_map)),
            expected="tensor name -> file name",
            action="Fetch the file again.",
        )
    shards = sorted(set(weight_map.values()))
    if outside := [name for name in shards if Path(name).name != name or name in ("", "..") or "\0" in name]:
        raise CheckpointError(
            "shard name",
            where=index,
            got=shorten(outside[0]),
            expected="a file in the same directory",
            action="Fetch the file again.",
        )
    if absent := [name for name in shards if not has_file(index.parent / name)]:
        raise _missing_shards(index.parent, absent, len(shards), "every file that the index names")
    return weight_map
