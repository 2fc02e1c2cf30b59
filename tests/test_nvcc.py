"""The CUDA sources without a GPU: they compile, spill nothing, and divide the work rightly."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from rampde import _ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
INCLUDES = [f"-I{path}" for path in cpp_extension.include_paths()]
FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPERATORS = {"adjoint_stage", "adjoint_update", "update_scale", "accumulate_gradients"}


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_operator_of_the_sweep_has_a_source() -> None:
    assert {source.stem for source in SOURCES} == OPERATORS


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    compiled = tmp_path / "kernel.o"
    output = run(nvcc, "-c", source, "-o", compiled, *FLAGS, "-DUSE_CUDA", *INCLUDES, *architectures, "-Xptxas=-v")
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(stack) >= 4, output
    assert {number for numbers in stack for number in numbers} == {"0"}, output
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", output)]
    # a block of 256 threads: four fit the 65536 registers of a multiprocessor up to here
    assert max(registers) <= 72, output
    if shutil.which("nm") is not None:
        undefined = run("nm", "-C", "--undefined-only", compiled)
        assert "aoti_torch" in undefined
        assert not re.findall(r".*\b(?:at|c10)::.*", undefined)


def test_extension_uses_only_the_stable_interface() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    if _ext.MISSING:
        pytest.skip(_ext.MISSING)
    from rampde import _C

    undefined = run("nm", "-DC", "--undefined-only", _C.__file__)
    assert "aoti_torch" in undefined
    assert not re.findall(r".*\b(?:at|c10)::.*", undefined)


CHUNKS_PROGRAM = """
#include "cuda/chunks.h"

#include <cstdio>
#include <vector>

using rampde::cuda::kChunk;

int main() {
  rampde::cuda::Chunks<8> chunks;
  const std::vector<int64_t> sizes = {
      1, kChunk, kChunk + 1, 7, 100 * kChunk - 1, kChunk - 1, (int64_t{1} << 40) + 3, 2};
  for (int64_t size : sizes) {
    if (chunks.full()) return 1;
    chunks.add(size);
  }
  if (!chunks.full()) return 2;
  // chunk after chunk covers tensor after tensor, without gap or overlap
  int tensor = 0;
  int64_t reached = 0;
  const int64_t huge = chunks.last[5] + 1000, end = chunks.last[6] - 1000;
  for (int64_t block = 0; block < chunks.blocks(); ++block) {
    const auto place = chunks.find(block);
    if (reached == sizes[tensor]) ++tensor, reached = 0;
    if (place.tensor != tensor || place.begin != reached) return 3;
    if (place.end <= place.begin || place.end - place.begin > kChunk) return 4;
    reached = place.end;
    if (block == huge) {  // no need to walk through all of the large one
      block = end - 1;
      reached = (end - chunks.last[5]) * kChunk;
    }
  }
  if (tensor != 7 || reached != 2) return 5;
  chunks.tensors = 0;
  return chunks.blocks() == 0 ? 0 : 6;
}
"""


LEAVES_PROGRAM = """
#include "cuda/chunks.h"

using rampde::cuda::Blocks;

int main() {
  rampde::cuda::LeafBlocks blocks;
  if (blocks.total() != 0) return 1;
  // empty leaves have no block
  const int sizes[] = {0, 1, 4096, 0, 0, 3, 17, 0};
  for (int size : sizes) {
    if (blocks.full()) return 2;
    blocks.add(size);
  }
  if (!blocks.full() || blocks.total() != 4117) return 3;
  int block = 0;
  for (int leaf = 0; leaf < 8; ++leaf) {
    for (int i = 0; i < sizes[leaf]; ++i, ++block) {
      if (blocks.find(block) != leaf) return 4;
      const Blocks found = blocks.of_leaf(leaf, block);
      if (found.index != i || found.count != sizes[leaf]) return 5;
    }
  }
  return block == 4117 ? 0 : 6;
}
"""


@pytest.mark.parametrize("program_text", [CHUNKS_PROGRAM, LEAVES_PROGRAM], ids=["chunks", "leaves"])
def test_blocks_cover_every_element_once(program_text: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "chunks.cpp", tmp_path / "chunks"
    source.write_text(program_text)
    run(compiler, *FLAGS, "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", *INCLUDES, source, "-o", program)
    run(program)
