// Linear layers of bf16 with packed weights, for few rows: what a decoding step consists of.
//
// Weights are laid out in blocks of 32 outputs, [N / 32][K / 2][32][2], as `vdpbf16ps` reads them:
// a block is read once, from one end to the other, whatever the number of rows up to 12 is. Every
// row is summed in the same order however many there are, so that its result does not depend on
// what else is in the batch.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>

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

at::Tensor linear(const at::Tensor& input, const at::Tensor& packed,
                  const std::optional<at::Tensor>& bias, int64_t outputs) {
  const int64_t inputs = input.size(-1), blocks = packed.size(0);
  TORCH_CHECK(input.scalar_type() == at::kBFloat16, "input must be bfloat16");
  TORCH_CHECK(packed.size(1) * 2 == inputs, "input has ", inputs, " columns, the weight ",
              packed.size(1) * 2);
  auto shape = input.sizes().vec();
  shape.back() = outputs;
  const at::Tensor x = input.contiguous();
  at::Tensor y = at::empty(shape, input.options());
  const int64_t rows = x.numel() / inputs;
  const auto* from = (const uint16_t*)x.const_data_ptr();
  const auto* weights = (const uint16_t*)packed.const_data_ptr();
  const float* offsets = bias ? bias->const_data_ptr<float>() : nullptr;  // padded to blocks
  auto* to = (uint16_t*)y.data_ptr();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t row = 0; row < rows; row += kMaxRows)
        kMultiply[std::min(kMaxRows, rows - row)](
            from + row * inputs, inputs, weights + b * kBlock * inputs,
            offsets ? offsets + b * kBlock : nullptr, to + row * outputs + b * kBlock, outputs,
            outputs - b * kBlock);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark_cpu, m) {
  m.def("pack(Tensor weight) -> Tensor");
  m.def("linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor");
}
TORCH_LIBRARY_IMPL(dspark_cpu, CPU, m) {
  m.impl("pack", pack);
  m.impl("linear", linear);
}
#endif
