// Decode: one query against keys and values that stay packed.
//
// A key is min + step * code by channel, so q . k = q . min + (q * step) . code: the ranges are
// folded into the query, once for each block. A value is c * (min + step * code) with c by channel
// and the rest by token, so the ranges are folded into the weights, and c into the block's sum. A
// code is 4 * high + low, or 4 * high + 1.5 where there is no low plane.
#pragma once

#include <algorithm>
#include <cmath>

#include "page.h"

namespace zipcache {

constexpr int kGroup = 4;  // query heads that share a pass over the keys

using hip::exp8;
using hip::largest;
using hip::max8;
using hip::sum;

// Running softmax of one query head: values [head_size], then maximum and sum of weights.
struct State {
  float* at;
  int head;

  float& maximum() const { return at[head]; }
  float& weight() const { return at[head + 1]; }

  void clear() const {
    std::fill(at, at + head + 2, 0.0f);
    maximum() = -INFINITY;
  }

  // Turns n scores into weights, and fades what was summed up before. Scores have room for n
  // rounded up to a multiple of eight.
  void fold(float* s, int n) const {
    const int padded = (n + 7) / 8 * 8;
    for (int j = n; j < padded; ++j) s[j] = -INFINITY;
    v8 best = load(s);
    for (int j = 8; j < padded; j += 8) best = max8(best, load(s + j));
    const float now = std::max(maximum(), largest(best));
    const float fade = exp8(splat(maximum() - now))[0];
    v8 total = splat(0.0f);
    for (int j = 0; j < padded; j += 8) {
      const v8 p = exp8(load(s + j) - now);
      store(s + j, p);
      total += p;
    }
    // Lanes beyond n hold e^-87, not nothing.
    for (int j = n; j < padded; ++j) total[j % 8] -= s[j], s[j] = 0.0f;
    weight() = weight() * fade + sum(total);
    maximum() = now;
    if (fade != 1.0f)
      for (int i = 0; i < head; i += 8) store(at + i, load(at + i) * fade);
  }
};

// ---- Rows as they came --------------------------------------------------------------------------

template <class T, int G>
void attend_rows(const float* const* q, const T* keys, int64_t key_stride, const T* values,
                 int64_t value_stride, int n, int d, const State* states) {
  float p[G][kMaxBlock];
  for (int t = 0; t < n; ++t) {
    const T* k = keys + t * key_stride;
    v8 acc[G];
    for (int g = 0; g < G; ++g) acc[g] = splat(0.0f);
    for (int i = 0; i < d; i += 8) {
      const v8 x = load(k + i);
      for (int g = 0; g < G; ++g) acc[g] += load(q[g] + i) * x;
    }
    for (int g = 0; g < G; ++g) p[g][t] = sum(acc[g]);
  }
  for (int g = 0; g < G; ++g) states[g].fold(p[g], n);
  for (int i = 0; i < d; i += 16) {
    v8 acc[G][2];
    for (int g = 0; g < G; ++g)
      acc[g][0] = load(states[g].at + i), acc[g][1] = load(states[g].at + i + 8);
    for (int t = 0; t < n; ++t) {
      const T* v = values + t * value_stride + i;
      const v8 v0 = load(v), v1 = load(v + 8);
      for (int g = 0; g < G; ++g) {
        const v8 w = splat(p[g][t]);
        acc[g][0] += w * v0;
        acc[g][1] += w * v1;
      }
    }
    for (int g = 0; g < G; ++g)
      store(states[g].at + i, acc[g][0]), store(states[g].at + i + 8, acc[g][1]);
  }
}

// ---- Packed pages -------------------------------------------------------------------------------

using Channels = float[kMaxHead + 32];  // quarters that begin a vector each
using Tokens = float[kMaxBlock];

// Sums of four vectors.
HIP_INLINE void sum4(v8 a, v8 b, v8 c, v8 d, float* out) {
  const v8 ab = __builtin_shuffle(a, b, i8{0, 8, 2, 10, 4, 12, 6, 14}) +
                __builtin_shuffle(a, b, i8{1, 9, 3, 11, 5, 13, 7, 15});
  const v8 cd = __builtin_shuffle(c, d, i8{0, 8, 2, 10, 4, 12, 6, 14}) +
                __builtin_shuffle(c, d, i8{1, 9, 3, 11, 5, 13, 7, 15});
  const v8 both = __builtin_shuffle(ab, cd, i8{0, 1, 8, 9, 4, 5, 12, 13}) +
                  __builtin_shuffle(ab, cd, i8{2, 3, 10, 11, 6, 7, 14, 15});
  for (int i = 0; i < 4; ++i) out[i] = both[i] + both[i + 4];
}

// Products of one row of a plane with folded queries.
template <int G>
HIP_INLINE void dot_plane(const uint8_t* row, const Channels* q, int padded, float* out) {
  v8 acc[4] = {};
  for (int j = 0; j < padded; j += 8) {
    const i8 bytes = load_bytes(row + j);
    for (int r = 0; r < 4; ++r) {
      const v8 codes = codes_of(bytes, r);
      for (int g = 0; g < G; ++g) acc[g] += load(q[g] + r * padded + j) * codes;
    }
  }
  if (G == 1) {
    out[0] = sum(acc[0]);
  } else {
    sum4(acc[0], acc[1], acc[2], acc[3], out);
  }
}

// acc += sum over a plane's rows of weight * code, for R quarters from one on. So many as registers
// hold the sums of.
template <int G, int R>
HIP_INLINE void add_quarters(const uint8_t* plane, int quarter, int rows, int padded, int first,
                             const Tokens* weight, Channels* acc) {
  for (int j = 0; j < padded; j += 8) {
    v8 sums[G][R];
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) sums[g][r] = load(acc[g] + (first + r) * padded + j);
    for (int t = 0; t < rows; ++t) {
      const i8 bytes = load_bytes(plane + t * quarter + j);
      for (int r = 0; r < R; ++r) {
        const v8 codes = codes_of(bytes, first + r);
        for (int g = 0; g < G; ++g) sums[g][r] += splat(weight[g][t]) * codes;
      }
    }
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) store(acc[g] + (first + r) * padded + j, sums[g][r]);
  }
}

template <int G>
HIP_INLINE void add_plane(const uint8_t* plane, int quarter, int rows, int padded,
                          const Tokens* weight, Channels* acc) {
  if (G <= 2) {
    add_quarters<G, 4>(plane, quarter, rows, padded, 0, weight, acc);
  } else {
    add_quarters<G, 2>(plane, quarter, rows, padded, 0, weight, acc);
    add_quarters<G, 2>(plane, quarter, rows, padded, 2, weight, acc);
  }
}

template <int G>
HIP_INLINE void score_page(const Page& page, const Channels* q, Tokens* scores) {
  const Format& f = page.f;
  const int p = f.padded(), n = f.block;
  Channels folded[G], least, step;
  float low[4], constant[G], centre[G];
  page.channels(f.k_min(), least);
  page.channels(f.k_step(), step);
  for (int g = 0; g < G; ++g) {
    v8 base = splat(0.0f), total = splat(0.0f);
    for (int j = 0; j < 4 * p; j += 8) {
      const v8 x = load(q[g] + j), s = x * load(step + j);
      store(folded[g] + j, s);
      base += x * load(least + j);
      total += s;
    }
    constant[g] = sum(base);
    centre[g] = 1.5f * sum(total);
  }
  for (int t = 0; t < n; ++t) {
    dot_plane<G>(page.base + f.k_high() + t * f.quarter, folded, p, low);
    for (int g = 0; g < G; ++g) scores[g][t] = constant[g] + centre[g] + 4.0f * low[g];
  }
  for (int i = 0; i < page.k.count; ++i) {
    dot_plane<G>(page.k.rows + i * f.quarter, folded, p, low);
    for (int g = 0; g < G; ++g) scores[g][page.k.tokens[i]] += low[g] - centre[g];
  }
}

// Attends to the first `seen` tokens; a batch's own tokens are in the page that they fill as well.
template <int G>
void attend_page(const Page& page, int seen, const Channels* q, const State* states) {
  const Format& f = page.f;
  const int p = f.padded(), n = f.block;
  Tokens weight[G], low[G], least, step;
  Channels acc[G], scale;
  score_page<G>(page, q, weight);
  page.floats(f.v_min(), n, least);
  page.floats(f.v_step(), n, step);
  for (int g = 0; g < G; ++g) {
    states[g].fold(weight[g], seen);
    std::fill(weight[g] + seen, weight[g] + n, 0.0f);
    v8 constant = splat(0.0f), all = splat(0.0f);
    for (int t = 0; t < n; t += 8) {
      const v8 w = load(weight[g] + t), by = w * load(step + t);
      constant += w * load(least + t);
      all += by;
      store(weight[g] + t, 4.0f * by);
    }
    float without = sum(all);
    for (int i = 0; i < page.v.count; ++i) {
      low[g][i] = 0.25f * weight[g][page.v.tokens[i]];
      without -= low[g][i];
    }
    std::fill(acc[g], acc[g] + 4 * p, sum(constant) + 1.5f * without);
  }
  add_plane<G>(page.base + f.v_high(), f.quarter, n, p, weight, acc);
  add_plane<G>(page.v.rows, f.quarter, page.v.count, p, low, acc);
  page.channels(f.v_scale(), scale);
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < 4; ++r)
      for (int j = 0; j < f.quarter; ++j)
        states[g].at[r * f.quarter + j] += acc[g][r * p + j] * scale[r * p + j];
}

}  // namespace zipcache
