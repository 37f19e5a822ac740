// Writing a batch's keys and values, and sealing blocks.
#pragma once

#include <vector>

#include "memory.h"

namespace zipcache {

template <class T>
class Writer : Memory<T> {
  ZIPCACHE_USING_MEMORY(T);

 public:
  // The tokens that share the residual row go in order; whole blocks go by themselves.
  void write(const Batch& b) {
    struct Item {
      int row, first;
    };
    std::vector<Item> items;
    for (int m = 0; m < b.num_rows; ++m) {
      items.push_back({m, -1});
      for (int t = (n_ - b.position[m] % n_) % n_; t + n_ <= b.length[m]; t += n_)
        items.push_back({m, t});
    }
    const int num_items = items.size();
#pragma omp parallel
    {
      const std::unique_ptr<Codes> codes(new Codes);
#pragma omp for schedule(dynamic) collapse(2)
      for (int i = 0; i < num_items; ++i)
        for (int h = 0; h < l_.kv_heads; ++h) {
          if (items[i].first >= 0) {
            write_block(b, items[i].row, items[i].first, h, *codes);
          } else {
            write_ends(b, items[i].row, h, *codes);
          }
        }
    }
  }

  // ---- Sealing ----------------------------------------------------------------------------------

  void seal(const Seals& s) {
#pragma omp parallel
    {
      const std::unique_ptr<Codes> codes(new Codes);
      Chosen chosen;
#pragma omp for schedule(dynamic) collapse(2)
      for (int i = 0; i < s.num_blocks; ++i)
        for (int h = 0; h < l_.kv_heads; ++h) {
          uint8_t* page = page_of(s.block[i], h);
          const int source = s.source[i];
          const bool raw = source <= kRaw;
          const int64_t at = (raw ? kRaw - source : source) * static_cast<int64_t>(l_.kv_heads) + h;
          choose(f_, (raw ? l_.residual_sums : l_.staging_sums) + at * n_, s.weight + i * n_,
                 s.forced[i], chosen);
          if (raw) {
            const T* rows = residual(kRaw - source, h);
            quantise_block(l_, f_, rows, d_, rows + n_ * d_, d_, page, *codes);
            seal_codes(f_, *codes, chosen, page);
          } else {
            seal_staged(f_, l_.staging + at * staged_, chosen, page);
          }
        }
    }
  }

 private:
  // Puts a quantised block where its state says that its low planes go.
  void place(int state, int head, const Codes& codes, uint8_t* page) const {
    if (state >= 0) {
      stage(f_, codes, staging(state, head));
      return;
    }
    // Without a choice to make a quota is all tokens or none.
    Chosen all;
    for (int t = 0; t < n_; ++t) all.k[t] = all.v[t] = t;
    seal_codes(f_, codes, all, page);
  }

  void write_block(const Batch& b, int m, int t, int h, Codes& codes) const {
    const int block = block_of(b, m, (b.position[m] + t) / n_), state = b.state[block];
    uint8_t* page = page_of(block, h);
    quantise_block(l_, f_, key(b, m, t, h), b.key_stride, value(b, m, t, h), b.value_stride, page,
                   codes);
    place(state, h, codes, page);
    if (state >= 0) std::fill(sums(state, h), sums(state, h) + n_, 0.0f);
  }

  // The tokens before the first whole block and behind the last.
  void write_ends(const Batch& b, int m, int h, Codes& codes) const {
    const int first = b.position[m] % n_, length = b.length[m];
    int done = 0;
    if (first != 0) {
      done = std::min(n_ - first, length);
      append(b, m, 0, h, first, done);
      const int block = block_of(b, m, b.position[m] / n_), state = b.state[block];
      if (first + done == n_ && state > kRaw) {
        const T* rows = residual(b.residual_row[m], h);
        uint8_t* page = page_of(block, h);
        quantise_block(l_, f_, rows, d_, rows + n_ * d_, d_, page, codes);
        place(state, h, codes, page);
        const float* before = sums(kRaw - b.residual_row[m], h);
        if (state >= 0) std::copy(before, before + n_, sums(state, h));
      }
    }
    const int rest = (length - done) % n_;
    if (rest != 0) append(b, m, length - rest, h, 0, rest);
  }

  void append(const Batch& b, int m, int t, int h, int offset, int count) const {
    T* rows = residual(b.residual_row[m], h);
    for (int i = 0; i < count; ++i) {
      std::copy_n(key(b, m, t + i, h), d_, rows + (offset + i) * d_);
      std::copy_n(value(b, m, t + i, h), d_, rows + (n_ + offset + i) * d_);
    }
    float* s = sums(kRaw - b.residual_row[m], h);
    std::fill(s + offset, s + offset + count, 0.0f);
  }
};

}  // namespace zipcache
