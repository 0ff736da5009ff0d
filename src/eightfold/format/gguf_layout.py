"""What a GGUF file of a Llama-family model holds: its names of architectures and modules, and the blocks of Q8_0.

    Q8_0    rows of blocks: float16 scale | 32 int8         real = stored * scale

Files of the architecture `llama` hold the rows of q and k in the order in which RoPE turns neighbours, model
directories in the order in which it turns halves.

Letters: H heads, D head_dim, N outputs, K inputs.

Sources: the format's specification (github.com/ggml-org/ggml, docs/gguf.md), the names in the gguf package, and
llama.cpp's own converter for the order of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eightfold.architectures import Names
from eightfold.errors import DependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# As import makes them of files, by `general.architecture`.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# As export writes them: Mistral is a Llama there.
WRITTEN_AS = {**{ours: theirs for theirs, ours in ARCHITECTURES.items()}, "MistralForCausalLM": "llama"}

PAIRED = "llama"  # the architecture whose q and k are in the order of neighbours

# Modules by their GGUF name; those of a layer stand behind blk.N.
NAMES = Names()  # of all these families
MODULES = {"token_embd": NAMES.embedding, "output_norm": NAMES.final_norm, "output": NAMES.head}
LAYER_MODULES = {
    "attn_norm": NAMES.before_attention,
    "ffn_norm": NAMES.before_ffn,
    **dict(zip(("attn_q", "attn_k", "attn_v"), NAMES.qkv, strict=True)),
    "attn_output": NAMES.o,
    "attn_q_norm": NAMES.q_norm,
    "attn_k_norm": NAMES.k_norm,
    **dict(zip(("ffn_gate", "ffn_up"), NAMES.gate_up, strict=True)),
    "ffn_down": NAMES.down,
}

# Holds how Llama 3.1 stretches its rotary frequencies; no weight.
ROPE_FACTORS = "rope_freqs.weight"

BLOCK = 32  # elements of Q8_0 with one scale


def block_dtype() -> np.dtype[Any]:
    """Return the numpy type of a block of Q8_0: `scale` and `values`."""
    import numpy as np

    return np.dtype([("scale", "<f2"), ("values", "i1", (BLOCK,))])


def pair(tensor: NDArray[Any], heads: int) -> NDArray[Any]:
    """Return rows of q or k, or their numbers, in the order of neighbours: (H, 2, D/2, ...) as (H, D/2, 2, ...)."""
    paired: NDArray[Any] = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return paired


def unpair(tensor: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo pair()."""
    unpaired: NDArray[Any] = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return unpaired


def require_gguf(command: str) -> Any:
    """Return the gguf package.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        action = "Install it: pip install 'eightfold[gguf]'"
        raise DependencyError(f"eightfold {command} needs gguf", got="none installed", action=action) from None
    return gguf
