// HiP attention on CPU: one call runs the pruning stages that are due for each query block, and
// attends to what is selected. Work is cut in a way that depends on a query block alone, so neither
// other requests nor the number of threads change a result.

#include <memory>

#include "scores.h"

namespace hip {
namespace {

constexpr int kFew = 8;          // queries of a block up to which it counts as decode
constexpr int kSplit = 512;      // keys of one work item in decode
constexpr int kScoreTile = 32;   // chunks of one work item

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t n) { return Floats(new float[n]); }

int columns_of(int n) { return (n + 15) / 16 * 16; }

// Which queries of a block take part in a stage's scores.
int scored_queries(const Call& c, int m, int stage) {
  return (c.length[m] + c.query_step[stage] - 1) / c.query_step[stage];
}

const void* query_at(const Call& c, const void* base, int64_t token, int head, int64_t stride) {
  const int64_t element = token * stride + static_cast<int64_t>(head) * c.head_size;
  return static_cast<const char*>(base) + element * (c.dtype == kFloat32 ? 4 : 2);
}

template <class T>
class Layer {
 public:
  explicit Layer(const Call& c) : c_(c), survivors_(c.num_blocks), few_(c.num_blocks) {}

  void run() {
    load_queries();
    for (int s = 0; s < c_.num_stages; ++s) prune(s);
    attend();
  }

 private:
  bool is_few(int m) const { return c_.length[m] <= kFew; }

  const T* query(int m, int t, int head) const {
    return static_cast<const T*>(query_at(c_, c_.query, c_.start[m] + t, head, c_.query_stride));
  }

  T* out(int m, int t, int head) const {
    return const_cast<T*>(static_cast<const T*>(
        query_at(c_, c_.out, c_.start[m] + t, head, c_.out_stride)));
  }

  // Scaled queries of the blocks with few of them, [tokens, heads, head_size].
  void load_queries() {
    const int64_t row = static_cast<int64_t>(c_.heads) * c_.head_size;
#pragma omp parallel for schedule(dynamic)
    for (int m = 0; m < c_.num_blocks; ++m) {
      if (!is_few(m)) continue;
      few_[m] = floats(c_.length[m] * row);
      for (int t = 0; t < c_.length[m]; ++t)
        for (int h = 0; h < c_.heads; ++h)
          load_row<T>(query(m, t, h), c_.head_size, c_.scale,
                      few_[m].get() + t * row + h * c_.head_size);
    }
  }

  int overlap(int m) const { return c_.kept_row[m] >= 0 ? c_.overlap : 0; }

  int32_t* kept(int m, int stage) const {
    return c_.kept[stage] + static_cast<int64_t>(c_.kept_row[m]) * c_.keep_chunks[stage];
  }

  bool is_due(int m, int stage) const { return c_.level[m] >= 0 && c_.level[m] <= stage; }

  // The chunks that a stage starts from.
  std::vector<int32_t> candidates(int m, int stage, int32_t end) const {
    std::vector<int32_t> found;
    if (stage == 0) {
      for (int32_t x = c_.sink; x < end; x += c_.chunk[0]) found.push_back(x);
      return found;
    }
    const int32_t *before = survivors_[m].data(), *last = before + survivors_[m].size();
    if (c_.level[m] == stage) {
      before = kept(m, stage - 1);
      last = before + c_.keep_chunks[stage - 1];
    }
    for (; before < last && *before != kNone; ++before)
      for (int32_t x = *before; x < std::min(*before + c_.chunk[stage - 1], end);
           x += c_.chunk[stage])
        found.push_back(x);
    return found;
  }

  struct Due {
    int m;
    int32_t end;
    std::vector<int32_t> chunks;
    Floats scores, columns;
    int width;
  };

  void prune(int stage) {
    std::vector<Due> due;
    for (int m = 0; m < c_.num_blocks; ++m)
      if (is_due(m, stage)) due.push_back({m, candidates_end(c_, m, overlap(m)), {}, {}, {}, 0});
    const int n = due.size();
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < n; ++i) prepare(due[i], stage);
    std::vector<std::pair<int, int>> tiles;
    for (int i = 0; i < n; ++i)
      if (due[i].scores)
        for (int j = 0; j < static_cast<int>(due[i].chunks.size()); j += kScoreTile)
          tiles.push_back({i, j});
    const int num_tiles = tiles.size();
#pragma omp parallel
    {
      Floats scratch;
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_tiles; ++i) score(due[tiles[i].first], stage, tiles[i].second, scratch);
    }
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < n; ++i) keep(due[i], stage);
  }

  void prepare(Due& x, int stage) {
    x.chunks = candidates(x.m, stage, x.end);
    if (static_cast<int>(x.chunks.size()) <= c_.keep_chunks[stage]) return;
    x.scores = floats(x.chunks.size());
    if (!is_few(x.m)) load_columns(x, stage);
  }

  // Scored queries as columns, [heads, head_size, width]; the last one is repeated as padding.
  void load_columns(Due& x, int stage) {
    const int d = c_.head_size, n = scored_queries(c_, x.m, stage);
    x.width = columns_of(n);
    x.columns = floats(static_cast<int64_t>(c_.heads) * d * x.width);
    std::vector<float> row(d);
    for (int h = 0; h < c_.heads; ++h)
      for (int j = 0; j < x.width; ++j) {
        load_row<T>(query(x.m, std::min(j, n - 1) * c_.query_step[stage], h), d, c_.scale,
                    row.data());
        for (int i = 0; i < d; ++i)
          x.columns[(static_cast<int64_t>(h) * d + i) * x.width + j] = row[i];
      }
  }

  void score(Due& x, int stage, int from, Floats& scratch) {
    const int n = std::min<int>(kScoreTile, x.chunks.size() - from);
    if (is_few(x.m)) {
      const auto score_chunks = is_read_whole(c_, stage) ? score_whole<T> : score_few<T>;
      score_chunks(c_, x.m, stage, x.end, x.chunks.data() + from, n, few_[x.m].get(),
                   x.scores.get() + from);
      return;
    }
    if (!scratch) scratch = floats(kTile * (c_.head_size + 1));
    score_many<T>(c_, x.m, stage, x.end, x.chunks.data() + from, n, x.columns.get(), x.width,
                  scratch.get(), x.scores.get() + from);
  }

  // Keeps the best chunks; of equal scores the earlier chunk wins.
  void keep(Due& x, int stage) {
    const int count = c_.keep_chunks[stage];
    if (x.scores) {
      std::vector<int32_t> order(x.chunks.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = i;
      const float* s = x.scores.get();
      std::nth_element(order.begin(), order.begin() + count, order.end(),
                       [s](int a, int b) { return s[a] != s[b] ? s[a] > s[b] : a < b; });
      order.resize(count);
      std::sort(order.begin(), order.end());
      for (int i = 0; i < count; ++i) order[i] = x.chunks[order[i]];
      x.chunks = std::move(order);
    }
    survivors_[x.m] = std::move(x.chunks);
    if (c_.kept_row[x.m] < 0) return;
    int32_t* to = kept(x.m, stage);
    std::fill(std::copy(survivors_[x.m].begin(), survivors_[x.m].end(), to), to + count, kNone);
  }

  Keys keys(int m) const {
    const int last = c_.num_stages - 1;
    if (c_.level[m] < 0 || is_due(m, last))
      return Keys(c_, m, survivors_[m].data(), survivors_[m].size());
    return Keys(c_, m, kept(m, last), c_.keep_chunks[last]);
  }

  struct Item {
    int m, kv_head;
    int32_t from;
  };

  void attend() {
    std::vector<Keys> all;
    std::vector<Item> items;
    std::vector<int64_t> partial_at(c_.num_blocks);
    int64_t partial_size = 0;
    int most = 0;
    all.reserve(c_.num_blocks);
    for (int m = 0; m < c_.num_blocks; ++m) {
      all.push_back(keys(m));
      const int split = is_few(m) ? kSplit : INT32_MAX;
      partial_at[m] = partial_size;
      if (is_few(m)) {
        partial_size += splits(all[m]) * state_size(m);
      } else {
        most = std::max(most, c_.length[m]);
      }
      for (int64_t from = 0; from < all[m].total(); from += split)
        for (int h = 0; h < c_.kv_heads; ++h)
          items.push_back({m, h, static_cast<int32_t>(from)});
    }
    const Floats partial = floats(partial_size);
    const int num_items = items.size(), num_blocks = c_.num_blocks;
    const int group = c_.heads / c_.kv_heads;
#pragma omp parallel
    {
      const int columns = columns_of(most * group);
      const Floats scratch =
          most ? floats(scratch_size(c_.head_size, columns) + c_.head_size * columns) : nullptr;
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_items; ++i) {
        const Item& x = items[i];
        if (is_few(x.m)) {
          attend_split(x, all[x.m], partial.get() + partial_at[x.m]);
        } else {
          attend_block(x, all[x.m], scratch.get());
        }
      }
#pragma omp for schedule(dynamic)
      for (int m = 0; m < num_blocks; ++m)
        if (is_few(m)) merge(m, splits(all[m]), partial.get() + partial_at[m]);
    }
  }

  static int splits(const Keys& keys) { return (keys.total() + kSplit - 1) / kSplit; }

  // States of all queries and heads of a block in one split: [kv heads, queries, group, d + 2].
  int64_t state_size(int m) const {
    return static_cast<int64_t>(c_.length[m]) * c_.heads * (c_.head_size + 2);
  }

  void attend_split(const Item& x, const Keys& keys, float* partial) {
    const int size = c_.head_size + 2;
    const int64_t states = state_size(x.m) / c_.kv_heads;
    float* state = partial + x.from / kSplit * state_size(x.m) + x.kv_head * states;
    for (float* p = state; p < state + states; p += size) {
      std::fill(p, p + size, 0.0f);
      p[c_.head_size] = -INFINITY;
    }
    attend_few<T>(c_, x.m, x.kv_head, keys, x.from, std::min(x.from + kSplit, keys.total()),
                  few_[x.m].get(), state);
  }

  // Combines the splits by their log-sum-exp, in order.
  void merge(int m, int num_splits, const float* partial) {
    const int d = c_.head_size, group = c_.heads / c_.kv_heads;
    std::vector<float> total(d);
    for (int h = 0; h < c_.heads; ++h)
      for (int t = 0; t < c_.length[m]; ++t) {
        const int64_t at =
            ((static_cast<int64_t>(h / group) * c_.length[m] + t) * group + h % group) * (d + 2);
        float best = -INFINITY, weight = 0.0f;
        for (int s = 0; s < num_splits; ++s)
          best = std::max(best, partial[s * state_size(m) + at + d]);
        std::fill(total.begin(), total.end(), 0.0f);
        for (int s = 0; s < num_splits; ++s) {
          const float* state = partial + s * state_size(m) + at;
          // A query sees nothing of a split that lies behind it.
          if (state[d + 1] == 0.0f) continue;
          const float factor = std::exp(state[d] - best);
          weight += factor * state[d + 1];
          for (int i = 0; i < d; i += 8)
            store(total.data() + i, load(total.data() + i) + factor * load(state + i));
        }
        store_row<T>(total.data(), d, 1.0f / weight, out(m, t, h));
      }
  }

  void attend_block(const Item& x, const Keys& keys, float* scratch) {
    const int d = c_.head_size, group = c_.heads / c_.kv_heads, n = c_.length[x.m];
    const int columns = columns_of(n * group);
    float* queries = scratch;
    float* rest = scratch + d * columns;
    std::vector<float> row(d);
    for (int j = 0; j < columns; ++j) {
      if (j < n * group) {
        load_row<T>(query(x.m, j % n, x.kv_head * group + j / n), d, c_.scale, row.data());
      } else {
        std::fill(row.begin(), row.end(), 0.0f);
      }
      for (int i = 0; i < d; ++i) queries[i * columns + j] = row[i];
    }
    attend_many<T>(c_, x.m, x.kv_head, keys, queries, columns, rest);
    for (int j = 0; j < n * group; ++j) {
      for (int i = 0; i < d; ++i) row[i] = rest[i * columns + j];
      store_row<T>(row.data(), d, 1.0f, out(x.m, j % n, x.kv_head * group + j / n));
    }
  }

  const Call& c_;
  // What the last stage that ran has kept, of each query block.
  std::vector<std::vector<int32_t>> survivors_;
  std::vector<Floats> few_;
};

}  // namespace
}  // namespace hip

extern "C" int hip_call_size() { return sizeof(hip::Call); }

extern "C" void hip_attention(const hip::Call* call) {
  switch (call->dtype) {
    case hip::kBFloat16: hip::Layer<hip::BFloat16>(*call).run(); break;
    case hip::kFloat16: hip::Layer<_Float16>(*call).run(); break;
    default: hip::Layer<float>(*call).run();
  }
}
