// The body of a residual block with two 3x3 convolutions, as one operation:
//
//   c1 = conv1(x)   a1 = relu(norm1(c1))   c2 = conv2(a1)   y = relu(norm2(c2) + residual)
//
// Both convolutions are Winograd's. What a chain of operations writes and reads again is done on the way: the statistics
// of c1 and c2 while the images are in the cache that have just been computed; a1 where conv2 reads c1; the backward of
// both norms where the convolutions read their gradients; the sums of norm1's backward while the images of a1's gradient
// are in the cache; and dX of conv1 is added to the residual's gradient. a1 and the gradients of c1 and c2 are never in
// memory. The results are those of the chain to rounding.

#include <optional>
#include <vector>

#include "batch_norm.h"
#include "winograd.h"

namespace us3l {
namespace {

constexpr Clamp kReluClamp{0.f, std::numeric_limits<float>::quiet_NaN()};

// Calls f(view, images of it) for the views that a range of images lies in.
template <class F>
void for_views(Range images, int64_t images_of_view, const F& f) {
  for (int64_t i = images.begin; i < images.end;) {
    const int64_t view = i / images_of_view, end = std::min(images.end, (view + 1) * images_of_view);
    f(view, Range{i, end});
    i = end;
  }
}

template <class T>
Rows<T> rows_from(const Pixels<T>& p, int64_t image) {
  return {p.data + image * p.image, p.pixel};
}

// The moments of images as they are completed, for each part of the work and each view; merged in order at the end.
template <class T>
class MomentsOfImages {
 public:
  MomentsOfImages(Pixels<T> y, int64_t rows_of_image, int64_t parts, int64_t views, int64_t images_of_view)
      : y_(y),
        rows_of_image_(rows_of_image),
        parts_(parts),
        views_(views),
        images_of_view_(images_of_view),
        moments_(parts * views, Moments{std::vector<double>(y.channels), std::vector<double>(y.channels), 0.0}) {}

  void add(int64_t part, Range images) {
    std::vector<double> mean(y_.channels), m2(y_.channels);
    for_views(images, images_of_view_, [&](int64_t view, Range r) {
      const int64_t rows = (r.end - r.begin) * rows_of_image_;
      kernels_.statistics({y_.data + r.begin * y_.image, y_.pixel}, rows, y_.channels, mean.data(), m2.data());
      Moments& total = moments_[part * views_ + view];
      merge_moments(y_.channels, total.mean.data(), total.m2.data(), total.seen, mean.data(), m2.data(),
                    static_cast<double>(rows));
    });
  }

  void finish(double eps, float* mean, float* rstd) {
    const int64_t channels = y_.channels;
    for (int64_t v = 0; v < views_; ++v) {
      Moments total{std::vector<double>(channels), std::vector<double>(channels), 0.0};
      for (int64_t p = 0; p < parts_; ++p) {
        const Moments& m = moments_[p * views_ + v];
        if (m.seen > 0)
          merge_moments(channels, total.mean.data(), total.m2.data(), total.seen, m.mean.data(), m.m2.data(), m.seen);
      }
      for (int64_t c = 0; c < channels; ++c) {
        mean[v * channels + c] = static_cast<float>(total.mean[c]);
        rstd[v * channels + c] = static_cast<float>(1.0 / std::sqrt(total.m2[c] / total.seen + eps));
      }
    }
  }

 private:
  struct Moments {
    std::vector<double> mean, m2;
    double seen;
  };

  Pixels<T> y_;
  int64_t rows_of_image_, parts_, views_, images_of_view_;
  BatchNormKernels<T> kernels_ = batch_norm_kernels<T>();
  std::vector<Moments> moments_;
};

// A batch norm with ReLU behind it, with its statistics.
struct Norm {
  int64_t views, channels, images_of_view;
  const float *mean, *rstd;
  std::vector<float> scale, bias, slope, offset;

  Norm(const char* op, const Tensor& c, const Tensor& mean_of_views, const Tensor& rstd_of_views,
       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias_or_none)
      : views(mean_of_views.size(0)),
        channels(c.size(1)),
        images_of_view(c.size(0) / views),
        mean(mean_of_views.const_data_ptr<float>()),
        rstd(rstd_of_views.const_data_ptr<float>()),
        scale(norm_scale(views, channels, rstd, input_vector(op, "norm weight", weight, channels))),
        bias(channels),
        slope(scale.size()),
        offset(scale.size()) {
    if (const float* const b = input_vector(op, "norm bias", bias_or_none, channels))
      std::copy_n(b, channels, bias.begin());
  }

  NormOnRead on_read() const { return {mean, scale.data(), bias.data(), images_of_view}; }

  // masked: whether the gradient has yet to go through the ReLU.
  template <class T>
  NormBackwardOnRead<T> backward_on_read(Pixels<const T> c, bool masked) const {
    return {c, {mean, scale.data(), masked ? bias.data() : nullptr, images_of_view}, slope.data(), offset.data()};
  }
};

// The sums of a norm's backward over images of its output's gradient as they are completed.
template <class T>
class GradientSums {
 public:
  GradientSums(Pixels<const T> grad, Pixels<const T> c, int64_t rows_of_image, int64_t parts, const Norm& norm)
      : grad_(grad), c_(c), rows_of_image_(rows_of_image), parts_(parts), norm_(norm), sums_(parts * norm.views) {
    for (Sums& s : sums_) s = {std::vector<double>(norm.channels), std::vector<double>(norm.channels)};
  }

  void add(int64_t part, Range images) {
    std::vector<double> g(norm_.channels), gx(norm_.channels);
    for_views(images, norm_.images_of_view, [&](int64_t view, Range r) {
      const int64_t k = view * norm_.channels;
      kernels_.reduce(rows_from(grad_, r.begin), rows_from(c_, r.begin), {nullptr, 0}, {nullptr, 0},
                      (r.end - r.begin) * rows_of_image_, norm_.channels,
                      {norm_.mean + k, norm_.scale.data() + k, norm_.bias.data()}, kReluClamp, g.data(), gx.data());
      add_to(sums_[part * norm_.views + view], g, gx);
    });
  }

  void finish(Norm& norm, float* grad_weight, float* grad_bias) {
    for (int64_t v = 0; v < norm.views; ++v) {
      Sums& total = sums_[v];
      for (int64_t p = 1; p < parts_; ++p) add_to(total, sums_[p * norm.views + v].g, sums_[p * norm.views + v].gx);
      const int64_t k = v * norm.channels;
      norm_gradients(norm.channels, norm.images_of_view * rows_of_image_, total.g.data(), total.gx.data(),
                     norm.rstd + k, norm.scale.data() + k, grad_weight, grad_bias, norm.slope.data() + k,
                     norm.offset.data() + k);
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

  Pixels<const T> grad_, c_;
  int64_t rows_of_image_, parts_;
  const Norm& norm_;
  BatchNormKernels<T> kernels_ = batch_norm_kernels<T>();
  std::vector<Sums> sums_;
};

template <class T>
Pixels<const T> read(Pixels<T> p) {
  return {p.data, p.channels, p.image, p.row, p.pixel};
}

// The pixels of a dense tensor; its own strides say nothing in dimensions of size 1.
template <class T>
Pixels<const T> read_dense(const Tensor& t) {
  const int64_t channels = t.size(1), row = t.size(3) * channels;
  return {static_cast<const T*>(t.const_data_ptr()), channels, t.size(2) * row, row, channels};
}

// c = conv(norm(x)), and the statistics of c.
template <class T>
void convolve(const Tensor& x, const NormOnRead* norm, const WinogradFilters& w, const WinogradPlan& plan, double eps,
              Tensor& c, Tensor& mean, Tensor& rstd) {
  const std::vector<float> no_bias(plan.out);
  const int64_t views = mean.size(0);
  MomentsOfImages<T> moments(dense_pixels<T>(c), c.size(2) * c.size(3), plan.parts(), views, c.size(0) / views);
  winograd_forward<T>(plan, pixels<T>(x), norm, w, no_bias.data(), dense_pixels<T>(c),
                      [&](int64_t part, Range images) { moments.add(part, images); });
  moments.finish(eps, mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
}

template <class T>
void block_forward(const Tensor& x, const std::optional<Tensor>& weight1, const std::optional<Tensor>& filters1,
                   const std::optional<Tensor>& norm1_weight, const std::optional<Tensor>& norm1_bias,
                   const Tensor& weight2, const std::optional<Tensor>& filters2,
                   const std::optional<Tensor>& norm2_weight, const std::optional<Tensor>& norm2_bias,
                   const Tensor& residual, double eps1, double eps2, Tensor& y, Tensor& c1, Tensor& c2, Tensor& mean1,
                   Tensor& rstd1, Tensor& mean2, Tensor& rstd2) {
  const char* op = "basic_block";
  if (weight1.has_value()) {
    const WinogradPlan plan(x, c1.size(1));
    convolve<T>(x, nullptr, winograd_filters_of(op, plan, *weight1, filters1, false), plan, eps1, c1, mean1, rstd1);
  } else {
    const int64_t parts = balanced_parts(c1.size(0), 1);
    MomentsOfImages<T> moments(dense_pixels<T>(c1), c1.size(2) * c1.size(3), parts, mean1.size(0),
                               c1.size(0) / mean1.size(0));
    parallel(parts, [&](int64_t i) { moments.add(i, part(c1.size(0), i, parts)); });
    moments.finish(eps1, mean1.mutable_data_ptr<float>(), rstd1.mutable_data_ptr<float>());
  }
  const Norm norm1(op, c1, mean1, rstd1, norm1_weight, norm1_bias);
  const NormOnRead on_read = norm1.on_read();
  const WinogradPlan plan(c1, c2.size(1));
  convolve<T>(c1, &on_read, winograd_filters_of(op, plan, weight2, filters2, false), plan, eps2, c2, mean2, rstd2);

  const Norm norm2(op, c2, mean2, rstd2, norm2_weight, norm2_bias);
  const Tasks tasks(norm2.views, c2.numel() / c2.size(1) / norm2.views, c2.size(1));
  norm_apply<T>(tasks, rows_of<T>(std::as_const(c2), 1), rows_of<T>(residual, 1), rows_of<T>(y, 1), norm2.mean,
                norm2.scale.data(), norm2.bias.data(), kReluClamp);
}

struct BlockGradients {
  float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  std::optional<Filters<float>> weight1, weight2;
};

template <class T>
void block_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& c1, const Tensor& c2,
                    const std::optional<Tensor>& weight1, const std::optional<Tensor>& filters1, Norm& norm1,
                    const Tensor& weight2, const std::optional<Tensor>& filters2, Norm& norm2,
                    const BlockGradients& into, bool add_to_residual, Tensor& dresidual, Tensor* dx) {
  const char* op = "basic_block_backward";
  const int64_t rows_of_image = c1.size(2) * c1.size(3);

  // Behind the last ReLU: that is the gradient of the residual as well.
  const Tasks tasks2(norm2.views, norm2.images_of_view * rows_of_image, norm2.channels);
  norm_reduce<T>(tasks2, rows_of<T>(grad, 1), rows_of<T>(c2, 1), rows_of<T>(y, 1), rows_of<T>(dresidual, 1), norm2.mean,
                 norm2.rstd, norm2.scale.data(), nullptr, kReluClamp, into.norm2_weight, into.norm2_bias,
                 norm2.slope.data(), norm2.offset.data());

  const WinogradPlan plan2(c1, c2.size(1));
  Tensor da1 = new_images(c1, c1.size(1), c1.size(2), c1.size(3));
  Pixels<T> da1_pixels = dense_pixels<T>(da1);
  GradientSums<T> sums(read(da1_pixels), read_dense<T>(c1), rows_of_image, plan2.parts(), norm1);
  const NormOnRead norm1_on_read = norm1.on_read();
  const NormBackwardOnRead<T> norm2_on_read = norm2.backward_on_read<T>(read_dense<T>(c2), false);
  WinogradBackward<T> second{read_dense<T>(c1), read(dense_pixels<T>(dresidual))};
  second.norm_of_x = &norm1_on_read;
  second.norm_of_dy = &norm2_on_read;
  second.w = winograd_filters_of(op, plan2, weight2, filters2, true);
  second.dw = into.weight2 ? &*into.weight2 : nullptr;
  second.dx = &da1_pixels;
  second.done = [&](int64_t part, Range images) { sums.add(part, images); };
  winograd_backward(plan2, second);
  sums.finish(norm1, into.norm1_weight, into.norm1_bias);

  if (!weight1.has_value()) {
    if (dx == nullptr) return;
    const Tasks tasks1(norm1.views, norm1.images_of_view * rows_of_image, norm1.channels);
    norm_input_gradient<T>(tasks1, rows_of<T>(std::as_const(da1), 1), rows_of<T>(c1, 1), rows_of<T>(*dx, 1), norm1.mean,
                           norm1.scale.data(), norm1.bias.data(), kReluClamp, norm1.slope.data(), norm1.offset.data());
    return;
  }
  const WinogradPlan plan1(x, c1.size(1));
  const NormBackwardOnRead<T> norm1_backward = norm1.backward_on_read<T>(read_dense<T>(c1), true);
  Pixels<T> dx_pixels{};
  WinogradBackward<T> first{pixels<T>(x), read(da1_pixels)};
  first.norm_of_dy = &norm1_backward;
  first.w = winograd_filters_of(op, plan1, *weight1, filters1, true);
  first.dw = into.weight1 ? &*into.weight1 : nullptr;
  if (dx != nullptr) {
    dx_pixels = dense_pixels<T>(*dx);
    first.dx = &dx_pixels;
    first.add_to_dx = add_to_residual;
  }
  if (first.dw != nullptr || first.dx != nullptr) winograd_backward(plan1, first);
}

// Dense images with the channels innermost, as the passes over two tensors at once need them.
Tensor dense(const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }

void check_block(const char* op, const Tensor& x, int64_t views) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16), op,
                  ": x: expected float32 or bfloat16 [N, C, H, W], got ", shape_of(x));
  STD_TORCH_CHECK(channels_innermost(x) && x.numel() > 0, op, ": x: expected channels innermost (channels_last)");
  STD_TORCH_CHECK(views >= 1 && x.size(0) % views == 0, op, ": views: expected a divisor of the batch of ", x.size(0),
                  ", got ", views);
}

Filters<float> gradient_filters(const char* op, const char* name, const Tensor& t, int64_t out, int64_t in) {
  check_filters(op, name, t, out, in);
  return input_lanes(t.mutable_data_ptr<float>(), t, out, in);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> basic_block(
    const Tensor& x, std::optional<Tensor> weight1, std::optional<Tensor> filters1, std::optional<Tensor> norm1_weight,
    std::optional<Tensor> norm1_bias, const Tensor& weight2, std::optional<Tensor> filters2,
    std::optional<Tensor> norm2_weight, std::optional<Tensor> norm2_bias, std::optional<Tensor> residual,
    int64_t channels1, int64_t channels2, double eps1, double eps2, int64_t views) {
  const char* op = "basic_block";
  check_block(op, x, views);
  STD_TORCH_CHECK(weight1.has_value() || x.size(1) == channels1, op, ": x: expected ", channels1,
                  " channels without weight1, got ", shape_of(x));
  const auto vectors = [&](int64_t channels) {
    return torch::stable::new_empty(x, {views, channels}, ScalarType::Float);
  };
  Tensor c1 = weight1.has_value() ? new_images(x, channels1, x.size(2), x.size(3)) : dense(x);
  Tensor c2 = new_images(x, channels2, x.size(2), x.size(3)), y = torch::stable::empty_like(c2);
  check_like(op, "residual", residual.value_or(x), c2);
  const Tensor shortcut = as_rows(residual.value_or(x));
  Tensor mean1 = vectors(channels1), rstd1 = vectors(channels1), mean2 = vectors(channels2), rstd2 = vectors(channels2);
  const auto run = x.scalar_type() == ScalarType::Float ? block_forward<float> : block_forward<BFloat16>;
  run(x, weight1, filters1, norm1_weight, norm1_bias, weight2, filters2, norm2_weight, norm2_bias, shortcut, eps1, eps2,
      y, c1, c2, mean1, rstd1, mean2, rstd2);
  if (!weight1.has_value()) c1 = torch::stable::new_empty(x, {0});  // an operation does not return its input
  return {y, c1, c2, mean1, rstd1, mean2, rstd2};
}

std::tuple<Tensor, Tensor> basic_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& c1, const Tensor& c2,
    std::optional<Tensor> weight1, std::optional<Tensor> filters1, std::optional<Tensor> norm1_weight,
    std::optional<Tensor> norm1_bias, const Tensor& weight2, std::optional<Tensor> filters2,
    std::optional<Tensor> norm2_weight, const Tensor& mean1, const Tensor& rstd1, const Tensor& mean2,
    const Tensor& rstd2, std::optional<Tensor> grad_weight1, std::optional<Tensor> grad_norm1_weight,
    std::optional<Tensor> grad_norm1_bias, std::optional<Tensor> grad_weight2, std::optional<Tensor> grad_norm2_weight,
    std::optional<Tensor> grad_norm2_bias, bool need_grad_x, bool add_to_residual) {
  const char* op = "basic_block_backward";
  check_block(op, x, mean1.size(0));
  check_like(op, "grad", grad, y);
  check_like(op, "c2", c2, y);
  STD_TORCH_CHECK(!add_to_residual || weight1.has_value(), op, ": add_to_residual: expected weight1");
  const Tensor first = weight1.has_value() ? c1 : dense(x);
  Norm norm1(op, first, mean1, rstd1, norm1_weight, norm1_bias), norm2(op, c2, mean2, rstd2, norm2_weight, {});
  BlockGradients into{output_vector(op, "grad_norm1_weight", grad_norm1_weight, norm1.channels),
                      output_vector(op, "grad_norm1_bias", grad_norm1_bias, norm1.channels),
                      output_vector(op, "grad_norm2_weight", grad_norm2_weight, norm2.channels),
                      output_vector(op, "grad_norm2_bias", grad_norm2_bias, norm2.channels),
                      {},
                      {}};
  if (weight1.has_value() && grad_weight1.has_value())
    into.weight1 = gradient_filters(op, "grad_weight1", *grad_weight1, norm1.channels, x.size(1));
  if (grad_weight2.has_value())
    into.weight2 = gradient_filters(op, "grad_weight2", *grad_weight2, norm2.channels, norm1.channels);

  Tensor dresidual = torch::stable::empty_like(y);
  Tensor own = need_grad_x && !add_to_residual ? new_images(x, x.size(1), x.size(2), x.size(3))
                                               : torch::stable::new_empty(x, {0});
  Tensor* const dx = !need_grad_x ? nullptr : add_to_residual ? &dresidual : &own;
  const auto run = x.scalar_type() == ScalarType::Float ? block_backward<float> : block_backward<BFloat16>;
  run(as_rows(grad), x, y, first, c2, weight1, filters1, norm1, weight2, filters2, norm2, into, add_to_residual,
      dresidual, dx);
  return {own, dresidual};
}

}  // namespace us3l
