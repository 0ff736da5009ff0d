"""The model card of an 8-bit directory: what it was made of and how, who reads it, how to run it, what was measured.

A card is Markdown that begins with YAML, as both hubs show it. It says only what the directory's own files, the rules
of `check` and measurements that the user hands over say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError
from eightfold.files import has_file, read_json
from eightfold.format.description import find_description, read_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import closing_line, read_entries
from eightfold.format.target import REPORT_NAME
from eightfold.values import size_text

_READERS = {
    "mindie": "MindIE",
    "vllm-ascend": "vLLM Ascend",
    "sglang": "SGLang",
    "mindie-aclgraph": "MindIE (aclgraph)",
}
_RECIPE = ("scheme", "anti_outlier", "act_method", "target", "kv_int8", "fa_quant")

# Keys of `eval --json`, and what a person reads in their place.
_MEASURED = {
    "ppl": ("perplexity", "{:.4f}"),
    "ppl_against": ("perplexity of the float model", "{:.4f}"),
    "kl_mean": ("KL divergence from it, mean, nats", "{:.5f}"),
    "kl_p99": ("KL divergence from it, 99th percentile", "{:.4f}"),
    "top1_agreement": ("same most likely token", "{:.2%}"),
    "tokens": ("predictions", "{}"),
}


@dataclass(frozen=True)
class Made:
    """What the files of a complete directory say of it.

    Attributes:
        files: bytes of each file in the journal's list.
        version: of the eightfold that made it.
        origin: the hub's model that it was made of, without its revision; empty where that is not known.
        commit: of the origin.
        kinds: how many weights are stored as each type.
        recipe: settings that matter to a reader.
        architecture: of the model.
    """

    files: Mapping[str, int]
    version: str
    origin: str
    commit: str
    kinds: Mapping[str, int]
    recipe: Mapping[str, Any]
    architecture: str


def read_made(directory: Path) -> Made:
    """Read what a complete directory says of itself.

    Raises:
        CheckpointError: eightfold has not made it, or it is no 8-bit model.
    """
    entries = read_entries(directory) or []
    sealed = closing_line(entries)
    description = find_description(directory)
    if sealed is None or description is None:
        got = "no journal of eightfold that lists its files" if sealed is None else "no description"
        raise CheckpointError(
            "8-bit model", where=directory, got=got, expected="a directory that `eightfold quantize` has finished"
        )
    tags = read_description(description).tags
    report = read_json(directory / REPORT_NAME) if has_file(directory / REPORT_NAME) else {}
    recipe = dict(report.get("recipe") or {})
    if recipe.get("scheme") not in ("w8a8", "w8a8-mix"):
        recipe.pop("act_method", None)  # of static ranges
    origin, _, commit = str(entries[0].get("origin") or "").partition("@")
    architectures = read_json(directory / CONFIG_NAME).get("architectures") or ["unknown"]
    return Made(
        files={name: size for name, (size, _) in sealed.items()},
        version=str(entries[0].get("eightfold") or report.get("eightfold") or ""),
        origin=origin,
        commit=commit,
        kinds=Counter(kind for name, kind in tags.items() if name.endswith(".weight") and kind != "FLOAT"),
        recipe={key: recipe[key] for key in _RECIPE if recipe.get(key) not in (None, False)},
        architecture=str(architectures[0]),
    )


def render_card(
    made: Made,
    name: str,
    *,
    base: str = "",
    readers: Mapping[str, str] = {},
    measured: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the text of a model card.

    Args:
        made: the directory.
        name: `ORG/NAME` under which it is published.
        base: the float model's id; by default the one that it was made of.
        readers: a loader's name -> the verdict of `check` in words.
        measured: documents of `eval --json`.
    """
    base = base or made.origin
    title = name.rpartition("/")[2]
    front = {
        "library_name": "eightfold",
        "pipeline_tag": "text-generation",
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "tags": ["int8", *sorted({kind.lower().replace("_", "-") for kind in made.kinds}), "ascend", "mindie"],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    about = f"[{base}](https://huggingface.co/{base})" if base else f"A {made.architecture}"
    at = f" at commit `{made.commit[:12]}`" if base == made.origin and made.commit else ""
    parts = [
        f"---\n{head}\n---",
        f"# {title}",
        f"{about}{at} in 8 bits, in the checkpoint format of msModelSlim, made by `eightfold quantize` {made.version}.",
        _table(("", ""), _facts(made)),
        "## Run it on a CPU",
        f"```\npip install 'eightfold[hub,serve]'\neightfold run   {name} --chat --prompt \"What's deep learning?\"\n"
        f"eightfold serve {name}\n```",
    ]
    if readers:
        rows = [(_READERS.get(reader, reader), verdict) for reader, verdict in readers.items()]
        parts += ["## Who reads it", "By the published sources of each program:", _table(("reader", "finding"), rows)]
    if measured:
        parts += ["## Measured", *(_table(("", ""), _figures(document)) for document in measured)]
        parts.append("By `eightfold eval --json`; texts and chunks are those of the measurement.")
    return "\n\n".join(parts) + "\n"


def _facts(made: Made) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(f"{count} linears {kind}" for kind, count in made.kinds.items())
    weights = [size for name, size in made.files.items() if name.endswith(".safetensors")]
    yield "stored as", kinds or "float"
    yield "weights", f"{size_text(sum(weights))} in {len(weights)} file{'s' if len(weights) > 1 else ''}"
    for key, value in made.recipe.items():
        yield key.replace("_", " "), str(value)


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (title, form) in _MEASURED.items():
        value = document.get(key)
        if isinstance(value, (int, float)):
            yield title, form.format(value)


def _table(header: tuple[str, str], rows: Any) -> str:
    lines = [f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows)]
    return "\n".join(lines)
