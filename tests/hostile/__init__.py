"""What the tests of hostile directories share."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def shard(directory: Path) -> list[Path]:
    """Split the model into two indexed shards; return them."""
    tensors = load_file(str(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    shards = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[name.startswith("model.layers.1.")].name for name in tensors}
    for path in shards:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == path.name}, str(path))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shards
