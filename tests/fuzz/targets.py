"""The readers: what each is given, and what it may answer."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.errors import EightfoldError, InputError

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: returns inputs that it reads; it may use the reader's folder.
        make: returns the reader, given a folder of its own.
        share: of the inputs of a run over all readers.
        refusals: what it documents to raise.
    """

    seeds: Callable[[Path], list[bytes]]
    make: Callable[[Path], Read]
    share: float
    refusals: tuple[type[BaseException], ...] = (EightfoldError,)


FAMILY_CONFIGS: tuple[dict[str, Any], ...] = (
    {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4},
    {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {"num_hidden_layers": 2, "num_experts": [4, 8]},
    },
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 320,
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": [257, 258],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip
EXPERTS_CONFIG: dict[str, Any] = {
    **CONFIG, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "rope_scaling": None,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [0], "qkv_bias": True,
    "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def dumped(*values: Any) -> list[bytes]:
    """Return each value as JSON."""
    return [json.dumps(value).encode() for value in values]


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Read]:
    """Return what makes a reader of one file in a folder."""

    def make(work: Path) -> Read:
        path = work / name

        def each(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return each

    return make


# --- models


def header(tensors: dict[str, Any]) -> bytes:
    """Return a safetensors file: header, and zeros for the data."""
    text = json.dumps(tensors).encode()
    size = max([entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"], default=0)
    return struct.pack("<Q", len(text)) + text + bytes(size)


TENSORS: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "I8", "shape": [4, 8], "data_offsets": [0, 32]},
    "a.scale": {"dtype": "BF16", "shape": [4, 1], "data_offsets": [32, 40]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [40, 44]},
    "c": {"dtype": "I64", "shape": [0, 7], "data_offsets": [44, 44]},
}


def safetensors(path: Path) -> object:
    from eightfold.format.safetensors import MappedFile, read_header

    infos = read_header(path)
    if not infos:
        return None
    mapped = MappedFile(path)
    return [mapped.array(info).sum() for info in infos.values() if info.dtype in ("I8", "F32", "I64")]


def safetensors_header(path: Path) -> object:
    """Read a file whose header has the length that it says, and which is as long as a reader may hope."""
    text = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(44))
    return safetensors(path)


def config(path: Path) -> object:
    from eightfold.config import DType, parse_config
    from eightfold.files import read_json
    from eightfold.written_config import both_dialects

    raw = read_json(path)
    return both_dialects(raw, parse_config(raw, path), DType.BF16)


def family(path: Path) -> object:
    from eightfold.config import has_engine
    from eightfold.files import read_json
    from eightfold.layouts import expert_count, layer_count, layout_of

    raw = read_json(path)
    return has_engine(raw), layout_of(raw, path, is_generic=True), layer_count(raw, path), expert_count(raw, 0)


def description(path: Path) -> object:
    from eightfold.format.description import check_entries, read_description

    found = read_description(path)
    check_entries(found, list(found.tags))
    return found


def quantized(work: Path) -> dict[str, bytes]:
    """Return the files of a quantized model, without its journal."""
    from eightfold.quant.pipeline import quantize_checkpoint
    from eightfold.quant.recipe import Recipe
    from eightfold.scheme import QuantType
    from tests.conftest import tiny_config, token_samples, write_model

    if not (work / "model").is_dir():
        small = tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        quantize_checkpoint(write_model(work / "float", small), work / "model", Recipe(QuantType.W8A8), token_samples())
        (work / "model" / "eightfold_journal.jsonl").unlink()
    return {path.name: path.read_bytes() for path in sorted((work / "model").iterdir()) if path.is_file()}


def of_quantized(files: dict[str, bytes]) -> list[str]:
    """Return the names of the configuration, the description and the weights."""
    return ["config.json", *(name for name in files if "description" in name or name.endswith(".safetensors"))]


def quantized_seeds(work: Path) -> list[bytes]:
    """Return the contents of these, and an index of the weights."""
    from eightfold.format.safetensors import read_header

    files = quantized(work)
    names = of_quantized(files)
    index = {"weight_map": dict.fromkeys(read_header(work / "model" / names[-1]), names[-1])}
    return [*(files[name] for name in names), *dumped(index)]


def checkpoint(work: Path) -> Read:
    """Read a directory of which one file is the input; which, its beginning says."""
    from eightfold.format.checkpoint import Checkpoint

    files = quantized(work)
    config, description, weights = of_quantized(files)
    index = weights.removesuffix(".safetensors") + ".safetensors.index.json"
    signs = ((b"weight_map", index), (b"model_quant_type", description), (b"architectures", config))

    def read(data: bytes) -> object:
        found = [name for sign, name in signs if sign in data]
        name = found[0] if found else weights
        (work / "model" / name).write_bytes(data)
        try:
            opened = Checkpoint.open(work / "model")
            return [opened.array(name).shape for name in opened.tensors]
        finally:
            if name in files:
                (work / "model" / name).write_bytes(files[name])
            else:
                (work / "model" / name).unlink()

    return read


# --- texts


def tokenizer_files() -> dict[str, bytes]:
    """Return the files of a byte-level tokenizer with special tokens and a chat template."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [*map(chr, printable), *(chr(256 + at) for at in range(len(others)))]
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": 257 + at, "content": text, **plain} for at, text in enumerate(("<s>", "</s>", "<|user|>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {symbol: at for at, symbol in enumerate([*symbols, "he"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["h e"], "byte_fallback": False}
    fast = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": {"type": "NFC"},
        "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "add_bos_token": True, "chat_template": TEMPLATE, "extra_special_tokens": {}, "model_max_length": 256,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(fast).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [258], "temperature": 0.6}).encode(),
        "config.json": json.dumps(CONFIG).encode(),
    }


def write_tokenizer(directory: Path) -> Path:
    """Write these files."""
    directory.mkdir(exist_ok=True)
    for name, data in tokenizer_files().items():
        (directory / name).write_bytes(data)
    return directory


def tokenizer(name: str) -> Callable[[Path], Read]:
    """Return what makes a reader of one of a tokenizer's files, also as `quantize` writes it again."""

    def make(work: Path) -> Read:
        from eightfold.format.tokenizer_files import write_for_both
        from eightfold.tokenizer import StreamDecoder, Tokenizer, stop_token_ids

        directory = work / "tokenizer"

        def read(data: bytes) -> object:
            write_tokenizer(directory)
            (directory / name).write_bytes(data)
            found = Tokenizer(directory)
            note = write_for_both(directory)
            assert note is None or "\n" not in note
            assert Tokenizer(directory).encode("Hello") == found.encode("Hello")
            ids = found.encode("Hello </s> é \x00 " + "ab" * 50)
            found.decode(ids, keep_special=True)
            stream = StreamDecoder(found)
            for token in (*ids[:20], 0, 259, 2**31 - 1):
                stream.push(token)
            return stream.finish(), stop_token_ids(directory, CONFIG), found.has_chat_template, found.notes

        return read

    return make


MERGES = b"#version: 0.2\nh e\nl l\n"


def older_tokenizer(work: Path) -> Read:
    """Read GPT-2's two files, which transformers converts; the input is one or the other."""
    from eightfold.tokenizer import Tokenizer

    directory = work / "tokenizer"
    directory.mkdir(exist_ok=True)
    vocab = {**json.loads(tokenizer_files()["tokenizer.json"])["model"]["vocab"], "ll": 257}
    (directory / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen2"}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))

    def read(data: bytes) -> object:
        is_vocab = data[:1] == b"{"
        (directory / "vocab.json").write_bytes(data if is_vocab else json.dumps(vocab).encode())
        (directory / "merges.txt").write_bytes(MERGES if is_vocab else data)
        return Tokenizer(directory).encode("Hello")

    return read


def template(work: Path) -> Read:
    from eightfold.tokenizer import Tokenizer

    directory = write_tokenizer(work / "tokenizer")

    def read(data: bytes) -> object:
        given = Tokenizer(directory, data.decode("utf-8", "replace"))
        given.require_template()
        return given.encode_chat(MESSAGES, add_generation_prompt=True, tools=[TOOL])

    return read


def calibration(path: Path) -> object:
    from eightfold.quant.dataset import read_rows, read_token_ids

    if path.read_bytes()[:2] == b"[[":
        return read_token_ids(path, vocab_size=320)
    return read_rows(path)


CALIBRATION = (
    *dumped(["a b", "c"], [{"prompt": "a", "ans": "b"}], [[1, 2], [3]]),
    *dumped([{"conversations": [{"from": "human", "value": "x"}]}]),
    b'{"text": "a"}\n{"messages": [{"role": "user", "content": "x"}]}\n',
    b"plain\nlines\n",
)


def recipe(path: Path) -> object:
    from eightfold.quant.recipe_file import make_recipe, read_recipe, render_recipe

    return render_recipe(make_recipe(read_recipe(path)))


RECIPES = (
    b"scheme: w8a8\nanti_outlier: m4\nact_method: histogram\nkeep_float: ['*.down_proj']\n",
    b"scheme: w8a8-dynamic\nfa_quant: true\nfa_amp: 2\ndisable_level: L2\ndtype: bf16\n",
    b"scheme: w8a16\nkv_int8: true\nkv_observe: pre-rope\nkv_symmetric: true\n",
)


def journal(path: Path) -> object:
    from eightfold.format import journal as lines

    entries = lines.read_entries(path.parent)
    assert entries is not None
    lines.require_finished(path.parent)
    return lines.progress_text(entries), lines.closing_line(entries)


def journal_seed() -> bytes:
    from eightfold.format.journal import render

    entries: list[dict[str, Any]] = [
        {"format": 1, "command": "quantize", "layers": 2, "recipe": {"scheme": "w8a8"}},
        {"step": "layer 0", "tensors": {"a": 123}, "decisions": {"a": "w8a8"}, "hidden": [1, 2]},
        {"complete": {"config.json": [3, 4]}},
    ]
    return b"".join(render(entry) for entry in entries)


# --- requests


def batch(path: Path) -> object:
    from eightfold.cli.batch_input import read_batch

    batch = read_batch(path, {"max_tokens": 5, "seed": 1}, ("model",))
    return [batch.fingerprint(index) for index in range(len(batch))]


BATCHES = (
    b'{"prompt": "Hello", "max_tokens": 5, "stop": ["x"]}\n{"prompt": "a", "seed": 3}\n',
    b'{"messages": [{"role": "user", "content": "Hi"}], "top_p": 0.5}\n',
    b'{"prompt_token_ids": [1, 2, 3], "structured": {"regex": "[a-z]+"}, "logit_bias": {"5": -1}, "n": 2}\n',
    b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "n": 2}}\n',
)

SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": PARAMETERS}}
REQUESTS: tuple[dict[str, Any], ...] = (
    {"model": "m", "messages": MESSAGES, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "tools": [TOOL]},
    {
        "messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": ""}],
        "tools": [TOOL],
        "tool_choice": "required",
    },
    {"messages": MESSAGES, "response_format": SCHEMA, "logprobs": True, "top_logprobs": 2},
    {"prompt": "Hello", "n": 2, "logprobs": 3, "echo": True, "stop": ["a", "b"], "temperature": 0.5, "top_p": 0.9},
    {"prompt": [[1, 2], [3]], "guided_regex": "[ab]+", "logit_bias": {"5": -1}, "min_tokens": 1, "cache_salt": "s"},
    {"prompt": ["a", "b"], "structured_outputs": {"choice": ["x", "y"]}, "stop_token_ids": [5], "best_of": 1},
    {"messages": MESSAGES, "n_predict": -1, "reasoning": {"effort": "low"}, "thinking": {"type": "disabled"}},
    {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}], "content": []},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": "b", "id": "c", "status": "completed"},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi"}, {"type": "refusal", "refusal": ""}],
            },
        ],
        "instructions": "a",
        "truncation": "auto",
        "include": ["message.output_text.logprobs"],
        "text": {"format": {"type": "json_schema", "name": "s", "schema": PARAMETERS}},
    },
    {
        "input": "a",
        "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto"},
    },
    {"prompt": "a", "grammar": 'root ::= "a" | [b-d]+ "\\u0041"', "logit_bias": [[5, False]], "repeat_last_n": -1},
)


def requests(work: Path) -> Read:
    from eightfold.server.field_table import CHAT, COMPLETIONS, RESPONSES
    from eightfold.server.fields import Fields, parse
    from eightfold.server.requests import read_chat, read_completion
    from eightfold.server.response_items import read_items
    from eightfold.server.response_requests import read_response
    from eightfold.server.served import Served
    from eightfold.tokenizer import Tokenizer

    known = Tokenizer(write_tokenizer(work / "tokenizer"), TEMPLATE)
    service = Served(known, 2**16, ("m",))

    def read(data: bytes) -> object:
        values = parse(data)[0]
        names = {CHAT: "messages", RESPONSES: "input"}
        path = next((path for path, name in names.items() if values.get(name) is not None), COMPLETIONS)
        fields = Fields(values, path)
        fields.refuse_unsupported()
        if path == CHAT:
            asked = read_chat(fields, service)
        elif path == RESPONSES:
            asked = read_response(fields, service, read_items(fields.any("input"), lambda _: None), None)
        else:
            asked = read_completion(fields, service)
        assert fields.ignored is not None
        return asked.encode(known) if path == COMPLETIONS and asked.prompts < 50 else asked

    return read


def line_error() -> tuple[type[BaseException], ...]:
    """Return what the reader of a line of a file raises, to be told with its number."""
    from eightfold.cli.batch import LineError

    return EightfoldError, LineError


def api_error() -> tuple[type[BaseException], ...]:
    """Return what a server answers with."""
    try:
        from eightfold.server.fields import ApiError
    except ImportError:
        return (EightfoldError,)
    return EightfoldError, ApiError


TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
FORMS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-z]{2,5}(x|y)*"},
    {"json_schema": {**PARAMETERS, "required": ["a"], "additionalProperties": False}},
    {"json_schema": TREE},
    {"grammar": 'start: a b\na: /[0-9]+/\nb: "x" b | "y"'},
    {"choices": ["yes", "no"]},
    {"json_object": True},
)


def forms(work: Path) -> Read:
    import random

    import numpy as np

    from eightfold.cli.batch_input import _structured
    from eightfold.engine.structured import GrammarCompiler, fill_masks
    from eightfold.tokenizer import Tokenizer

    compiler = GrammarCompiler(Tokenizer(write_tokenizer(work / "tokenizer")), 320, frozenset({258}))

    def read(data: bytes) -> object:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise InputError("no form") from None
        grammar = compiler.compile(_structured(fields))
        rng = random.Random(len(data))
        for _ in range(12):
            bits = np.unpackbits(fill_masks([grammar], 320).view(np.uint8), bitorder="little")
            ids = np.flatnonzero(bits).tolist()
            if not ids or not grammar.accept(rng.choice(ids)) or grammar.is_finished:
                break
        return grammar

    return read


# --- GGUF


def gguf_seed(_: Path) -> list[bytes]:
    import tempfile

    from tests.importers.gguf_source import Source, float_config

    with tempfile.TemporaryDirectory() as directory:
        small = float_config(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        path = Source(small).write(Path(directory, "a.gguf"))
        return [path.read_bytes()]


def gguf(path: Path) -> object:
    from eightfold.config import DType, parse_config
    from eightfold.importers import gguf as importer

    file = importer.open_file(path)
    found = parse_config(importer.read_config(file, DType.BF16), path)
    names = importer.match_tensors(file, found)
    return [importer.read_float(file, found, *pair, DType.BF16).shape for pair in names.items()]


def _names(*names: str) -> Callable[[Path], list[bytes]]:
    return lambda _: [tokenizer_files()[name] for name in names]


DESCRIPTION = {
    "model_quant_type": "W8A8", "a.weight": "W8A8", "a.input_scale": "W8A8", "b": "FLOAT", "version": "1.0.0"
}  # fmt: skip

MARKDOWN = (
    '# T\n\n- a *b* `c`\n\n> [d](https://e.f "g") ![h](http://i/j)\n\n|a|b|\n|-|:-:|\n|1|~~2~~|\n\n```py\nx\n```\n',
    "<b onclick=x>\n\n[a]: mailto:b\n[a] <http://c> \\(x_1\\) $$y$$ $z$\n\n1. a\n\n   b\n***\n    c&amp;\\*",
)
KNOWN = (
    r"(?:[^<>]|</?(?:p|h[1-6]|ul|li|blockquote|pre|em|strong|s|table|thead|tbody|tr|code)>|</(?:a|ol|th|td|span)>"
    r'|<[bh]r />|<ol(?: start="\d+")?>|<code class="language-[^"<>]*">|<span class="formula">'
    r'|<t[hd](?: class="(?:left|center|right)")?>|<a href="(?:(?i:https?:|mailto:)[^"<>]*)?"(?: title="[^"<>]*")?>)*'
)


def markdown(_: Path) -> Read:
    from eightfold.server.markdown import blocks_of

    def read(data: bytes) -> object:
        blocks = blocks_of(data.decode())
        assert re.fullmatch(KNOWN, "".join(block["html"] for block in blocks)), "unknown elements or attributes"
        return blocks

    return read


TARGETS: dict[str, Target] = {
    "safetensors": Target(lambda _: [header(TENSORS), header({})], of_file("a.safetensors", safetensors), 14),
    "safetensors-header": Target(lambda _: dumped(TENSORS), of_file("b.safetensors", safetensors_header), 14),
    "config": Target(lambda _: dumped(CONFIG, EXPERTS_CONFIG), of_file("config.json", config), 14),
    "family": Target(lambda _: dumped(*FAMILY_CONFIGS), of_file("config.json", family), 6),
    "description": Target(lambda _: dumped(DESCRIPTION), of_file("quant_model_description.json", description), 14),
    "journal": Target(lambda _: [journal_seed()], of_file("eightfold_journal.jsonl", journal), 12),
    "recipe": Target(lambda _: list(RECIPES), of_file("recipe.yaml", recipe), 4),
    "calibration": Target(lambda _: list(CALIBRATION), of_file("calibration.jsonl", calibration), 8),
    "requests": Target(lambda _: dumped(*REQUESTS), requests, 10, api_error()),
    "batch": Target(lambda _: list(BATCHES), of_file("batch.jsonl", batch), 8),
    "tokenizer": Target(_names("tokenizer.json"), tokenizer("tokenizer.json"), 0.6),
    "tokenizer-settings": Target(_names("tokenizer_config.json"), tokenizer("tokenizer_config.json"), 1),
    "generation-settings": Target(_names("generation_config.json"), tokenizer("generation_config.json"), 1),
    "older-tokenizer": Target(
        lambda _: [MERGES, *dumped({"h": 0, "e": 1, "he": 2, "l": 3, "ll": 4})], older_tokenizer, 0.1
    ),
    "template": Target(lambda _: [TEMPLATE.encode()], template, 0.3),
    "forms": Target(lambda _: dumped(*FORMS), forms, 0.3, line_error()),
    "markdown": Target(lambda _: [text.encode() for text in MARKDOWN], markdown, 4, (UnicodeDecodeError,)),
    "gguf": Target(gguf_seed, of_file("a.gguf", gguf), 0.5),
    "checkpoint": Target(quantized_seeds, checkpoint, 0.6),
}
