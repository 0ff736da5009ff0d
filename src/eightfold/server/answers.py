"""Answers as JSON, whole and in the pieces of a stream.

A piece is put together from ready-made ends and what differs, because there is one for each token of each client.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.engine.reasoning import Start
from eightfold.server.extras import Extras, timings_of, usage_of
from eightfold.server.token_texts import Offsets, TokenTexts, finite
from eightfold.server.tool_parsers import Parts, ToolCall, ToolParser, ToolUse, text_and_calls

if TYPE_CHECKING:
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled
    from eightfold.server.fields import ApiError
    from eightfold.server.logs import Record

DONE = b"data: [DONE]\n\n"

_FLAT_ITEMS = 4096  # numbers and texts that are encoded together
_PLAIN = Start()  # of an answer without a thought
_NOTHING = Extras()

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(content: Any) -> bytes:
    """Return JSON in UTF-8."""
    return _encode(content).encode("utf-8", "replace")


def in_parts(content: Any, depth: int = 5) -> Iterator[bytes]:
    """Yield JSON as `to_json` returns it, each part without those inside: an encoder lets no other thread run."""
    if depth and isinstance(content, dict):
        for at, (name, value) in enumerate(content.items()):
            yield (b"," if at else b"{") + to_json(name) + b":"
            yield from in_parts(value, depth - 1)
        yield b"}" if content else b"{}"
    elif depth and isinstance(content, list):
        is_flat = not any(isinstance(value, (dict, list)) for value in content)
        step = _FLAT_ITEMS if is_flat else 1
        for at in range(0, len(content), step):
            yield b"," if at else b"["
            if is_flat:
                yield to_json(content[at : at + step])[1:-1]
            else:
                yield from in_parts(content[at], depth - 1)
        yield b"]" if content else b"[]"
    else:
        yield to_json(content)


def event(content: Any) -> bytes:
    """Return one event of a stream."""
    return b"data: " + to_json(content) + b"\n\n"


class AnswerWriter:
    """Writes the answers to a request, whole or in pieces; each endpoint has its own way."""

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        """Return the events of a prompt's next output; none where it brings nothing."""
        raise NotImplementedError

    def whole(self, outputs: Sequence[RequestOutput], record: Record) -> dict[str, Any]:
        """Return all of it, from the finished outputs of all prompts."""
        raise NotImplementedError

    def end(self, record: Record) -> bytes:
        """Return the last events of a stream whose answers are complete."""
        raise NotImplementedError

    def failure(self, problem: ApiError) -> bytes:
        """Return the last events of a stream that has begun and fails."""
        raise NotImplementedError


class ChoicesWriter(AnswerWriter):
    """Writes answers as `choices`, the way of chats and completions.

    Args:
        prefix: of the id.
        kind: what OpenAI calls the object.
        model: the name that answers carry.
        texts: of single tokens.
        n: answers to each prompt.
        extras: what answers have beside themselves.
    """

    _names_prompts = False  # whether the ids of a prompt's tokens stand in its choices, and not beside them

    def __init__(
        self, prefix: str, kind: str, model: str, texts: TokenTexts, n: int, extras: Extras = _NOTHING
    ) -> None:
        self._common = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        if extras.fingerprint is not None:
            self._common["system_fingerprint"] = extras.fingerprint
        self._texts, self._n, self._extras = texts, n, extras
        self._ended: set[int] = set()
        self._reasoning_tokens: int | None = None  # None: nobody can tell
        # A stream with usage has the field everywhere, and null everywhere but at its end.
        self._end = ("]" + (',"usage":null' if extras.usage else "") + "}\n\n").encode()
        self._begin = b"data: " + _encode(self._common)[:-1].encode() + b',"choices":['
        self._unsent: dict[int, list[int]] = {}  # of each choice that has begun, ids that no event has had
        self._named: set[int] = set()  # choices that had the ids of their prompt
        self._once: tuple[dict[str, Any], str] | None = None  # what only the next event has, in its choice and around

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        choices = [(at * self._n + answer.index, answer) for answer in output.outputs]
        choices = [(index, answer) for index, answer in choices if index not in self._ended]
        if self._extras.are_in_events:
            return b"".join([self._piece_with_extras(index, answer, output) for index, answer in choices])
        return b"".join([self._piece(index, answer, output) for index, answer in choices])

    def _piece_with_extras(self, index: int, answer: CompletionOutput, output: RequestOutput) -> bytes:
        """Return the events of a choice, of which the first has the ids of the tokens since the one before."""
        extras, generated, around = self._extras, self._told(len(answer.token_ids)), dict[str, Any]()
        if extras.usage or extras.usage_so_far:
            around["usage"] = usage_of(len(output.prompt_ids), generated) if extras.usage_so_far else None
        if extras.timings:
            around["timings"] = timings_of([output], generated)
        self._end = f"]{_members(around)}}}\n\n".encode()
        if not extras.token_ids:
            return self._piece(index, answer, output)
        waiting = self._unsent.setdefault(index, [])
        waiting += answer.delta_token_ids[:generated]
        prompt = {} if index in self._named else {"prompt_token_ids": list(output.prompt_ids)}
        beside, around = (prompt, {}) if self._names_prompts else ({}, prompt)
        self._once = {"token_ids": waiting, **beside}, _members(around)
        piece = self._piece(index, answer, output)
        if self._once is None:
            self._unsent[index] = []
            self._named.add(index)
        self._once = None
        return piece

    def whole(self, outputs: Sequence[RequestOutput], record: Record) -> dict[str, Any]:
        choices = [
            self._whole(at * self._n + answer.index, answer, output)
            for at, output in enumerate(outputs)
            for answer in output.outputs
        ]
        content = self._content(choices, record)
        if self._extras.token_ids:
            self._add_token_ids(content, outputs)
        if self._extras.timings:
            content["timings"] = timings_of(outputs, self._told(record.generated_tokens))
        return content

    def _add_token_ids(self, content: dict[str, Any], outputs: Sequence[RequestOutput]) -> None:
        found = [(output, answer) for output in outputs for answer in output.outputs]
        for choice, (output, answer) in zip(content["choices"], found, strict=True):
            choice["token_ids"] = answer.token_ids[: self._told(len(answer.token_ids))]
            where = choice if self._names_prompts else content
            where["prompt_token_ids"] = list(output.prompt_ids)

    def end(self, record: Record) -> bytes:
        return (event(self._content([], record)) if self._extras.usage else b"") + DONE

    def failure(self, problem: ApiError) -> bytes:
        return event(problem.body())  # which is not followed by [DONE]

    def _content(self, choices: list[Any], record: Record) -> dict[str, Any]:
        usage: dict[str, Any] = {
            **usage_of(record.prompt_tokens, self._told(record.generated_tokens)),
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens if record.tells_cached else None},
        }
        if self._reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._reasoning_tokens}
        return {**self._common, "choices": choices, "usage": usage}

    def _told(self, generated: int) -> int:
        return generated

    def _choice(self, choice: str) -> bytes:
        if self._once is not None:
            (beside, around), self._once = self._once, None
            choice = f"{choice[:-1]}{_members(beside)}}}"
            return self._begin + choice.encode("utf-8", "replace") + b"]" + around.encode() + self._end[1:]
        return self._begin + choice.encode("utf-8", "replace") + self._end

    def _piece(self, index: int, answer: CompletionOutput, output: RequestOutput) -> bytes:
        raise NotImplementedError

    def _whole(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        raise NotImplementedError


def _or_null(value: Any) -> str:
    """Return JSON of what most events of a stream leave out."""
    return "null" if value is None else _encode(value)


def _members(values: dict[str, Any]) -> str:
    """Return what goes on in a JSON object that has members already."""
    return "".join(f',"{name}":{_encode(value)}' for name, value in values.items())


class Pieces(NamedTuple):
    """What more of an answer to a chat makes certain."""

    reasoning: str
    content: str
    calls: list[ToolCall]


class ChatParser:
    """Splits one answer to a chat into reasoning, content and calls, as it comes.

    Args:
        tools: what the request says about tools. What looks like a call inside of the reasoning is none.
        start: how the answer begins.
    """

    def __init__(self, tools: ToolUse, start: Start = _PLAIN) -> None:
        self._thoughts, self._tools = start.parser(), ToolParser(tools)

    @property
    def calls(self) -> int:
        """How many there were so far."""
        return self._tools.calls

    def push(self, text: str, *, is_last: bool) -> Pieces:
        """Take more of the answer; return what is certain now: at the last, all."""
        reasoning, parts = self.push_in_order(text, is_last=is_last)
        return Pieces(reasoning, *text_and_calls(parts))

    def push_in_order(self, text: str, *, is_last: bool) -> tuple[str, Parts]:
        """Take more of the answer; return the reasoning that is certain now, and what stands behind it."""
        reasoning, text = self._thoughts.push(text)
        if is_last:
            more, rest = self._thoughts.finish()
            reasoning, text = reasoning + more, text + rest
        parts = self._tools.push_in_order(text)
        return reasoning, [*parts, *self._tools.finish_in_order()] if is_last else parts


class ChatAnswer(ChoicesWriter):
    """The answer to a chat; its choices are the n answers to one prompt.

    Args:
        model, texts, extras: as every answer has them.
        tools: what the request says about tools.
        start: how an answer begins.
        streams: whether it is written in pieces.
        shows_reasoning: whether it is told what the model thought, and the log-probabilities, which would tell it too.
        echo: what comes before each answer.
    """

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tools: ToolUse,
        start: Start = _PLAIN,
        *,
        streams: bool,
        extras: Extras = _NOTHING,
        shows_reasoning: bool = True,
        echo: str = "",
    ) -> None:
        kind = "chat.completion.chunk" if streams else "chat.completion"
        super().__init__("chatcmpl", kind, model, texts, 1, extras)
        self._tools, self._start, self._echo = tools, start, echo
        self._hides = start.style is not None and not shows_reasoning
        self._parsers: dict[int, ChatParser] = {}

    def _piece(self, index: int, answer: CompletionOutput, output: RequestOutput) -> bytes:
        reason, logprobs = answer.finish_reason, None if self._hides else answer.delta_logprobs or None
        parser, piece = self._parsers.get(index), b""
        if parser is None:
            parser = self._parsers[index] = ChatParser(self._tools, self._start)
            piece = self._delta(index, f'{{"role":"assistant","content":{_encode(self._echo)}}}', None)
        before = parser.calls
        reasoning, text, calls = parser.push(answer.delta_text, is_last=reason is not None)
        if reasoning and not self._hides:
            piece += self._delta(index, _encode(_shown(reasoning)), logprobs)
            logprobs = None
        if text or logprobs:
            piece += self._delta(index, '{"content":' + _encode(text) + "}", logprobs)
        for number, call in enumerate(calls, before):
            piece += self._delta(index, _encode({"tool_calls": [{"index": number, **call.as_json()}]}), None)
        if reason is None:
            return piece
        self._ended.add(index)
        self._count_reasoning(answer)
        ends = _encode(self._tools.ends(reason, parser.calls))
        return piece + self._choice(
            f'{{"index":{index},"delta":{{}},"logprobs":null,'
            f'"finish_reason":{ends},"stop_reason":{_encode(answer.stop_reason)}}}'
        )

    def _delta(self, index: int, delta: str, logprobs: Sequence[Sampled] | None) -> bytes:
        shown = "null" if logprobs is None else _encode(self._texts.chat_logprobs(logprobs))
        return self._choice(f'{{"index":{index},"delta":{delta},"logprobs":{shown},"finish_reason":null}}')

    def whole(self, outputs: Sequence[RequestOutput], record: Record) -> dict[str, Any]:
        """Return all of it, from the finished output of the only prompt."""
        content = super().whole(outputs, record)
        if outputs[0].prompt_logprobs is not None:
            content["prompt_logprobs"] = self._texts.prompt_logprobs(outputs[0].prompt_logprobs)
        return content

    def _whole(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        self._count_reasoning(answer)
        reasoning, text, calls = ChatParser(self._tools, self._start).push(answer.text, is_last=True)
        text = self._echo + text
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if reasoning and not self._hides:
            message |= _shown(reasoning)
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": None if self._hides else self._texts.chat_logprobs(answer.logprobs),
            "finish_reason": self._tools.ends(answer.finish_reason, len(calls)),
            "stop_reason": answer.stop_reason,
        }

    def _count_reasoning(self, answer: CompletionOutput) -> None:
        if self._start.tags is not None:
            self._reasoning_tokens = (self._reasoning_tokens or 0) + (
                self._start.tokens_of_thought(answer.token_ids) or 0
            )


def _shown(reasoning: str) -> dict[str, str]:
    """Return what a message says of the model's reasoning, by both names that clients of this field look for."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


class Echo(NamedTuple):
    """A prompt before its answers.

    Attributes:
        text: as the answers have it.
        before: how many of its tokens stand before that text, such as BOS.
    """

    text: str
    before: int = 0


class CompletionAnswer(ChoicesWriter):
    """The answer to a completion; its choices are the n answers to each prompt in turn.

    Args:
        model, texts, n, extras: as every answer has them.
        logprobs: how many of the likeliest tokens are reported at each position; None: nothing is.
        echo: the prompts, which come first in the answers; None: they do not.
        only_prompts: nothing was asked for but the prompts' log-probabilities.
        keeps_special: whether special tokens are in the answers' texts.
    """

    _names_prompts = True

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        *,
        n: int,
        logprobs: int | None,
        echo: Sequence[Echo] | None,
        only_prompts: bool,
        extras: Extras = _NOTHING,
        keeps_special: bool = False,
    ) -> None:
        super().__init__("cmpl", "text_completion", model, texts, n, extras)
        self._logprobs, self._echo, self._only_prompts = logprobs, echo, only_prompts
        self._keeps_special = keeps_special
        self._offsets: dict[int, Offsets] = {}  # where the tokens of each choice that has begun are

    def _told(self, generated: int) -> int:
        return 0 if self._only_prompts else generated  # the engine generates one token at least

    def _piece(self, index: int, answer: CompletionOutput, output: RequestOutput) -> bytes:
        is_first, reason = index not in self._offsets, answer.finish_reason
        text = self._text(index, answer.delta_text, is_first=is_first)
        logprobs = self._shown(index, answer.delta_logprobs, output, is_first=is_first)
        if not (text or logprobs or reason is not None):
            return b""
        if reason is not None:
            self._ended.add(index)
        return self._choice(
            f'{{"index":{index},"text":{_encode(text)},"logprobs":{_or_null(logprobs)},'
            f'"finish_reason":{_or_null(reason)},"stop_reason":{_or_null(answer.stop_reason)}}}'
        )

    def _text(self, index: int, text: str, *, is_first: bool) -> str:
        text = "" if self._only_prompts else text
        return self._echo[index // self._n].text + text if self._echo is not None and is_first else text

    def _shown(
        self, index: int, sampled: Sequence[Sampled] | None, output: RequestOutput, *, is_first: bool
    ) -> dict[str, Any] | None:
        """Return the log-probabilities of the next tokens, in front of them the prompt's if it is echoed."""
        if is_first:
            self._offsets[index] = self._texts.offsets(keep_special=self._keeps_special)
        if self._logprobs is None:
            return None
        shown = list[Any]() if self._only_prompts else list[Any](sampled or ())
        own, prompt, offsets = self._offsets[index], tuple[int, ...](), list[int]()
        token_ids = [each.token_id for each in shown]
        if self._echo is not None and is_first:
            echo = self._echo[index // self._n]
            own.begin = len(echo.text)
            if output.prompt_logprobs is not None:
                prompt, shown = tuple(output.prompt_ids), [*output.prompt_logprobs, *shown]
                offsets = self._texts.offsets_of_prompt(prompt, echo.before)
        offsets += [own.take(token) for token in token_ids]
        tokens = [self._texts.of(token) for token in (*prompt, *token_ids)]
        likeliest = [None if each is None else self._likeliest(each) for each in shown] if self._logprobs else None
        return {
            "tokens": tokens,
            "token_logprobs": [None if each is None else finite(each.logprob) for each in shown],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _likeliest(self, sampled: Sampled) -> dict[str, float | None]:
        found = dict[str, float | None]()
        for token, logprob in (*sampled.top[: self._logprobs], (sampled.token_id, sampled.logprob)):
            found.setdefault(self._texts.of(token), finite(logprob))
        return found

    def _whole(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": self._text(index, answer.text, is_first=True),
            "logprobs": self._shown(index, answer.logprobs, output, is_first=True),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if output.prompt_logprobs is not None and self._echo is None:
            choice["prompt_logprobs"] = self._texts.prompt_logprobs(output.prompt_logprobs)
        return choice
