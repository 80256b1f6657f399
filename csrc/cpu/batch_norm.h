// The passes of batch norm, cut into tasks: for the operation itself, and for those that have a batch norm inside.
//
// Tasks are views, then ranges of rows, then ranges of channels. Partial results of the row ranges are kept apart and
// merged in their order, so that results depend on the number of threads and on nothing else.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"
#include "batch_norm_kernels.h"
#include "tensors.h"

namespace us3l {

// t itself if it is a matrix of rows of channels, else a copy that is (the gradient of a mean is expanded, say).
inline Tensor as_rows(const Tensor& t) {
  if (row_stride(t, 1) >= 0) return t;
  if (t.dim() == 2) return torch::stable::contiguous(t);
  if (t.dim() == 4) return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  const Tensor columns = torch::stable::flatten(t, 2, -1);  // [N, C, rows of an image]
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(columns, 1, 2)), 1, 2);
}

template <class T>
Rows<T> at(Rows<T> m, int64_t row, int64_t channel) {
  if (m.data == nullptr) return m;
  return {m.data + row * m.stride + channel, m.stride};
}

inline Clamp clamp_of(const char* op, int64_t activation) {
  constexpr float none = std::numeric_limits<float>::quiet_NaN();
  STD_TORCH_CHECK(activation >= kNone && activation <= kRelu6, op, ": activation: expected 0, 1 or 2, got ",
                  activation);
  return {activation == kNone ? none : 0.f, activation == kRelu6 ? 6.f : none};
}

// The cut of views x rows x channels into tasks.
struct Tasks {
  int64_t views, rows, channels;  // rows of one view
  int64_t row_ranges = 1, channel_ranges = 1;

  struct Task {
    int64_t view, range, row, rows, channel, channels;
  };

  Tasks(int64_t views, int64_t rows, int64_t channels) : views(views), rows(rows), channels(channels) {
    // Ranges of fewer rows would spend their time in merging, and ranges of channels are whole cache lines.
    constexpr int64_t kMinRows = 256, kMinChannels = 64;
    const int64_t threads = views * rows * channels < kSerial ? 1 : torch::stable::get_num_threads();
    row_ranges = std::clamp<int64_t>(rows / kMinRows, 1, threads);
    const int64_t wanted = (threads + row_ranges - 1) / row_ranges;
    channel_ranges = std::clamp<int64_t>((channels + kMinChannels - 1) / kMinChannels, 1, wanted);
  }

  int64_t count() const { return views * row_ranges * channel_ranges; }

  Task operator[](int64_t i) const {
    const int64_t part = i % channel_ranges, range = i / channel_ranges % row_ranges;
    const int64_t row = rows * range / row_ranges, next_row = rows * (range + 1) / row_ranges;
    const auto boundary = [&](int64_t p) { return p == channel_ranges ? channels : channels * p / channel_ranges / 16 * 16; };
    const int64_t channel = boundary(part);
    const int64_t view = i / channel_ranges / row_ranges;
    return {view, range, view * rows + row, next_row - row, channel, boundary(part + 1) - channel};
  }

  template <class F>
  void run(const F& f) const {
    parallel(count(), [&](int64_t i) { f((*this)[i]); });
  }
};

// Sums of one pass: [views][row_ranges][channels], two of them.
struct Partials {
  explicit Partials(const Tasks& tasks)
      : channels(tasks.channels), ranges(tasks.row_ranges), data(2 * tasks.views * ranges * channels) {}
  double* first(int64_t view, int64_t range) { return &data[(view * ranges + range) * channels]; }
  double* second(int64_t view, int64_t range) { return first(view, range) + data.size() / 2; }

  int64_t channels, ranges;
  std::vector<double> data;
};

// Mean and sum of squared deviations of `seen` values, made those of `count` more by the formula of Chan, Golub and
// LeVeque (1983); then they have been seen, too.
inline void merge_moments(int64_t channels, double* mean, double* m2, double& seen, const double* other_mean,
                          const double* other_m2, double count) {
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = other_mean[c] - mean[c];
    mean[c] += delta * (count / (seen + count));
    m2[c] += other_m2[c] + delta * delta * (seen * count / (seen + count));
  }
  seen += count;
}

// rstd * weight for every view; weight null: ones.
inline std::vector<float> norm_scale(int64_t views, int64_t channels, const float* rstd, const float* weight) {
  std::vector<float> scale(views * channels);
  for (int64_t i = 0; i < views * channels; ++i) scale[i] = rstd[i] * (weight ? weight[i % channels] : 1.f);
  return scale;
}

// The gradient of x is g scale + (x - mean) slope + offset, with slope and offset out of the sums of g and of
// g (x - mean) over the rows of a view:  dx = w rstd (g - sum_g / n - (x - mean) rstd^2 sum_gx / n). Adds the gradients of
// the parameters, unless null.
inline void norm_gradients(int64_t channels, int64_t rows, const double* sum_g, const double* sum_gx, const float* rstd,
                           const float* scale, float* grad_weight, float* grad_bias, float* slope, float* offset) {
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c], s = scale[c];
    if (grad_weight != nullptr) grad_weight[c] += static_cast<float>(sum_gx[c] * r);
    if (grad_bias != nullptr) grad_bias[c] += static_cast<float>(sum_g[c]);
    slope[c] = static_cast<float>(-s * r * r * sum_gx[c] / rows);
    offset[c] = static_cast<float>(-s * sum_g[c] / rows);
  }
}

// y = clamp((x - mean) * scale + bias + residual); bias null: zeros.
template <class T>
void norm_apply(const Tasks& tasks, Rows<const T> x, Rows<const T> residual, Rows<T> y, const float* mean,
                const float* scale, const float* bias, Clamp clamp) {
  const auto kernels = batch_norm_kernels<T>();
  std::vector<float> offset(tasks.channels);
  if (bias != nullptr) std::copy_n(bias, tasks.channels, offset.begin());
  tasks.run([&](const Tasks::Task& t) {
    const int64_t k = t.view * tasks.channels + t.channel;
    kernels.normalise(at(x, t.row, t.channel), at(residual, t.row, t.channel), at(y, t.row, t.channel), t.rows,
                      t.channels, {mean + k, scale + k, &offset[t.channel]}, clamp);
  });
}

// The first pass of the backward, see BatchNormKernels::reduce: leaves slope and offset, and adds the parameters'
// gradients.
template <class T>
void norm_reduce(const Tasks& tasks, Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked,
                 const float* mean, const float* rstd, const float* scale, const float* bias, Clamp clamp,
                 float* grad_weight, float* grad_bias, float* slope, float* offset) {
  const auto kernels = batch_norm_kernels<T>();
  const int64_t channels = tasks.channels;
  Partials partials(tasks);
  tasks.run([&](const Tasks::Task& t) {
    const int64_t k = t.view * channels + t.channel;
    kernels.reduce(at(grad, t.row, t.channel), at(x, t.row, t.channel), at(y, t.row, t.channel),
                   at(masked, t.row, t.channel), t.rows, t.channels,
                   {mean + k, scale + k, bias ? bias + t.channel : nullptr}, clamp,
                   partials.first(t.view, t.range) + t.channel, partials.second(t.view, t.range) + t.channel);
  });
  for (int64_t v = 0; v < tasks.views; ++v) {
    double *const sum_g = partials.first(v, 0), *const sum_gx = partials.second(v, 0);
    for (int64_t range = 1; range < tasks.row_ranges; ++range)
      for (int64_t c = 0; c < channels; ++c) {
        sum_g[c] += partials.first(v, range)[c];
        sum_gx[c] += partials.second(v, range)[c];
      }
    const int64_t k = v * channels;
    norm_gradients(channels, tasks.rows, sum_g, sum_gx, rstd + k, scale + k, grad_weight, grad_bias, slope + k,
                   offset + k);
  }
}

// The second: dx = g * scale + (x - mean) * slope + offset, with g behind the mask of the forward if bias is not null.
template <class T>
void norm_input_gradient(const Tasks& tasks, Rows<const T> grad, Rows<const T> x, Rows<T> dx, const float* mean,
                         const float* scale, const float* bias, Clamp clamp, const float* slope, const float* offset) {
  const auto kernels = batch_norm_kernels<T>();
  tasks.run([&](const Tasks::Task& t) {
    const int64_t k = t.view * tasks.channels + t.channel;
    kernels.input_gradient(at(grad, t.row, t.channel), at(x, t.row, t.channel), at(dx, t.row, t.channel), t.rows,
                           t.channels, {mean + k, scale + k, bias ? bias + t.channel : nullptr}, slope + k, offset + k,
                           clamp);
  });
}

}  // namespace us3l
