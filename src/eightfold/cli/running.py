"""`eightfold run`: one prompt, one answer; or a file of prompts, and a file of answers."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.cli import console, generating
from eightfold.cli.options import argument, as_json
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CapacityError, ConfigError, UnsupportedError
from eightfold.values import PATH, SWITCH, TEXT, setting, whole

if TYPE_CHECKING:
    from eightfold.cli.batch_run import BatchResult
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel
    from eightfold.tokenizer import Tokenizer

EXIT_FAILED = 1

_PROMPTS = "Prompts and answers"


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """Answer one prompt and show the text as it is generated, or answer all prompts of a file.

    Example: eightfold run Llama-3.2-1B-w8a8 --chat --prompt "What's deep learning?"

    Answers are greedy unless --temperature is given.

    In several processes: torchrun --nproc_per_node 2 -m eightfold run DIR ...

    A file of prompts: eightfold run DIR --input-file prompts.jsonl --output-file answers.jsonl

    Each line of the input is an object with prompt, messages or prompt_token_ids, optionally an id, and optionally
    parameters of its own: max_tokens, temperature, top_p, seed, stop, logprobs, n and so on. Answers are written as
    they are completed, not in the order of the prompts; each has the index and the id of its prompt. A run that was
    stopped resumes when it is started again: it keeps the answers, retries prompts that failed, and refuses an input
    that has changed. Exit code 1 means that some prompts could not be answered; their lines have the reason under
    error.
    """

    model: Path = argument("DIR", generating.MODEL)
    prompt: str | None = setting(None, TEXT, "Text to continue, or with --chat the user's message.", group=_PROMPTS)
    input_file: Path | None = setting(
        None,
        PATH,
        "Prompts to answer, many at a time: a JSON object a line, or a text a line (.txt).",
        metavar="FILE",
        group=_PROMPTS,
    )
    output_file: Path | None = setting(
        None, PATH, "File for their answers, a JSON object a line.", metavar="FILE", group=_PROMPTS
    )
    overwrite: bool = setting(False, SWITCH, "Start the output file over instead of resuming it.", group=_PROMPTS)
    max_new_tokens: int = setting(64, whole(1), "Stop an answer after N tokens.", group=_PROMPTS)
    chat: bool = setting(False, SWITCH, "Put the prompt into the model's chat template.", group=_PROMPTS)
    chat_template: Path | None = generating.chat_template()
    as_json: bool = as_json()
    sampling: dict[str, Any] = generating.sampling(
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "stop", "ignore_eos", temperature=None,
    )  # fmt: skip
    limits: dict[str, Any] = generating.engine("max_num_seqs", "max_model_len", "kv_memory", "speculate")
    computing: dict[str, Any] = generating.engine("dynamic", "attention_mode", "threads")
    backend: str = generating.backend()

    def execute(self) -> int:
        """Answer the prompt or the file; return 1 if some of its prompts could not be answered."""
        self._require_one_source()
        template = generating.read_template(self.chat_template)
        backend = generating.resolve_backend(self.backend)
        config = self._config()
        _leave_to_first(self.model, backend, config)
        if note := generating.idle_note(self.sampling):
            console.note(note)
        if self.prompt is not None:
            length = self.max_new_tokens
            single = Single(
                self.model, self.prompt, self.chat, template, length, self.sampling, config, backend, self.as_json
            )
            _one(single, self.as_json)
            return 0
        _require_native(backend)
        return self._answer_file(template, config)

    def _require_one_source(self) -> None:
        """Refuse two kinds of prompts, or none, and options that are only for files beside a prompt."""
        if (self.prompt is None) == (self.input_file is None):
            got = "none" if self.prompt is None else "--input-file too"
            raise ConfigError("--prompt", got=got, expected="it or --input-file")
        if self.input_file is not None and self.output_file is None:
            raise ConfigError("--output-file", got="none", expected="where the answers to --input-file go")
        limits = [name for name, value in self.limits.items() if name != "speculate" or value]
        of_files = [*(["output_file"] if self.output_file else []), *limits, *(["overwrite"] if self.overwrite else [])]
        if self.prompt is not None and of_files:
            raise ConfigError(of_files[0], got="--prompt", expected="--input-file beside it")

    def _config(self) -> EngineConfig:
        sequences = self.limits.get("max_num_seqs", EngineConfig.max_num_seqs)
        tokens = max(EngineConfig.max_batched_tokens, 2 * sequences)
        return EngineConfig(**self.limits, **self.computing, max_batched_tokens=tokens)

    def _answer_file(self, template: str | None, config: EngineConfig) -> int:
        from eightfold.cli.batch_run import BatchJob, run_batch

        assert self.input_file is not None
        assert self.output_file is not None
        defaults = {**self.sampling, "max_tokens": self.max_new_tokens}
        batch = BatchJob(
            self.model, self.input_file, self.output_file, self.overwrite, self.chat, template, defaults, config
        )
        result = run_batch(batch)
        _report(result, self.output_file, self.as_json)
        return EXIT_FAILED if result.failed else 0


def _leave_to_first(model: Path, backend: str, config: EngineConfig) -> None:
    """Go on in one process only; the others compute for it. Where nothing is shared, refuse more than one.

    Raises:
        UnsupportedError: there are several, and the backend is for one.
    """
    if backend == "native":
        from eightfold.engine.settings import leave_to_first

        leave_to_first(model, config)
        return
    from eightfold.parallel.world import World

    if (size := World.of_environment().size) > 1:
        raise UnsupportedError("the reference backend", got=f"{size} processes", expected="one")


def _require_native(backend: str) -> None:
    if backend != "native":
        raise UnsupportedError("--input-file", got="the reference backend", expected="the native one")


def _report(result: BatchResult, output_file: Path, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "answered": result.answered,
                "answered_before": result.answered_before,
                "failed": result.failed,
                "prompt_tokens": result.prompt_tokens,
                "generated_tokens": result.generated_tokens,
                "seconds": round(result.seconds, 3),
                "world_size": result.world_size,
                "resident_weights_mib": result.resident_weights_mib,
            }
        )
    else:
        tokens = f"{result.prompt_tokens} + {result.generated_tokens} tokens"
        speed = f"{result.seconds:.1f} s, {result.speed:.1f} tok/s"
        print(f"[{result.answered} answers, {tokens}, {speed}]", file=sys.stderr)
    if result.failed:
        total = result.answered + result.answered_before + result.failed
        print(f"eightfold: {result.failed} of {total} prompts have an error in {output_file}.", file=sys.stderr)


def _one(single: Single, as_json: bool) -> None:
    """Answer one prompt."""
    found = single.answer(None if as_json else _show)
    if as_json:
        console.print_json(found._asdict())
        return
    print()
    counts = f"{found.prompt_tokens} + {len(found.token_ids)} tokens"
    print(f"[{counts}, {found.seconds:.1f} s, {found.finish_reason}]", file=sys.stderr)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# Is told of each piece of text; None where nobody reads along.
Show = Callable[[str], None] | None


class Answer(NamedTuple):
    """An answer; `seconds` without loading. Weights: by how much loading has made each process larger, if measured."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str | None
    seconds: float
    backend: str
    world_size: int
    resident_weights_mib: list[float]  # of each process


class _Prompt(NamedTuple):
    tokenizer: Tokenizer
    ids: list[int]


# Text, tokens and the reason of an answer's end.
_Generated = tuple[str, list[int], str | None]

# What answers, and with which model; None: not with one of the native core.
_Loaded = tuple[Callable[[], _Generated], "NativeModel | None"]


@dataclass(frozen=True)
class Single:
    """What is asked.

    Attributes:
        model: directory.
        prompt: a text to continue, or with `chat` what a user says.
        chat: whether it goes into the chat template.
        chat_template: a template in place of the model's.
        max_new_tokens: of the answer.
        sampling: parameters; without any the answer is greedy.
        config: of the engine, but for what follows from the prompt's length.
        backend: native or reference.
        measures: whether the memory of weights is measured: then they are loaded alone, which takes longer.
    """

    model: Path
    prompt: str
    chat: bool
    chat_template: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    config: EngineConfig
    backend: str
    measures: bool = False

    def answer(self, show: Show = None) -> Answer:
        """Answer the prompt.

        Raises:
            EightfoldError: the model, the prompt or the options are not as they must be.
        """
        from eightfold.format.checkpoint import Checkpoint

        with console.loading():
            checkpoint = Checkpoint.open(self.model)
            read = functools.cache(lambda: self._read(checkpoint))
            load = self._reference if self.backend == "reference" else self._native
            generate, model = load(checkpoint, read, show)
        started = time.monotonic()
        text, token_ids, reason = generate()
        seconds = round(time.monotonic() - started, 3)
        world_size, weights = (1, []) if model is None else (model.world_size, model.resident_weights_mib)
        return Answer(text, token_ids, len(read().ids), reason, seconds, self.backend, world_size, weights)

    def _read(self, checkpoint: Checkpoint) -> _Prompt:
        """Return the prompt as tokens.

        Raises:
            CapacityError: the prompt is empty, or it and its answer do not fit the model's context.
        """
        from eightfold.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.model, self.chat_template)
        if self.chat:
            messages = [{"role": "user", "content": self.prompt}]
            ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            ids = tokenizer.encode(self.prompt)
        if not ids:
            action = "Give some text with --prompt."
            raise CapacityError("prompt", got="no tokens", expected="at least one", action=action)
        if len(ids) + self.max_new_tokens > (context := checkpoint.config.max_position_embeddings):
            raise CapacityError(
                "prompt",
                got=f"{len(ids)} tokens and {self.max_new_tokens} new ones",
                expected=f"1 to {context} together",
                action="Shorten the prompt or lower --max-new-tokens.",
            )
        return _Prompt(tokenizer, ids)

    def _native(self, checkpoint: Checkpoint, read: Callable[[], _Prompt], show: Show) -> _Loaded:
        """Load an engine for this one request, and the prompt while its weights are made ready."""
        from eightfold.engine.settings import load_model

        def prepare() -> None:
            import eightfold.engine.engine  # noqa: F401

            generating.sampling_params(self.sampling)
            read()

        if self.measures:
            prepare()
        model = load_model(checkpoint, self.config, None if self.measures else prepare)
        from eightfold.engine.engine import Engine
        from eightfold.tokenizer import stop_token_ids

        tokenizer, prompt_ids = read()
        positions = len(prompt_ids) + self.max_new_tokens
        model.allocate_cache(positions)  # refuses what does not fit, in the words of this command
        config = replace(
            self.config,
            max_num_seqs=1,
            max_model_len=positions,
            kv_memory=model.pages * model.page_bytes,
            prefix_caching=False,
        )
        engine = Engine(model, tokenizer, config, stop_ids=stop_token_ids(self.model, checkpoint.config_raw))
        params = generating.sampling_params(self.sampling, max_tokens=self.max_new_tokens)
        engine.add_request("run", prompt_ids, params, streams=show is not None)

        def generate() -> _Generated:
            while engine.has_unfinished:
                for output in engine.step():
                    (answer,) = output.outputs
                    if show is not None:
                        show(answer.delta_text)
            return answer.text, answer.token_ids, answer.finish_reason

        return generate, model

    def _reference(self, checkpoint: Checkpoint, read: Callable[[], _Prompt], show: Show) -> _Loaded:
        """Load the oracle, which is greedy."""
        if self.sampling:
            raise UnsupportedError("sampling options", got="the reference backend", expected="the native one")
        console.require_torch("run --backend reference")
        from eightfold.model.reference.load import Decoder
        from eightfold.tokenizer import StreamDecoder, stop_token_ids

        tokenizer, prompt_ids = read()
        stop_ids = stop_token_ids(self.model, checkpoint.config_raw)
        decoder = Decoder(checkpoint, self.config.dynamic, self.config.attention_mode)

        def answer() -> _Generated:
            stream, tell = StreamDecoder(tokenizer), show or (lambda text: None)
            token_ids, reason = list[int](), "length"
            for token in decoder.generate(prompt_ids, self.max_new_tokens):
                if token in stop_ids:
                    reason = "stop"
                    break
                token_ids.append(token)
                tell(stream.push(token))
            tell(stream.finish())
            return tokenizer.decode(token_ids), token_ids, reason

        return answer, None
