#include "winograd.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "scratch.h"

namespace us3l {

void check_filters(const char* op, const char* name, const Tensor& t, int64_t out, int64_t in) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(0) >= out && t.size(1) >= in &&
                      t.size(2) == 3 && t.size(3) == 3,
                  op, ": ", name, ": expected float32 [>= ", out, ", >= ", in, ", 3, 3], got ", shape_of(t));
}

namespace {

// Memory for a Stack.
struct StackMemory : Stack {
  StackMemory(Scratch::Slot slot, int64_t tiles, int64_t channels)
      : Stack{nullptr, odd_lines(tiles * row_of(channels)), row_of(channels)}, memory(slot, kPositions * position) {
    data = memory.data();
  }
  Scratch memory;
};

// The transform of filters: [36][panels][rows][lanes], the positions an odd number of cache lines apart.
struct TransformedShape {
  int64_t lanes, panel, position;

  TransformedShape(const WinogradPlan& plan, int64_t rows, int64_t columns)
      : lanes(plan.gemm.lanes), panel(rows * lanes), position(odd_lines(plan.panels(columns) * panel)) {}
};

void transform(const WinogradPlan& plan, const Filters<const float>& w, const TransformedShape& shape, float* u) {
  constexpr int64_t kRows = 64;  // to a task
  const int64_t parts = (w.rows + kRows - 1) / kRows;
  const bool around_cache = kPositions * shape.position * 4 > int64_t{24} << 20;
  parallel(plan.panels(w.lanes) * parts, [&](int64_t i) {
    const int64_t panel = i / parts, row = i % parts * kRows, lane = panel * shape.lanes;
    Filters<const float> f = w;
    f.data += row * w.row + lane * w.lane;
    f.rows = std::min(kRows, w.rows - row);
    f.lanes = std::min(shape.lanes, w.lanes - lane);
    plan.kernels.transform_filters(f, u + panel * shape.panel + row * shape.lanes, shape.position,
                                   around_cache);
  });
}

class TransformedFilters {
 public:
  TransformedFilters(const WinogradPlan& plan, const WinogradFilters& w)
      : shape_(plan, w.transformed != nullptr ? w.whole : w.active.rows, w.active.lanes), data_(w.transformed) {
    if (data_ != nullptr) {
      shape_.position = w.position;
      return;
    }
    memory_.emplace(Scratch::kFilters, kPositions * shape_.position);
    transform(plan, w.active, shape_, memory_->data());
    data_ = memory_->data();
  }

  Panels at(int64_t position) const { return {data_ + position * shape_.position, shape_.panel, shape_.lanes}; }

 private:
  TransformedShape shape_;
  std::optional<Scratch> memory_;
  const float* data_;
};

// c[tiles, columns] = a[tiles, depth] u[depth, columns] in one position.
void multiply_by_filters(const WinogradPlan& plan, int64_t position, int64_t tiles, Stack a, int64_t depth,
                         const TransformedFilters& u, int64_t columns, Stack c) {
  const float* const left = a.data + position * a.position;
  float* const result = c.data + position * c.position;
  for_parts({0, tiles}, (tiles + WinogradPlan::kMostTiles - 1) / WinogradPlan::kMostTiles, [&](Range r) {
    plan.gemm.multiply(r.end - r.begin, columns, depth, {left + r.begin * a.row, a.row, 1},
                       u.at(position), result + r.begin * c.row, c.row, false);
  });
}

// Sums over the tiles of M' V, a matrix of output x input channels per position; one stack of them per part of the work.
struct FilterGradients {
  FilterGradients(const WinogradPlan& plan, int64_t copies)
      : plan(plan),
        copies(copies),
        row(round_up(plan.in, 16)),
        position(odd_lines(plan.out * row)),
        memory(Scratch::kFilterGradients, copies * kPositions * position) {}

  void multiply(int64_t copy, int64_t i, int64_t tiles, Stack m, Stack v, bool add) const {
    plan.gemm.multiply(plan.out, plan.in, tiles, {m.data + i * m.position, 1, m.row},
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

  const WinogradPlan& plan;
  int64_t copies, row, position;
  Scratch memory;
};

// The same for few tiles: of a block of filters all positions at once, so that their sums do not go through memory on
// their way into the gradient.
constexpr int64_t kFewTilesForBlocks = 288;

void add_filter_gradients_by_blocks(const WinogradPlan& plan, int64_t tiles, Stack m, Stack v, Filters<float> w) {
  // A block's columns of v stay in the L2 cache (576 KiB) while its rows go by.
  const int64_t columns = tiles <= kFewTilesForBlocks / 4 ? 64 : tiles <= kFewTilesForBlocks / 2 ? 32 : 16;
  const int64_t rows = 1536 / columns / 6 * 6, column_blocks = (w.lanes + columns - 1) / columns;
  parallel(column_blocks * plan.threads, [&](int64_t task) {
    const int64_t column = task / plan.threads * columns, width = std::min(columns, w.lanes - column);
    const int64_t row_of_block = plan.panels(width) * plan.gemm.lanes;
    const int64_t position = odd_lines(rows * row_of_block);
    const Scratch sums(Scratch::kFilterGradients, kPositions * position);
    const Range own = part(w.rows, task % plan.threads, plan.threads);
    for_parts(own, (own.end - own.begin + rows - 1) / rows, [&](Range r) {
      for (int64_t i = 0; i < kPositions; ++i)
        plan.gemm.multiply(r.end - r.begin, width, tiles, {m.data + i * m.position + r.begin, 1, m.row},
                           {v.data + i * v.position + column, plan.gemm.lanes, v.row}, sums.data() + i * position,
                           row_of_block, false);
      Filters<float> f = w;
      f.data += r.begin * w.row + column * w.lane;
      f.rows = r.end - r.begin;
      f.lanes = width;
      plan.kernels.add_filter_gradients({sums.data(), position, row_of_block}, 1, 0, f);
    });
  });
}

// One part's images of dX, from their first tile to their last.
template <class T>
class InputGradients {
 public:
  InputGradients(const WinogradPlan& plan, const WinogradBackward<T>& work, int64_t part, Range images, int64_t block)
      : plan_(plan), work_(work), part_(part), done_(images.begin) {
    if constexpr (kFloat) {
      sums_ = {*work.dx, plan.grid.images};
    } else {  // added up in float, of as many images as a block of tiles can touch
      const int64_t kept = std::min(images.end - images.begin, (block - 1) / plan.grid.tiles_of_image() + 2);
      memory_.emplace(Scratch::kImages, kept * work.dx->image);
      sums_ = {{memory_->data(), plan.in, work.dx->image, work.dx->row, work.dx->pixel}, kept};
    }
  }

  void add(Range tiles, Stack v) {
    plan_.kernels.add_input_gradients(plan_.grid, {tiles.begin, tiles.end - tiles.begin}, v, sums_,
                                      !kFloat || !work_.add_to_dx);
    const Range done{done_, tiles.end / plan_.grid.tiles_of_image()};
    if (done.begin == done.end) return;
    if constexpr (!kFloat) {
      const int64_t size = work_.dx->image;
      for (int64_t i = done.begin; i < done.end; ++i)
        plan_.kernels.to_bfloat16(sums_.pixels.data + i % sums_.kept * size, size, work_.dx->data + i * size,
                                  work_.add_to_dx);
    }
    if (work_.done) work_.done(part_, done);
    done_ = done.end;
  }

 private:
  static constexpr bool kFloat = std::is_same_v<T, float>;

  const WinogradPlan& plan_;
  const WinogradBackward<T>& work_;
  int64_t part_, done_;
  std::optional<Scratch> memory_;
  Accumulator sums_;
};

}  // namespace

bool WinogradPlan::few_tiles() const {
  return grid.tiles() * (in + out) * kPositions <= int64_t{16} << 20;  // 64 MiB
}

bool WinogradPlan::by_positions() const { return threads > 1 && in * out >= 192 * 192 && few_tiles(); }

// How many blocks of equal size to make of these tiles: what lies in 700 KiB, but enough rows for a good product.
int64_t WinogradPlan::blocks(int64_t tiles) const {
  const int64_t fit = (700 << 10) / (kPositions * 4 * (row_of(in) + row_of(out)));
  const int64_t least = in * out >= 256 * 256 ? kMostTiles : in * out >= 128 * 128 ? 56 : 42;
  const int64_t block = std::clamp(fit, least, kMostTiles);
  return (tiles + block - 1) / block;
}

int64_t WinogradPlan::parts() const { return balanced_parts(grid.tiles(), kMostTiles / 2); }

// The same where each part has sums of its own that go through the cache.
int64_t WinogradPlan::parts_with_filter_gradients() const {
  const int64_t size = kPositions * out * round_up(in, 16) * 4;
  return std::clamp(((int64_t{8} << 20) / size) / threads * threads, threads, parts());
}

template <class T>
void winograd_forward(const WinogradPlan& plan, Pixels<const T> x, const NormOnRead* norm, const WinogradFilters& w,
                      const float* bias, Pixels<T> y, const ImagesDone& done) {
  const WinogradImages<T>& kernels = plan.kernels.template of<T>();
  const int64_t tiles = plan.grid.tiles(), per_image = plan.grid.tiles_of_image();
  const TransformedFilters u(plan, w);
  // Only a part with whole images can tell when they are complete.
  const int64_t parts = done ? std::min(plan.parts(), plan.grid.images) : plan.parts();

  if (plan.by_positions() || (parts < plan.threads && plan.few_tiles())) {
    const StackMemory v(Scratch::kInput, tiles, plan.in), m(Scratch::kOutput, tiles, plan.out);
    parallel_parts(tiles, plan.parts(), [&](Range r) {
      kernels.transform_input(plan.grid, {r.begin, r.end - r.begin}, x, norm, v.from_row(r.begin));
    });
    parallel(kPositions, [&](int64_t i) { multiply_by_filters(plan, i, tiles, v, plan.in, u, plan.out, m); });
    parallel(parts, [&](int64_t i) {
      const Range images = part(plan.grid.images, i, parts);
      const Range r = done ? Range{images.begin * per_image, images.end * per_image} : part(tiles, i, parts);
      if (r.begin == r.end) return;
      kernels.transform_output(plan.grid, {r.begin, r.end - r.begin}, m.from_row(r.begin), bias, y);
      if (done) done(i, images);
    });
    return;
  }

  parallel(parts, [&](int64_t i) {
    const Range images = part(plan.grid.images, i, parts);
    const Range own = done ? Range{images.begin * per_image, images.end * per_image} : part(tiles, i, parts);
    if (own.begin == own.end) return;
    const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
    const StackMemory v(Scratch::kInput, block, plan.in), m(Scratch::kOutput, block, plan.out);
    int64_t complete = images.begin;
    for_parts(own, blocks, [&](Range r) {
      const int64_t count = r.end - r.begin;
      kernels.transform_input(plan.grid, {r.begin, count}, x, norm, v);
      for (int64_t k = 0; k < kPositions; ++k) multiply_by_filters(plan, k, count, v, plan.in, u, plan.out, m);
      kernels.transform_output(plan.grid, {r.begin, count}, m, bias, y);
      if (!done || r.end / per_image == complete) return;
      done(i, {complete, r.end / per_image});
      complete = r.end / per_image;
    });
  });
}

template <class T>
void winograd_backward(const WinogradPlan& plan, const WinogradBackward<T>& work) {
  const WinogradImages<T>& kernels = plan.kernels.template of<T>();
  const int64_t per_image = plan.grid.tiles_of_image(), tiles = plan.grid.tiles();
  // dX is added up within an image, so that each thread has images of its own; blocks need one for each.
  const bool by_positions = plan.by_positions() || (plan.grid.images < plan.threads && plan.few_tiles());

  std::optional<TransformedFilters> u;
  if (work.dx != nullptr) u.emplace(plan, work.w);

  if (by_positions) {
    const StackMemory v(Scratch::kInput, tiles, plan.in), m(Scratch::kOutput, tiles, plan.out);
    parallel_parts(tiles, plan.parts(), [&](Range r) {
      const Tiles own{r.begin, r.end - r.begin};
      kernels.transform_gradient(plan.grid, own, work.dy, work.norm_of_dy, m.from_row(r.begin));
      if (work.dw) kernels.transform_input(plan.grid, own, work.x, work.norm_of_x, v.from_row(r.begin));
    });
    const bool by_blocks = tiles <= kFewTilesForBlocks;
    std::optional<FilterGradients> du;
    if (work.dw && by_blocks) add_filter_gradients_by_blocks(plan, tiles, m, v, *work.dw);
    if (work.dw && !by_blocks) du.emplace(plan, 1);
    parallel(kPositions, [&](int64_t i) {
      if (du)
        for_parts({0, tiles}, (tiles + WinogradPlan::kMostTiles - 1) / WinogradPlan::kMostTiles, [&](Range r) {
          du->multiply(0, i, r.end - r.begin, m.from_row(r.begin), v.from_row(r.begin), r.begin > 0);
        });
      if (u) multiply_by_filters(plan, i, tiles, m, plan.out, *u, plan.in, v);
    });
    const int64_t parts = std::min(plan.parts(), plan.grid.images);
    if (work.dx != nullptr)
      parallel(parts, [&](int64_t i) {
        const Range images = part(plan.grid.images, i, parts);
        InputGradients<T> dx(plan, work, i, images, per_image);
        for (int64_t image = images.begin; image < images.end; ++image)
          dx.add({image * per_image, (image + 1) * per_image}, v.from_row(image * per_image));
      });
    if (du) du->add_to(*work.dw);
    return;
  }

  const int64_t parts = std::min(work.dw ? plan.parts_with_filter_gradients() : plan.parts(), plan.grid.images);
  std::optional<FilterGradients> du;
  if (work.dw) du.emplace(plan, parts);
  parallel(parts, [&](int64_t part_index) {
    const Range images = part(plan.grid.images, part_index, parts);
    const Range own{images.begin * per_image, images.end * per_image};
    const int64_t blocks = plan.blocks(own.end - own.begin), block = (own.end - own.begin + blocks - 1) / blocks;
    const StackMemory v(Scratch::kInput, block, plan.in), m(Scratch::kOutput, block, plan.out);
    std::optional<InputGradients<T>> dx;
    if (work.dx != nullptr) dx.emplace(plan, work, part_index, images, block);
    for_parts(own, blocks, [&](Range r) {
      const int64_t count = r.end - r.begin;
      kernels.transform_gradient(plan.grid, {r.begin, count}, work.dy, work.norm_of_dy, m);
      if (du) {
        kernels.transform_input(plan.grid, {r.begin, count}, work.x, work.norm_of_x, v);
        for (int64_t i = 0; i < kPositions; ++i) du->multiply(part_index, i, count, m, v, r.begin > own.begin);
      }
      if (dx) {
        for (int64_t i = 0; i < kPositions; ++i) multiply_by_filters(plan, i, count, m, plan.out, *u, plan.in, v);
        dx->add(r, v);
      }
    });
  });
  if (du) du->add_to(*work.dw);
}

template void winograd_forward(const WinogradPlan&, Pixels<const float>, const NormOnRead*, const WinogradFilters&,
                               const float*, Pixels<float>, const ImagesDone&);
template void winograd_forward(const WinogradPlan&, Pixels<const BFloat16>, const NormOnRead*, const WinogradFilters&,
                               const float*, Pixels<BFloat16>, const ImagesDone&);
template void winograd_backward(const WinogradPlan&, const WinogradBackward<float>&);
template void winograd_backward(const WinogradPlan&, const WinogradBackward<BFloat16>&);

namespace {

Filters<const float> all_filters(const Tensor& weight, bool input_channels_in_lanes) {
  const auto lanes = input_channels_in_lanes ? input_lanes<const float> : output_lanes<const float>;
  return lanes(weight.const_data_ptr<float>(), weight, weight.size(0), weight.size(1));
}

// The plan of a call does not matter to the transform of its filters.
WinogradPlan plan_of(const Tensor& weight) { return WinogradPlan(weight, weight.size(0)); }

TransformedShape whole_shape(const WinogradPlan& plan, const Tensor& weight, bool input_channels_in_lanes) {
  const Filters<const float> whole = all_filters(weight, input_channels_in_lanes);
  return TransformedShape(plan, whole.rows, whole.lanes);
}

void check_transformed(const char* op, const Tensor& filters, const TransformedShape& shape) {
  STD_TORCH_CHECK(filters.is_contiguous() && filters.scalar_type() == ScalarType::Float &&
                      filters.numel() == kPositions * shape.position,
                  op, ": filters: expected a float32 vector of ", kPositions * shape.position, " elements, got ",
                  shape_of(filters));
}

}  // namespace

int64_t winograd_filters_size(const Tensor& weight, bool input_channels_in_lanes) {
  check_filters("winograd_filters_size", "weight", weight, 1, 1);
  return kPositions * whole_shape(plan_of(weight), weight, input_channels_in_lanes).position;
}

void winograd_filters_(Tensor filters, const Tensor& weight, bool input_channels_in_lanes) {
  const char* op = "winograd_filters_";
  check_filters(op, "weight", weight, 1, 1);
  const WinogradPlan plan = plan_of(weight);
  const TransformedShape shape = whole_shape(plan, weight, input_channels_in_lanes);
  check_transformed(op, filters, shape);
  transform(plan, all_filters(weight, input_channels_in_lanes), shape, filters.mutable_data_ptr<float>());
}

WinogradFilters winograd_filters_of(const char* op, const WinogradPlan& plan, const Tensor& weight,
                                    const std::optional<Tensor>& transformed, bool input_channels_in_lanes) {
  check_filters(op, "weight", weight, plan.out, plan.in);
  const auto lanes = input_channels_in_lanes ? input_lanes<const float> : output_lanes<const float>;
  const float* const data = weight.const_data_ptr<float>();
  WinogradFilters w{lanes(data, weight, plan.out, plan.in)};
  if (!transformed.has_value()) return w;
  const TransformedShape shape = whole_shape(plan, weight, input_channels_in_lanes);
  check_transformed(op, *transformed, shape);
  w.transformed = transformed->const_data_ptr<float>();
  w.whole = input_channels_in_lanes ? weight.size(0) : weight.size(1);
  w.position = shape.position;
  return w;
}

namespace {

template <class T>
void run_forward(const WinogradPlan& plan, const Tensor& x, const WinogradFilters& w, const float* bias, Tensor& y) {
  winograd_forward<T>(plan, pixels<T>(x), nullptr, w, bias, dense_pixels<T>(y), {});
}

template <class T>
void run_backward(const WinogradPlan& plan, const Tensor& dy, const Tensor& x, const WinogradFilters& w,
                  const Filters<float>* dw, Tensor* dx) {
  WinogradBackward<T> work{pixels<T>(x), pixels<T>(dy)};
  work.w = w;
  work.dw = dw;
  Pixels<T> gradient{};
  if (dx != nullptr) {
    gradient = dense_pixels<T>(*dx);
    work.dx = &gradient;
  }
  winograd_backward(plan, work);
}

}  // namespace

Tensor conv2d_3x3(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels,
                  std::optional<Tensor> filters) {
  const char* op = "conv2d_3x3";
  check_float_or_bfloat16_images(op, "x", x);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  const std::vector<float> offset = bias_of(op, bias, out_channels);
  const WinogradPlan plan(x, out_channels);
  const WinogradFilters w = winograd_filters_of(op, plan, weight, filters, false);
  Tensor y = new_images(x, out_channels, x.size(2), x.size(3));
  if (y.numel() == 0) return y;
  const auto run = x.scalar_type() == ScalarType::Float ? run_forward<float> : run_forward<BFloat16>;
  run(plan, x, w, offset.data(), y);
  return y;
}

Tensor conv2d_3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                           std::optional<Tensor> grad_weight, bool need_grad_x, std::optional<Tensor> filters) {
  const char* op = "conv2d_3x3_backward";
  check_float_or_bfloat16_images(op, "x", x);
  check_float_or_bfloat16_images(op, "grad", grad);
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  op, ": grad: expected the images of x, in its dtype, ", shape_of(x), ", got ", shape_of(grad));
  const int64_t in = x.size(1), out = grad.size(1);
  const Tensor dy = channels_innermost(grad) ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  const WinogradPlan plan(x, out);
  const WinogradFilters w = winograd_filters_of(op, plan, weight, filters, true);

  Tensor dx = need_grad_x ? new_images(x, in, x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || dy.numel() == 0) return dx;
  Filters<float> gradients{};
  if (grad_weight.has_value()) {
    check_filters(op, "grad_weight", *grad_weight, out, in);
    gradients = input_lanes(grad_weight->mutable_data_ptr<float>(), *grad_weight, out, in);
  }
  const auto run = x.scalar_type() == ScalarType::Float ? run_backward<float> : run_backward<BFloat16>;
  run(plan, dy, x, w, grad_weight.has_value() ? &gradients : nullptr, need_grad_x ? &dx : nullptr);
  return dx;
}

}  // namespace us3l
