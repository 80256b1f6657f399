// Batch norm in two passes over x: statistics, then normalise + residual + activation; backward likewise.
//
// x is a matrix of rows of channels, cut into blocks of rows, tiles of channels, and views. Every block leaves its partial
// results, float32, and a second stage merges those of all blocks in a fixed order, in float64.

#include "../cpu/batch_norm.h"  // checks, as_rows, clamp_of

#include "blocks.h"
#include "ops.h"
#include "types.h"

namespace us3l::cuda {
namespace {

constexpr int kUnroll = 4;  // rows that a thread has in flight

// Each view's rows, cut into blocks of `depth` rows at a time.
struct Cut {
  int64_t rows, block_rows;  // of a view, of a block
  Tiles tiles;
  int32_t depth, blocks, views;

  // `wanted`: blocks to fill a GPU. It is a constant, and not asked of the GPU: results do not depend on its size.
  Cut(int64_t views, int64_t rows, int64_t channels, int width, int64_t wanted)
      : rows(rows), tiles(channels, width), views(static_cast<int32_t>(views)) {
    constexpr int64_t kLongest = 1024;  // rows of a thread: its sums are float32
    depth = kBlock / tiles.lanes;
    const int64_t steps = (rows + depth - 1) / depth;  // of a block that has all rows
    const int64_t share = std::max<int64_t>(wanted / (tiles.count * views), 1);
    const int64_t length = std::min(round_up(std::max<int64_t>((steps + share - 1) / share, 1), kUnroll), kLongest);
    block_rows = length * depth;
    blocks = static_cast<int32_t>((rows + block_rows - 1) / block_rows);
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles.count), static_cast<unsigned>(views));
  }
  unsigned threads() const { return static_cast<unsigned>(tiles.lanes * depth); }
  int64_t partials() const { return int64_t{views} * blocks * tiles.channels; }
};

// What a thread works on: W channels, and every depth-th row of its block.
template <int W>
struct Place {
  int row, channel;
  bool inside;
  int64_t begin, end;     // rows of the matrix
  int64_t vector;         // of this view's [C] in [V, C], at its channels
  int64_t partial;        // of this block's [C] in [V, blocks, C], at its channels

  __device__ __forceinline__ explicit Place(const Cut& cut) {
    const int thread = static_cast<int>(threadIdx.x);
    row = thread / cut.tiles.lanes;
    channel = (static_cast<int>(blockIdx.y) * cut.tiles.lanes + thread % cut.tiles.lanes) * W;
    inside = channel < cut.tiles.channels;
    const int64_t view = blockIdx.z, first = blockIdx.x * cut.block_rows, last = first + cut.block_rows;
    begin = view * cut.rows + first + row;
    end = inside ? view * cut.rows + (last < cut.rows ? last : cut.rows) : 0;
    vector = view * cut.tiles.channels + channel;
    partial = (view * cut.blocks + blockIdx.x) * cut.tiles.channels + channel;
  }
};

// W of a vector's elements; `missing` for none.
template <int W>
__device__ __forceinline__ void load_vector(const float* from, float missing, float (&to)[W]) {
  if (from == nullptr) {
#pragma unroll
    for (int k = 0; k < W; ++k) to[k] = missing;
  } else if (aligned(from)) {
    load(from, to);
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) to[k] = from[k];
  }
}

__device__ __forceinline__ const float* at(const float* vector, int64_t i) {
  return vector == nullptr ? nullptr : vector + i;
}

// R rows, `depth` apart, of W channels. A kernel asks for all that a step reads before it stores any of it: the compiler
// leaves loads behind a store, which may be to where they read. Its launch bounds leave it the registers for that, which
// are worth more than another block on the SM: three times as many bytes are on their way.
template <class T, int R, int W>
__device__ __forceinline__ void load_rows(Rows<const T> from, int64_t row, int depth, int channel, float (&to)[R][W]) {
#pragma unroll
  for (int i = 0; i < R; ++i) load(from.data + (row + i * depth) * from.stride + channel, to[i]);
}

// A thread's rows: step(first, R) with as many at a time as it has in flight, then one by one.
template <int W, class Step>
__device__ __forceinline__ void for_rows(const Place<W>& place, int depth, const Step& step) {
  int64_t r = place.begin;
#pragma unroll 1
  for (; r + (kUnroll - 1) * depth < place.end; r += kUnroll * depth) step(r, std::integral_constant<int, kUnroll>());
#pragma unroll 1
  for (; r < place.end; r += depth) step(r, std::integral_constant<int, 1>());
}

// Mean and sum of squared deviations of `count` values, made those of `more` more (Chan, Golub and LeVeque, 1983).
__device__ __forceinline__ void merge_moments(float& mean, float& m2, float count, float other_mean, float other_m2,
                                              float more) {
  const float delta = other_mean - mean, share = more / (count + more);
  mean += delta * share;
  m2 += other_m2 + delta * delta * count * share;
}

// The moments of R values more. With s and q the sums of their deviations from the mean, and of those squared, the mean
// moves by s / count, and the squares about it come to q - s^2 / count. That does not cancel, because the deviations are
// never from anything but a value or a mean of values.
template <int R, int W>
__device__ __forceinline__ void add_rows(const float (&v)[R][W], float& count, float (&mean)[W], float (&m2)[W]) {
  count += R;
  const float share = 1.0f / count;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    float s = 0.0f, q = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float delta = v[r][k] - mean[k];
      s += delta;
      q = fmaf(delta, delta, q);
    }
    mean[k] += s * share;
    m2[k] += q - s * s * share;
  }
}

// The moments of the rows of every thread; then the threads of a block are merged.
template <class T, int W>
__global__ void __launch_bounds__(kBlock) statistics_kernel(Rows<const T> x, Cut cut, float* means, float* m2s) {
  __shared__ float shared_mean[W][kBlock], shared_m2[W][kBlock];
  __shared__ float shared_count[kBlock];
  const Place<W> place(cut);
  float mean[W] = {}, m2[W] = {}, count = 0.0f;
  if (place.begin < place.end) load(x.data + place.begin * x.stride + place.channel, mean);
  for_rows(place, cut.depth, [&](int64_t r, auto rows) {
    float v[rows][W];
    load_rows(x, r, cut.depth, place.channel, v);
    add_rows(v, count, mean, m2);
  });

  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < W; ++k) shared_mean[k][thread] = mean[k], shared_m2[k][thread] = m2[k];
  shared_count[thread] = count;
  merge_rows(cut.depth, cut.tiles.lanes, [&](int own, int other) {
    const float count = shared_count[own], more = shared_count[other];
    if (more == 0.0f) return;
#pragma unroll
    for (int k = 0; k < W; ++k)
      merge_moments(shared_mean[k][own], shared_m2[k][own], count, shared_mean[k][other], shared_m2[k][other], more);
    shared_count[own] = count + more;
  });
  if (place.row != 0 || !place.inside) return;
#pragma unroll
  for (int k = 0; k < W; ++k) mean[k] = shared_mean[k][thread], m2[k] = shared_m2[k][thread];
  store(means + place.partial, mean);
  store(m2s + place.partial, m2);
}

struct Statistics {
  float *mean, *rstd, *running_mean, *running_var;
};

// Chan's combination, of all blocks at once: let d be the deviation of a block's mean from that of the first block, then
// with s the sum of count d, the mean moves by s / rows, and the squares about it come to those of the blocks and of the
// sum of count d^2, less s^2 / rows. Blocks of y have a view each, or one has them all in turn.
__global__ void __launch_bounds__(kBlock)
    finish_statistics_kernel(const float* means, const float* m2s, Merging merging, Cut cut, double momentum, double eps,
                             Statistics to) {
  __shared__ double shared[2][kBlock];
  const int64_t channels = cut.tiles.channels, channel = merging.column_of_thread();
  const bool inside = channel < channels;
  const auto rows = static_cast<double>(cut.rows), share = 1.0 / rows, full = static_cast<double>(cut.block_rows),
             last = static_cast<double>(cut.rows - (cut.blocks - 1) * cut.block_rows);
  for (int view = static_cast<int>(blockIdx.y); view < cut.views; view += static_cast<int>(gridDim.y)) {
    const int64_t first = int64_t{view} * cut.blocks * channels + channel;
    const double origin = inside ? means[first] : 0.0;
    double sums[2];
    const auto load = [&](int block, float(&to)[2]) {
      to[0] = means[first + block * channels];
      to[1] = m2s[first + block * channels];
    };
    const auto add = [&](int block, const float(&moments)[2], double(&to)[2]) {
      const double d = moments[0] - origin, weighted = (block == cut.blocks - 1 ? last : full) * d;
      to[0] += weighted;
      to[1] += moments[1] + weighted * d;
    };
    if (sum_of_blocks(merging, inside, shared, sums, load, add)) {
      const double shift = sums[0] * share, mean = origin + shift, m2 = sums[1] - sums[0] * shift;
      to.mean[view * channels + channel] = static_cast<float>(mean);
      to.rstd[view * channels + channel] = static_cast<float>(1.0 / sqrt(m2 * share + eps));
      if (to.running_mean != nullptr) {
        float& running = to.running_mean[channel];
        running = static_cast<float>(running + momentum * (mean - running));
      }
      if (to.running_var != nullptr) {
        float& running = to.running_var[channel];
        running = static_cast<float>(running + momentum * (m2 / (rows - 1.0) - running));
      }
    }
    __syncthreads();  // before the next view's sums
  }
}

// Evaluation: the running statistics are the statistics.
__global__ void __launch_bounds__(kBlock) running_statistics_kernel(int channels, double eps, Statistics of) {
  const int channel = static_cast<int>(blockIdx.x * kBlock + threadIdx.x);
  if (channel >= channels) return;
  of.mean[channel] = of.running_mean[channel];
  of.rstd[channel] = static_cast<float>(1.0 / sqrt(of.running_var[channel] + eps));
}

// The affine function of a norm with its activation; vectors of one view and some channels.
struct Norm {
  const float *mean, *rstd;    // [V, C]
  const float *weight, *bias;  // [C] or null
  Clamp clamp;
};

template <int W>
struct Affine {
  float mean[W], scale[W], bias[W];

  __device__ __forceinline__ Affine(const Norm& norm, const Place<W>& place) {
    float weight[W];
    load_vector(norm.mean + place.vector, 0.0f, mean);
    load_vector(norm.rstd + place.vector, 0.0f, scale);
    load_vector(at(norm.weight, place.channel), 1.0f, weight);
    load_vector(at(norm.bias, place.channel), 0.0f, bias);
#pragma unroll
    for (int k = 0; k < W; ++k) scale[k] *= weight[k];
  }
  __device__ __forceinline__ float operator()(float x, int k) const { return fmaf(x - mean[k], scale[k], bias[k]); }
};

template <class T, int W>
__global__ void __launch_bounds__(kBlock, 3)
    apply_kernel(Rows<const T> x, Rows<const T> residual, Rows<T> y, Cut cut, Norm norm) {
  const Place<W> place(cut);
  if (!place.inside) return;
  const Affine<W> affine(norm, place);
  for_rows(place, cut.depth, [&](int64_t r, auto rows) {
    float v[rows][W], add[rows][W] = {};
    load_rows(x, r, cut.depth, place.channel, v);
    if (residual.data != nullptr) load_rows(residual, r, cut.depth, place.channel, add);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        v[i][k] = affine(v[i][k], k) + add[i][k];
        v[i][k] = v[i][k] < norm.clamp.low ? norm.clamp.low : v[i][k];
        v[i][k] = v[i][k] > norm.clamp.high ? norm.clamp.high : v[i][k];
      }
      store(y.data + (r + i * cut.depth) * y.stride + place.channel, v[i]);
    }
  });
}

// x of R rows, and the gradient behind the activation, whose output is read from y or computed once more. Without an
// activation the clamp has no bounds: a comparison with NaN is false.
template <bool kReadsY, class T, int R, int W>
__device__ __forceinline__ void load_gradient(Rows<const T> grad, Rows<const T> x, Rows<const T> y, int64_t r, int depth,
                                              int channel, const Clamp& clamp, const Affine<W>& affine, float (&v)[R][W],
                                              float (&g)[R][W]) {
  float out[R][W];
  load_rows(grad, r, depth, channel, g);
  if constexpr (kReadsY) load_rows(y, r, depth, channel, out);
  load_rows(x, r, depth, channel, v);
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if constexpr (!kReadsY) out[i][k] = static_cast<float>(static_cast<T>(affine(v[i][k], k)));  // as it was stored
      g[i][k] = out[i][k] <= clamp.low || out[i][k] >= clamp.high ? 0.0f : g[i][k];
    }
}

// Sums over the rows of g, the gradient behind the activation, and of g (x - mean). Writes g to `masked`, unless null.
template <bool kReadsY, class T, int W>
__global__ void __launch_bounds__(kBlock, 2)
    reduce_kernel(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked, Cut cut, Norm norm, float* sums_g,
                  float* sums_gx) {
  __shared__ float shared_g[W][kBlock], shared_gx[W][kBlock];
  const Place<W> place(cut);
  float sum_g[W] = {}, sum_gx[W] = {};
  if (place.inside) {
    const Affine<W> affine(norm, place);
    for_rows(place, cut.depth, [&](int64_t r, auto rows) {
      float v[rows][W], g[rows][W];
      load_gradient<kReadsY>(grad, x, y, r, cut.depth, place.channel, norm.clamp, affine, v, g);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
          sum_g[k] += g[i][k];
          sum_gx[k] += g[i][k] * (v[i][k] - affine.mean[k]);
        }
        if (masked.data != nullptr) store(masked.data + (r + i * cut.depth) * masked.stride + place.channel, g[i]);
      }
    });
  }

  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < W; ++k) shared_g[k][thread] = sum_g[k], shared_gx[k][thread] = sum_gx[k];
  merge_rows(cut.depth, cut.tiles.lanes, [&](int own, int other) {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      shared_g[k][own] += shared_g[k][other];
      shared_gx[k][own] += shared_gx[k][other];
    }
  });
  if (place.row != 0 || !place.inside) return;
#pragma unroll
  for (int k = 0; k < W; ++k) sum_g[k] = shared_g[k][thread], sum_gx[k] = shared_gx[k][thread];
  store(sums_g + place.partial, sum_g);
  store(sums_gx + place.partial, sum_gx);
}

// The gradient of x is g scale + (x - mean) slope + offset, see norm_gradients in ../cpu/batch_norm.h.
struct Gradients {
  float *weight, *bias;    // [C] or null: added to
  float *slope, *offset;   // [V, C]; the statistics depend on x in training only
  bool training;
};

__global__ void __launch_bounds__(kBlock)
    finish_gradients_kernel(const float* sums_g, const float* sums_gx, Merging merging, Cut cut, Norm norm, Gradients to) {
  __shared__ double shared[2][kBlock];
  const int64_t channels = cut.tiles.channels, channel = merging.column_of_thread();
  const bool inside = channel < channels;
  double grad_weight = 0.0, grad_bias = 0.0;
  for (int view = 0; view < cut.views; ++view) {
    const int64_t first = int64_t{view} * cut.blocks * channels + channel;
    double sums[2];
    const auto load = [&](int block, float(&to)[2]) {
      to[0] = sums_g[first + block * channels];
      to[1] = sums_gx[first + block * channels];
    };
    const auto add = [](int, const float(&partial)[2], double(&to)[2]) {
      to[0] += partial[0];
      to[1] += partial[1];
    };
    if (sum_of_blocks(merging, inside, shared, sums, load, add)) {
      const auto [sum_g, sum_gx] = sums;
      const int64_t vector = view * channels + channel;
      const double rstd = norm.rstd[vector], weight = norm.weight != nullptr ? norm.weight[channel] : 1.0;
      const double scale = to.training ? rstd * weight / static_cast<double>(cut.rows) : 0.0;
      to.slope[vector] = static_cast<float>(-scale * rstd * rstd * sum_gx);
      to.offset[vector] = static_cast<float>(-scale * sum_g);
      grad_weight += sum_gx * rstd;
      grad_bias += sum_g;
    }
    __syncthreads();  // before the next view's sums
  }
  if (merging.slice_of_thread() != 0 || !inside) return;
  if (to.weight != nullptr) to.weight[channel] += static_cast<float>(grad_weight);
  if (to.bias != nullptr) to.bias[channel] += static_cast<float>(grad_bias);
}

template <bool kReadsY, class T, int W>
__global__ void __launch_bounds__(kBlock, 2)
    input_gradient_kernel(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> dx, Cut cut, Norm norm,
                          const float* slopes, const float* offsets) {
  const Place<W> place(cut);
  if (!place.inside) return;
  const Affine<W> affine(norm, place);
  float slope[W], offset[W];
  load_vector(slopes + place.vector, 0.0f, slope);
  load_vector(offsets + place.vector, 0.0f, offset);
  for_rows(place, cut.depth, [&](int64_t r, auto rows) {
    float v[rows][W], g[rows][W];
    load_gradient<kReadsY>(grad, x, y, r, cut.depth, place.channel, norm.clamp, affine, v, g);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int k = 0; k < W; ++k)
        v[i][k] = fmaf(g[i][k], affine.scale[k], fmaf(v[i][k] - affine.mean[k], slope[k], offset[k]));
      store(dx.data + (r + i * cut.depth) * dx.stride + place.channel, v[i]);
    }
  });
}

// Blocks that fill a GPU: of a pass that is merged, and of one that is not.
constexpr int64_t kReducing = 512, kMapping = 4096;

template <class T>
bool has_vectors(Rows<T> m, int64_t channels) {
  constexpr int W = kWidth<std::remove_const_t<T>>;
  return m.data == nullptr || (aligned(m.data) && m.stride % W == 0 && channels % W == 0);
}

// The matrix that x is, after the checks that both directions share.
struct Shape {
  int64_t views, rows, channels;  // rows of one view
};

Shape shape_for(const char* op, const Tensor& x, int64_t views) {
  STD_TORCH_CHECK(on_device(x) && x.dim() >= 2, op, ": x: expected [N, C, *] on a CUDA device, got ", shape_of(x));
  STD_TORCH_CHECK(row_stride(x, 1) >= 0, op, ": x: expected channels innermost (channels_last)");
  STD_TORCH_CHECK(views >= 1 && views <= 65535 && x.size(0) % views == 0, op,
                  ": views: expected a divisor of the batch of ", x.size(0), ", got ", views);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(channels >= 1 && channels <= INT32_MAX, op, ": x: expected at least one channel, got ", shape_of(x));
  return {views, x.numel() / channels / views, channels};
}

void check_device(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  STD_TORCH_CHECK(!t.has_value() || (on_device(*t) && t->get_device_index() == x.get_device_index()), op, ": ", name,
                  ": expected the device of x");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum, double eps,
    int64_t views, int64_t activation) {
  const char* op = "batch_norm";
  const Shape shape = shape_for(op, x, views);
  const int64_t channels = shape.channels;
  STD_TORCH_CHECK(!training || shape.rows > 1, op,
                  ": x: expected more than 1 value per channel and view in training, got ", shape_of(x), " and ", views,
                  " views");
  STD_TORCH_CHECK(training || (running_mean.has_value() && running_var.has_value() && views == 1), op,
                  ": running_mean, running_var: expected both, and 1 view, unless training");
  check_device(op, "weight", weight, x);
  check_device(op, "bias", bias, x);
  check_device(op, "running_mean", running_mean, x);
  check_device(op, "running_var", running_var, x);
  check_device(op, "residual", residual, x);

  const Stream stream(x);
  if (residual.has_value()) {
    check_like(op, "residual", *residual, x);
    residual = as_rows(*residual);
  }
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {views, channels}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {views, channels}, ScalarType::Float);
  const Statistics statistics{mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(),
                              output_vector(op, "running_mean", running_mean, channels),
                              output_vector(op, "running_var", running_var, channels)};
  const Norm norm{statistics.mean, statistics.rstd, input_vector(op, "weight", weight, channels),
                  input_vector(op, "bias", bias, channels), clamp_of(op, activation)};
  if (!training)
    stream.launch(running_statistics_kernel, blocks_for(channels, kBlock), kBlock, static_cast<int>(channels), eps,
                  statistics);

  for_type(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto in = rows_of<T>(x, 1);
    const auto add = residual.has_value() ? rows_of<T>(std::as_const(*residual), 1) : Rows<const T>{nullptr, 0};
    const auto out = rows_of<T>(y, 1);
    const bool vectors = has_vectors(in, channels) && has_vectors(add, channels) && has_vectors(out, channels);
    for_width<T>(vectors, [&](auto width) {
      constexpr int W = width;
      if (training) {
        const Cut cut(views, shape.rows, channels, W, kReducing);
        Tensor partials = torch::stable::new_empty(x, {2 * cut.partials()}, ScalarType::Float);
        float *const means = partials.mutable_data_ptr<float>(), *const m2s = means + cut.partials();
        stream.launch(statistics_kernel<T, W>, cut.grid(), cut.threads(), in, cut, means, m2s);
        const Merging merging(cut.blocks);
        dim3 grid = blocks_for(channels, merging.columns);
        // Running statistics take one view after the other.
        if (!running_mean.has_value() && !running_var.has_value()) grid.y = static_cast<unsigned>(views);
        stream.launch(finish_statistics_kernel, grid, kBlock, means, m2s, merging, cut, momentum, eps, statistics);
      }
      if (x.numel() == 0) return;
      const Cut cut(views, shape.rows, channels, W, kMapping);
      stream.launch(apply_kernel<T, W>, cut.grid(), cut.threads(), in, add, out, cut, norm);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, std::optional<Tensor> weight, std::optional<Tensor> bias,
    const Tensor& mean, const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
    bool need_grad_x, bool need_grad_residual, bool training, int64_t activation) {
  const char* op = "batch_norm_backward";
  STD_TORCH_CHECK(mean.dim() == 2, op, ": mean: expected [V, C], got ", shape_of(mean));
  const Shape shape = shape_for(op, x, mean.size(0));
  const int64_t views = shape.views, channels = shape.channels;
  for (const auto& [name, t] : {std::pair("mean", &mean), std::pair("rstd", &rstd)})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == views && t->size(1) == channels && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Float,
                    op, ": ", name, ": expected contiguous float32 [", views, ", ", channels, "], got ", shape_of(*t));
  const bool activated = activation != kNone;
  STD_TORCH_CHECK(activated || !need_grad_residual, op,
                  ": need_grad_residual: expected an activation; without one it is grad itself");
  STD_TORCH_CHECK(!need_grad_residual || !bias.has_value(), op, ": bias: expected none with need_grad_residual");
  check_like(op, "grad", grad, x);
  if (activated) check_like(op, "y", y, x);
  for (const auto& [name, t] : {std::pair("grad", &grad), std::pair("mean", &mean), std::pair("rstd", &rstd)})
    check_device(op, name, *t, x);
  check_device(op, "weight", weight, x);
  check_device(op, "bias", bias, x);
  check_device(op, "grad_weight", grad_weight, x);
  check_device(op, "grad_bias", grad_bias, x);

  const Stream stream(x);
  const bool reads_y = activated && !bias.has_value();
  const Norm norm{mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), input_vector(op, "weight", weight, channels),
                  input_vector(op, "bias", bias, channels), clamp_of(op, activation)};
  const Tensor upstream = as_rows(grad), out = reads_y ? as_rows(y) : y;
  Tensor dx = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dresidual = need_grad_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor coefficients = torch::stable::new_empty(x, {2, views, channels}, ScalarType::Float);
  float *const slope = coefficients.mutable_data_ptr<float>(), *const offset = slope + views * channels;
  const Gradients gradients{output_vector(op, "grad_weight", grad_weight, channels),
                            output_vector(op, "grad_bias", grad_bias, channels), slope, offset, training};

  for_type(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Rows<const T> none{nullptr, 0}, in = rows_of<T>(x, 1), behind = rows_of<T>(upstream, 1);
    const auto mask_y = reads_y ? rows_of<T>(out, 1) : none;
    const auto masked = need_grad_residual ? rows_of<T>(dresidual, 1) : Rows<T>{nullptr, 0};
    const auto to = need_grad_x ? rows_of<T>(dx, 1) : Rows<T>{nullptr, 0};
    const bool vectors = has_vectors(in, channels) && has_vectors(behind, channels) && has_vectors(mask_y, channels) &&
                         has_vectors(masked, channels) && has_vectors(to, channels);
    for_width<T>(vectors, [&](auto width) {
      constexpr int W = width;
      const Cut cut(views, shape.rows, channels, W, kReducing), map(views, shape.rows, channels, W, kMapping);
      Tensor partials = torch::stable::new_empty(x, {2 * cut.partials()}, ScalarType::Float);
      float *const sums_g = partials.mutable_data_ptr<float>(), *const sums_gx = sums_g + cut.partials();
      if (x.numel() > 0) {
        const auto reduce = reads_y ? reduce_kernel<true, T, W> : reduce_kernel<false, T, W>;
        stream.launch(reduce, cut.grid(), cut.threads(), behind, in, mask_y, masked, cut, norm, sums_g, sums_gx);
      }
      const Merging merging(cut.blocks);
      stream.launch(finish_gradients_kernel, blocks_for(channels, merging.columns), kBlock, sums_g, sums_gx, merging, cut,
                    norm, gradients);
      if (!need_grad_x || x.numel() == 0) return;
      // The gradient of the residual is the one behind the activation already.
      Norm rest = norm;
      if (need_grad_residual) rest.clamp = clamp_of(op, kNone);
      const bool reads = reads_y && !need_grad_residual;
      stream.launch(reads ? input_gradient_kernel<true, T, W> : input_gradient_kernel<false, T, W>, map.grid(),
                    map.threads(), need_grad_residual ? Rows<const T>{masked.data, masked.stride} : behind, in,
                    reads ? mask_y : none, to, map, rest, slope, offset);
    });
  });
  return {dx, dresidual};
}

}  // namespace us3l::cuda
