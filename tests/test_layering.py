"""Who may import whom, what stays unloaded, and where the names of the format are spelled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eightfold
from eightfold import scheme

ROOT = Path(eightfold.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
PLUGIN = sorted((ROOT.parent / "eightfold_vllm").glob("*.py"))

# A module imports from its own package and from lower ranks.
RANKS = {
    "data": 0,
    "errors": 0,
    "machine": 0,
    "dialects": 1,
    "messages": 2,
    "progress": 0,
    "template": 0,
    "values": 1,
    "architectures": 1,
    "config": 3,
    "rope": 2,
    "text_part": 2,
    "written_config": 4,
    "files": 1,
    "families": 5,
    "layouts": 4,
    "scheme": 4,
    "tokenizer": 4,
    "vocabulary": 2,
    "format": 6,
    "hub": 7,
    "model": 7,
    "parallel": 6,
    "synth": 7,
    "engine": 8,
    "exporters": 10,
    "importers": 11,
    "quant": 8,
    "check": 9,
    "evaluate": 9,
    "lm_eval": 9,
    "report": 10,  # draws what evaluate measures
    "server": 9,
    "cli": 12,
    "msmodelslim": 13,
    "__init__": 13,  # exports, but only loads what is asked for
    "__main__": 13,
}

# Where torch is at home.
TORCH_ALLOWED = ("model/reference/", "quant/", "importers/")

HEAVY = ("torch", "transformers", "gguf", "numpy", "tokenizers", "jinja2")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """Return the top-level module or package of a source file."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that are imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
            if node.module.split(".")[0] == "eightfold":  # a name may be a module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Yield the names that loading a module imports: not those in functions or under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)
        pending.extend(ast.iter_child_nodes(node))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_has_a_rank():
    assert {part_of(path) for path in SOURCES} == set(RANKS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_downwards(path):
    ours = [name.split(".")[1] for name in imported(parse(path)) if name.startswith("eightfold.")]
    own = part_of(path)
    upwards = {part for part in ours if part in RANKS and part != own and RANKS[part] >= RANKS[own]}
    assert upwards == set()


def dotted(path: Path) -> str:
    return ".".join(("eightfold", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that import each other in a circle, or lie on a way between two circles."""
    left = {module: set(names) for module, names in imports.items()}
    while True:
        ends = {module for module in left if not left[module] & left.keys()}
        ends |= left.keys() - set().union(*left.values())
        if not ends:
            return set(left)
        left = {module: names for module, names in left.items() if module not in ends}


def test_no_modules_import_each_other_in_a_circle():
    """Neither when they are loaded, nor in functions, nor for types. The package itself exports what others define."""
    modules = {dotted(path): path for path in SOURCES if path != ROOT / "__init__.py"}
    imports = {name: set(imported(parse(path))) & modules.keys() - {name} for name, path in modules.items()}
    assert circles(imports) == set()


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}) == {"a", "b", "c"}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


@pytest.mark.parametrize("path", [path for path in SOURCES if part_of(path) == "model"], ids=name_of)
def test_backends_do_not_know_each_other_and_the_reader_of_layers_knows_neither(path):
    reference, native = "eightfold.model.reference", "eightfold.model.native"
    strange = {"model/reference": (native,), "model/native": (reference,)}.get(
        path.relative_to(ROOT).parent.as_posix(), (reference, native)
    )
    assert [name for name in imported(parse(path)) if name.startswith(strange)] == []


@pytest.mark.parametrize("path", [p for p in SOURCES if not name_of(p).startswith(TORCH_ALLOWED)], ids=name_of)
def test_torch_is_loaded_with_a_module_only_where_it_is_at_home(path):
    loaded = {name.split(".")[0] for name in at_import_time(parse(path))}
    assert loaded.isdisjoint({"torch", "transformers", "gguf"})


def test_the_scan_sees_imports_of_every_form():
    tree = ast.parse(
        "import torch.nn\nfrom eightfold import machine, errors\nfrom eightfold.cli.main import app\n"
        "try:\n    import numpy\nexcept ImportError:\n    pass\n"
        "class A:\n    import json\n"
        "if TYPE_CHECKING:\n    import rich\n"
        "def f():\n    import gguf\n"
    )
    ours = {"eightfold", "eightfold.machine", "eightfold.errors", "eightfold.cli.main", "eightfold.cli.main.app"}
    always = {"torch.nn", *ours, "numpy", "json"}
    assert set(at_import_time(tree)) == always
    assert set(imported(tree)) == always | {"rich", "gguf"}


def spelled_suffixes(path: Path) -> set[str]:
    """Return the suffixes of quantized tensors that stand in a file as strings, alone or behind a dot."""
    tables = (*scheme.LINEAR_TENSORS.values(), scheme.FA_TENSORS, scheme.KV_TENSORS)
    parts = {part for specs in tables for spec in specs for part in spec.suffix.split(".")}
    # "weight", "scale" and the like are ordinary words; the others exist only in this format.
    suffixes = (parts | set(scheme.REDUCE_SCALES)) - {"weight", "bias", "scale", "offset"}
    strings = {node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)}
    return suffixes & {part for text in strings if isinstance(text, str) for part in text.split(".")}


def test_scheme_spells_the_suffixes_of_quantized_tensors():
    assert len(spelled_suffixes(ROOT / "scheme.py")) == 13


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "scheme.py"], ids=name_of)
def test_no_other_file_spells_them(path):
    assert spelled_suffixes(path) == set()


@pytest.mark.parametrize("path", PLUGIN, ids=lambda path: path.name)
def test_the_plugin_of_vllm_stands_on_the_formats(path):
    """Only its modules that vLLM asks for load torch and vLLM; none spells a suffix."""
    ours = {name.split(".")[1] for name in imported(parse(path)) if name.startswith("eightfold.")}
    assert {part for part in ours if RANKS[part] > RANKS["format"]} == set()
    assert spelled_suffixes(path) == set()
    if path.name not in ("config.py", "linear.py"):
        assert not {name.split(".")[0] for name in at_import_time(parse(path))} & {"torch", "vllm"}


def test_nothing_imports_the_plugin_of_vllm():
    assert not [path for path in SOURCES for name in imported(parse(path)) if name.startswith("eightfold_vllm")]


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["eightfold", "eightfold.cli.main"])
def test_they_start_without_anything_heavy(module):
    done = python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_package_loads_its_exports_when_they_are_asked_for_and_torch_never():
    done = python(
        "import sys, eightfold\n"
        "from eightfold import AsyncLLM, LLM, SamplingParams\n"
        "print([getattr(eightfold, name).__name__ for name in eightfold.__all__ if name != '__version__'])\n"
        "print([name for name in ('torch', 'transformers', 'rich', 'llguidance') if name in sys.modules])\n"
    )
    assert (done.stdout, done.stderr) == ("['LLM', 'AsyncLLM', 'SamplingParams']\n[]\n", "")


def test_what_the_package_does_not_export_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'eightfold' has no attribute 'LMM'"):
        _ = eightfold.LMM


def test_inspect_works_where_torch_transformers_and_gguf_are_not_installed(float_model):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'gguf')))\n"  # None: importing it raises
        "from eightfold.cli.main import main\n"
        "sys.argv[0] = 'eightfold'\n"
        "sys.exit(main())\n"
    )
    done = python(code, "inspect", float_model)
    assert (done.returncode, done.stderr) == (0, "")
    assert "LlamaForCausalLM, 2 layers" in done.stdout
    for plan in ([], ["--plan"]):
        data_free = ("--scheme", "w8a16", "--calib", "none")
        refused = python(code, "quantize", float_model, float_model.parent / "out", *data_free, *plan)
        assert (refused.returncode, refused.stdout, refused.stderr) == (
            2,
            "",
            f"eightfold: eightfold {' '.join(['quantize', *plan])} needs torch: got none installed. "
            "Install it: pip install 'eightfold[quantize]'\n",
        )
    assert not (float_model.parent / "out").exists()


def test_requests_are_read_and_answers_written_without_the_packages_of_a_server():
    """So a file of requests is answered where only the engine is installed."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('starlette', 'uvicorn', 'prometheus_client')))\n"
        "from eightfold.server import requests, served\n"
        "print(requests.read_chat.__name__)\n"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("read_chat\n", "")
