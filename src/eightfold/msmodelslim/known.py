"""The settings that msModelSlim 26.1.0 recommends for a model and a type, as far as they can be made here."""

from __future__ import annotations

from eightfold.errors import UnsupportedError, one_of
from eightfold.msmodelslim.practice import Practice

# What a type's name means, and why it is not made.
_NOT_MADE = {
    "w4": "4-bit weights are not made",
    "w16": "sparse float weights are not made",
    "w8a8s": "sparse weights are not made",
}
TYPES = ("w8a8", "w8a16", "w8a8c8", "w8a8f8")
ALL_TYPES = (*TYPES, "w8a8s", "w4a4", "w4a8", "w4a4c8", "w4a4f8", "w4a8c8", "w4a4f4", "w16a16s")

_DOWN = ("*.mlp.down_proj",)
_MINMAX = ("--act-method", "minmax")
_C8 = ("--kv-int8", "--kv-observe", "pre-rope")
_QWEN3_32B = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2, 6, 7, 11, 43, 44, 45, 62))

_STATIC = Practice("w8a8", "none", _MINMAX, _DOWN)

_BY_MODEL = {
    "w8a8": {
        "Qwen2-7B": _STATIC,
        "Qwen2-72B": _STATIC,
        "Qwen2.5-7B-Instruct": _STATIC,
        "Qwen2.5-32B-Instruct": _STATIC,
        "DeepSeek-R1-Distill-Qwen-1.5B": Practice("w8a8", "m4", _MINMAX, _DOWN),
        "DeepSeek-R1-Distill-Qwen-7B": Practice("w8a8", "m4", _MINMAX, _DOWN),
        "Qwen3-14B": Practice("w8a8-mix", "m4", (*_MINMAX, "--disable-level", "L10")),
        "Qwen3-30B": Practice("w8a8", "m4", _MINMAX),  # its experts are w8a8-dynamic, as always here
        "Qwen3-32B": Practice("w8a8-mix", "m4", _MINMAX, (*_QWEN3_32B, "model.layers.2.mlp.gate_proj")),
    },
    "w8a8c8": {"Qwen2-72B": Practice("w8a8", "none", (*_MINMAX, *_C8), _DOWN)},
    "w8a16": {"Qwen2-72B": Practice("w8a16", "none", (), _DOWN), "Qwen1.5-110B": Practice("w8a16")},
}
_DEFAULT = {"w8a8": Practice("w8a8-dynamic", "iter"), "w8a16": Practice("w8a16")}


def known_practice(model_type: str, quant_type: str) -> tuple[Practice, bool]:
    """Return the settings for a model, and whether they are its own and not those for any model.

    Args:
        model_type: as msModelSlim spells it, such as Qwen2.5-7B-Instruct.
        quant_type: one of ALL_TYPES.

    Raises:
        UnsupportedError: the type is not made here, or there are no settings for it.
    """
    for beginning, reason in _NOT_MADE.items():
        if quant_type.startswith(beginning):
            action = f"{reason}.".capitalize()
            raise UnsupportedError("--quant_type", got=quant_type, expected=one_of(TYPES), action=action)
    own = _BY_MODEL.get(quant_type, {}).get(model_type)
    if own is not None:
        return own, True
    if quant_type not in _DEFAULT:
        known = [*_BY_MODEL.get(quant_type, {})]
        raise UnsupportedError(
            f"--quant_type {quant_type}",
            got=f"model type {model_type}, for which no settings are known",
            expected=one_of(known) if known else "a practice",
            action="Give a practice with --config_path, or use `eightfold quantize` with --kv-int8 or --fa-quant.",
        )
    return _DEFAULT[quant_type], False
