// Linear layers of bf16 with packed weights, for few rows: what a decoding step consists of.
//
// Weights are laid out in blocks of 32 outputs, [N / 32][K / 2][32][2], as `vdpbf16ps` reads them:
// a block is read once, from one end to the other, whatever the number of rows up to 12 is. Every
// row is summed in the same order however many there are, so that its result does not depend on
// what else is in the batch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t kBlock = 32;       // outputs of one block: two registers of 16 floats
constexpr int64_t kMaxRows = 12;     // 2 * 12 sums, 2 weights and an input fit 32 registers
constexpr int64_t kPrefetch = 8192;  // values ahead: the next 16 KiB of weights

at::Tensor pack(const at::Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "weight must be bfloat16");
  TORCH_CHECK(inputs % 2 == 0, "weight must have an even number of inputs");
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  at::Tensor padded = at::zeros({blocks * kBlock, inputs}, weight.options());
  padded.narrow(0, 0, outputs).copy_(weight);
  return padded.view({blocks, kBlock, inputs / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// y[R, width <= 32] = x[R, 2 * pairs] * block
template <int R>
void multiply(const uint16_t* x, int64_t inputs, const uint16_t* block, const float* bias,
              uint16_t* y, int64_t outputs, int64_t width) {
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
constexpr Multiply kMultiply[kMaxRows + 1] = {
    nullptr,     multiply<1>, multiply<2>, multiply<3>,  multiply<4>,  multiply<5>, multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

// One of the layers that have the same input, and where its output goes.
struct Layer {
  const uint16_t* weight;
  const float* bias;  // padded to blocks, or null
  uint16_t* to;
  int64_t outputs, first_block;
};

// Layers of one input in one go: threads are set to work once, and each goes through the weights
// from one end to the other.
std::vector<at::Tensor> linears(const at::Tensor& input, at::TensorList packed,
                                const c10::List<std::optional<at::Tensor>>& biases,
                                at::IntArrayRef outputs) {
  TORCH_CHECK(input.scalar_type() == at::kBFloat16, "input must be bfloat16");
  const at::Tensor x = input.contiguous();
  const int64_t inputs = x.size(-1), rows = x.numel() / inputs;
  std::vector<at::Tensor> results;
  std::vector<Layer> layers;
  int64_t blocks = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::optional<at::Tensor> bias = biases.get(i);
    TORCH_CHECK(packed[i].size(1) * 2 == inputs, "input has ", inputs, " columns, the weight ",
                packed[i].size(1) * 2);
    auto shape = x.sizes().vec();
    shape.back() = outputs[i];
    results.push_back(at::empty(shape, x.options()));
    layers.push_back({(const uint16_t*)packed[i].const_data_ptr(),
                      bias ? bias->const_data_ptr<float>() : nullptr,
                      (uint16_t*)results.back().data_ptr(), outputs[i], blocks});
    blocks += packed[i].size(0);
  }
  const auto* from = (const uint16_t*)x.const_data_ptr();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    auto layer = layers.begin();
    for (int64_t all = begin; all < end; ++all) {
      while (layer + 1 != layers.end() && all >= (layer + 1)->first_block) ++layer;
      const int64_t b = all - layer->first_block, first = b * kBlock;
      for (int64_t row = 0; row < rows; row += kMaxRows)
        kMultiply[std::min(kMaxRows, rows - row)](
            from + row * inputs, inputs, layer->weight + first * inputs,
            layer->bias ? layer->bias + first : nullptr, layer->to + row * layer->outputs + first,
            layer->outputs, layer->outputs - first);
    }
  });
  return results;
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& packed,
                  const std::optional<at::Tensor>& bias, int64_t outputs) {
  return linears(input, {packed}, c10::List<std::optional<at::Tensor>>({bias}), {outputs})[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark_cpu, m) {
  m.def("pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  m.def("linears(Tensor input, Tensor[] packed, Tensor?[] biases, int[] outputs) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(dspark_cpu, CPU, m) {
  m.impl("pack", pack);
  m.impl("linear", linear);
  m.impl("linears", linears);
}
#endif
