// Writing pages: quantiser.py says what and why.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "page.h"

namespace zipcache {

inline uint16_t bits_of(half x) {
  uint16_t b;
  std::memcpy(&b, &x, 2);
  return b;
}

inline half from_bits(uint16_t b) {
  half x;
  std::memcpy(&x, &b, 2);
  return x;
}

inline half nearest(float x) {
  return static_cast<half>(std::min(std::max(x, -65504.0f), 65504.0f));
}

// The largest half that is not above x, the smallest that is not below: ranges must not clip.
inline half round_down(float x) {
  x = std::max(x, -65504.0f);
  const half h = nearest(x);
  if (static_cast<float>(h) <= x) return h;
  const uint16_t b = bits_of(h);
  if ((b & 0x7fff) == 0) return from_bits(0x8001);
  return from_bits(b & 0x8000 ? b + 1 : b - 1);
}

inline half round_up(float x) { return -round_down(-x); }

struct Codes {
  uint8_t k[kMaxBlock * kMaxHead], v[kMaxBlock * kMaxHead];
};

HIP_INLINE float quantise(float x, float least, float step) {
  // Adding and taking away 1.5 * 2^23 rounds to nearest even.
  const float code = ((x - least) / step + 12582912.0f) - 12582912.0f;
  return std::min(std::max(code, 0.0f), 15.0f);
}

// Keys of a block: one range for each channel, over the tokens.
template <class T>
void quantise_keys(const Format& f, const T* rows, int64_t stride, uint8_t* page, uint8_t* codes) {
  half *least = reinterpret_cast<half*>(page + f.k_min());
  half *step = reinterpret_cast<half*>(page + f.k_step());
  float low[kMaxHead], high[kMaxHead];
  std::fill(low, low + f.head, INFINITY);
  std::fill(high, high + f.head, -INFINITY);
  for (int t = 0; t < f.block; ++t)
    for (int i = 0; i < f.head; i += 8) {
      const v8 x = load(rows + t * stride + i), l = load(low + i), h = load(high + i);
      store(low + i, x < l ? x : l);
      store(high + i, x > h ? x : h);
    }
  for (int i = 0; i < f.head; ++i) {
    least[i] = round_down(low[i]);
    low[i] = least[i];
    step[i] = round_up((high[i] - low[i]) / 15.0f);
    // Of a channel without a range every code is 0, whatever it is divided by.
    high[i] = step[i] > 0 ? static_cast<float>(step[i]) : 1.0f;
  }
  for (int t = 0; t < f.block; ++t)
    for (int i = 0; i < f.head; i += 8) {
      float x[8];
      store(x, load(rows + t * stride + i));
      for (int j = 0; j < 8; ++j)
        codes[t * f.head + i + j] = quantise(x[j], low[i + j], high[i + j]);
    }
}

// Values of a block: a scale for each channel, then one range for each token.
template <class T>
void quantise_values(const Format& f, const T* rows, int64_t stride, bool scaled, uint8_t* page,
                     uint8_t* codes) {
  half* scale = reinterpret_cast<half*>(page + f.v_scale());
  half *least = reinterpret_cast<half*>(page + f.v_min());
  half *step = reinterpret_cast<half*>(page + f.v_step());
  float c[kMaxHead];
  std::fill(c, c + f.head, 0.0f);
  for (int t = 0; scaled && t < f.block; ++t)
    for (int i = 0; i < f.head; i += 8) {
      const v8 x = load(rows + t * stride + i), a = x < 0.0f ? -x : x, before = load(c + i);
      store(c + i, a > before ? a : before);
    }
  for (int i = 0; i < f.head; ++i) {
    scale[i] = nearest(c[i]);
    if (!(scale[i] > 0)) scale[i] = 1;
    c[i] = scale[i];
  }
  for (int t = 0; t < f.block; ++t) {
    float y[kMaxHead], low = INFINITY, high = -INFINITY;
    for (int i = 0; i < f.head; i += 8) store(y + i, load(rows + t * stride + i) / load(c + i));
    for (int i = 0; i < f.head; ++i) low = std::min(low, y[i]), high = std::max(high, y[i]);
    least[t] = round_down(low);
    low = least[t];
    step[t] = round_up((high - low) / 15.0f);
    const float by = step[t] > 0 ? static_cast<float>(step[t]) : 1.0f;
    for (int i = 0; i < f.head; ++i) codes[t * f.head + i] = quantise(y[i], low, by);
  }
}

// One token's codes as a row of a plane: the two bits from `shift` on.
inline void pack_row(const Format& f, const uint8_t* codes, int shift, uint8_t* to) {
  for (int j = 0; j < f.quarter; ++j) {
    int byte = 0;
    for (int r = 0; r < 4; ++r) byte |= (codes[r * f.quarter + j] >> shift & 3) << (2 * r);
    to[j] = byte;
  }
}

// Quantises a block, its high planes and ranges into the page.
template <class T>
void quantise_block(const Layer& l, const Format& f, const T* keys, int64_t key_stride,
                    const T* values, int64_t value_stride, uint8_t* page, Codes& codes) {
  quantise_keys(f, keys, key_stride, page, codes.k);
  quantise_values(f, values, value_stride, l.scale_values, page, codes.v);
  for (int t = 0; t < f.block; ++t) {
    pack_row(f, codes.k + t * f.head, 2, page + f.k_high() + t * f.quarter);
    pack_row(f, codes.v + t * f.head, 2, page + f.v_high() + t * f.quarter);
  }
}

// Low planes of all tokens, for a block whose quota is applied later.
inline void stage(const Format& f, const Codes& codes, uint8_t* staging) {
  for (int t = 0; t < f.block; ++t) {
    pack_row(f, codes.k + t * f.head, 0, staging + t * f.quarter);
    pack_row(f, codes.v + t * f.head, 0, staging + (f.block + t) * f.quarter);
  }
}

// A block's salient tokens, ascending: as many as the quotas of keys and of values are.
struct Chosen {
  int k[kMaxBlock], v[kMaxBlock];
};

inline void mark(const Format& f, const int* tokens, int count, uint8_t* bits) {
  std::fill(bits, bits + f.block / 8, 0);
  for (int i = 0; i < count; ++i) bits[tokens[i] / 8] |= 1 << (tokens[i] % 8);
}

inline void write_bitmaps(const Format& f, const Chosen& chosen, uint8_t* page) {
  if (f.chooses(f.k_salient)) mark(f, chosen.k, f.k_salient, page + f.k_bitmap());
  if (f.two_bitmaps() || !f.chooses(f.k_salient))
    mark(f, chosen.v, f.v_salient, page + f.v_bitmap());
}

// Low planes of the chosen tokens alone, side by side.
inline void seal_codes(const Format& f, const Codes& codes, const Chosen& chosen, uint8_t* page) {
  for (int i = 0; i < f.k_salient; ++i)
    pack_row(f, codes.k + chosen.k[i] * f.head, 0, page + f.k_low() + i * f.quarter);
  for (int i = 0; i < f.v_salient; ++i)
    pack_row(f, codes.v + chosen.v[i] * f.head, 0, page + f.v_low() + i * f.quarter);
  write_bitmaps(f, chosen, page);
}

inline void seal_staged(const Format& f, const uint8_t* staging, const Chosen& chosen,
                        uint8_t* page) {
  const uint8_t* values = staging + f.block * f.quarter;
  for (int i = 0; i < f.k_salient; ++i)
    std::memcpy(page + f.k_low() + i * f.quarter, staging + chosen.k[i] * f.quarter, f.quarter);
  for (int i = 0; i < f.v_salient; ++i)
    std::memcpy(page + f.v_low() + i * f.quarter, values + chosen.v[i] * f.quarter, f.quarter);
  write_bitmaps(f, chosen, page);
}

// The most salient tokens; of equal scores the earlier token wins. What is no number is below all
// scores: without an order there would be no quota.
inline void choose(const Format& f, const float* sums, const float* weight, int forced,
                   Chosen& chosen) {
  float score[kMaxBlock];
  int order[kMaxBlock];
  for (int t = 0; t < f.block; ++t) {
    const float own = sums[t] * weight[t];
    score[t] = t < forced ? INFINITY : own >= 0.0f ? own : -1.0f;
    order[t] = t;
  }
  const auto take = [&](int quota, int of, int* to) {
    if (quota < of)
      std::nth_element(order, order + quota, order + of, [&](int a, int b) {
        return score[a] != score[b] ? score[a] > score[b] : a < b;
      });
    std::copy(order, order + quota, to);
    std::sort(to, to + quota);
  };
  // The smaller quota's tokens are among the larger one's, which come first in the order then.
  const bool keys_first = f.k_salient >= f.v_salient;
  take(keys_first ? f.k_salient : f.v_salient, f.block, keys_first ? chosen.k : chosen.v);
  take(keys_first ? f.v_salient : f.k_salient, keys_first ? f.k_salient : f.v_salient,
       keys_first ? chosen.v : chosen.k);
}

}  // namespace zipcache
