"""What the kernels that decide on steps compile to, without a GPU: access widths, spills, precision and rounding."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# not "triton" itself: without it, this very folder would be found as a namespace package of that name
pytest.importorskip("triton.language", reason="Triton is not installed")

import triton
import triton.language as tl
from test_offline_compilation import BYTES, CAPABILITIES, THREADS, count, cuobjdump, wide_bytes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rampde.control import GOOD_ENOUGH
from rampde.kernels.launch import BLOCK, OPTIONS
from rampde.kernels.step_commit import step_commit_kernel
from rampde.kernels.step_control import OPTIONS as CONTROL_OPTIONS
from rampde.kernels.step_control import OUTPUTS_AT_ONCE, step_control_kernel
from rampde.methods import get_method
from rampde.tableau import ClosedTableau, EmbeddedTableau


class Commit(NamedTuple):
    """The dtypes of one call."""

    state: str
    velocity: str
    method: str
    staged: bool = True

    def __str__(self) -> str:
        return f"{self.state}-{self.velocity}-{self.method}-{self.staged}"


COMMITS = (
    Commit("fp32", "bf16", "dopri5"),
    Commit("fp32", "fp16", "dopri8"),
    Commit("fp32", "fp32", "tsit5", staged=False),
    Commit("fp64", "fp64", "dopri8"),
)


def tableau(method: str) -> ClosedTableau:
    found = get_method(method)
    assert isinstance(found, EmbeddedTableau)
    return found.closed


def bits(number: float) -> str:
    """A float64 as PTX has it."""
    return f"0d{struct.pack('>d', number).hex().upper()}"


def compile_kernel(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], aligned: set[str], options: Any, capability: int
) -> Any:
    """The kernel with arguments of these Triton types, None for what is absent."""
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        found = types.get(name)
        signature[name] = "constexpr" if found is None else found
        if found is None:
            constants.setdefault(name, None)
        elif name in aligned:
            paths = [(index, j) for j in range(len(found))] if isinstance(found, tuple) else [(index,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_commit(case: Commit, capability: int) -> Any:
    rows = [row for row in tableau(case.method).interpolant if any(row)]
    state, velocity = "*" + case.state, "*" + case.velocity
    types: dict[str, Any] = {
        "y_ptr": state,
        "k_ptrs": (velocity,) * len(rows),
        "next_ptr": state,
        "first_ptr": velocity,
        "last_ptr": velocity,
        "rows_ptr": state,
        "staged_ptr": velocity if case.staged else None,
    }
    constants = {
        "coefficients": tuple(c for row in rows for c in row),
        "accumulation": tl.float64 if case.state == "fp64" else tl.float32,
        "aligned": 1,
        "BLOCK": BLOCK,
    }
    others = {"record_ptr": "*fp64", "times_ptr": "*fp64", "numel": "i64"}
    return compile_kernel(step_commit_kernel, types | others, constants, set(types), OPTIONS, capability)


def compile_control(dtype: str, capability: int) -> Any:
    numbers = ("sign", "order", "safety", "ifactor", "dfactor", "min_step", "max_step", "max_num_steps", "p", "i", "d")
    pointers = ("control_ptr", "record_ptr", "sums_ptr", "sizes_ptr", "output_times_ptr")
    types: dict[str, Any] = dict.fromkeys(numbers, "fp64") | dict.fromkeys(pointers, "*fp64")
    types |= {"stage_times_ptr": "*" + dtype, "leaves": "i64", "count": "i64"}
    constants = {"nodes": tableau("dopri5").nodes, "AT_ONCE": OUTPUTS_AT_ONCE}
    return compile_kernel(step_control_kernel, types, constants, set(), CONTROL_OPTIONS, capability)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def assert_nothing_spills(code: Any, folder: Path) -> None:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    assert ".local" not in code.asm["ptx"]
    usage = cuobjdump("--dump-resource-usage", str(cubin))
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", COMMITS, ids=str)
def test_commit(case: Commit, capability: int, tmp_path: Path) -> None:
    code = compile_commit(case, capability)
    ptx = code.asm["ptx"]
    assert_nothing_spills(code, tmp_path)
    # the state, the velocity at its start, what is kept of it, and an output in one of two ways
    velocities = 2 if case.staged else 1
    stored = velocities * BYTES[case.velocity] + 3 * BYTES[case.state]
    assert wide_bytes(ptx, "st") == BLOCK // THREADS * stored
    # the state after it, that before it where it is kept, the velocity at the end; and in an output what it is made of
    rows = [row for row in tableau(case.method).interpolant if any(row)]
    loaded = (3 + case.staged) * BYTES[case.state] + (1 + len(rows)) * BYTES[case.velocity]
    assert wide_bytes(ptx, "ld") == BLOCK // THREADS * loaded
    for row in rows:
        for coefficient in row:
            assert coefficient == 0.0 or bits(coefficient) in ptx
    # sums are not contracted, and roundings are to nearest even
    assert count(ptx, "fma", "f32") == 0
    assert not re.findall(r"cvt\.r[zmp]\.\S*f32\S*", ptx)
    if case.velocity in ("bf16", "fp16"):
        assert re.search(rf"cvt\.rn\.{case.velocity.replace('fp', 'f')}(x2)?\.f32", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_control(dtype: str, capability: int, tmp_path: Path) -> None:
    code = compile_control(dtype, capability)
    ptx = code.asm["ptx"]
    assert_nothing_spills(code, tmp_path)
    for number in (*tableau("dopri5").nodes[1:-2], GOOD_ENOUGH):
        assert bits(number) in ptx
    # nothing is decided in less than 64 bits
    assert not re.findall(r"\b(?:add|sub|mul|div|fma|sqrt|ex2|lg2|min|max)\.\S*f32", ptx)
    assert not re.findall(r"\b(?:div|sqrt)\.approx", ptx)
