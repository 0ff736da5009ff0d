"""The tokenizers library's tokenizer of a model directory: loaded, or converted from older files, and looked at.

It comes from a stranger. The library renumbers tokens that contradict each other without a word, panics where a part
makes no sense, and runs patterns and replacements that never end or fill the memory: what is known to do so is refused
here, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eightfold.errors import CheckpointError, DependencyError, EightfoldError
from eightfold.files import has_file, read_file
from eightfold.values import shorten, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

TOKENIZER = "tokenizer.json"

_MOST_GROWTH = 1000  # times that a normalizer or a decoder may lengthen a text
_MOST_SECONDS = 10.0  # for an encoding, and for each million characters
_MOST_CONVERSION = 300.0  # seconds; Qwen's 151,936 tokens take 7
_MOST_SHOWN = 300
_USUAL_LIST = 64 << 10  # bytes that added tokens take at most in most files

# Files that transformers converts, as glob -> the packages with which it reads them.
_OLDER: dict[str, tuple[str, ...]] = {
    "tokenizer.model": ("sentencepiece", "tiktoken"),
    "*.tiktoken": ("tiktoken",),
    "vocab.json": (),
}
VOCABULARIES = (TOKENIZER, *_OLDER)

# Of Qwen's tokenization_qwen.py, which is code and not run: what qwen.tiktoken does not say itself.
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What a text may consist of that patterns and charts stumble over.
_PROBES = ("a", *(part * 200 + "!" for part in ("a", "A", " ", "1", "\n", ".", "é", "a1", "a ", "Aa")))

T = TypeVar("T")


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a file that a tokenizer can be made of."""
    return any(path.is_file() for name in VOCABULARIES for path in directory.glob(name))


def load(directory: Path) -> FastTokenizer:
    """Load tokenizer.json, or convert what is there in its place.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
        DependencyError: it has to be converted, and a package for that is missing.
    """
    path = directory / TOKENIZER
    with _silence():
        fast = _read(path) if has_file(path) else convert(directory)
        fast.no_padding()
        fast.no_truncation()
        if getattr(fast.model, "dropout", None) is not None:  # of training: the same text gives other tokens each time
            fast.model.dropout = None
        _require_bounds(fast, path)
        with blaming(path, "one that encodes every text"):
            within_time(lambda: _probe(fast), path, sum(map(len, _PROBES)))
    return fast


def _probe(fast: FastTokenizer) -> None:
    for text in _PROBES:
        fast.decode(fast.encode(text).ids)


@contextlib.contextmanager
def blaming(path: Path, expected: str) -> Iterator[None]:
    """Turn what the library raises, panics included, into one line about a tokenizer.

    Raises:
        CheckpointError: something was raised.
    """
    try:
        yield
    except (EightfoldError, MemoryError, OverflowError, TypeError):
        raise
    except BaseException as error:
        # A panic of the library is not an Exception; nor is what ends the program, such as Ctrl-C.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        got = shorten(str(error), _MOST_SHOWN)
        raise CheckpointError("tokenizer", where=path, got=got, expected=expected) from None


def within_time(work: Callable[[], T], path: Path, size: int, most: float = _MOST_SECONDS) -> T:
    """Return what work returns, which lets other threads run meanwhile; give it up where it takes too long.

    Args:
        work: on a text, or on the tokenizer's file.
        path: of the tokenizer.
        size: of the text, in characters.
        most: seconds, and for each million characters.

    Raises:
        CheckpointError: it takes too long. Its thread goes on until the process ends.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    limit = most * (1 + size / 1e6)
    thread.join(limit)
    if raised:
        raise raised[0]
    if not found:
        got = f"more than {limit:.0f} s" + (f" for {size} characters" if size else " to convert it")
        raise CheckpointError(
            "tokenizer", where=path, got=got, expected="one that is ready, and encodes texts, in time"
        )
    return found[0]


def _read(path: Path) -> FastTokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    content = read_file(path)
    with blaming(path, "a tokenizers file"):
        fast = FastTokenizer.from_buffer(content)
    _require_ids(fast, content, path)
    return fast


def _require_ids(fast: FastTokenizer, content: bytes, path: Path) -> None:
    """Refuse added tokens that the library has given other ids than the file says."""
    start = re.search(rb'"added_tokens"\s*:\s*(?=\[)', content)
    for token in _list_at(content, start.end()) if start is not None else []:
        found = fast.token_to_id(token["content"])
        if token["content"] and found != token["id"]:
            raise CheckpointError(
                f"added token {shown(token['content'])}",
                where=path,
                got=f"id {token['id']}",
                expected="the next free one" if found is None else f"{found}, the next free one",
                action="Save the tokenizer again.",
            )


def _list_at(content: bytes, at: int) -> list[Any]:
    """Return a list of JSON that begins there; of a long text first a part is tried, since decoding takes its time."""
    decoder = json.JSONDecoder()
    try:
        found: list[Any] = decoder.raw_decode(content[at : at + _USUAL_LIST].decode(errors="ignore"))[0]
    except ValueError:
        found = decoder.raw_decode(content[at:].decode())[0]
    return found


def _require_bounds(fast: FastTokenizer, path: Path) -> None:
    """Refuse parts that may not end, or that blow a text up."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part, growth = getattr(fast, name), 1.0
        for step in _steps(json.loads(part.__getstate__()) if part is not None else None):
            pattern = step.get("pattern")
            regex, text = (pattern.get(key) for key in ("Regex", "String")) if isinstance(pattern, dict) else ("", None)
            if regex and _repeats_repetition(regex):
                raise CheckpointError(
                    f"pattern of the {name}",
                    where=path,
                    got=shown(regex),
                    expected="no repetition within a repetition: that may never end",
                )
            if step.get("type") in ("Replace", "Prepend"):
                growth *= max(1.0, len(step.get("content") or step.get("prepend") or "") / max(1, len(text or "")))
            if text == "" or growth > _MOST_GROWTH:
                got = "a replacement of nothing" if text == "" else f"text that grows {growth:.3g} times"
                raise CheckpointError(name, where=path, got=got, expected=f"at most {_MOST_GROWTH} times")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    for each in inner:
        yield from _steps(each)


def _repeats_repetition(regex: str) -> bool:
    """Return whether a group that may repeat something without a bound may itself be repeated without one."""
    # Escapes and classes are one character each; what is left are groups and repetitions.
    plain = re.sub(r"\\(?:[pPxu]\{[^}]*\}|.)", "x", regex, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    unbounded = re.compile(r"[*+]|\{\d*,\}")
    while (group := re.search(r"\(([^()]*)\)", plain)) is not None:
        inside, behind = group[1], plain[group.end() :]
        if unbounded.match(behind) and unbounded.search(inside):
            return True
        plain = plain[: group.start()] + ("x*" if unbounded.search(inside) else "x") + behind
    return False


def convert(directory: Path) -> FastTokenizer:
    """Make a tokenizer of sentencepiece's, tiktoken's or GPT-2's files, as transformers does.

    Raises:
        CheckpointError: there is no such file, or transformers makes nothing of it.
        DependencyError: a package is missing.
    """
    found = ((name, path) for name in _OLDER for path in sorted(directory.glob(name)) if path.is_file())
    name, older = next(found, ("", None))
    if older is None:
        raise CheckpointError(
            "tokenizer.json",
            where=directory,
            got="no such file",
            expected="the model's tokenizer",
            action="Copy it from the float model, or give token ids.",
        )
    try:
        with _silence(all_of_it=True):
            return within_time(lambda: _converted(older), older, 0, _MOST_CONVERSION)
    except (KeyboardInterrupt, SystemExit, MemoryError, EightfoldError):
        raise
    except BaseException as error:  # of a missing package transformers raises whatever it likes
        absent = [package for package in ("transformers", *_OLDER[name]) if find_spec(package) is None]
        if absent:
            raise DependencyError(
                f"a tokenizer of {older}",
                got=f"no package {' and no '.join(absent)}",
                expected="those with which it is converted",
                action="Install them: pip install 'eightfold[tokenizer]'",
            ) from None
        got = shorten(" ".join(str(error).split()), _MOST_SHOWN)
        expected = "a vocabulary that transformers can convert"
        raise CheckpointError("tokenizer", where=older, got=got, expected=expected) from None


def _converted(older: Path) -> FastTokenizer:
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.utils import logging

    logging.set_verbosity_error()
    if older.suffix == ".tiktoken":
        words = {"vocab_file": str(older), "pattern": _QWEN_PATTERN, "extra_special_tokens": list(_QWEN_TOKENS)}
        fast: FastTokenizer = TikTokenConverter(**words).converted()
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(older.parent), local_files_only=True, trust_remote_code=False)
        fast = tokenizer.backend_tokenizer
    return fast


@contextlib.contextmanager
def _silence(*, all_of_it: bool = False) -> Iterator[None]:
    """Keep from the user what is written to stderr before an error: a panic is told there before it is raised.

    Without an error it comes out at the end, for it may be what another thread has to say; not so with `all_of_it`.
    """
    kept, held = os.dup(2), os.memfd_create("stderr")
    try:
        os.dup2(held, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
        os.lseek(held, 0, os.SEEK_SET)
        while not all_of_it and (written := os.read(held, 1 << 16)):
            os.write(kept, written)
    finally:
        os.close(kept)
        os.close(held)
