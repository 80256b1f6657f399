// 3x3 convolution, stride 2, padding 1, by Winograd's algorithm: the plan around the kernels of
// winograd_stride2_kernels.h. As in winograd.h the work goes one of two ways:
//
//   blocks     Each thread takes blocks of tiles through transform, product and transform back. For many tiles.
//   channels   All tiles are transformed; the threads then take blocks of channels, for which they transform the filters
//              and go all the way, so that no transform of all filters (9 times their memory) goes through memory.
//
// Work is cut by the number of threads alone and partial sums are merged in order: same threads, same bits.
#include <algorithm>
#include <optional>
#include <vector>

#include "../ops.h"
#include "scratch.h"
#include "winograd.h"
#include "winograd_stride2_kernels.h"

namespace us3l {

namespace {

namespace s2 = us3l::stride2;

struct Plan {
  static constexpr int64_t kFewTiles = 128;
  // Of those that the threads take, for few tiles: what is made of their filters, 83 KB a channel with 256 others, is to
  // stay in the L2 cache until it is used.
  static constexpr int64_t kBlockChannels = 16;

  int64_t in, out;
  Grid output, input;
  GemmKernels gemm = gemm_kernels();
  s2::Kernels kernels = s2::kernels();
  int64_t threads = torch::stable::get_num_threads();

  Plan(const Tensor& x, int64_t out)
      : in(x.size(1)), out(out), output(x.size(0), (x.size(2) + 1) / 2, (x.size(3) + 1) / 2), input(output) {
    input.height = x.size(2);
    input.width = x.size(3);
  }

  int64_t tiles() const { return output.tiles(); }
  bool by_channels() const { return tiles() <= kFewTiles; }
  int64_t padded(int64_t channels) const { return round_up(channels, gemm.lanes); }

  // How many blocks of equal size to make of these tiles: what lies in 700 KiB, but enough rows for a good product.
  int64_t blocks(int64_t tiles) const {
    const int64_t fit = (700 << 10) / (4 * (s2::kSlots * in + s2::kPositions * out));
    const int64_t least = in * out >= 128 * 128 ? WinogradPlan::kMostTiles : 42;
    const int64_t block = std::clamp(fit, least, WinogradPlan::kMostTiles);
    return (tiles + block - 1) / block;
  }
};

struct SlotsMemory : s2::Slots {
  SlotsMemory(Scratch::Slot slot, int64_t rows, int64_t plane)
      : Slots{nullptr, odd_lines(rows * row_of(s2::kMostPlanes * plane)), plane, row_of(s2::kMostPlanes * plane)},
        memory(slot, s2::kPositions * position) {
    data = memory.data();
  }
  Scratch memory;
};

struct PositionsMemory : Stack {
  PositionsMemory(Scratch::Slot slot, int64_t tiles, int64_t channels)
      : Stack{nullptr, odd_lines(tiles * row_of(channels)), row_of(channels)}, memory(slot, s2::kPositions * position) {
    data = memory.data();
  }
  Scratch memory;
};

// Filters transformed, in panels. The planes are stacked where they are summed over (the input channels in the rows: a panel
// has the rows of up to 4 planes), or are further panels.
class PlaneFilters {
 public:
  PlaneFilters(const Plan& plan, const Filters<const float>& w, bool stacked)
      : plan_(plan),
        w_(w),
        plane_(stacked ? w.rows * plan.gemm.lanes : w.rows * plan.padded(w.lanes)),
        panel_((stacked ? s2::kMostPlanes : 1) * w.rows * plan.gemm.lanes),
        position_(odd_lines(s2::kMostPlanes * w.rows * plan.padded(w.lanes))),
        memory_(Scratch::kFilters, s2::kPositions * position_) {}

  void transform(Range panels) const {
    const int64_t lanes = plan_.gemm.lanes;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      Filters<const float> f = w_;
      f.data += panel * lanes * w_.lane;
      f.lanes = std::min(lanes, w_.lanes - panel * lanes);
      plan_.kernels.transform_filters(f, {memory_.data() + panel * panel_, position_, plane_, lanes});
    }
  }

  int64_t panels() const { return plan_.padded(w_.lanes) / plan_.gemm.lanes; }
  int64_t columns() const { return w_.lanes; }

  Panels at(int64_t position) const { return {memory_.data() + position * position_, panel_, plan_.gemm.lanes}; }

 private:
  const Plan& plan_;
  Filters<const float> w_;
  int64_t plane_, panel_, position_;
  Scratch memory_;
};

// The filters of some of the lanes.
template <class T>
Filters<T> lanes_of(Filters<T> w, Range lanes) {
  w.data += lanes.begin * w.lane;
  w.lanes = lanes.end - lanes.begin;
  return w;
}

template <class T>
Pixels<T> channels_of(Pixels<T> pixels, Range channels) {
  pixels.data += channels.begin;
  pixels.channels = channels.end - channels.begin;
  return pixels;
}

// Calls f(channels) for blocks of them, in parallel; at least one for each thread, if they are whole vectors.
template <class F>
void parallel_channels(const Plan& plan, int64_t channels, int64_t most, const F& f) {
  const int64_t block = std::min(most, plan.padded((channels + plan.threads - 1) / plan.threads));
  parallel((channels + block - 1) / block, [&](int64_t i) {
    f(Range{i * block, std::min(channels, (i + 1) * block)});
  });
}

// m = v u, over the channels of all planes.
void multiply_forward(const Plan& plan, int64_t tiles, const s2::Slots& v, const PlaneFilters& u, const Stack& m) {
  for (int i = 0; i < s2::kPositions; ++i)
    plan.gemm.multiply(tiles, u.columns(), s2::planes_of(i) * plan.in, {v.data + i * v.position, v.row, 1}, u.at(i),
                       m.data + i * m.position, m.row, false);
}

// v = m u, for all planes.
void multiply_backward(const Plan& plan, int64_t tiles, const Stack& m, const PlaneFilters& u, const s2::Slots& v) {
  for (int i = 0; i < s2::kPositions; ++i)
    plan.gemm.multiply(tiles, s2::planes_of(i) * u.panels() * plan.gemm.lanes, plan.out,
                       {m.data + i * m.position, m.row, 1}, u.at(i), v.data + i * v.position, v.row, false);
}

void forward(const Plan& plan, Pixels<const float> x, Filters<const float> w, const float* bias, Pixels<float> y) {
  const int64_t tiles = plan.tiles();
  if (plan.by_channels()) {
    const SlotsMemory v(Scratch::kInput, tiles, plan.in);
    parallel_parts(tiles, balanced_parts(tiles, 1), [&](Range r) {
      plan.kernels.transform_input(plan.input, {r.begin, r.end - r.begin}, x, v.from_row(r.begin));
    });
    parallel_channels(plan, plan.out, Plan::kBlockChannels, [&](Range channels) {
      const PlaneFilters u(plan, lanes_of(w, channels), true);
      u.transform({0, u.panels()});
      const PositionsMemory m(Scratch::kOutput, tiles, plan.padded(channels.end - channels.begin));
      multiply_forward(plan, tiles, v, u, m);
      plan.kernels.transform_output(plan.output, {0, tiles}, m, bias + channels.begin, channels_of(y, channels));
    });
    return;
  }

  const PlaneFilters u(plan, w, true);
  parallel(u.panels(), [&](int64_t i) { u.transform({i, i + 1}); });
  parallel_parts(tiles, balanced_parts(tiles, WinogradPlan::kMostTiles), [&](Range own) {
    const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
    const SlotsMemory v(Scratch::kInput, block, plan.in);
    const PositionsMemory m(Scratch::kOutput, block, plan.out);
    for_parts(own, blocks, [&](Range r) {
      const Tiles part{r.begin, r.end - r.begin};
      plan.kernels.transform_input(plan.input, part, x, v);
      multiply_forward(plan, part.count, v, u, m);
      plan.kernels.transform_output(plan.output, part, m, bias, y);
    });
  });
}

// dw += the adjoint of the sums over the tiles of m' v, of a block of filters all positions at once, so that they stay in
// the L2 cache.
void add_filter_gradients(const Plan& plan, const Stack& m, const s2::Slots& v, Filters<float> dw) {
  constexpr int64_t kColumns = 32, kRows = 48;
  const int64_t tiles = plan.tiles(), column_blocks = (dw.lanes + kColumns - 1) / kColumns;
  parallel(column_blocks * plan.threads, [&](int64_t task) {
    const int64_t column = task / plan.threads * kColumns, width = std::min(kColumns, dw.lanes - column);
    const int64_t plane = plan.padded(width);
    const Range own = part(dw.rows, task % plan.threads, plan.threads);
    const SlotsMemory sums(Scratch::kFilterGradients, kRows, plane);
    for_parts(own, (own.end - own.begin + kRows - 1) / kRows, [&](Range r) {
      for (int i = 0; i < s2::kPositions; ++i)
        for (int p = 0; p < s2::planes_of(i); ++p)
          plan.gemm.multiply(r.end - r.begin, width, tiles,
                             {m.data + i * m.position + r.begin, 1, m.row},
                             {v.data + i * v.position + p * v.plane + column, plan.gemm.lanes, v.row},
                             sums.data + i * sums.position + p * plane, sums.row, false);
      Filters<float> f = lanes_of(dw, {column, column + width});
      f.data += r.begin * f.row;
      f.rows = r.end - r.begin;
      plan.kernels.add_filter_gradients(sums, 1, 0, f);
    });
  });
}

// dw (added to) and dx (set) are left out where they are null. w and dw have the input channels in the lanes.
void backward(const Plan& plan, Pixels<const float> dy, Pixels<const float> x, Filters<const float> w,
              const Filters<float>* dw, const Pixels<float>* dx) {
  const int64_t tiles = plan.tiles(), plane = plan.padded(plan.in);
  if (plan.by_channels()) {
    const PositionsMemory m(Scratch::kOutput, tiles, plan.out);
    std::optional<SlotsMemory> v;
    if (dw != nullptr) v.emplace(Scratch::kInput, tiles, plane);
    parallel_parts(tiles, balanced_parts(tiles, 1), [&](Range r) {
      const Tiles part{r.begin, r.end - r.begin};
      plan.kernels.transform_gradient(plan.output, part, dy, m.from_row(r.begin));
      if (v) plan.kernels.transform_input(plan.input, part, x, v->from_row(r.begin));
    });
    if (dw != nullptr) add_filter_gradients(plan, m, *v, *dw);
    if (dx == nullptr) return;
    parallel_channels(plan, plan.in, Plan::kBlockChannels, [&](Range channels) {
      const PlaneFilters u(plan, lanes_of(w, channels), false);
      u.transform({0, u.panels()});
      const SlotsMemory gradient(Scratch::kImages, tiles, plan.padded(channels.end - channels.begin));
      multiply_backward(plan, tiles, m, u, gradient);
      plan.kernels.set_input_gradients(plan.input, {0, tiles}, gradient, channels_of(*dx, channels));
    });
    return;
  }

  std::optional<PlaneFilters> u;
  if (dx != nullptr) {
    u.emplace(plan, w, false);
    parallel(u->panels(), [&](int64_t i) { u->transform({i, i + 1}); });
  }
  // dX is added up within an image, so that each thread has images of its own.
  const int64_t threads = std::min(plan.threads, plan.output.images);
  std::optional<SlotsMemory> sums;
  if (dw != nullptr) sums.emplace(Scratch::kFilterGradients, threads * plan.out, plane);
  parallel(threads, [&](int64_t thread) {
    const Range images = part(plan.output.images, thread, threads);
    const int64_t per_image = plan.output.tiles_of_image();
    const Range own{images.begin * per_image, images.end * per_image};
    const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
    const SlotsMemory v(Scratch::kInput, block, plane);
    const PositionsMemory m(Scratch::kOutput, block, plan.out);
    for_parts(own, blocks, [&](Range r) {
      const Tiles tiles{r.begin, r.end - r.begin};
      plan.kernels.transform_gradient(plan.output, tiles, dy, m);
      if (sums) {
        plan.kernels.transform_input(plan.input, tiles, x, v);
        const s2::Slots own_sums = sums->from_row(thread * plan.out);
        for (int i = 0; i < s2::kPositions; ++i)
          plan.gemm.multiply(plan.out, s2::planes_of(i) * plane, tiles.count,
                             {m.data + i * m.position, 1, m.row}, {v.data + i * v.position, plan.gemm.lanes, v.row},
                             own_sums.data + i * own_sums.position, own_sums.row, r.begin > own.begin);
      }
      if (u) {
        multiply_backward(plan, tiles.count, m, *u, v);
        plan.kernels.set_input_gradients(plan.input, tiles, v, *dx);
      }
    });
  });
  if (sums)
    parallel_parts(plan.out, plan.threads, [&](Range r) {
      Filters<float> f = *dw;
      f.data += r.begin * f.row;
      f.rows = r.end - r.begin;
      plan.kernels.add_filter_gradients(sums->from_row(r.begin), threads, plan.out * sums->row, f);
    });
}

}  // namespace

Tensor conv2d_3x3_stride2(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels) {
  const char* op = "conv2d_3x3_stride2";
  check_images(op, "x", x);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  check_filters(op, "weight", weight, out_channels, x.size(1));
  const std::vector<float> offset = bias_of(op, bias, out_channels);
  const Plan plan(x, out_channels);
  Tensor y = new_images(x, out_channels, plan.output.height, plan.output.width);
  if (y.numel() == 0) return y;
  forward(plan, pixels(x), output_lanes(weight.const_data_ptr<float>(), weight, plan.out, plan.in), offset.data(),
          dense_pixels(y));
  return y;
}

Tensor conv2d_3x3_stride2_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                   std::optional<Tensor> grad_weight, bool need_grad_x) {
  const char* op = "conv2d_3x3_stride2_backward";
  check_images(op, "x", x);
  check_images(op, "grad", grad);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  const Plan plan(x, grad.size(1));
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(2) == plan.output.height && grad.size(3) == plan.output.width,
                  op, ": grad: expected the images of the output for x ", shape_of(x), ", got ", shape_of(grad));
  check_filters(op, "weight", weight, plan.out, plan.in);
  if (grad_weight.has_value()) check_filters(op, "grad_weight", *grad_weight, plan.out, plan.in);
  Tensor dx = need_grad_x ? new_images(x, plan.in, x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || grad.numel() == 0) return need_grad_x ? torch::stable::zero_(dx) : dx;

  const Tensor dy = channels_innermost(grad) ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  Filters<float> dw{};
  if (grad_weight.has_value())
    dw = input_lanes(grad_weight->mutable_data_ptr<float>(), *grad_weight, plan.out, plan.in);
  Pixels<float> gradient{};
  if (need_grad_x) gradient = dense_pixels(dx);
  backward(plan, pixels(dy), pixels(x), input_lanes(weight.const_data_ptr<float>(), weight, plan.out, plan.in),
           grad_weight.has_value() ? &dw : nullptr, need_grad_x ? &gradient : nullptr);
  return dx;
}

}  // namespace us3l
