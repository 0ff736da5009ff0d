"""Quantize a Llama 3 model with the flags of MindIE's script of this name.

    python examples/models/llama3/convert_quant_weights.py --model_path FLOAT --save_directory OUT --w_bit 8 --a_bit 8

The flags are those of examples/convert/model_slim/quantifier.py, and all of them count. Without --disable_names, this
script keeps the linears float that the original always does:

    bfloat16                    every down_proj
    else hidden size 8192       every down_proj (the first 5, unless the context is 131072), all of layers 0 to 4
    else with --a_bit 8         every down_proj
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The root of the checkout: this file is run by its path, without PYTHONPATH.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from examples.convert.model_slim import quantifier

from eightfold.architectures import Names
from eightfold.cli import console
from eightfold.config import DType, ModelConfig, parse_config
from eightfold.families import dense_groups
from eightfold.files import read_json

# Llama 3 70B: its width, the context by which 3.1 is told from 3, and the layers that stay float.
WIDE = 8192
LONG_CONTEXT = 131072
FIRST_LAYERS = 5


def built_in_names(config: ModelConfig, a_bit: int) -> list[str]:
    """Return the linears that the original script keeps float, lm_head last; none for a small W8A16 model."""
    groups = {group.title: group.linears for group in dense_groups(config)}
    down = groups.pop("down")
    others = [linear for linears in groups.values() for linear in linears]
    down_layers, other_layers = _layers(config, a_bit)
    names = [Names().layer(i) + linear.name for i in range(down_layers) for linear in down]
    names += [Names().layer(i) + linear.name for i in range(other_layers) for linear in others]
    return [*names, Names().head] if names else []


def _layers(config: ModelConfig, a_bit: int) -> tuple[int, int]:
    """Return how many first layers keep down_proj, and how many keep everything else, float."""
    everywhere, first = config.num_layers, min(FIRST_LAYERS, config.num_layers)
    if config.dtype is DType.BF16:
        return everywhere, 0
    if config.hidden_size == WIDE:
        return (everywhere if config.max_position_embeddings == LONG_CONTEXT else first), first
    return (everywhere, 0) if a_bit != 16 else (0, 0)


def default_names(args: argparse.Namespace) -> Sequence[str]:
    """Return the built-in list for the model of a command line, and say that it is used."""
    path = Path(args.model_path) / "config.json"
    if not path.is_file():
        return ()  # eightfold says what is wrong with the directory
    names = built_in_names(parse_config(read_json(path), path), args.a_bit)
    if names:
        console.note(
            f"without --disable_names, {len(names)} linears stay float, as with the original script; "
            "--disable_names '' quantizes them."
        )
    return names


if __name__ == "__main__":
    sys.exit(quantifier.run(sys.argv[1:], "convert_quant_weights.py", default_names))
