"""A tokenizer's files in terms that transformers 4 and 5 both read.

MindIE pins transformers 4.43 with tokenizers 0.19; what transformers 5 and newer tokenizers save, these refuse or drop.
Each difference below was tried with transformers 4.43.1, 4.57.1 and 5.24.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.errors import EightfoldError, one_of
from eightfold.files import MAX_LIST_BYTES, has_file, read_json, write_json
from eightfold.tokenizer import LLAMA_CLASSES, is_of_5, named_templates, read_templates
from eightfold.values import shorten, shown
from eightfold.vocabulary import TOKENIZER, convert, has_tokenizer, load

SETTINGS = "tokenizer_config.json"

FAST = "PreTrainedTokenizerFast"  # the name that 4 and 5 both have for a tokenizer that is all in tokenizer.json

# Classes of transformers 4.43 for models that write, as the first part of their names.
_CLASSES = (
    *("Bert", "Bloom", "ByT5", "CodeGen", "CodeLlama", "Cohere", "Cpm", "DebertaV2", "GPT2", "GPTNeoX", "Gemma"),
    *("Llama", "OpenAIGPT", "PreTrained", "Qwen2", "Roberta", "T5", "TransfoXL", "XGLM", "XLMRoberta", "XLNet"),
)

# Parts of tokenizer.json that tokenizers 0.19 does not have.
_NEW_PARTS = {"normalizer": {"ByteLevel"}, "pre_tokenizer": {"FixedLength"}}


@dataclass
class TokenizerFiles:
    """What a directory says about its tokenizer.

    Attributes:
        settings: tokenizer_config.json; empty where there is none.
        fast: tokenizer.json; empty where there is none.
        templates: the chat templates by name, of the settings and of files beside them.
    """

    settings: dict[str, Any]
    fast: dict[str, Any]
    templates: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read those files that are there.

        Raises:
            CheckpointError: one of them cannot be read, or not be used.
        """
        if (directory / TOKENIZER).is_file():
            load(directory)
        settings, fast = (
            read_json(directory / name, MAX_LIST_BYTES) if has_file(directory / name) else {}
            for name in (SETTINGS, TOKENIZER)
        )
        return cls(settings, fast, read_templates(directory, settings))

    def gaps(self) -> dict[str, str]:
        """Return what transformers 4.43 or tokenizers 0.19 cannot read: rule of MindIE's -> what stands there."""
        found = {}
        name = str(self.settings.get("tokenizer_class") or FAST)
        if name.removesuffix("Fast").removesuffix("Tokenizer") not in _CLASSES and "auto_map" not in self.settings:
            found["tokenizer-class"] = shorten(name)
        if isinstance(extra := self.settings.get("extra_special_tokens"), list):
            found["extra-tokens"] = shown(extra)
        if any(isinstance(merge, list) for merge in self._merges[:1]):
            found["tokenizer-merges"] = shown(self._merges[0])
        if new := [f"{key} {kind}" for key, kinds in _NEW_PARTS.items() for kind in _types(self.fast, key) & kinds]:
            found["tokenizer-part"] = new[0]
        own = named_templates(self.settings.get("chat_template"))
        if apart := [name for name, text in self.templates.items() if own.get(name) != text]:
            found["chat-template"] = f"the template {one_of(apart)} in a file of its own"
        if self._is_llama and is_of_5(self.settings) and self.around_a_text != (True, False):
            found["bos"] = "no add_bos_token"
        return found

    @property
    def _is_llama(self) -> bool:
        return bool(self.fast) and self.settings.get("tokenizer_class") in LLAMA_CLASSES

    @property
    def around_a_text(self) -> tuple[bool, bool]:
        """Whether tokenizer.json puts anything before a text, and behind it: what transformers 5 goes by."""
        return _around(self.fast.get("post_processor"))

    @property
    def is_ambiguous(self) -> bool:
        """Whether transformers 4 puts BOS or EOS by the settings where 5 does not, or the other way round."""
        switches = [self.settings.get("add_bos_token", True), self.settings.get("add_eos_token", False)]
        return self._is_llama and not is_of_5(self.settings) and self.around_a_text != (*map(bool, switches),)

    def close_gaps(self) -> None:
        """Say the same in the words of transformers 4, which 5 reads too, as far as 4 has words for it."""
        settings, gaps = self.settings, self.gaps()
        if "tokenizer-class" in gaps and self.fast:
            settings["tokenizer_class"] = FAST
        if "extra-tokens" in gaps:
            older = settings.get("additional_special_tokens")
            extra = settings.pop("extra_special_tokens")
            settings["additional_special_tokens"] = [*(older if isinstance(older, list) else []), *extra]
        if "chat-template" in gaps:
            listed = [{"name": name, "template": text} for name, text in self.templates.items()]
            settings["chat_template"] = listed if len(listed) > 1 else listed[0]["template"]
        if "tokenizer-merges" in gaps and all(map(_is_merge, self._merges)):
            self.fast["model"]["merges"] = [" ".join(merge) for merge in self._merges]
        # transformers 5 saves the effect of these two switches in tokenizer.json, and not the switches that 4 goes by.
        if self._is_llama and is_of_5(settings):
            settings["add_bos_token"], settings["add_eos_token"] = self.around_a_text

    @property
    def _merges(self) -> list[Any]:
        model = self.fast.get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        return merges if isinstance(merges, list) else []


def write_for_both(directory: Path) -> str | None:
    """Rewrite a directory's tokenizer so that transformers 4 and 5 both read it; nothing changes where they do.

    Returns:
        A note for the user about what transformers 4 does not read, if there is such a thing.
    """
    if not has_tokenizer(directory):
        return "the model has no tokenizer, and so OUT has none: MindIE and vllm-ascend need one."
    try:
        made = "" if (directory / TOKENIZER).exists() else _convert(directory)
        files = TokenizerFiles.read(directory)
    except EightfoldError as error:
        return f"the tokenizer is copied as it is, and loaders may refuse it: {error}"
    settings, gaps = dict(files.settings), files.gaps()
    files.close_gaps()
    if files.settings != settings:
        write_json(directory / SETTINGS, files.settings)
    left = files.gaps()
    if "tokenizer-merges" in gaps.keys() - left:
        write_json(directory / TOKENIZER, files.fast)
    found = ", ".join(left.values())
    return f"the tokenizer has what MindIE's transformers 4.43 cannot read: {found}." if left else made or None


def _convert(directory: Path) -> str:
    """Write tokenizer.json from older files; return a note about it."""
    fast = convert(directory)
    write_json(directory / TOKENIZER, json.loads(fast.to_str()))
    count = fast.get_vocab_size()
    return f"transformers has made a tokenizer.json of the model's older files, with {count} tokens."


def _is_merge(merge: Any) -> bool:
    """Return whether these are two texts that can be told apart when one space stands between them."""
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(x, str) and " " not in x for x in merge)


def _types(content: dict[str, Any], key: str) -> set[str]:
    """Return the types of a normalizer or pre-tokenizer, those in a sequence too."""
    return {str(part.get("type")) for part in _parts(content.get(key))}


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "processors"):
            inner = part.get(key)
            for each in inner if isinstance(inner, list) else []:
                yield from _parts(each)


def _around(processor: Any) -> tuple[bool, bool]:
    """Return whether a post-processor puts anything before a text, and behind it."""
    for part in _parts(processor):
        if "cls" in part:
            return True, True
        single = part.get("single")
        if isinstance(single, list) and (kinds := ["Sequence" in each for each in single]) and any(kinds):
            return not kinds[0], not kinds[-1]
    return False, False
