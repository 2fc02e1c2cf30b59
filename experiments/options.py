"""The options that all experiments share, and what they say about the precision and the solver."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torchdiffeq
from torch import Tensor

import rampde

ROOT = Path(__file__).resolve().parent
PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SOLVERS = ("rampde", "torchdiffeq")
SCALERS = ("none", "grad", "dynamic", "both")
CHECKPOINTS = ("auto", "none", "step", "stage", "lean", "tape", "fp8", "offload")
# where things are and how many runs there are: neither part of what a run computes nor of how fast it is
NO_CONFIG = ("out", "fresh", "compare", "seeds", "folder")

# what --compare goes through
COMPARED = ("precision", "solver", "scaler")

O = TypeVar("O", bound="Options")  # noqa: E741


@dataclass(frozen=True)
class Options:
    """What every experiment lets one choose; an experiment's own options are fields of a subclass.

    Attributes:
        is_study: it goes through precisions and solvers by itself.
        precision: "fp64" (data and parameters are then float64), "fp32", "tf32" (fp32 whose matrix products round their
            factors to 10 bits; on a GPU), "bf16", "fp16".
        solver: "rampde" or "torchdiffeq".
        scaler: of the gradient in 16 bits. "none", "grad" (``torch.amp.GradScaler`` on the loss), "dynamic"
            (:class:`rampde.DynamicScaler` on the adjoint) or "both" (the first for layers around a solve, and the
            scaling that :func:`rampde.odeint` does by itself within it). Empty: in fp16 "dynamic" with rampde and
            "grad" with torchdiffeq, else "none".
        checkpoint: what rampde keeps for the backward pass: one of CHECKPOINTS or a number of states.
        device: "cpu" or "cuda".
        threads: of PyTorch on the CPU.
        quick: a few small iterations on generated data, to see that everything runs.
        seed: of parameters, data and batches.
        out: folder of the results.
        fresh: begin again where there are results already.
        compare: run all precisions, solvers and scalers of the published tables (:func:`sweep`).
        seeds: how many seeds to run, from ``seed`` on.

    Raises:
        ValueError: a value that is none of these, or values that do not go together.
    """

    is_study: ClassVar[bool] = False

    precision: str = "bf16"
    solver: str = "rampde"
    scaler: str = ""
    checkpoint: str = "auto"
    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    seed: int = 0
    out: str = str(ROOT / "results")
    fresh: bool = False
    compare: bool = False
    seeds: int = 1

    def __post_init__(self) -> None:
        for name, known in (("precision", tuple(PRECISIONS)), ("solver", SOLVERS), ("scaler", ("", *SCALERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(filter(None, known))}")
        if not self.scaler:
            usual = "dynamic" if self.solver == "rampde" else "grad"
            object.__setattr__(self, "scaler", usual if self.precision == "fp16" else "none")
        if self.scaler in ("dynamic", "both") and self.solver != "rampde":
            raise ValueError(f"scaler {self.scaler!r} belongs to rampde; with torchdiffeq it is 'grad' or 'none'")
        if self.scaler != "none" and PRECISIONS[self.precision].itemsize != 2:
            raise ValueError(f"scaler {self.scaler!r} is for bf16 and fp16; with {self.precision} it is 'none'")
        if torch.device(self.device).type not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}, expected cpu or cuda")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}, and PyTorch can use no GPU here")
        if self.precision == "tf32" and not self.device.startswith("cuda"):
            raise ValueError("precision 'tf32' exists on a GPU only; on the CPU take fp32")
        if self.solver != "rampde" and self.checkpoint != "auto":
            raise ValueError(f"checkpoint {self.checkpoint!r} belongs to rampde; torchdiffeq keeps what autograd keeps")
        for name in ("threads", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        read_checkpoint(self.checkpoint)

    @property
    def config(self) -> dict[str, Any]:
        """All that a run's numbers depend on, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name not in NO_CONFIG}

    @property
    def label(self) -> str:
        """Solver, precision, scaler and checkpoint policy, as the name of a run."""
        words = [self.solver, self.precision]
        words += [self.scaler] if PRECISIONS[self.precision].itemsize == 2 else []
        words += [self.checkpoint] if self.checkpoint != "auto" else []
        return "-".join(words)

    def named(self, subject: str) -> str:
        """The name of the run that learns ``subject``: with label and seed, and "quick" where it is a short one."""
        return f"{subject}-{self.label}-{self.seed}{'-quick' if self.quick else ''}"

    def prepare(self) -> None:
        """Sets what is the process's: threads, the seed of PyTorch's generators, and whether fp32 is fp32."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.manual_seed(self.seed)

    @classmethod
    def parser(cls, experiment: str, description: str) -> argparse.ArgumentParser:
        """A parser of the common options, for ``python -m experiments.<experiment>``, to add others to."""
        parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment}", description=description)
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
        parser.add_argument("--solver", choices=SOLVERS, default="rampde")
        parser.add_argument(
            "--scaler", choices=SCALERS, default="", help="default in fp16: dynamic (rampde), grad (torchdiffeq)"
        )
        parser.add_argument("--checkpoint", default="auto", help=f"{', '.join(CHECKPOINTS)}, or a number of states")
        parser.add_argument("--device", default=usual, help="cpu or cuda")
        parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--out", default=cls.out, help="folder of the results (default: experiments/results)")
        parser.add_argument("--quick", action="store_true", help="few small iterations, to see that everything runs")
        parser.add_argument("--fresh", action="store_true", help="begin again where there are results already")
        parser.add_argument("--compare", action="store_true", help="all columns of the published tables")
        parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run, from --seed on")
        return parser

    @classmethod
    def read(cls: type[O], parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> O:
        """The options of a command line; where they do not go together, the parser says so and exits."""
        found = vars(parser.parse_args(arguments))
        if found["compare"]:
            given = [name for name in COMPARED if found[name] != parser.get_default(name)]
            if given:
                parser.error(f"--compare runs every {given[0]}: leave out --{' and --'.join(given)}")
        try:
            return cls(**found)
        except ValueError as error:
            parser.error(str(error))


def published_variants(options: O) -> list[O]:
    """The columns of the published tables: each precision with each solver and scaler that it was run with."""
    wide = ("fp32", "tf32") if options.device.startswith("cuda") else ("fp32",)
    chosen = [(solver, precision, "none") for precision in (*wide, "bf16") for solver in ("torchdiffeq", "rampde")]
    chosen += [("torchdiffeq", "fp16", scaler) for scaler in ("none", "grad")]
    chosen += [("rampde", "fp16", scaler) for scaler in ("none", "grad", "dynamic")]
    found = []
    for solver, precision, scaler in chosen:
        checkpoint = options.checkpoint if solver == "rampde" else "auto"
        found.append(replace(options, solver=solver, precision=precision, scaler=scaler, checkpoint=checkpoint))
    return found


def sweep(options: O) -> list[O]:
    """The runs that a command line asks for: these options, or the published variants, for each seed."""
    variants = published_variants(options) if options.compare else [options]
    return [replace(variant, seed=options.seed + n) for n in range(options.seeds) for variant in variants]


def read_checkpoint(text: str) -> rampde.Checkpoint | str | int:
    """What ``checkpoint=`` of :func:`rampde.odeint` takes, from its name on the command line.

    Raises:
        ValueError: no such policy.
    """
    if text == "fp8":
        return rampde.Fp8("lean")
    if text == "offload":
        return rampde.Offload("step")
    if text in CHECKPOINTS:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(f"checkpoint is {text!r}, expected one of {', '.join(CHECKPOINTS)} or a positive number of states")


class Precision:
    """The arithmetic of a run: the autocast context, and the scalers with what they have learned.

    Attributes:
        device: where the run computes.
        dtype: of the velocity.
        grad_scaler: of the loss; does nothing unless the scaler is "grad" or "both".
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = PRECISIONS[options.precision]
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=options.scaler in ("grad", "both"))
        self._scalers: dict[str, rampde.DynamicScaler] = {}

    @property
    def state_dtype(self) -> torch.dtype:
        """Of data, parameters and states: float64 in fp64, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Autocast to the 16-bit type; nothing in 32 bits."""
        low = self.dtype.itemsize == 2
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low):
            yield

    def loss_scaler(self, block: str = "") -> object:
        """What ``loss_scaler=`` of :func:`rampde.odeint` takes; a dynamic scaler for each ``block`` of a network."""
        if self.options.scaler == "none":
            return False
        if self.options.scaler == "grad":
            return self.grad_scaler
        if self.options.scaler == "both":
            # where no scale serves, gradients come back infinite, and the GradScaler leaves the step out
            return None
        if block not in self._scalers:
            self._scalers[block] = rampde.DynamicScaler(self.dtype, decrease_factor=2.0**-4, max_attempts=10)
        return self._scalers[block]

    def state_dict(self) -> dict[str, Any]:
        """What the scalers have learned."""
        return {
            "grad": self.grad_scaler.state_dict(),
            "dynamic": {block: scaler.headroom for block, scaler in self._scalers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state["grad"])
        for block, headroom in state["dynamic"].items():
            scaler = self.loss_scaler(block)
            assert isinstance(scaler, rampde.DynamicScaler)
            scaler.headroom = headroom


def solve(
    precision: Precision,
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    method: str = "rk4",
    block: str = "",
    **arguments: Any,
) -> Any:
    """Solves dy/dt = func(t, y) with the run's solver, in the run's precision.

    Args:
        precision: of the run; its options say which solver.
        func: velocity, called as ``func(t, y)``.
        y0: tensor of any shape in ``precision.state_dtype``, or a tuple of them.
        t: (T,) times.
        method: with the same meaning in both solvers: "rk4" (the 3/8 rule), "euler", "midpoint".
        block: name of the part of a network that this is a solve of; each has a dynamic scaler of its own.
        arguments: others that both solvers take.

    Returns:
        The states at ``t``, (T, *shape) for each tensor of y0.
    """
    options = precision.options
    with precision.context():
        if options.solver == "torchdiffeq":
            return torchdiffeq.odeint(func, y0, t, method=method, **arguments)
        return rampde.odeint(
            func,
            y0,
            t,
            method=method,
            loss_scaler=precision.loss_scaler(block),
            checkpoint=read_checkpoint(options.checkpoint),
            **arguments,
        )
