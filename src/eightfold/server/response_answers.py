"""Answers of the Responses API: items that begin, grow and close, as a stream of events or as what these add up to.

The whole answer is made by the same steps, whose events are not written; so it is what the stream's last event holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eightfold.server.answers import AnswerWriter, ChatParser, in_parts, to_json
from eightfold.server.response_items import Item, new_id
from eightfold.server.tool_parsers import ToolCall

if TYPE_CHECKING:
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled
    from eightfold.server.fields import ApiError
    from eightfold.server.logs import Record
    from eightfold.server.requests import Said
    from eightfold.server.token_texts import TokenTexts

_DEEP = 9  # levels of an event down to its log-probabilities

_INCOMPLETE = {"length": "max_output_tokens"}
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class _Open:
    """An item that grows.

    Attributes:
        item: as it is answered, without its text.
        texts: so far, in pieces.
        logprobs: of the tokens so far; None where they were not asked for.
    """

    def __init__(self, item: Item, logprobs: list[Any] | None = None) -> None:
        self.item, self.logprobs = item, logprobs
        self.texts = list[str]()


class ResponseAnswer(AnswerWriter):
    """Writes the answer to one request.

    Args:
        response: what it says of the request, with its id.
        texts: of single tokens.
        said: what the request says of the answer.
        shows_logprobs: whether texts have log-probabilities.
        keep: is given the complete response; None: nobody keeps it.
    """

    def __init__(
        self,
        response: dict[str, Any],
        texts: TokenTexts,
        said: Said,
        *,
        shows_logprobs: bool,
        keep: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._response, self._texts, self._start, self._keep = response, texts, said.start, keep
        self._parser = ChatParser(said.tools, said.start)
        self._shows_reasoning, self._shows_logprobs = said.shows_reasoning, shows_logprobs
        self._output = list[Item]()  # that is complete
        self._open: _Open | None = None
        self._spaces = ""  # before a text that has not begun
        self._logprobs = list[Any]()  # of tokens whose text is not certain yet
        self._events: list[bytes] = []
        self._number = 0  # of the next event
        self._is_long = False  # whether events have all log-probabilities
        self._reason: str | None = None  # why the answer ended
        self._thought_tokens = 0
        self._is_behind_thought = False
        self._streams = False

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        self._streams = True
        if not self._number:
            self._tell("response.created", response=self._response)
            self._tell("response.in_progress", response=self._response)
        if self._reason is None:
            for answer in output.outputs:
                self._take(answer, answer.delta_text, answer.delta_logprobs or ())
        return self._told()

    def whole(self, outputs: Sequence[RequestOutput], record: Record) -> dict[str, Any]:
        answer = outputs[0].outputs[0]
        self._take(answer, answer.text, answer.logprobs or ())
        return self._complete(record)

    def end(self, record: Record) -> bytes:
        response = self._complete(record)
        self._tell(f"response.{response['status']}", response=response)
        return self._told()

    def failure(self, problem: ApiError) -> bytes:
        """Return an error in both of its shapes, the documented one and the one that clients look for, and the end."""
        self._streams = True
        error = problem.body()["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        self._tell("error", **told, error=error)
        code = _ERROR_CODES.get(problem.status, "server_error")
        response = {**self._response, "status": "failed", "output": self._output}
        self._tell("response.failed", response={**response, "error": {"code": code, "message": problem.message}})
        return self._told()

    def _tell(self, kind: str, **fields: Any) -> None:
        """Write an event; of a whole answer nobody sees any."""
        if not self._streams:
            return
        content: dict[str, Any] = {"type": kind, "sequence_number": self._number, **fields}
        body = b"".join(in_parts(content, _DEEP)) if self._is_long else to_json(content)
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n")
        self._number += 1

    def _told(self) -> bytes:
        told = b"".join(self._events)
        self._events.clear()
        return told

    def _complete(self, record: Record) -> dict[str, Any]:
        """Close what is open, return the response, and have it kept."""
        self._finish()
        incomplete = _INCOMPLETE.get(self._reason or "")
        response = {
            **self._response,
            "status": "incomplete" if incomplete else "completed",
            "completed_at": None if incomplete else int(time.time()),
            "incomplete_details": {"reason": incomplete} if incomplete else None,
            "output": self._output,
            "usage": {
                "input_tokens": record.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": record.cached_tokens if record.tells_cached else 0,
                    "cache_write_tokens": 0,
                },
                "output_tokens": record.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
                "total_tokens": record.prompt_tokens + record.generated_tokens,
            },
        }
        if self._keep is not None:
            self._keep(response)
        return response

    def _take(self, answer: CompletionOutput, text: str, sampled: Sequence[Sampled]) -> None:
        """Take more of the answer."""
        self._reason = answer.finish_reason
        if self._shows_logprobs and sampled:
            self._take_logprobs(answer, sampled)
        is_over = self._reason is not None
        reasoning, parts = self._parser.push_in_order(text, is_last=is_over)
        if reasoning and self._shows_reasoning:
            self._think(reasoning)
        self._is_behind_thought |= any(parts)
        for part in parts:
            if isinstance(part, ToolCall):
                self._call(part)
            elif part:
                self._say(part)
        if is_over:
            self._thought_tokens = self._start.tokens_of_thought(answer.token_ids) or 0

    def _take_logprobs(self, answer: CompletionOutput, sampled: Sequence[Sampled]) -> None:
        """Take log-probabilities of more tokens, but not of those of a thought."""
        if not self._is_behind_thought:
            ids = answer.token_ids
            thought = self._start.tokens_of_thought(ids) or 0
            sampled = sampled[max(thought - (len(ids) - len(sampled)), 0) :]
        logprobs = self._texts.chat_logprobs(sampled)
        self._logprobs += [_with_bytes(each) for each in logprobs["content"]] if logprobs else []

    def _finish(self) -> None:
        self._is_long = self._shows_logprobs
        is_whole = self._reason not in _INCOMPLETE
        has_answer = any(item["type"] != "reasoning" for item in self._output)
        if self._open is not None and self._open.item["type"] == "message":
            self._say("")  # the log-probabilities of the last tokens
        elif not has_answer and (is_whole or self._spaces):
            self._begin_message()
        self._close("completed" if is_whole else "incomplete")

    def _grows(self, kind: str) -> _Open | None:
        return self._open if self._open is not None and self._open.item["type"] == kind else None

    def _begin(self, item: Item, logprobs: list[Any] | None = None) -> _Open:
        self._close("completed")
        self._open = _Open({"id": new_id(item["type"]), **item, "status": "in_progress"}, logprobs)
        self._tell("response.output_item.added", output_index=len(self._output), item=self._open.item)
        return self._open

    def _of(self, item: Item, **part: Any) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._output), **part}

    def _think(self, text: str) -> None:
        opened = self._grows("reasoning")
        if opened is None:
            opened = self._begin({"type": "reasoning", "summary": []})
            told = self._of(opened.item, summary_index=0, part=_summary_text(""))
            self._tell("response.reasoning_summary_part.added", **told)
        opened.texts.append(text)
        self._tell("response.reasoning_summary_text.delta", **self._of(opened.item, summary_index=0, delta=text))

    def _begin_message(self) -> _Open:
        opened = self._begin({"type": "message", "role": "assistant", "content": []}, [])
        part = _output_text("", [])
        self._tell("response.content_part.added", **self._of(opened.item), content_index=0, part=part)
        spaces, self._spaces = self._spaces, ""
        if spaces:
            self._say(spaces)
        return opened

    def _say(self, text: str) -> None:
        opened = self._grows("message")
        if opened is None:
            if not text.strip():  # what stands around calls is no message
                self._spaces += text
                return
            text, self._spaces = self._spaces + text, ""
            opened = self._begin_message()
        logprobs, self._logprobs = self._logprobs, []
        if not (text or logprobs):
            return
        opened.texts.append(text)
        assert opened.logprobs is not None
        opened.logprobs += logprobs
        told = self._of(opened.item, content_index=0, delta=text, logprobs=logprobs)
        self._tell("response.output_text.delta", **told)

    def _call(self, call: ToolCall) -> None:
        self._logprobs, self._spaces = [], ""
        item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        opened = self._begin(item)
        opened.texts.append(call.arguments)
        self._tell("response.function_call_arguments.delta", **self._of(opened.item), delta=call.arguments)
        self._close("completed")

    def _close(self, status: str) -> None:
        """Complete the item that grows."""
        opened, self._open = self._open, None
        if opened is None:
            return
        text, item = "".join(opened.texts), opened.item
        if item["type"] == "message":
            logprobs = opened.logprobs or []
            part = _output_text(text, logprobs)
            told = self._of(item, content_index=0)
            self._tell("response.output_text.done", **told, text=text, logprobs=logprobs)
            self._tell("response.content_part.done", **told, part=part)
            item = {**item, "content": [part]}
        elif item["type"] == "reasoning":
            told, part = self._of(item, summary_index=0), _summary_text(text)
            self._tell("response.reasoning_summary_text.done", **told, text=text)
            self._tell("response.reasoning_summary_part.done", **told, part=part)
            item = {**item, "summary": [part]}
        else:
            told = self._of(item, name=item["name"], arguments=text)
            self._tell("response.function_call_arguments.done", **told)
            item = {**item, "arguments": text}
        item = {**item, "status": status}
        self._tell("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)


def _with_bytes(logprob: dict[str, Any]) -> dict[str, Any]:
    """Return a log-probability as this API has it: where a chat's bytes are null, there are none."""
    named = {**logprob, "bytes": logprob["bytes"] or []}
    return named | ({"top_logprobs": list(map(_with_bytes, named["top_logprobs"]))} if "top_logprobs" in named else {})


def _summary_text(text: str) -> dict[str, Any]:
    """Return what a model thought as a summary that leaves nothing out: there is where clients look for it."""
    return {"type": "summary_text", "text": text}


def _output_text(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
