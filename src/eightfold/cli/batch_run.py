"""`eightfold run --input-file`: many requests through the engine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.batch import STANDARD, Batch, Started
from eightfold.cli.batch_output import AnswerFile, Stdout
from eightfold.engine.engine import Engine
from eightfold.engine.settings import EngineConfig
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.stamp import first_values
from eightfold.tokenizer import Tokenizer, stop_token_ids

if TYPE_CHECKING:
    from eightfold.engine.outputs import EngineStats, RequestOutput
    from eightfold.progress import Task

# Of a tensor so much tells one model from another: all of the scales, the beginning of the weights.
_STAMP_BYTES = 1 << 16

# Between two looks at the speed.
_SHOW_SECONDS = 0.5


@dataclass
class BatchResult:
    """What was done: prompts that were answered now, before, and not; tokens, and seconds without loading."""

    answered: int = 0
    answered_before: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    guesses: EngineStats | None = None  # where there was a draft model
    world_size: int = 1
    resident_weights_mib: list[float] = field(default_factory=list)  # by which loading has made each process larger


def run_batch(
    model: Path,
    batch: Batch,
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
        batch: all requests.
        output_file: of the answers; `-` for standard output.
        chat_template: a template in place of the model's.
        add_bos: whether BOS stands before a text; None: as usual with the model.
        config: of the engine.
        overwrite: forget what the output file holds.

    Raises:
        OutputError: the output file holds something else, or another run writes it.
        EightfoldError: the model or the machine are not as they must be.
    """
    checkpoint, tokenizer = Checkpoint.open(model), Tokenizer(model, chat_template, add_bos=add_bos)
    setup = _setup(checkpoint, batch, tokenizer, config)
    output = Stdout() if output_file == STANDARD else AnswerFile(output_file, batch.form)
    with output as answers:
        if overwrite:
            answers.clear()
        done = answers.resume([f"{setup}.{batch.fingerprint(index)}" for index in range(len(batch))])
        if done:
            console.note(f"{len(done)} of {len(batch)} prompts are answered in {output_file} already.")
        todo = [index for index in range(len(batch)) if index not in done]
        result = BatchResult(answered_before=len(done))
        if todo:
            engine = Engine.load(model, config, tokenizer)
            for note in engine.notes:
                console.note(note)
            result.world_size, result.resident_weights_mib = engine.model.world_size, engine.model.resident_weights_mib
            batch.open(engine, setup)
            _Run(engine, batch, answers, result).answer(todo)
            if config.draft_model is not None:
                result.guesses = engine.stats
    return result


def _setup(checkpoint: Checkpoint, batch: Batch, tokenizer: Tokenizer, config: EngineConfig) -> str:
    """Return 16 hexadecimal digits that differ where the same request may have another answer.

    Raises:
        CheckpointError: there are chats, and no template for them.
    """
    model = checkpoint.directory
    facts: list[Any] = [checkpoint.config_raw, config.dynamic, config.attention_mode]
    facts.append(sorted(stop_token_ids(model, checkpoint.config_raw)))
    if tokenizer.add_bos is not None:
        facts.append(tokenizer.add_bos)
    if batch.needs_template:
        generating.require_template(tokenizer, "prompts as texts without --chat")
        facts.append(tokenizer.template_source())
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    digest.update(tokenizer.content)
    for info, begins in first_values(checkpoint, _STAMP_BYTES):
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        digest.update(begins)
    return digest.hexdigest()


@dataclass
class _Job:
    """A request in the engine.

    Attributes:
        index: of the request.
        started: as the engine got it.
        outputs: of the prompts that are finished, by their place.
    """

    index: int
    started: Started
    outputs: dict[int, RequestOutput] = field(default_factory=dict)


@dataclass
class _Run:
    """Requests on their way through an engine."""

    engine: Engine
    batch: Batch
    answers: AnswerFile | Stdout
    result: BatchResult
    running: dict[str, tuple[_Job, int]] = field(default_factory=dict)  # by name: the job and the place of the prompt

    def answer(self, todo: Sequence[int]) -> None:
        """Answer all; whatever happens, what is finished by then is written."""
        started = time.monotonic()
        try:
            with console.bars("run", len(todo), "answer") as task:
                self._answer(iter(todo), task, started)
        except BaseException:  # Ctrl-C too
            if isinstance(self.answers, AnswerFile):
                finished = self.result.answered + self.result.answered_before
                console.note(f"{finished} prompts are answered; the same command goes on with the others.")
            raise
        finally:
            self.result.seconds = time.monotonic() - started

    def _answer(self, waiting: Iterator[int], task: Task, started: float) -> None:
        shown = started
        while True:
            self._feed(waiting, task)
            if not self.running:
                return
            for output in self.engine.step():
                job, place = self.running.pop(output.request_id)
                job.outputs[place] = output
                if len(job.outputs) == len(job.started.prompts):
                    self._write(job)
                    task.advance()
            now = time.monotonic()
            if now - shown > _SHOW_SECONDS:
                shown = now
                task.at(f"{self.engine.stats.generated_tokens / (now - started):.0f} tok/s")

    def _feed(self, waiting: Iterator[int], task: Task) -> None:
        """Keep as many prompts in line as run at a time; a request that is refused is answered by that."""
        most = 2 * self.engine.config.max_num_seqs
        while len(self.running) < most:
            index = next(waiting, None)
            if index is None:
                return
            try:
                job = _Job(index, self.batch.start(index))
                self._submit(job)
            except self.batch.refusals as error:
                self._refuse(index, error)
                task.advance()

    def _refuse(self, index: int, error: Exception) -> None:
        self.result.failed += 1
        self.answers.append(self.batch.refused(index, error))

    def _submit(self, job: _Job) -> None:
        """Put all prompts of a request in line, or none."""
        started = job.started
        prepared = [
            self.engine.prepare(
                f"{job.index}-{place}", ids, started.params, streams=False, cache_salt=started.cache_salt
            )
            for place, ids in enumerate(started.prompts)
        ]
        for place, request in enumerate(prepared):
            self.engine.submit(request)
            self.running[request.request_id] = (job, place)

    def _write(self, job: _Job) -> None:
        outputs = [job.outputs[place] for place in range(len(job.outputs))]
        failures = [output.failure for output in outputs if output.failure is not None]
        if failures:
            self._refuse(job.index, failures[0])
            return
        self.answers.append(job.started.write(outputs))
        self.result.answered += 1
        for output in outputs:
            self.result.prompt_tokens += len(output.prompt_ids)
            self.result.generated_tokens += sum(len(answer.token_ids) for answer in output.outputs)
