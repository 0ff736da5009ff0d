"""What must be there before a model is quantized by names: layers, whole groups, experts of one shape, their router."""

from __future__ import annotations

from collections.abc import Mapping

from eightfold.errors import CheckpointError, shortlist
from eightfold.layouts import EXPERT, GROUPS, Part, expert_count, text_config
from eightfold.quant.name_linears import FoundTensors
from eightfold.quant.name_sources import FETCH_AGAIN, Source
from eightfold.scheme import weight_name


def require_complete(found: FoundTensors) -> None:
    """Refuse a source of which something is missing or does not fit the rest.

    Raises:
        CheckpointError: what, and what would be right.
    """
    _require_experts(found)
    _require_layers(found)


def _require_layers(found: FoundTensors) -> None:
    steps = {one.step for one in found.linears.values()}
    absent = [f"layer {i}" for i in range(found.stored.num_layers) if f"layer {i}" not in steps]
    if absent:
        raise CheckpointError(
            "layers",
            where=found.stored.directory,
            got=f"no weights of {shortlist(absent, 3)}",
            expected=f"all {found.stored.num_layers} of config.json",
            action="Fetch the missing files, or correct config.json.",
        )
    present = {name.rpartition(".")[0] for name in found.linears}
    for parent in present:
        for group in GROUPS[:3]:
            members = [f"{parent}.{name}" for name in group]
            absent = [name for name in members if name not in found.linears]
            has_some = any(name in found.linears for name in members[1:])
            if has_some and absent and not EXPERT.fullmatch(members[0]):
                raise CheckpointError(
                    f"linears of {parent}",
                    where=found.stored.directory,
                    got=f"no {shortlist(absent)}",
                    expected=shortlist(members),
                    action=FETCH_AGAIN,
                )


def _require_experts(found: FoundTensors) -> None:
    """Refuse layers whose experts are not all there, or not of one shape, or whose router is for others."""
    layers: dict[str, dict[int, dict[str, Source]]] = {}
    for name, one in found.linears.items():
        if (match := EXPERT.fullmatch(name)) and one.rule.part is Part.EXPERT:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = one.source
    if not layers and found.layout.experts is not None and not found.layout.takes_any:
        expected = f"{found.layout.experts.module} in some layers of {found.layout.model_type}"
        action = "config.json and the weights belong to different models."
        raise CheckpointError("experts", where=found.stored.directory, got="none", expected=expected, action=action)
    for module, experts in layers.items():
        _require_whole(found, module, experts)
        _require_router(found, module, len(experts))


def _require_whole(found: FoundTensors, module: str, experts: Mapping[int, Mapping[str, Source]]) -> None:
    given, own = found.in_layer.match(module + "."), found.layout.experts
    said = expert_count(found.stored.config_raw, int(given[1])) if given else None
    count = max(max(experts) + 1, said or 0)
    names = own.names if own is not None and not found.layout.takes_any else tuple(next(iter(experts.values())))
    missing = [f"{i}.{name}" for i in range(count) for name in names if name not in experts.get(i, {})]
    where = found.stored.directory
    if missing or (said is not None and count != said):
        got = f"no {shortlist(missing, 4)}" if missing else f"{count} of them"
        expected = f"{said or count} experts with {', '.join(names)}"
        action = FETCH_AGAIN
        raise CheckpointError(f"experts of {module}", where=where, got=got, expected=expected, action=action)
    for name in names:
        shape = experts[0][name].shape
        for i, other in experts.items():
            if other[name].shape != shape:
                got, expected = f"{list(other[name].shape)}", f"{list(shape)}, as expert 0 has"
                what = f"shape of {module}.{i}.{name}"
                raise CheckpointError(what, where=where, got=got, expected=expected, action=FETCH_AGAIN)


def _require_router(found: FoundTensors, module: str, count: int) -> None:
    own = found.layout.experts
    if own is None or found.layout.takes_any or not module.endswith(own.module):
        return
    name = module.removesuffix(own.module) + own.router
    router = found.linears.get(name)
    if router is None:
        got, expected = f"no {weight_name(name)}", f"the router of {module}"
        where = found.stored.directory
        raise CheckpointError("router", where=where, got=got, expected=expected, action=FETCH_AGAIN)
    hidden = text_config(found.stored.config_raw).get("hidden_size")
    expected_shape = (count, hidden if isinstance(hidden, int) else router.source.shape[1])
    if router.source.shape != expected_shape:
        raise CheckpointError(
            f"shape of {weight_name(name)}",
            where=found.stored.directory,
            got=list(router.source.shape),
            expected=f"{list(expected_shape)}, one row for each of {count} experts",
            action=FETCH_AGAIN,
        )
