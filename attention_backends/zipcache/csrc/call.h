// What the ZipCache kernels read and write. Mirrored field by field in cpu_kernels.py. All pointers
// are to host memory; strides are in elements unless they say bytes.
#pragma once

#include <cstdint>

namespace zipcache {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Where a block's tokens are: batch.py has the same numbers. A staging row is its own number, a
// residual row r is kRaw - r.
constexpr int32_t kSealed = -1;
constexpr int32_t kRaw = -2;

// One layer's memory.
struct Layer {
  // Pages; those of block b and kv head h start at b * block_stride + h * head_stride bytes.
  uint8_t* cache;
  int64_t block_stride, head_stride;
  // [rows, kv_heads, 2 (keys, values), block_size, head_size] of dtype.
  void* residual;
  // Sums of probes' attention [rows, kv_heads, block_size].
  float* residual_sums;
  // Low planes of whole blocks [rows, kv_heads, 2, block_size, head_size / 4].
  uint8_t* staging;
  float* staging_sums;
  int32_t kv_heads, head_size, block_size;
  // Salient tokens of a block: of keys, of values.
  int32_t k_salient, v_salient, scale_values;
  DType dtype;
};

// One batch.
struct Batch {
  // [tokens, heads, head_size].
  const void *query, *key, *value;
  void* out;
  int64_t query_stride, key_stride, value_stride, out_stride;
  // Log-sum-exp of each query's scores [tokens, heads].
  float* lse;
  const int32_t* block_table;
  int64_t table_stride;
  // By block of the cache.
  const int32_t* state;
  // By request: first token in the batch, number of tokens, position of the first one, residual
  // row, first block whose sums grow, whether those are set to zero before, first of its probes.
  const int32_t *start, *length, *position, *residual_row, *score_from, *reset, *probe_start;
  // Probes of all requests, counted from the request's first token, ascending.
  const int32_t* probe;
  int32_t num_rows, heads;
  float scale;
};

// Blocks whose quota is applied.
struct Seals {
  // Block, where its tokens are (a state), and how many of its first tokens are salient anyway.
  const int32_t *block, *source, *forced;
  // 1 / number of probes that saw the token [blocks, block_size].
  const float* weight;
  int32_t num_blocks;
};

}  // namespace zipcache
