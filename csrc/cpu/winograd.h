// 3x3 convolution, stride 1, padding 1, as Winograd F(4x4, 3x3): the plan around the kernels of winograd_kernels.h.
//
// The filters are transformed in every call, or come transformed (a weight is used many times between two updates). The
// tiles then go through transform, product and transform back in one of two ways:
//
//   blocks      Each thread takes blocks of tiles that fit its L2 cache through all three. For many tiles.
//   positions   All tiles through each of the three, the product split among the threads by position. For many channels
//               and few tiles: there the filters are what does not fit, and each thread reads its positions' only.
//
// Work is cut by the number of threads alone and partial sums are merged in order: same threads, same bits.
#pragma once

#include <functional>
#include <optional>

#include "gemm_kernels.h"
#include "tensors.h"
#include "winograd_kernels.h"

namespace us3l {

struct WinogradPlan {
  // The rows of a product share what they read of its right side; more of them gain nothing.
  static constexpr int64_t kMostTiles = 112;

  Grid grid;
  int64_t in, out;  // channels
  GemmKernels gemm = gemm_kernels();
  WinogradKernels kernels = winograd_kernels();
  int64_t threads = torch::stable::get_num_threads();

  WinogradPlan(const Tensor& x, int64_t out) : grid(x.size(0), x.size(2), x.size(3)), in(x.size(1)), out(out) {}

  int64_t panels(int64_t channels) const { return (channels + gemm.lanes - 1) / gemm.lanes; }
  bool few_tiles() const;
  bool by_positions() const;
  int64_t blocks(int64_t tiles) const;
  int64_t parts() const;
  int64_t parts_with_filter_gradients() const;
};

// Checks weight [>= out, >= in, 3, 3], float32.
void check_filters(const char* op, const char* name, const Tensor& t, int64_t out, int64_t in);

// The active filters of a weight, as a matrix of rows x lanes; maybe with the transform of ALL its filters, of which
// these are a prefix: `whole` rows, and that distance of two positions.
struct WinogradFilters {
  Filters<const float> active;
  const float* transformed = nullptr;
  int64_t whole = 0, position = 0;
};

// Checks weight [>= plan.out, >= plan.in, 3, 3] and what winograd_filters (ops.h) made of it, if anything.
WinogradFilters winograd_filters_of(const char* op, const WinogradPlan& plan, const Tensor& weight,
                                    const std::optional<Tensor>& transformed, bool input_channels_in_lanes);

// The output channels in the lanes, as the forward needs them, or the input channels, as the backward does.
template <class T>
Filters<T> output_lanes(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, in, out, t.stride(1), t.stride(0), t.stride(2), t.stride(3)};
}

template <class T>
Filters<T> input_lanes(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, out, in, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// What is told of images that are complete, while they are in the cache: by which part of the work, and which. A part
// tells of its images in order; there are at most plan.parts().
using ImagesDone = std::function<void(int64_t part, Range images)>;

// y = conv(norm(x)) + bias, of x itself with norm null. `done` (may be empty) hears of y's images.
template <class T>
void winograd_forward(const WinogradPlan& plan, Pixels<const T> x, const NormOnRead* norm, const WinogradFilters& w,
                      const float* bias, Pixels<T> y, const ImagesDone& done);

template <class T>
struct WinogradBackward {
  Pixels<const T> x, dy;
  const NormOnRead* norm_of_x = nullptr;                // the convolution's input is norm(x)
  const NormBackwardOnRead<T>* norm_of_dy = nullptr;    // its output's gradient is that of a norm whose output's is dy
  WinogradFilters w;                                    // with the input channels in the lanes
  const Filters<float>* dw = nullptr;                   // added to, unless null
  Pixels<T>* dx = nullptr;                              // dense
  bool add_to_dx = false;
  ImagesDone done;                                      // hears of dx's images
};

template <class T>
void winograd_backward(const WinogradPlan& plan, const WinogradBackward<T>& work);

}  // namespace us3l
