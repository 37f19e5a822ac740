// One call of the HiP kernels: what a layer's attention reads and writes. Mirrored field by field in
// cpu_kernels.py. All pointers are to host memory; strides are in elements.
#pragma once

#include <cstdint>

namespace hip {

constexpr int kMaxStages = 4;
// Pads lists of chunks; selection.py calls it NONE.
constexpr int32_t kNone = INT32_MAX;

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Call {
  // Queries and output [tokens, heads, head_size]; the KV cache, in which a key of block b, kv head
  // h and offset t lies at b * block_stride + h * head_stride + t * head_size, and its value
  // value_offset further.
  const void* query;
  void* out;
  const void* cache;
  int64_t query_stride, out_stride, block_stride, head_stride, value_offset;
  // Block table [rows, table_stride].
  const int32_t* block_table;
  int64_t table_stride;
  // Query blocks: first token, number of tokens, row of the block table, position of the first
  // query, first stage to run (the number of stages: none; -1: dense), and row of the kept lists
  // (-1: nothing is kept), each [num_blocks].
  const int32_t *start, *length, *row, *position, *level, *kept_row;
  // Kept lists, for each stage [kept rows, keep_chunks].
  int32_t* kept[kMaxStages];
  int32_t chunk[kMaxStages], keep_chunks[kMaxStages], query_step[kMaxStages];
  int32_t num_blocks, num_stages;
  int32_t sink, window, overlap, centre;
  int32_t heads, kv_heads, head_size, block_size;
  DType dtype;
  float scale;
};

}  // namespace hip
