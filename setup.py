"""Builds birnn_ext._C: the CPU kernels always, the CUDA kernels where an nvcc fits the installed torch.

Environment: BIRNN_CUDA=1 makes a missing nvcc an error, BIRNN_CUDA=0 builds for the CPU only; CUDA_HOME names the
toolkit; TORCH_CUDA_ARCH_LIST the GPU architectures; MAX_JOBS the number of parallel compilations; CXX the compiler.
CXXFLAGS=-g, or another flag of that kind there or in CFLAGS, asks for debug information.
"""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig

from setuptools import setup

try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        f"birnn_ext: the build needs the PyTorch that birnn_ext shall run with, but {error}: first "
        "`pip install torch ninja pybind11 wheel 'setuptools>=77'`, then `pip install --no-build-isolation` birnn_ext"
    ) from None
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
    raise SystemExit(f"birnn_ext: PyTorch 2.8 or newer is needed, and {torch.__version__} is installed")

# Machine code covers Turing to Hopper (8.0's runs on 8.6 and 8.9, too). PTX of 9.0 is for newer GPUs, whose driver
# compiles a kernel when it is first used. PTX of 7.5 and 8.0 is for emulators.
DEFAULT_ARCHITECTURES = "7.5+PTX;8.0+PTX;9.0+PTX"


def site_packages_cuda():
    """Returns the folder in which pip's nvidia packages for torch's CUDA version keep bin, include and lib."""
    major = (torch.version.cuda or "").split(".")[0]
    return os.path.join(sysconfig.get_paths()["purelib"], "nvidia", f"cu{major}")


def toolkit_candidates():
    """Yields folders that may hold a CUDA toolkit, the most explicit first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.environ[variable]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc on the PATH may be a wrapper script far from its toolkit; nvcc itself knows where that is.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        yield top.group(1).strip() if top else os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
    yield "/usr/local/cuda"
    yield site_packages_cuda()


def release_of(home):
    """Returns the version of the nvcc in folder home, such as "13.0"; None if that is no toolkit."""
    nvcc = os.path.join(home, "bin", "nvcc")
    header = os.path.join(home, "include", "cuda_runtime.h")
    if not (os.access(nvcc, os.X_OK) and os.path.exists(header)):
        return None
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", out)
    return release and release.group(1)


def find_toolkit():
    """Returns (folder, version) of a toolkit that fits torch, or (None, why there is none)."""
    if torch.version.cuda is None:
        return None, f"the installed torch {torch.__version__} is built without CUDA"
    wanted = torch.version.cuda.split(".")[0]
    seen = []
    for candidate in toolkit_candidates():
        home = os.path.normpath(candidate)
        release = release_of(home)
        if release and release.split(".")[0] == wanted:
            return home, release
        seen.append(f"{home} ({'CUDA ' + release if release else 'no bin/nvcc with include/cuda_runtime.h'})")
    by_pip = (  # before CUDA 13, pip's packages hold no nvcc
        f"`pip install 'nvidia-cuda-nvcc=={wanted}.*' 'nvidia-cuda-cccl=={wanted}.*'`, or " if int(wanted) >= 13 else ""
    )
    return None, (
        f"no nvcc of CUDA {wanted}.x, which torch {torch.__version__} needs; "
        f"looked in {', '.join(dict.fromkeys(seen))}. "
        f"Get one with {by_pip}the CUDA toolkit {wanted}.x, with CUDA_HOME set to its folder"
    )


def choose_cuda():
    """Returns (folder, version) of the toolkit to build with, or (None, why the build is for the CPU only)."""
    wish = os.environ.get("BIRNN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"birnn_ext: BIRNN_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "BIRNN_CUDA=0"
    home, detail = find_toolkit()
    if home is None and wish == "1":
        raise SystemExit(f"birnn_ext: BIRNN_CUDA=1, but {detail}")
    return home, detail


cuda_home, cuda_detail = choose_cuda()
if cuda_home:
    os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension reads it when it is imported
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    architectures = " ".join(os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split())
    target = f"for the CPU and CUDA {cuda_detail} ({cuda_home}), architectures {architectures}"
else:
    target = f"for the CPU only: {cuda_detail}"

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Python's own flags have -g, which makes the library nine times as large, and its build a fifth longer or more.
flags = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
debug_flags = [flag for flag in flags if flag.startswith("-g")] or ["-g0"]

options = {
    "sources": ["csrc/module.cpp", "csrc/schema.cpp", "csrc/stack_autograd.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
    "depends": sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)),
    "include_dirs": [os.path.abspath("csrc")],
    "extra_compile_args": {
        # Strict ISO C++ mode would turn off contraction to fused multiply-add. at::parallel_for is OpenMP in a header,
        # and without -fopenmp it would be a plain loop.
        "cxx": ["-O3", "-ffp-contract=fast", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *debug_flags],
    },
    "extra_link_args": ["-fopenmp"],
}
if cuda_home:
    options["sources"] += sorted(
        path for path in glob.glob("csrc/cuda/**", recursive=True) if path.endswith((".cpp", ".cu"))
    )
    options["define_macros"] = [
        ("BIRNN_CUDA_VERSION", f'"{cuda_detail}"'),
        ("BIRNN_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    # A warning of ptxas (a spill, local memory) fails the build, because kernels must fit the registers.
    options["extra_compile_args"]["nvcc"] = ["-O3", "--threads", "2", "-Xptxas", "-warn-spills,-Werror"]
    options["extra_compile_args"]["nvcc"] += [f"-Xcompiler={flag}" for flag in debug_flags]
    # ATen's CUDA headers include those of cuSPARSE and cuBLAS, which may be in pip's packages only.
    options["include_dirs"].append(os.path.join(site_packages_cuda(), "include"))
else:
    options["define_macros"] = [("BIRNN_CUDA_MISSING", json.dumps(cuda_detail))]  # quoted as a C string

extension = (CUDAExtension if cuda_home else CppExtension)("birnn_ext._C", **options)
if cuda_home and not glob.glob(os.path.join(cuda_home, "lib*", "libcudart.so")):
    # -lcudart does not find the library in pip's toolkit, which has only its full name.
    libcudart = glob.glob(os.path.join(cuda_home, "lib*", "libcudart.so.*"))[0]
    extension.libraries.remove("cudart")
    extension.extra_link_args += [f"-L{os.path.dirname(libcudart)}", f"-l:{os.path.basename(libcudart)}"]


class Build(BuildExtension):
    def build_extensions(self):
        compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]  # BuildExtension chooses the same one
        if not shutil.which(compiler):
            raise SystemExit(
                f"birnn_ext: the build needs a C++ compiler, and there is no {compiler!r} on the PATH: "
                "install g++ (Debian and Ubuntu: `apt-get install g++`), or name a compiler in the variable CXX"
            )
        print(f"birnn_ext: building {target}", flush=True)  # flushed, so that it comes before the compilers' output
        super().build_extensions()


setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    # torch's C++ interface changes with its minor version, so a build for one can't be loaded by another.
    install_requires=[f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"],
)
