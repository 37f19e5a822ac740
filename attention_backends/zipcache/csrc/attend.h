// Attending to a batch, and the scores of its probes.
#pragma once

#include <vector>

#include "memory.h"

namespace zipcache {

constexpr int kFew = 4;        // queries of a request up to which it counts as decode
constexpr int kSplit = 512;    // keys of one work item in decode
constexpr int kColumns = 192;  // queries times heads of one work item in prefill, about

inline int columns_of(int n) { return (n + 15) / 16 * 16; }

template <class T>
class Attention : Memory<T> {
  ZIPCACHE_USING_MEMORY(T);
  using Memory<T>::open;

 public:
  void attend(const Batch& b) {
    std::vector<Few> few;
    std::vector<FewItem> few_items;
    std::vector<ManyItem> many_items;
    const int group = b.heads / l_.kv_heads, tile = std::min(std::max(kColumns / group, 16), 64);
    for (int m = 0; m < b.num_rows; ++m) {
      if (b.length[m] > kFew) {
        for (int t = 0; t < b.length[m]; t += tile)
          for (int h = 0; h < l_.kv_heads; ++h)
            many_items.push_back({m, h, t, std::min(tile, b.length[m] - t)});
        continue;
      }
      for (int t = 0; t < b.length[m]; ++t) {
        few.push_back({m, t, Floats()});
        // The last split is the batch's own keys.
        for (int s = 0; s < splits(b, m); ++s)
          for (int h = 0; h < l_.kv_heads; ++h)
            few_items.push_back({static_cast<int>(few.size()) - 1, s, h});
      }
    }
    for (Few& x : few)
      x.states = floats(static_cast<int64_t>(splits(b, x.row)) * b.heads * (d_ + 2));
    const int num_few = few.size(), num_items = few_items.size(), num_many = many_items.size();
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_items; ++i)
        attend_split(b, few[few_items[i].few], few_items[i].split, few_items[i].kv_head);
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_few; ++i) merge(b, few[i]);
      Floats scratch;
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_many; ++i) {
        const int columns = columns_of(tile * group);
        if (!scratch) scratch = floats(Columns::size(d_, columns) + (columns + 2) * d_);
        attend_tile(b, many_items[i], scratch.get());
      }
    }
    score_probes(b);
  }

 private:
  struct Few {
    int row, token;
    Floats states;  // [splits, heads, head_size + 2]
  };
  struct FewItem {
    int few, split, kv_head;
  };
  struct ManyItem {
    int row, kv_head, first, count;
  };

  void load_query(const Batch& b, int m, int t, int head, float* out) const {
    const T* q = static_cast<const T*>(b.query) + (b.start[m] + t) * b.query_stride + head * d_;
    for (int i = 0; i < d_; i += 8) store(out + i, load(q + i) * b.scale);
  }

  void store_out(const Batch& b, int m, int t, int head, const float* x, float by) const {
    T* to = static_cast<T*>(b.out) + (b.start[m] + t) * b.out_stride + head * d_;
    for (int i = 0; i < d_; i += 8) store(to + i, load(x + i) * by);
  }

  float* lse(const Batch& b, int m, int t, int head) const {
    return b.lse + static_cast<int64_t>(b.start[m] + t) * b.heads + head;
  }

  // ---- Decode -----------------------------------------------------------------------------------

  int blocks_of_split() const { return std::max(1, kSplit / n_); }

  int splits(const Batch& b, int m) const {
    const int blocks = (b.position[m] + n_ - 1) / n_, each = blocks_of_split();
    return (blocks + each - 1) / each + 1;
  }

  void attend_split(const Batch& b, const Few& x, int split, int h) const {
    const int group = b.heads / l_.kv_heads, size = d_ + 2;
    float q[kGroup][kMaxHead];
    Channels padded[kGroup];
    for (int g0 = 0; g0 < group; g0 += kGroup) {
      const int count = std::min(kGroup, group - g0);
      State states[kGroup];
      const float* queries[kGroup];
      for (int g = 0; g < count; ++g) {
        const int head = h * group + g0 + g;
        states[g] = {x.states.get() + (static_cast<int64_t>(split) * b.heads + head) * size, d_};
        states[g].clear();
        load_query(b, x.row, x.token, head, q[g]);
        queries[g] = q[g];
        pad_quarters(f_, q[g], padded[g]);
      }
      switch (count) {
        case 1: attend_keys<1>(b, x, split, h, queries, padded, states); break;
        case 2: attend_keys<2>(b, x, split, h, queries, padded, states); break;
        case 3: attend_keys<3>(b, x, split, h, queries, padded, states); break;
        default: attend_keys<4>(b, x, split, h, queries, padded, states);
      }
    }
  }

  template <int G>
  void attend_keys(const Batch& b, const Few& x, int split, int h, const float* const* q,
                   const Channels* padded, const State* states) const {
    const int m = x.row, before = b.position[m], each = blocks_of_split();
    if (split == splits(b, m) - 1) {
      attend_rows<T, G>(q, key(b, m, 0, h), b.key_stride, value(b, m, 0, h), b.value_stride,
                        x.token + 1, d_, states);
      return;
    }
    for (int i = split * each; i < (split + 1) * each && i * n_ < before; ++i) {
      const int block = block_of(b, m, i), state = b.state[block];
      const int seen = std::min(n_, before - i * n_);
      if (state <= kRaw) {
        const T* rows = residual(kRaw - state, h);
        attend_rows<T, G>(q, rows, d_, rows + n_ * d_, d_, seen, d_, states);
      } else {
        attend_page<G>(open(b, block, h), seen, padded, states);
      }
    }
  }

  // Combines the splits by their log-sum-exp, in order.
  void merge(const Batch& b, const Few& x) const {
    const int size = d_ + 2, num_splits = splits(b, x.row);
    float total[kMaxHead];
    for (int head = 0; head < b.heads; ++head) {
      const auto part = [&](int s) {
        return x.states.get() + (static_cast<int64_t>(s) * b.heads + head) * size;
      };
      float best = -INFINITY, weight = 0.0f;
      for (int s = 0; s < num_splits; ++s) best = std::max(best, part(s)[d_]);
      std::fill(total, total + d_, 0.0f);
      for (int s = 0; s < num_splits; ++s) {
        const float by = std::exp(part(s)[d_] - best);
        weight += by * part(s)[d_ + 1];
        for (int i = 0; i < d_; i += 8) store(total + i, load(total + i) + load(part(s) + i) * by);
      }
      store_out(b, x.row, x.token, head, total, 1.0f / weight);
      *lse(b, x.row, x.token, head) = best + std::log(weight);
    }
  }

  // ---- Prefill ----------------------------------------------------------------------------------

  // Queries as columns, ordered head by head; what fills up the last vector is zero.
  void load_columns(const Batch& b, int m, int kv_head, const int32_t* tokens, int first, int count,
                    int columns, float* row, float* out) const {
    const int group = b.heads / l_.kv_heads;
    for (int j = 0; j < columns; ++j) {
      if (j < count * group) {
        const int t = j % count;
        load_query(b, m, tokens ? tokens[t] : first + t, kv_head * group + j / count, row);
      } else {
        std::fill(row, row + d_, 0.0f);
      }
      for (int i = 0; i < d_; ++i) out[static_cast<int64_t>(i) * columns + j] = row[i];
    }
  }

  // Calls use(position of the first key, number) for each tile of the cache's tokens [0, before).
  template <class Use>
  void for_cached(const Batch& b, int m, int h, bool with_values, const Columns& c, Use use) const {
    const int before = b.position[m];
    for (int i = 0; i * n_ < before; ++i) {
      const int block = block_of(b, m, i), have = std::min(n_, before - i * n_);
      for (int from = 0; from < have; from += kTile) {
        const int n = std::min(kTile, have - from);
        read_block(b, block, h, from, n, with_values, c);
        use(i * n_ + from, n);
      }
    }
  }

  void read_block(const Batch& b, int block, int h, int from, int n, bool with_values,
                  const Columns& c) const {
    const int state = b.state[block];
    if (state <= kRaw) {
      const T* rows = residual(kRaw - state, h);
      read_rows(rows + from * d_, d_, n, d_, c.keys);
      if (with_values) read_rows(rows + (n_ + from) * d_, d_, n, d_, c.values);
      return;
    }
    const Page page = open(b, block, h);
    read_page(page, false, from, n, c.keys);
    if (with_values) read_page(page, true, from, n, c.values);
  }

  void attend_tile(const Batch& b, const ManyItem& x, float* scratch) const {
    const int group = b.heads / l_.kv_heads, columns = columns_of(x.count * group);
    float *row = scratch, *queries = row + d_;
    const Columns c(queries + static_cast<int64_t>(columns) * d_, d_, columns);
    load_columns(b, x.row, x.kv_head, nullptr, x.first, x.count, columns, row, queries);
    for_cached(b, x.row, x.kv_head, true, c, [&](int, int n) {
      c.score(queries, n);
      c.fold(n);
    });
    for (int from = 0; from < x.first + x.count; from += kTile) {
      const int n = std::min(kTile, x.first + x.count - from);
      read_rows(key(b, x.row, from, x.kv_head), b.key_stride, n, d_, c.keys);
      read_rows(value(b, x.row, from, x.kv_head), b.value_stride, n, d_, c.values);
      c.score(queries, n);
      // A query sees nothing behind it.
      for (int j = std::max(0, x.first + 1 - from); j < n; ++j)
        for (int t = 0; t < std::min(from + j - x.first, x.count); ++t)
          for (int g = 0; g < group; ++g) c.scores[j * columns + g * x.count + t] = -INFINITY;
      c.fold(n);
    }
    for (int j = 0; j < x.count * group; ++j) {
      const int t = x.first + j % x.count, head = x.kv_head * group + j / x.count;
      for (int i = 0; i < d_; ++i) row[i] = c.acc[static_cast<int64_t>(i) * columns + j];
      store_out(b, x.row, t, head, row, 1.0f / c.weight[j]);
      *lse(b, x.row, t, head) = c.maximum[j] + std::log(c.weight[j]);
    }
  }

  // ---- Probes -----------------------------------------------------------------------------------

  struct Probed {
    int row, kv_head, columns;
    Floats queries, lse;  // [head_size, columns], [columns]
  };

  void score_probes(const Batch& b) const {
    std::vector<Probed> all;
    for (int m = 0; m < b.num_rows; ++m)
      if (b.probe_start[m] < b.probe_start[m + 1])
        for (int h = 0; h < l_.kv_heads; ++h) all.push_back({m, h, 0, Floats(), Floats()});
    struct Item {
      int probed, index;
    };
    std::vector<Item> items;
    for (int i = 0; i < static_cast<int>(all.size()); ++i) {
      const int m = all[i].row, end = b.position[m] + b.length[m];
      for (int k = b.score_from[m]; k * n_ < end; ++k)
        if (b.state[block_of(b, m, k)] != kSealed) items.push_back({i, k});
    }
    const int num_all = all.size(), num_items = items.size();
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_all; ++i) load_probes(b, all[i]);
#pragma omp for schedule(dynamic)
      for (int i = 0; i < num_items; ++i) score_block(b, all[items[i].probed], items[i].index);
    }
  }

  void load_probes(const Batch& b, Probed& x) const {
    const int group = b.heads / l_.kv_heads, m = x.row;
    const int32_t* probes = b.probe + b.probe_start[m];
    const int count = b.probe_start[m + 1] - b.probe_start[m];
    x.columns = columns_of(count * group);
    x.queries = floats(static_cast<int64_t>(x.columns) * d_);
    x.lse = floats(x.columns);
    float row[kMaxHead];
    load_columns(b, m, x.kv_head, probes, 0, count, x.columns, row, x.queries.get());
    for (int j = 0; j < x.columns; ++j)
      x.lse[j] = j < count * group
                     ? *lse(b, m, probes[j % count], x.kv_head * group + j / count)
                     : INFINITY;
  }

  // Adds the probes' attention to the tokens of one block to its sums.
  void score_block(const Batch& b, const Probed& x, int index) const {
    const int m = x.row, before = b.position[m], first = index * n_;
    const int end = std::min(n_, before + b.length[m] - first);
    const int cached = std::min(std::max(before - first, 0), end);
    const int block = block_of(b, m, index);
    const Floats scratch = floats(Columns::size(d_, 16));
    const Columns c(scratch.get(), d_, 16);
    float* out = sums(b.state[block], x.kv_head);
    if (b.reset[m]) std::fill(out, out + n_, 0.0f);
    for (int from = 0; from < end;) {
      const int n = std::min(kTile, (from < cached ? cached : end) - from);
      if (from < cached) {
        read_block(b, block, x.kv_head, from, n, false, c);
      } else {
        read_rows(key(b, m, first + from - before, x.kv_head), b.key_stride, n, d_, c.keys);
      }
      score_keys(b, x, c, first + from, n, out + from);
      from += n;
    }
  }

  // Adds the probes' attention to n keys from a position on.
  void score_keys(const Batch& b, const Probed& x, const Columns& c, int position, int n,
                  float* out) const {
    const int m = x.row, count = b.probe_start[m + 1] - b.probe_start[m];
    const int32_t* probes = b.probe + b.probe_start[m];
    const int group = b.heads / l_.kv_heads;
    for (int j = 0; j < x.columns; j += 16) {
      for (int i = 0; i < (n + 3) / 4 * 4; i += 4)
        hip::multiply_4x16<false>(c.keys + i * d_, d_, 1, x.queries.get() + j, x.columns, d_,
                                  c.scores + i * 16, 16);
      for (int i = 0; i < n; ++i) {
        float* s = c.scores + i * 16;
        for (int k = 0; k < 16; ++k) {
          const bool seen =
              j + k < count * group && b.position[m] + probes[(j + k) % count] >= position + i;
          s[k] = seen ? s[k] - x.lse[j + k] : -INFINITY;
        }
        v8 total = splat(0.0f);
        for (int k = 0; k < 16; k += 8) {
          const v8 y = load(s + k);
          total += y > -87.0f ? exp8(y) : splat(0.0f);
        }
        out[i] += hip::sum(total);
      }
    }
  }
};

}  // namespace zipcache
