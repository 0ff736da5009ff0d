"""`eightfold run`: one prompt, one answer; or a file of prompts, and a file of answers."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.options import add_bos, as_json, model_argument
from eightfold.engine.settings import EngineConfig, leave_to_first, load_model
from eightfold.errors import CapacityError, ConfigError, InputError, UnsupportedError
from eightfold.hub.names import title_of
from eightfold.values import PATH, SWITCH, TEXT, TEXTS, setting, whole

if TYPE_CHECKING:
    from eightfold.cli.batch_run import BatchResult
    from eightfold.engine.outputs import EngineStats
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel
    from eightfold.tokenizer import Tokenizer

EXIT_FAILED = 1

_NATIVE = "Leave out --backend reference."
_PROMPTS = "Prompts and answers"

# A tokenizer, and the prompt's tokens; text, tokens and the reason of an answer's end, and the engine's counts; what
# generates and shows it.
_Read = tuple["Tokenizer", list[int]]
_Generated = tuple[str, list[int], str | None, "EngineStats | None"]
_Generate = Callable[[Callable[[str], None]], _Generated]


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """Answer one prompt and show the text as it is generated, or answer all prompts of a file.

    Example: eightfold run Llama-3.2-1B-w8a8 --chat --prompt "What's deep learning?"

    Answers are greedy unless --temperature is given.

    In several processes: torchrun --nproc_per_node 2 -m eightfold run DIR ...

    A file of prompts: eightfold run DIR --input-file prompts.jsonl --output-file answers.jsonl

    Each line of the input is an object with prompt, messages or prompt_token_ids, optionally an id, and optionally
    parameters of its own: max_tokens, temperature, top_p, seed, stop, logprobs, n and so on. Or the input is OpenAI's
    batch file, with custom_id, method, url and body in each line, and so is then the output. Answers are written as
    they are completed, not in the order of the prompts; each has the index and the id of its prompt. A run that was
    stopped resumes when it is started again: it keeps the answers, retries prompts that failed, and refuses an input
    that has changed. Exit code 1 means that some prompts could not be answered; their lines have the reason under
    error.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    prompt: str | None = setting(None, TEXT, "Text to continue, or with --chat the user's message.", group=_PROMPTS)
    input_file: Path | None = setting(
        None,
        PATH,
        "Prompts to answer, many at a time: a JSON object a line, or a text a line (.txt); - for stdin.",
        metavar="FILE",
        group=_PROMPTS,
    )
    output_file: Path | None = setting(
        None, PATH, "File for their answers, a JSON object a line; - for stdout.", metavar="FILE", group=_PROMPTS
    )
    served_model_name: tuple[str, ...] = setting(
        (), TEXTS, "Name of the model in OpenAI's batch file. Default: DIR's name.", metavar="NAME", group=_PROMPTS
    )
    overwrite: bool = setting(False, SWITCH, "Start the output file over instead of resuming it.", group=_PROMPTS)
    max_new_tokens: int = setting(64, whole(1), "Stop an answer after N tokens.", group=_PROMPTS)
    chat: bool = setting(False, SWITCH, "Put the prompt into the model's chat template.", group=_PROMPTS)
    chat_template: Path | None = generating.chat_template()
    add_bos: bool | None = add_bos()
    as_json: bool = as_json()
    sampling: dict[str, Any] = generating.sampling(
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "stop", "ignore_eos", temperature=None,
    )  # fmt: skip
    limits: dict[str, Any] = generating.engine("max_num_seqs", "max_model_len", "kv_memory")
    draft_model: Path | None = generating.draft_model()
    computing: dict[str, Any] = generating.engine(
        "speculate", "draft_tokens", "dynamic", "attention_mode", "threads", "expert_parallel"
    )
    backend: str = generating.backend()

    def execute(self) -> int:
        self._require_one_source()
        template = generating.read_template(self.chat_template)
        backend = generating.resolve_backend(self.backend)
        config = self._config()
        _leave_to_first(self.model, backend, config)
        if note := generating.idle_note(self.sampling):
            console.note(note)
        if self.prompt is not None:
            self._answer_prompt(template, config, backend)
            return 0
        if backend != "native":
            raise UnsupportedError(
                "--input-file", got="the reference backend", expected="the native one", action=_NATIVE
            )
        return self._answer_file(template, config)

    def _require_one_source(self) -> None:
        """Refuse two kinds of prompts, or none, and options that are only for files beside a prompt."""
        if (self.prompt is None) == (self.input_file is None):
            got = "none" if self.prompt is None else "--input-file too"
            raise ConfigError("--prompt", got=got, expected="it or --input-file")
        if self.input_file is not None and self.output_file is None:
            raise ConfigError("--output-file", got="none", expected="where the answers to --input-file go")
        files = [name for name in ("output_file", "overwrite", "served_model_name") if getattr(self, name)]
        of_files = [*files[:1], *self.limits, *files[1:]]
        if self.prompt is not None and of_files:
            raise ConfigError(of_files[0], got="--prompt", expected="--input-file beside it")

    def _config(self) -> EngineConfig:
        sequences = self.limits.get("max_num_seqs", EngineConfig.max_num_seqs)
        tokens = max(EngineConfig.max_batched_tokens, 2 * sequences)
        return EngineConfig(**self.limits, **self.computing, draft_model=self.draft_model, max_batched_tokens=tokens)

    def _answer_file(self, template: str | None, config: EngineConfig) -> int:
        from eightfold.cli.batch import STANDARD
        from eightfold.cli.batch_input import OwnBatch, read_batch
        from eightfold.cli.batch_run import run_batch

        assert self.input_file is not None
        assert self.output_file is not None
        if self.output_file == STANDARD:
            self._require_file()
        defaults = {**self.sampling, "max_tokens": self.max_new_tokens}
        names = self.served_model_name or (title_of(self.model),)
        batch = read_batch(self.input_file, defaults, names, chat=self.chat)
        self._require_options(is_own=isinstance(batch, OwnBatch))
        files = [path for path in (self.input_file, self.output_file) if path != STANDARD and path.exists()]
        if len(files) == 2 and files[0].samefile(files[1]):
            raise InputError("--output-file", got="the input file", expected="another")
        result = run_batch(
            self.model, batch, self.output_file, template, self.add_bos, config, overwrite=self.overwrite
        )
        _report(result, self.output_file, self.as_json)
        return EXIT_FAILED if result.failed else 0

    def _require_file(self) -> None:
        """Refuse what makes no sense where answers go to stdout."""
        if self.overwrite:
            raise ConfigError("overwrite", got="--output-file -", expected="a file: stdout is not resumed")
        if self.as_json:
            raise ConfigError("--json", got="--output-file -", expected="a file: the answers are on stdout")

    def _require_options(self, *, is_own: bool) -> None:
        """Refuse options that do nothing for requests of this form."""
        if is_own and self.served_model_name:
            raise ConfigError("served_model_name", got="prompts of our own form", expected="OpenAI's batch file")
        given = [*self.sampling, *(["chat"] if self.chat else [])]
        given += ["max_new_tokens"] if self.max_new_tokens != RunCommand.max_new_tokens else []
        if not is_own and given:
            raise ConfigError(given[0], got="OpenAI's batch file", expected="it in the body of a line")

    def _answer_prompt(self, template: str | None, config: EngineConfig, backend: str) -> None:
        """Answer the prompt, and show the text as it is generated or everything as JSON."""
        with console.loading():
            checkpoint = console.opened(self.model)
            read = functools.cache(lambda: self._read(checkpoint, template))
            if backend == "native":
                generate, model = self._native(checkpoint, read, config)
            else:
                generate, model = self._reference(checkpoint, read, config), None
        started = time.monotonic()
        text, token_ids, reason, stats = generate(_ignore if self.as_json else _show)
        seconds = time.monotonic() - started
        guessed = stats if config.draft_model is not None or config.speculate else None
        if not self.as_json:
            print()
            how = f"{seconds:.1f} s, {reason}{_guesses_text(guessed)}"
            print(f"[{len(read()[1])} + {len(token_ids)} tokens, {how}]", file=sys.stderr)
            return
        console.print_json(
            {
                "text": text,
                "token_ids": token_ids,
                "prompt_tokens": len(read()[1]),
                "finish_reason": reason,
                "seconds": round(seconds, 3),
                "backend": backend,
                **_guesses_json(guessed),
                "world_size": 1 if model is None else model.world_size,
                # By how much loading has made each process larger, where that was measured.
                "resident_weights_mib": [] if model is None else model.resident_weights_mib,
            }
        )

    def _read(self, checkpoint: Checkpoint, template: str | None) -> _Read:
        """Return the tokenizer, and the prompt as tokens.

        Raises:
            CapacityError: the prompt is empty, or it and its answer do not fit the model's context.
        """
        from eightfold.tokenizer import Tokenizer

        assert self.prompt is not None
        tokenizer = Tokenizer(self.model, template, add_bos=self.add_bos)
        for note in tokenizer.notes:
            console.note(note)
        if self.chat:
            from eightfold.messages import read_messages

            messages = read_messages([{"role": "user", "content": self.prompt}], tokenizer.template_source())
            ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            ids = tokenizer.encode(self.prompt)
        if not ids:
            action = "Give some text with --prompt."
            raise CapacityError("prompt", got="no tokens", expected="at least one", action=action)
        if len(ids) + self.max_new_tokens > (context := checkpoint.config.context):
            raise CapacityError(
                "prompt",
                got=f"{len(ids)} tokens and {self.max_new_tokens} new ones",
                expected=f"1 to {context} together",
                action="Shorten the prompt or lower --max-new-tokens.",
            )
        return tokenizer, ids

    def _native(
        self, checkpoint: Checkpoint, read: Callable[[], _Read], config: EngineConfig
    ) -> tuple[_Generate, NativeModel]:
        """Load an engine for this one request, and the prompt while its weights are made ready.

        The memory of weights is measured for JSON: then they are loaded alone, which takes longer.
        """

        def prepare() -> None:
            import eightfold.engine.engine  # noqa: F401

            generating.sampling_params(self.sampling)
            read()

        load_draft, notes = None, list[str]()
        if config.draft_model is not None:
            from eightfold.engine.draft import open_draft

            load_draft, notes = open_draft(checkpoint, read()[0], config)
        if self.as_json:
            prepare()
        model = load_model(checkpoint, config, None if self.as_json else prepare)
        from eightfold.engine.engine import Engine
        from eightfold.tokenizer import stop_token_ids

        tokenizer, prompt_ids = read()
        draft = load_draft and load_draft()
        for note in notes:
            console.note(note)
        positions = len(prompt_ids) + self.max_new_tokens
        model.allocate_cache(positions)  # refuses what does not fit, in the words of this command
        config = replace(
            config,
            max_num_seqs=1,
            max_model_len=positions,
            kv_memory=model.pages * (model.page_bytes + (0 if draft is None else draft.page_bytes)),
            prefix_caching=False,
        )
        stop_ids = stop_token_ids(self.model, checkpoint.config_raw)
        engine = Engine(model, tokenizer, config, stop_ids=stop_ids, draft=draft)
        params = generating.sampling_params(self.sampling, max_tokens=self.max_new_tokens)
        engine.add_request("run", prompt_ids, params, streams=not self.as_json)

        def generate(show: Callable[[str], None]) -> _Generated:
            while engine.has_unfinished:
                for output in engine.step():
                    (answer,) = output.outputs
                    show(answer.delta_text)
            return answer.text, answer.token_ids, answer.finish_reason, engine.stats

        return generate, model

    def _reference(self, checkpoint: Checkpoint, read: Callable[[], _Read], config: EngineConfig) -> _Generate:
        """Load the oracle, which is greedy."""
        guessing = "--draft-model" if config.draft_model is not None else "--speculate" if config.speculate else ""
        if guessing:
            raise UnsupportedError(guessing, got="the reference backend", expected="the native one", action=_NATIVE)
        if self.sampling:
            raise UnsupportedError(
                "sampling options", got="the reference backend", expected="the native one", action=_NATIVE
            )
        console.require_torch("run --backend reference")
        from eightfold.model.reference.load import Decoder
        from eightfold.tokenizer import StreamDecoder, stop_token_ids

        tokenizer, prompt_ids = read()
        stop_ids = stop_token_ids(self.model, checkpoint.config_raw)
        decoder = Decoder(checkpoint, config.dynamic, config.attention_mode)

        def generate(show: Callable[[str], None]) -> _Generated:
            stream, token_ids, reason = StreamDecoder(tokenizer), list[int](), "length"
            for token in decoder.generate(prompt_ids, self.max_new_tokens):
                if token in stop_ids:
                    reason = "stop"
                    break
                token_ids.append(token)
                show(stream.push(token))
            show(stream.finish())
            return tokenizer.decode(token_ids), token_ids, reason, None

        return generate


def _leave_to_first(model: Path, backend: str, config: EngineConfig) -> None:
    """Go on in one process only; the others compute for it. Where nothing is shared, refuse more than one.

    Raises:
        UnsupportedError: there are several, and the backend is for one.
    """
    if backend == "native":
        leave_to_first(model, config)
        return
    from eightfold.parallel.world import World

    if (size := World.of_environment().size) > 1:
        raise UnsupportedError(
            "the reference backend", got=f"{size} processes", expected="one", action="Start it without torchrun."
        )


def _report(result: BatchResult, output_file: Path, as_json: bool) -> None:
    if as_json:
        found = {**asdict(result), "seconds": round(result.seconds, 3), **_guesses_json(result.guesses)}
        del found["guesses"]
        console.print_json(found)
    else:
        tokens = f"{result.prompt_tokens} + {result.generated_tokens} tokens"
        speed = result.generated_tokens / result.seconds if result.seconds else 0.0
        print(
            f"[{result.answered} answers, {tokens}, {result.seconds:.1f} s, {speed:.1f} tok/s"
            f"{_guesses_text(result.guesses)}]",
            file=sys.stderr,
        )
    if result.failed:
        total = result.answered + result.answered_before + result.failed
        name = "the output" if str(output_file) == "-" else output_file
        print(f"eightfold: {result.failed} of {total} prompts have an error in {name}.", file=sys.stderr)


def _guesses_json(stats: EngineStats | None) -> dict[str, Any]:
    """Return the keys of JSON output about guesses; None: nobody made any."""
    if stats is None:
        return {}
    return {
        "model_drafted": stats.model_drafted,
        "model_accepted": stats.model_accepted,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_pass": round(stats.tokens_per_pass, 3),
    }


def _guesses_text(stats: EngineStats | None) -> str:
    if stats is None:
        return ""
    right, all_of_them = stats.accepted + stats.model_accepted, stats.drafted + stats.model_drafted
    return f"; {right} of {all_of_them} guesses right, {stats.tokens_per_pass:.2f} tokens a pass"


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
