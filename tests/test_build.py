"""What is built, and how the build decides."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
import torch.utils.cpp_extension

import birnn_ext

SETUP = Path(__file__).parents[1] / "setup.py"


def run_setup(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict:
    """Runs setup.py without building; returns what it would build."""
    for name in ("BIRNN_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        # set first: monkeypatch then restores what setup.py itself writes
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    captured = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    monkeypatch.chdir(SETUP.parent)
    runpy.run_path(str(SETUP))
    return captured


def without_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("nvcc") and real(path, mode))


def test_build_info():
    info = birnn_ext.build_info()
    assert info["version"] == birnn_ext.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "generic" in info["cpu_isas"]
    assert info["cpu_isa"] in info["cpu_isas"]
    if info["cuda"] is None:
        assert info["cuda_architectures"] == ""
    else:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert re.search(r"\d\.\d", info["cuda_architectures"])


def test_cpu_only_on_request(monkeypatch, capsys):
    (extension,) = run_setup(monkeypatch, BIRNN_CUDA="0")["ext_modules"]
    assert "for the CPU only: BIRNN_CUDA=0" in capsys.readouterr().out
    assert not any("cuda" in source for source in extension.sources)


def test_cpu_only_without_nvcc(monkeypatch, capsys):
    without_toolkit(monkeypatch)
    (extension,) = run_setup(monkeypatch)["ext_modules"]
    assert "for the CPU only: " in capsys.readouterr().out
    assert not any("cuda" in source for source in extension.sources)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_missing_nvcc_is_an_error_on_request(monkeypatch):
    without_toolkit(monkeypatch)
    with pytest.raises(SystemExit, match=r"BIRNN_CUDA=1, but no nvcc of CUDA .*pip install 'nvidia-cuda-nvcc>="):
        run_setup(monkeypatch, BIRNN_CUDA="1")


def test_wrong_wish_is_an_error(monkeypatch):
    with pytest.raises(SystemExit, match="BIRNN_CUDA must be 0, 1 or unset, got 'yes'"):
        run_setup(monkeypatch, BIRNN_CUDA="yes")


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_toolkit_of_another_cuda_version_is_passed_over(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 10.2, V10.2.89'\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == str(nvcc) and real(path, mode))
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path} (CUDA 10.2)")):
        run_setup(monkeypatch, BIRNN_CUDA="1", CUDA_HOME=str(tmp_path))


@pytest.mark.skipif(birnn_ext.build_info()["cuda"] is None, reason="birnn_ext is built without CUDA")
def test_cuda_by_default(monkeypatch, capsys):
    (extension,) = run_setup(monkeypatch)["ext_modules"]
    said = capsys.readouterr().out
    assert "building for the CPU and CUDA" in said
    assert all(architecture in said for architecture in ("7.5", "8.0+PTX", "9.0+PTX", "12.0"))
    assert any(source.endswith(".cu") for source in extension.sources)


def test_imports_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", "import birnn_ext; print(birnn_ext.build_info())"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu_isa" in done.stdout
