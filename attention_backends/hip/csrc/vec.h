// Eight floats, and what the kernels do with them. GCC's vector types: the compiler's flags say which
// instructions they become.
#pragma once

#include <algorithm>
#include <cstdint>

#define HIP_INLINE static inline __attribute__((always_inline))

namespace hip {

struct BFloat16 {
  uint16_t bits;
};

using v8 = float __attribute__((vector_size(32), aligned(4), may_alias));
using i8 = int32_t __attribute__((vector_size(32), aligned(4), may_alias));

HIP_INLINE v8 splat(float x) { return v8{x, x, x, x, x, x, x, x}; }

HIP_INLINE v8 load(const float* p) { return *reinterpret_cast<const v8*>(p); }

HIP_INLINE v8 load(const BFloat16* p) {
  using u16x8 = uint16_t __attribute__((vector_size(16), aligned(2), may_alias));
  u16x8 bits = *reinterpret_cast<const u16x8*>(p);
  return (v8)(__builtin_convertvector(bits, i8) << 16);
}

HIP_INLINE v8 load(const _Float16* p) {
  using f16x8 = _Float16 __attribute__((vector_size(16), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const f16x8*>(p), v8);
}

HIP_INLINE void store(float* p, v8 x) { *reinterpret_cast<v8*>(p) = x; }

HIP_INLINE void store(_Float16* p, v8 x) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<_Float16>(x[i]);
}

// Rounds to nearest even, as torch does; the values are finite.
HIP_INLINE void store(BFloat16* p, v8 x) {
  i8 bits = (i8)x;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  for (int i = 0; i < 8; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
}

HIP_INLINE v8 max8(v8 a, v8 b) { return a > b ? a : b; }

// The halves of eight floats, folded into each other until one is left.
using v4 = float __attribute__((vector_size(16), aligned(4), may_alias));

HIP_INLINE v4 low(v8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
HIP_INLINE v4 high(v8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }

HIP_INLINE float sum(v8 x) {
  v4 s = low(x) + high(x);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
  s += __builtin_shufflevector(s, s, 1, 0, 3, 2);
  return s[0];
}

HIP_INLINE float largest(v8 x) {
  const v4 l = low(x), h = high(x);
  v4 s = l > h ? l : h;
  v4 t = __builtin_shufflevector(s, s, 2, 3, 0, 1);
  s = s > t ? s : t;
  t = __builtin_shufflevector(s, s, 1, 0, 3, 2);
  s = s > t ? s : t;
  return s[0];
}

// e^x for x <= 0, relative error below 3e-7; what underflows gives a denormal or less, not NaN.
HIP_INLINE v8 exp8(v8 x) {
  x = max8(x, splat(-87.0f));
  const v8 t = x * 1.44269504088896341f;
  const v8 shifted = t + 12582912.0f;  // rounds t to an integer in the low bits of the mantissa
  const v8 n = shifted - 12582912.0f;
  const v8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  v8 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const i8 exponent = ((i8)shifted - 0x4b400000 + 127) << 23;
  return p * (v8)exponent;
}

// C[i][j] (+)= sum_k A[i * a_row + k * a_col] * B[k * b_row + j] for 4 rows and 16 columns.
template <bool kAdd>
HIP_INLINE void multiply_4x16(const float* a, int64_t a_row, int64_t a_col, const float* b,
                              int64_t b_row, int depth, float* c, int64_t c_row) {
  v8 acc[4][2];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) acc[i][j] = kAdd ? load(c + i * c_row + 8 * j) : splat(0.0f);
  for (int k = 0; k < depth; ++k) {
    const v8 b0 = load(b + k * b_row), b1 = load(b + k * b_row + 8);
    for (int i = 0; i < 4; ++i) {
      const v8 x = splat(a[i * a_row + k * a_col]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) store(c + i * c_row + 8 * j, acc[i][j]);
}

}  // namespace hip
