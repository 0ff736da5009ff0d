"""Answers as JSON: whole, and in the pieces of a stream.

A piece is put together from ready-made ends and what differs, because there is one for each token of each client.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eightfold.server.generation import Usage
from eightfold.server.logprobs import CompletionLogprobs, TokenTexts, chat_logprobs, prompt_logprobs
from eightfold.server.tools import ToolCall, ToolParser, ToolUse

if TYPE_CHECKING:
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(content: Any) -> bytes:
    """Return JSON in UTF-8."""
    return _encode(content).encode("utf-8", "replace")


def event(content: Any) -> bytes:
    """Return one event of a stream."""
    return b"data: " + to_json(content) + b"\n\n"


class _Answer:
    """What all pieces of an answer share."""

    def __init__(self, prefix: str, kind: str, model: str, *, shows_usage: bool) -> None:
        self._common = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        # A stream with usage has the field everywhere, and null everywhere but at its end.
        self._end = ("]" + (',"usage":null' if shows_usage else "") + "}\n\n").encode()
        self._begin = b"data: " + _encode(self._common)[:-1].encode() + b',"choices":['

    def _choice(self, choice: str) -> bytes:
        return self._begin + choice.encode("utf-8", "replace") + self._end

    def usage(self, usage: Usage) -> bytes:
        """Return the piece that says how many tokens there were."""
        return event({**self._common, "choices": [], "usage": self._counted(usage)})

    def _counted(self, usage: Usage) -> dict[str, Any]:
        return usage.as_json()


class ChatAnswer(_Answer):
    """The answer to a chat; its choices are the n answers to one prompt."""

    def __init__(self, model: str, texts: TokenTexts, tools: ToolUse, *, streams: bool, shows_usage: bool) -> None:
        kind = "chat.completion.chunk" if streams else "chat.completion"
        super().__init__("chatcmpl", kind, model, shows_usage=shows_usage)
        self._texts, self._tools = texts, tools
        self._parsers: dict[int, ToolParser] = {}
        self._ended: set[int] = set()

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        """Return what a step adds."""
        return b"".join([self._piece(answer) for answer in output.outputs if answer.index not in self._ended])

    def _piece(self, answer: CompletionOutput) -> bytes:
        text, index, reason, logprobs = answer.delta_text, answer.index, answer.finish_reason, answer.delta_logprobs
        parser, piece = self._parsers.get(index), b""
        if parser is None:
            parser = self._parsers[index] = ToolParser(self._tools)
            piece = self._delta(index, '{"role":"assistant","content":""}', None)
        before = parser.calls
        calls = list[ToolCall]()
        if self._tools.form is not None:
            text, calls = parser.push(text)
            if reason is not None:
                more, last = parser.finish()
                text, calls = text + more, calls + last
        if text or logprobs:
            piece += self._delta(index, '{"content":' + _encode(text) + "}", logprobs)
        for number, call in enumerate(calls, before):
            piece += self._delta(index, _encode({"tool_calls": [{"index": number, **call.as_json()}]}), None)
        return piece if reason is None else piece + self._last(answer, parser)

    def _delta(self, index: int, delta: str, logprobs: Sequence[Sampled] | None) -> bytes:
        shown = "null" if not logprobs else _encode({"content": chat_logprobs(logprobs, self._texts), "refusal": None})
        return self._choice(f'{{"index":{index},"delta":{delta},"logprobs":{shown},"finish_reason":null}}')

    def _last(self, answer: CompletionOutput, parser: ToolParser) -> bytes:
        self._ended.add(answer.index)
        reason = _encode("tool_calls" if parser.calls else answer.finish_reason)
        stop = _encode(answer.stop_reason)
        return self._choice(
            f'{{"index":{answer.index},"delta":{{}},"logprobs":null,"finish_reason":{reason},"stop_reason":{stop}}}'
        )

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """Return all of it."""
        choices = [self._whole(answer) for answer in outputs[0].outputs]
        content = {**self._common, "choices": choices, "usage": self._counted(usage)}
        if outputs[0].prompt_logprobs is not None:
            content["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs, self._texts)
        return content

    def _whole(self, answer: CompletionOutput) -> dict[str, Any]:
        parser = ToolParser(self._tools)
        text, calls = parser.push(answer.text)
        more, last = parser.finish()
        text, calls = text + more, calls + last
        logprobs = answer.logprobs
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": None
            if logprobs is None
            else {"content": chat_logprobs(logprobs, self._texts), "refusal": None},
            "finish_reason": "tool_calls" if calls else answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }


class CompletionAnswer(_Answer):
    """The answer to a completion; its choices are the n answers to each prompt in turn."""

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        *,
        n: int,
        logprobs: int | None,
        echo: Sequence[str] | None,
        max_tokens: int | None,
        shows_usage: bool,
    ) -> None:
        super().__init__("cmpl", "text_completion", model, shows_usage=shows_usage)
        self._texts, self._n, self._logprobs, self._echo = texts, n, logprobs, echo
        self._only_prompts = max_tokens == 0
        self._progress: dict[int, CompletionLogprobs] = {}
        self._ended: set[int] = set()

    def _counted(self, usage: Usage) -> dict[str, Any]:
        # The engine generates one token at least; who asked for none is not told of it.
        return (replace(usage, generated=0) if self._only_prompts else usage).as_json()

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        """Return what a step adds."""
        return b"".join([self._piece(at, answer, output) for answer in output.outputs])

    def _piece(self, at: int, answer: CompletionOutput, output: RequestOutput) -> bytes:
        index = at * self._n + answer.index
        if index in self._ended:
            return b""
        is_first, reason = index not in self._progress, answer.finish_reason
        text = "" if self._only_prompts else answer.delta_text
        if self._echo is not None and is_first:
            text = self._echo[at] + text
        logprobs = self._shown(index, answer.delta_logprobs, output.prompt_logprobs if is_first else None, output)
        if not (text or logprobs or reason is not None):
            return b""
        if reason is not None:
            self._ended.add(index)
        return self._choice(
            f'{{"index":{index},"text":{_encode(text)},"logprobs":{_encode(logprobs)},'
            f'"finish_reason":{_encode(reason)},"stop_reason":{_encode(answer.stop_reason)}}}'
        )

    def _shown(
        self,
        index: int,
        sampled: Sequence[Sampled] | None,
        of_prompt: Sequence[Sampled | None] | None,
        output: RequestOutput,
    ) -> dict[str, Any] | None:
        """Return the log-probabilities of the next tokens, in front of them the prompt's if it is echoed."""
        progress = self._progress.setdefault(index, CompletionLogprobs(self._texts))
        if self._logprobs is None:
            return None
        shown = list[Any]() if self._only_prompts else list[Any](sampled or ())
        token_ids = [each.token_id for each in shown]
        if self._echo is not None and of_prompt is not None:
            shown, token_ids = [*of_prompt, *shown], [*output.prompt_ids, *token_ids]
        return progress.of(shown, token_ids, self._logprobs)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
        """Return all of it."""
        choices = [self._whole(at, answer, output) for at, output in enumerate(outputs) for answer in output.outputs]
        return {**self._common, "choices": choices, "usage": self._counted(usage)}

    def _whole(self, at: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        index = at * self._n + answer.index
        text = "" if self._only_prompts else answer.text
        choice = {
            "index": index,
            "text": text if self._echo is None else self._echo[at] + text,
            "logprobs": self._shown(index, answer.logprobs, output.prompt_logprobs, output),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if output.prompt_logprobs is not None and self._echo is None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._texts)
        return choice
