// The format of a page: page.py describes it. One page is one kv head of one block.
#pragma once

#include <algorithm>

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
  int block, head, k_salient, v_salient, quarter;

  explicit Format(const Layer& l)
      : block(l.block_size),
        head(l.head_size),
        k_salient(l.k_salient),
        v_salient(l.v_salient),
        quarter(l.head_size / 4) {}

  // Whether a quota leaves a choice, and whether keys and values have bits of their own then.
  bool chooses(int quota) const { return 0 < quota && quota < block; }
  bool two_bitmaps() const {
    return chooses(k_salient) && chooses(v_salient) && k_salient != v_salient;
  }

  int64_t k_high() const { return 0; }
  int64_t v_high() const { return k_high() + block * quarter; }
  int64_t k_low() const { return v_high() + block * quarter; }
  int64_t v_low() const { return k_low() + k_salient * quarter; }
  int64_t k_min() const { return v_low() + v_salient * quarter; }
  int64_t k_step() const { return k_min() + 2 * head; }
  int64_t v_scale() const { return k_step() + 2 * head; }
  int64_t v_min() const { return v_scale() + 2 * head; }
  int64_t v_step() const { return v_min() + 2 * block; }
  int64_t k_bitmap() const { return v_step() + 2 * block; }
  int64_t v_bitmap() const { return k_bitmap() + (two_bitmaps() ? block / 8 : 0); }
  int64_t size() const { return v_bitmap() + block / 8; }
  // Channels of a quarter, filled up to whole vectors.
  int padded() const { return (quarter + 7) / 8 * 8; }
};

// Spreads channels such that each quarter begins a vector; what fills up the last one is zero.
inline void pad_quarters(const Format& f, const float* from, float* to) {
  const int q = f.quarter, p = f.padded();
  for (int r = 0; r < 4; ++r)
    for (int j = 0; j < p; ++j) to[r * p + j] = j < q ? from[r * q + j] : 0.0f;
}

// The low plane of keys or of values, and the tokens that its rows are of, ascending.
struct Low {
  const uint8_t* rows;
  int count = 0;
  int16_t tokens[kMaxBlock];

  explicit Low(const uint8_t* plane) : rows(plane) {}

  // Rows of the first n tokens.
  void all(int n) {
    for (int t = 0; t < n; ++t) tokens[count++] = t;
  }

  // bits: which tokens have one, looked at where a quota leaves a choice.
  void sealed(const Format& f, int quota, const uint8_t* bits) {
    if (!f.chooses(quota)) return all(quota);
    for (int t = 0; t < f.block; ++t)
      if (bits[t / 8] >> (t % 8) & 1) tokens[count++] = t;
  }
};

// A page that is read: its planes, and which tokens have low ones.
struct Page {
  const Format& f;
  const uint8_t* base;
  Low k, v;

  // staging: the low planes of the whole block, or null for a sealed one.
  Page(const Format& format, const uint8_t* page, const uint8_t* staging)
      : f(format),
        base(page),
        k(staging ? staging : page + format.k_low()),
        v(staging ? staging + format.block * format.quarter : page + format.v_low()) {
    if (staging != nullptr) {
      k.all(f.block);
      v.all(f.block);
      return;
    }
    k.sealed(f, f.k_salient, page + f.k_bitmap());
    if (f.k_salient != f.v_salient) {
      v.sealed(f, f.v_salient, page + f.v_bitmap());
    } else {
      v.count = k.count;
      std::copy_n(k.tokens, k.count, v.tokens);
    }
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
