// Prefill, and the scores of probes: tiles of keys against queries that are the columns
// [head_size, columns], a multiple of 16 of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "few.h"

namespace zipcache {

constexpr int kTile = 64;  // keys at once

// Reads tokens [from, from + n) of a page into rows of floats; eight more lie behind the last row.
inline void read_page(const Page& page, bool values, int from, int n, float* out) {
  const Format& f = page.f;
  const int p = f.padded(), q = f.quarter;
  const uint8_t* high = page.base + (values ? f.v_high() : f.k_high());
  const Low& low = values ? page.v : page.k;
  float a[kMaxHead + 32], b[kMaxHead + 32];
  page.channels(values ? f.v_scale() : f.k_min(), a);
  if (!values) page.channels(f.k_step(), b);
  int rank = 0;
  while (rank < low.count && low.tokens[rank] < from) ++rank;
  for (int t = from; t < from + n; ++t) {
    const bool has_low = rank < low.count && low.tokens[rank] == t;
    const float least = values ? static_cast<float>(page.halves(f.v_min())[t]) : 0.0f;
    const float step = values ? static_cast<float>(page.halves(f.v_step())[t]) : 0.0f;
    float* row = out + static_cast<int64_t>(t - from) * f.head;
    // A vector may reach into the next quarter, which is written after it.
    for (int r = 0; r < 4; ++r)
      for (int j = 0; j < p; j += 8) {
        const v8 above = 4.0f * codes_of(load_bytes(high + t * q + j), r);
        const v8 below = has_low ? codes_of(load_bytes(low.rows + rank * q + j), r) : splat(1.5f);
        const v8 c = above + below, x = load(a + r * p + j);
        store(row + r * q + j, values ? x * (least + step * c) : x + load(b + r * p + j) * c);
      }
    rank += has_low;
  }
}

template <class T>
void read_rows(const T* rows, int64_t stride, int n, int d, float* out) {
  for (int t = 0; t < n; ++t)
    for (int i = 0; i < d; i += 8) store(out + t * d + i, load(rows + t * stride + i));
}

// c (+)= a . b, where a(i, k) lies at i * a_row + k * a_col and b is [depth, columns].
inline void multiply(const float* a, int64_t a_row, int64_t a_col, int rows, const float* b,
                     int columns, int depth, float* c, bool add) {
  for (int j = 0; j < columns; j += 16)
    for (int i = 0; i < rows; i += 4) {
      float* to = c + static_cast<int64_t>(i) * columns + j;
      const float* left = a + i * a_row;
      if (add) {
        hip::multiply_4x16<true>(left, a_row, a_col, b + j, columns, depth, to, columns);
      } else {
        hip::multiply_4x16<false>(left, a_row, a_col, b + j, columns, depth, to, columns);
      }
    }
}

// The running softmax of all columns, and a tile's scratch.
struct Columns {
  int d, n;
  float *acc, *maximum, *weight, *scores, *keys, *values;

  static int64_t size(int d, int n) {
    return static_cast<int64_t>(d + 2 + kTile) * n + 2 * (kTile * d + 8);
  }

  Columns(float* scratch, int head, int columns) : d(head), n(columns) {
    acc = scratch;
    maximum = acc + static_cast<int64_t>(d) * n;
    weight = maximum + n;
    scores = weight + n;
    keys = scores + kTile * n;
    values = keys + kTile * d + 8;
    std::fill(acc, maximum, 0.0f);
    std::fill(maximum, weight, -INFINITY);
    std::fill(weight, scores, 0.0f);
  }

  void score(const float* queries, int count) const {
    multiply(keys, d, 1, (count + 3) / 4 * 4, queries, n, d, scores, false);
  }

  // Turns the scores of `count` keys into weights and adds their values.
  void fold(int count) const {
    for (int j = 0; j < n; j += 8) {
      const v8 before = load(maximum + j);
      v8 now = before;
      for (int i = 0; i < count; ++i) now = max8(now, load(scores + i * n + j));
      const v8 fade = exp8(before - now);
      v8 total = splat(0.0f);
      for (int i = 0; i < count; ++i) {
        const v8 p = exp8(load(scores + i * n + j) - now);
        store(scores + i * n + j, p);
        total += p;
      }
      store(weight + j, load(weight + j) * fade + total);
      store(maximum + j, now);
      for (int i = 0; i < d; ++i)
        store(acc + static_cast<int64_t>(i) * n + j,
              load(acc + static_cast<int64_t>(i) * n + j) * fade);
    }
    multiply(values, 1, d, d, scores, n, count, acc, true);
  }
};

}  // namespace zipcache
