"""What requests for generation ask for: POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields as fields_of
from typing import Any, NamedTuple

from eightfold.engine.reasoning import Start
from eightfold.engine.sampling_params import SamplingParams, biases_by_id
from eightfold.errors import EightfoldError
from eightfold.messages import words
from eightfold.server.answers import AnswerWriter, ChatAnswer, CompletionAnswer, Echo
from eightfold.server.conversations import read_conversation
from eightfold.server.extras import Extras
from eightfold.server.field_table import same
from eightfold.server.fields import Fields, bad_request, refused
from eightfold.server.forms import structured_output
from eightfold.server.generation import Asked, Encoded
from eightfold.server.served import Served
from eightfold.server.tools import ToolUse, answer_or_call, read_tools
from eightfold.tokenizer import Tokenizer
from eightfold.values import SWITCH, WHOLE, is_token_ids, shown_as_json

MAX_LOGIT_BIASES = 1024
NEVER = -100.0  # the bias that keeps a token out

# What endpoints read in ways of their own; other fields have the names and meanings of SamplingParams.
_OWN = ("max_tokens", "logprobs", "structured", "logit_bias", "kept_special_ids")
_SAME = tuple(field.name for field in fields_of(SamplingParams) if field.name not in _OWN)


class Said(NamedTuple):
    """What a request for a chat's next message says of the answer.

    Attributes:
        tools: that may be called in it.
        start: how it begins.
        params: how its tokens are chosen.
        shows_reasoning: whether its thoughts are sent.
    """

    tools: ToolUse
    start: Start
    params: SamplingParams
    shows_reasoning: bool


def read_chat(fields: Fields, service: Served, write: Callable[[Said], AnswerWriter] | None = None) -> Asked:
    """Return what a request for a chat's next message asks for.

    Args:
        fields: of the request.
        service: that answers it.
        write: makes what writes the answer; None: the answer is that of a chat.
    """
    params, tools, form_field = _params(fields, service)
    conversation = read_conversation(fields, service.template, tools.shown)
    (streams, extras), (splits, shows_reasoning) = _read_extras(fields, service), _read_reasoning(fields)
    last = conversation.messages[-1]
    echo = words(last) if fields.read("echo") and last["role"] == "assistant" else ""

    def write_chat(said: Said) -> AnswerWriter:
        return ChatAnswer(
            service.names[0],
            service.texts,
            tools,
            said.start,
            streams=streams,
            extras=extras,
            shows_reasoning=said.shows_reasoning,
            echo=echo,
        )

    def encode(tokenizer: Tokenizer) -> Encoded:
        prompt = conversation.prompt(tokenizer, service.thinking)
        # A forced call stands behind the thought.
        start = prompt.start if splits or tools.forced is not None else Start()
        said = Said(tools, start, params, shows_reasoning)
        return Encoded([prompt.token_ids], (write or write_chat)(said), prompt.start.params(params))

    return Asked(
        prompts=1,
        encode=encode,
        params=params,
        form_field=form_field,
        cache_salt=read_cache_salt(fields),
        streams=streams,
    )


def _read_reasoning(fields: Fields) -> tuple[bool, bool]:
    """Return whether reasoning is told from content, as SGLang names it, and whether it is sent, as vLLM does."""
    return fields.read("separate_reasoning", SWITCH, True), fields.read("include_reasoning", SWITCH, True)


def _params(fields: Fields, service: Served) -> tuple[SamplingParams, ToolUse, str]:
    """Return how tokens are chosen, what the request says about tools, and where the answer's form stands."""
    tools, (form, field) = read_tools(fields, service.tool_family), structured_output(fields)
    if form is not None and field is not None and field.startswith("response_format"):
        # Says what content looks like, and not that there is some, as clients of OpenAI's expect.
        form = answer_or_call(form, tools) if tools.forced is None else None
    if tools.forced is not None and form is not None:
        raise bad_request(f"tool_choice: got one that asks for a call beside {field}", param="tool_choice")
    wanted, top = fields.read("logprobs"), fields.read("top_logprobs")
    if top and not wanted:
        raise bad_request('top_logprobs: expected "logprobs": true beside it', param="top_logprobs")
    params = _sampling_params(
        fields,
        max_tokens=_read_max_tokens(fields),
        logprobs=top if wanted else None,
        structured=form or tools.forced,
        kept_special_ids=tools.marker_ids(service.tokenizer),
    )
    return params, tools, field or "tools"


Prompt = str | list[int]


def read_completion(fields: Fields, service: Served) -> Asked:
    """Return what a request for the continuation of prompts asks for."""
    logprobs, max_tokens = fields.read("logprobs"), _read_max_tokens(fields)
    prompts, special, echo = _prompts(fields), fields.read("add_special_tokens"), fields.read("echo")
    if max_tokens == 0 and not echo:
        name = fields.spelled("max_tokens")
        raise bad_request(f"{name}: got 0, expected at least 1, or echo", param=name)
    given: dict[str, Any] = {"prompt_logprobs": logprobs} if echo and logprobs is not None else {}
    form, form_field = structured_output(fields)
    params = _sampling_params(
        fields,
        max_tokens=max_tokens if max_tokens != 0 else 1,
        logprobs=logprobs,
        structured=form,
        **given,
    )
    streams, extras = _read_extras(fields, service)

    def encode(tokenizer: Tokenizer) -> Encoded:
        try:
            ids = [
                tokenizer.encode(prompt, special_tokens=special) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
        except EightfoldError as error:
            raise refused(error, param="prompt") from None
        answer = CompletionAnswer(
            service.names[0],
            service.texts,
            n=params.n,
            logprobs=logprobs,
            echo=[_echo(tokenizer, prompt, special) for prompt in prompts] if echo else None,
            only_prompts=max_tokens == 0,
            extras=extras,
            keeps_special=not params.skip_special_tokens,
        )
        return Encoded(ids, answer)

    salt = read_cache_salt(fields)
    return Asked(
        prompts=len(prompts),
        encode=encode,
        params=params,
        form_field=form_field,
        echoes=echo,
        cache_salt=salt,
        streams=streams,
    )


def _prompts(fields: Fields) -> list[Prompt]:
    """Return the prompts of a request: a text, token ids, or a list of either."""
    given = fields.any("prompt")
    several = isinstance(given, list) and bool(given) and not is_token_ids(given)
    prompts: list[Any] = given if several else [given]
    for at, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or is_token_ids(prompt)):
            where = f"prompt[{at}]" if several else "prompt"
            got = "an empty list" if prompt == [] else shown_as_json(prompt)
            raise bad_request(f"{where}: got {got}, expected a text or a list of token ids", param="prompt")
    if len({type(prompt) for prompt in prompts}) > 1:
        raise bad_request("prompt: got texts and token ids, expected one kind", param="prompt")
    return prompts


def _echo(tokenizer: Tokenizer, prompt: Prompt, special: bool) -> Echo:
    if isinstance(prompt, str):
        return Echo(prompt, len(tokenizer.bos) if special else 0)
    try:
        return Echo(tokenizer.decode(prompt, keep_special=True))
    except (OverflowError, TypeError):  # ids that are none; the engine refuses them by name
        return Echo("")


def _sampling_params(fields: Fields, **given: Any) -> SamplingParams:
    """Return how a request wants its tokens chosen.

    Args:
        fields: of the request.
        given: what the endpoint has read: max_tokens, logprobs, structured.
    """
    values = {name: fields.any(name) for name in _SAME}
    values["logit_bias"] = _logit_bias(fields)
    best_of = fields.read("best_of")
    if best_of is not None and best_of != (values["n"] or 1):
        raise bad_request("best_of: expected the same as n. Ask for n answers and choose.", param="best_of")
    # Null is the same as not given, except for the max_tokens that an endpoint has read.
    read = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingParams(**{**read, **given})
    except EightfoldError as error:
        name = str(error).partition(":")[0].partition(" ")[0]
        if name not in values and name not in given:
            raise refused(error) from None
        spelled = fields.spelled(name)
        raise bad_request(spelled + str(error).removeprefix(name), param=spelled) from None


def _read_max_tokens(fields: Fields) -> int | None:
    """Return how many tokens an answer may have; None: as many as the context allows, which -1 means too."""
    given = fields.any("max_tokens")
    found: int | None = None if same(given, -1) else fields.read("max_tokens")
    return found


def _read_extras(fields: Fields, service: Served) -> tuple[bool, Extras]:
    """Return whether the answer streams, and what it has beside itself."""
    streams, options = fields.read("stream"), fields.inside("stream_options")
    if options is not None and not streams:
        raise bad_request("stream_options: only with stream", param="stream_options")
    extras = Extras(
        fingerprint=service.fingerprint,
        usage=options is not None and options.read("include_usage"),
        usage_so_far=options is not None and options.read("continuous_usage_stats"),
        token_ids=fields.read("return_token_ids"),
        timings=fields.read("timings_per_token"),
    )
    return streams, extras


def read_cache_salt(fields: Fields) -> str:
    """Return a request's own salt of the prefix cache, which vLLM has too; empty where there is none."""
    return fields.read("cache_salt") or ""


def _logit_bias(fields: Fields) -> dict[int, Any] | None:
    given = fields.read("logit_bias")
    if given is None:
        return None
    if len(given) > MAX_LOGIT_BIASES:
        raise bad_request(f"logit_bias: got {len(given)}, expected at most {MAX_LOGIT_BIASES}", param="logit_bias")
    biases = biases_by_id(given) if isinstance(given, dict) else _biases_in_pairs(given)
    if biases is None:
        raise bad_request("logit_bias: expected token ids, as texts, and what is added to them", param="logit_bias")
    return biases


def _biases_in_pairs(given: list[Any]) -> dict[int, Any] | None:
    """Return biases as llama.cpp has them, where false stands for never; None where they are none."""
    if not all(isinstance(pair, list) and len(pair) == 2 and WHOLE.fits(pair[0]) for pair in given):
        return None
    biases = {token: NEVER if bias is False else bias for token, bias in given}
    return biases if len(biases) == len(given) else None
