// Divides tensors of any sizes among the blocks of one launch: plain C++, tested without a GPU.

#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace rampde::cuda {

// elements that one block takes
inline constexpr int64_t kChunk = 8192;

// Chunks of up to kCapacity tensors, numbered one tensor after the other.
template <int kCapacity>
struct Chunks {
  struct Place {
    int tensor;
    int64_t begin;
    int64_t end;
  };

  int64_t numel[kCapacity];
  int64_t last[kCapacity];  // number of chunks of this tensor and all before it
  int tensors = 0;

  bool full() const { return tensors == kCapacity; }
  int64_t blocks() const { return tensors > 0 ? last[tensors - 1] : 0; }

  // the number that the tensor goes by
  int add(int64_t count) {
    last[tensors] = blocks() + (count + kChunk - 1) / kChunk;
    numel[tensors] = count;
    return tensors++;
  }

  // where chunk `block` lies: in the first tensor whose last chunk is beyond it
  C10_HOST_DEVICE Place find(int64_t block) const {
    int low = 0;
    int high = tensors - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (block < last[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t begin = (block - (low > 0 ? last[low - 1] : 0)) * kChunk;
    const int64_t end = begin + kChunk;
    return {low, begin, end < numel[low] ? end : numel[low]};
  }
};

// The blocks that form one sum, and the number of one among them.
struct Blocks {
  int index;
  int count;
};

// leaves of a state in one launch
inline constexpr int kLeaves = 8;

// Blocks of up to kLeaves leaves, numbered one leaf after the other; each has as many as it needs.
struct LeafBlocks {
  int last[kLeaves];  // number of blocks of this leaf and all before it
  int leaves = 0;

  bool full() const { return leaves == kLeaves; }
  int total() const { return leaves > 0 ? last[leaves - 1] : 0; }

  // the number that the leaf goes by
  int add(int64_t blocks) {
    last[leaves] = total() + static_cast<int>(blocks);
    return leaves++;
  }

  // the leaf of a block
  C10_HOST_DEVICE int find(int block) const {
    int leaf = 0;
    while (block >= last[leaf]) ++leaf;
    return leaf;
  }
  C10_HOST_DEVICE Blocks of_leaf(int leaf, int block) const {
    const int first = leaf > 0 ? last[leaf - 1] : 0;
    return {block - first, last[leaf] - first};
  }
};

}  // namespace rampde::cuda
