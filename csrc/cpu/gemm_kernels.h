// Matrix products of float32 and of bfloat16, and the tables that hold them per instruction set. No torch headers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace us3l {

// a(i, k) = data[i * row + k * column]; or, where columns come in runs, data[i * row + k / run * next + k % run * column]
struct Matrix {
  const float* data;
  std::int64_t row, column;
  std::int64_t run = 0, next = 0;
};

// b(k, panel * lanes + j) = data[panel * panel_distance + k * row + j]
struct Panels {
  const float* data;
  std::int64_t panel, row;
};

// The rows of a block share what they read of the right side, and a block of a few hundred KiB stays in the L2 cache.
constexpr std::int64_t kMostRows = 112, kLeastRows = 56, kBlock = 64 << 10;  // the last in floats

// Memory that will soon be read or written, up to four stretches of it. A product asks for them, line by line between its
// steps: so they come into the L2 cache while it computes. Where they are left to the passes over them, or to the hardware,
// one waits for the other. Nothing comes of addresses beyond the end of anything.
class Ahead {
 public:
  struct Lines {
    std::uintptr_t at;
    std::int64_t step;  // bytes
  };

  // Rows begin .. end - 1 of so many columns, if they are dense, for others have more between them, and no more than a
  // block, for more would push out of the cache what is in use.
  void add_rows(Rows<const float> x, std::int64_t columns, std::int64_t begin, std::int64_t end) {
    if (x.stride != columns || begin >= end || (end - begin) * columns > kBlock || count_ == kMost) return;
    const float* const data = x.data;
    stretches_[count_++] = {reinterpret_cast<std::uintptr_t>(data + begin * columns),
                            reinterpret_cast<std::uintptr_t>(data + end * columns)};
  }

  // Where to ask for so many lines, of the stretches in turn; once all are done, for one that is there.
  Lines next(std::int64_t lines, const float* there) {
    for (int i = 0; i < count_; ++i) {
      Stretch& s = stretches_[turn_++ % count_];
      if (s.at >= s.end) continue;
      const Lines found{s.at, kLine};
      s.at += lines * kLine;
      return found;
    }
    return {reinterpret_cast<std::uintptr_t>(there), 0};
  }

 private:
  static constexpr std::int64_t kLine = 64;
  struct Stretch {
    std::uintptr_t at, end;
  };
  static constexpr int kMost = 4;
  Stretch stretches_[kMost];
  int count_ = 0, turn_ = 0;
};

struct GemmKernels {
  std::int64_t lanes;  // columns to a panel

  bool whole_halves(std::int64_t columns) const { return columns % (lanes / 2) == 0; }

  // c(i, :) = or += sum over k < depth of a(i, k) b(k, :); `add` says which. Columns are computed, and must be there,
  // up to a multiple of half a panel. The depth is one of whole runs.
  void multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix a, Panels b, float* c,
                std::int64_t c_row, bool add) const {
    Ahead nothing;
    multiply(rows, columns, depth, a, b, c, c_row, add, nothing);
  }
  void multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix a, Panels b, float* c,
                std::int64_t c_row, bool add, Ahead& ahead) const {
    product(rows, columns, depth, a, b, c, c_row, add, ahead);
  }
  void (*product)(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix a, Panels b, float* c,
                  std::int64_t c_row, bool add, Ahead& ahead);

  // b [panels][depth][lanes], its panels `panel` apart, of a matrix of depth x columns; zero past its columns. One of
  // the matrix's distances is best 1.
  void (*pack)(std::int64_t depth, std::int64_t columns, Matrix from, float* b, std::int64_t panel);

  // to(i, :) = from(i, :), for rows of so many columns; the distances are those of two rows.
  void (*copy_rows)(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, float* to,
                    std::int64_t to_row);

  // sums[j] += sum over i < rows of a[i * row + j].
  void (*add_rows)(std::int64_t rows, std::int64_t columns, const float* a, std::int64_t row, double* sums);
};

// The same of bfloat16, summed in float32: what the matrices a and b consist of, and what is packed and copied, are words
// of two neighbours in depth. A word goes by the type float, which nothing but `multiply` reads as a number.
struct GemmPairKernels : GemmKernels {
  // words(j) = first(j), second(j).
  void (*pair_rows)(std::int64_t columns, const BFloat16* first, const BFloat16* second, float* words);

  // The same of what is rounded to bfloat16.
  void (*round_pairs)(std::int64_t columns, const float* first, const float* second, float* words);

  // to(i, :) = from(i, :) in bfloat16.
  void (*round_rows)(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, BFloat16* to,
                     std::int64_t to_row);
};

namespace portable {
GemmKernels gemm_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
GemmKernels gemm_kernels();
}
namespace avx512 {
GemmKernels gemm_kernels();
}
namespace avx512bf16 {
GemmPairKernels gemm_pair_kernels();
}
#endif

inline GemmKernels gemm_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::gemm_kernels();
    case Isa::avx2:
      return avx2::gemm_kernels();
#endif
    default:
      return portable::gemm_kernels();
  }
}

// Only where has_bfloat16_pairs() of isa.h.
inline GemmPairKernels gemm_pair_kernels() {
#if defined(__x86_64__)
  return avx512bf16::gemm_pair_kernels();
#else
  return {};
#endif
}

}  // namespace us3l
