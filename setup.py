"""Builds rampde._C, one binary for all Python >= 3.10 and torch >= 2.10; everything else is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "python")

# only symbols that torch 2.10 has, so that the binary also loads there
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# contraction would break the compensated sum, and results would depend on the processor
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # newer GPUs compile the PTX when they first load it


def choose_mode() -> str:
    mode = os.environ.get("RAMPDE_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"RAMPDE_BUILD is {mode!r}, expected one of {', '.join(MODES)}")
    if mode != "auto":
        return mode
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("rampde: no C++ compiler found, installing pure Python: operators run in plain PyTorch")
        return "python"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return "cuda" if torch.version.cuda and CUDA_HOME else "cpu"


def build_arguments(mode: str) -> dict:
    if mode == "python":
        return {}
    import torch
    from torch.utils import cpp_extension

    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    extension_type, flags = cpp_extension.CppExtension, {"cxx": CXX_FLAGS}
    if mode == "cuda":
        if not torch.cuda.is_available():  # torch cannot tell the architectures without a visible GPU
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        sources += ROOT.glob("csrc/cuda/*.cu")
        extension_type = cpp_extension.CUDAExtension
        flags = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
    extension = extension_type(
        "rampde._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=DEFINES,
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments(choose_mode()))
