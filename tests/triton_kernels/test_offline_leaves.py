"""What the kernels for all leaves of a state compile to, without a GPU: access widths, spills, order of sums."""

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton.language as tl
from test_offline_compilation import BYTES, CAPABILITIES, THREADS, count, cuobjdump, wide_bytes
from test_offline_steps import compile_kernel

from rampde.kernels.launch import BLOCK, LEAVES, OPTIONS
from rampde.kernels.leaves import (
    NUMELS,
    ROUNDOFFS,
    rk_error_leaves_kernel,
    rk_stage_leaves_kernel,
    rk_update_leaves_kernel,
)

KERNELS = {"stage": rk_stage_leaves_kernel, "update": rk_update_leaves_kernel, "error": rk_error_leaves_kernel}


class Case(NamedTuple):
    """The dtypes of one call: of ``y`` and of its velocities leaf by leaf, and of what is written of every leaf."""

    kind: str
    y: tuple[str, ...]
    k: tuple[str, ...]
    terms: int
    outputs: tuple[str | None, ...]

    def __str__(self) -> str:
        return "-".join([self.kind, *self.y, str(self.terms), *self.k, *map(str, self.outputs)])

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple((-1) ** j / (3 + j) for j in range(self.terms * (2 if self.kind == "error" else 1)))

    @property
    def sums(self) -> list[str]:
        """The dtype in which each leaf's sums are formed."""
        return ["f64" if dtype == "fp64" else "f32" for dtype in self.y]

    @property
    def compensated(self) -> bool:
        return len(self.outputs) == 3 and self.outputs[2] is not None


CASES = (
    # a flow, whose density has velocities in 32 bits
    Case("stage", ("fp32", "fp32"), ("bf16", "fp32"), 3, ("bf16",)),
    Case("stage", ("fp32", "fp64", "fp32"), ("fp16", "fp64", "fp32"), 1, ("fp16",)),
    Case("stage", ("fp32",) * LEAVES, ("bf16",) * LEAVES, 6, ("bf16",)),
    Case("update", ("fp32",) * 4, ("bf16", "fp32", "fp32", "fp32"), 4, ("fp32", "bf16", None)),
    Case("update", ("fp32", "fp64"), ("fp16", "fp64"), 4, (None, "fp16", "fp64")),
    Case("error", ("fp32", "fp32"), ("bf16", "fp32"), 7, ("fp32", "bf16", None)),
    Case("error", ("fp64", "fp32"), ("fp64", "fp32"), 4, (None, None, None)),
)


def of_leaf(case: Case, output: int, leaf: int) -> str | None:
    """The dtype of an output; a state is written in its own."""
    if output == 0 and case.kind == "update":
        return case.y[leaf]
    return case.outputs[output]


def compile_offline(case: Case, capability: int) -> Any:
    leaves = range(len(case.y))
    kernel = KERNELS[case.kind]
    names = ("stage_ptrs",) if case.kind == "stage" else ("next_ptrs", "checkpoint_ptrs", "compensation_ptrs")
    types: dict[str, Any] = {
        "y_ptrs": tuple("*" + dtype for dtype in case.y),
        "k_ptrs": tuple("*" + dtype for dtype in case.k for _ in range(case.terms)),
        "h_ptr": "*fp64",
        "overflow_ptr": "*i64",
        "sums_ptrs": ("*fp64",),
        "step": "i64",
        "parts": "i64",
        **dict.fromkeys(NUMELS, "i64"),
        **dict.fromkeys((*ROUNDOFFS, "rtol", "atol"), "fp64"),
    }
    for output, name in enumerate(names):
        dtypes = [of_leaf(case, output, leaf) for leaf in leaves]
        types[name] = None if None in dtypes else tuple(f"*{dtype}" for dtype in dtypes)
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = {
        "coefficients": case.coefficients,
        "accumulations": tuple(tl.float64 if sums == "f64" else tl.float32 for sums in accumulations(case)),
        "BLOCK": BLOCK,
    }
    aligned = {name for name in types if name.endswith("_ptrs")}
    return compile_kernel(kernel, types, constants, aligned, OPTIONS, capability)


def accumulations(case: Case) -> list[str]:
    return ["f64" if case.compensated and case.outputs[2] == "fp64" else sums for sums in case.sums]


class Compiled(NamedTuple):
    case: Case
    capability: int
    ptx: str
    cubin: Path


def label(param: tuple[Case, int]) -> str:
    return f"{param[0]}-sm{param[1]}"


@pytest.fixture(scope="module", params=[(case, cc) for cc in CAPABILITIES for case in CASES], ids=label)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    case, capability = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        code = compile_offline(case, capability)
    cubin = tmp_path_factory.mktemp("cubin") / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    return Compiled(case, capability, code.asm["ptx"], cubin)


def test_full_blocks_of_every_leaf_move_128_bits_at_a_time(compiled: Compiled) -> None:
    case, elements = compiled.case, BLOCK // THREADS
    outputs = [of_leaf(case, output, leaf) for output in range(len(case.outputs)) for leaf in range(len(case.y))]
    written = [dtype for dtype in outputs if dtype is not None]
    read = [*case.y, *case.k * case.terms, *([case.outputs[2]] * len(case.y) if case.compensated else [])]
    assert wide_bytes(compiled.ptx, "ld") == elements * sum(BYTES[str(dtype)] for dtype in read)
    assert wide_bytes(compiled.ptx, "st") == elements * sum(BYTES[dtype] for dtype in written)


def test_nothing_spills(compiled: Compiled) -> None:
    assert ".local" not in compiled.ptx
    usage = cuobjdump("--dump-resource-usage", str(compiled.cubin))
    assert re.search(r"\bREG:\d+", usage), usage
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


def test_coefficients_are_exact_in_float64(compiled: Compiled) -> None:
    for coefficient in compiled.case.coefficients:
        assert f"0d{struct.pack('>d', coefficient).hex().upper()}" in compiled.ptx


def test_sums_are_neither_contracted_nor_reassociated(compiled: Compiled) -> None:
    case, copies = compiled.case, 2 * BLOCK // THREADS
    for dtype in ("f32", "f64"):
        leaves = accumulations(case).count(dtype)
        assert count(compiled.ptx, "fma", dtype) == 0
        # as of the operator on a leaf alone; of an error: its sum, that of the squares, the tolerance
        sums = case.terms * (3 if case.kind == "error" else 1) + (case.kind == "error") + 2 * case.compensated
        found = count(compiled.ptx, "add", dtype)
        if case.kind == "error" and dtype == "f64":
            # and those of the norm over the block
            assert found >= copies * leaves * sums
        else:
            assert found == copies * leaves * sums
    if compiled.capability < 100 and case.kind != "error":
        assert not re.search(r"\b[FD]FMA", cuobjdump("--dump-sass", str(compiled.cubin)))


def test_overflow_costs_one_atomic_a_block(compiled: Compiled) -> None:
    atomics = re.findall(r"\b(?:atom|red)\.global\S*\.min\.s64", compiled.ptx)
    assert len(atomics) == (2 * len(compiled.case.y) if compiled.case.kind == "update" else 0)
