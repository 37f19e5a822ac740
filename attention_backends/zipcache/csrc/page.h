// The format of a page: page.py describes it. One page is one kv head of one block.
#pragma once

#include "../../hip/csrc/vec.h"
#include "call.h"

namespace zipcache {

using hip::i8;
using hip::load;
using hip::splat;
using hip::store;
using hip::v8;
using half = _Float16;

constexpr int kMaxBlock = 256;
constexpr int kMaxHead = 512;

struct Format {
  int block, head, salient, quarter;

  explicit Format(const Layer& l)
      : block(l.block_size), head(l.head_size), salient(l.salient), quarter(l.head_size / 4) {}

  int64_t k_high() const { return 0; }
  int64_t v_high() const { return k_high() + block * quarter; }
  int64_t k_low() const { return v_high() + block * quarter; }
  int64_t v_low() const { return k_low() + salient * quarter; }
  int64_t k_min() const { return v_low() + salient * quarter; }
  int64_t k_step() const { return k_min() + 2 * head; }
  int64_t v_scale() const { return k_step() + 2 * head; }
  int64_t v_min() const { return v_scale() + 2 * head; }
  int64_t v_step() const { return v_min() + 2 * block; }
  int64_t bitmap() const { return v_step() + 2 * block; }
  int64_t size() const { return bitmap() + block / 8; }
  // Channels of a quarter, filled up to whole vectors.
  int padded() const { return (quarter + 7) / 8 * 8; }
};

// Spreads channels such that each quarter begins a vector; what fills up the last one is zero.
inline void pad_quarters(const Format& f, const float* from, float* to) {
  const int q = f.quarter, p = f.padded();
  for (int r = 0; r < 4; ++r)
    for (int j = 0; j < p; ++j) to[r * p + j] = j < q ? from[r * q + j] : 0.0f;
}

// A page that is read: its planes, and which tokens have a low plane.
struct Page {
  const Format& f;
  const uint8_t *base, *k_low, *v_low;
  int num_low = 0;
  int16_t low[kMaxBlock];

  // staging: the low planes of the whole block, or null for a sealed one.
  Page(const Format& format, const uint8_t* page, const uint8_t* staging)
      : f(format), base(page), k_low(page + format.k_low()), v_low(page + format.v_low()) {
    if (staging != nullptr) {
      k_low = staging;
      v_low = staging + f.block * f.quarter;
      for (int t = 0; t < f.block; ++t) low[num_low++] = t;
      return;
    }
    const uint8_t* bits = page + f.bitmap();
    for (int t = 0; t < f.block; ++t)
      if (bits[t / 8] >> (t % 8) & 1) low[num_low++] = t;
  }

  const half* halves(int64_t offset) const { return reinterpret_cast<const half*>(base + offset); }

  // Some of the ranges as floats; n is a multiple of eight.
  void floats(int64_t offset, int n, float* out) const {
    for (int i = 0; i < n; i += 8) store(out + i, load(halves(offset) + i));
  }

  // One of the arrays over channels as floats, quarter by quarter, filled up with zeros.
  void channels(int64_t offset, float* out) const {
    float plain[kMaxHead];
    floats(offset, f.head, f.quarter % 8 ? plain : out);
    if (f.quarter % 8) pad_quarters(f, plain, out);
  }
};

// Eight bytes of a plane, four to a lane: a shift brings any byte's code to the lowest bits.
HIP_INLINE i8 load_bytes(const uint8_t* from) {
  int32_t x[2];
  __builtin_memcpy(x, from, 8);
  return i8{x[0], x[0], x[0], x[0], x[1], x[1], x[1], x[1]};
}

// The codes of one quarter. The index counts modulo 8, so the bits behind a code need no mask.
HIP_INLINE v8 codes_of(i8 bytes, int quarter) {
  const v8 table = {0, 1, 2, 3, 0, 1, 2, 3};
  return __builtin_shuffle(table, bytes >> (i8{0, 8, 16, 24, 0, 8, 16, 24} + 2 * quarter));
}

}  // namespace zipcache
