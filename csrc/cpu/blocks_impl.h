// The block kernels themselves, included once by the file of each instruction set after it has set
// the target. Nothing here may have external linkage, and no header with inline functions may be
// included: the linker keeps one copy of such a function, and it could be one compiled for an
// instruction set that the processor lacks.

#include "blocks.h"

namespace rampde::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// e4m3: the exponent is biased by 7, and there is one NaN in place of infinities
struct Float8 {
  uint8_t bits;
};

template <class To, class From>
inline To bits_as(From value) {
  return __builtin_bit_cast(To, value);
}

// without a branch, which would keep a loop from being vectorised
inline uint32_t select(bool condition, uint32_t x, uint32_t y) {
  const uint32_t mask = 0 - static_cast<uint32_t>(condition);
  return (x & mask) | (y & ~mask);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

inline float widen(Half x) {
  const int32_t magnitude = x.bits & 0x7fff;
  // subnormals are integers times 2^-24; else the exponent is biased by 15, and 31 means no number
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const uint32_t bias = select(magnitude < 0x7c00, 127 - 15, 255 - 31);
  const uint32_t normal = (static_cast<uint32_t>(magnitude) << 13) + (bias << 23);
  const uint32_t bits = select(magnitude < 0x0400, bits_as<uint32_t>(subnormal), normal);
  return bits_as<float>(bits | (uint32_t{x.bits} & 0x8000) << 16);
}

inline float widen(Float8 x) {
  const int32_t magnitude = x.bits & 0x7f;
  // subnormals are integers times 2^-9
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  const uint32_t normal = (static_cast<uint32_t>(magnitude) << 20) + ((127 - 7) << 23);
  uint32_t bits = select(magnitude < 0x08, bits_as<uint32_t>(subnormal), normal);
  bits = select(magnitude == 0x7f, 0x7fc00000, bits);
  return bits_as<float>(bits | (uint32_t{x.bits} & 0x80) << 24);
}

inline void narrow(float& to, float x) { to = x; }
inline void narrow(float& to, double x) { to = static_cast<float>(x); }
inline void narrow(double& to, double x) { to = x; }

inline void narrow(BFloat16& to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = static_cast<uint16_t>(select(is_nan, 0x7fc0, rounded));
}

inline void narrow(Half& to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // one unit in the last place of 0.5 is 2^-24, that of a subnormal half: the addition rounds
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = select(magnitude < 0x38800000, subnormal, normal);
  half = select(magnitude < 0x477ff000, half, 0x7c00);  // from 65520 on the nearest is infinity
  half = select(magnitude > 0x7f800000, 0x7e00, half);
  to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <class To>
inline void narrow(To& to, double x) {
  narrow(to, static_cast<float>(x));  // by way of float, as PyTorch does
}

template <class Accumulator, class T>
void load(Accumulator* __restrict sums, const void* source, int64_t count) {
  const T* __restrict x = static_cast<const T*>(source);
  for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<Accumulator>(widen(x[i]));
}

template <class Accumulator, class T>
void add_scaled(Accumulator* __restrict sums, const void* source, Accumulator factor,
                int64_t count) {
  const T* __restrict x = static_cast<const T*>(source);
  for (int64_t i = 0; i < count; ++i) sums[i] += factor * static_cast<Accumulator>(widen(x[i]));
}

template <class Accumulator, class T>
void store(void* target, const Accumulator* __restrict sums, int64_t count) {
  T* __restrict x = static_cast<T*>(target);
  for (int64_t i = 0; i < count; ++i) narrow(x[i], sums[i]);
}

#ifdef RAMPDE_F16C
// The processor converts halves, but compilers do not vectorise that: eight at a time by hand.
inline void widen_halves(float* __restrict to, const Half* __restrict x, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < count; ++i) to[i] = widen(x[i]);
}

inline void narrow_floats(Half* __restrict to, const float* __restrict x, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < count; ++i) narrow(to[i], x[i]);
}

template <>
void load<float, Half>(float* __restrict sums, const void* x, int64_t count) {
  widen_halves(sums, static_cast<const Half*>(x), count);
}

template <>
void load<double, Half>(double* __restrict sums, const void* x, int64_t count) {
  float widened[kBlock];
  widen_halves(widened, static_cast<const Half*>(x), count);
  load<double, float>(sums, widened, count);
}

template <>
void add_scaled<float, Half>(float* __restrict sums, const void* source, float factor,
                             int64_t count) {
  const Half* __restrict x = static_cast<const Half*>(source);
  const __m256 factors = _mm256_set1_ps(factor);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    const __m256 products = _mm256_mul_ps(factors, _mm256_cvtph_ps(halves));
    _mm256_storeu_ps(sums + i, _mm256_add_ps(_mm256_loadu_ps(sums + i), products));
  }
  for (; i < count; ++i) sums[i] += factor * widen(x[i]);
}

template <>
void add_scaled<double, Half>(double* __restrict sums, const void* x, double factor,
                              int64_t count) {
  float widened[kBlock];
  widen_halves(widened, static_cast<const Half*>(x), count);
  add_scaled<double, float>(sums, widened, factor, count);
}

template <>
void store<float, Half>(void* x, const float* __restrict sums, int64_t count) {
  narrow_floats(static_cast<Half*>(x), sums, count);
}

template <>
void store<double, Half>(void* x, const double* __restrict sums, int64_t count) {
  float narrowed[kBlock];
  store<double, float>(narrowed, sums, count);
  narrow_floats(static_cast<Half*>(x), narrowed, count);
}
#endif

// Knuth, TAOCP 2, 4.2.2, theorem B; void if the compiler fused or reordered any of it
template <class Accumulator>
void two_sum(Accumulator* __restrict base, Accumulator* __restrict increment, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Accumulator total = base[i] + increment[i];
    const Accumulator shifted = total - base[i];
    increment[i] = (base[i] - (total - shifted)) + (increment[i] - shifted);
    base[i] = total;
  }
}

inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }

template <class Accumulator>
void weigh(Accumulator* __restrict y, Accumulator* __restrict ratios,
           const Accumulator* __restrict next, Accumulator rtol, Accumulator atol, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Accumulator before = magnitude(y[i]), after = magnitude(next[i]);
    y[i] = 1 / (atol + rtol * (before > after ? before : after));
    ratios[i] = next[i] - next[i];
  }
}

template <class Accumulator, class T>
void add_error(Accumulator* __restrict ratios, Accumulator* __restrict shares,
               const Accumulator* __restrict weights, const void* source, Accumulator factor,
               int64_t count) {
  const T* __restrict x = static_cast<const T*>(source);
  for (int64_t i = 0; i < count; ++i) {
    const Accumulator part = factor * static_cast<Accumulator>(widen(x[i])) * weights[i];
    ratios[i] += part;
    shares[i] += part * part;
  }
}

#ifdef RAMPDE_F16C
template <>
void add_error<float, Half>(float* __restrict ratios, float* __restrict shares,
                            const float* __restrict weights, const void* x, float factor,
                            int64_t count) {
  float widened[kBlock];
  widen_halves(widened, static_cast<const Half*>(x), count);
  add_error<float, float>(ratios, shares, weights, widened, factor, count);
}

template <>
void add_error<double, Half>(double* __restrict ratios, double* __restrict shares,
                             const double* __restrict weights, const void* x, double factor,
                             int64_t count) {
  float widened[kBlock];
  widen_halves(widened, static_cast<const Half*>(x), count);
  add_error<double, float>(ratios, shares, weights, widened, factor, count);
}
#endif

template <class Accumulator>
void square(double* __restrict squares, const Accumulator* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    squares[i] = static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
}

// without a branch, as `select`
inline float keep_if(bool condition, float x) {
  return bits_as<float>(bits_as<uint32_t>(x) & (0 - static_cast<uint32_t>(condition)));
}
inline double keep_if(bool condition, double x) {
  return bits_as<double>(bits_as<uint64_t>(x) & (0 - static_cast<uint64_t>(condition)));
}

template <class Accumulator>
void load_finite(double* __restrict finite, const Accumulator* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    finite[i] = static_cast<double>(keep_if(x[i] - x[i] == 0, x[i]));
  }
}

void sum_rows(double* sums, double* x, int64_t rows, int64_t length) {
  for (int64_t row = 0; row < rows; ++row, x += length) {
    double* __restrict lower = x;
    for (int64_t left = length; left > 1;) {
      const int64_t half = (left + 1) / 2;
      const double* __restrict upper = x + half;
      for (int64_t i = 0; i < left - half; ++i) lower[i] += upper[i];
      left = half;
    }
    sums[2 * row] = lower[0];
  }
}

template <class Accumulator>
void add_quantised(Accumulator* sums, const void* source, const float* scales, int64_t count) {
  const Float8* codes = static_cast<const Float8*>(source);
  for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
    const int64_t length = count - begin < kScaleBlock ? count - begin : kScaleBlock;
    const auto scale = static_cast<Accumulator>(scales[begin / kScaleBlock]);
    add_scaled<Accumulator, Float8>(sums + begin, codes + begin, scale, length);
  }
}

// the finaliser of MurmurHash3: each bit depends on all
inline uint32_t scrambled(uint32_t word) {
  word = (word ^ word >> 16) * 0x85ebca6b;
  word = (word ^ word >> 13) * 0xc2b2ae35;
  return word ^ word >> 16;
}

inline uint32_t low(int64_t x) { return static_cast<uint32_t>(x); }
inline uint32_t high(int64_t x) { return static_cast<uint32_t>(x >> 32); }

// How many quanta an element is, a whole number: of the binade whose first bits are `binade`, where
// there are eight, or up to sixteen where they reach the next one.
struct ToNearest {
  uint32_t operator()(float x, uint32_t binade, int64_t) const {
    // the last place of a sum of this size is a quantum: the addition rounds
    const uint32_t large = binade + (20 << 23);
    return bits_as<uint32_t>(x + bits_as<float>(large)) - large;
  }
};
struct AtRandom {
  // an element's word is its offset's, whose upper half does not change within a block
  AtRandom(int64_t seed, int64_t begin)
      : first(low(begin) + high(begin) * 0x9e3779b1 +
              scrambled(low(seed) ^ scrambled(high(seed)))) {}
  uint32_t operator()(float x, uint32_t binade, int64_t i) const {
    const float per_quantum = bits_as<float>(((127 + 3) << 23) - (binade - (127 << 23)));
    const int32_t random = static_cast<int32_t>(scrambled(first + low(i)) >> 12);
    return static_cast<uint32_t>(static_cast<int32_t>(x * per_quantum + random * 0x1p-20f));
  }

  uint32_t first;
};

inline uint32_t magnitude_bits(float x) { return bits_as<uint32_t>(x) & 0x7fffffff; }
inline bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000; }

// The bits of max |x[i]|: all of them are finite, or the others do not count.
template <bool all_finite>
uint32_t largest_bits(const float* __restrict x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t magnitude = magnitude_bits(x[i]);
    if constexpr (!all_finite) magnitude = select(is_finite(x[i]), magnitude, 0);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The codes of -x.
template <bool all_finite, class Rounding>
void encode(const Rounding& rounding, Float8* __restrict codes, const float* __restrict x,
            float inverse_scale, int64_t begin, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t magnitude = magnitude_bits(x[i]);
    if constexpr (!all_finite) magnitude = select(is_finite(x[i]), magnitude, 0);
    const float scaled = bits_as<float>(magnitude) * inverse_scale;
    // below 2^-6 quanta are as large as there
    const uint32_t floored = bits_as<uint32_t>(scaled) & 0x7f800000;
    const uint32_t binade = floored > (127 - 6) << 23 ? floored : (127 - 6) << 23;
    // the first code of a binade has eight quanta
    const uint32_t code = (binade >> 20) - ((127 - 6) << 3) + rounding(scaled, binade, begin + i);
    uint32_t bits = code | (~bits_as<uint32_t>(x[i]) >> 24 & 0x80);
    if constexpr (!all_finite) bits = select(is_finite(x[i]), bits, 0x7f);
    codes[i].bits = static_cast<uint8_t>(bits);
  }
}

template <class Rounding>
void quantise_with(const Rounding& rounding, void* target, float* scales, const float* values,
                   int64_t count) {
  for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
    const int64_t length = count - begin < kScaleBlock ? count - begin : kScaleBlock;
    const float* x = values + begin;
    Float8* codes = static_cast<Float8*>(target) + begin;
    uint32_t largest = largest_bits<true>(x, length);
    const bool all_finite = largest < 0x7f800000;
    if (!all_finite) largest = largest_bits<false>(x, length);
    // the largest code is 1.75 * 2^8: a mantissa above 1.75 carries into the exponent
    const uint32_t carried = (largest + 0x1fffff) >> 23;
    const uint32_t exponent = largest == 0 ? 127 : carried > 9 ? carried - 8 : 1;
    scales[begin / kScaleBlock] = bits_as<float>(exponent << 23);
    const float inverse_scale = bits_as<float>((254 - exponent) << 23);
    const auto encode_block = all_finite ? encode<true, Rounding> : encode<false, Rounding>;
    encode_block(rounding, codes, x, inverse_scale, begin, length);
  }
}

void quantise_negated(void* codes, float* scales, const float* x, int64_t count) {
  quantise_with(ToNearest{}, codes, scales, x, count);
}

void quantise_negated_randomly(void* codes, float* scales, const float* x, int64_t seed,
                               int64_t begin, int64_t count) {
  quantise_with(AtRandom(seed, begin), codes, scales, x, count);
}

template <class Bits>
uint64_t largest(const void* source, int64_t count) {
  const Bits* x = static_cast<const Bits*>(source);
  constexpr Bits magnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  Bits result = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits bits = static_cast<Bits>(x[i] & magnitude);
    result = bits > result ? bits : result;
  }
  return result;
}

template <class Accumulator>
constexpr SumKernels<Accumulator> sum_kernels() {
  using A = Accumulator;
  return {
      {load<A, double>, load<A, float>, load<A, Half>, load<A, BFloat16>},
      {add_scaled<A, double>, add_scaled<A, float>, add_scaled<A, Half>, add_scaled<A, BFloat16>},
      add_quantised<A>,
      {store<A, double>, store<A, float>, store<A, Half>, store<A, BFloat16>},
      two_sum<A>,
      weigh<A>,
      {add_error<A, double>, add_error<A, float>, add_error<A, Half>, add_error<A, BFloat16>},
      square<A>,
      load_finite<A>};
}

constexpr Kernels all_kernels() {
  return {sum_kernels<float>(),
          sum_kernels<double>(),
          {largest<uint64_t>, largest<uint32_t>, largest<uint16_t>, largest<uint16_t>},
          sum_rows,
          quantise_negated,
          quantise_negated_randomly};
}

}  // namespace
}  // namespace rampde::cpu
