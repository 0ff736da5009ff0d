"""What a request may ask of the choice of its tokens, checked once, where it comes in.

Names, ranges and defaults are vLLM's, which are OpenAI's where OpenAI has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eightfold.errors import InputError, one_of

MAX_N = 128  # answers of one request
MAX_LOGPROBS = 20  # of the likeliest tokens, at each position
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # stop strings, characters of one
MAX_BIAS = 100.0
MAX_PENALTY = 2.0  # presence and frequency
MAX_INT = 2**63 - 1

# Below it the likeliest token is taken: a division by less would only overflow.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The form that an answer must have. Exactly one is given.

    Attributes:
        json_schema: a JSON schema, as text. Between two symbols there is little space, 40 characters at most.
        regex: a regular expression that the whole answer matches, in the syntax of Rust's regex: no look-around, and
            \\d stands for any digit of Unicode.
        grammar: a context-free grammar in llguidance's dialect of Lark; its first rule is `start`.
        json_object: any JSON object.
        choices: the answer is one of these texts.

    Raises:
        InputError: none or several are given, or one has the wrong type.
    """

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("json_schema", "regex", "grammar"):
            value = getattr(self, name)
            if value is not None:
                _require_text(f"structured {name}", value)
        _require_bool("structured json_object", self.json_object)
        choices = _strings("structured choices", self.choices)
        object.__setattr__(self, "choices", choices)
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            raise InputError(
                "structured output",
                got=" and ".join(given) or "nothing",
                expected=f"exactly one of {one_of(self.__dataclass_fields__)}",
            )
        if self.json_schema is not None:
            _require_schema(self.json_schema)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request's answers are chosen.

    Attributes:
        n: answers, each with randomness of its own.
        temperature: by which logits are divided; 0 takes the likeliest token.
        top_k: keep so many of the likeliest tokens; 0 or -1 keep all.
        top_p: keep the likeliest tokens whose probabilities together reach it.
        min_p: keep tokens with at least this share of the likeliest token's probability.
        repetition_penalty: logits of tokens in prompt or answer are divided by it if positive, else multiplied.
        presence_penalty: is subtracted from the logits of tokens in the answer.
        frequency_penalty: is subtracted once for each time a token is in the answer.
        seed: answers with the same seed are the same, whatever else runs; None for fresh randomness.
        stop: texts that end an answer as soon as it holds one.
        stop_token_ids: tokens that end an answer, besides the model's own.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logprobs: report the log-probability of each token, and of so many of the likeliest.
        prompt_logprobs: the same of the prompt's tokens.
        logit_bias: token id -> what is added to its logit.
        ignore_eos: the model's stop tokens do not end an answer.
        min_tokens: neither stop tokens nor stop strings end an answer before it has so many.
        max_tokens: an answer has at most so many; None: as the context allows.
        skip_special_tokens: leave special tokens out of the text.
        structured: the form that answers must have.

    Raises:
        InputError: a value has the wrong type or is out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _require_int("n", self.n, 1, MAX_N)
        _require_number("temperature", self.temperature, 0.0)
        _require_int("top_k", self.top_k, -1)
        _require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        _require_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _require_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            _require_bool(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            _require_int_or_none(name, getattr(self, name), 0, MAX_LOGPROBS)
        _require_int_or_none("seed", self.seed, -(2**63), 2**64 - 1)
        _require_int_or_none("max_tokens", self.max_tokens, 1)
        _require_int("min_tokens", self.min_tokens, 0, MAX_INT if self.max_tokens is None else self.max_tokens)
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise _wrong("structured", self.structured, "a StructuredOutput")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings: `stop`, known to be a tuple."""
        return self.stop if isinstance(self.stop, tuple) else (self.stop,)


def _wrong(name: str, got: Any, expected: str, action: str = "") -> InputError:
    return InputError(name, got=_shown(got), expected=expected, action=action)


def _shown(value: Any) -> str:
    """Render a value of any size and type for an error message."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_int(name: str, value: Any, least: int, most: int = MAX_INT) -> None:
    if not _is_int(value) or not least <= value <= most:
        span = f"of at least {least}" if most == MAX_INT else f"from {least} to {most}"
        raise _wrong(name, value, f"a whole number {span}")


def _require_int_or_none(name: str, value: Any, least: int, most: int = MAX_INT) -> None:
    if value is not None:
        _require_int(name, value, least, most)


def _require_number(name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """Check a finite number; `above`: `least` itself is out of the range."""
    is_number = _is_int(value) or isinstance(value, float)
    if not is_number or not _is_finite(value) or not least <= value <= most or (above and value == least):
        span = f"above {least:g}" if above else f"of at least {least:g}" if most == math.inf else f"from {least:g}"
        span += "" if most == math.inf else f"{' and up' if above else ''} to {most:g}"
        raise _wrong(name, value, f"a number {span}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, value, "text that UTF-8 can hold") from None


def _require_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("structured json_schema", got=str(error), expected="a JSON object") from None
    if not isinstance(schema, dict):
        raise _wrong("structured json_schema", schema, "a JSON object")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)):
        raise _wrong(name, value, "a list of texts")
    for item in value:
        _require_text(name, item)
    return tuple(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = _strings("stop", (value,) if isinstance(value, str) else value)
    if len(stops) > MAX_STOPS:
        raise InputError("stop", got=f"{len(stops)} texts", expected=f"at most {MAX_STOPS}")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise InputError("stop", got=f"{longest} characters", expected=f"at most {MAX_STOP_LENGTH}")
    return tuple(dict.fromkeys(stops))


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise _wrong("stop_token_ids", value, "a list of token ids")
    for token in value:
        _require_int("stop_token_ids", token, 0)
    return tuple(dict.fromkeys(value))


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", value, "token ids and what is added to their logits")
    for token, bias in value.items():
        _require_int("logit_bias token id", token, 0)
        _require_number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    return {token: float(bias) for token, bias in value.items()}
