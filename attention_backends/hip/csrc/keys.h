// Which keys a query block attends to, as runs of positions, and where their rows lie.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace hip {

inline int32_t candidates_end(const Call& c, int m, int overlap) {
  return std::max(c.position[m] + 1 - c.window + overlap, c.sink);
}

// Sorted runs [first, last) without overlap: a key is attended to once, whatever it is part of.
class Keys {
 public:
  // Everything up to the last query (dense), or sink, selected blocks and window.
  Keys(const Call& c, int m, const int32_t* blocks, int num_blocks) {
    const int32_t end = c.position[m] + c.length[m];
    if (c.level[m] < 0) {
      add(0, end);
      return;
    }
    const int32_t window = std::max(c.position[m] + 1 - c.window, 0);
    add(0, std::min(c.sink, end));
    const int32_t chunk = c.chunk[c.num_stages - 1];
    for (int i = 0; i < num_blocks && blocks[i] != kNone; ++i)
      add(blocks[i], std::min(blocks[i] + chunk, window));
    add(std::max(window, c.sink), end);
  }

  int32_t total() const { return total_; }

  // Positions number [from, from + count) of the keys, in order.
  void positions(int32_t from, int32_t count, int32_t* out) const {
    auto run = std::upper_bound(runs_.begin(), runs_.end(), from,
                                [](int32_t x, const Run& r) { return x < r.before; });
    for (--run; count > 0; ++run) {
      const int32_t first = run->first + (from - run->before);
      const int32_t n = std::min(count, run->last - first);
      for (int32_t i = 0; i < n; ++i) *out++ = first + i;
      from += n;
      count -= n;
    }
  }

 private:
  struct Run {
    int32_t first, last, before;
  };

  void add(int32_t first, int32_t last) {
    if (first >= last) return;
    if (!runs_.empty() && runs_.back().last == first) {
      runs_.back().last = last;
    } else {
      runs_.push_back({first, last, total_});
    }
    total_ += last - first;
  }

  std::vector<Run> runs_;
  int32_t total_ = 0;
};

// Key rows of one request and kv head.
template <class T>
struct Rows {
  const T* base;
  const int32_t* table;
  int64_t block_stride;
  int32_t block_size, shift, head_size;

  Rows(const Call& c, int m, int kv_head)
      : base(static_cast<const T*>(c.cache) + kv_head * c.head_stride),
        table(c.block_table + c.row[m] * c.table_stride),
        block_stride(c.block_stride),
        block_size(c.block_size),
        shift((c.block_size & (c.block_size - 1)) ? -1 : __builtin_ctz(c.block_size)),
        head_size(c.head_size) {}

  const T* operator[](int32_t position) const {
    const int32_t block = shift >= 0 ? position >> shift : position / block_size;
    const int32_t offset = position - block * block_size;
    return base + table[block] * block_stride + static_cast<int64_t>(offset) * head_size;
  }
};

}  // namespace hip
