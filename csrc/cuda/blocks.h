// Blocks of threads over matrices with channels side by side, and the sums of their rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace us3l::cuda {

constexpr int kBlock = 256;  // threads at most

// A tile of channels has `lanes` threads side by side, of `width` channels each: at most a cache line of 16-byte accesses.
struct Tiles {
  int32_t channels, lanes, count;

  Tiles(int64_t channels, int width) : channels(static_cast<int32_t>(channels)) {
    constexpr int64_t kLine = 128;
    const int64_t vectors = channels / width, most = width == 1 ? 32 : kLine / kAccess;
    count = static_cast<int32_t>((vectors + most - 1) / most);
    lanes = static_cast<int32_t>((vectors + count - 1) / count);
  }
};

// Merges pairs of a block's rows of `row_threads` threads until row 0 has all: merge(own thread, other thread).
template <class Merge>
__device__ __forceinline__ void merge_rows(int rows, int row_threads, const Merge& merge) {
  const int thread = static_cast<int>(threadIdx.x), row = thread / row_threads;
  int half = 1;
  while (2 * half < rows) half *= 2;
  for (; half >= 1; half /= 2) {
    __syncthreads();
    if (row < half && row + half < rows) merge(thread, thread + half * row_threads);
  }
}

// The second stage, for results that blocks have left: a block of it has some columns, and for each of them `slices`
// threads, which take the first stage's blocks in turn, kFew at a time.
struct Merging {
  static constexpr int32_t kFew = 4;

  int32_t blocks, slices = 1, columns;  // columns: of a block

  explicit Merging(int64_t blocks) : blocks(static_cast<int32_t>(blocks)) {
    constexpr int32_t kMost = 16;
    while (slices < kMost && slices * kFew < blocks) slices *= 2;
    columns = kBlock / slices;
  }

  __device__ __forceinline__ int slice_of_thread() const { return static_cast<int>(threadIdx.x) / columns; }
  __device__ __forceinline__ int64_t column_of_thread() const {
    return int64_t{blockIdx.x} * columns + static_cast<int>(threadIdx.x) % columns;
  }
};

// The K sums of what add(block, values, sums) adds of a block's K values, which load(block, values) reads, over all blocks
// in a fixed order, if `inside`; true for the one thread of a column that has them.
template <int K, class Load, class Add>
__device__ __forceinline__ bool sum_of_blocks(const Merging& merging, bool inside, double (&shared)[K][kBlock],
                                              double (&sums)[K], const Load& load, const Add& add) {
  const int thread = static_cast<int>(threadIdx.x), slice = merging.slice_of_thread(), blocks = inside ? merging.blocks : 0;
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k] = 0.0;
#pragma unroll 1
  for (int block = slice; block < blocks; block += Merging::kFew * merging.slices) {
    float values[Merging::kFew][K] = {};
#pragma unroll
    for (int i = 0; i < Merging::kFew; ++i)
      if (block + i * merging.slices < blocks) load(block + i * merging.slices, values[i]);
#pragma unroll
    for (int i = 0; i < Merging::kFew; ++i)
      if (block + i * merging.slices < blocks) add(block + i * merging.slices, values[i], sums);
  }
  if (merging.slices == 1) return inside;
#pragma unroll
  for (int k = 0; k < K; ++k) shared[k][thread] = sums[k];
  __syncthreads();
  if (slice != 0 || !inside) return false;
  for (int other = thread + merging.columns; other < kBlock; other += merging.columns)
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] += shared[k][other];
  return true;
}

// The sum of a thread's column of partials [blocks][columns].
__device__ __forceinline__ bool sum_of_blocks(const Merging& merging, const float* partials, int64_t columns,
                                              double (&shared)[1][kBlock], double& sum) {
  const int64_t i = merging.column_of_thread();
  double sums[1];
  const bool last = sum_of_blocks(
      merging, i < columns, shared, sums,
      [&](int block, float(&to)[1]) { to[0] = partials[block * columns + i]; },
      [&](int, const float(&value)[1], double(&to)[1]) { to[0] += value[0]; });
  sum = sums[0];
  return last;
}

inline dim3 blocks_for(int64_t columns, int each) { return dim3(static_cast<unsigned>((columns + each - 1) / each)); }

}  // namespace us3l::cuda
