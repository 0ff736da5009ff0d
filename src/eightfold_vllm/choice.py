"""So that nobody needs `--quantization`: a model directory with a description chooses the method by itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from eightfold.errors import EightfoldError
from eightfold.files import read_json
from eightfold.format.description import SHORT_NAME, find_description
from eightfold.format.directory import CONFIG_NAME
from eightfold_vllm import NAME


def choose_by_description() -> None:
    """Wrap the one place where vLLM makes the configuration of a model from the arguments of a user."""
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_model_config
    if getattr(make, "asks_eightfold", False):  # plugins may be loaded more than once
        return

    @functools.wraps(make)
    def create_model_config(self: Any) -> Any:
        choose(self)
        return make(self)

    create_model_config.asks_eightfold = True  # type: ignore[attr-defined]
    EngineArgs.create_model_config = create_model_config


def choose(arguments: Any) -> None:
    """Set the quantization of vLLM's arguments if their model is a directory of ours; leave any other as it is.

    Args:
        arguments: an EngineArgs; `quantization` and `hf_overrides` may be set.
    """
    directory = local_directory(arguments.model, arguments.revision)
    if arguments.quantization not in (None, NAME) or directory is None or find_description(directory) is None:
        return
    said = _said_by_config(directory)
    if isinstance(said, dict) and "quant_method" in said:  # made for another method, whatever lies beside it
        return
    arguments.quantization = NAME
    if said is not None and isinstance(arguments.hf_overrides, dict):
        # Older MindIE keeps settings of the NPU here, which name no method: vLLM stops at that.
        arguments.hf_overrides = {**arguments.hf_overrides, "quantization_config": {"quant_method": NAME}}


def _said_by_config(directory: Path) -> Any:
    try:
        return read_json(directory / CONFIG_NAME).get("quantization_config")
    except EightfoldError:  # vLLM says what is wrong with it
        return None


def local_directory(model: str, revision: str | None) -> Path | None:
    """Return where a model lies on this machine; None if it does not. Nothing is fetched.

    Args:
        model: a directory, or the id of a model on a hub, which may have been fetched before.
        revision: of the latter.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model, SHORT_NAME, revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None
