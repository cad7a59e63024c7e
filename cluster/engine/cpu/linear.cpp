// Linear layers with packed weights, for few rows above all: what a decoding step consists of.
//
// Weights are laid out in blocks of outputs that are read once, from one end to the other, whatever
// the number of rows is. Every row is summed in the same order however many there are, so that its
// result does not depend on what else is in the batch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "tiles.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// One of the layers that have the same input, and where its output goes.
struct Layer {
  const void* weight;
  const float* bias;  // padded to blocks, or null
  void* to;
  int64_t outputs, first_block;
};

// A kernel says how weights of `Element` are packed, [N / kBlock][K / kPack][kBlock][kPack], what rows
// are multiplied as, and computes blocks [begin, end) of a layer, counted from 0, for all rows.

#ifdef __AVX512BF16__
// As `vdpbf16ps` reads them.
struct Bf16Products {
  static constexpr auto kRowsAs = at::kBFloat16;
  static constexpr int64_t kBlock = 32;  // two registers of 16 floats
  static constexpr int64_t kPack = 2;
  static constexpr int64_t kMaxRows = 12;     // 2 * 12 sums, 2 weights and an input fit 32 registers
  static constexpr int64_t kPrefetch = 8192;  // values ahead: the next 16 KiB of weights

  // y[R, width <= 32] = x[R, 2 * pairs] * block
  template <int R>
  static void multiply(const uint16_t* x, int64_t inputs, const uint16_t* block,
                       const float* bias, uint16_t* y, int64_t outputs, int64_t width) {
    __m512 sums[R][2];
    for (int r = 0; r < R; ++r) {
      sums[r][0] = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
      sums[r][1] = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < inputs; k += 2, block += 2 * kBlock) {
      const auto low = (__m512bh)_mm512_loadu_si512(block);
      const auto high = (__m512bh)_mm512_loadu_si512(block + kBlock);
      _mm_prefetch((const char*)(block + kPrefetch), _MM_HINT_T0);
      _mm_prefetch((const char*)(block + kPrefetch + kBlock), _MM_HINT_T0);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto pair = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(x + r * inputs + k));
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, low);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, high);
      }
    }
    const __mmask32 mask = width >= kBlock ? 0xffffffffu : (1u << width) - 1;
    for (int r = 0; r < R; ++r)
      _mm512_mask_storeu_epi16(y + r * outputs, mask,
                               (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]));
  }

  using Multiply = void (*)(const uint16_t*, int64_t, const uint16_t*, const float*, uint16_t*,
                            int64_t, int64_t);
  static constexpr Multiply kMultiply[kMaxRows + 1] = {
      nullptr,     multiply<1>, multiply<2>, multiply<3>,  multiply<4>,  multiply<5>, multiply<6>,
      multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

  static void run(const at::Tensor& rows, const Layer& layer, int64_t begin, int64_t end) {
    const int64_t count = rows.size(0), inputs = rows.size(1);
    const auto* from = (const uint16_t*)rows.const_data_ptr();
    for (int64_t first = begin * kBlock; first < end * kBlock; first += kBlock)
      for (int64_t row = 0; row < count; row += kMaxRows)
        kMultiply[std::min(kMaxRows, count - row)](
            from + row * inputs, inputs, (const uint16_t*)layer.weight + first * inputs,
            layer.bias ? layer.bias + first : nullptr,
            (uint16_t*)layer.to + row * layer.outputs + first, layer.outputs, layer.outputs - first);
  }
};
#endif

#ifdef DSPARK_TILES
// In tiles of floats, into which bf16 is expanded in registers: half the bytes to read.
template <typename T>
struct Tiles {
  static constexpr auto kRowsAs = at::kFloat;
  static constexpr int64_t kBlock = kColumns;
  static constexpr int64_t kPack = Panel<T>::kPack;

  // y[R, B * 16] = x[R, inputs] * B blocks, of which the last one has `width` outputs. Meanwhile
  // it asks for what lies `ahead`: by `step` bytes more each time, and as far behind each block.
  template <int R, int B>
  static void multiply(const float* x, int64_t inputs, const T* block, const float* bias, T* y,
                       int64_t outputs, int64_t width, const char* ahead, int64_t step) {
    const int64_t size = inputs * kBlock;
    __m256 sums[B][R][2];
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j)
          sums[b][r][j] = bias ? _mm256_loadu_ps(bias + b * kBlock + j * 8) : _mm256_setzero_ps();
    for (int64_t k = 0; k < inputs; k += kPack, block += kBlock * kPack, ahead += step)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        _mm_prefetch(ahead + b * size * int64_t(sizeof(T)), _MM_HINT_T0);
        Panel<T>::template add<R>(x + k, inputs, block + b * size, sums[b]);
      }
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r) {
        T* to = y + r * outputs + b * kBlock;
        if (b + 1 < B || width == kBlock) {
          store8(to, sums[b][r][0]);
          store8(to + 8, sums[b][r][1]);
        } else {
          T last[kBlock];
          store8(last, sums[b][r][0]);
          store8(last + 8, sums[b][r][1]);
          std::copy(last, last + width, to);
        }
      }
  }

  using Multiply = void (*)(const float*, int64_t, const T*, const float*, T*, int64_t, int64_t,
                            const char*, int64_t);
  static constexpr Multiply kMultiply[kTileRows + 1] = {
      nullptr,        multiply<1, 1>, multiply<2, 1>, multiply<3, 1>,
      multiply<4, 1>, multiply<5, 1>, multiply<6, 1>};
  // Fewer rows have fewer sums, which would wait for one another: they take several blocks at once.
  static constexpr int64_t kFew = 3;
  static constexpr int64_t kTogether[kFew + 1] = {1, 4, 2, 2};
  static constexpr Multiply kMultiplyTogether[kFew + 1] = {nullptr, multiply<1, 4>,
                                                           multiply<2, 2>, multiply<3, 2>};

  static void run(const at::Tensor& rows, const Layer& layer, int64_t begin, int64_t end) {
    const int64_t count = rows.size(0), inputs = rows.size(1), size = inputs * kBlock;
    const auto* from = (const float*)rows.const_data_ptr();
    const int64_t chunks = (count + kTileRows - 1) / kTileRows;
    for (int64_t b = begin, together; b < end; b += together) {
      together = count <= kFew && b + kTogether[count] <= end ? kTogether[count] : 1;
      const T* block = (const T*)layer.weight + b * size;
      const int64_t first = b * kBlock;
      const int64_t width = std::min(kBlock, layer.outputs - first - (together - 1) * kBlock);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        // Every chunk asks for its share of the next block.
        const int64_t row = count * chunk / chunks, height = count * (chunk + 1) / chunks - row;
        const auto* ahead = (const char*)(block + together * size + size * chunk / chunks);
        (together > 1 ? kMultiplyTogether : kMultiply)[height](
            from + row * inputs, inputs, block, layer.bias ? layer.bias + first : nullptr,
            (T*)layer.to + row * layer.outputs + first, layer.outputs, width, ahead,
            kBlock * kPack * int64_t(sizeof(T)) / chunks);
      }
    }
  }
};
#endif

template <typename Kernel>
at::Tensor pack_for(const at::Tensor& weight) {
  constexpr int64_t kBlock = Kernel::kBlock, kPack = Kernel::kPack;
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  TORCH_CHECK(inputs % kPack == 0, "weight must have a multiple of ", kPack, " inputs");
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  at::Tensor padded = at::zeros({blocks * kBlock, inputs}, weight.options());
  padded.narrow(0, 0, outputs).copy_(weight);
  return padded.view({blocks, kBlock, inputs / kPack, kPack}).permute({0, 2, 1, 3}).contiguous();
}

// Layers of one input in one go: threads are set to work once, and each goes through the weights
// from one end to the other.
template <typename Kernel>
std::vector<at::Tensor> multiply_by(const at::Tensor& input, at::TensorList packed,
                                    const c10::List<std::optional<at::Tensor>>& biases,
                                    at::IntArrayRef outputs) {
  const int64_t inputs = input.size(-1);
  const at::Tensor rows = input.reshape({input.numel() / inputs, inputs}).to(Kernel::kRowsAs).contiguous();
  std::vector<at::Tensor> results;
  std::vector<Layer> layers;
  int64_t blocks = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::optional<at::Tensor> bias = biases.get(i);
    TORCH_CHECK(packed[i].scalar_type() == input.scalar_type(), "the weight is ",
                packed[i].scalar_type(), ", the input ", input.scalar_type());
    TORCH_CHECK(packed[i].size(1) * Kernel::kPack == inputs, "input has ", inputs,
                " columns, the weight ", packed[i].size(1) * Kernel::kPack);
    auto shape = input.sizes().vec();
    shape.back() = outputs[i];
    results.push_back(at::empty(shape, input.options()));
    layers.push_back({packed[i].const_data_ptr(), bias ? bias->const_data_ptr<float>() : nullptr,
                      results.back().data_ptr(), outputs[i], blocks});
    blocks += packed[i].size(0);
  }
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < layers.size(); ++i) {
      const int64_t first = layers[i].first_block, count = packed[i].size(0);
      Kernel::run(rows, layers[i], std::clamp<int64_t>(begin - first, 0, count),
                  std::clamp<int64_t>(end - first, 0, count));
    }
  });
  return results;
}

// Calls `use` with the kernel for a type. Where the processor has 512-bit registers, PyTorch's own
// products of floats use them, and these would not.
template <typename Result, typename Use>
Result with_kernel(at::ScalarType type, [[maybe_unused]] const Use& use) {
#ifdef __AVX512BF16__
  if (type == at::kBFloat16) return use.template operator()<Bf16Products>();
#elif defined(DSPARK_TILES)
  if (type == at::kBFloat16) return use.template operator()<Tiles<at::BFloat16>>();
#endif
#if defined(DSPARK_TILES) && !defined(__AVX512F__)
  if (type == at::kFloat) return use.template operator()<Tiles<float>>();
#endif
  TORCH_CHECK(false, "no kernel for weights of ", type);
}

bool packs(at::ScalarType type) {
#ifdef DSPARK_TILES
#ifndef __AVX512F__
  if (type == at::kFloat) return true;
#endif
  return type == at::kBFloat16;
#else
  return false;
#endif
}

at::Tensor pack(const at::Tensor& weight) {
  return with_kernel<at::Tensor>(weight.scalar_type(),
                                 [&]<typename Kernel>() { return pack_for<Kernel>(weight); });
}

std::vector<at::Tensor> linears(const at::Tensor& input, at::TensorList packed,
                                const c10::List<std::optional<at::Tensor>>& biases,
                                at::IntArrayRef outputs) {
  return with_kernel<std::vector<at::Tensor>>(input.scalar_type(), [&]<typename Kernel>() {
    return multiply_by<Kernel>(input, packed, biases, outputs);
  });
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& packed,
                  const std::optional<at::Tensor>& bias, int64_t outputs) {
  return linears(input, {packed}, c10::List<std::optional<at::Tensor>>({bias}), {outputs})[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark_cpu, m) {
  m.def("packs(ScalarType type) -> bool", packs);
  m.def("pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("linears(Tensor input, Tensor[] packed, Tensor?[] biases, int[] outputs) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(dspark_cpu, CPU, m) {
  m.impl("pack", pack);
  m.impl("linear", linear);
  m.impl("linears", linears);
}
