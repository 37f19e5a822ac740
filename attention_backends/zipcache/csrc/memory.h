// Where the parts of a layer's memory and of a batch lie.
#pragma once

#include <memory>

#include "many.h"
#include "quantise.h"

namespace zipcache {

using Floats = std::unique_ptr<float[]>;

inline Floats floats(int64_t n) { return Floats(new float[n]); }

template <class T>
class Memory {
 public:
  explicit Memory(const Layer& l)
      : l_(l), f_(l), n_(l.block_size), d_(l.head_size), staged_(2LL * n_ * f_.quarter) {}

 protected:
  uint8_t* page_of(int block, int head) const {
    return l_.cache + block * l_.block_stride + head * l_.head_stride;
  }

  T* residual(int row, int head) const {
    return static_cast<T*>(l_.residual) +
           (static_cast<int64_t>(row) * l_.kv_heads + head) * 2 * n_ * d_;
  }

  uint8_t* staging(int row, int head) const {
    return l_.staging + (static_cast<int64_t>(row) * l_.kv_heads + head) * staged_;
  }

  float* sums(int state, int head) const {
    const int row = state <= kRaw ? kRaw - state : state;
    return (state <= kRaw ? l_.residual_sums : l_.staging_sums) +
           (static_cast<int64_t>(row) * l_.kv_heads + head) * n_;
  }

  static int block_of(const Batch& b, int m, int index) {
    return b.block_table[m * b.table_stride + index];
  }

  const T* key(const Batch& b, int m, int t, int h) const {
    return static_cast<const T*>(b.key) + (b.start[m] + t) * b.key_stride + h * d_;
  }

  const T* value(const Batch& b, int m, int t, int h) const {
    return static_cast<const T*>(b.value) + (b.start[m] + t) * b.value_stride + h * d_;
  }

  Page open(const Batch& b, int block, int h) const {
    const int state = b.state[block];
    return Page(f_, page_of(block, h), state >= 0 ? staging(state, h) : nullptr);
  }

  const Layer& l_;
  const Format f_;
  const int n_, d_;
  const int64_t staged_;
};

// What a class of templates has to say to use its base's names.
#define ZIPCACHE_USING_MEMORY(T)                                                                \
  using Memory<T>::Memory;                                                                      \
  using Memory<T>::l_;                                                                          \
  using Memory<T>::f_;                                                                          \
  using Memory<T>::n_;                                                                          \
  using Memory<T>::d_;                                                                          \
  using Memory<T>::staged_;                                                                     \
  using Memory<T>::page_of;                                                                     \
  using Memory<T>::residual;                                                                    \
  using Memory<T>::staging;                                                                     \
  using Memory<T>::sums;                                                                        \
  using Memory<T>::block_of;                                                                    \
  using Memory<T>::key;                                                                         \
  using Memory<T>::value

}  // namespace zipcache
