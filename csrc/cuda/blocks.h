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

// The second stage, for results that blocks have left: kSlices threads for each column, which take the blocks in turn.
constexpr int kSlices = 16, kColumns = kBlock / kSlices;

// The column of a thread.
__device__ __forceinline__ int64_t column_of_thread() {
  return int64_t{blockIdx.x} * kColumns + static_cast<int>(threadIdx.x) % kColumns;
}

// The sum of a thread's column of partials [blocks][columns], in a fixed order; true for the one thread that has it.
__device__ __forceinline__ bool sum_of_blocks(const float* partials, int64_t blocks, int64_t columns,
                                              double (&shared)[kBlock], double& sum) {
  const int thread = static_cast<int>(threadIdx.x), slice = thread / kColumns;
  const int64_t i = column_of_thread();
  sum = 0.0;
  if (i < columns)
    for (int64_t block = slice; block < blocks; block += kSlices) sum += partials[block * columns + i];
  shared[thread] = sum;
  __syncthreads();
  if (slice != 0 || i >= columns) return false;
  for (int other = thread + kColumns; other < kBlock; other += kColumns) sum += shared[other];
  return true;
}

inline dim3 blocks_for(int64_t columns, int each) { return dim3(static_cast<unsigned>((columns + each - 1) / each)); }

}  // namespace us3l::cuda
