// Attention over the pages of the KV cache, without copying them.
//
// A pass's keys and values are stored first, then every query attends to its own sequence's pages,
// 64 tokens at a time, with a running softmax. Blocks of 64 start at multiples of 64 and a query's
// sums are made in their order, so that its result does not depend on what else is in the pass.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "block_products.h"

namespace {

constexpr int64_t kRows = 32;    // queries of one key-value head that go through it together
constexpr float kNever = -std::numeric_limits<float>::infinity();

// ------------------------------------------------------------------------ one layer's attention

struct Shape {
  int64_t page_size, kv_heads, group, depth, value_depth, table_width, window;
  bool causal;
  float scale;

  int64_t output_width() const { return (value_depth + 63) / 64 * 64; }
};

// One sequence's queries [begin, end) of every key-value head in [head, head + heads); a row is one
// query head of one token, and a key-value head has `group` rows a token.
struct Task {
  int32_t sequence, head, heads, begin, end;
};

// What a thread computes in; kept from pass to pass.
template <typename M>
struct Scratch {
  std::vector<typename M::Packed> query, keys, values, weights;
  std::vector<float> scores, output, best, total;

  void fit(const Shape& s) {
    const auto grow = [](auto& part, int64_t size) {
      if (int64_t(part.size()) < size) part.resize(size);
    };
    grow(query, s.kv_heads * kRows * s.depth);
    grow(keys, s.depth * kTokens);
    grow(values, s.output_width() * kTokens);
    grow(weights, s.kv_heads * kRows * kTokens);
    grow(scores, s.kv_heads * kRows * kTokens);
    grow(output, s.kv_heads * kRows * s.output_width());
    grow(best, s.kv_heads * kRows);
    grow(total, s.kv_heads * kRows);
  }
};

template <typename M>
struct Pass {
  using T = typename M::Element;
  Shape s;
  const T *query, *keys, *values;  // query [N, heads, depth], the others by slot
  int64_t query_token, query_head;
  const int32_t *tables, *starts, *contexts;
  T* output;  // [N, heads, value_depth]

  // One block's rows of a key-value head; those of the heads behind it follow.
  struct Rows {
    const T *keys[kTokens], *values[kTokens];
    int64_t count = 0;
  };

  // The block that starts with token `begin`, as far as `end`.
  void find_rows(const int32_t* pages, int64_t head, int64_t begin, int64_t end, Rows& rows) const {
    rows.count = std::clamp<int64_t>(end - begin, 0, kTokens);
    for (int64_t t = 0; t < rows.count;) {
      const int64_t page = (begin + t) / s.page_size, offset = (begin + t) % s.page_size;
      int64_t slot = int64_t(pages[page]) * s.page_size + offset;
      const int64_t stop = std::min(rows.count, t + s.page_size - offset);
      for (; t < stop; ++t, ++slot) {
        rows.keys[t] = keys + (slot * s.kv_heads + head) * s.depth;
        rows.values[t] = values + (slot * s.kv_heads + head) * s.value_depth;
      }
    }
  }

  // Asks for the h-th part of 16 tokens from t on, all heads of them: while one is computed with,
  // another one comes.
  static void prefetch(const T* const* rows, int64_t count, int64_t t, int64_t h, int64_t heads,
                       int64_t depth) {
    const int64_t end = std::min(count, t + (h + 1) * 16 / heads);
    for (int64_t i = t + h * 16 / heads; i < end; ++i)
      for (int64_t d = 0; d < heads * depth; d += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(rows[i] + d);
  }

  // Scores of one head's rows become weights; running sums and outputs shrink to the new highest.
  void soften(Scratch<M>& scratch, const Task& task, int64_t head, int64_t first_position,
              int64_t begin, int64_t count) const {
    const int64_t width = s.output_width();
    for (int64_t r = 0; r < task.end - task.begin; ++r) {
      float* score = scratch.scores.data() + (head * kRows + r) * kTokens;
      auto* weight = scratch.weights.data() + (head * kRows + r) * kTokens;
      float& best = scratch.best[head * kRows + r];
      float& total = scratch.total[head * kRows + r];
      const int64_t position = first_position + (task.begin + r) / s.group;
      const auto end = int32_t(s.causal ? std::min(count, position + 1 - begin) : count);
      const auto from =
          int32_t(s.window > 0 ? std::max<int64_t>(0, position - s.window + 1 - begin) : 0);
      float lanes[16];  // one highest score each: compilers do not split that reduction themselves
      std::fill(lanes, lanes + 16, best);
      for (int32_t t = 0; t < kTokens; t += 16)
        for (int32_t j = 0; j < 16; ++j) {
          const float x = t + j >= from && t + j < end ? score[t + j] * s.scale : kNever;
          score[t + j] = x;
          lanes[j] = lanes[j] > x ? lanes[j] : x;
        }
      const float highest = *std::max_element(lanes, lanes + 16);
      if (highest == kNever) {
        std::fill(weight, weight + kTokens, typename M::Packed(0));
        continue;
      }
      const float shrink = best == highest ? 1.0f : std::exp(best - highest);
      float sum = 0;
      for (int64_t t = 0; t < kTokens; ++t) {
        score[t] = exp_negative(score[t] - highest);
        sum += score[t];
      }
      M::narrow(score, weight);
      total = total * shrink + sum;
      best = highest;
      if (shrink != 1.0f) {
        float* output = scratch.output.data() + (head * kRows + r) * width;
        for (int64_t d = 0; d < width; ++d) output[d] *= shrink;
      }
    }
  }

  // Scores of a block for all rows of all heads.
  void score(Scratch<M>& scratch, int64_t heads, int64_t rows, const Rows& block,
             const Rows& next) const {
    if constexpr (M::kFewRows > 0)
      if (rows <= M::kFewRows) {
        constexpr decltype(&M::template score<1>) kScore[] = {
            M::template score<1>, M::template score<2>, M::template score<3>, M::template score<4>};
        for (int64_t t = 0; t < block.count; t += 16)
          for (int64_t h = 0; h < heads; ++h) {
            prefetch(next.keys, next.count, t, h, heads, s.depth);
            kScore[rows - 1](block.keys, t, block.count, h * s.depth, s.depth,
                             scratch.query.data() + h * kRows * s.depth,
                             scratch.scores.data() + h * kRows * kTokens);
          }
        return;
      }
    for (int64_t h = 0; h < heads; ++h) {
      float* scores = scratch.scores.data() + h * kRows * kTokens;
      M::pack_keys(block.keys, block.count, h * s.depth, s.depth, scratch.keys.data());
      std::fill(scores, scores + rows * kTokens, 0.0f);
      multiply<M>(scratch.query.data() + h * kRows * s.depth, s.depth, scratch.keys.data(), s.depth,
                  scores, kTokens, rows);
    }
  }

  // Adds a block's values, weighed, to the outputs.
  void weigh(Scratch<M>& scratch, int64_t heads, int64_t rows, const Rows& block,
             const Rows& next) const {
    const int64_t width = s.output_width();
    if constexpr (M::kFewRows > 0)
      if (rows <= M::kFewRows || !M::kPacksValues) {
        constexpr decltype(&M::template weigh<1>) kWeigh[] = {
            M::template weigh<1>, M::template weigh<2>, M::template weigh<3>, M::template weigh<4>};
        for (int64_t t = 0; t < block.count; t += 16)
          for (int64_t h = 0; h < heads; ++h) {
            prefetch(next.values, next.count, t, h, heads, s.value_depth);
            for (int64_t r = 0; r < rows; r += M::kFewRows)
              kWeigh[std::min(M::kFewRows, rows - r) - 1](
                  block.values, t, block.count, h * s.value_depth, s.value_depth,
                  scratch.weights.data() + (h * kRows + r) * kTokens,
                  scratch.output.data() + (h * kRows + r) * width, width);
          }
        return;
      }
    if constexpr (M::kPacksValues) {
      const int64_t tokens = (block.count + M::kPack - 1) / M::kPack * M::kPack;
      for (int64_t h = 0; h < heads; ++h) {
        M::pack_values(block.values, block.count, h * s.value_depth, s.value_depth,
                       scratch.values.data());
        for (int64_t d = 0; d < width; d += 64)
          multiply<M>(scratch.weights.data() + h * kRows * kTokens, kTokens,
                      scratch.values.data() + d * kTokens, tokens,
                      scratch.output.data() + h * kRows * width + d, width, rows);
      }
    }
  }

  void run(const Task& task, Scratch<M>& scratch) const {
    const int64_t rows = task.end - task.begin, width = s.output_width();
    const int64_t all_heads = s.kv_heads * s.group, start = starts[task.sequence];
    const int64_t first_position = contexts[task.sequence] - (starts[task.sequence + 1] - start);
    const int32_t* pages = tables + task.sequence * s.table_width;
    for (int64_t h = 0; h < task.heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = task.begin + r;
        const T* from = query + (start + row / s.group) * query_token +
                        ((task.head + h) * s.group + row % s.group) * query_head;
        std::copy(from, from + s.depth, scratch.query.data() + (h * kRows + r) * s.depth);
        scratch.best[h * kRows + r] = kNever;
        scratch.total[h * kRows + r] = 0;
        float* output = scratch.output.data() + (h * kRows + r) * width;
        std::fill(output, output + width, 0.0f);
      }
    const int64_t first = first_position + task.begin / s.group;
    const int64_t last = s.causal ? first_position + (task.end - 1) / s.group
                                  : int64_t(contexts[task.sequence]) - 1;
    const int64_t seen = s.window > 0 ? std::max<int64_t>(0, first - s.window + 1) : 0;
    Rows blocks[2], *block = &blocks[0], *next = &blocks[1];
    int64_t begin = seen / kTokens * kTokens;
    find_rows(pages, task.head, begin, last + 1, *block);
    for (; begin <= last; begin += kTokens, std::swap(block, next)) {
      find_rows(pages, task.head, begin + kTokens, last + 1, *next);
      score(scratch, task.heads, rows, *block, *next);
      for (int64_t h = 0; h < task.heads; ++h)
        soften(scratch, task, h, first_position, begin, block->count);
      weigh(scratch, task.heads, rows, *block, *next);
    }
    for (int64_t h = 0; h < task.heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = task.begin + r;
        T* to = output + ((start + row / s.group) * all_heads + (task.head + h) * s.group +
                          row % s.group) * s.value_depth;
        const float* from = scratch.output.data() + (h * kRows + r) * width;
        const float inverse = 1.0f / scratch.total[h * kRows + r];
        for (int64_t d = 0; d < s.value_depth; ++d) to[d] = T(from[d] * inverse);
      }
  }
};

// Heads of a sequence lie side by side in the cache and are read together where there are sequences
// enough for all threads; long queries, whose work is arithmetic, are taken head by head.
std::vector<Task> share_out(const Shape& s, const int32_t* starts, int64_t batch, int threads) {
  int64_t heads = s.kv_heads;
  while (heads > 1 && (s.kv_heads % heads || batch * (s.kv_heads / heads) < 2 * threads)) --heads;
  std::vector<Task> tasks;
  for (int32_t b = 0; b < batch; ++b) {
    const int64_t rows = (starts[b + 1] - starts[b]) * s.group;
    const int64_t together = rows <= kRows ? heads : 1;
    for (int64_t h = 0; h < s.kv_heads; h += together)
      for (int64_t r = 0; r < rows; r += kRows)
        tasks.push_back({b, int32_t(h), int32_t(together), int32_t(r),
                         int32_t(std::min(rows, r + kRows))});
  }
  return tasks;
}

template <typename M>
void attend_pages(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts,
                  const Shape& s, at::Tensor& output) {
  using T = typename M::Element;
  const Pass<M> pass{s,
                     query.const_data_ptr<T>(),
                     keys.const_data_ptr<T>(),
                     values.const_data_ptr<T>(),
                     query.stride(0),
                     query.stride(1),
                     tables.const_data_ptr<int32_t>(),
                     starts.const_data_ptr<int32_t>(),
                     contexts.const_data_ptr<int32_t>(),
                     output.data_ptr<T>()};
  const auto tasks = share_out(s, pass.starts, contexts.numel(), at::get_num_threads());
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), tasks.size());
  std::atomic<size_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch<M> scratch;
    scratch.fit(s);
    for (; begin < end; ++begin) {
      for (size_t i; (i = next.fetch_add(1)) < tasks.size();) pass.run(tasks[i], scratch);
    }
  });
}

// from [N, heads, depth], any strides but the last; to: by slot.
void store(const at::Tensor& from, const at::Tensor& to, const at::Tensor& slots) {
  const int64_t heads = from.size(1), size = from.element_size(), row = from.size(2) * size;
  const auto* source = (const char*)from.const_data_ptr();
  auto* target = (char*)to.data_ptr();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < slots.numel(); ++n)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(target + (slot[n] * heads + h) * row,
                  source + (n * from.stride(0) + h * from.stride(1)) * size, row);
}

// -------------------------------------------------------------------------- a pass and its layers

// What all layers of a pass share; of the thread that runs it.
struct Layout {
  std::vector<at::Tensor> keys, values;
  at::Tensor slots, tables, starts, contexts;
};
thread_local Layout layout;

void begin_pass(at::TensorList keys, at::TensorList values, const at::Tensor& slots,
                const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts) {
  layout = {keys.vec(), values.vec(), slots, tables, starts, contexts};
}

void end_pass() { layout = {}; }

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  int64_t layer, bool stores, double scale, int64_t window, bool causal) {
  TORCH_CHECK(layer >= 0 && layer < int64_t(layout.keys.size()), "no pass has layer ", layer);
  const at::Tensor &keys = layout.keys[layer], &values = layout.values[layer];
  const Shape s{keys.size(1),  keys.size(2),           query.size(1) / keys.size(2),
                query.size(2), values.size(3),         layout.tables.size(1),
                window,        causal,                 static_cast<float>(scale)};
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1,
              "heads must be contiguous");
  TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "the cache holds ", keys.scalar_type());
  TORCH_CHECK(query.size(0) >= layout.slots.numel(), "the pass has more tokens");
  if (stores) {
    store(key, keys, layout.slots);
    store(value, values, layout.slots);
  }
  at::Tensor output = at::empty({query.size(0), query.size(1), s.value_depth}, query.options());
  // Rows that only fill up the shape belong to no sequence.
  output.narrow(0, layout.slots.numel(), query.size(0) - layout.slots.numel()).zero_();
  const auto run = [&]<typename M>() {
    attend_pages<M>(query, keys, values, layout.tables, layout.starts, layout.contexts, s, output);
  };
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16,
              "queries must be float32 or bfloat16");
  const bool is_float = query.scalar_type() == at::kFloat;
#ifdef __AVX512BF16__
  if (!is_float && s.depth % 32 == 0 && s.value_depth % 32 == 0) {
    run.template operator()<Bf16Machine>();
    return output;
  }
#endif
#ifdef DSPARK_TILES
  if (s.depth % 16 == 0 && s.value_depth % 16 == 0) {
    if (is_float)
      run.template operator()<TiledMachine<float>>();
    else
      run.template operator()<TiledMachine<at::BFloat16>>();
    return output;
  }
#endif
  if (is_float)
    run.template operator()<AnyMachine<float>>();
  else
    run.template operator()<AnyMachine<at::BFloat16>>();
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark_cpu, m) {
  m.def(
      "begin_pass(Tensor[] keys, Tensor[] values, Tensor slots, Tensor tables, Tensor starts, "
      "Tensor contexts) -> ()");
  m.def("end_pass() -> ()", end_pass);
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, int layer, bool stores, float scale, "
      "int window, bool causal) -> Tensor");
}
TORCH_LIBRARY_IMPL(dspark_cpu, CPU, m) {
  m.impl("begin_pass", begin_pass);
  m.impl("attend", attend);
}
