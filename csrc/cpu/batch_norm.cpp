// Batch norm in two passes over x: statistics, then normalise + residual + activation; backward likewise.

#include "batch_norm.h"

#include <type_traits>
#include <utility>

namespace us3l {
namespace {

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
      const auto rows_of_range = [&](int64_t range) {
        return static_cast<double>(tasks[(v * tasks.row_ranges + range) * tasks.channel_ranges].rows);
      };
      double seen = rows_of_range(0);
      for (int64_t range = 1; range < tasks.row_ranges; ++range)
        merge_moments(channels, total, m2, seen, partials.first(v, range), partials.second(v, range),
                      rows_of_range(range));
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

  const std::vector<float> scale = norm_scale(views, channels, rstd, weight);
  const Rows<const T> add = residual.has_value() ? rows_of<T>(std::as_const(*residual), 1) : Rows<const T>{nullptr, 0};
  norm_apply<T>(tasks, in, add, rows_of<T>(y, 1), mean, scale.data(), bias, clamp);
}

template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor* y, const float* weight, const float* bias,
              const float* mean, const float* rstd, float* grad_weight, float* grad_bias, bool training,
              const Tasks& tasks, Clamp clamp, Tensor* masked, Tensor* dx) {
  const auto in = rows_of<T>(x, 1), upstream = rows_of<T>(grad, 1);
  const auto out = y ? rows_of<T>(*y, 1) : Rows<const T>{nullptr, 0};
  const auto mask = masked ? rows_of<T>(*masked, 1) : Rows<T>{nullptr, 0};

  const std::vector<float> scale = norm_scale(tasks.views, tasks.channels, rstd, weight);
  std::vector<float> slope(scale.size()), offset(scale.size());
  norm_reduce<T>(tasks, upstream, in, out, mask, mean, rstd, scale.data(), bias, clamp, grad_weight, grad_bias,
                 slope.data(), offset.data());
  if (dx == nullptr) return;
  if (!training) {  // the statistics are constants
    std::fill(slope.begin(), slope.end(), 0.f);
    std::fill(offset.begin(), offset.end(), 0.f);
  }
  const auto g = masked ? Rows<const T>{mask.data, mask.stride} : upstream;
  norm_input_gradient<T>(tasks, g, in, rows_of<T>(*dx, 1), mean, scale.data(), bias, clamp, slope.data(), offset.data());
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
