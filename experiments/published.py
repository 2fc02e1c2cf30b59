"""Figures that others have published, to stand beside those measured here."""

from __future__ import annotations

from dataclasses import dataclass

HARDWARE = "one RTX A6000 (48 GB), torch 2.8.0 with CUDA 12.6, torchdiffeq 0.2.5, Python 3.11"
PAPER = "arXiv 2510.23498"
REPOSITORY = "github.com/EmoryMLIP/rampde"


@dataclass(frozen=True)
class Published:
    """A published figure, and how its counterpart is found among the runs of an experiment.

    Attributes:
        experiment: module that repeats it.
        quantity: what was measured.
        value: as published.
        source: where.
        column: of the table, that holds ours; empty where there is none to set beside it.
        variants: (solver, precision, scaler) of ours; "" for any.
        subject: what is learned in the runs that it is set beside; empty: whatever they learn.
        over: where the figure is a ratio, the variant that is divided by.
    """

    experiment: str
    quantity: str
    value: str
    source: str
    column: str = ""
    variants: tuple[tuple[str, str, str], ...] = ()
    over: tuple[str, str, str] | None = None
    subject: str = ""


FP32 = ("rampde", "fp32", "none")
PEER = ("torchdiffeq", "fp32", "none")
FP16 = ("rampde", "fp16", "")
SCALED = (("rampde", "fp16", "dynamic"), ("rampde", "fp16", "grad"))

README = f"{REPOSITORY}, REPRODUCE_STL10.md"
CAPTION = f"{REPOSITORY}, caption of the STL-10 table"
ROUNDOFF = f"{REPOSITORY}, OTFLOW_ROUNDOFF_SUMMARY.md"

FIGURES = (
    Published("cnf", "memory of 16 bits over fp32", "about 0.5", f"{PAPER}, abstract", "peak MiB", (FP16,), over=FP32),
    Published("stl10", "peak memory, rampde fp32", "12,131 MB", README, "peak MiB", (FP32,), subject="stl10"),
    Published(
        "stl10",
        "peak memory, rampde fp16 without scaling",
        "2,304 MB, 5.26 times less",
        README,
        "peak MiB",
        (("rampde", "fp16", "none"),),
        subject="stl10",
    ),
    Published(
        "stl10",
        "memory of rampde fp16 over torchdiffeq fp32",
        "0.1 to 0.2",
        CAPTION,
        "peak MiB",
        (FP16,),
        over=PEER,
        subject="stl10",
    ),
    Published(
        "stl10",
        "test accuracy of the fp16 variants, in percent",
        "above 76",
        CAPTION,
        "test accuracy",
        (FP16,),
        subject="stl10",
    ),
    Published(
        "otflow",
        "gradient error in fp16, dynamic scaler or GradScaler",
        "0.0008 to 0.004",
        ROUNDOFF,
        "gradient error",
        SCALED,
    ),
    Published(
        "otflow",
        "gradient error in bf16",
        "0.008 to 0.012",
        ROUNDOFF,
        "gradient error",
        (("rampde", "bf16", "none"),),
    ),
    Published(
        "otflow",
        "gradient error of torchdiffeq in bf16, and in fp16 with GradScaler",
        "both failed",
        ROUNDOFF,
        "gradient error",
        (("torchdiffeq", "bf16", "none"), ("torchdiffeq", "fp16", "grad")),
    ),
    Published(
        "adjoint_scaling",
        "worst gradient error in fp16 with dynamic scaling",
        "at most 1e-2, the bar of a test",
        f"{REPOSITORY}, tests",
        "gradient error, dynamic",
    ),
)
