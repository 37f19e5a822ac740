// The work of one thread: scoring some chunks.
#pragma once

#include "kernels.h"

namespace hip {

// ---- Few queries: decode, and verification of drafts -------------------------------------------

template <class T>
HIP_INLINE float best_dot(const float* q, int64_t step, int n, const T* k, int d) {
  float best = -INFINITY;
  for (int t = 0; t < n; ++t, q += step) {
    v8 acc[2] = {splat(0.0f), splat(0.0f)};
    for (int i = 0; i < d; i += 16) {
      acc[0] += load(q + i) * load(k + i);
      acc[1] += load(q + i + 8) * load(k + i + 8);
    }
    best = std::max(best, sum(acc[0] + acc[1]));
  }
  return best;
}

// A chunk while one head bisects it (SelectRep, algorithm 2). Representatives of a half that is empty
// are those of the other one.
struct Range {
  int32_t first, last;

  int32_t middle() const { return (first + last) / 2; }
  int32_t left(bool centre) const { return centre ? (first + middle()) / 2 : first; }
  int32_t right(bool centre) const { return centre ? (middle() + last) / 2 : middle(); }

  void go(float left_score, float right_score) {
    if (last - first == 1) return;
    if (left_score >= right_score) {
      last = middle();
    } else {
      first = middle();
    }
  }
};

// Scores chunks for all heads. A representative is a row somewhere in memory, so those of a round are
// all asked for before the first is used.
template <class T>
void score_few(const Call& c, int m, int stage, int32_t end, const int32_t* starts, int n,
               const float* queries, float* scores) {
  const int group = c.heads / c.kv_heads, d = c.head_size;
  const int64_t step = static_cast<int64_t>(c.heads) * d;
  std::vector<Range> ranges(n * group);
  std::vector<std::pair<const T*, const T*>> rows(n * group);
  std::fill(scores, scores + n, -INFINITY);
  for (int h = 0; h < c.kv_heads; ++h) {
    const Rows<T> row_of(c, m, h);
    for (int i = 0; i < n * group; ++i)
      ranges[i] = {starts[i / group], std::min(starts[i / group] + c.chunk[stage], end)};
    for (int span = c.chunk[stage];; span = (span + 1) / 2) {
      for (int i = 0; i < n * group; ++i) {
        rows[i] = {row_of[ranges[i].left(c.centre)], row_of[ranges[i].right(c.centre)]};
        prefetch(rows[i].first, d);
        prefetch(rows[i].second, d);
      }
      for (int i = 0; i < n * group; ++i) {
        const float* q = queries + (h * group + i % group) * d;
        const float left = best_dot(q, step, c.length[m], rows[i].first, d);
        const float right = best_dot(q, step, c.length[m], rows[i].second, d);
        scores[i / group] = std::max(scores[i / group], std::max(left, right));
        ranges[i].go(left, right);
      }
      if (span <= 2) break;
    }
  }
}

// Largest score of each head over the queries of a block: of n <= kTile rows, [G][kTile].
template <class T, int G>
HIP_INLINE void best_of_heads(const float* q, int64_t step, int length, const T* const* rows, int n,
                              int d, float* best) {
  float scores[G * kTile];
  for (int t = 0; t < length; ++t, q += step) {
    const float* heads[G];
    for (int g = 0; g < G; ++g) heads[g] = q + g * d;
    dot_rows<T, G>(heads, rows, n, d, 0, t == 0 ? best : scores);
    if (t == 0) continue;
    for (int g = 0; g < G; ++g)
      for (int j = 0; j < n; ++j)
        best[g * kTile + j] = std::max(best[g * kTile + j], scores[g * kTile + j]);
  }
}

// Best score that a head sees while it bisects a chunk, whose keys' scores are known.
HIP_INLINE float best_seen(const float* scores, Range range, int chunk, bool centre) {
  const int32_t start = range.first;
  float best = -INFINITY;
  for (int span = chunk;; span = (span + 1) / 2) {
    const float left = scores[range.left(centre) - start];
    const float right = scores[range.right(centre) - start];
    best = std::max(best, std::max(left, right));
    range.go(left, right);
    if (span <= 2) return best;
  }
}

// Whether heads look at most keys of a chunk between them.
inline bool is_read_whole(const Call& c, int stage) {
  const int chunk = c.chunk[stage], group = c.heads / c.kv_heads;
  return chunk > 1 && chunk <= kTile && chunk <= 2 * group * __builtin_ctz(chunk);
}

// As score_few, but reads each chunk as a whole: rows that follow one another are read fastest, and
// a key is read once for all heads.
template <class T>
void score_whole(const Call& c, int m, int stage, int32_t end, const int32_t* starts, int n,
                 const float* queries, float* scores) {
  const int group = c.heads / c.kv_heads, d = c.head_size, chunk = c.chunk[stage];
  const int64_t step = static_cast<int64_t>(c.heads) * d;
  const T* rows[kTile];
  float best[kGroup * kTile];
  std::fill(scores, scores + n, -INFINITY);
  for (int h = 0; h < c.kv_heads; ++h) {
    const Rows<T> row_of(c, m, h);
    for (int i0 = 0; i0 < n; i0 += kTile / chunk) {
      const int count = std::min(kTile / chunk, n - i0);
      for (int j = 0; j < count * chunk; ++j)
        rows[j] = row_of[std::min(starts[i0 + j / chunk] + j % chunk, end - 1)];
      for (int g0 = 0; g0 < group; g0 += kGroup) {
        const int heads = std::min(kGroup, group - g0);
        const float* q = queries + (h * group + g0) * d;
        switch (heads) {
          case 1: best_of_heads<T, 1>(q, step, c.length[m], rows, count * chunk, d, best); break;
          case 2: best_of_heads<T, 2>(q, step, c.length[m], rows, count * chunk, d, best); break;
          case 3: best_of_heads<T, 3>(q, step, c.length[m], rows, count * chunk, d, best); break;
          default: best_of_heads<T, 4>(q, step, c.length[m], rows, count * chunk, d, best);
        }
        for (int i = 0; i < count; ++i) {
          const Range range{starts[i0 + i], std::min(starts[i0 + i] + chunk, end)};
          for (int g = 0; g < heads; ++g)
            scores[i0 + i] = std::max(
                scores[i0 + i], best_seen(best + g * kTile + i * chunk, range, chunk, c.centre));
        }
      }
    }
  }
}

// ---- Many queries: prefill ---------------------------------------------------------------------

// Largest score of each of n <= kTile rows over the columns.
HIP_INLINE void best_of_columns(const float* k, int n, int d, const float* queries, int columns,
                                float* scores, float* best) {
  for (int i = 0; i < n; i += 4) {
    v8 top[4];
    for (int r = 0; r < 4; ++r) top[r] = splat(-INFINITY);
    for (int j = 0; j < columns; j += 16) {
      multiply_4x16<false>(k + i * d, d, 1, queries + j, columns, d, scores, 16);
      for (int r = 0; r < 4; ++r)
        top[r] = max8(top[r], max8(load(scores + 16 * r), load(scores + 16 * r + 8)));
    }
    for (int r = 0; r < 4; ++r) best[i + r] = largest(top[r]);
  }
}

// queries [heads, head_size, columns]: only those that take part, padded by repeating the last.
template <class T>
void score_many(const Call& c, int m, int stage, int32_t end, const int32_t* starts,
                           int n, const float* queries, int columns, float* scratch,
                           float* scores) {
  constexpr int kChunks = kTile / 2;
  const int group = c.heads / c.kv_heads, d = c.head_size;
  float *k = scratch, *products = k + kTile * d;
  for (int j = 0; j < n; ++j) scores[j] = -INFINITY;
  for (int h = 0; h < c.heads; ++h) {
    const Rows<T> row_of(c, m, h / group);
    const float* q = queries + static_cast<int64_t>(h) * d * columns;
    for (int j0 = 0; j0 < n; j0 += kChunks) {
      const int count = std::min(kChunks, n - j0);
      Range ranges[kChunks];
      for (int j = 0; j < count; ++j)
        ranges[j] = {starts[j0 + j], std::min(starts[j0 + j] + c.chunk[stage], end)};
      for (int span = c.chunk[stage];; span = (span + 1) / 2) {
        const T* rows[kTile];
        float best[kTile];
        for (int j = 0; j < count; ++j) {
          rows[2 * j] = row_of[ranges[j].left(c.centre)];
          rows[2 * j + 1] = row_of[ranges[j].right(c.centre)];
        }
        copy_rows<T>(rows, 0, 2 * count, d, k);
        best_of_columns(k, (2 * count + 3) / 4 * 4, d, q, columns, products, best);
        for (int j = 0; j < count; ++j) {
          const float left = best[2 * j], right = best[2 * j + 1];
          scores[j0 + j] = std::max(scores[j0 + j], std::max(left, right));
          ranges[j].go(left, right);
        }
        if (span <= 2) break;
      }
    }
  }
}

}  // namespace hip
