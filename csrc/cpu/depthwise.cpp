// Depthwise convolution with multiplier 1, as correlations of rows: the plan around the kernels of depthwise_kernels.h.
//
// The gradient of x is gathered, as correlations of the gradient of y. With stride s an input sees only every s-th tap,
// beginning with one that depends on its position modulo s, its phase: each of the s phases of a dimension is a
// correlation of its own, with stride 1 and its share of the taps.
//
// Rows are cut among the threads by their number alone and partial sums are merged in order: same threads, same bits.

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../ops.h"
#include "depthwise.h"
#include "depthwise_kernels.h"
#include "scratch.h"

namespace us3l {
namespace {

// One dimension of the convolution, `padding` and so on as in torch.
struct Geometry {
  int64_t in, out, kernel, stride, padding, dilation;
};

// The outputs phase, phase + phases, ..., `count` of them: a correlation, whose tap t is tap first + t * step of the filter.
struct Phase {
  Axis axis;
  int64_t first, step, count;
};

std::vector<Phase> forward_phases(const Geometry& g) {
  return {{{g.kernel, g.stride, g.dilation, -g.padding, g.in}, 0, 1, g.out}};
}

std::vector<Phase> adjoint_phases(const Geometry& g) {
  const int64_t common = std::gcd(g.stride, g.dilation), every = g.stride / common, step = g.dilation / common;
  std::vector<Phase> phases;
  for (int64_t phase = 0; phase < std::min(g.stride, g.in); ++phase) {
    // Input i is read by output o with tap k where i + padding = o * stride + k * dilation.
    int64_t k = 0;
    while (k < every && (phase + g.padding - k * g.dilation) % g.stride != 0) ++k;
    const int64_t taps = k < every && k < g.kernel ? divide_up(g.kernel - k, every) : 0;
    const int64_t nearest = (phase + g.padding - k * g.dilation) / g.stride;  // the output under tap k; others precede it
    phases.push_back({{taps, 1, step, nearest - (taps - 1) * step, g.out},
                      k + (taps - 1) * every,
                      -every,
                      divide_up(g.in - phase, g.stride)});
  }
  return phases;
}

// What one row of the output reads: rows of the input, `step` apart, under those taps of its phase that lie in the image.
struct RowsUnder {
  int64_t phase, first, step;
  Range taps;
  Range ahead;  // what is new under the row after the next: early enough to come from memory into the L2 cache
};

// Of all rows: they are met once for every image, and take many divisions.
std::vector<RowsUnder> rows_under(const std::vector<Phase>& phases) {
  const int64_t number = phases.size();
  std::vector<RowsUnder> rows;
  for (int64_t row = 0; row / number < phases[row % number].count; ++row) {
    const Axis& axis = phases[row % number].axis;
    const int64_t origin = row / number * axis.stride + axis.offset;
    const int64_t begin = origin < 0 ? std::min(divide_up(-origin, axis.step), axis.taps) : 0;
    const int64_t end = origin < axis.size ? std::min(divide_up(axis.size - origin, axis.step), axis.taps) : 0;
    const int64_t last = origin + (axis.taps - 1) * axis.step + 2 * axis.stride;
    const Range ahead{last + 1 - (row % number == 0 ? axis.stride : 0), last + 1};  // the phases read the same
    rows.push_back({row % number, origin + begin * axis.step, axis.step, {begin, std::max(begin, end)}, ahead});
  }
  return rows;
}

template <class T>
Window<T> window_of(Pixels<const T> x, int64_t image, const RowsUnder& under) {
  return {x.data + image * x.image + under.first * x.row, under.step * x.row, x.pixel,
          under.taps.end - under.taps.begin};
}

// These rows, for a kernel to ask for. The hardware does not foresee them: what a vector of channels reads lies a pixel
// apart. None if something else lies between the pixels, which would be fetched in vain.
template <class T>
Stretch ahead_of(Pixels<T> t, int64_t image, Range rows, int64_t width, int64_t channels) {
  const int64_t row = t.pixel == channels ? width * channels * sizeof(T) : 0;
  const int64_t first = (image * t.image + rows.begin * t.row) * static_cast<int64_t>(sizeof(T));
  return {reinterpret_cast<std::uintptr_t>(t.data) + first, (rows.end - rows.begin) * row};
}

Stretch share_of(Stretch ahead, int64_t i, int64_t n) {
  if (n == 1) return ahead;
  const Range bytes = part(ahead.bytes, i, n);
  return {ahead.from + bytes.begin, bytes.end - bytes.begin};
}

// The filters for one direction: for each phase of rows, then of columns, [taps][taps][channels].
class Correlation {
 public:
  Correlation(const std::vector<Phase>& rows, std::vector<Phase> columns, const Tensor& weight, int64_t channels)
      : columns_(std::move(columns)),
        under_(rows_under(rows)),
        channels_(channels),
        memory_(Scratch::kFilters, weight.size(2) * weight.size(3) * channels) {
    const float* const from = weight.const_data_ptr<float>();
    const int64_t stride = weight.stride(0), stride_y = weight.stride(2), stride_x = weight.stride(3);
    float* to = memory_.data();
    for (const Phase& y : rows)
      for (const Phase& x : columns_) {
        filters_.push_back(to);
        for (int64_t i = 0; i < y.axis.taps; ++i)
          for (int64_t j = 0; j < x.axis.taps; ++j, to += channels) {
            const float* const tap = from + (y.first + i * y.step) * stride_y + (x.first + j * x.step) * stride_x;
            for (int64_t c = 0; c < channels; ++c) to[c] = tap[c * stride];
          }
      }
  }

  // One row of y, which has `width` pixels.
  template <class T>
  void row(const DepthwiseKernels<T>& kernels, Pixels<const T> x, const float* bias, Pixels<T> y, int64_t image,
           int64_t row, int64_t width) const {
    const RowsUnder& under = under_[row];
    const int64_t phases = columns_.size();
    const Window<T> window = window_of(x, image, under);
    const Stretch x_ahead = ahead_of(x, image, under.ahead, columns_[0].axis.size, channels_);
    const Stretch y_ahead = ahead_of(y, image, {row + 2, row + 3}, width, channels_);
    for (int64_t i = 0; i < phases; ++i) {
      const auto& [axis, first, step, count] = columns_[i];
      const float* const filters = filters_[under.phase * phases + i] + under.taps.begin * axis.taps * channels_;
      T* const out = y.data + image * y.image + row * y.row + i * y.pixel;
      kernels.correlate(axis, window, filters, bias, {out, phases * y.pixel, count}, channels_,
                        share_of(x_ahead, i, phases), share_of(y_ahead, i, phases));
    }
  }

 private:
  std::vector<Phase> columns_;
  std::vector<RowsUnder> under_;
  int64_t channels_;
  Scratch memory_;
  std::vector<float*> filters_;
};

// The sums of the filters' gradient over one thread's rows: in float for some pixels at a time, in double in all.
template <class T>
class FilterGradient {
 public:
  // totals [kernel][kernel][channels]
  FilterGradient(const DepthwiseKernels<T>& kernels, const Geometry& rows, const Geometry& columns, int64_t channels,
                 double* totals)
      : kernels_(kernels),
        columns_(forward_phases(columns)[0].axis),
        under_(rows_under(forward_phases(rows))),
        taps_(rows.kernel * columns.kernel),
        channels_(channels),
        row_(round_up(channels, kernels.lanes)),
        memory_(Scratch::kFilterGradients, taps_ * row_),
        totals_(totals) {
    std::fill_n(memory_.data(), taps_ * row_, 0.f);
  }
  ~FilterGradient() { kernels_.flush(memory_.data(), totals_, taps_, channels_); }

  void add_row(Pixels<const T> x, Pixels<const T> dy, int64_t image, int64_t row, int64_t width) {
    const RowsUnder& under = under_[row];
    const T* const upstream = dy.data + image * dy.image + row * dy.row;
    kernels_.accumulate(columns_, window_of(x, image, under), {upstream, dy.pixel, width},
                        memory_.data() + under.taps.begin * columns_.taps * row_, channels_,
                        ahead_of(x, image, under.ahead, columns_.size, channels_),
                        ahead_of(dy, image, {row + 2, row + 3}, width, channels_));
    constexpr int64_t kPixels = 512;
    if ((pixels_ += width) < kPixels) return;
    kernels_.flush(memory_.data(), totals_, taps_, channels_);
    pixels_ = 0;
  }

 private:
  const DepthwiseKernels<T>& kernels_;
  Axis columns_;
  std::vector<RowsUnder> under_;
  int64_t taps_, channels_, row_, pixels_ = 0;
  Scratch memory_;
  double* totals_;
};

int64_t threads_for(const Tensor& t) {
  return t.numel() < kSerial ? 1 : torch::stable::get_num_threads();
}

template <class T>
void forward(const Tensor& x, const Correlation& correlation, const float* bias, Tensor& y) {
  const auto kernels = depthwise_kernels<T>();
  const auto in = pixels<T>(x);
  const auto out = dense_pixels<T>(y);
  const int64_t height = y.size(2), width = y.size(3);
  parallel_parts(x.size(0) * height, threads_for(y), [&](Range r) {
    for (int64_t image = r.begin / height, row = r.begin % height, i = r.begin; i < r.end; ++i) {
      correlation.row(kernels, in, bias, out, image, row, width);
      if (++row == height) row = 0, ++image;
    }
  });
}

// Adds the sums of all parts, [part][kernel][kernel][channels], to the filters' gradient.
void add_totals(const std::vector<double>& totals, int64_t parts, int64_t height, int64_t width, int64_t channels,
                Tensor& grad_weight) {
  float* const gw = grad_weight.mutable_data_ptr<float>();
  for (int64_t tap = 0; tap < height * width; ++tap) {
    float* const to = gw + tap / width * grad_weight.stride(2) + tap % width * grad_weight.stride(3);
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0;
      for (int64_t i = 0; i < parts; ++i) sum += totals[(i * height * width + tap) * channels + c];
      to[c * grad_weight.stride(0)] += static_cast<float>(sum);
    }
  }
}

// Row after row of the upstream gradient: into the gradient of the filters, and to the rows of dx that lie over it.
template <class T>
void backward(const Tensor& grad, const Tensor& x, const Geometry& rows, const Geometry& columns,
              const Correlation* adjoint, Tensor* grad_weight, Tensor* dx) {
  const auto kernels = depthwise_kernels<T>();
  const auto in = pixels<T>(x), upstream = pixels<T>(grad);
  const auto out = dx ? std::optional(dense_pixels<T>(*dx)) : std::nullopt;
  const int64_t channels = x.size(1), taps = rows.kernel * columns.kernel, threads = threads_for(x);
  const std::vector<float> zero(channels);
  std::vector<double> totals(grad_weight ? threads * taps * channels : 0);

  parallel(threads, [&](int64_t thread) {
    std::optional<FilterGradient<T>> sums;
    if (grad_weight)
      sums.emplace(kernels, rows, columns, channels, &totals[thread * taps * channels]);
    for_parts(part(x.size(0) * rows.out, thread, threads), 1, [&](Range r) {
      for (int64_t i = r.begin; i < r.end; ++i) {
        const int64_t image = i / rows.out, row = i % rows.out;
        if (sums) sums->add_row(in, upstream, image, row, columns.out);
        if (!out) continue;
        const Range over = part(rows.in, row, rows.out);
        for (int64_t j = over.begin; j < over.end; ++j)
          adjoint->row(kernels, upstream, zero.data(), *out, image, j, columns.in);
      }
    });
  });
  if (grad_weight) add_totals(totals, threads, rows.kernel, columns.kernel, channels, *grad_weight);
}

void check_filters(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(0) >= channels && t.size(1) == 1, op,
                  ": ", name, ": expected float32 [>= ", channels, ", 1, kh, kw], got ", shape_of(t));
}

// One dimension each, after the checks that both directions share.
std::vector<Geometry> geometry_of(const char* op, const Tensor& x, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x: expected [N, C, H, W], got ", shape_of(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op,
                  ": x: expected float32 or bfloat16");
  STD_TORCH_CHECK(channels_innermost(x), op, ": x: expected channels innermost (channels_last)");
  check_filters(op, "weight", weight, x.size(1));
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding, dilation: expected two numbers each");
  std::vector<Geometry> geometry;
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t in = x.size(2 + d), kernel = weight.size(2 + d);
    STD_TORCH_CHECK(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1, op,
                    ": stride, padding, dilation: expected at least 1, 0 and 1, got ", stride[d], ", ", padding[d],
                    " and ", dilation[d]);
    const int64_t slack = in + 2 * padding[d] - dilation[d] * (kernel - 1) - 1;
    STD_TORCH_CHECK(kernel >= 1 && slack >= 0, op, ": x: expected at least the pixels that the filter covers, got ",
                    shape_of(x), " for ", shape_of(weight));
    geometry.push_back({in, slack / stride[d] + 1, kernel, stride[d], padding[d], dilation[d]});
  }
  return geometry;
}

}  // namespace

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "depthwise_conv2d";
  const auto geometry = geometry_of(op, x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  const Geometry &rows = geometry[0], &columns = geometry[1];
  std::vector<float> offset(channels);
  if (bias.has_value()) std::copy_n(input_vector(op, "bias", bias, channels), channels, offset.begin());
  Tensor y = new_images(x, channels, rows.out, columns.out);
  if (y.numel() == 0) return y;
  const Correlation correlation(forward_phases(rows), forward_phases(columns), weight, channels);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float> : forward<BFloat16>;
  run(x, correlation, offset.data(), y);
  return y;
}

Tensor depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 std::optional<Tensor> grad_weight, bool need_grad_x, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "depthwise_conv2d_backward";
  const auto geometry = geometry_of(op, x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  const Geometry &rows = geometry[0], &columns = geometry[1];
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad: expected the dtype of x");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels &&
                      grad.size(2) == rows.out && grad.size(3) == columns.out,
                  op, ": grad: expected [", x.size(0), ", ", channels, ", ", rows.out, ", ", columns.out, "], got ",
                  shape_of(grad));
  if (grad_weight.has_value()) {
    check_filters(op, "grad_weight", *grad_weight, channels);
    STD_TORCH_CHECK(grad_weight->size(2) == rows.kernel && grad_weight->size(3) == columns.kernel, op,
                    ": grad_weight: expected the filters of the weight, ", shape_of(weight), ", got ",
                    shape_of(*grad_weight));
  }
  const Tensor dy = channels_innermost(grad) ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  Tensor dx = need_grad_x ? new_images(x, channels, rows.in, columns.in) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return dx;
  std::optional<Correlation> adjoint;
  if (need_grad_x) adjoint.emplace(adjoint_phases(rows), adjoint_phases(columns), weight, channels);
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float> : backward<BFloat16>;
  run(dy, x, rows, columns, adjoint ? &*adjoint : nullptr, grad_weight.has_value() ? &*grad_weight : nullptr,
      need_grad_x ? &dx : nullptr);
  return dx;
}

// ---------------------------------------------------------------------------------------------- batch norms in passing

namespace {

// What a strip of rows reads is normalised into working memory that stays in the L2 cache.
constexpr int64_t kStrip = 48 << 10;  // floats

// A cut of images into strips of rows of the output, so that the rows of the input under each fit.
struct Strips {
  int64_t height, of_image, input;  // input: floats under a strip at most

  Strips(const Geometry& rows, int64_t row_of_input)
      : height(rows.out), input(kStrip + row_of_input * (rows.kernel + 1)) {
    const int64_t fit = kStrip / row_of_input - rows.dilation * (rows.kernel - 1) - 1;
    of_image = divide_up(height, std::clamp<int64_t>(fit / rows.stride + 1, 1, height));
  }

  int64_t image(int64_t i) const { return i / of_image; }
  Range rows(int64_t i) const { return part(height, i % of_image, of_image); }
};

// The rows of the input that rows of the output read.
Range rows_read(const Geometry& g, Range out) {
  const int64_t begin = std::clamp<int64_t>(out.begin * g.stride - g.padding, 0, g.in);
  return {begin, std::clamp((out.end - 1) * g.stride - g.padding + g.dilation * (g.kernel - 1) + 1, begin, g.in)};
}

// The rows of the output that read rows of the input, and `others`.
Range rows_reading(const Geometry& g, Range in, Range others) {
  const int64_t first = in.begin + g.padding - g.dilation * (g.kernel - 1), last = (in.end - 1 + g.padding) / g.stride;
  return {std::min(others.begin, first <= 0 ? 0 : divide_up(first, g.stride)),
          std::max(others.end, std::min(last + 1, g.out))};
}

// Rows of an image in working memory, as an image of which no others are there.
Pixels<const float> strip_of(const float* rows, Range which, int64_t width, int64_t channels) {
  const int64_t row = width * channels;
  return {rows - which.begin * row, channels, 0, row, channels};
}

// Rows of an image -> rows of all images' pixels.
Range pixels_of(int64_t image, Range rows, int64_t height, int64_t width) {
  return {(image * height + rows.begin) * width, (image * height + rows.end) * width};
}

template <class T>
Pixels<T> image_of(Rows<T> x, int64_t image, int64_t height, int64_t width, int64_t channels) {
  return {x.data + image * height * width * x.stride, channels, 0, width * x.stride, x.stride};
}

}  // namespace

int64_t depthwise_parts(int64_t images) { return balanced_parts(images, 1); }

void depthwise_forward(const Tensor& x, const Norm* norm, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, Tensor& y, const RowsDone& done) {
  const auto geometry = geometry_of("depthwise_conv2d", x, weight, stride, padding, {1, 1});
  const Geometry &rows = geometry[0], &columns = geometry[1];
  const int64_t channels = x.size(1), images = x.size(0);
  const auto kernels = depthwise_kernels<float>();
  const Correlation correlation(forward_phases(rows), forward_phases(columns), weight, channels);
  const std::vector<float> no_bias(channels);
  const Strips strips(rows, columns.in * channels);
  const auto in = rows_of<float>(x, 1);
  const auto out = rows_of<float>(y, 1);
  const int64_t parts = depthwise_parts(images);
  parallel(parts, [&](int64_t i) {
    const Scratch memory(Scratch::kInput, norm == nullptr ? 0 : strips.input);
    for_parts(part(images, i, parts), 1, [&](Range own) {
      for (int64_t strip = own.begin * strips.of_image; strip < own.end * strips.of_image; ++strip) {
        const int64_t image = strips.image(strip);
        const Range to = strips.rows(strip), from = rows_read(rows, to);
        Pixels<const float> input = image_of(in, image, rows.in, columns.in, channels);
        if (norm != nullptr) {
          normalise_rows(*norm, in, pixels_of(image, from, rows.in, columns.in), {memory.data(), channels});
          input = strip_of(memory.data(), from, columns.in, channels);
        }
        const Pixels<float> result = image_of(out, image, rows.out, columns.out, channels);
        for (int64_t row = to.begin; row < to.end; ++row)
          correlation.row(kernels, input, no_bias.data(), result, 0, row, columns.out);
        done(i, pixels_of(image, to, rows.out, columns.out));
      }
    });
  });
}

void depthwise_backward(const DepthwiseBackward& work) {
  const auto geometry =
      geometry_of("depthwise_conv2d_backward", work.x, work.weight, work.stride, work.padding, {1, 1});
  const Geometry &rows = geometry[0], &columns = geometry[1];
  const int64_t channels = work.x.size(1), images = work.x.size(0), taps = rows.kernel * columns.kernel;
  const auto kernels = depthwise_kernels<float>();
  std::optional<Correlation> adjoint;
  if (work.dx != nullptr) adjoint.emplace(adjoint_phases(rows), adjoint_phases(columns), work.weight, channels);
  const std::vector<float> zero(channels);
  const Strips strips(rows, columns.in * channels);
  const auto in = rows_of<float>(work.x, 1);
  const Rows<float> dx = work.dx != nullptr ? rows_of<float>(*work.dx, 1) : Rows<float>{nullptr, 0};

  // Of a strip: the rows of the output, those of the input over them, and the gradient's that these read.
  const auto rows_over = [&](Range to) {
    return Range{part(rows.in, to.begin, rows.out).begin, part(rows.in, to.end - 1, rows.out).end};
  };
  int64_t most = 0;
  for (int64_t i = 0; i < strips.of_image; ++i) {
    const Range to = strips.rows(i), read = rows_reading(rows, rows_over(to), to);
    most = std::max(most, read.end - read.begin);
  }

  const int64_t parts = depthwise_parts(images);
  std::vector<double> totals(work.dw ? parts * taps * channels : 0);
  parallel(parts, [&](int64_t i) {
    const Scratch input(Scratch::kInput, work.norm_of_x == nullptr || work.dw == nullptr ? 0 : strips.input);
    const Scratch gradient(Scratch::kOutput, most * columns.out * channels);
    std::optional<FilterGradient<float>> sums;
    if (work.dw) sums.emplace(kernels, rows, columns, channels, &totals[i * taps * channels]);
    for_parts(part(images, i, parts), 1, [&](Range own) {
      for (int64_t strip = own.begin * strips.of_image; strip < own.end * strips.of_image; ++strip) {
        const int64_t image = strips.image(strip);
        const Range to = strips.rows(strip), over = rows_over(to);
        const Range read = work.dx != nullptr ? rows_reading(rows, over, to) : to;
        input_gradient_rows(work.dy, pixels_of(image, read, rows.out, columns.out), {gradient.data(), channels});
        const Pixels<const float> dy = strip_of(gradient.data(), read, columns.out, channels);
        if (work.dx != nullptr && over.begin < over.end) {
          const Pixels<float> result = image_of(dx, image, rows.in, columns.in, channels);
          for (int64_t row = over.begin; row < over.end; ++row)
            adjoint->row(kernels, dy, zero.data(), result, 0, row, columns.in);
          if (work.done) work.done(i, pixels_of(image, over, rows.in, columns.in));
        }
        if (!sums) continue;
        Pixels<const float> x = image_of(in, image, rows.in, columns.in, channels);
        if (work.norm_of_x != nullptr) {
          const Range from = rows_read(rows, to);
          normalise_rows(*work.norm_of_x, in, pixels_of(image, from, rows.in, columns.in), {input.data(), channels});
          x = strip_of(input.data(), from, columns.in, channels);
        }
        for (int64_t row = to.begin; row < to.end; ++row) sums->add_row(x, dy, 0, row, columns.out);
      }
    });
  });
  if (work.dw) add_totals(totals, parts, rows.kernel, columns.kernel, channels, *work.dw);
}

}  // namespace us3l
