"""`eightfold run`: one prompt, one answer; or a file of prompts, and a file of answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console, generating
from eightfold.cli.options import argument, as_json
from eightfold.cli.single_run import Single
from eightfold.engine.settings import EngineConfig
from eightfold.errors import ConfigError, UnsupportedError
from eightfold.values import PATH, SWITCH, TEXT, setting, whole

if TYPE_CHECKING:
    from eightfold.cli.batch_run import Tally

EXIT_FAILED = 1

_PROMPTS = "Prompts and answers"


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """Answer one prompt and show the text as it comes, or all prompts of a file.

    Example: eightfold run Llama-3.2-1B-w8a8 --chat --prompt "What's deep learning?"

    Answers are greedy unless --temperature is given.

    In several processes: torchrun --nproc_per_node 2 -m eightfold run DIR ...

    A file: eightfold run DIR --input-file prompts.jsonl --output-file answers.jsonl

    Its lines are objects with prompt, messages or prompt_token_ids, perhaps an id, and perhaps parameters of their own:
    max_tokens, temperature, top_p, seed, stop, logprobs, n and so on. Each answer is written as soon as it is there,
    with the index of its prompt and its id, so not in the prompts' order. A run that was stopped goes on when it is
    started again: what is answered is not done twice, what failed is tried again, and an input that has changed since
    is refused. Exit code 1: some prompts could not be answered; their lines have the reason under error.
    """

    model: Path = argument("DIR", generating.MODEL)
    prompt: str | None = setting(None, TEXT, "What to continue, or with --chat what to say.", group=_PROMPTS)
    input_file: Path | None = setting(
        None, PATH, "Prompts to answer, many at a time: a JSON object a line, or .txt.", metavar="FILE", group=_PROMPTS
    )
    output_file: Path | None = setting(None, PATH, "Where their answers go, as JSON.", metavar="FILE", group=_PROMPTS)
    overwrite: bool = setting(False, SWITCH, "Begin the output file anew, and do not go on with it.", group=_PROMPTS)
    max_new_tokens: int = setting(64, whole(1), "Stop after so many tokens.", group=_PROMPTS)
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
        from eightfold.cli.batch_run import Batch, run_batch

        assert self.input_file is not None
        assert self.output_file is not None
        defaults = {**self.sampling, "max_tokens": self.max_new_tokens}
        batch = Batch(
            self.model, self.input_file, self.output_file, self.overwrite, self.chat, template, defaults, config
        )
        tally = run_batch(batch)
        _report(tally, self.output_file, self.as_json)
        return EXIT_FAILED if tally.failed else 0


def _leave_to_first(model: Path, backend: str, config: EngineConfig) -> None:
    """Go on in one process only; the others compute for it. Where nothing is shared, refuse more than one.

    Raises:
        UnsupportedError: there are several, and the backend is for one.
    """
    if backend == "native":
        from eightfold.engine.loading import leave_to_first

        leave_to_first(model, threads=config.threads, dynamic=config.dynamic, attention=config.attention_mode)
        return
    from eightfold.parallel.world import World

    if (size := World.of_environment().size) > 1:
        raise UnsupportedError("the reference backend", got=f"{size} processes", expected="one")


def _require_native(backend: str) -> None:
    if backend != "native":
        raise UnsupportedError("--input-file", got="the reference backend", expected="the native one")


def _report(tally: Tally, output_file: Path, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "answered": tally.answered,
                "answered_before": tally.answered_before,
                "failed": tally.failed,
                "prompt_tokens": tally.prompt_tokens,
                "generated_tokens": tally.generated_tokens,
                "seconds": round(tally.seconds, 3),
                "world_size": tally.world_size,
                "resident_weights_mib": tally.resident_weights_mib,
            }
        )
    else:
        tokens = f"{tally.prompt_tokens} + {tally.generated_tokens} tokens"
        speed = f"{tally.seconds:.1f} s, {tally.speed:.1f} tok/s"
        print(f"[{tally.answered} answers, {tokens}, {speed}]", file=sys.stderr)
    if tally.failed:
        total = tally.answered + tally.answered_before + tally.failed
        print(f"eightfold: {tally.failed} of {total} prompts have an error in {output_file}.", file=sys.stderr)


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
