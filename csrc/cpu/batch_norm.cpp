// Batch norm in two passes over x: statistics, then normalise + residual + activation; backward likewise.
//
// A pass is cut into tasks: views, then ranges of rows, then ranges of channels. Partial results of the row ranges are
// kept apart and merged in their order, so that results depend on the number of threads and on nothing else.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "batch_norm_kernels.h"
#include "tensors.h"

namespace us3l {
namespace {

// t itself if it is such a matrix, else a copy that is (the gradient of a mean is expanded, say).
Tensor as_rows(const Tensor& t) {
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

Clamp clamp_of(const char* op, int64_t activation) {
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
    // Below about the work of starting a thread; ranges of fewer rows would spend their time in merging, and ranges
    // of channels are whole cache lines.
    constexpr int64_t kSerial = 32768, kMinRows = 256, kMinChannels = 64;
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
    torch::stable::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f((*this)[i]);
    });
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

template <class T>
void forward(const Tensor& x, const float* weight, const float* bias, float* running_mean, float* running_var,
             const std::optional<Tensor>& residual, bool training, double momentum, double eps, const Tasks& tasks,
             Clamp clamp, Tensor& y, float* mean, float* rstd) {
  const auto kernels = batch_norm_kernels<T>();
  const int64_t views = tasks.views, rows = tasks.rows, channels = tasks.channels;
  const auto in = rows_of<T>(x, 1);

  if (training) {
    Partials partials(tasks);
    tasks.run([&](const Tasks::Task& t) {
      kernels.statistics(at(in, t.row, t.channel), t.rows, t.channels, partials.first(t.view, t.range) + t.channel,
                         partials.second(t.view, t.range) + t.channel);
    });
    for (int64_t v = 0; v < views; ++v) {
      double *const total = partials.first(v, 0), *const m2 = partials.second(v, 0);
      double seen = static_cast<double>(tasks[v * tasks.row_ranges * tasks.channel_ranges].rows);
      for (int64_t range = 1; range < tasks.row_ranges; ++range) {  // Chan's formula, range after range
        const double count =
            static_cast<double>(tasks[(v * tasks.row_ranges + range) * tasks.channel_ranges].rows);
        const double *const other = partials.first(v, range), *const other_m2 = partials.second(v, range);
        for (int64_t c = 0; c < channels; ++c) {
          const double delta = other[c] - total[c];
          total[c] += delta * (count / (seen + count));
          m2[c] += other_m2[c] + delta * delta * (seen * count / (seen + count));
        }
        seen += count;
      }
      for (int64_t c = 0; c < channels; ++c) {
        mean[v * channels + c] = static_cast<float>(total[c]);
        rstd[v * channels + c] = static_cast<float>(1.0 / std::sqrt(m2[c] / rows + eps));
        if (running_mean != nullptr)
          running_mean[c] = static_cast<float>(running_mean[c] + momentum * (total[c] - running_mean[c]));
        if (running_var != nullptr)
          running_var[c] = static_cast<float>(running_var[c] + momentum * (m2[c] / (rows - 1) - running_var[c]));
      }
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = running_mean[c];
      rstd[c] = static_cast<float>(1.0 / std::sqrt(running_var[c] + eps));
    }
  }

  std::vector<float> scale(views * channels), offset(channels);
  for (int64_t i = 0; i < views * channels; ++i) scale[i] = rstd[i] * (weight ? weight[i % channels] : 1.f);
  if (bias != nullptr) std::copy_n(bias, channels, offset.begin());

  const auto out = rows_of<T>(y, 1);
  const Rows<const T> add = residual.has_value() ? rows_of<T>(std::as_const(*residual), 1) : Rows<const T>{nullptr, 0};
  tasks.run([&](const Tasks::Task& t) {
    const int64_t k = t.view * channels + t.channel;
    kernels.normalise(at(in, t.row, t.channel), at(add, t.row, t.channel), at(out, t.row, t.channel), t.rows,
                      t.channels, {mean + k, &scale[k], &offset[t.channel]}, clamp);
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor* y, const float* weight, const float* bias,
              const float* mean, const float* rstd, float* grad_weight, float* grad_bias, bool training,
              const Tasks& tasks, Clamp clamp, Tensor* masked, Tensor* dx) {
  const auto kernels = batch_norm_kernels<T>();
  const int64_t views = tasks.views, rows = tasks.rows, channels = tasks.channels;
  const auto in = rows_of<T>(x, 1), upstream = rows_of<T>(grad, 1);
  const auto out = y ? rows_of<T>(*y, 1) : Rows<const T>{nullptr, 0};
  const auto mask = masked ? rows_of<T>(*masked, 1) : Rows<T>{nullptr, 0};

  std::vector<float> scale(views * channels), slope(views * channels), offset(views * channels);
  for (int64_t i = 0; i < views * channels; ++i) scale[i] = rstd[i] * (weight ? weight[i % channels] : 1.f);
  const auto affine = [&](const Tasks::Task& t) {
    const int64_t k = t.view * channels + t.channel;
    return Affine{mean + k, &scale[k], bias ? bias + t.channel : nullptr};
  };

  Partials partials(tasks);
  tasks.run([&](const Tasks::Task& t) {
    kernels.reduce(at(upstream, t.row, t.channel), at(in, t.row, t.channel), at(out, t.row, t.channel),
                   at(mask, t.row, t.channel), t.rows, t.channels, affine(t), clamp,
                   partials.first(t.view, t.range) + t.channel, partials.second(t.view, t.range) + t.channel);
  });

  // dx = w rstd (g - sum_g / n - (x - mean) rstd^2 sum_gx / n); without the sums if the statistics are constants.
  for (int64_t v = 0; v < views; ++v)
    for (int64_t c = 0; c < channels; ++c) {
      double sum_g = 0.0, sum_gx = 0.0;
      for (int64_t range = 0; range < tasks.row_ranges; ++range) {
        sum_g += partials.first(v, range)[c];
        sum_gx += partials.second(v, range)[c];
      }
      const int64_t i = v * channels + c;
      const double r = rstd[i], s = scale[i];
      if (grad_weight != nullptr) grad_weight[c] += static_cast<float>(sum_gx * r);
      if (grad_bias != nullptr) grad_bias[c] += static_cast<float>(sum_g);
      slope[i] = training ? static_cast<float>(-s * r * r * sum_gx / rows) : 0.f;
      offset[i] = training ? static_cast<float>(-s * sum_g / rows) : 0.f;
    }

  if (dx == nullptr) return;
  const auto result = rows_of<T>(*dx, 1);
  const auto g = masked ? Rows<const T>{mask.data, mask.stride} : upstream;
  tasks.run([&](const Tasks::Task& t) {
    const int64_t k = t.view * channels + t.channel;
    kernels.input_gradient(at(g, t.row, t.channel), at(in, t.row, t.channel), at(result, t.row, t.channel), t.rows,
                           t.channels, affine(t), &slope[k], &offset[k], clamp);
  });
}

// The matrix that x is, after the checks that both directions share.
Tasks tasks_of(const char* op, const Tensor& x, int64_t views) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x: expected [N, C, *], got ", shape_of(x));
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": x: expected float32 or bfloat16");
  STD_TORCH_CHECK(row_stride(x, 1) >= 0, op, ": x: expected channels innermost (channels_last)");
  STD_TORCH_CHECK(views >= 1 && x.size(0) % views == 0, op, ": views: expected a divisor of the batch of ", x.size(0),
                  ", got ", views);
  const int64_t channels = x.size(1);
  return Tasks(views, channels == 0 ? 0 : x.numel() / channels / views, channels);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum, double eps,
    int64_t views, int64_t activation) {
  const char* op = "batch_norm";
  const Tasks tasks = tasks_of(op, x, views);
  const int64_t channels = tasks.channels;
  STD_TORCH_CHECK(!training || tasks.rows > 1, op,
                  ": x: expected more than 1 value per channel and view in training, got ", shape_of(x), " and ",
                  views, " views");
  STD_TORCH_CHECK(training || (running_mean.has_value() && running_var.has_value() && views == 1), op,
                  ": running_mean, running_var: expected both, and 1 view, unless training");
  if (residual.has_value()) {
    check_like(op, "residual", *residual, x);
    residual = as_rows(*residual);
  }
  const float* const w = input_vector(op, "weight", weight, channels);
  const float* const b = input_vector(op, "bias", bias, channels);
  float* const rm = output_vector(op, "running_mean", running_mean, channels);
  float* const rv = output_vector(op, "running_var", running_var, channels);
  const Clamp clamp = clamp_of(op, activation);

  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {views, channels}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {views, channels}, ScalarType::Float);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float> : forward<BFloat16>;
  run(x, w, b, rm, rv, residual, training, momentum, eps, tasks, clamp, y, mean.mutable_data_ptr<float>(),
      rstd.mutable_data_ptr<float>());
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, std::optional<Tensor> weight, std::optional<Tensor> bias,
    const Tensor& mean, const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias, bool need_grad_x,
    bool need_grad_residual, bool training, int64_t activation) {
  const char* op = "batch_norm_backward";
  STD_TORCH_CHECK(mean.dim() == 2 && rstd.dim() == 2 && mean.is_contiguous() && rstd.is_contiguous() &&
                      mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float,
                  op, ": mean, rstd: expected contiguous float32 [V, C], got ", shape_of(mean), " and ",
                  shape_of(rstd));
  const Tasks tasks = tasks_of(op, x, mean.size(0));
  const int64_t channels = tasks.channels;
  STD_TORCH_CHECK(mean.size(1) == channels && rstd.size(0) == mean.size(0) && rstd.size(1) == channels, op,
                  ": mean, rstd: expected [V, ", channels, "], got ", shape_of(mean), " and ", shape_of(rstd));
  check_like(op, "grad", grad, x);
  const bool activated = activation != kNone;
  STD_TORCH_CHECK(activated || !need_grad_residual, op,
                  ": need_grad_residual: expected an activation; without one it is grad itself");
  STD_TORCH_CHECK(!need_grad_residual || !bias.has_value(), op, ": bias: expected none with need_grad_residual");
  if (activated) check_like(op, "y", y, x);
  const float* const w = input_vector(op, "weight", weight, channels);
  const float* const b = activated ? input_vector(op, "bias", bias, channels) : nullptr;
  float* const gw = output_vector(op, "grad_weight", grad_weight, channels);
  float* const gb = output_vector(op, "grad_bias", grad_bias, channels);
  const Clamp clamp = clamp_of(op, activation);

  const bool reads_y = activated && b == nullptr;
  const Tensor upstream = as_rows(grad), out = reads_y ? as_rows(y) : y;
  Tensor dx = need_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dresidual = need_grad_residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  // Behind the mask lies the gradient of the residual. Where it is not asked for, dx holds it between the passes.
  Tensor* const masked = !reads_y ? nullptr : need_grad_residual ? &dresidual : need_grad_x ? &dx : nullptr;
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float> : backward<BFloat16>;
  run(upstream, x, reads_y ? &out : nullptr, w, b, mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), gw, gb,
      training, tasks, clamp, masked, need_grad_x ? &dx : nullptr);
  return {dx, dresidual};
}

}  // namespace us3l
