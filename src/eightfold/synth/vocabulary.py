"""A tokenizer without training data: one token for each byte, and names up to the size of a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eightfold.config import ModelConfig

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def write_tokenizer(directory: Path, config: ModelConfig, raw: dict[str, Any]) -> None:
    """Write tokenizer.json, a chat template and what goes with them.

    Args:
        directory: where.
        config: of the model.
        raw: its config.json; bos_token_id and eos_token_id are where they stand there, the roles behind them.
    """
    special = special_tokens(raw)
    _tokenizer(config.vocab_size, special, raw["bos_token_id"]).save(str(directory / "tokenizer.json"))
    ends = {"bos_token": special[raw["bos_token_id"]], "eos_token": special[raw["eos_token_id"]]}
    settings = {
        **ends,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "generation_config.json", {key: raw[key] for key in ("bos_token_id", "eos_token_id")})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def special_tokens(raw: dict[str, Any]) -> dict[int, str]:
    """Return the special tokens by id."""
    bos, eos = raw["bos_token_id"], raw["eos_token_id"]
    ends = {bos: "<|begin_of_text|>", eos: "<|end_of_text|>"}
    return {**ends, **{max(ends) + 1 + i: role for i, role in enumerate(_ROLES)}}


def _tokenizer(size: int, special: dict[int, str], bos: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    bytes_first = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [special.get(i) or (bytes_first[i] if i < 256 else f"<|unused_{i}|>") for i in range(size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[bos]} $A", special_tokens=[(special[bos], bos)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
