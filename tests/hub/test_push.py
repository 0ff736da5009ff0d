"""`eightfold push`: what is sent, the card, and what is refused before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import tiny_config, write_model
from tests.hub.conftest import files_of
from tests.refusal import error_line, snapshot

pytest.importorskip("huggingface_hub")

RIGHT = {"HF_TOKEN": "hf_right"}


@pytest.fixture
def out(online, tmp_path):
    made = online("quantize", "Org/Tiny", tmp_path / "out", "--scheme", "w8a16")
    assert made.code == 0, made.err
    return tmp_path / "out"


def test_a_model_is_published_whole_with_a_card_and_runs_from_there(online, hub, out, tmp_path):
    before = snapshot(out)
    (tmp_path / "eval.json").write_text(json.dumps({"ppl": 30.5, "kl_mean": 0.0029, "tokens": 100}) + "\n")
    words = ("push", out, "Me/Tiny-w8a16", "--private", "--measured", tmp_path / "eval.json", "--json")
    pushed = online(*words, **RIGHT)
    assert pushed.code == 0, pushed.err
    assert snapshot(out) == before
    repository = hub.models["Me/Tiny-w8a16"]
    assert repository.is_private
    _, files = repository.at("main")
    assert {name: content for name, content in files.items() if name != "README.md"} == files_of(out)
    card = files["README.md"].decode()
    assert 'base_model: "Org/Tiny"' in card
    assert f"at commit `{hub.models['Org/Tiny'].branches['main'][:12]}` in 8 bits" in card
    assert "14 linears W8A16" in card
    assert "| perplexity | 30.5000 |" in card
    assert "| vLLM Ascend | loads" in card
    assert pushed.json()["address"].startswith(f"{hub.address}/Me/Tiny-w8a16/commit/")
    ran = online("run", "Me/Tiny-w8a16", "--prompt", "hello", "--max-new-tokens", 2, "--json", **RIGHT)
    assert ran.code == 0, ran.err

    hub.asked.clear()
    assert online(*words, **RIGHT).code == 0
    assert not [line for line in hub.asked if line.startswith("PUT")]  # the weights are there


def test_a_branch_of_its_own_and_no_files_of_an_earlier_model_are_left(online, hub, out):
    assert online("push", out, "Me/Tiny", **RIGHT).code == 0
    repository = hub.models["Me/Tiny"]
    repository.commit({**repository.at("main")[1], "quant_model_weight_old.safetensors": b"old"})
    main = repository.at("main")
    assert online("push", out, "Me/Tiny", "--revision", "v2", **RIGHT).code == 0
    assert repository.at("main") == main
    assert "quant_model_weight_old.safetensors" not in repository.at("v2")[1]


def test_a_trial_shows_the_card_and_sends_nothing(online, hub, out):
    hub.asked.clear()
    shown = online("push", out, "Me/Tiny", "--dry-run", "--base-model", "Other/Base")
    assert shown.code == 0
    assert 'base_model: "Other/Base"' in shown.out
    assert "would send quant_model_description.json" in shown.out
    assert shown.out.splitlines()[-1].endswith("nothing was sent")
    assert hub.asked == []


def test_a_model_of_somebody_else_is_not_written_over(online, hub, out):
    message = error_line(online("push", out, "Org/Tiny", **RIGHT))
    assert message.startswith("model Org/Tiny on Hugging Face: got one that eightfold did not publish (")
    assert len(hub.models["Org/Tiny"].commits) == 1


def test_what_is_meant_for_a_few_is_not_published_for_everybody(online, hub, out):
    assert online("push", out, "Me/Tiny", **RIGHT).code == 0
    message = error_line(online("push", out, "Me/Tiny", "--private", **RIGHT))
    assert message.startswith("model Me/Tiny on Hugging Face: got one that everybody sees, expected a private one.")
    assert message.endswith("or leave out --private.")


def test_what_is_no_whole_model_of_ours_is_refused_before_the_hub_is_asked(online, hub, out, tmp_path):
    source = write_model(tmp_path / "float", tiny_config())
    hub.asked.clear()
    assert "got no journal of eightfold" in error_line(online("push", source, "Me/Tiny", **RIGHT))
    with (out / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert "got others than when it was made (tokenizer.json)" in error_line(online("push", out, "Me/Tiny", **RIGHT))
    assert hub.asked == []


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (("Me/Tiny",), {}, "got no token, expected a model. Set HF_TOKEN to one that may write."),
        (("Me/Tiny",), {"HF_TOKEN": "hf_wrongSecret"}, "got a token that is refused (status 401)"),
        (("Tiny",), RIGHT, "hub id: got Tiny, expected ORG/NAME"),
        (("Me/Tiny@a", "--revision", "b"), RIGHT, "--revision: got b and a, expected one branch"),
        (("Me/Tiny", "--measured", "nothing.json"), RIGHT, "nothing.json"),
    ],
)
def test_what_cannot_be_published_is_said_in_one_line(online, out, words, variables, expected):
    message = error_line(online("push", out, *words, **variables))
    assert expected in message
    assert "wrongSecret" not in message


@pytest.mark.parametrize("named", ["hf", "modelscope"])
def test_a_hub_that_does_not_answer_is_said_in_one_line(online, out, named):
    pytest.importorskip("modelscope_hub")
    words = ("push", out, "Me/Tiny", "--hub", named)
    token = {**RIGHT, "MODELSCOPE_API_TOKEN": "ms-right"}
    message = error_line(online(*words, HF_HUB_OFFLINE="1", **token))
    assert "got no answer of the hub (HF_HUB_OFFLINE is set)" in message
    if named == "hf":
        assert "got no answer of the hub" in error_line(online(*words, at="http://127.0.0.1:9", **token))


class StandIn:
    """ModelScope's client, as far as publishing asks it: uploads need accounts, which the hub here does not have."""

    def __init__(self, there=(), visibility=None):
        self.there, self.visibility = there, visibility
        self.sent = {}

    def repo_exists(self, name, kind):
        return bool(self.there)

    def create_repo(self, name, kind, *, visibility):
        self.visibility = visibility

    def get_repo(self, name, kind):
        return self

    def list_repo_files(self, name, kind):
        return [SimpleNamespace(path=path) for path in self.there]

    def upload_folder(self, name, kind, folder, *, revision, sync_remote_repo, **others):
        assert sync_remote_repo
        self.sent[f"{name}@{revision}"] = files_of(Path(folder))


def test_modelscope_gets_the_same_files(online, out, monkeypatch):
    modelscope_hub = pytest.importorskip("modelscope_hub")
    client = StandIn()
    monkeypatch.setattr(modelscope_hub, "HubApi", lambda config: client)
    assert online("push", out, "Me/Tiny", "--hub", "modelscope", "--private").code == 0
    files = client.sent["Me/Tiny@master"]
    assert client.visibility == "private"
    assert files.pop("README.md").startswith(b"---")
    assert files == files_of(out)

    public = modelscope_hub.Visibility.PUBLIC
    monkeypatch.setattr(modelscope_hub, "HubApi", lambda config: StandIn(["eightfold_journal.jsonl"], public))
    message = error_line(online("push", out, "Me/Tiny", "--private", EIGHTFOLD_HUB="modelscope"))
    assert message.startswith("model Me/Tiny on ModelScope: got one that everybody sees")
    monkeypatch.setattr(modelscope_hub, "HubApi", lambda config: StandIn(["config.json"]))
    message = error_line(online("push", out, "Me/Tiny", EIGHTFOLD_HUB="modelscope"))
    assert message.startswith("model Me/Tiny on ModelScope: got one that eightfold did not publish (config.json)")
