"""`eightfold run --input-file`: many prompts through the engine, and the file of answers that a later run resumes.

One process at a time writes the file, which it locks. What a power failure or a full disk leaves of the last line is
cut off when the next run begins, and so are errors, which are then tried again. A line carries a fingerprint of what
it answers, `SETUP.REQUEST`: of the model and how it computes, and of the prompt and its parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.batch_input import BatchRequest
from eightfold.cli.options import flags_of, in_flags
from eightfold.engine.engine import Engine
from eightfold.engine.settings import EngineConfig
from eightfold.errors import EightfoldError, OutputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import LineFile
from eightfold.tokenizer import Tokenizer, stop_token_ids

if TYPE_CHECKING:
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled
    from eightfold.progress import Task

# How often the disk is waited for.
FSYNC_SECONDS = 5.0

_BEGIN = b'{"index": '
_ELSEWHERE = "Choose another --output-file, or begin anew with --overwrite."
_MODE = 0o644
_MOST_OF_A_LINE = 256 << 20  # bytes; one that is longer is not of this command

# Of each tensor so much tells one model from another: all of the scales, the beginning of the weights.
_STAMP_BYTES = 1 << 16

# Between two looks at the speed.
_SHOW_SECONDS = 0.5


class AnswerFile:
    """Context manager: the file, open and locked. One that was made and stayed empty goes away again.

    Raises:
        OutputError: another process writes the file, or it is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = time.monotonic()

    def __enter__(self) -> AnswerFile:
        self._is_new = not os.path.lexists(self.path)
        self._lines = self._opened(Path(os.path.realpath(self.path)))
        return self

    def _opened(self, path: Path) -> LineFile:
        if path.exists() and not path.is_file():
            raise OutputError("--output-file", got=self.path, expected="a file that can be read again")
        try:
            return LineFile(path, _MODE)
        except BlockingIOError:
            raise OutputError(
                "--output-file",
                where=self.path,
                got="a file that another run is writing",
                expected="one that is not in use",
                action="Wait for its end, or choose another.",
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_new and not self._lines.size:
                self.path.unlink()
            else:
                self._lines.sync()
        finally:
            self._lines.close()

    def clear(self) -> None:
        self._lines.truncate(0)

    def resume(self, fingerprints: Sequence[str]) -> set[int]:
        """Repair the file and return which prompts it answers; errors are taken out.

        Args:
            fingerprints: of each prompt.

        Raises:
            OutputError: a line is not this command's, or answers something else. The file is as it was.
        """
        answered, failed, end = set[int](), set[int](), 0
        with self._lines.path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(_MOST_OF_A_LINE), b""), 1):
                if not raw.endswith(b"\n") and len(raw) < _MOST_OF_A_LINE and _may_be_torn(raw):
                    break
                line = self._parse(raw, number)
                if "error" in line:
                    failed.add(number)
                else:
                    self._check(line, number, fingerprints)
                    answered.add(line["index"])
                end += len(raw)
        if failed:
            self._rewrite(failed, end)
        elif end != self._lines.size:
            self._lines.truncate(end)
        return answered

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line, whole or not at all.

        Raises:
            OSError: the disk is full.
        """
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
        line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        self._lines.write(line)
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            self._lines.sync()
            self._synced = time.monotonic()

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("index"), int) and isinstance(line.get("fingerprint"), str):
            return line
        raise OutputError(
            f"line {number}",
            where=self.path,
            got=repr(raw[:40].decode("utf-8", "replace")),
            expected="an answer that this command wrote",
            action=_ELSEWHERE,
        )

    def _check(self, line: Mapping[str, Any], number: int, fingerprints: Sequence[str]) -> None:
        """Refuse an answer to something else than what is asked now."""
        index, found = line["index"], line["fingerprint"]
        if not 0 <= index < len(fingerprints):
            got = f"an answer to prompt {index}, and {len(fingerprints)} prompts, counted from 0"
        elif found == fingerprints[index]:
            return
        elif found.partition(".")[0] == fingerprints[index].partition(".")[0]:
            got = f"an answer to prompt {index} when it had another text, id or parameters"
        else:
            got = "an answer of another model, chat template, --dynamic or --attention-mode"
        raise OutputError(f"line {number}", where=self.path, got=got, expected="one of this run", action=_ELSEWHERE)

    def _rewrite(self, without: set[int], end: int) -> None:
        """Put a file without these lines in the place of this one, at once, and locked before anybody can see it."""
        old = self._lines
        new = LineFile(old.path.with_name(f".{old.path.name}.partial"))
        try:
            new.truncate(0)
            shutil.copymode(old.path, new.path)
            with old.path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    if number not in without and file.tell() <= end:
                        new.write(raw)
            new.sync()
            new.rename(old.path)
        except BaseException:
            new.path.unlink()
            new.close()
            raise
        old.close()
        self._lines = new


def _may_be_torn(raw: bytes) -> bool:
    """Whether bytes without an end of line are the beginning of an answer, as a crash leaves it."""
    begin = raw.rstrip(b"\0")[: len(_BEGIN)]
    return _BEGIN.startswith(begin)


@dataclass
class BatchResult:
    """What was done: prompts that were answered now, before, and not; tokens, and seconds without loading."""

    answered: int = 0
    answered_before: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    world_size: int = 1
    resident_weights_mib: list[float] = field(default_factory=list)  # by which loading has made each process larger


def run_batch(
    model: Path,
    requests: Sequence[BatchRequest],
    output_file: Path,
    chat_template: str | None,
    add_bos: bool | None,
    config: EngineConfig,
    *,
    overwrite: bool,
) -> BatchResult:
    """Answer what has no answer yet.

    Args:
        model: directory.
        requests: all prompts.
        output_file: of the answers.
        chat_template: a template in place of the model's.
        add_bos: whether BOS stands before a text; None: as usual with the model.
        config: of the engine.
        overwrite: forget what the output file holds.

    Raises:
        OutputError: the output file holds something else, or another run writes it.
        EightfoldError: the model or the machine are not as they must be.
    """
    checkpoint, tokenizer = Checkpoint.open(model), Tokenizer(model, chat_template, add_bos=add_bos)
    setup = _setup(checkpoint, requests, tokenizer, config)
    with AnswerFile(output_file) as answers:
        if overwrite:
            answers.clear()
        done = answers.resume([f"{setup}.{request.fingerprint}" for request in requests])
        if done:
            console.note(f"{len(done)} of {len(requests)} prompts are answered in {output_file} already.")
        todo = [request for request in requests if request.index not in done]
        result = BatchResult(answered_before=len(done))
        if todo:
            engine = Engine.load(model, config, tokenizer)
            for note in engine.notes:
                console.note(note)
            result.world_size, result.resident_weights_mib = engine.model.world_size, engine.model.resident_weights_mib
            _Run(engine, answers, setup, result).answer(todo)
    return result


def _setup(checkpoint: Checkpoint, requests: Sequence[BatchRequest], tokenizer: Tokenizer, config: EngineConfig) -> str:
    """Return 16 hexadecimal digits that differ where the same request may have another answer.

    Raises:
        CheckpointError: there are chats, and no template for them.
    """
    model = checkpoint.directory
    facts: list[Any] = [checkpoint.config_raw, config.dynamic, config.attention_mode]
    facts.append(sorted(stop_token_ids(model, checkpoint.config_raw)))
    if tokenizer.add_bos is not None:
        facts.append(tokenizer.add_bos)
    if any(request.needs_template for request in requests):
        generating.require_template(tokenizer, "prompts as texts without --chat")
        facts.append(tokenizer.template_source())
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    digest.update(tokenizer.content)
    for name in sorted(checkpoint.tensors):
        array = checkpoint.array(name).reshape(-1)
        digest.update(f"{name} {array.dtype} {array.size}".encode())
        digest.update(array[: _STAMP_BYTES // array.itemsize].tobytes())
    return digest.hexdigest()


@dataclass
class _Run:
    """Requests on their way through an engine."""

    engine: Engine
    answers: AnswerFile
    setup: str
    result: BatchResult
    running: dict[str, BatchRequest] = field(default_factory=dict)

    def answer(self, todo: Sequence[BatchRequest]) -> None:
        """Answer all; whatever happens, what is finished by then is written."""
        started = time.monotonic()
        try:
            with console.bars("run", len(todo), "answer") as task:
                self._answer(iter(todo), task, started)
        except BaseException:  # Ctrl-C too
            finished = self.result.answered + self.result.answered_before
            console.note(f"{finished} prompts are answered; the same command goes on with the others.")
            raise
        finally:
            self.result.seconds = time.monotonic() - started

    def _answer(self, waiting: Iterator[BatchRequest], task: Task, started: float) -> None:
        shown = started
        while True:
            self._feed(waiting, task)
            if not self.running:
                return
            for output in self.engine.step():
                self._write(self.running.pop(output.request_id), output)
                task.advance()
            now = time.monotonic()
            if now - shown > _SHOW_SECONDS:
                shown = now
                task.at(f"{self.engine.stats.generated_tokens / (now - started):.0f} tok/s")

    def _feed(self, waiting: Iterator[BatchRequest], task: Task) -> None:
        """Keep as many requests in line as run at a time; one that is refused is answered by that."""
        most = 2 * self.engine.config.max_num_seqs
        while len(self.running) < most:
            request = next(waiting, None)
            if request is None:
                return
            name = str(request.index)
            try:
                prompt_ids = request.encode(self.engine.tokenizer)
                self.engine.add_request(name, prompt_ids, request.params, streams=False)
            except EightfoldError as error:
                self.result.failed += 1
                self.answers.append({**self._head(request), "error": in_flags(error, flags_of(EngineConfig))})
                task.advance()
            else:
                self.running[name] = request

    def _head(self, request: BatchRequest) -> dict[str, Any]:
        return {"index": request.index, "id": request.id, "fingerprint": f"{self.setup}.{request.fingerprint}"}

    def _write(self, request: BatchRequest, output: RequestOutput) -> None:
        line = {**self._head(request), "prompt_tokens": len(output.prompt_ids)}
        line["outputs"] = [_completion(answer) for answer in output.outputs]
        if output.prompt_logprobs is not None:
            line["prompt_logprobs"] = [None if each is None else _logprob(each) for each in output.prompt_logprobs]
        self.answers.append(line)
        self.result.answered += 1
        self.result.prompt_tokens += len(output.prompt_ids)
        self.result.generated_tokens += sum(len(answer.token_ids) for answer in output.outputs)


def _completion(answer: CompletionOutput) -> dict[str, Any]:
    content = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    logprobs = answer.logprobs
    return content if logprobs is None else {**content, "logprobs": [_logprob(each) for each in logprobs]}


def _logprob(sampled: Sampled) -> dict[str, Any]:
    top = [[token, _finite(value)] for token, value in sampled.top]
    return {"token_id": sampled.token_id, "logprob": _finite(sampled.logprob), "top": top}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON knows: minus infinity, which a banned token has, becomes null."""
    return value if value is not None and math.isfinite(value) else None
