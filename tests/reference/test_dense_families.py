"""Every dense family that differs from Llama computes what its class in transformers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from tests.conftest import tiny_config, write_model

transformers = pytest.importorskip("transformers")

from tests.reference import dense_models  # noqa: E402

TEXT = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()  # longer than every window


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def ours(directory: Any, **longest: Any) -> torch.Tensor:
    return Decoder(Checkpoint.open(directory), **longest).logits(TEXT)


@pytest.mark.parametrize("name", dense_models.MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = dense_models.make(name)
    expected = dense_models.logits(model, TEXT)
    found = ours(dense_models.save(model, tmp_path / "m"))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_internlm2_is_a_llama_with_other_names(tmp_path):
    llama = write_model(tmp_path / "llama", tiny_config(torch_dtype="float32"), tokenizer=False)
    made = dense_models.relaid_as_internlm2(llama, tmp_path / "m")
    assert torch.equal(ours(made), ours(llama)) or (ours(made) - ours(llama)).abs().max() < 1e-5


def test_internlm3_is_a_llama_with_other_switches(tmp_path):
    config = tiny_config(torch_dtype="float32", attention_bias=True, mlp_bias=True)
    llama = write_model(tmp_path / "llama", config, tokenizer=False)
    assert torch.equal(ours(dense_models.relaid_as_internlm3(llama, tmp_path / "m")), ours(llama))
