"""Options that choose tokens, as `run` and `chat` offer them; what they mean is engine/sampling_params.py's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightfold.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from eightfold.engine.sampling_params import SamplingParams
    from eightfold.tokenizer import Tokenizer

Temperature = Annotated[
    float | None, typer.Option(min=0, help="By which logits are divided; 0 takes the likeliest token.")
]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Keep the likeliest tokens whose probabilities together reach it.")
]
TopK = Annotated[int | None, typer.Option(min=0, metavar="K", help="Keep the K likeliest tokens; 0: all.")]
MinP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Keep tokens with this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(min=0, help="Divides the logits of tokens that were there before; 1: does nothing.")
]
PresencePenalty = Annotated[
    float | None, typer.Option(min=-2, max=2, help="Is subtracted from the logits of tokens that the answer has.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(min=-2, max=2, help="Is subtracted once for each time that the answer has a token.")
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="The same answers again.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends an answer that holds it; may be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's stop tokens.")]
ChatTemplate = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A jinja2 chat template in place of the model's.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Tokens of prompt and answer together. Default: the model's context."),
]
KvMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for keys and values, such as 2GiB. Default: what is needed and free."),
]
Speculate = Annotated[
    int, typer.Option(min=0, max=32, metavar="K", help="Guess K tokens from the prompt at a time; 0: do not.")
]

# Without randomness these change nothing.
_OF_CHANCE = ("top_p", "top_k", "min_p", "seed")


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, by the names of SamplingParams."""
    found = {name: value for name, value in options.items() if not (value is None or value is False or value == [])}
    if "stop" in found:
        found["stop"] = tuple(found["stop"])
    return found


def sampling_params(defaults: dict[str, Any], **more: Any) -> SamplingParams:
    """Return parameters: greedy, then the command's defaults, then what belongs to one answer.

    Raises:
        InputError: a value is out of its range.
    """
    from eightfold.engine.sampling_params import SamplingParams

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


def read_template(path: Path) -> str:
    """Return a chat template's text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("--chat-template", where=path, got=error.strerror, expected="a readable file") from None
    except UnicodeDecodeError as error:
        raise InputError("--chat-template", where=path, got=f"byte {error.start}", expected="UTF-8 text") from None
