// Products of one block of the KV cache, 64 tokens, with queries and with weights.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tiles.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kTokens = 64;  // of the cache at a time

// `keys` and `values` are a block's rows; `Packed` is what they are multiplied in.
//   pack_keys: [depth / kPack][64][kPack]; pack_values: [depth / 64][tokens / kPack][64][kPack].
//   multiply: c[R, 64] += a[R, depth] * b[depth / kPack][64][kPack].
// Where a block is multiplied without packing it (scores: up to kFewRows rows; values: these, or any
// number), `score` and `weigh` take 16 tokens from t on, so that heads, which lie side by side, can be
// gone through page by page; sums are made in the same order as from what is packed.

template <typename T>
struct AnyMachine {
  using Element = T;
  using Packed = float;
  static constexpr int64_t kPack = 1;
  static constexpr int64_t kFewRows = 0;
  static constexpr bool kPacksValues = true;

  static void narrow(const float* from, float* to) { std::memcpy(to, from, kTokens * sizeof(float)); }

  template <int R>
  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                       int64_t c_stride) {
    float sums[R][64];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 64; ++j) sums[r][j] = c[r * c_stride + j];
    for (int64_t k = 0; k < depth; ++k)
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 64; ++j) sums[r][j] += a[r * a_stride + k] * b[k * 64 + j];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 64; ++j) c[r * c_stride + j] = sums[r][j];
  }

  static void pack_keys(const T* const* rows, int64_t count, int64_t first, int64_t depth,
                        float* to) {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t t = 0; t < count; ++t) to[d * 64 + t] = float(rows[t][first + d]);
  }

  static void pack_values(const T* const* rows, int64_t count, int64_t first, int64_t depth,
                          float* to) {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t d = 0; d < depth; ++d)
        to[(d / 64 * kTokens + t) * 64 + d % 64] = float(rows[t][first + d]);
  }
};

#ifdef __AVX512BF16__
// 16 rows of 16 pairs of bf16 become 16 columns of them.
inline void transpose(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    out[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// For depths that are multiples of 32.
struct Bf16Machine {
  using Element = at::BFloat16;
  using Packed = at::BFloat16;
  static constexpr int64_t kPack = 2;
  static constexpr int64_t kFewRows = 4;
  static constexpr bool kPacksValues = true;

  static void narrow(const float* from, Packed* to) {
    for (int64_t t = 0; t < kTokens; t += 32)
      _mm512_storeu_si512(to + t, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + t + 16),
                                                               _mm512_loadu_ps(from + t)));
  }

  template <int R>
  static void multiply(const Packed* a, int64_t a_stride, const Packed* b, int64_t depth, float* c,
                       int64_t c_stride) {
    __m512 sums[R][4];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_loadu_ps(c + r * c_stride + j * 16);
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh columns[4];
      for (int j = 0; j < 4; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(b + k * 64 + j * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto pair = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(a + r * a_stride + k));
        for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], pair, columns[j]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + r * c_stride + j * 16, sums[r][j]);
  }

  // Pairs of 16 tokens from t on, of depths [d, d + 32).
  static void key_pairs(const Element* const* rows, int64_t t, int64_t count, int64_t d,
                        __m512i* pairs) {
    __m512i in[16];
    for (int i = 0; i < 16; ++i) in[i] = _mm512_loadu_si512(rows[std::min(t + i, count - 1)] + d);
    transpose(in, pairs);
  }

  // Pairs of tokens t and t + 1, of depths [d, d + 32).
  static void value_pairs(const Element* const* rows, int64_t t, int64_t count, int64_t d,
                          __m512i* pairs) {
    alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i even = _mm512_loadu_si512(rows[t] + d);
    const __m512i odd =
        t + 1 < count ? _mm512_loadu_si512(rows[t + 1] + d) : _mm512_setzero_si512();
    pairs[0] = _mm512_permutex2var_epi16(even, low, odd);
    pairs[1] = _mm512_permutex2var_epi16(even, high, odd);
  }

  static __m512bh broadcast(const Packed* pair) {
    return (__m512bh)_mm512_set1_epi32(*(const int32_t*)pair);
  }

  static void pack_keys(const Element* const* rows, int64_t count, int64_t first, int64_t depth,
                        Packed* to) {
    __m512i pairs[16];
    for (int64_t t = 0; t < count; t += 16)
      for (int64_t d = 0; d < depth; d += 32) {
        key_pairs(rows, t, count, first + d, pairs);
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(to + (d / 2 + i) * 128 + t * 2, pairs[i]);
      }
  }

  static void pack_values(const Element* const* rows, int64_t count, int64_t first, int64_t depth,
                          Packed* to) {
    __m512i pairs[2];
    for (int64_t t = 0; t < count; t += 2)
      for (int64_t d = 0; d < depth; d += 32) {
        value_pairs(rows, t, count, first + d, pairs);
        Packed* place = to + (d / 64) * kTokens * 64 + t * 64 + (d % 64) * 2;
        _mm512_storeu_si512(place, pairs[0]);
        _mm512_storeu_si512(place + 32, pairs[1]);
      }
  }

  template <int R>
  static void score(const Element* const* rows, int64_t t, int64_t count, int64_t first,
                    int64_t depth, const Packed* query, float* scores) {
    __m512i pairs[16];
    __m512 sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d += 32) {
      key_pairs(rows, t, count, first + d, pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int r = 0; r < R; ++r)
          sums[r] = _mm512_dpbf16_ps(sums[r], broadcast(query + r * depth + d + 2 * i),
                                     (__m512bh)pairs[i]);
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(scores + r * kTokens + t, sums[r]);
  }

  template <int R>
  static void weigh(const Element* const* rows, int64_t t, int64_t count, int64_t first,
                    int64_t depth, const Packed* weights, float* output, int64_t width) {
    __m512i pairs[2];
    for (int64_t d = 0; d < depth; d += 32) {
      __m512 sums[R][2];
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) sums[r][j] = _mm512_loadu_ps(output + r * width + d + j * 16);
      for (int64_t end = std::min(t + 16, count), i = t; i < end; i += 2) {
        value_pairs(rows, i, count, first + d, pairs);
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < 2; ++j)
            sums[r][j] = _mm512_dpbf16_ps(sums[r][j], broadcast(weights + r * kTokens + i),
                                          (__m512bh)pairs[j]);
      }
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) _mm512_storeu_ps(output + r * width + d + j * 16, sums[r][j]);
    }
  }
};
#endif

#ifdef DSPARK_TILES
// 8 rows of 8 values of 32 bits become 8 columns of them.
inline void transpose(__m256i* rows) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

// For depths that are multiples of 16.
template <typename T>
struct TiledMachine {
  using Element = T;
  using Packed = float;
  static constexpr int64_t kPack = 1;
  static constexpr int64_t kFewRows = 4;
  static constexpr bool kPacksValues = false;
  static constexpr int64_t kPart = 32 / sizeof(T);  // depths that one register holds

  static void narrow(const float* from, float* to) { std::memcpy(to, from, kTokens * sizeof(float)); }

  // Calls use(i, column) with depth d + i of 8 tokens from t on, for every i below kPart.
  template <typename Use>
  static void columns(const T* const* rows, int64_t t, int64_t count, int64_t d, const Use& use) {
    __m256i values[8];
    for (int i = 0; i < 8; ++i)
      values[i] = _mm256_loadu_si256((const __m256i*)(rows[std::min(t + i, count - 1)] + d));
    transpose(values);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if constexpr (sizeof(T) == 4) {
        use(i, _mm256_castsi256_ps(values[i]));
      } else {
        use(2 * i, low_halves(values[i]));
        use(2 * i + 1, high_halves(values[i]));
      }
  }

  template <int R>
  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                       int64_t c_stride) {
    for (int64_t j = 0; j < kTokens; j += kColumns) {
      __m256 sums[R][2];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) sums[r][i] = _mm256_loadu_ps(c + r * c_stride + j + i * 8);
      for (int64_t k = 0; k < depth; ++k)
        Panel<float>::template add<R>(a + k, a_stride, b + k * kTokens + j, sums);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) _mm256_storeu_ps(c + r * c_stride + j + i * 8, sums[r][i]);
    }
  }

  static void pack_keys(const T* const* rows, int64_t count, int64_t first, int64_t depth,
                        float* to) {
    for (int64_t t = 0; t < count; t += 8)
      for (int64_t d = 0; d < depth; d += kPart)
        columns(rows, t, count, first + d, [&](int i, __m256 column) {
          _mm256_storeu_ps(to + (d + i) * kTokens + t, column);
        });
  }

  template <int R>
  static void score(const T* const* rows, int64_t t, int64_t count, int64_t first, int64_t depth,
                    const float* query, float* scores) {
    for (int64_t end = std::min(t + 16, count); t < end; t += 8) {
      __m256 sums[R];
      for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_ps();
      for (int64_t d = 0; d < depth; d += kPart)
        columns(rows, t, count, first + d, [&](int i, __m256 column) {
          for (int r = 0; r < R; ++r)
            sums[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(query + r * depth + d + i), column,
                                      sums[r]);
        });
      for (int r = 0; r < R; ++r) _mm256_storeu_ps(scores + r * kTokens + t, sums[r]);
    }
  }

  template <int R>
  static void weigh(const T* const* rows, int64_t t, int64_t count, int64_t first, int64_t depth,
                    const float* weights, float* output, int64_t width) {
    for (int64_t d = 0; d < depth; d += kColumns) {
      __m256 sums[R][2];
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) sums[r][j] = _mm256_loadu_ps(output + r * width + d + j * 8);
      for (int64_t end = std::min(t + 16, count), i = t; i < end; ++i) {
        const __m256 left = load8(rows[i] + first + d), right = load8(rows[i] + first + d + 8);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256 weight = _mm256_broadcast_ss(weights + r * kTokens + i);
          sums[r][0] = _mm256_fmadd_ps(weight, left, sums[r][0]);
          sums[r][1] = _mm256_fmadd_ps(weight, right, sums[r][1]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) _mm256_storeu_ps(output + r * width + d + j * 8, sums[r][j]);
    }
  }
};
#endif

template <typename M>
void multiply(const typename M::Packed* a, int64_t a_stride, const typename M::Packed* b,
              int64_t depth, float* c, int64_t c_stride, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    M::template multiply<4>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride);
  for (; r + 2 <= rows; r += 2)
    M::template multiply<2>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride);
  if (r < rows)
    M::template multiply<1>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride);
}

// e^x for x <= 0, relative error 2e-7; 0 for what is never seen.
inline float exp_negative(float x) {
  const float scaled = (x > -87.0f ? x : -87.0f) * 1.44269504f;
  const float whole = std::nearbyint(scaled), part = scaled - whole;
  float p = 1.5403530e-4f;
  p = p * part + 1.3333558e-3f;
  p = p * part + 9.6181291e-3f;
  p = p * part + 5.5504109e-2f;
  p = p * part + 2.4022651e-1f;
  p = p * part + 6.9314718e-1f;
  p = p * part + 1.0f;
  const float power = std::bit_cast<float>((int32_t(whole) + 127) << 23);
  return x > -87.0f ? p * power : 0.0f;
}

}  // namespace
