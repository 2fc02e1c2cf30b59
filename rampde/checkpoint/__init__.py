"""Checkpoint policies: what of a solve is kept for its backward pass, one idea in each file."""

from rampde.checkpoint.binomial import Binomial
from rampde.checkpoint.fp8 import Fp8
from rampde.checkpoint.offload import Offload
from rampde.checkpoint.policy import Checkpoint

__all__ = ["Binomial", "Checkpoint", "Fp8", "Offload"]
