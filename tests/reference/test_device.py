"""Which device is used, and what a user hears of it."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from eightfold.errors import ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.tensors import CPU, find_device, load_tensor, use


@pytest.fixture
def torch_npu(monkeypatch):
    """Install a stand-in for torch_npu, which adds torch.npu when it is imported."""

    def install(is_available):
        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        npu = types.SimpleNamespace(is_available=lambda: is_available)
        monkeypatch.setattr(torch, "npu", npu, raising=False)

    return install


def test_the_cpu_needs_nothing_said():
    assert find_device("cpu") == (CPU, "")


def test_without_torch_npu_an_npu_is_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    device, remark = find_device("npu")
    assert device == CPU
    assert "runs on the CPU" in remark


def test_a_missing_torch_npu_is_named():
    device, remark = find_device("npu")
    assert device == CPU
    assert remark.startswith("`device` npu: torch_npu is not installed")


def test_torch_npu_without_a_device_is_the_cpu(torch_npu):
    torch_npu(is_available=False)
    device, remark = find_device("npu")
    assert device == CPU
    assert "sees no device" in remark


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: got cuda, expected cpu: torch sees no CUDA device"):
        find_device("cuda")


def test_nothing_changes_on_the_cpu():
    with use(CPU):
        assert torch.zeros(1).device == CPU


def test_an_npu_that_torch_sees_is_used(torch_npu, monkeypatch):
    torch_npu(is_available=True)
    monkeypatch.setattr(torch, "device", str)  # only torch_npu teaches torch that name
    assert find_device("npu") == ("npu", "")


def test_tensors_are_loaded_and_made_on_the_device(float_model):
    checkpoint = Checkpoint.open(float_model)
    with use(torch.device("meta")):
        assert torch.zeros(1).device.type == "meta"
        assert load_tensor(checkpoint, "model.norm.weight").device.type == "meta"
    assert torch.zeros(1).device == CPU
    assert load_tensor(checkpoint, "model.norm.weight").device == CPU


def test_an_npu_multiplies_whole_float32(torch_npu, monkeypatch):
    torch_npu(is_available=True)
    torch.npu.matmul = types.SimpleNamespace(allow_hf32=True)  # type: ignore[attr-defined]
    seen = []
    monkeypatch.setattr(torch, "set_default_device", lambda device: seen.append(torch.npu.matmul.allow_hf32))  # type: ignore[attr-defined]
    with use(types.SimpleNamespace(type="npu")):  # type: ignore[arg-type]
        assert seen == [False]
    assert torch.npu.matmul.allow_hf32  # type: ignore[attr-defined]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_short_floats_are_off_on_the_device():
    torch.backends.cuda.matmul.allow_tf32 = True
    with use(torch.device("cuda")):
        assert torch.zeros(1).device.type == "cuda"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
