// Layer norm over the last dimension: the plan around the kernels of layer_norm_kernels.h.
//
// Rows are cut among the threads by their number alone, and the threads' sums for the parameters are merged in order:
// same threads, same bits.

#include <algorithm>
#include <utility>
#include <vector>

#include "../ops.h"
#include "layer_norm_kernels.h"
#include "scratch.h"
#include "tensors.h"

namespace us3l {
namespace {

// t itself if its rows lie at one distance, else a copy of which that is so.
Tensor as_rows(const Tensor& t) {
  return row_stride(t, t.dim() - 1) >= 0 ? t : torch::stable::contiguous(t);
}

template <class T>
Rows<T> from(Rows<T> m, int64_t row) {
  return {m.data + row * m.stride, m.stride};
}

struct Matrix {
  int64_t rows, channels, threads;

  explicit Matrix(const Tensor& x) : channels(x.size(x.dim() - 1)) {
    rows = channels == 0 ? 0 : x.numel() / channels;
    threads = x.numel() < kSerial ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), rows);
  }
};

template <class T>
void forward(const Matrix& m, const Tensor& x, const float* weight, const float* bias, double eps, Tensor& y,
             float* mean, float* rstd) {
  const auto kernels = layer_norm_kernels<T>();
  const auto in = rows_of<T>(x, x.dim() - 1);
  const auto out = rows_of<T>(y, y.dim() - 1);
  parallel_parts(m.rows, m.threads, [&](Range r) {
    kernels.forward(from(in, r.begin), from(out, r.begin), r.end - r.begin, m.channels, weight, bias, eps,
                    mean + r.begin, rstd + r.begin);
  });
}

template <class T>
void backward(const Matrix& m, const Tensor& grad, const Tensor& x, const float* weight, const float* mean,
              const float* rstd, float* grad_weight, float* grad_bias, Tensor* dx) {
  const auto kernels = layer_norm_kernels<T>();
  const auto upstream = rows_of<T>(grad, grad.dim() - 1), in = rows_of<T>(x, x.dim() - 1);
  const auto out = dx ? rows_of<T>(*dx, dx->dim() - 1) : Rows<T>{nullptr, 0};
  const bool sums_needed = grad_weight != nullptr || grad_bias != nullptr;
  std::vector<double> totals(sums_needed ? m.threads * 2 * m.channels : 0);
  parallel(m.threads, [&](int64_t thread) {
    const Range r = part(m.rows, thread, m.threads);
    const Scratch sums(Scratch::kFilterGradients, sums_needed ? 2 * m.channels : 0);
    if (sums_needed) std::fill_n(sums.data(), 2 * m.channels, 0.f);
    kernels.backward(from(upstream, r.begin), from(in, r.begin), dx ? from(out, r.begin) : out, r.end - r.begin,
                     m.channels, weight, mean + r.begin, rstd + r.begin, sums.data(),
                     sums_needed ? &totals[thread * 2 * m.channels] : nullptr);
  });
  const auto add = [&](float* to, const double* from) {
    for (int64_t c = 0; to != nullptr && c < m.channels; ++c) {
      double sum = 0.0;
      for (int64_t thread = 0; thread < m.threads; ++thread) sum += from[thread * 2 * m.channels + c];
      to[c] += static_cast<float>(sum);
    }
  };
  add(grad_weight, totals.data());
  add(grad_bias, totals.data() + m.channels);
}

void check_rows(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x: expected [..., C], got a scalar");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op,
                  ": x: expected float32 or bfloat16");
  STD_TORCH_CHECK(row_stride(x, x.dim() - 1) >= 0, op, ": x: expected rows at one distance, of contiguous channels");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  const char* op = "layer_norm";
  check_rows(op, x);
  const Matrix m(x);
  const std::vector<float> one(m.channels, 1.f), zero(m.channels);
  const float* const w = weight.has_value() ? input_vector(op, "weight", weight, m.channels) : one.data();
  const float* const b = bias.has_value() ? input_vector(op, "bias", bias, m.channels) : zero.data();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = torch::stable::new_empty(x, sizes);
  sizes.back() = 1;
  Tensor mean = torch::stable::new_empty(x, sizes, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, sizes, ScalarType::Float);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float> : forward<BFloat16>;
  if (m.rows > 0)
    run(m, x, w, b, eps, y, mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
  return {y, mean, rstd};
}

Tensor layer_norm_backward(const Tensor& grad, const Tensor& x, std::optional<Tensor> weight, const Tensor& mean,
                           const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                           bool need_grad_x) {
  const char* op = "layer_norm_backward";
  check_rows(op, x);
  check_like(op, "grad", grad, x);
  const Matrix m(x);
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float &&
                      mean.is_contiguous() && rstd.is_contiguous() && mean.numel() == m.rows && rstd.numel() == m.rows,
                  op, ": mean, rstd: expected contiguous float32, one value for each of ", m.rows, " rows, got ",
                  shape_of(mean), " and ", shape_of(rstd));
  const std::vector<float> one(m.channels, 1.f);
  const float* const w = weight.has_value() ? input_vector(op, "weight", weight, m.channels) : one.data();
  float* const gw = output_vector(op, "grad_weight", grad_weight, m.channels);
  float* const gb = output_vector(op, "grad_bias", grad_bias, m.channels);
  Tensor dx = need_grad_x ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float> : backward<BFloat16>;
  if (m.rows > 0 && (need_grad_x || gw != nullptr || gb != nullptr))
    run(m, as_rows(grad), x, w, mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), gw, gb,
        need_grad_x ? &dx : nullptr);
  return dx;
}

}  // namespace us3l
