// Device functions that move one or eight neighbouring elements between memory and registers.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace rampde::cuda {

// elements that a thread takes at once: 16 bytes of the 16-bit dtypes
inline constexpr int kVector = 8;

// bytes that a base address must be a multiple of for the vector path
inline constexpr uintptr_t kAlignment = 16;

inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kAlignment == 0;
}

template <class T, int kCount>
struct Pack {
  T item[kCount];
};

// Packs move in words of 16 bytes where they have that many.
template <int kCount, class T>
__device__ Pack<T, kCount> read(const void* data, int64_t index) {
  using Word = std::conditional_t<sizeof(T) * kCount % kAlignment == 0, uint4, T>;
  constexpr int kWords = sizeof(T) * kCount / sizeof(Word);
  const Word* source = reinterpret_cast<const Word*>(static_cast<const T*>(data) + index);
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = source[i];
  Pack<T, kCount> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

template <int kCount, class T>
__device__ void write(void* data, int64_t index, const Pack<T, kCount>& pack) {
  using Word = std::conditional_t<sizeof(T) * kCount % kAlignment == 0, uint4, T>;
  constexpr int kWords = sizeof(T) * kCount / sizeof(Word);
  Word words[kWords];
  memcpy(words, &pack, sizeof(pack));
  Word* target = reinterpret_cast<Word*>(static_cast<T*>(data) + index);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (std::is_same_v<Word, uint4>) {
      __stwb(target + i, words[i]);  // a plain store, but one that is not split
    } else {
      target[i] = words[i];
    }
  }
}

template <class To, class From>
__device__ To convert(From x) {
  return static_cast<To>(x);
}
// the 16-bit dtypes by way of float, as PyTorch does
template <>
__device__ inline double convert<double>(__half x) {
  return __half2float(x);
}
template <>
__device__ inline float convert<float>(__half x) {
  return __half2float(x);
}
template <>
__device__ inline double convert<double>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ inline float convert<float>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ inline __half convert<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __half convert<__half>(double x) {
  return __float2half_rn(static_cast<float>(x));
}
template <>
__device__ inline __nv_bfloat16 convert<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __nv_bfloat16 convert<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}

// Calls `function.template operator()<T>()` with the type of `dtype`; uniform across a warp.
template <class Function>
__device__ void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::Float64:
      return function.template operator()<double>();
    case DType::Float32:
      return function.template operator()<float>();
    case DType::Float16:
      return function.template operator()<__half>();
    default:
      return function.template operator()<__nv_bfloat16>();
  }
}

// sums[i] += factor * pack[i]
template <int kCount, class Accumulator, class T>
__device__ void add_scaled(Accumulator (&sums)[kCount], Accumulator factor,
                           const Pack<T, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] += factor * convert<Accumulator>(pack.item[i]);
}

template <int kCount, class Accumulator>
__device__ void add_scaled(Accumulator (&sums)[kCount], Accumulator factor, const void* data,
                           DType dtype, int64_t index) {
  with_type(dtype, [&]<class T>() { add_scaled(sums, factor, read<kCount, T>(data, index)); });
}

template <int kCount, class Accumulator>
__device__ void store(void* data, DType dtype, int64_t index, const Accumulator (&sums)[kCount]) {
  with_type(dtype, [&]<class T>() {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.item[i] = convert<T>(sums[i]);
    write<kCount, T>(data, index, pack);
  });
}

// Calls `body.template operator()<kCount>(index)` for the elements from `begin` to `end` that fall
// to this thread of `threads`: eight at once where `aligned`, the rest one by one.
template <class Body>
__device__ void for_each_vector(int64_t begin, int64_t end, bool aligned, int64_t thread,
                                int64_t threads, const Body& body) {
  const int64_t rest = aligned ? end - (end - begin) % kVector : begin;
  for (int64_t i = begin + thread * kVector; i < rest; i += threads * kVector) {
    body.template operator()<kVector>(i);
  }
  for (int64_t i = rest + thread; i < end; i += threads) body.template operator()<1>(i);
}

}  // namespace rampde::cuda
