"""The build decides between CPU and CUDA, and names all that it needs."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import setuptools
import torch
import torch.utils.cpp_extension
from cells import GRU_CELL, LSTM_CELL
from torch._subclasses.fake_tensor import FakeTensorMode

import birnn_ext
from birnn_ext import route, variants

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


def run_setup(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict:
    """Runs setup.py without building; returns its arguments of setup(), and the target that it would print."""
    for name in ("BIRNN_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        # set first, so that monkeypatch also restores what setup.py itself writes
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    captured = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    monkeypatch.chdir(SETUP.parent)
    captured["target"] = runpy.run_path(str(SETUP))["target"]
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
    assert (info["cuda"] is None) == bool(info["cuda_missing"])
    if info["cuda"] is None:
        assert info["cuda_architectures"] == ""
    else:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert re.search(r"\d\.\d", info["cuda_architectures"])


@pytest.mark.skipif("BIRNN_CPU_ISA" in os.environ, reason="BIRNN_CPU_ISA names the instruction set")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells what the CPU has in /proc/cpuinfo")
def test_the_instruction_set_is_the_one_that_the_rule_names():
    cpu = Path("/proc/cpuinfo").read_text()
    flags = set(" ".join(re.findall(r"^flags\s*:(.*)$", cpu, re.MULTILINE)[:1]).split())
    needed = [
        ("avx2", {"avx2", "fma", "f16c"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx512_bf16", {"avx512_bf16"}),
        ("amx", {"amx_tile", "amx_bf16"}),
    ]
    runs = ["generic"]
    for name, features in needed:  # each also needs those before it
        if not features <= flags:
            break
        runs.append(name)
    if runs[-1] == "avx512_bf16" and "GenuineIntel" in cpu:  # pairs of bfloat16 do not gain there
        runs.pop()
    assert birnn_ext.build_info()["cpu_isa"] == runs[-1]


def test_cpu_only_on_request(monkeypatch):
    build = run_setup(monkeypatch, BIRNN_CUDA="0")
    (extension,) = build["ext_modules"]
    assert build["target"] == "for the CPU only: BIRNN_CUDA=0"
    assert not any("cuda" in source for source in extension.sources)


def test_cpu_only_without_nvcc(monkeypatch):
    without_toolkit(monkeypatch)
    build = run_setup(monkeypatch)
    (extension,) = build["ext_modules"]
    assert build["target"].startswith("for the CPU only: ")
    assert not any("cuda" in source for source in extension.sources)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_missing_nvcc_is_an_error_on_request(monkeypatch):
    without_toolkit(monkeypatch)
    with pytest.raises(SystemExit, match=r"BIRNN_CUDA=1, but no nvcc of CUDA .*, with CUDA_HOME set"):
        run_setup(monkeypatch, BIRNN_CUDA="1")


@pytest.mark.parametrize("version, by_pip", [("12.8", False), ("13.0", True)])
def test_nvcc_comes_by_pip_since_cuda_13(monkeypatch, version, by_pip):
    without_toolkit(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert ("pip install 'nvidia-cuda-nvcc==13.*'" in run_setup(monkeypatch)["target"]) == by_pip


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
def test_cuda_by_default(monkeypatch):
    build = run_setup(monkeypatch)
    (extension,) = build["ext_modules"]
    assert build["target"].startswith("for the CPU and CUDA ")
    (architectures,) = re.findall(r'^DEFAULT_ARCHITECTURES = "(.+)"$', SETUP.read_text(), re.MULTILINE)
    assert build["target"].endswith(f"architectures {architectures.replace(';', ' ')}")
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


def test_the_command_says_what_was_built(capsys):
    runpy.run_module("birnn_ext", run_name="__main__")
    info = birnn_ext.build_info()
    cuda = f"CUDA {info['cuda']}, for {info['cuda_architectures']}" if info["cuda"] else f"none: {info['cuda_missing']}"
    assert capsys.readouterr().out.splitlines() == [
        f"birnn_ext {info['version']}",
        f"torch: {torch.__version__} (built with {info['torch']})",
        f"CPU kernels: {info['cpu_isa']}, of {', '.join(info['cpu_isas'])}",
        f"CUDA kernels: {cuda}",
        f"compiler: {info['compiler']}",
    ]


# ---- a build for the CPU only meets a CUDA tensor


@pytest.fixture
def no_nvcc(monkeypatch):
    """Makes the build report a reason why it has no CUDA kernels; returns the reason."""
    without_toolkit(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    ((name, value),) = run_setup(monkeypatch)["ext_modules"][0].define_macros
    assert name == "BIRNN_CUDA_MISSING"
    missing = json.loads(value)
    monkeypatch.setattr(birnn_ext._C, "build_info", lambda: {"cuda": None, "cuda_missing": missing})
    monkeypatch.setattr(route, "BUILT_FOR_CUDA", False)
    return missing


def recurrence(cell, gates_x, w_hh):
    """Runs the operator's implementation for devices without a kernel."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)
    cell.forward.redispatch(keys, gates_x, w_hh, None, None, None, "none")


@pytest.mark.parametrize(
    "run",
    [partial(recurrence, LSTM_CELL), partial(recurrence, GRU_CELL), variants.lstm_variant],
    ids=["lstm", "gru", "variant"],
)
def test_a_cuda_tensor_in_a_cpu_only_build_is_an_error_that_says_why_and_what_to_do(no_nvcc, run):
    assert "no nvcc of CUDA 13.x" in no_nvcc and "pip install 'nvidia-cuda-nvcc==13.*'" in no_nvcc
    with FakeTensorMode():  # it makes tensors "on a GPU" without one
        on_cuda = torch.empty(3, 2, 1, 16, device="cuda"), torch.empty(1, 16, 4, device="cuda")
    with pytest.raises(RuntimeError) as error:
        run(*on_cuda)
    said = str(error.value)
    assert f"birnn_ext has no kernels for tensors on 'cuda:0', as it was built for the CPU only: {no_nvcc}. " in said
    assert "`BIRNN_CUDA=1 pip install --no-build-isolation .`" in said
    assert "birnn_ext.restore(model)" in said


# ---- packaging; tools/check_wheel builds and installs with pip


def test_version_stands_in_one_place():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert birnn_ext.__version__ == version
    sources = [SETUP, *ROOT.glob("birnn_ext/*.py"), *ROOT.glob("csrc/**/*.*"), *ROOT.glob("*.cff")]
    assert not [source for source in sources if version in source.read_text()]


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        SystemExit, match=r"^birnn_ext: the build needs the PyTorch .*`pip install torch ninja"
    ) as error:
        run_setup(monkeypatch)
    assert "\n" not in str(error.value)


def test_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(
        SystemExit, match=r"^birnn_ext: PyTorch 2\.8 or newer is needed, and 2\.7\.1\+cu126 is installed$"
    ):
        run_setup(monkeypatch)


def packages(words: str) -> list[str]:
    """Returns the requirements in a shell command. It leaves out torch, whose version differs from place to place."""
    return sorted(word for word in shlex.split(words) if not word.startswith(("torch", "nvidia-")))


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the repository's files")
def test_every_list_of_what_the_build_needs_is_complete():
    """`python -m build --no-isolation` requires all that pyproject.toml names, so README's pip install must have it."""
    project = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.+)\]$", project, re.MULTILINE)
    needed = packages(requires.replace(",", " "))
    assert "setuptools>=77" in needed
    lists = {
        "README.md": r"^    pip install (torch .+)$",
        "pyproject.toml": r'^before-build = "pip install (.+)"$',
        "setup.py": r'"`pip install (torch .+?)`',
        "Makefile": r"pip install (torch.+)$",
        "tools/check_wheel": r"pip\" install ('setuptools.+) build$",
    }
    for name, pattern in lists.items():
        (found,) = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert packages(found) == needed, name


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, ["-g0"]),
        ({"CXXFLAGS": "-O1 -g"}, ["-g"]),
        ({"CFLAGS": "-ggdb3 -gsplit-dwarf"}, ["-ggdb3", "-gsplit-dwarf"]),
    ],
)
def test_debug_information_on_request_only(monkeypatch, environment, wanted):
    monkeypatch.delenv("CFLAGS", raising=False)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    (extension,) = run_setup(monkeypatch, **environment)["ext_modules"]
    compile_args = extension.extra_compile_args
    assert [flag for flag in compile_args["cxx"] if flag.startswith("-g")] == wanted
    if "nvcc" in compile_args:
        assert [flag for flag in compile_args["nvcc"] if "-g" in flag] == [f"-Xcompiler={flag}" for flag in wanted]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf, of GNU binutils")
@pytest.mark.skipif("-g" in os.environ.get("CFLAGS", "") + os.environ.get("CXXFLAGS", ""), reason="-g was asked for")
def test_the_library_has_no_debug_information():
    sections = subprocess.run(["readelf", "-SW", birnn_ext._C.__file__], capture_output=True, text=True, check=True)
    assert " .text " in sections.stdout
    assert " .debug_info " not in sections.stdout


@pytest.mark.parametrize("compiler", ["", "nonesuch-g++ -m64"])
def test_without_a_compiler(monkeypatch, tmp_path, compiler):
    build = [sys.executable, SETUP, "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "PATH": str(tmp_path), "BIRNN_CUDA": "0", "CXX": compiler or "c++"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = re.findall(r"^birnn_ext: the build needs a C\+\+ compiler, .*$", done.stderr, re.MULTILINE)
    assert f"there is no '{compiler.split()[0] if compiler else 'c++'}' on the PATH" in said
    assert "Traceback" not in done.stderr


def test_the_wheel_asks_for_the_torch_that_it_was_built_for(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert run_setup(monkeypatch, BIRNN_CUDA="0")["install_requires"] == ["torch==2.10.*"]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf, of GNU binutils")
def test_links_only_what_torch_and_the_compiler_bring():
    dynamic = subprocess.run(
        ["readelf", "-d", birnn_ext._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    torchs = {name for name in needed if re.match(r"lib(torch|c10)\w*\.so$|libcudart[-.\w]*\.so", name)}
    assert "libc10.so" in torchs
    assert any(name.startswith("libcudart") for name in torchs) == (birnn_ext.build_info()["cuda"] is not None)
    runtimes = {"libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert {name for name in needed - torchs - runtimes if not name.startswith("ld-linux")} == set()
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)  # it would name a folder of the build machine
