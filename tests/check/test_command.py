"""`eightfold check`: what is printed, the JSON document and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.check import K, O, Q, Toy, times
from tests.conftest import write_model
from tests.refusal import error_line


def test_a_clean_directory_loads_everywhere(cli, tmp_path):
    toy = Toy(tmp_path)
    done = cli("check", toy.path)
    assert (done.code, done.err) == (0, "")
    packs = "2 x qkv packed {0}, 2 x gate_up packed {0}"
    assert done.out == (
        f"mindie: loads {toy.path}\n"
        f"  runs        float16: 14 linears W8A8 ({packs.format('ALL_W8A8')}), float KV cache, float attention\n"
        f"vllm-ascend: loads {toy.path}\n"
        f"  runs        float16: 14 linears W8A8 ({packs.format('W8A8')}), float KV cache, float attention\n"
    )


def test_findings_stand_by_outcome_the_worst_first(cli, tmp_path):
    toy = Toy(tmp_path).describe({"group_size": 32, f"{O}.deq_scale": ..., f"{O}.x": "W8A8"})
    times(1.5, f"{K}.input_scale")(toy)
    done = cli("check", toy.path, "--for", "mindie")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0] == f"mindie: refuses {toy.path}"
    assert lines[1].split()[:2] == ["refuses", "settings"]
    assert [line[2:34].split() for line in lines[1:-1:2]] == [
        ["refuses", "settings"],
        ["qkv-input-scale"],
        ["ignores", "entry-without-tensor"],
        ["loads", "tensor-without-entry"],
    ]
    assert lines[4].strip() == "in model.layers.0.self_attn"
    assert lines[-1] == "  runs        nothing"
    assert {line.index("in ") for line in lines[2:-1:2]} == {lines[1].index("raises")}


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        (lambda t: t, (), 0),
        (lambda t: t.keep_float(K), ("--for", "mindie"), 0),  # loads, with a remark
        (lambda t: t.configure(quantize="w8a8s"), ("--for", "mindie"), 0),  # warns
        (lambda t: t.add_kv_cache(keys=("kv_cache_type",)), ("--for", "mindie"), 0),  # ignores
        (lambda t: t.add_kv_cache(offset=1.0), ("--for", "mindie"), 1),  # misdecodes
        (lambda t: t.add_attention(), ("--for", "vllm-ascend"), 1),  # refuses
        (lambda t: t.add_attention(), ("--for", "mindie"), 0),
        (lambda t: t.add_attention(), ("--for", "mindie", "--for", "vllm-ascend"), 1),
        (lambda t: t.add_attention(), ("--for", "all"), 1),
    ],
)
def test_the_exit_code_is_1_when_it_would_not_run_rightly(cli, tmp_path, change, options, code):
    toy = Toy(tmp_path)
    change(toy)
    for extra in ((), ("--json",)):
        done = cli("check", toy.path, *options, *extra)
        assert (done.code, done.err) == (code, "")


def test_json_of_one_loader_is_one_document(cli, tmp_path):
    toy = Toy(tmp_path).add_kv_cache(offset=-3.0)
    document = cli("check", toy.path, "--for", "mindie", "--json").json()
    assert list(document) == ["loader", "directory", "verdict", "loads", "findings", "summary"]
    assert (document["loader"], document["directory"]) == ("mindie", str(toy.path))
    assert (document["verdict"], document["loads"]) == ("misdecodes", True)
    assert document["findings"] == [
        {
            "rule": "mindie.kv-offset",
            "outcome": "misdecodes",
            "where": [f"model.layers.{i}.self_attn.{x}_proj.kv_cache_offset" for i in range(2) for x in "kv"],
            "count": 4,
            "message": "takes the bits of a cache offset for an integer, so that only zero is right: "
            "got values other than zero. Quantize the cache symmetrically.",
        }
    ]
    assert document["summary"]["kv_cache"] == "int8"


def test_json_of_several_loaders_holds_their_documents_below_the_worst_verdict(cli, tmp_path):
    toy = Toy(tmp_path).add_attention()
    done = cli("check", toy.path, "--json")
    document = done.json()
    assert len(done.out.splitlines()) == 1
    assert (document["directory"], document["verdict"], document["loads"]) == (str(toy.path), "refuses", False)
    assert [(r["loader"], r["verdict"], r["loads"]) for r in document["reports"]] == [
        ("mindie", "loads", True),
        ("vllm-ascend", "refuses", False),
    ]


# --- what is no model at all


def test_no_directory(cli, tmp_path):
    gone = tmp_path / "gone"
    expected = f"no directory {gone}: expected a model directory. Check the path."
    assert error_line(cli("check", gone)) == expected


def test_a_directory_without_config(cli, tmp_path):
    assert error_line(cli("check", tmp_path)) == (
        f"config.json in {tmp_path}: got no such file, expected a regular file"
    )


def test_a_directory_without_weights(cli, tmp_path):
    toy = Toy(tmp_path)
    toy.weights.unlink()
    assert error_line(cli("check", toy.path)) == (
        f"weights in {toy.path}: got no *.safetensors, expected safetensors files"
    )


def test_a_config_without_sizes(cli, tmp_path):
    toy = Toy(tmp_path).configure(num_hidden_layers=...)
    assert error_line(cli("check", toy.path)) == (
        f'"num_hidden_layers" in {toy.path / "config.json"}: got nothing, expected a value'
    )


def test_an_architecture_without_names(cli, tmp_path):
    toy = Toy(tmp_path).configure(architectures=["BertModel"])
    for path in toy.path.glob("quant_model_description*"):
        path.unlink()
    message = error_line(cli("check", toy.path))
    assert message.startswith(
        f"architecture in {toy.path / 'config.json'}: got BertModel, expected one of a known family. Known are llama, "
    )


def test_an_unknown_loader(cli, tmp_path):
    message = error_line(cli("check", tmp_path, "--for", "tgi"))
    known = "mindie, mindie-aclgraph, vllm-ascend, sglang, vllm, transformers or all"
    assert message == f"--for: got tgi, expected {known}. Try: eightfold check --help"


# --- directories that the rest of the program refuses


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.configure(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        lambda t: t.configure(torch_dtype="float16", dtype="bfloat16"),
        lambda t: t.configure(hidden_act="gelu"),
        lambda t: t.describe({f"{Q}.weight": "W8A8S"}),
        lambda t: t.remove(f"{Q}.weight"),
        lambda t: t.description.write_text('{"model_quant_type": "W8A8", "model_quant_type": "W8A16"}'),
        lambda t: t.description.write_text("not json"),
        lambda t: (t.path / "quant_model_weight_other.safetensors").write_bytes(t.weights.read_bytes()),
    ],
)
def test_it_has_a_verdict_where_inspect_has_an_error(cli, tmp_path, change):
    toy = Toy(tmp_path)
    change(toy)
    assert cli("inspect", toy.path).code == 2
    done = cli("check", toy.path, "--json")
    assert (done.code in (0, 1), done.err) == (True, "")
    assert len(done.json()["reports"]) == 2


def test_it_runs_without_torch(tmp_path):
    toy = Toy(tmp_path)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors')))\n"  # None: importing it raises
        "from eightfold.cli.main import main\n"
        "sys.argv[0] = 'eightfold'\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "check", toy.path, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdict"] == "loads"


# --- checksums


def test_files_are_compared_with_the_journal_when_that_is_wished(cli, tmp_path):
    source = write_model(tmp_path / "m")
    out = tmp_path / "out"
    assert cli("quantize", source, out, "--scheme", "w8a16").code == 0
    kept = "checksums: every file is what it was when the model was made"
    assert cli("check", out, "--verify", "--for", "vllm-ascend").out.splitlines()[-1] == kept
    weights = out / "quant_model_weight_w8a16.safetensors"
    weights.chmod(0o600)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (out / "tokenizer_config.json").unlink()
    assert "checksums" not in cli("check", out).out
    done = cli("check", out, "--verify", "--for", "vllm-ascend")
    assert done.code == 1
    assert [text for text in done.out.splitlines() if text.startswith("checksums: ")] == [
        f"checksums: {name} is not what it was when the model was made"
        for name in ("quant_model_weight_w8a16.safetensors", "tokenizer_config.json")
    ]
    found = cli("check", out, "--verify", "--json").json()
    assert found["changed_files"] == ["quant_model_weight_w8a16.safetensors", "tokenizer_config.json"]
    assert error_line(cli("check", source, "--verify")) == (
        f"eightfold_journal.jsonl in {source}: got no list of files with checksums, expected the journal of a "
        "finished model. Only directories that eightfold has made have one."
    )
