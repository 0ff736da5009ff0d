"""The model class that lm-eval asks for log-likelihoods and for texts.

Log-likelihoods are those of the engine's prompts: all requests of a task share the batches, as everywhere else. Where
`--model hf` puts BOS before a text, so does this, and windows of long texts are lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eightfold.engine.llm import LLM
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import CheckpointError

# Arguments of other models that lm-eval's command line hands to every model.
_IDLE = ("batch_size", "max_batch_size", "device", "trust_remote_code", "dtype")
# So many prompts are with the engine at a time: log-probabilities of all tokens are kept until a prompt is finished.
_AT_ONCE = 256

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")


class EightfoldLM(TemplateLM):  # type: ignore[misc]
    """A directory of a model, quantized or float, or the id of a hub.

    Args:
        pretrained: the directory, as `LLM` takes it.
        max_length: positions of a sequence; by default the model's context.
        max_gen_toks: new tokens of an answer, where a task does not say.
        add_bos_token: whether BOS stands before a text; by default as the tokenizer does it.
        arguments: further ones of `LLM`.

    Raises:
        EightfoldError: as LLM.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in arguments.items() if name not in _IDLE}
        if max_length is not None:
            given["max_model_len"] = max_length
        self._llm = LLM(pretrained, **given)
        self._pretrained, self._max_gen_toks, self._add_bos = str(pretrained), max_gen_toks, add_bos_token
        self._texts = self._llm.engine.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens of a prompt of which each gets a log-probability; the engine keeps a place for the next one."""
        return self._llm.engine.max_model_len - 1

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What names this tokenizer in lm-eval's cache of requests."""
        return self._pretrained.replace("/", "__")

    @cached_property
    def eot_token_id(self) -> int:
        return self._special("eos_token", "bos_token")

    @cached_property
    def prefix_token_id(self) -> int:
        return self._special("bos_token", "eos_token")

    def _special(self, *names: str) -> int:
        """Return the token of the first of these names that the model has."""
        known = self._texts.description()
        found = next((known[f"{name}_id"] for name in names if known.get(f"{name}_id") is not None), None)
        if found is None:
            raise CheckpointError("tokenizer", where=self._texts.directory, got="no BOS and no EOS", expected="one")
        return int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; BOS stands before them where the model puts it and the text does not have it."""
        asked = self._add_bos if add_special_tokens is None else add_special_tokens
        bos = self._texts.decode(self._texts.bos, keep_special=True)
        if add_special_tokens is None and bos and string.startswith(bos):
            asked = False
        ids = self._texts.encode(string, special_tokens=asked is not False)
        if asked and not self._texts.bos:
            ids = [self.prefix_token_id, *ids]
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._texts.decode(tokens)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the model's form; without a turn to answer, the last one is left open."""
        return self._texts.render_chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's text, by which lm-eval tells results apart."""
        return self._texts.template_source() if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prompts = [(context + wanted)[-self.max_length :] for _, context, wanted in requests]
        found: list[tuple[float, bool]] = []
        for output, (names, _, wanted) in zip(self._scored(prompts, disable_tqdm), requests, strict=True):
            rows = [row for row in (output.prompt_logprobs or ())[-len(wanted) :] if row is not None] if wanted else []
            total = sum(row.logprob for row in rows if row.logprob is not None)
            found.append((total, all(row.top[0][0] == row.token_id for row in rows)))
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, found[-1])
        return found

    def _scored(self, prompts: list[list[int]], disable_tqdm: bool) -> list[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        found: list[RequestOutput] = []
        for begin in range(0, len(prompts), _AT_ONCE):
            found += self._llm.generate(prompts[begin : begin + _AT_ONCE], params, use_tqdm=not disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers, each up to the first of its stops."""
        prompts, params, stops = [], [], []
        for text, asked in (request.args for request in requests):
            settings = normalize_gen_kwargs(asked, self._max_gen_toks)
            room = min(settings["max_gen_toks"], self.max_length - 1)
            prompts.append(self.tok_encode(text)[-(self.max_length + 1 - room) :])
            params.append(self._params(settings, room))
            stops.append(settings["until"])
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        answers = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            answers.append(postprocess_generated_text(output.outputs[0].text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _params(self, settings: Mapping[str, Any], room: int) -> SamplingParams:
        asked = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        # A stop of special tokens, such as </s>, is the model's own end here.
        stop = tuple(text for text in settings["until"] if text and text not in self._texts.special_tokens)
        return SamplingParams(**{"temperature": 0.0, **asked}, max_tokens=room, stop=stop)
