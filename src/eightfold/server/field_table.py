"""The fields of requests, as a table: what each is called, what it has to be, where it is valid and what it means.

From it requests are read (fields.py), /openapi.json is made, and the page in docs/serving.md is tested. A field of
something else's dialect stands here if it would change an answer: as another name of one of ours, or as one that is
refused. What is not here changes nothing and is ignored: hints, and numbers that only matter beside a refused field.

Sources: OpenAI's API reference; the request models of vLLM, SGLang and llama-cpp-python; the page of llama.cpp's
server; the parameters of TGI, Ollama, transformers and text-generation-webui.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from dataclasses import fields as fields_of
from typing import Any, NamedTuple

from eightfold.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from eightfold.values import LIST, OBJECT, STRING, SWITCH, WORDS, Kind, choice, whole

CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE = "chat", "completions", "responses", "tokenize", "detokenize"
GENERATING = frozenset({CHAT, COMPLETIONS, RESPONSES})
_CHOOSING = frozenset({CHAT, COMPLETIONS})  # whose answers are choices
ENDPOINTS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions", RESPONSES: "/v1/responses",
             TOKENIZE: "/tokenize", DETOKENIZE: "/detokenize"}  # fmt: skip


class Field(NamedTuple):
    """One field.

    Attributes:
        name: dots lead into objects.
        kind: what it has to be.
        help: what it means; of a refused field, what to do instead.
        default: what leaving it out means.
        also: other names of the same, in other dialects.
        paths: the endpoints that know it.
        neutral: values that change nothing, even where the field is refused.
        is_refused: whether any other value is refused.
        beside: a refused field matters only if this one is given and does something.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    also: tuple[str, ...] = ()
    paths: frozenset[str] = GENERATING
    neutral: tuple[Any, ...] = ()
    is_refused: bool = False
    beside: str = ""

    def changes_nothing(self, value: Any) -> bool:
        """Return whether a value means the same as leaving the field out."""
        return any(same(value, each) for each in (self.default, *self.neutral))


def same(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are the same; true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


_ANYTHING = Kind((object,), "any value")
_SCHEMA = Kind((dict, str, bool), "a JSON schema")
_FORM = Kind((dict, str), "a grammar")
_TEXTS = Kind((list,), "a list of texts", each=WORDS)
_MOST = 2**31

# Of these the endpoints read more than SamplingParams knows, or less.
_KINDS: dict[str, Kind] = {
    "stop": Kind((str, list), "a text or a list of texts"),
    "stop_token_ids": Kind((list,), "a list of token ids", each=whole(0)),
    "logit_bias": Kind((dict, list), "token ids and what is added to their logits, as an object or as pairs"),
}
_LIMITS = ("max_completion_tokens", "max_new_tokens", "max_output_tokens", "n_predict", "num_predict")
_ALSO: dict[str, tuple[str, ...]] = {
    "min_tokens": ("min_new_tokens",),
    "n": ("n_cmpl", "num_return_sequences"),
    "repetition_penalty": ("repeat_penalty",),
    "seed": ("sampling_seed", "random_seed"),
    "stop": ("stop_sequences", "stop_strings"),
    "include_stop_str_in_output": ("no_stop_trim",),
}


def _sampling() -> Iterator[Field]:
    """Yield the fields that are those of SamplingParams."""
    for each in fields_of(SamplingParams):
        name = each.name
        if name in ("logprobs", "max_tokens", "structured", "kept_special_ids"):  # endpoints have ways of their own
            continue
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        default = list(default) if isinstance(default, tuple) else default
        kind, also = _KINDS.get(name, each.metadata["kind"]), _ALSO.get(name, ())
        paths = _CHOOSING if name in ("n", "prompt_logprobs") else GENERATING
        yield Field(name, kind, each.metadata["help"], default, also, paths)


def _only(*paths: str) -> frozenset[str]:
    return frozenset(paths)


def _limit(least: int, default: int | None, path: str) -> Field:
    kind = Kind((int,), "a whole number", least=least, most=_MOST, outside=f"{least} to {_MOST}")
    help = "End an answer after N tokens; -1: where the context ends."
    return Field("max_tokens", kind, help, default, _LIMITS, _only(path), neutral=(-1,))


_CHATTING = _only(CHAT, RESPONSES, TOKENIZE)

_OWN = (
    Field("model", STRING, "One of the served names.", paths=GENERATING | {TOKENIZE, DETOKENIZE}),
    Field("messages", LIST, "The conversation so far.", paths=_only(CHAT, TOKENIZE)),
    Field("prompt", Kind((str, list), "a text, token ids, or a list of either"), "What is continued.",
          paths=_only(COMPLETIONS, TOKENIZE)),
    _limit(1, None, CHAT),
    _limit(1, None, RESPONSES),
    _limit(0, 16, COMPLETIONS),
    Field("stream", SWITCH, "Send the answer as server-sent events.", False),
    Field("stream_options", OBJECT, "What a stream has beside the answer."),
    Field("stream_options.include_usage", SWITCH, "End the stream with the usage.", False, paths=_CHOOSING),
    Field("stream_options.continuous_usage_stats", SWITCH, "Report the usage in every event.", False,
          paths=_CHOOSING),
    Field("logprobs", SWITCH, "Report the log-probability of each token.", False, paths=_only(CHAT)),
    Field("logprobs", whole(0, MAX_LOGPROBS), "Report log-probabilities, and those of the N likeliest tokens.",
          paths=_only(COMPLETIONS)),
    Field("top_logprobs", whole(0, MAX_LOGPROBS), "Report also those of the N likeliest tokens.", 0,
          paths=_only(CHAT, RESPONSES)),
    Field("best_of", whole(1, _MOST), "The same as n.", paths=_CHOOSING),
    Field("echo", SWITCH, "Repeat the prompt before each answer.", False, paths=_only(COMPLETIONS)),
    Field("echo", SWITCH, "Repeat the last message before each answer, if it is the assistant's.", False,
          paths=_only(CHAT)),
    Field("add_special_tokens", SWITCH, "Put before a prompt what the model puts before a text, such as BOS.", True,
          paths=_only(COMPLETIONS, TOKENIZE)),
    Field("add_generation_prompt", SWITCH, "Open the assistant's turn at the end of the prompt.", True,
          paths=_CHATTING),
    Field("continue_final_message", SWITCH, "Continue the last message, which is the assistant's.", False,
          paths=_CHATTING),
    Field("include_reasoning", SWITCH, "Report what the model thought.", True, paths=_only(CHAT, RESPONSES),
          neutral=(False,)),
    Field("separate_reasoning", SWITCH, "Tell what the model thought from what it says.", True,
          paths=_only(CHAT, RESPONSES)),
    Field("chat_template_kwargs", OBJECT, "Variables of the chat template.", {}, paths=_CHATTING),
    Field("enable_thinking", SWITCH, "Let the model think, if its chat template has this variable.", None, ("think",),
          _CHATTING, (False,)),
    Field("thinking", OBJECT, "Whether to think, as GLM and Kimi have it.", paths=_CHATTING,
          neutral=({"type": "disabled"},)),
    Field("thinking.type", Kind((str,), "enabled or disabled", choices=("enabled", "disabled")), "Whether to think."),
    Field("reasoning", OBJECT, "Whether and how much to think, as OpenRouter and Ollama have it.", paths=_CHATTING),
    Field("reasoning.enabled", SWITCH, "Whether to think."),
    Field("reasoning.effort", STRING, "How much to think."),
    Field("reasoning_effort", STRING, "How much to think, if the chat template knows it; none turns thinking off.",
          paths=_CHATTING),
    Field("tools", LIST, "Functions that the model may call.", [], paths=_CHATTING),
    Field("tool_choice", Kind((str, dict), "none, auto, required or an object with a function's name"),
          "Whether a function has to be called.", None, paths=_CHATTING, neutral=("auto", "none")),
    Field("parallel_tool_calls", SWITCH, "Let an answer make several calls.", True, paths=_CHATTING, neutral=(False,)),
    Field("response_format", OBJECT, "The form of the answer.", neutral=({"type": "text"},)),
    Field("response_format.type", STRING, "text, json_object, json_schema, regex or grammar."),
    Field("response_format.schema", _SCHEMA, "The JSON schema, as llama.cpp has it."),
    Field("response_format.pattern", WORDS, "The regular expression."),
    Field("response_format.grammar", STRING, "The grammar."),
    Field("response_format.value", _SCHEMA, "The schema or expression, as TGI has it."),
    Field("response_format.json_schema", OBJECT, "The JSON schema and what it is called."),
    Field("response_format.json_schema.name", STRING, "What the schema is called."),
    Field("response_format.json_schema.description", STRING, "What it is for."),
    Field("response_format.json_schema.strict", SWITCH, "The form is kept to in any case."),
    Field("response_format.json_schema.schema", _SCHEMA, "The JSON schema."),
    Field("json_schema", _SCHEMA, "A JSON schema that the answer matches.", None, ("guided_json",), neutral=("",)),
    Field("regex", STRING, "A regular expression that the answer matches.", None, ("guided_regex",), neutral=("",)),
    Field("grammar", _FORM, "A grammar of the answer, in llguidance's Lark or in llama.cpp's GBNF.",
          also=("guided_grammar", "ebnf", "grammar_string"), neutral=("",)),
    Field("guided_choice", _TEXTS, "Texts of which the answer is one."),
    Field("structured_outputs", OBJECT, "The form of the answer, as vLLM has it."),
    Field("structured_outputs.json", _SCHEMA, "A JSON schema."),
    Field("structured_outputs.regex", WORDS, "A regular expression."),
    Field("structured_outputs.grammar", STRING, "A grammar."),
    Field("structured_outputs.choice", _TEXTS, "Texts of which the answer is one."),
    Field("structured_outputs.json_object", SWITCH, "Any JSON object.", False),
    Field("cache_salt", WORDS, "Only requests with the same text reuse each other's computed prompts."),
    Field("return_token_ids", SWITCH, "Report token ids: token_ids of answers, prompt_token_ids.", False,
          paths=_CHOOSING),
    Field("timings_per_token", SWITCH, "Report how long prompt and answer took, as llama.cpp does.", False,
          paths=_CHOOSING),
    Field("return_token_strs", SWITCH, "Return the texts of the tokens too.", False, paths=_only(TOKENIZE)),
    Field("tokens", Kind((list,), "a list of token ids", each=whole(0)), "The tokens.", paths=_only(DETOKENIZE)),
    Field("skip_special_tokens", SWITCH, "Leave special tokens out of the text.", False, paths=_only(DETOKENIZE)),
)  # fmt: skip

_HERE = _only(RESPONSES)

_OF_RESPONSES = (
    Field("input", Kind((str, list), "a text or a list of items"), "The conversation, or what it goes on with.",
          paths=_HERE),
    Field("instructions", STRING, "What the system says first.", paths=_HERE),
    Field("previous_response_id", WORDS, "The response that this one goes on from.", paths=_HERE),
    Field("text", OBJECT, "How the text is.", {}, paths=_HERE),
    Field("text.format", OBJECT, "Its form: of type text, json_object or json_schema.", paths=_HERE),
    Field("text.verbosity", STRING, "Changes nothing.", paths=_HERE),
    Field("include", Kind((list,), "a list"), "What the response has beside its items.", [], paths=_HERE),
    Field("truncation", choice("auto", "disabled"), "auto: leave out the oldest turns if the context is too short.",
          "disabled", paths=_HERE),
    Field("store", SWITCH, "Keep the response for requests that build on it.", True),
    Field("metadata", OBJECT, "Texts that the response repeats.", {}),
    Field("user", STRING, "Repeated in the response."),
    Field("safety_identifier", STRING, "Repeated in the response."),
    Field("prompt_cache_key", STRING, "Repeated in the response."),
    Field("max_tool_calls", whole(1), "Repeated in the response; the server runs no tools."),
    Field("background", _ANYTHING, "Use stream.", None, (), _HERE, (False,), is_refused=True),
    Field("context_management", _ANYTHING, 'Use "truncation": "auto".', None, (), _HERE, ([],), is_refused=True),
    Field("conversation", _ANYTHING, "Use previous_response_id, or send the items.", paths=_HERE, is_refused=True),
    Field("moderation", _ANYTHING, "Nothing is moderated.", paths=_HERE, is_refused=True),
)  # fmt: skip

# Advice -> fields that are refused, with the values that change nothing.
_REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "adaptive_target": (-1,), "constraints": (), "custom_logit_processor": (), "custom_params": ({},),
        "diversity_penalty": (0,),
        "dry_multiplier": (0,), "dynamic_temperature": (False,), "dynatemp_range": (0,), "ec_transfer_params": ({},),
        "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
        "exponential_decay_length_penalty": (), "forced_bos_token_id": (),
        "forced_eos_token_id": (), "grammar_lazy": (False,),
        "grammar_triggers": ([],), "guidance_scale": (1,), "kv_transfer_params": ({},), "logits_processors": ([],),
        "min_keep": (0, 1), "mirostat": (0,), "mirostat_mode": (0,), "n_indent": (0,), "negative_prompt": ("",),
        "no_repeat_ngram_size": (0,), "nsigma": (0,), "penalty_alpha": (0,), "repetition_detection": (),
        "return_hidden_states": (False,), "return_meta_info": (False,), "return_progress": (False,),
        "return_prompt_text": (False,), "return_routed_experts": (False,), "return_sampling_mask": (False,),
        "return_tokens_as_token_ids": (False,), "sampler_order": ([],), "sampler_priority": ([],), "samplers": ([],),
        "session_params": ({},), "skew": (0,), "smoothing_factor": (0,), "spaces_between_special_tokens": (True,),
        "structural_tag": (), "task": (), "temperature_last": (False,), "tfs": (1,), "tfs_z": (1,),
        "token_healing": (False,), "top_a": (0,),
        "top_n_sigma": (-1, 0), "typ_p": (1,), "typical": (1,), "typical_p": (1,), "vllm_xargs": ({},),
        "watermark": (False,), "watermarking": (False,), "watermarking_config": ({},), "xtc_probability": (0,),
    },
    "Ask for tokens with logprobs.": {
        "decoder_input_details": (False,), "details": (False,), "logprob_token_ids": ([],), "n_probs": (0,),
        "post_sampling_probs": (False,), "return_logprob": (False,), "top_n_tokens": (0,),
    },
    "Only text is generated.": {"audio": (), "modalities": (["text"],)},
    "Only text is read.": {"image_data": ([],), "images": ([],), "mm_processor_kwargs": ({},)},
    "Put it into a message.": {
        "custom_system_message": ("",), "documents": ([],), "guideline": ("",), "safe_prompt": (False,),
        "system": ("",), "system_prompt": ("",),
    },
    "Put its fields beside the others.": {
        "extra_body": ({},), "options": ({},), "parameters": ({},), "sampling_params": ({},),
    },
    "Put what comes after into the prompt.": {
        "input_extra": ([],), "input_prefix": ("",), "input_suffix": ("",), "suffix": ("",),
    },
    "Requests are served in the order in which they come.": {"priority": (0,)},
    "Send a prompt that fits.": {"truncate": (), "truncate_prompt_tokens": ()},
    "The prompt's beginning is computed by this server.": {
        "context": ([],), "input_embeds": ([],), "input_ids": ([],), "prompt_embeds": ([],),
    },
    "The template is chosen when the server starts: --chat-template.": {
        "character": (), "chat_template": (), "chat_template_str": ("",), "instruction_template": (),
        "instruction_template_str": ("",), "mode": ("instruct",), "raw": (False,), "template": ("",),
        "tool_prompt": ("",),
    },
    "There are no adapters.": {
        "adapter_id": ("",), "adapters": ([],), "lora": ([],), "lora_name": ("",), "lora_path": ("",),
    },
    "There is no beam search.": {
        "early_stopping": (False,), "length_penalty": (0, 1), "num_beam_groups": (1,), "num_beams": (1,),
        "use_beam_search": (False,),
    },
    "There is no web search.": {"plugins": ([],), "web_search_options": ()},
    "Use add_special_tokens.": {"add_bos_token": (True,)},
    "Use continue_final_message.": {"continue_": (False,), "generation_prompt": ("",)},
    "Use echo.": {"return_full_text": (False,)},
    "Use include_usage of stream_options, and --report-cached-tokens.": {"return_cached_tokens_details": (False,)},
    "Use logit_bias or a grammar.": {"allowed_token_ids": ([],), "force_words_ids": ([],)},
    "Use logit_bias with token ids.": {"logit_bias_type": ("input_ids",)},
    "Use logit_bias.": {
        "bad_words": ([],), "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "ban_eos_token": (False,),
        "banned_strings": ([],), "banned_tokens": ([],),
        "custom_token_bans": ("",), "sequence_bias": ({}, []), "suppress_tokens": ([],),
    },
    "Use max_tokens.": {"auto_max_new_tokens": (False,), "max_length": (), "max_time": (), "t_max_predict_ms": (-1, 0)},
    "Use min_tokens.": {"min_length": (0,)},
    "Use response_format.": {
        "format": ("",), "guided_decoding": (), "guided_json_object": (False,), "json_mode": (False,),
        "output_format": (), "response_schema": (),
    },
    "Use return_token_ids.": {
        "return_prompt_token_ids": (False,), "return_tokens": (False,), "response_fields": ([],),
    },
    "Use stop_token_ids.": {"eos_token_id": ()},
    "Use stop.": {"stop_regex": ("", [])},
    "Use temperature 0 for the likeliest tokens.": {"do_sample": (True,)},
    "Use tools and tool_choice.": {"function_call": ("none",), "functions": ([],)},
    "Calls of tools that are offered are always recognised.": {"parse_tool_calls": (True,)},
    "Thoughts have no limit of their own. Use max_tokens.": {
        "reasoning.max_tokens": (), "reasoning_budget": (-1,), "reasoning_control": (False,),
        "thinking.budget_tokens": (), "thinking_budget": (-1,), "thinking_budget_tokens": (-1,),
        "thinking_token_budget": (-1,),
    },
    "Use include_reasoning or separate_reasoning.": {
        "reasoning.exclude": (False,), "reasoning_in_content": (False,),
        "reasoning_format": ("auto", "deepseek"), "stream_reasoning": (True,),
    },
    "White space is chosen by the server.": {
        "guided_whitespace_pattern": (), "structured_outputs.disable_any_whitespace": (False,),
        "structured_outputs.whitespace_pattern": (),
    },
    "Put it into the schema.": {"structured_outputs.disable_additional_properties": (False,)},
    "Use a grammar.": {"structured_outputs.structural_tag": ()},
}  # fmt: skip

_PENALIZED = "The penalty is for tokens of the whole prompt and answer."

FIELDS: tuple[Field, ...] = (
    *_sampling(),
    *_OWN,
    *_OF_RESPONSES,
    *(
        Field(name, _ANYTHING, advice, None, (), GENERATING | {TOKENIZE, DETOKENIZE}, neutral, is_refused=True)
        for advice, names in _REFUSED.items()
        for name, neutral in names.items()
    ),
    Field("add_special_tokens", _ANYTHING, "The chat template puts them.", paths=_only(CHAT, RESPONSES),
          neutral=(False,), is_refused=True),
    Field("repeat_last_n", _ANYTHING, _PENALIZED, neutral=(-1,), is_refused=True, beside="repetition_penalty"),
    *(
        Field(name, _ANYTHING, _PENALIZED, neutral=(True,), is_refused=True, beside="repetition_penalty")
        for name in ("penalize_nl", "penalize_newline")
    ),
)  # fmt: skip

# Endpoint, or none -> name -> field.
_AT: dict[str, dict[str, Field]] = {
    path: {each.name: each for each in reversed(FIELDS) if not path or path in each.paths} for path in ("", *ENDPOINTS)
}


def find(name: str, path: str) -> Field | None:
    """Return the field of a name at an endpoint, or at any if the endpoint is empty; None: there is none."""
    return _AT[path].get(name)


def canonical(name: str) -> str:
    """Return the first of a field's names."""
    return _NAMES.get(name, name)


def elsewhere(name: str) -> Field | None:
    """Return the field of a name that only another endpoint knows that generates; by any of its names."""
    found = (_AT[path].get(canonical(name)) for path in sorted(GENERATING))
    return next((each for each in found if each is not None and not each.is_refused), None)


# Other name -> name.
_NAMES = {".".join((*each.name.split(".")[:-1], other)): each.name for each in FIELDS for other in each.also}
