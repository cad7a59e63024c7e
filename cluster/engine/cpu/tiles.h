// Tiles of a matrix product in AVX2 and FMA: a few rows times columns that lie side by side.
//
// Every sum is made term by term in the order of the inner dimension, by one fused multiply-add each,
// so that it does not depend on the tile that it is part of.

#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#define DSPARK_TILES
#include <ATen/ATen.h>
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kColumns = 16;  // of a tile's block: two registers of 8 floats
constexpr int kTileRows = 6;      // 6 * 2 sums, 2 columns' values and one of a row fit 16 registers

// The two bf16 that lie in 32 bits each, as floats.
inline __m256 low_halves(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 high_halves(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}

inline __m256 load8(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load8(const at::BFloat16* from) {
  const __m128i halves = _mm_loadu_si128((const __m128i*)from);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline void store8(float* to, __m256 values) { _mm256_storeu_ps(to, values); }

// Rounds to nearest, ties to even.
inline __m256i rounded(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i not_a_number = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7fc0), not_a_number);
}
inline void store8(at::BFloat16* to, __m256 values) {
  const __m256i wide = rounded(values);
  const __m128i narrow =
      _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128((__m128i*)to, narrow);
}

// How columns lie: 16 floats, or 16 pairs of bf16 of two neighbours of the inner dimension.
template <typename T>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int64_t kPack = 1;
  template <int R>
  static void add(const float* x, int64_t x_stride, const float* columns, __m256 (*sums)[2]) {
    const __m256 left = _mm256_loadu_ps(columns), right = _mm256_loadu_ps(columns + 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_broadcast_ss(x + r * x_stride);
      sums[r][0] = _mm256_fmadd_ps(value, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(value, right, sums[r][1]);
    }
  }
};

template <>
struct Panel<at::BFloat16> {
  static constexpr int64_t kPack = 2;
  template <int R>
  static void add(const float* x, int64_t x_stride, const at::BFloat16* columns,
                  __m256 (*sums)[2]) {
    const __m256i left = _mm256_loadu_si256((const __m256i*)columns);
    const __m256i right = _mm256_loadu_si256((const __m256i*)(columns + 16));
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m256 a = k ? high_halves(left) : low_halves(left);
      const __m256 b = k ? high_halves(right) : low_halves(right);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 value = _mm256_broadcast_ss(x + r * x_stride + k);
        sums[r][0] = _mm256_fmadd_ps(value, a, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(value, b, sums[r][1]);
      }
    }
  }
};

}  // namespace
#endif
