// Winograd convolution F(4x4, 3x3): its transforms, and the table that holds them per instruction set. No torch headers.
//
//   forward   Y = A' [(G W G') . (B' X B)] A      per tile of 4x4 outputs; the product is elementwise over 6x6 positions,
//   backward  M = A dY A',  dX = B [M . U] B',  dW = G' [sum M . V] G      and a matrix product over the channels in each
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015. The backward is the exact adjoint: M serves
// both gradients, and dX is added up where the 6x6 windows of neighbouring tiles overlap.
#pragma once

#include <cstdint>
#include <type_traits>

#include "images.h"
#include "isa.h"
#include "rows.h"

namespace us3l {

constexpr std::int64_t kPositions = 36;

// The tiles of a batch of images, in the order image, row, column. The last row and column may hang over.
struct Grid {
  std::int64_t images, height, width, rows, columns;

  Grid(std::int64_t images, std::int64_t height, std::int64_t width)
      : images(images), height(height), width(width), rows((height + 3) / 4), columns((width + 3) / 4) {}
  std::int64_t tiles_of_image() const { return rows * columns; }
  std::int64_t tiles() const { return images * tiles_of_image(); }
};

struct Tiles {
  std::int64_t first, count;
};

// 36 matrices of tiles x channels, one for each position of the transformed tile. Rows may be longer than the channels;
// what is there is computed with (whole vectors), and never used.
struct Stack {
  float* data;
  std::int64_t position, row;

  Stack from_row(std::int64_t i) const { return {data + i * row, position, row}; }
};

// 3x3 filters seen as a matrix of rows x lanes of them: the lanes are the channels that go into a vector.
template <class T>
struct Filters {
  T* data;
  std::int64_t rows, lanes;               // how many
  std::int64_t row, lane, tap_y, tap_x;  // distances in elements
};

// A batch norm with ReLU that is done where a value is read: max((x - mean) * scale + bias, 0). mean and scale are
// [views][channels], bias is [channels]; a view is that many images. Outside of the images there are zeros all the same.
struct NormOnRead {
  const float *mean, *scale, *bias;
  std::int64_t images_of_view;
};

// The backward of a batch norm, done where the gradient is read: g * scale + (x - mean) * slope + offset, where x is the
// norm's input, and g the gradient where (x - mean) * scale + bias is positive; with bias null it is so everywhere.
template <class T>
struct NormBackwardOnRead {
  Pixels<const T> x;
  NormOnRead norm;
  const float *slope, *offset;  // [views][channels]
};

// Images of sums that are being added up. Not all are there: image i is in the place i % kept.
struct Accumulator {
  Pixels<float> pixels;
  std::int64_t kept;
};

template <class T>
struct WinogradImages {
  // v = B' x B, of norm(x) unless norm is null.
  void (*transform_input)(Grid grid, Tiles tiles, Pixels<const T> x, const NormOnRead* norm, Stack v);

  // y = A' m A + bias
  void (*transform_output)(Grid grid, Tiles tiles, Stack m, const float* bias, Pixels<T> y);

  // m = A dy A', where dy went back through the norm unless that is null.
  void (*transform_gradient)(Grid grid, Tiles tiles, Pixels<const T> dy, const NormBackwardOnRead<T>* norm, Stack m);
};

struct WinogradKernels {
  // G w G' of one panel: at most `lanes` lanes, the rest is zero. u [36][rows][lanes], its positions `position` apart.
  // around_cache: where all of them are more than the cache holds; rows are then whole vectors at aligned addresses.
  void (*transform_filters)(Filters<const float> w, float* u, std::int64_t position, bool around_cache);

  // Adds G' u G, where u [36][rows][row] is the sum of `copies` such stacks.
  void (*add_filter_gradients)(Stack u, std::int64_t copies, std::int64_t copy, Filters<float> w);

  // dx += the overlapping sum of B v B'; with `clear` the first tile of an image sets that to zero before.
  void (*add_input_gradients)(Grid grid, Tiles tiles, Stack v, Accumulator dx, bool clear);

  void (*to_bfloat16)(const float* from, std::int64_t count, BFloat16* to, bool add);  // to = or += from

  WinogradImages<float> images;
  WinogradImages<BFloat16> bfloat16_images;

  template <class T>
  const WinogradImages<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return images;
    else
      return bfloat16_images;
  }
};

namespace portable {
WinogradKernels winograd_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
WinogradKernels winograd_kernels();
}
namespace avx512 {
WinogradKernels winograd_kernels();
}
#endif

inline WinogradKernels winograd_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::winograd_kernels();
    case Isa::avx2:
      return avx2::winograd_kernels();
#endif
    default:
      return portable::winograd_kernels();
  }
}

}  // namespace us3l
