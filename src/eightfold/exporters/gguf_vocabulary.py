"""A tokenizer.json as GGUF metadata: tokens, types, merges or scores, the name of the pre-tokenizer, special tokens.

llama.cpp has its own tokenizers and knows by a name which regular expressions cut a text. A tokenizer that is cut in
another way is refused: the file would load, and answer other questions than were asked.

Sources: llama.cpp's src/llama-vocab.cpp for what it does with a vocabulary; sentencepiece for the order of merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.errors import CheckpointError, UnsupportedError, one_of, shortlist
from eightfold.format.gguf_pretokenizers import CUTS, flat_steps, name_of, read_cut
from eightfold.tokenizer import Tokenizer, stop_token_ids
from eightfold.values import shorten, shown

# Of the gguf package's TokenType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_SPACE = "▁"  # sentencepiece's
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LEAST_SCORE = -1e9  # of what no merge makes


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer, and what it cannot say."""

    fields: dict[str, Any]
    losses: list[str]
    notes: list[str]


def read_vocabulary(directory: Path, config_raw: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """Read the tokenizer of a model directory.

    Args:
        directory: the model.
        config_raw: its config.json.
        vocab_size: rows of its embedding; those beyond the tokenizer's tokens are unused ones.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, or has more tokens than the model.
        UnsupportedError: llama.cpp has none like it.
    """
    tokenizer = Tokenizer(directory)
    content = json.loads(tokenizer.content)
    where, model = directory / "tokenizer.json", content.get("model") or {}
    strange = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or strange:
        got = f"{model.get('type')}{' with ' + one_of(strange) if strange else ''}"
        raise UnsupportedError("tokenizer", where=where, got=shorten(got), expected="BPE")
    if not model.get("merges"):
        raise UnsupportedError(
            "tokenizer", where=where, got="BPE without merges", expected="some, which readers ask for"
        )
    steps = list(flat_steps(content.get("pre_tokenizer"), "pretokenizers"))
    is_bytes = any(step.get("type") == "ByteLevel" for step in steps)
    found = _by_bytes(content, where) if is_bytes else _by_pieces(content, steps, where)
    texts, types = _tokens(content, vocab_size, where, is_bytes=is_bytes, notes=found.notes)
    fields = {**found.fields, "tokens": texts, "token_type": types}
    if not is_bytes:
        fields["scores"] = _scores(texts, _merges(model))
    found.notes.extend(tokenizer.notes)
    fields.update(_special(tokenizer, directory, config_raw, found.losses))
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return Vocabulary({**named, **_templates(tokenizer)}, found.losses, found.notes)


def _by_bytes(content: Mapping[str, Any], where: Path) -> Vocabulary:
    """Return what is said of a byte-level tokenizer, as GPT-2's."""
    model = content["model"]
    cut = read_cut(content)
    if (name := name_of(cut)) is None:
        raise UnsupportedError("pre-tokenizer", where=where, got=cut, expected=f"that of {one_of(CUTS)}")
    notes = []
    for step in flat_steps(content.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise UnsupportedError("normalizer", where=where, got=shown(step.get("type")), expected="none or NFC")
        notes.append("the tokenizer composes characters first (NFC), llama.cpp does not: rare texts get other tokens")
    merges = [" ".join(pair) for pair in _merges(model)]
    return Vocabulary({"model": "gpt2", "pre": name, "merges": merges}, [], notes)


def _by_pieces(content: Mapping[str, Any], steps: list[dict[str, Any]], where: Path) -> Vocabulary:
    """Return what is said of sentencepiece's BPE: pieces with scores, and bytes for what is no piece."""
    if not content["model"].get("byte_fallback"):
        raise UnsupportedError(
            "tokenizer", where=where, got="BPE without bytes", expected="byte-level, or byte_fallback"
        )
    prefix = replaces = False
    for step in (*flat_steps(content.get("normalizer"), "normalizers"), *steps):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            replaces = True
        elif kind == "Metaspace" and step.get("replacement") == _SPACE and step.get("split") is not True:
            prefix, replaces = prefix or step.get("prepend_scheme", "always") != "never", True
        else:
            expected = f"spaces that become {_SPACE}, and one before a text or not"
            raise UnsupportedError(
                f"step {shown(kind)} of the tokenizer", where=where, got=shown(step), expected=expected
            )
    if not replaces:
        raise UnsupportedError("normalizer", where=where, got="spaces that stay", expected=f"that they become {_SPACE}")
    return Vocabulary({"model": "llama", "pre": "default", "add_space_prefix": prefix}, [], [])


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the pairs of tokens that are joined, the first first; files have them as texts or as pairs."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]


def _scores(texts: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score for each piece, by which sentencepiece joins: those that are joined sooner have a larger one."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks[text]) if text in ranks else _LEAST_SCORE if len(text) > 1 else 0.0 for text in texts]


def _tokens(
    content: Mapping[str, Any], vocab_size: int, where: Path, *, is_bytes: bool, notes: list[str]
) -> tuple[list[str], list[int]]:
    """Return the text and the type of each token id."""
    model, texts, types = content["model"], dict[int, str](), dict[int, int]()
    for text, token in model["vocab"].items():
        texts[token], types[token] = text, _NORMAL
        if not is_bytes and _BYTE_TOKEN.fullmatch(text):
            types[token] = _BYTE
    added_tokens = content.get("added_tokens") or ()
    if beyond := [added["content"] for added in added_tokens if added["id"] >= vocab_size]:
        notes.append(f"added tokens that the model has no rows for are left out: {shortlist(map(shown, beyond), 3)}")
    for added in (added for added in added_tokens if added["id"] < vocab_size):
        texts[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    if not is_bytes and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    last = max(texts, default=0)
    if last >= vocab_size:
        expected = f"ids below {vocab_size}, as the model has"
        raise CheckpointError(f"token id {last}", where=where, got=shown(texts[last]), expected=expected)
    ids = range(vocab_size)
    return [texts.get(i, f"[PAD{i}]") for i in ids], [types.get(i, _UNUSED) for i in ids]


def _special(tokenizer: Tokenizer, directory: Path, config_raw: Mapping[str, Any], losses: list[str]) -> dict[str, Any]:
    """Return the ids of special tokens, and whether BOS and EOS stand around a text."""
    said, stops = tokenizer.description(), sorted(stop_token_ids(directory, dict(config_raw)))
    ids = {name: said.get(f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    config_bos = config_raw.get("bos_token_id")
    if ids["bos"] is None and type(config_bos) is int:
        ids["bos"] = config_bos
    if ids["eos"] is None and stops:
        ids["eos"] = stops[0]
    others = [token for token in stops if token != ids["eos"]]
    around = tokenizer.encode("")
    before, after = tokenizer.bos, around[len(tokenizer.bos) :]
    for place, found, name in (("before", before, "bos"), ("behind", after, "eos")):
        if found not in ([], [ids[name]]):
            losses.append(f"the tokens that the tokenizer puts {place} a text ({shown(found)}), but for {name.upper()}")
    fields = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "unknown_token_id": ids["unk"],
        "padding_token_id": ids["pad"],
        "eot_token_id": others[0] if others else None,
    }
    known = {key: value for key, value in fields.items() if value is not None}
    return {**known, "add_bos_token": bool(before), "add_eos_token": bool(after)}


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the chat template, and the one for tools where that is another."""
    if not tokenizer.has_chat_template:
        return {}
    plain, tools = tokenizer.template_source(), tokenizer.template_source(with_tools=True)
    fields: dict[str, Any] = {"tokenizer.chat_template": plain}
    if tools != plain:
        fields.update({"tokenizer.chat_template.tool_use": tools, "tokenizer.chat_templates": ["tool_use"]})
    return fields
