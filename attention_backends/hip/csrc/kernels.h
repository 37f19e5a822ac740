// The work of one thread: attending to some keys.
#pragma once

#include <cmath>

#include "keys.h"
#include "vec.h"

namespace hip {

constexpr int kTile = 64;  // keys that are attended to at once
constexpr int kGroup = 4;  // query heads that share a pass over the keys
constexpr int kAhead = 8;  // keys between one that is used and one that is asked for

// ---- Few queries: decode, and verification of drafts -------------------------------------------

template <class T>
HIP_INLINE void prefetch(const T* row, int d) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int i = 0; i < static_cast<int>(d * sizeof(T)); i += 64) __builtin_prefetch(p + i);
}

// Scores of n rows, [G][kTile]. What is wanted afterwards is asked for meanwhile: what lies `next`
// elements behind each row, or else rows that follow.
template <class T, int G>
HIP_INLINE void dot_rows(const float* const* q, const T* const* rows, int n, int d, int64_t next,
                         float* scores) {
  for (int j = 0; j < n; ++j) {
    const T* k = rows[j];
    if (next) {
      prefetch(k + next, d);
    } else if (j + kAhead < n) {
      prefetch(rows[j + kAhead], d);
    }
    v8 acc[G][2];
    for (int g = 0; g < G; ++g) acc[g][0] = acc[g][1] = splat(0.0f);
    for (int i = 0; i < d; i += 16) {
      const v8 k0 = load(k + i), k1 = load(k + i + 8);
      for (int g = 0; g < G; ++g) {
        acc[g][0] += load(q[g] + i) * k0;
        acc[g][1] += load(q[g] + i + 8) * k1;
      }
    }
    for (int g = 0; g < G; ++g) scores[g * kTile + j] = sum(acc[g][0] + acc[g][1]);
  }
}

template <class T, int G>
HIP_INLINE void add_values(const float* p, const T* const* rows, int64_t offset, int n, int d,
                           float* const* acc) {
  for (int i = 0; i < d; i += 16) {
    v8 sum[G][2];
    for (int g = 0; g < G; ++g) sum[g][0] = load(acc[g] + i), sum[g][1] = load(acc[g] + i + 8);
    for (int j = 0; j < n; ++j) {
      const T* v = rows[j] + offset + i;
      const v8 v0 = load(v), v1 = load(v + 8);
      for (int g = 0; g < G; ++g) {
        const v8 w = splat(p[g * kTile + j]);
        sum[g][0] += w * v0;
        sum[g][1] += w * v1;
      }
    }
    for (int g = 0; g < G; ++g) store(acc[g] + i, sum[g][0]), store(acc[g] + i + 8, sum[g][1]);
  }
}

// Folds n keys into the running softmax of G query heads. A state is the accumulated values
// [head_size], then the running maximum and the sum of weights.
template <class T, int G>
HIP_INLINE void attend_tile(const float* const* q, const T* const* rows, int64_t value_offset,
                            int n, int d, float* const* states) {
  float scores[G * kTile];
  dot_rows<T, G>(q, rows, n, d, value_offset, scores);
  for (int g = 0; g < G; ++g) {
    float* s = scores + g * kTile;
    for (int j = n; j < (n + 7) / 8 * 8; ++j) s[j] = -INFINITY;
    float *state = states[g], &maximum = state[d], &weight = state[d + 1];
    v8 best = load(s);
    for (int j = 8; j < n; j += 8) best = max8(best, load(s + j));
    const float now = std::max(maximum, largest(best));
    const float fade = exp8(splat(maximum - now))[0];
    v8 total = splat(0.0f);
    for (int j = 0; j < n; j += 8) {
      const v8 p = exp8(load(s + j) - now);
      store(s + j, p);
      total += p;
    }
    // Lanes beyond n hold e^-87.
    for (int j = n; j < (n + 7) / 8 * 8; ++j) total[j % 8] -= s[j];
    weight = weight * fade + sum(total);
    maximum = now;
    if (fade != 1.0f)
      for (int i = 0; i < d; i += 8) store(state + i, load(state + i) * fade);
  }
  add_values<T, G>(scores, rows, value_offset, n, d, states);
}

template <class T>
void attend_few(const Call& c, int m, int kv_head, const Keys& keys, int32_t from,
                           int32_t to, const float* queries, float* partial) {
  const Rows<T> row_of(c, m, kv_head);
  const int group = c.heads / c.kv_heads, d = c.head_size, size = d + 2;
  int32_t positions[kTile];
  const T* rows[kTile];
  for (int32_t at = from; at < to; at += kTile) {
    const int n = std::min<int32_t>(kTile, to - at);
    keys.positions(at, n, positions);
    for (int j = 0; j < n; ++j) rows[j] = row_of[positions[j]];
    for (int t = 0; t < c.length[m]; ++t) {
      // Positions are sorted: a query sees a prefix of them.
      const int seen =
          std::upper_bound(positions, positions + n, c.position[m] + t) - positions;
      if (seen == 0) continue;
      for (int h = 0; h < group; h += kGroup) {
        const float* q[kGroup];
        float* states[kGroup];
        const int heads = std::min(kGroup, group - h);
        for (int g = 0; g < heads; ++g) {
          q[g] = queries + (static_cast<int64_t>(t) * c.heads + kv_head * group + h + g) * d;
          states[g] = partial + (static_cast<int64_t>(t) * group + h + g) * size;
        }
        switch (heads) {
          case 1: attend_tile<T, 1>(q, rows, c.value_offset, seen, d, states); break;
          case 2: attend_tile<T, 2>(q, rows, c.value_offset, seen, d, states); break;
          case 3: attend_tile<T, 3>(q, rows, c.value_offset, seen, d, states); break;
          default: attend_tile<T, 4>(q, rows, c.value_offset, seen, d, states);
        }
      }
    }
  }
}

// ---- Many queries: prefill ---------------------------------------------------------------------
// Queries are the columns: [head_size, columns], a multiple of 16 of them, padded with zeros.

template <class T>
HIP_INLINE void copy_rows(const T* const* rows, int64_t offset, int n, int d, float* out) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < d; i += 8) store(out + j * d + i, load(rows[j] + offset + i));
}

HIP_INLINE void multiply(const float* a, int64_t a_row, int64_t a_col, int rows, const float* b,
                         int columns, int depth, float* c, bool add) {
  for (int j = 0; j < columns; j += 16)
    for (int i = 0; i < rows; i += 4) {
      const float* left = a + i * a_row;
      float* to = c + static_cast<int64_t>(i) * columns + j;
      if (add) {
        multiply_4x16<true>(left, a_row, a_col, b + j, columns, depth, to, columns);
      } else {
        multiply_4x16<false>(left, a_row, a_col, b + j, columns, depth, to, columns);
      }
    }
}

// Running softmax over a tile's keys for all columns; scores [keys, columns] become weights.
HIP_INLINE void fold_weights(float* scores, int n, int columns, float* maximum, float* weight,
                             float* acc, int d) {
  for (int j = 0; j < columns; j += 8) {
    const v8 before = load(maximum + j);
    v8 now = before;
    for (int i = 0; i < n; ++i) now = max8(now, load(scores + i * columns + j));
    const v8 fade = exp8(before - now);
    v8 total = splat(0.0f);
    for (int i = 0; i < n; ++i) {
      const v8 p = exp8(load(scores + i * columns + j) - now);
      store(scores + i * columns + j, p);
      total += p;
    }
    store(weight + j, load(weight + j) * fade + total);
    store(maximum + j, now);
    for (int i = 0; i < d; ++i)
      store(acc + i * columns + j, load(acc + i * columns + j) * fade);
  }
}

// Scratch of one thread for many queries, in floats.
HIP_INLINE int64_t scratch_size(int d, int columns) {
  return 2LL * kTile * d + static_cast<int64_t>(kTile + d + 2) * columns;
}

// queries [head_size, columns], columns ordered head by head; result in acc [head_size, columns].
template <class T>
void attend_many(const Call& c, int m, int kv_head, const Keys& keys,
                            const float* queries, int columns, float* scratch) {
  const Rows<T> row_of(c, m, kv_head);
  const int group = c.heads / c.kv_heads, d = c.head_size, length = c.length[m];
  float *acc = scratch, *maximum = acc + d * columns, *weight = maximum + columns;
  float *scores = weight + columns, *k = scores + kTile * columns, *v = k + kTile * d;
  std::fill(acc, maximum, 0.0f);
  std::fill(maximum, weight, -INFINITY);
  std::fill(weight, scores, 0.0f);
  int32_t positions[kTile];
  const T* rows[kTile];
  for (int32_t at = 0; at < keys.total(); at += kTile) {
    const int n = std::min<int32_t>(kTile, keys.total() - at), padded = (n + 3) / 4 * 4;
    keys.positions(at, n, positions);
    for (int j = 0; j < n; ++j) rows[j] = row_of[positions[j]];
    copy_rows<T>(rows, 0, n, d, k);
    copy_rows<T>(rows, c.value_offset, n, d, v);
    multiply(k, d, 1, padded, queries, columns, d, scores, false);
    if (positions[n - 1] > c.position[m])
      for (int j = 0; j < n; ++j)
        for (int t = 0; t < std::min(positions[j] - c.position[m], length); ++t)
          for (int g = 0; g < group; ++g) scores[j * columns + g * length + t] = -INFINITY;
    fold_weights(scores, n, columns, maximum, weight, acc, d);
    multiply(v, 1, d, d, scores, columns, n, acc, true);
  }
  for (int j = 0; j < columns; j += 8) {
    const v8 inverse = 1.0f / load(weight + j);
    for (int i = 0; i < d; ++i) store(acc + i * columns + j, load(acc + i * columns + j) * inverse);
  }
}

template <class T>
HIP_INLINE void load_row(const T* from, int n, float scale, float* to) {
  for (int i = 0; i < n; i += 8) store(to + i, load(from + i) * scale);
}

template <class T>
HIP_INLINE void store_row(const float* from, int n, float scale, T* to) {
  for (int i = 0; i < n; i += 8) store(to + i, load(from + i) * scale);
}

}  // namespace hip
