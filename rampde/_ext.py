"""Loads the compiled operators once, and says in words why they are missing when they are."""

import warnings
from importlib.util import find_spec

import torch  # noqa: F401  first: rampde._C links against libraries that this import loads

if find_spec("rampde._C") is None:
    MISSING = "rampde._C was not built; reinstall rampde with a C++ compiler (and nvcc for CUDA), see the README"
    warnings.warn(MISSING + ". Until then rampde runs through plain PyTorch, slower.", RuntimeWarning, stacklevel=2)
else:
    # a built extension that fails to load is an error, not a fallback
    from rampde import _C  # type: ignore[attr-defined]  # noqa: F401

    MISSING = ""
