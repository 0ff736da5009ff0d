"""What a request may ask of the choice of its tokens, checked once, where it comes in.

Names, ranges and defaults are vLLM's, which are OpenAI's where OpenAI has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from eightfold.errors import InputError, one_of
from eightfold.values import MAX_INT, SWITCH, TEXT, WORDS, Kind, number, number_above, optional, shown, whole

MAX_LOGPROBS = 20  # of the likeliest tokens, at each position
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # stop strings, characters of one

# Below it the likeliest token is taken: a division by less would only overflow.
GREEDY_TEMPERATURE = 1e-5

_TEXTS = Kind((tuple, list), "a list of texts", each=WORDS)
_TOKEN = whole(0)
_IDS = Kind((tuple, list), "a list of token ids", each=_TOKEN)
_PENALTY = number(-2, 2)
_BIAS = number(-100, 100)
_LOGPROBS = optional(whole(0, MAX_LOGPROBS))


def _row(kind: Kind, help: str, metavar: str = "") -> dict[str, Any]:
    """Return what is known of a field beside its name and default."""
    return {"kind": kind, "help": help, "metavar": metavar}


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The form that an answer must have: exactly one of the first five is given.

    Attributes:
        json_schema: a JSON schema, as text. Between two symbols there is little space, 40 characters at most.
        regex: a regular expression that the whole answer matches, in the syntax of Rust's regex: no look-around, and
            \\d stands for any digit of Unicode.
        grammar: a context-free grammar in llguidance's dialect of Lark; its first rule is `start`.
        json_object: any JSON object.
        choices: the answer is one of these texts.
        begins_after: the form begins with the token behind this text, such as "</think>", special tokens included.
            What stands before it is free, but the answer cannot end there by a stop token. Empty: at once.
        opened_by: the token that opens what stands before the form, such as "<think>": an answer that begins with
            another one is of the form from there. Empty, or no single token: whatever it begins with stands before.

    Raises:
        InputError: none or several forms are given, or a field has the wrong type.
    """

    json_schema: str | None = field(default=None, metadata={"kind": optional(WORDS)})
    regex: str | None = field(default=None, metadata={"kind": optional(WORDS)})
    grammar: str | None = field(default=None, metadata={"kind": optional(WORDS)})
    json_object: bool = field(default=False, metadata={"kind": SWITCH})
    choices: tuple[str, ...] = field(default=(), metadata={"kind": _TEXTS})
    begins_after: str = field(default="", metadata={"kind": TEXT})
    opened_by: str = field(default="", metadata={"kind": TEXT})

    def __post_init__(self) -> None:
        for each in fields(self):
            _require(f"structured {each.name}", getattr(self, each.name), each.metadata["kind"])
        object.__setattr__(self, "choices", tuple(self.choices))
        _require_size("structured begins_after", len(self.begins_after), MAX_STOP_LENGTH, "characters")
        given = [name for name in FORMS if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            raise InputError(
                "structured output",
                got=" and ".join(given) or "nothing",
                expected=f"exactly one of {one_of(FORMS)}",
            )
        if self.json_schema is not None:
            _require_schema(self.json_schema)

    @property
    def given(self) -> tuple[str, Any]:
        """The form that is given: its field and value."""
        return next((name, value) for name in FORMS if (value := getattr(self, name)))


# The fields of which exactly one is given.
FORMS = tuple(name for name in StructuredOutput.__dataclass_fields__ if name not in ("begins_after", "opened_by"))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request's answers are chosen.

    The fields are the table from which requests, prompt files and options of the command line are read: the metadata
    of each has its `kind` (values.Kind, with the range) and a `help` of one sentence.

    Raises:
        InputError: an argument is unknown, or a value has the wrong type or is out of its range.
    """

    n: int = field(default=1, metadata=_row(whole(1, 128), "Answers to give, each with its own randomness."))
    temperature: float = field(
        default=1.0, metadata=_row(number(0), "Divide the logits by this; 0 takes the likeliest token.")
    )
    top_k: int = field(default=0, metadata=_row(whole(-1), "Keep the K likeliest tokens; 0 keeps all.", "K"))
    top_p: float = field(
        default=1.0,
        metadata=_row(number_above(0, 1), "Keep the likeliest tokens whose probabilities together reach X."),
    )
    min_p: float = field(
        default=0.0,
        metadata=_row(number(0, 1), "Keep tokens with at least this share of the likeliest one's probability."),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_row(number_above(0), "Penalize tokens of the prompt and the answer by this factor; 1 turns it off."),
    )
    presence_penalty: float = field(
        default=0.0, metadata=_row(_PENALTY, "Subtract this from the logits of tokens that are in the answer.")
    )
    frequency_penalty: float = field(
        default=0.0, metadata=_row(_PENALTY, "Subtract this from a token's logit for each time it is in the answer.")
    )
    seed: int | None = field(
        default=None,
        metadata=_row(
            optional(whole(-(2**63), 2**64 - 1)),
            "Seed of the random numbers; equal seeds give equal answers. Default, and -1: a fresh one.",
        ),
    )
    stop: tuple[str, ...] | str = field(
        default=(), metadata=_row(_TEXTS, "End an answer when this text appears in it.")
    )
    stop_token_ids: tuple[int, ...] = field(
        default=(),
        metadata=_row(
            _IDS,
            "End an answer at these tokens, besides the model's own.",
        ),
    )
    include_stop_str_in_output: bool = field(
        default=False, metadata=_row(SWITCH, "Keep the stop string at the end of the text.")
    )
    logprobs: int | None = field(
        default=None,
        metadata=_row(_LOGPROBS, "Report each token's log-probability, and those of the N likeliest tokens."),
    )
    prompt_logprobs: int | None = field(
        default=None, metadata=_row(_LOGPROBS, "Report log-probabilities of the prompt's tokens too.")
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        hash=False,
        metadata=_row(
            Kind((Mapping,), "token ids and what is added to their logits"), "Add to the logits of single tokens."
        ),
    )
    ignore_eos: bool = field(default=False, metadata=_row(SWITCH, "Continue after the model's stop tokens."))
    min_tokens: int = field(
        default=0, metadata=_row(_TOKEN, "Do not end an answer, by token or by text, before it has N tokens.")
    )
    max_tokens: int | None = field(
        default=16,
        metadata=_row(optional(whole(1)), "End an answer after N tokens; without it, where the context ends."),
    )
    skip_special_tokens: bool = field(default=True, metadata=_row(SWITCH, "Leave special tokens out of the text."))
    kept_special_ids: tuple[int, ...] = field(
        default=(), metadata=_row(_IDS, "Keep these special tokens in the text, though others are left out of it.")
    )
    structured: StructuredOutput | None = field(
        default=None,
        metadata=_row(Kind((StructuredOutput,), "a StructuredOutput", is_optional=True), "The answer's form."),
    )

    def __new__(cls, **given: Any) -> SamplingParams:
        """Return the object that __init__ fills; what vLLM has beside these fields is not known."""
        for name in filter(lambda name: name not in cls.__dataclass_fields__, given):
            raise InputError(f"SamplingParams: got the argument {name}, which it does not know", action=_near(name))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for each in fields(self):
            _require(each.name, getattr(self, each.name), each.metadata["kind"])
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        _require("min_tokens", self.min_tokens, whole(0, MAX_INT if self.max_tokens is None else self.max_tokens))
        for token, bias in self.logit_bias.items():
            _require("logit_bias token id", token, _TOKEN)
            _require("logit_bias", bias, _BIAS)
        _require_size("stop", len(self.stop), MAX_STOPS, "texts")
        _require_size("stop", max(map(len, self.stop), default=0), MAX_STOP_LENGTH, "characters")
        object.__setattr__(self, "stop", tuple(dict.fromkeys(self.stop)))
        for name in ("stop_token_ids", "kept_special_ids"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        object.__setattr__(self, "logit_bias", {token: float(bias) for token, bias in self.logit_bias.items()})

    @property
    def keeps_special(self) -> bool | tuple[int, ...]:
        """Which special tokens stay in the text: all, none or those with these ids."""
        return self.kept_special_ids or False if self.skip_special_tokens else True

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings: `stop`, known to be a tuple."""
        return self.stop if isinstance(self.stop, tuple) else (self.stop,)


def _near(name: str) -> str:
    import difflib

    found = difflib.get_close_matches(name, SamplingParams.__dataclass_fields__, 1)
    return f"Did you mean `{found[0]}`?" if found else ""


def _require(name: str, value: Any, kind: Kind) -> None:
    misfit = kind.misfit(value)
    if misfit is not None:
        raise InputError(name, got=shown(misfit[0]), expected=misfit[1])


def _require_size(name: str, size: int, most: int, unit: str) -> None:
    if size > most:
        raise InputError(name, got=f"{size} {unit}", expected=f"at most {most}")


def _require_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("structured json_schema", got=str(error), expected="a JSON object") from None
    _require("structured json_schema", schema, Kind((dict, bool), "a JSON object"))


def biases_by_id(given: Mapping[str, Any]) -> dict[int, Any] | None:
    """Return biases as JSON has them, with token ids as texts, by numbers; None where one is no token id."""
    if not all(token.isdecimal() and len(token) < 10 for token in given):
        return None
    return {int(token): bias for token, bias in given.items()}


def schema_text(given: Any) -> Any:
    """Return a JSON schema as text, whether it was given so or as JSON; any other value as it is."""
    return json.dumps(given) if isinstance(given, (dict, list, bool)) else given
