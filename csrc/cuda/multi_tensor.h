// Kernels over lists of tensors: every block works on one chunk of one tensor.
#pragma once

#include <cstdint>

#include "../groups.h"
#include "launch.h"

namespace us3l::cuda {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;  // elements

// The tensors of one launch, as many as fit into the 4 KiB of kernel arguments that every GPU and toolkit takes, beside
// 128 bytes of options. The table travels as an argument: no copy to the device, nothing to keep alive, and a CUDA
// graph records it.
template <class Entry>
struct Table {
  static constexpr int kSize = (4096 - 128) / (sizeof(Entry) + sizeof(int32_t)) - 1;

  Entry entries[kSize];
  int32_t first_block[kSize + 1];  // blocks of entry t: first_block[t] .. first_block[t + 1] - 1
  int32_t size = 0;

  Table() { first_block[0] = 0; }

  bool full() const { return size == kSize; }
  unsigned blocks() const { return static_cast<unsigned>(first_block[size]); }
  void add(const Entry& entry, int64_t numel) {
    entries[size] = entry;
    first_block[size + 1] = first_block[size] + static_cast<int32_t>((numel + kChunk - 1) / kChunk);
    ++size;
  }

  // The entry that a block works on: the last one that begins at or before it.
  __device__ __forceinline__ int entry_of(int32_t block) const {
    int low = 0, high = size;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// Adds one entry after the other, and launches whenever a table is full, and at the end.
template <class Entry, class Launch>
class Launches {
 public:
  explicit Launches(const Launch& launch) : launch_(launch) {}

  void add(const Entry& entry, int64_t numel) {
    table_.add(entry, numel);
    if (table_.full()) flush();
  }
  void flush() {
    if (table_.size > 0) launch_(table_);
    table_ = Table<Entry>();
  }

 private:
  const Launch& launch_;
  Table<Entry> table_;
};

// The elements of a tensor that a block works on.
struct Chunk {
  int64_t begin;
  int count;

  __device__ __forceinline__ Chunk(int32_t chunk, int64_t numel) : begin(static_cast<int64_t>(chunk) * kChunk) {
    count = numel - begin < kChunk ? static_cast<int>(numel - begin) : kChunk;
  }
};

// The group (groups.h) of every element of a chunk. One 64-bit division for the chunk; the elements count in 32 bits
// from its beginning, where lengths beyond the chunk's are all the same.
struct ChunkGroups {
  int32_t first;  // the group of the first element
  int32_t next;   // where the next group begins, at most kChunk
  int32_t numel;  // elements of a group, at most kChunk
  int32_t last;   // what is left over after the last group belongs to it

  __host__ __device__ __forceinline__ ChunkGroups(int64_t begin, int64_t group_numel, int32_t groups) {
    const int64_t group = begin / group_numel, left = (group + 1) * group_numel - begin;
    last = groups - 1;
    first = group < last ? static_cast<int32_t>(group) : last;
    next = left < kChunk ? static_cast<int32_t>(left) : kChunk;
    numel = group_numel < kChunk ? static_cast<int32_t>(group_numel) : kChunk;
  }

  __host__ __device__ __forceinline__ int32_t of(int i) const {
    int32_t group = first;
    if (i >= next) group += 1 + (i - next) / numel;
    return group < last ? group : last;
  }
};

}  // namespace us3l::cuda
