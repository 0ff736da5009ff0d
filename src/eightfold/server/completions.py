"""POST /v1/completions: what a request asks for."""

from __future__ import annotations

from typing import Any

from eightfold.engine.sampling_params import MAX_LOGPROBS
from eightfold.errors import EightfoldError
from eightfold.server.answers import CompletionAnswer
from eightfold.server.fields import Fields, bad_request, between, refused, shown
from eightfold.server.generation import Asked
from eightfold.server.sampling import read_max_tokens, read_stream, sampling_params, structured_output
from eightfold.server.service import Service
from eightfold.tokenizer import Tokenizer
from eightfold.values import SWITCH, is_token_ids

DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | list[int]


def read_completion(fields: Fields, service: Service) -> Asked:
    """Return what a request for the continuation of prompts asks for."""
    logprobs = fields.read("logprobs", between(0, MAX_LOGPROBS))
    max_tokens = read_max_tokens(fields, DEFAULT_MAX_TOKENS, least=0)
    prompts, special = _prompts(fields), fields.read("add_special_tokens", SWITCH, True)
    echo = fields.read("echo", SWITCH, False)
    if max_tokens == 0 and not echo:
        raise bad_request("max_tokens: got 0, expected at least 1, or echo", param="max_tokens")
    given: dict[str, Any] = {"prompt_logprobs": logprobs} if echo and logprobs is not None else {}
    params = sampling_params(
        fields, max_tokens=max_tokens or 1, logprobs=logprobs, structured=structured_output(fields), **given
    )
    stream = read_stream(fields)

    def encode(tokenizer: Tokenizer) -> tuple[list[list[int]], list[str] | None]:
        try:
            ids = [
                tokenizer.encode(prompt, special_tokens=special) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
        except EightfoldError as error:
            raise refused(error, param="prompt") from None
        return ids, [_text(tokenizer, prompt) for prompt in prompts] if echo else None

    def answer(texts: list[str] | None) -> CompletionAnswer:
        name, only_prompts = service.settings.model_names[0], max_tokens == 0
        return CompletionAnswer(
            name,
            service.texts,
            n=params.n,
            logprobs=logprobs,
            echo=texts,
            only_prompts=only_prompts,
            shows_usage=stream["shows_usage"],
        )

    return Asked(prompts=len(prompts), encode=encode, params=params, answer=answer, **stream)


def _prompts(fields: Fields) -> list[Prompt]:
    """Return the prompts of a request: a text, token ids, or a list of either."""
    given = fields.any("prompt")
    several = isinstance(given, list) and bool(given) and not is_token_ids(given)
    prompts: list[Any] = given if several else [given]
    for at, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or is_token_ids(prompt)):
            where = f"prompt[{at}]" if several else "prompt"
            got = "an empty list" if prompt == [] else shown(prompt)
            raise bad_request(f"{where}: got {got}, expected a text or a list of token ids", param="prompt")
    if len({type(prompt) for prompt in prompts}) > 1:
        raise bad_request("prompt: got texts and token ids, expected one kind", param="prompt")
    return prompts


def _text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.decode(prompt, keep_special=True)
    except (OverflowError, TypeError):  # ids that are none; the engine refuses them by name
        return ""
