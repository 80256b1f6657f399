// Batch norms inside of a larger operation: applied where a convolution reads its input, their statistics and sums taken
// of what it has just written, while that is in the cache.
#pragma once

#include <functional>
#include <vector>

#include "batch_norm.h"
#include "winograd_kernels.h"

namespace us3l {

// What is told of rows (pixels) that are complete, while they are in the cache: by which part of the work, and which. A
// part tells of its rows in order.
using RowsDone = std::function<void(int64_t part, Range rows)>;

// Calls f(view, rows of it) for the views that a range of rows lies in.
template <class F>
void for_views(Range rows, int64_t rows_of_view, const F& f) {
  for (int64_t i = rows.begin; i < rows.end;) {
    const int64_t view = i / rows_of_view, end = std::min(rows.end, (view + 1) * rows_of_view);
    f(view, Range{i, end});
    i = end;
  }
}

// The moments of rows as they are completed, for each part of the work and each view; merged in order at the end.
template <class T>
class Moments {
 public:
  Moments(Rows<const T> c, int64_t channels, int64_t parts, int64_t views, int64_t rows_of_view)
      : c_(c),
        channels_(channels),
        parts_(parts),
        views_(views),
        rows_of_view_(rows_of_view),
        moments_(parts * views, OfRows{std::vector<double>(channels), std::vector<double>(channels), 0.0}) {}

  void add(int64_t part, Range rows) {
    std::vector<double> mean(channels_), m2(channels_);
    for_views(rows, rows_of_view_, [&](int64_t view, Range r) {
      const int64_t count = r.end - r.begin;
      kernels_.statistics(at(c_, r.begin, 0), count, channels_, mean.data(), m2.data());
      OfRows& total = moments_[part * views_ + view];
      merge_moments(channels_, total.mean.data(), total.m2.data(), total.seen, mean.data(), m2.data(),
                    static_cast<double>(count));
    });
  }

  void finish(double eps, float* mean, float* rstd) {
    for (int64_t v = 0; v < views_; ++v) {
      OfRows total{std::vector<double>(channels_), std::vector<double>(channels_), 0.0};
      for (int64_t p = 0; p < parts_; ++p) {
        const OfRows& m = moments_[p * views_ + v];
        if (m.seen > 0)
          merge_moments(channels_, total.mean.data(), total.m2.data(), total.seen, m.mean.data(), m.m2.data(), m.seen);
      }
      for (int64_t c = 0; c < channels_; ++c) {
        mean[v * channels_ + c] = static_cast<float>(total.mean[c]);
        rstd[v * channels_ + c] = static_cast<float>(1.0 / std::sqrt(total.m2[c] / total.seen + eps));
      }
    }
  }

 private:
  struct OfRows {
    std::vector<double> mean, m2;
    double seen;
  };

  Rows<const T> c_;
  int64_t channels_, parts_, views_, rows_of_view_;
  BatchNormKernels<T> kernels_ = batch_norm_kernels<T>();
  std::vector<OfRows> moments_;
};

// A batch norm of c with an activation behind it, with its statistics; in the backward, with slope and offset as well.
struct Norm {
  int64_t views, channels, rows_of_view, images_of_view;
  Clamp clamp;
  const float *mean, *rstd;
  std::vector<float> scale, bias, slope, offset;

  Norm(const char* op, const Tensor& c, const Tensor& mean_of_views, const Tensor& rstd_of_views, const Tensor& weight,
       const Tensor& bias_of_norm, Clamp clamp)
      : views(mean_of_views.size(0)),
        channels(c.size(1)),
        rows_of_view(c.size(0) * c.size(2) * c.size(3) / views),
        images_of_view(c.size(0) / views),
        clamp(clamp),
        mean(mean_of_views.const_data_ptr<float>()),
        rstd(rstd_of_views.const_data_ptr<float>()),
        scale(norm_scale(views, channels, rstd, input_vector(op, "norm weight", weight, channels))),
        bias(channels),
        slope(scale.size()),
        offset(scale.size()) {
    std::copy_n(input_vector(op, "norm bias", bias_of_norm, channels), channels, bias.begin());
  }

  bool has_activation() const { return !std::isnan(clamp.low); }
  bool has_relu() const { return has_activation() && std::isnan(clamp.high); }

  // With `masked`, gradients have yet to go through the activation.
  Affine affine(int64_t view, bool masked = true) const {
    return {mean + view * channels, scale.data() + view * channels, masked ? bias.data() : nullptr};
  }
  Tasks tasks() const { return {views, rows_of_view, channels}; }
};

// Some rows of activation(norm(c)).
inline void normalise_rows(const Norm& norm, Rows<const float> c, Range rows, Rows<float> to) {
  const auto kernels = batch_norm_kernels<float>();
  for_views(rows, norm.rows_of_view, [&](int64_t view, Range r) {
    kernels.normalise(at(c, r.begin, 0), {nullptr, 0}, at(to, r.begin - rows.begin, 0), r.end - r.begin, norm.channels,
                      norm.affine(view), norm.clamp);
  });
}

// The gradient of a norm's output: of what is behind its activation, if that is `masked`.
template <class T>
struct OutputGradient {
  Rows<const T> grad, c;
  const Norm& norm;
  bool masked;
};

// Some rows of the gradient of c.
inline void input_gradient_rows(const OutputGradient<float>& g, Range rows, Rows<float> to) {
  const auto kernels = batch_norm_kernels<float>();
  const Norm& norm = g.norm;
  for_views(rows, norm.rows_of_view, [&](int64_t view, Range r) {
    kernels.input_gradient(at(g.grad, r.begin, 0), at(g.c, r.begin, 0), at(to, r.begin - rows.begin, 0),
                           r.end - r.begin, norm.channels, norm.affine(view, g.masked),
                           norm.slope.data() + view * norm.channels, norm.offset.data() + view * norm.channels,
                           norm.clamp);
  });
}

// The sums of a norm's backward over rows of its output's gradient as they are completed.
template <class T>
class GradientSums {
 public:
  GradientSums(const OutputGradient<T>& g, int64_t parts) : g_(g), parts_(parts), sums_(parts * g.norm.views) {
    for (Sums& s : sums_) s = {std::vector<double>(g.norm.channels), std::vector<double>(g.norm.channels)};
  }

  void add(int64_t part, Range rows) {
    const Norm& norm = g_.norm;
    std::vector<double> g(norm.channels), gx(norm.channels);
    for_views(rows, norm.rows_of_view, [&](int64_t view, Range r) {
      kernels_.reduce(at(g_.grad, r.begin, 0), at(g_.c, r.begin, 0), {nullptr, 0}, {nullptr, 0}, r.end - r.begin,
                      norm.channels, norm.affine(view, g_.masked), norm.clamp, g.data(), gx.data());
      add_to(sums_[part * norm.views + view], g, gx);
    });
  }

  // Leaves slope and offset in the norm, and adds the parameters' gradients, unless null.
  void finish(Norm& norm, float* grad_weight, float* grad_bias) {
    for (int64_t v = 0; v < norm.views; ++v) {
      Sums& total = sums_[v];
      for (int64_t p = 1; p < parts_; ++p) add_to(total, sums_[p * norm.views + v]);
      const int64_t k = v * norm.channels;
      norm_gradients(norm.channels, norm.rows_of_view, total.g.data(), total.gx.data(), norm.rstd + k,
                     norm.scale.data() + k, grad_weight, grad_bias, norm.slope.data() + k, norm.offset.data() + k);
    }
  }

 private:
  struct Sums {
    std::vector<double> g, gx;
  };

  static void add_to(Sums& total, const std::vector<double>& g, const std::vector<double>& gx) {
    for (size_t c = 0; c < g.size(); ++c) {
      total.g[c] += g[c];
      total.gx[c] += gx[c];
    }
  }
  static void add_to(Sums& total, const Sums& more) { add_to(total, more.g, more.gx); }

  OutputGradient<T> g_;
  int64_t parts_;
  BatchNormKernels<T> kernels_ = batch_norm_kernels<T>();
  std::vector<Sums> sums_;
};

}  // namespace us3l
