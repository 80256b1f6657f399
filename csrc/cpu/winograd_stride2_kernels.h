// 3x3 convolution with stride 2 and padding 1 by Winograd's algorithm: its transforms, and the table that holds them per
// instruction set. No torch headers.
//
// In one dimension y[i] = w0 x[2i - 1] + w1 x[2i] + w2 x[2i + 1]: the pixels of odd index meet two taps with stride 1,
// those of even index one. Four outputs of two taps are interpolated from five points, F(4, 2), and four of one tap from
// the finite four of them, F(4, 1), so that both are added up before the one transform back:
//
//   9 pixels -> 9 numbers ("slots"): 5 points of the odd pixels, then 4 of the even ones
//   3 taps   -> 9 numbers; products; slots of one point are added up -> 5 positions -> 4 outputs
//
// In two dimensions: 81 slots, 25 positions, 81 products in place of 144. The slots of one position come from 4, 2 or 1
// planes of pixels of equal parity; these lie side by side, so that their sum is that of one matrix product. The backward is
// the exact adjoint.
#pragma once

#include <cstdint>

#include "images.h"
#include "isa.h"
#include "winograd_kernels.h"

namespace us3l::stride2 {

constexpr int kPoints = 5, kPositions = kPoints * kPoints, kSlots = 81, kMostPlanes = 4;

// How many planes meet in a position; there is no even plane at the last point, infinity.
constexpr int planes_of(int position) {
  return (position / kPoints < kPoints - 1 ? 2 : 1) * (position % kPoints < kPoints - 1 ? 2 : 1);
}

// Slots: for each position a matrix with its planes side by side, `plane` apart.
struct Slots {
  float* data;
  std::int64_t position, plane, row;

  Slots from_row(std::int64_t i) const { return {data + i * row, position, plane, row}; }

  // The distance of slot (i, j) from the first.
  std::int64_t at(int i, int j) const {
    const int even_i = i >= kPoints, even_j = j >= kPoints;
    const int point_i = i - even_i * kPoints, point_j = j - even_j * kPoints;
    return (point_i * kPoints + point_j) * position + (even_i * (point_j < kPoints - 1 ? 2 : 1) + even_j) * plane;
  }
};

// A Grid is of tiles of 4x4 outputs. That of the input has the same tiles, and the size of the input's images.
struct Kernels {
  void (*transform_input)(Grid input, Tiles tiles, Pixels<const float> x, Slots v);

  // y = A' m A + bias
  void (*transform_output)(Grid output, Tiles tiles, Stack m, const float* bias, Pixels<float> y);

  // m = A dy A'
  void (*transform_gradient)(Grid output, Tiles tiles, Pixels<const float> dy, Stack m);

  // dx = the overlapping sum of B v B', of tiles that come in order.
  void (*set_input_gradients)(Grid input, Tiles tiles, Slots v, Pixels<float> dx);

  // G w G' of one panel: at most `lanes` lanes, the rest is zero.
  void (*transform_filters)(Filters<const float> w, Slots u);

  // Adds G' u G, where u is the sum of `copies` such.
  void (*add_filter_gradients)(Slots u, std::int64_t copies, std::int64_t copy, Filters<float> w);
};

}  // namespace us3l::stride2

namespace us3l {

namespace portable::stride2 {
us3l::stride2::Kernels kernels();
}
#if defined(__x86_64__)
namespace avx2::stride2 {
us3l::stride2::Kernels kernels();
}
namespace avx512::stride2 {
us3l::stride2::Kernels kernels();
}
#endif

namespace stride2 {

inline Kernels kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::stride2::kernels();
    case Isa::avx2:
      return avx2::stride2::kernels();
#endif
    default:
      return portable::stride2::kernels();
  }
}

}  // namespace stride2
}  // namespace us3l
