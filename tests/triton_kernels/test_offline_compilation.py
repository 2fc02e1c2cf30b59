"""What the Triton kernels compile to, without a GPU: access widths, spills, precision and rounding."""

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rampde.kernels.launch import BLOCK, OPTIONS
from rampde.kernels.rk_error import rk_error_kernel
from rampde.kernels.rk_stage import rk_stage_kernel
from rampde.kernels.rk_update import rk_update_kernel

CAPABILITIES = (80, 90, 100)
THREADS = 32 * OPTIONS["num_warps"]
NUMBERS = ("rtol", "atol", "roundoff")
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
# of a step in 8 bits
CODES = "u8"


class Case(NamedTuple):
    """The dtypes of one call; None for an absent operand. Neither ``update`` nor ``error``: a stage.

    ``quantised``: how an output in 8 bits is rounded, ``"nearest"`` or ``"random"``.
    """

    y: str
    k: str
    terms: int
    output: str
    update: bool = False
    checkpoint: str | None = None
    compensation: str | None = None
    overflow: bool = False
    error: bool = False
    length: int | None = None
    quantised: str | None = None

    def __str__(self) -> str:
        kind = "update" if self.update else "error" if self.error else "stage"
        options = "" if kind == "stage" else f"-{self.checkpoint}-{self.compensation}-{self.overflow or self.length}"
        return f"{kind}-{self.y}-{self.terms}{self.k}-{self.output}{options}" + f"-{self.quantised}" * bool(
            self.quantised
        )

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple((-1) ** j / (3 + j) for j in range(self.terms * (2 if self.error else 1)))

    @property
    def accumulated(self) -> str:
        """The dtype in which sums are formed."""
        return "fp64" if (self.output if self.y == CODES else self.y) == "fp64" else "fp32"

    @property
    def loaded(self) -> list[str]:
        return [dtype for dtype in (self.y, *[self.k] * self.terms, self.compensation) if dtype and dtype != CODES]

    @property
    def stored(self) -> list[str]:
        return [dtype for dtype in (self.output, self.checkpoint, self.compensation) if dtype]


CASES = (
    Case("fp32", "bf16", 1, "bf16"),
    Case("fp32", "fp16", 3, "fp16"),
    Case("fp32", "fp32", 3, "fp32"),
    Case("fp64", "fp64", 16, "fp64"),
    Case("fp32", "bf16", 4, "fp32", update=True, checkpoint="bf16", overflow=True),
    Case("fp32", "fp16", 16, "fp32", update=True, checkpoint="fp16", compensation="fp32", overflow=True),
    Case("fp32", "fp32", 4, "fp32", update=True),
    Case("fp64", "fp64", 4, "fp64", update=True, checkpoint="fp64", compensation="fp64", overflow=True),
    Case("fp32", "bf16", 7, "fp32", error=True, checkpoint="bf16"),
    Case("fp32", "fp16", 13, "fp32", error=True, checkpoint="fp16", compensation="fp32"),
    Case("fp32", "fp32", 4, "fp32", error=True),
    Case("fp64", "fp64", 7, "fp64", error=True),
    Case("u8", "fp32", 1, "fp32", update=True, checkpoint="bf16", overflow=True),
    Case("u8", "fp64", 1, "fp64", update=True, checkpoint="fp16"),
    Case("u8", "fp32", 0, "fp32", update=True),
    Case("fp32", "bf16", 4, "fp32", update=True, overflow=True, quantised="nearest"),
    Case("fp32", "fp16", 16, "fp32", update=True, compensation="fp32", overflow=True, quantised="random"),
    Case("fp64", "fp64", 4, "fp64", update=True, checkpoint="fp64", compensation="fp64", quantised="random"),
    Case("fp32", "bf16", 7, "fp32", error=True, quantised="random"),
    Case("fp64", "fp64", 7, "fp64", error=True, quantised="nearest"),
    # short rows, and long ones, whose parts are aligned
    Case("fp32", "bf16", 7, "fp32", error=True, checkpoint="bf16", length=64),
    Case("fp32", "bf16", 7, "fp32", error=True, length=5000),
)


class Compiled(NamedTuple):
    case: Case
    capability: int
    ptx: str
    cubin: Path


def compile_offline(case: Case, capability: int) -> Any:
    """The kernel as a launch with 16-byte aligned operands compiles it."""
    kernel = rk_update_kernel if case.update else rk_error_kernel if case.error else rk_stage_kernel
    pointers: dict[str, Any] = {"y_ptr": case.y, "k_ptrs": (case.k,) * case.terms, "stage_ptr": case.output}
    if case.update or case.error:
        del pointers["stage_ptr"]
        pointers |= {
            "next_ptr": case.output,
            "checkpoint_ptr": case.checkpoint,
            "compensation_ptr": case.compensation,
            "codes_ptr": CODES if case.quantised else None,
        }
    if case.error:
        pointers["sums_ptr"] = "fp64"
    aligned = set(pointers)
    scaled = case.quantised or case.y == CODES
    pointers |= {
        "h_ptr": "fp64",
        "overflow_ptr": "i64" if case.overflow else None,
        "scales_ptr": "fp32" if scaled else None,
    }
    constants = {
        "coefficients": case.coefficients,
        "accumulation": tl.float64 if case.accumulated == "fp64" else tl.float32,
        "stochastic": case.quantised == "random",
        "LENGTH": case.length,
        "WIDTH": min(BLOCK, case.length or BLOCK),
        "BLOCK": BLOCK,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        pointer = pointers.get(name, "")
        if isinstance(pointer, tuple):
            signature[name] = tuple("*" + dtype for dtype in pointer)
        elif name in constants or pointer is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = "*" + pointer if pointer else "fp64" if name in NUMBERS else "i64"
        if name in aligned and pointer is not None:
            paths = [(index, j) for j in range(case.terms)] if isinstance(pointer, tuple) else [(index,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def label(param: tuple[Case, int]) -> str:
    return f"{param[0]}-sm{param[1]}"


@pytest.fixture(scope="module", params=[(case, cc) for cc in CAPABILITIES for case in CASES], ids=label)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    case, capability = request.param
    code = compile_offline(case, capability)
    cubin = tmp_path_factory.mktemp("cubin") / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    return Compiled(case, capability, code.asm["ptx"], cubin)


def cuobjdump(*arguments: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("neither Triton nor the CUDA toolkit brings cuobjdump here")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def widths(ptx: str, instruction: str) -> list[int]:
    """Bytes that one thread moves by each of its accesses to more than one number."""
    accesses = re.findall(rf"\b{instruction}\.global(?:\.\w+(?:::\w+)*)*?\.v(\d)\.b(\d+)", ptx)
    return [int(count) * int(bits) // 8 for count, bits in accesses]


def wide_bytes(ptx: str, instruction: str) -> int:
    """Bytes that one thread moves by accesses of 128 bits or more."""
    return sum(width for width in widths(ptx, instruction) if width >= 16)


def count(ptx: str, operation: str, dtype: str) -> int:
    """Elements on which one thread carries out an operation; packed instructions work on two."""
    found = re.findall(rf"\b{operation}\.(?:rn\.)?{dtype}(x2)?\b", ptx)
    return sum(2 if packed else 1 for packed in found)


def test_full_blocks_move_128_bits_at_a_time(compiled: Compiled) -> None:
    elements = BLOCK // THREADS
    assert wide_bytes(compiled.ptx, "ld") == elements * sum(BYTES[dtype] for dtype in compiled.case.loaded)
    assert wide_bytes(compiled.ptx, "st") == elements * sum(BYTES[dtype] for dtype in compiled.case.stored)
    # eight codes are all that a thread has
    assert widths(compiled.ptx, "ld").count(elements) == (1 if compiled.case.y == CODES else 0)
    assert widths(compiled.ptx, "st").count(elements) == (1 if compiled.case.quantised else 0)


def test_nothing_spills(compiled: Compiled) -> None:
    assert ".local" not in compiled.ptx
    usage = cuobjdump("--dump-resource-usage", str(compiled.cubin))
    assert re.search(r"\bREG:\d+", usage), usage
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


def test_coefficients_are_exact_in_float64(compiled: Compiled) -> None:
    for coefficient in compiled.case.coefficients:
        assert f"0d{struct.pack('>d', coefficient).hex().upper()}" in compiled.ptx
    if compiled.case.y == "fp64" and not compiled.case.quantised:
        assert "f32" not in compiled.ptx


def test_rounding_is_to_nearest_even(compiled: Compiled) -> None:
    for dtype in {"bf16", "fp16"} & set(compiled.case.stored):
        assert re.search(rf"cvt\.rn\.{dtype.replace('fp', 'f')}(x2)?\.f32", compiled.ptx)
    # but for what was given a random number before
    others = {"cvt.rzi.s32.f32"} if compiled.case.quantised == "random" else set()
    assert set(re.findall(r"cvt\.r[zmp]\S*", compiled.ptx)) == others


def test_sums_are_neither_contracted_nor_reassociated(compiled: Compiled) -> None:
    case = compiled.case
    accumulated = case.accumulated.replace("p", "")
    # one copy of the code for full blocks and one for the last; without compensation the first term starts the sum of
    # them, and one addition more reaches the state; the two-sum has two sums and four differences
    copies = (1 if case.length else 2) * BLOCK // THREADS
    sums, differences = (2, 4) if case.compensation else (0, 0)
    # of the error: its sum, that of the squares, the tolerance; the difference that is zero or nan
    sums += case.terms * (3 if case.error else 1) + case.error
    differences += case.error
    # rounding to 8 bits is one, in float32
    sums += bool(case.quantised) and accumulated == "f32"
    assert count(compiled.ptx, "fma", accumulated) == 0
    assert count(compiled.ptx, "mul", accumulated) >= copies * case.terms
    assert count(compiled.ptx, "sub", accumulated) == copies * differences
    # a norm is summed over the block in float64
    found = count(compiled.ptx, "add", accumulated)
    assert found > copies * sums if case.error and case.y == "fp64" else found == copies * sums
    # ptxas 12.9 fuses the packed products of Blackwell unasked, to no harm in the two-sum, which has none; an exact
    # division is made of fma
    if compiled.capability < 100 and not case.error:
        assert not re.search(r"\b[FD]FMA", cuobjdump("--dump-sass", str(compiled.cubin)))


def test_overflow_costs_one_atomic_a_block(compiled: Compiled) -> None:
    atomics = re.findall(r"\b(?:atom|red)\.global\S*\.min\.s64", compiled.ptx)
    assert len(atomics) == (2 if compiled.case.overflow else 0)
