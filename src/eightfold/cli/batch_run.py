"""`eightfold run --input-file`: many prompts through the engine, answers into a file that can be gone on with."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.batch_input import BatchRequest, read_requests
from eightfold.cli.batch_output import AnswerFile
from eightfold.cli.options import flags_of, in_flags
from eightfold.engine.engine import Engine
from eightfold.engine.settings import EngineConfig
from eightfold.errors import EightfoldError, InputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.tokenizer import Tokenizer, stop_token_ids

if TYPE_CHECKING:
    from eightfold.engine.outputs import CompletionOutput, RequestOutput
    from eightfold.engine.sampler import Sampled
    from eightfold.progress import Task

# Of each tensor so much tells one model from another: all of the scales, the beginning of the weights.
_STAMP_BYTES = 1 << 16

# Between two looks at the speed.
_SHOW_SECONDS = 0.5


@dataclass(frozen=True)
class BatchJob:
    """What is to be done.

    Attributes:
        model: directory.
        input_file: of the prompts.
        output_file: of the answers.
        overwrite: forget what the output file holds.
        chat: texts are what a user says.
        chat_template: a template in place of the model's.
        sampling: parameters where a line says nothing.
        config: of the engine.
    """

    model: Path
    input_file: Path
    output_file: Path
    overwrite: bool
    chat: bool
    chat_template: str | None
    sampling: dict[str, Any]
    config: EngineConfig


@dataclass
class BatchResult:
    """What was done: prompts that were answered now, before, and not; tokens, and seconds without loading.

    Weights: by how much loading has made each process larger; nothing where none was loaded.
    """

    answered: int = 0
    answered_before: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    world_size: int = 1
    resident_weights_mib: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """New tokens a second."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


def run_batch(batch: BatchJob) -> BatchResult:
    """Answer what has no answer yet.

    Raises:
        InputError: a line of the input; nothing has been computed.
        OutputError: the output file holds something else, or another run writes it.
        EightfoldError: the model or the machine are not as they must be.
    """
    requests = read_requests(batch.input_file, batch.sampling, chat=batch.chat)
    if batch.output_file.exists() and batch.output_file.samefile(batch.input_file):
        raise InputError("--output-file", got="the input file", expected="another")
    setup = _setup(batch, requests)
    with AnswerFile(batch.output_file) as answers:
        if batch.overwrite:
            answers.clear()
        done = answers.resume([f"{setup}.{request.fingerprint}" for request in requests])
        if done:
            console.note(f"{len(done)} of {len(requests)} prompts are answered in {batch.output_file} already.")
        todo = [request for request in requests if request.index not in done]
        result = BatchResult(answered_before=len(done))
        if todo:
            engine = _load(batch)
            result.world_size, result.resident_weights_mib = engine.model.world_size, engine.model.resident_weights_mib
            _Run(engine, answers, setup, result).answer(todo)
    return result


def _setup(batch: BatchJob, requests: Sequence[BatchRequest]) -> str:
    """Return 16 hexadecimal digits that differ where the same request may have another answer.

    Raises:
        CheckpointError: there are chats, and no template for them.
    """
    checkpoint = Checkpoint.open(batch.model)
    tokenizer = Tokenizer(batch.model, batch.chat_template)
    config = batch.config
    facts: list[Any] = [checkpoint.config_raw, config.dynamic, config.attention_mode]
    facts.append(sorted(stop_token_ids(batch.model, checkpoint.config_raw)))
    if any(request.needs_template for request in requests):
        generating.require_template(tokenizer, "prompts as texts without --chat")
        facts.append(tokenizer.template_source())
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    digest.update((batch.model / "tokenizer.json").read_bytes())
    for name in sorted(checkpoint.tensors):
        array = checkpoint.array(name).reshape(-1)
        digest.update(f"{name} {array.dtype} {array.size}".encode())
        digest.update(array[: _STAMP_BYTES // array.itemsize].tobytes())
    return digest.hexdigest()


def _load(batch: BatchJob) -> Engine:
    engine = Engine.load(batch.model, batch.config, Tokenizer(batch.model, batch.chat_template))
    for note in engine.notes:
        console.note(note)
    return engine


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
