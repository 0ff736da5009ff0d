"""What the commands that generate share: options for sampling and the engine, the backend, chat templates."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.options import model_path, settings
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CheckpointError
from eightfold.files import read_text
from eightfold.values import PATH, choice, setting

if TYPE_CHECKING:
    from eightfold.tokenizer import Tokenizer

MODEL = "A quantized or float model directory."
SAMPLING, ENGINE = "Choosing tokens", "Memory and computing"  # headings in the help

_TEMPLATE_BYTES = 1 << 20

# Without randomness these change nothing.
_OF_CHANCE = ("top_p", "top_k", "min_p", "seed")


def sampling(*names: str, **defaults: Any) -> Any:
    """Return the field for options that choose tokens."""
    return settings(SamplingParams, *names, group=SAMPLING, **defaults)


def engine(*names: str) -> Any:
    """Return the field for options of the engine."""
    return settings(EngineConfig, *names, group=ENGINE)


def draft_model() -> Any:
    """Return the field for EngineConfig's draft model, which may be a hub's."""
    known = EngineConfig.__dataclass_fields__["draft_model"].metadata
    return field(default=None, metadata={**known, "group": ENGINE, "read": model_path})


def chat_template() -> Any:
    """Return the field for a template in place of the model's."""
    return setting(None, PATH, "A jinja2 chat template in place of the model's.", metavar="FILE")


def backend() -> Any:
    """Return the field for what computes."""
    known = choice("auto", "native", "reference")
    help = "Backend that computes: native, reference (torch, slow), or auto, which prefers native."
    return setting("auto", known, help, group=ENGINE)


def resolve_backend(name: str) -> str:
    """Return `native` or `reference`, whichever is meant; that the fast one is not there is said in a note.

    Raises:
        UnsupportedError: native was asked for and was not built.
    """
    from eightfold.model import native as core

    if name == "native":
        core.require()
    if name == "native" or (name == "auto" and core.is_built()):
        if core.extension.available_isas() == ["scalar"]:
            console.note("this CPU has neither AVX2 nor AVX-512: plain C++ computes, which is slow.")
        return "native"
    if name == "auto":
        console.note(
            "the native backend is not used: it was installed without a C++ compiler. The reference backend is slow."
        )
    return "reference"


def sampling_params(defaults: dict[str, Any], **more: Any) -> SamplingParams:
    """Return parameters: greedy, then the command's defaults, then what belongs to one answer.

    Raises:
        InputError: a value is out of its range.
    """
    return SamplingParams(**{"temperature": 0.0, **defaults, **more})


def idle_note(options: dict[str, Any]) -> str | None:
    """Return what to say about options that change nothing because the likeliest token is taken."""
    idle = [f"--{name.replace('_', '-')}" for name in _OF_CHANCE if name in options]
    if not idle or options.get("temperature"):
        return None
    changes = "changes" if len(idle) == 1 else "change"
    return f"{' and '.join(idle)} {changes} nothing while --temperature is 0: the likeliest token is taken."


def require_template(tokenizer: Tokenizer, advice: str) -> None:
    """Refuse a model without a chat template, or with one that cannot be used.

    Args:
        tokenizer: of the model.
        advice: what to do without one.

    Raises:
        CheckpointError: there is none, or it is not a template.
    """
    if not tokenizer.has_chat_template:
        raise CheckpointError(
            "chat template",
            where=tokenizer.directory,
            got="none",
            expected="chat_template.jinja or tokenizer_config.json's",
            action=f"Give one with --chat-template FILE, or {advice}.",
        )
    tokenizer.require_template()


def read_template(path: Path | None) -> str | None:
    """Return the text of a chat template that was given.

    Raises:
        InputError: it cannot be read, or is larger than a template.
    """
    return None if path is None else read_text(path, "--chat-template", _TEMPLATE_BYTES)[0]
