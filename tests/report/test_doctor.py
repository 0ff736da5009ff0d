"""What `eightfold doctor` says of machines that lack something."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from eightfold import machine
from eightfold.errors import UnsupportedError
from eightfold.model import native
from eightfold.report import doctor
from eightfold.report.doctor import NOTE, OK, PROBLEM, Finding, examined

GB = 10**9
FINE: dict[str, Any] = {
    "eightfold": "1.0",
    "python": "3.12.0",
    "system": "Linux",
    "packages": {"torch": "2.13.0"},
    "cpu": "A CPU",
    "threads": 4,
    "memory_bytes": 64 * GB,
    "memory_available_bytes": 32 * GB,
    "memory_limit_bytes": None,
    "cpu_quota": None,
    "huge_pages": "madvise",
    "torch_cuda": None,
}


@pytest.fixture(autouse=True)
def fine_machine(monkeypatch):
    """Nothing is said of the machine on which the test runs."""
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setenv(native.THREADS_VARIABLE, "4")
    monkeypatch.setattr(native.extension, "available_isas", lambda: ["scalar", "avx2", "avx512"], raising=False)
    monkeypatch.setattr(doctor, "package_version", lambda name: "99")
    monkeypatch.setattr(doctor, "has_accelerator", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100 * GB}))


def found(tmp_path: Path, subject: str, **changes: Any) -> Finding:
    (finding,) = (f for f in examined({**FINE, **changes}, tmp_path) if f.subject == subject)
    return finding


def test_a_machine_that_lacks_nothing_has_nothing_to_do(tmp_path):
    findings = examined(FINE, tmp_path)
    assert {finding.verdict for finding in findings} == {OK}
    assert not any(finding.action for finding in findings)


@pytest.mark.parametrize(
    ("subject", "changes", "verdict", "says", "action"),
    [
        ("memory", {"memory_available_bytes": 2 * GB}, NOTE, "about 1.3 billion parameters", "docs/scale.md"),
        ("memory", {"memory_limit_bytes": GB // 4}, PROBLEM, "may take 250.0 MB: too little", "--memory SIZE"),
        ("memory", {"memory_bytes": None, "memory_available_bytes": None}, NOTE, "does not tell", ""),
        ("threads", {"cpu_quota": 1.5}, NOTE, "gives this container 1.5 CPUs", "--cpus"),
        ("threads", {"threads": 2}, NOTE, "4 of 2 CPUs", "Unset EIGHTFOLD_THREADS"),
        ("huge pages", {"huge_pages": "never"}, NOTE, "never", "echo madvise"),
        ("torch", {"torch_cuda": "13.0"}, NOTE, "CUDA or ROCm 13.0", "whl/cpu"),
    ],
)  # fmt: skip
def test_a_fact_is_judged_with_the_next_step(tmp_path, subject, changes, verdict, says, action):
    finding = found(tmp_path, subject, **changes)
    assert finding.verdict == verdict
    assert says in finding.text
    assert action in finding.action


@pytest.mark.parametrize(("free", "verdict"), [(GB // 100, PROBLEM), (GB, NOTE), (100 * GB, OK)])
def test_a_disk_is_judged_by_what_is_free(tmp_path, monkeypatch, free, verdict):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert found(tmp_path, "disk").verdict == verdict


def test_a_lesser_instruction_set_is_said_with_what_a_better_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(native.extension, "available_isas", lambda: ["scalar", "avx2"], raising=False)
    assert "AVX-512 VNNI" in found(tmp_path, "core").text
    monkeypatch.setenv(native.ISA_VARIABLE, "scalar")
    assert found(tmp_path, "core").action == "Unset EIGHTFOLD_ISA."
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    assert found(tmp_path, "core").verdict == PROBLEM


@pytest.mark.parametrize(("compiler", "action"), [("/usr/bin/c++", "--force-reinstall"), (None, "apt-get install g++")])
def test_a_missing_core_is_a_problem_and_the_step_depends_on_a_compiler(tmp_path, monkeypatch, compiler, action):
    def missing() -> list[str]:
        raise UnsupportedError("native backend", got="no compiled extension (no such module)", expected="one")

    monkeypatch.setattr(native.extension, "available_isas", missing, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    finding = found(tmp_path, "core")
    assert finding.verdict == PROBLEM
    assert finding.text.startswith("native backend: got no compiled extension (no such module); run and eval")
    assert action in finding.action


@pytest.mark.parametrize(
    ("version", "verdict", "says"),
    [(None, NOTE, "without torch, pyyaml"), ("2.3.1+cpu", PROBLEM, "needed: torch 2.4 or newer"), ("99rc1", OK, "99")],
)
def test_extras_are_judged_by_what_is_installed(tmp_path, monkeypatch, version, verdict, says):
    monkeypatch.setattr(doctor, "package_version", lambda name: version)
    finding = found(tmp_path, "quantize")
    assert finding.verdict == verdict
    assert says in finding.text
    assert finding.action == ("" if verdict == OK else "pip install --upgrade 'eightfold[quantize]'")


def test_the_extras_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, (_, packages) in doctor.EXTRAS.items():
        assert {f"{name}>={version}" for name, version in packages.items()} == {
            re.split("[,;]", requirement)[0].strip() for requirement in declared[extra]
        }


def test_what_is_here_is_shown_and_given_as_json(cli, tmp_path):
    shown = cli("doctor", "--dir", tmp_path)
    assert shown.code == 0, shown.out
    assert shown.err == ""
    subjects = [line[9:19].strip() for line in shown.out.splitlines() if line[0] != " "]
    document = cli("doctor", "--dir", tmp_path, "--json").json()
    assert subjects == [finding["subject"] for finding in document["findings"]]
    assert document["problems"] == 0
    assert document["environment"].keys() == machine.environment().keys()


def test_a_problem_is_told_by_the_exit_code(cli, tmp_path, monkeypatch):
    monkeypatch.setenv(native.THREADS_VARIABLE, "many")
    shown = cli("doctor", "--dir", tmp_path)
    assert shown.code == 1
    assert "problem  threads    EIGHTFOLD_THREADS: got many, " in shown.out


# --- facts that only doctor needed


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [
        ({"memory.max": "1073741824\n", "cpu.max": "150000 100000\n"}, 1 << 30, 1.5),
        ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n",
          "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        ({"memory/memory.limit_in_bytes": "1048576\n", "cpu/cpu.cfs_quota_us": "50000\n",
          "cpu/cpu.cfs_period_us": "100000\n"}, 1 << 20, 0.5),
        ({}, None, None),
    ],
)  # fmt: skip
def test_limits_of_a_container_are_read_of_both_versions_of_cgroups(tmp_path, monkeypatch, files, memory, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert (machine.memory_limit_bytes(), machine.cpu_quota()) == (memory, cpus)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "6.4"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", None),
    ],
)
def test_the_build_of_torch_is_read_without_loading_it(tmp_path, monkeypatch, text, found):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit\n")
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert machine.torch_cuda() == found
