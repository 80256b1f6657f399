// csrc/cuda/tensor_cores.h on the CPU. What a warp does together its threads do one after the other: each leaves what it
// has, waits for the others, and takes what it is given.
//
// Copies happen as late as a GPU may make them, when they are waited for, or now and then at once, which it may as well: a
// wait that is missing, or a barrier before or behind it, changes results.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "cuda_host.h"

namespace us3l::cuda_host {

constexpr unsigned kWarp = Block::kWarp, kMostThreads = 1024;

// What every thread has left for the others of its warp: twice, since one may come to the next exchange before another
// has read.
struct Left {
  const void* row;
  uint32_t a[4], b[2];
};
inline Left left[kMostThreads][2];
inline unsigned exchanges[kMostThreads];

inline unsigned lane() { return threadIdx.x % kWarp; }

// Leaves `mine`, and returns what thread t of the warp has left, as a function of t.
inline auto exchange(const Left& mine) {
  const unsigned turn = exchanges[threadIdx.x]++ % 2, warp = threadIdx.x - lane();
  left[threadIdx.x][turn] = mine;
  Block::warp_barrier();
  return [=](unsigned t) -> const Left& { return left[warp + t][turn]; };
}

inline void check_aligned(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0) return;
  std::fprintf(stderr, "16 bytes at %p: not aligned\n", pointer);
  std::abort();
}

// Element `column` of row `row` of matrix `matrix`, where 8 threads have left the addresses of its rows.
template <class Lefts>
uint16_t element(const Lefts& lefts, unsigned matrix, unsigned row, unsigned column) {
  uint16_t value;
  std::memcpy(&value, static_cast<const uint16_t*>(lefts(matrix * 8 + row).row) + column, sizeof(value));
  return value;
}

inline void load_matrices(const void* row, uint32_t (&to)[4], bool transposed) {
  check_aligned(row);
  const auto lefts = exchange({row, {}, {}});
  const unsigned line = lane() / 4, pair = lane() % 4 * 2;
  for (unsigned m = 0; m < 4; ++m) {
    const uint16_t low = transposed ? element(lefts, m, pair, line) : element(lefts, m, line, pair);
    const uint16_t high = transposed ? element(lefts, m, pair + 1, line) : element(lefts, m, line, pair + 1);
    to[m] = low | static_cast<uint32_t>(high) << 16;
  }
}

struct Copy {
  void* to;
  const void* from;
  bool inside;

  void make() const {
    if (inside)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
  }
};
inline std::vector<std::vector<Copy>> groups[kMostThreads] = {};  // of copies, the last is not ended

}  // namespace us3l::cuda_host

namespace us3l::cuda {

inline void copy_async(void* to, const void* from, bool inside) {
  cuda_host::check_aligned(to);
  cuda_host::check_aligned(from);
  const cuda_host::Copy copy{to, from, inside};
  auto& groups = cuda_host::groups[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  if (cuda_host::Block::at_once())
    copy.make();
  else
    groups.back().push_back(copy);
}

inline void end_group() {
  auto& groups = cuda_host::groups[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

template <int Left>
void wait_for_groups() {
  auto& groups = cuda_host::groups[threadIdx.x];
  while (groups.size() > Left + 1) {
    for (const auto& copy : groups.front()) copy.make();
    groups.erase(groups.begin());
  }
}

inline void load_matrices(const void* row, uint32_t (&to)[4]) { cuda_host::load_matrices(row, to, false); }

inline void load_transposed(const void* row, uint32_t (&to)[4]) { cuda_host::load_matrices(row, to, true); }

template <class T>
void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sum)[4]) {
  const auto value = [](uint32_t word, unsigned half) {
    return static_cast<float>(T(static_cast<unsigned short>(word >> 16 * half), T::from_bits()));
  };
  const auto lefts = cuda_host::exchange({nullptr, {a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = cuda_host::lane() / 4, lower = i / 2, column = cuda_host::lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned thread = k % 8 / 2, right = k / 8;
      sum[i] += value(lefts(row * 4 + thread).a[lower + 2 * right], k % 2) *
                value(lefts(column * 4 + thread).b[right], k % 2);
    }
  }
}

}  // namespace us3l::cuda
