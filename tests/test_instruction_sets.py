"""The CPU kernels give the same bits with every instruction set that this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from operands import DTYPES, bytes_of, mixed, random, scalar, scale_state
from rampde import fp8_blocks, ops

torch.manual_seed(0)
digest, h = hashlib.sha256(), scalar(0.37, "cpu")
for state in DTYPES:
    for size in (1, 7, 8, 9, 1023, 1025, 4099):
        y = random((size,), state)
        k, b = mixed(5, y), [0.1, -0.7, 1 / 3, 2.0, 0.9]
        compensation, total, scaling = random((size,), torch.float32), y.clone(), scale_state("cpu")
        outputs = [ops.rk_stage(y, k, h, b, result) for result in DTYPES]
        outputs += [ops.adjoint_stage(y, k, h, 0.3, b, result, scaling) for result in DTYPES]
        outputs += [ops.rk_error(y, k, h, b, b[::-1], 1e-3, 1e-5, 0.01, rows) for rows in (1, size)]
        for seed in (None, 5):
            codes, scales = fp8_blocks.empty_like(y)
            ops.rk_update(y, k, h, b, total, None, compensation, None, 0, codes, scales, seed)
            outputs += [total.clone(), compensation.clone(), codes, scales]
            for result in DTYPES:
                outputs.append(y.to(result))
                ops.rk_update(codes, k, h, b, outputs[-1], block_scales=scales)
        ops.adjoint_update(y, k, h, k[0], total, scaling)
        sums = [y.float(), y.double()]
        ops.accumulate_gradients(sums, [k[1], k[2], k[3], k[0]], h, scaling)
        for x in [*outputs, total, scaling, *sums]:
            digest.update(bytes_of(x))
bits = torch.arange(2**16).to(torch.int32).to(torch.int16)
numbers = [x[~x.isnan()] for x in (bits.view(torch.float16), bits.view(torch.bfloat16))]
for x in numbers:
    for result in DTYPES:
        digest.update(bytes_of(ops.rk_stage(x, [], h, [], result)))
x = torch.randint(-(2**31), 2**31, (2**20,)).to(torch.int32).view(torch.float32)
x = torch.cat([x, x.nan_to_num(0.0).clamp(-1e30, 1e30), random((2**20,), torch.float32)])
for seed in (None, 5):
    codes, scales = fp8_blocks.empty_like(x)
    ops.rk_update(x, [x], h, [-1.0], torch.empty_like(x), quantised=codes, block_scales=scales, seed=seed)
    digest.update(bytes_of(codes) + bytes_of(scales))
print(digest.hexdigest())
"""


@pytest.mark.usefixtures("compiled")
def test_instruction_sets_agree_to_the_last_bit(tmp_path: Path) -> None:
    digests = set()
    for capability in ("default", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
