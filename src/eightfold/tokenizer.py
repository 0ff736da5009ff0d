"""Text <-> token ids by the model's own tokenizer.json, and its chat template.

The template is a stranger's program: it runs in jinja2's sandbox, in another process (template.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eightfold import vocabulary
from eightfold.errors import CheckpointError, InputError, one_of
from eightfold.files import has_file, read_file, read_json
from eightfold.template import TemplateError, compile_template, render_template
from eightfold.values import TEXT, WHOLE, shown

if TYPE_CHECKING:
    from eightfold.messages import Message

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A character has four bytes at most: up to so many replacement characters may be the beginning of one.
_MAX_PARTS = 3

# Tokens that may wait until the text ends with a character. What takes longer is no UTF-8, or a chain of tokens that
# each end one character and begin the next.
MAX_WAITING = 64

# Tokenizer classes for which transformers 4, and so the engines of this format, put BOS and EOS around a text by
# add_bos_token and add_eos_token of tokenizer_config.json, and not by tokenizer.json's post-processor.
LLAMA_CLASSES = ("LlamaTokenizerFast", "LlamaTokenizer", "CodeLlamaTokenizerFast", "CodeLlamaTokenizer")
_LLAMA_MODELS = ("llama", "mistral")  # model_type of models that get the first where they name no class
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # of these classes

T = TypeVar("T")


class Tokenizer:
    """The tokenizer of a model directory.

    Attributes:
        directory: the folder.
        chat_template: a jinja2 template to use in place of the model's; None for the model's own.
        add_bos: whether BOS is put before a text; None: as transformers 4 does with this model. A conversation begins
            as its template says; True puts BOS before it where the template does not.
        notes: what a person should know about this tokenizer, one line each.

    Raises:
        CheckpointError: tokenizer.json is not there, or damaged; BOS or EOS is needed and is no token of it.
    """

    def __init__(self, directory: Path, chat_template: str | None = None, *, add_bos: bool | None = None) -> None:
        self.directory = directory
        self.chat_template = chat_template
        self.add_bos = add_bos
        self.notes = list[str]()
        self._fast = vocabulary.load(directory)
        self._before, self._after = self._around_a_text()

    def _around_a_text(self) -> tuple[list[int], list[int]]:
        """Return the ids that stand before and behind every text."""
        alone, whole = (self._encode("a", special_tokens=special) for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0) if alone else len(whole)
        own = before, after = whole[:at], whole[at + len(alone) :]
        if strange := [token for token in (*before, *after) if self.piece(token) is None]:
            where, got = self.directory / vocabulary.TOKENIZER, f"token id {strange[0]}"
            raise CheckpointError("post-processor", where=where, got=got, expected="a token of the vocabulary")
        name = self._class_by_settings()
        if name is not None:
            before = self._named("bos_token") if self._settings.get("add_bos_token", True) else []
            after = self._named("eos_token") if self._settings.get("add_eos_token", False) else []
        if self.add_bos is not None:
            before = self._named("bos_token") if self.add_bos else []
            if self.add_bos and not before:
                raise CheckpointError(
                    "BOS",
                    where=self.directory,
                    got="none",
                    expected="bos_token in tokenizer_config.json",
                    action="Leave out `add_bos`.",
                )
        elif (before, after) != own:
            here, there = (f"{self._pieces(b)} text {self._pieces(a)}".strip() for b, a in ((before, after), own))
            self.notes.append(
                f"a text is encoded as `{here}`, as transformers 4 does for {name}; tokenizer.json alone: `{there}`."
            )
        return before, after

    def _class_by_settings(self) -> str | None:
        """Return the tokenizer's class if transformers 4 puts BOS and EOS by its settings."""
        name, config = self._settings.get("tokenizer_class"), self.directory / "config.json"
        if name is None and has_file(config) and read_json(config).get("model_type") in _LLAMA_MODELS:
            name = LLAMA_CLASSES[0]
        return name if name in LLAMA_CLASSES and not is_of_5(self._settings) else None

    def _named(self, name: str) -> list[int]:
        """Return the id of bos_token or eos_token in a list, which is empty where the model has none."""
        text = self._special_tokens.get(name)
        if text is None and name not in self._settings and self._class_by_settings() is not None:
            text = _DEFAULT_TOKENS[name]
        found = self._fast.token_to_id(text) if text is not None and TEXT.fits(text) else None
        if found is None and name in self._special_tokens:
            raise CheckpointError(name, where=self.directory, got=shown(text), expected="a token of tokenizer.json")
        return [] if found is None else [found]

    def _pieces(self, ids: list[int]) -> str:
        return " ".join(self.piece(token) or "" for token in ids)

    @property
    def bos(self) -> list[int]:
        """The ids that are put before a text: BOS, or none."""
        return list(self._before)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return token ids; with `special_tokens` also those that the model puts around a text (such as BOS).

        Raises:
            InputError: the text holds half a surrogate pair: JSON and the command line let one through.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "text", got=f"character {error.start} that is not Unicode", expected="text that UTF-8 can hold"
            ) from None
        ids = self._encode(text, special_tokens=False)
        return [*self._before, *ids, *self._after] if special_tokens else ids

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        path = self.directory / vocabulary.TOKENIZER
        with vocabulary.blaming(path, "one that encodes every text"):
            # Of the library's calls this one lets other threads run meanwhile, and leaves out what is not needed.
            encode = self._fast.encode_batch_fast
            work = lambda: list(encode([text], add_special_tokens=special_tokens)[0].ids)  # noqa: E731
            return vocabulary.within_time(work, path, len(text))

    def decode(self, token_ids: Sequence[int], *, keep_special: bool | Collection[int] = False) -> str:
        """Return text, without special tokens unless they are to be kept: all of them, or those with these ids."""
        if not isinstance(keep_special, bool):
            skipped = self._special_ids.difference(keep_special)
            token_ids, keep_special = [token for token in token_ids if token not in skipped], True
        try:
            return str(self._fast.decode(list(token_ids), skip_special_tokens=not keep_special))
        except BaseException:  # only now: a context manager takes longer than most tokens do
            with vocabulary.blaming(self.directory / vocabulary.TOKENIZER, "one that decodes every token"):
                raise

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by their text."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, as tokenizer.json spells them."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @property
    def content(self) -> bytes:
        """What tokenizer.json holds, or would hold had it been saved."""
        path = self.directory / vocabulary.TOKENIZER
        return path.read_bytes() if path.is_file() else str(self._fast.to_str()).encode()

    def piece(self, token_id: int) -> str | None:
        """Return a token as tokenizer.json spells it, which need not be text; None if there is no such token."""
        found = self._fast.id_to_token(token_id)
        return None if found is None else str(found)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render messages with the model's chat template and return token ids."""
        rendered = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
        return self.encode(rendered, special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages with the model's chat template.

        Args:
            messages: the conversation so far.
            add_generation_prompt: whether the assistant's turn is opened at the end.
            continue_final_message: whether the last message, the assistant's, is left open: the text ends where what
                it says does, its reasoning_content where it says nothing else.
            tools: descriptions of functions that the assistant may call, as the template expects them.
            variables: further ones that this template knows, such as enable_thinking; none of the above.

        Raises:
            CheckpointError: the model has no chat template, or one that takes too long or too much memory.
            InputError: the template refuses these messages, or does not show the last one as it is.
        """
        from eightfold.messages import Opening

        opening = Opening(messages) if continue_final_message else None
        given = {
            **(variables or {}),
            **self._special_tokens,
            "messages": list(messages) if opening is None else opening.messages,
            "tools": list(tools) if tools else None,  # templates ask whether it is none: an undefined name is not
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._with_template(lambda source: render_template(source, given), with_tools=bool(tools))
        rendered = rendered if opening is None else opening.cut(rendered)
        bos = self.decode(self._before, keep_special=True) if self.add_bos else ""
        return rendered if rendered.startswith(bos) else bos + rendered

    def with_template(self, chat_template: str) -> Tokenizer:
        """Return the same tokenizer with another chat template."""
        other = copy(self)
        other.chat_template = chat_template
        other.__dict__.pop("_templates", None)  # those that were read
        return other

    def description(self) -> dict[str, Any]:
        """Return what tokenizer_config.json says, with special tokens as texts and ids; None where there is none."""
        special = {name: self._special_tokens.get(name) for name in _SPECIAL}
        ids = {f"{name}_id": None if text is None else self._fast.token_to_id(text) for name, text in special.items()}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings, **special, **ids}

    def _with_template(self, work: Callable[[str], T], *, with_tools: bool = False) -> T:
        """Return what work on one of the chat templates returns, with errors that say what is wrong with it."""
        source = self.template_source(with_tools=with_tools)
        try:
            return work(source)
        except TemplateError as error:
            if error.fault == "refusal":
                raise InputError(
                    "messages", got=error, expected="roles and contents that the chat template accepts"
                ) from None
            where = self.directory if self.chat_template is None else None
            expected = "a jinja2 template" if error.fault == "syntax" else "one that ends within its limits"
            raise CheckpointError("chat template", where=where, got=error, expected=expected) from None

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template: one that was given, or the model's."""
        return "default" in self._templates

    def require_template(self) -> None:
        """Check the chat template as far as that goes without messages.

        Raises:
            CheckpointError: there is none, or it is not a jinja2 template.
        """
        self._with_template(compile_template)

    def template_source(self, *, with_tools: bool = False) -> str:
        """Return the chat template; with tools the one that is for them, if there is one.

        Raises:
            CheckpointError: there is none.
        """
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise CheckpointError(
                "chat template",
                where=self.directory,
                got=f"only those named {one_of(self._templates)}" if self._templates else "none",
                expected="chat_template.jinja or tokenizer_config.json's",
                action="This may be a base model: leave out `chat`.",
            )
        return self._templates["default"]

    @cached_property
    def _templates(self) -> dict[str, str]:
        """The chat templates by name: the one that was given, or those in the files that transformers reads."""
        if self.chat_template is not None:
            return {"default": self.chat_template}
        return read_templates(self.directory, self._settings)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        paths = [self.directory / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
        return {key: value for path in paths if has_file(path) for key, value in read_json(path).items()}

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        found = {}
        for name in _SPECIAL:
            token = self._settings.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[name] = text
        return found


def read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a directory's chat templates by name: of the files that transformers 5 reads, and of the settings.

    Raises:
        CheckpointError: one is not UTF-8.
    """
    paths = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if has_file(path := directory / "chat_template.jinja"):
        paths["default"] = path
    older = directory / "chat_template.json"  # of processors
    return {
        **named_templates(read_json(older).get("chat_template") if has_file(older) else None),
        **named_templates(settings.get("chat_template")),
        **{name: _read_template(path) for name, path in paths.items()},
    }


def _read_template(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "chat template", where=path, got=f"byte {error.start} that is not UTF-8", expected="UTF-8 text"
        ) from None


def named_templates(source: Any) -> dict[str, str]:
    """Return chat templates by name: of a text, an object, or a list of objects with name and template."""
    if isinstance(source, list):
        source = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
    named = source if isinstance(source, dict) else {"default": source}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def stop_token_ids(directory: Path, config_raw: dict[str, Any]) -> frozenset[int]:
    """Return the ids that end a generation: generation_config.json's, else config.json's."""
    path = directory / "generation_config.json"
    settings = read_json(path) if has_file(path) else {}
    value = settings.get("eos_token_id")
    parts = config_raw, config_raw.get("text_config")  # that of a model that sees images says it in either
    values = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    if value is None:
        value = next((ids for ids in values if ids is not None), None)
    ids: Iterable[Any] = value if isinstance(value, list) else [value]
    return frozenset(token for token in ids if WHOLE.fits(token))


def is_of_5(settings: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer_config.json is of transformers 5, which goes by tokenizer.json alone."""
    return "backend" in settings and "add_bos_token" not in settings


class StreamDecoder:
    """Turns tokens into whole characters, one token after the other, at a cost that does not grow.

    What decoding gives for a token depends on those before it: a space may belong to it or not, and a character may
    have begun there. So some tokens are decoded again as context, and the text that they gave is left out.

    Args:
        tokenizer: the model's.
        keep_special: whether special tokens have a text.
        inside: whether the text is taken as the middle of another one, where no space is dropped.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, keep_special: bool | Collection[int] = False, inside: bool = False
    ) -> None:
        self._tokenizer, self._keep_special = tokenizer, keep_special
        # Context, and tokens whose text was not returned whole.
        self._ids = tokenizer.encode("a", special_tokens=False) if inside else list[int]()
        self._context = len(self._ids)  # how many of them are context
        self._returned = len(self._decode(self._ids)) if inside else 0  # characters of their text that were returned

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        end = len(text.rstrip(_REPLACEMENT))
        if end == len(text):
            return self._move_on(text)
        if len(self._ids) - self._context > MAX_WAITING:
            return self._shorten(text, end)
        released = text[self._returned : end]
        self._returned += len(released)
        return released

    def finish(self) -> str:
        """Return what was held back and never completed."""
        return self._move_on(self._decode(self._ids))

    def _move_on(self, text: str) -> str:
        """Return all of the text; its tokens become the context of those to come."""
        released = text[self._returned :]
        if released:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._returned = len(self._decode(self._ids))
        elif len(self._ids) - self._context > MAX_WAITING:  # special tokens and the like
            del self._ids[self._context :]
        return released

    def _shorten(self, text: str, end: int) -> str:
        """Return all but what may still become a character; of the tokens only the last ones stay, as context."""
        end = max(end, len(text) - _MAX_PARTS, self._returned)
        released = text[self._returned : end]
        self._ids = self._ids[-2 * _MAX_PARTS :]
        self._context = len(self._ids)
        self._returned = len(self._decode(self._ids)) - (len(text) - end)
        return released

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, keep_special=self._keep_special)
