"""How byte-level tokenizers cut a text before they merge, by the names that GGUF files have for it.

    tokenizer.ggml.pre      "smollm"
    tokenizer.json          each digit alone, then GPT-2's expression; a word that is a token is merged all the same

Source: llama.cpp's src/llama-vocab.cpp for the names and what each of them means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from eightfold.values import shorten

# Steps; any other is a regular expression, whose matches are pieces.
BYTES = "bytes"  # GPT-2's letters for bytes, without an expression
GPT2 = "GPT-2's expression"  # and its letters
DIGITS = "each digit"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}"
    r"\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(NamedTuple):
    """How a text is cut.

    Attributes:
        steps: one after the other.
        keeps_words: whether a piece that is a token is taken without merges.
    """

    steps: tuple[str, ...]
    keeps_words: bool = False

    def __str__(self) -> str:
        return " then ".join(map(shorten, self.steps)) + (", ignore_merges" if self.keeps_words else "")


# By the name that is written for it.
CUTS: dict[str, Cut] = {
    "gpt-2": Cut((GPT2,)),
    "smollm": Cut((DIGITS, GPT2)),
    "qwen2": Cut((_WORDS % r"\p{N}", BYTES)),
    "llama-bpe": Cut((_WORDS % r"\p{N}{1,3}", BYTES), keeps_words=True),
    "smaug-bpe": Cut((_WORDS % r"\p{N}{1,3}", BYTES)),
    "tekken": Cut((_TEKKEN, BYTES), keeps_words=True),
}

# Names that are read, and mean the same as one of those.
_SAME = {
    "gpt-2": ("mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx",),
}
_NAMES = {**{name: name for name in CUTS}, **{other: name for name, others in _SAME.items() for other in others}}


def cut_named(name: str) -> Cut | None:
    """Return what a name means; None for one that is not known here."""
    return CUTS[_NAMES[name]] if name in _NAMES else None


def name_of(cut: Cut) -> str | None:
    """Return the name of a way to cut; None where llama.cpp has none."""
    return next((name for name, known in CUTS.items() if known == cut), None)


def read_cut(content: Mapping[str, Any]) -> Cut:
    """Return how the tokenizer of a tokenizer.json cuts; steps without a name are its settings."""
    steps = flat_steps(content.get("pre_tokenizer"), "pretokenizers")
    return Cut(tuple(_step(each) for each in steps), bool((content.get("model") or {}).get("ignore_merges")))


def flat_steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of a pre-tokenizer or normalizer, those of sequences one by one."""
    if isinstance(part, dict):
        if part.get("type") == "Sequence":
            for each in part.get(inner) or ():
                yield from flat_steps(each, inner)
        else:
            yield part


def _step(part: Mapping[str, Any]) -> str:
    kind, pattern = part.get("type"), part.get("pattern")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return GPT2 if part.get("use_regex", True) else BYTES
    if kind == "Digits" and part.get("individual_digits"):
        return DIGITS
    if kind == "Split" and isinstance(pattern, dict) and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(pattern.get("Regex"))
    return json.dumps(part)


def write_cut(content: dict[str, Any], cut: Cut) -> None:
    """Give the object of a tokenizer.json this way to cut."""
    parts = [_part(step) for step in cut.steps]
    content["pre_tokenizer"] = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    content["model"]["ignore_merges"] = cut.keeps_words


def _part(step: str) -> dict[str, Any]:
    if step in (GPT2, BYTES):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": step == GPT2}
    if step == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
