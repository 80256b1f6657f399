// 3x3 convolution, stride 1, padding 1, as Winograd F(4x4, 3x3): the plan around the kernels of winograd_kernels.h.
//
// The filters of the active slice are transformed in every call, a few per cent of it. The tiles then go through
// transform, product and transform back in one of two ways:
//
//   blocks      Each thread takes blocks of tiles that fit its L2 cache through all three. For many tiles.
//   positions   All tiles through each of the three, the product split among the threads by position. For many channels
//               and few tiles: there the filters are what does not fit, and each thread reads its positions' only.
//
// Work is cut by the number of threads alone and partial sums are merged in order: same threads, same bits.

#include <algorithm>
#include <optional>
#include <vector>

#include "../ops.h"
#include "gemm_kernels.h"
#include "scratch.h"
#include "tensors.h"
#include "winograd_kernels.h"

namespace us3l {
namespace {

void check_filters(const char* op, const char* name, const Tensor& t, int64_t out, int64_t in) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(0) >= out && t.size(1) >= in &&
                      t.size(2) == 3 && t.size(3) == 3,
                  op, ": ", name, ": expected float32 [>= ", out, ", >= ", in, ", 3, 3], got ", shape_of(t));
}

// [K, C, 3, 3] as a matrix of C x K filters, the output channels in the lanes.
template <class T>
Filters<T> output_lanes(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, in, out, t.stride(1), t.stride(0), t.stride(2), t.stride(3)};
}

template <class T>
Filters<T> input_lanes(T* data, const Tensor& t, int64_t out, int64_t in) {
  return {data, out, in, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The distance of two of 36 parallel streams: an odd number of cache lines, or they would share few sets of the cache.
int64_t odd_lines(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// Rows of transformed tiles; those of a multiple of 512 bytes get a line more, against the same sharing of sets.
int64_t row_of(int64_t channels) {
  const int64_t row = round_up(channels, 16);
  return row % 128 == 0 ? row + 16 : row;
}

struct Plan {
  // The rows of a product share what they read of its right side; more of them gain nothing.
  static constexpr int64_t kMostTiles = 112;

  Grid grid;
  int64_t in, out;  // channels
  GemmKernels gemm = gemm_kernels();
  WinogradKernels kernels = winograd_kernels();
  int64_t threads = torch::stable::get_num_threads();

  Plan(const Tensor& x, int64_t out) : grid(x.size(0), x.size(2), x.size(3)), in(x.size(1)), out(out) {}

  int64_t panels(int64_t channels) const { return (channels + gemm.lanes - 1) / gemm.lanes; }

  bool few_tiles() const { return grid.tiles() * (in + out) * kPositions <= int64_t{16} << 20; }  // 64 MiB
  bool by_positions() const { return threads > 1 && in * out >= 192 * 192 && few_tiles(); }

  // How many blocks of equal size to make of these tiles: what lies in 700 KiB, but enough rows for a good product.
  int64_t blocks(int64_t tiles) const {
    const int64_t fit = (700 << 10) / (kPositions * 4 * (row_of(in) + row_of(out)));
    const int64_t least = in * out >= 256 * 256 ? kMostTiles : in * out >= 128 * 128 ? 56 : 42;
    const int64_t block = std::clamp(fit, least, kMostTiles);
    return (tiles + block - 1) / block;
  }
};

// Memory for a Stack.
struct StackMemory : Stack {
  StackMemory(Scratch::Slot slot, int64_t tiles, int64_t channels)
      : Stack{nullptr, odd_lines(tiles * row_of(channels)), row_of(channels)}, memory(slot, kPositions * position) {
    data = memory.data();
  }
  Scratch memory;
};

// The filters, transformed: [36][panels][rows][lanes].
class TransformedFilters {
 public:
  TransformedFilters(const Plan& plan, const Filters<const float>& w)
      : panel_(w.rows * plan.gemm.lanes),
        lanes_(plan.gemm.lanes),
        position_(odd_lines(plan.panels(w.lanes) * panel_)),
        memory_(Scratch::kFilters, kPositions * position_) {
    float* const data = memory_.data();
    constexpr int64_t kRows = 64;  // to a task
    const int64_t parts = (w.rows + kRows - 1) / kRows;
    parallel(plan.panels(w.lanes) * parts, [&](int64_t i) {
      const int64_t panel = i / parts, row = i % parts * kRows, lane = panel * lanes_;
      Filters<const float> f = w;
      f.data += row * w.row + lane * w.lane;
      f.rows = std::min(kRows, w.rows - row);
      f.lanes = std::min(lanes_, w.lanes - lane);
      plan.kernels.transform_filters(f, data + panel * panel_ + row * lanes_, position_);
    });
  }

  Panels at(int64_t position) const { return {memory_.data() + position * position_, panel_, lanes_}; }

 private:
  int64_t panel_, lanes_, position_;
  Scratch memory_;
};

// c[tiles, columns] = a[tiles, depth] u[depth, columns] in one position.
void multiply_by_filters(const Plan& plan, int64_t position, int64_t tiles, Stack a, int64_t depth,
                         const TransformedFilters& u, int64_t columns, Stack c) {
  const float* const left = a.data + position * a.position;
  float* const result = c.data + position * c.position;
  for_parts({0, tiles}, (tiles + Plan::kMostTiles - 1) / Plan::kMostTiles, [&](Range r) {
    plan.gemm.multiply(r.end - r.begin, plan.panels(columns), depth, {left + r.begin * a.row, a.row, 1},
                          u.at(position), result + r.begin * c.row, c.row, false);
  });
}

void forward(const Plan& plan, Pixels<const float> x, Filters<const float> w, const float* bias, Pixels<float> y) {
  const WinogradKernels& kernels = plan.kernels;
  const int64_t tiles = plan.grid.tiles();
  const TransformedFilters u(plan, w);

  if (plan.by_positions()) {
    const StackMemory v(Scratch::kInput, tiles, plan.in), m(Scratch::kOutput, tiles, plan.out);
    parallel_parts(tiles, plan.threads, [&](Range r) {
      kernels.transform_input(plan.grid, {r.begin, r.end - r.begin}, x, v.from_row(r.begin));
    });
    parallel(kPositions, [&](int64_t i) { multiply_by_filters(plan, i, tiles, v, plan.in, u, plan.out, m); });
    parallel_parts(tiles, plan.threads, [&](Range r) {
      kernels.transform_output(plan.grid, {r.begin, r.end - r.begin}, m.from_row(r.begin), bias, y);
    });
    return;
  }

  parallel_parts(tiles, plan.threads, [&](Range own) {
    const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
    const StackMemory v(Scratch::kInput, block, plan.in), m(Scratch::kOutput, block, plan.out);
    for_parts(own, blocks, [&](Range r) {
      const int64_t count = r.end - r.begin;
      kernels.transform_input(plan.grid, {r.begin, count}, x, v);
      for (int64_t i = 0; i < kPositions; ++i) multiply_by_filters(plan, i, count, v, plan.in, u, plan.out, m);
      kernels.transform_output(plan.grid, {r.begin, count}, m, bias, y);
    });
  });
}

// Sums over the tiles of M' V, a matrix of output x input channels per position; one stack of them per thread.
struct FilterGradients {
  FilterGradients(const Plan& plan, int64_t copies)
      : plan(plan),
        copies(copies),
        row(round_up(plan.in, 16)),
        position(odd_lines(plan.out * row)),
        memory(Scratch::kFilterGradients, copies * kPositions * position) {}

  void multiply(int64_t copy, int64_t i, int64_t tiles, Stack m, Stack v, bool add) const {
    plan.gemm.multiply(plan.out, plan.panels(plan.in), tiles, {m.data + i * m.position, 1, m.row},
                          {v.data + i * v.position, plan.gemm.lanes, v.row},
                          memory.data() + (copy * kPositions + i) * position, row, add);
  }

  void add_to(Filters<float> w) const {
    parallel_parts(plan.out, plan.threads, [&](Range r) {
      Filters<float> f = w;
      f.data += r.begin * w.row;
      f.rows = r.end - r.begin;
      plan.kernels.add_filter_gradients({memory.data() + r.begin * row, position, row}, copies,
                                        kPositions * position, f);
    });
  }

  const Plan& plan;
  int64_t copies, row, position;
  Scratch memory;
};

void backward(const Plan& plan, Pixels<const float> x, Pixels<const float> dy, Filters<const float> w,
              const Filters<float>* dw, Pixels<float>* dx) {
  const WinogradKernels& kernels = plan.kernels;
  const int64_t per_image = plan.grid.tiles_of_image(), tiles = plan.grid.tiles();
  // dX is added up within an image, so that each thread has images of its own; blocks need one for each.
  const bool by_positions =
      plan.by_positions() || (plan.grid.images < plan.threads && plan.few_tiles());
  const int64_t threads = std::min(plan.threads, plan.grid.images);

  std::optional<TransformedFilters> u;
  if (dx != nullptr) u.emplace(plan, w);
  std::optional<FilterGradients> du;
  if (dw != nullptr) du.emplace(plan, by_positions ? 1 : threads);

  if (by_positions) {
    const StackMemory v(Scratch::kInput, tiles, plan.in), m(Scratch::kOutput, tiles, plan.out);
    parallel_parts(tiles, plan.threads, [&](Range r) {
      kernels.transform_gradient(plan.grid, {r.begin, r.end - r.begin}, dy, m.from_row(r.begin));
      if (du) kernels.transform_input(plan.grid, {r.begin, r.end - r.begin}, x, v.from_row(r.begin));
    });
    parallel(kPositions, [&](int64_t i) {
      if (du)
        for_parts({0, tiles}, (tiles + Plan::kMostTiles - 1) / Plan::kMostTiles, [&](Range r) {
          du->multiply(0, i, r.end - r.begin, m.from_row(r.begin), v.from_row(r.begin), r.begin > 0);
        });
      if (u) multiply_by_filters(plan, i, tiles, m, plan.out, *u, plan.in, v);
    });
    if (dx != nullptr)
      parallel_parts(plan.grid.images, threads, [&](Range images) {
        const Tiles own{images.begin * per_image, (images.end - images.begin) * per_image};
        kernels.add_input_gradients(plan.grid, own, v.from_row(own.first), *dx);
      });
  } else {
    parallel(threads, [&](int64_t thread) {
      const Range images = part(plan.grid.images, thread, threads);
      const Range own{images.begin * per_image, images.end * per_image};
      const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
      const StackMemory v(Scratch::kInput, block, plan.in), m(Scratch::kOutput, block, plan.out);
      for_parts(own, blocks, [&](Range r) {
        const int64_t count = r.end - r.begin;
        kernels.transform_gradient(plan.grid, {r.begin, count}, dy, m);
        if (du) {
          kernels.transform_input(plan.grid, {r.begin, count}, x, v);
          for (int64_t i = 0; i < kPositions; ++i) du->multiply(thread, i, count, m, v, r.begin > own.begin);
        }
        if (dx != nullptr) {
          for (int64_t i = 0; i < kPositions; ++i) multiply_by_filters(plan, i, count, m, plan.out, *u, plan.in, v);
          kernels.add_input_gradients(plan.grid, {r.begin, count}, v, *dx);
        }
      });
    });
  }
  if (du) du->add_to(*dw);
}

}  // namespace

Tensor conv2d_3x3(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels) {
  const char* op = "conv2d_3x3";
  check_images(op, "x", x);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  check_filters(op, "weight", weight, out_channels, x.size(1));
  std::vector<float> offset(out_channels);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->scalar_type() == ScalarType::Float && bias->size(0) >= out_channels, op,
                    ": bias: expected a float32 vector of at least ", out_channels, " elements, got ",
                    shape_of(*bias));
    for (int64_t k = 0; k < out_channels; ++k) offset[k] = bias->const_data_ptr<float>()[k * bias->stride(0)];
  }
  Tensor y = new_images(x, out_channels, x.size(2), x.size(3));
  if (y.numel() > 0)
    forward(Plan(x, out_channels), pixels(x),
            output_lanes(weight.const_data_ptr<float>(), weight, out_channels, x.size(1)), offset.data(),
            dense_pixels(y));
  return y;
}

Tensor conv2d_3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                           std::optional<Tensor> grad_weight, bool need_grad_x) {
  const char* op = "conv2d_3x3_backward";
  check_images(op, "x", x);
  check_images(op, "grad", grad);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(2) == x.size(2) && grad.size(3) == x.size(3), op,
                  ": grad: expected the images of x, ", shape_of(x), ", got ", shape_of(grad));
  const int64_t in = x.size(1), out = grad.size(1);
  check_filters(op, "weight", weight, out, in);
  const Tensor dy = channels_innermost(grad) ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);

  Tensor dx = need_grad_x ? new_images(x, in, x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || dy.numel() == 0) return dx;
  Filters<float> filters{};
  if (grad_weight.has_value()) {
    check_filters(op, "grad_weight", *grad_weight, out, in);
    filters = input_lanes(grad_weight->mutable_data_ptr<float>(), *grad_weight, out, in);
  }
  Pixels<float> gradient{};
  if (need_grad_x) gradient = dense_pixels(dx);
  backward(Plan(x, out), pixels(x), pixels(dy), input_lanes(weight.const_data_ptr<float>(), weight, out, in),
           grad_weight.has_value() ? &filters : nullptr, need_grad_x ? &gradient : nullptr);
  return dx;
}

}  // namespace us3l
