// Convolutions that follow each other, each with its batch norm, as one operation:
//
//   c[i] = conv[i](a[i - 1])    a[i] = activation[i](norm[i](c[i]))    a[0] = x    y = activation[n](norm[n](c[n]) + residual)
//
// What a chain of operations writes and reads again is done on the way, where the convolution has it so: the statistics
// of c[i] are taken while what has just been computed is in the cache; a[i] where conv[i + 1] reads c[i]; the backward of
// norm[i] where conv[i] reads its gradient; its sums while what conv[i + 1] has made of it is in the cache; and dX of the
// first convolution is added to the residual's gradient. a[i] and the gradients of c[i] are then never in memory. Around
// other convolutions they are, for as long as it takes. The results are those of the chain to rounding.

#include <optional>
#include <vector>

#include "../ops.h"
#include "depthwise.h"
#include "norm_in_passing.h"
#include "pointwise.h"
#include "winograd.h"

namespace us3l {
namespace {

// One convolution of the chain, and the norm behind it.
struct Layer {
  int64_t algorithm;
  Tensor weight;
  std::optional<Tensor> filters;  // the weight's, transformed, for Winograd
  int64_t channels;
  std::vector<int64_t> stride, padding;
  Tensor norm_weight, norm_bias;
  double eps;
  Clamp clamp;
};

std::vector<Layer> layers_of(const char* op, const std::vector<Tensor>& parameters,
                             const std::vector<std::optional<Tensor>>& filters, const std::vector<int64_t>& sizes,
                             const std::vector<double>& eps) {
  const size_t n = eps.size();
  STD_TORCH_CHECK(n > 0 && parameters.size() == 3 * n && filters.size() == n && sizes.size() == 7 * n, op,
                  ": parameters, filters, sizes: expected 3, 1 and 7 for each of the ", n, " eps, got ",
                  parameters.size(), ", ", filters.size(), " and ", sizes.size());
  std::vector<Layer> layers;
  for (size_t i = 0; i < n; ++i) {
    const int64_t* const size = &sizes[7 * i];
    layers.push_back({size[0], parameters[3 * i], filters[i], size[1], {size[2], size[3]}, {size[4], size[5]},
                      parameters[3 * i + 1], parameters[3 * i + 2], eps[i], clamp_of(op, size[6])});
    STD_TORCH_CHECK(size[1] > 0 && size[2] > 0 && size[3] > 0 && size[4] >= 0 && size[5] >= 0, op,
                    ": sizes: expected channels and strides of at least 1, no negative padding");
  }
  return layers;
}

// The images that a matrix of rows is, of the size of t.
template <class T>
Pixels<T> images_of(Rows<T> rows, const Tensor& t) {
  const int64_t row = t.size(3) * rows.stride;
  return {rows.data, t.size(1), t.size(2) * row, row, rows.stride};
}

NormOnRead on_read(const Norm& norm) { return {norm.mean, norm.scale.data(), norm.bias.data(), norm.images_of_view}; }

ImagesDone images_done(RowsDone done, int64_t rows_of_image) {
  return [done = std::move(done), rows_of_image](int64_t part, Range images) {
    done(part, {images.begin * rows_of_image, images.end * rows_of_image});
  };
}

PointwiseWeight pointwise_weight(const Layer& layer, int64_t in) {
  const Tensor& w = layer.weight;
  return {w.const_data_ptr<float>(), layer.channels, in, w.stride(0), w.stride(1)};
}

int64_t output_size(const Layer& layer, const Tensor& x, int64_t d) {
  return (x.size(2 + d) + 2 * layer.padding[d] - layer.weight.size(2 + d)) / layer.stride[d] + 1;
}

// Whether t can be a weight, or the gradient of one, for x.
void check_weight(const char* op, const char* name, const Layer& layer, const Tensor& t, const Tensor& x) {
  const int64_t in = layer.algorithm == kDepthwise ? 1 : x.size(1);
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(0) >= layer.channels &&
                      t.size(1) >= in && t.size(2) == layer.weight.size(2) && t.size(3) == layer.weight.size(3),
                  op, ": ", name, ": expected float32 [>= ", layer.channels, ", >= ", in, ", kh, kw], got ", shape_of(t));
}

// Whether the algorithm takes the convolution of x.
void check_layer(const char* op, const Layer& layer, const Tensor& x) {
  const Tensor& w = layer.weight;
  STD_TORCH_CHECK(w.dim() == 4, op, ": parameters: expected a weight [K, C, kh, kw], got ", shape_of(w));
  check_weight(op, "parameters", layer, w, x);
  const auto geometry_is = [&](int64_t stride) {
    return w.size(2) == 3 && w.size(3) == 3 && layer.stride == std::vector<int64_t>{stride, stride} &&
           layer.padding == std::vector<int64_t>{1, 1};
  };
  bool fits = false;
  switch (layer.algorithm) {
    case kProduct:
      fits = true;
      break;
    case kWinograd:
      fits = geometry_is(1);
      break;
    case kWinogradStride2:
      fits = geometry_is(2);
      break;
    case kDepthwise:
      fits = w.size(1) == 1 && layer.channels == x.size(1);
  }
  STD_TORCH_CHECK(fits, op, ": sizes: expected an algorithm that takes the convolution, got ", layer.algorithm,
                  " for a weight ", shape_of(w), ", ", x.size(1), " to ", layer.channels, " channels, stride ",
                  layer.stride[0], " and ", layer.stride[1], ", padding ", layer.padding[0], " and ", layer.padding[1]);
  for (int64_t d = 0; d < 2; ++d)
    STD_TORCH_CHECK(x.size(2 + d) + 2 * layer.padding[d] >= w.size(2 + d), op,
                    ": x: expected at least the pixels that the filter covers, got ", shape_of(x), " for ", shape_of(w));
}

// How a convolution and its norms are done: by whom the norms are done in passing.
enum class How { winograd, pointwise, depthwise, apart };

template <class T>
How how(const Layer& layer, const Tensor& x, const Norm* norm_of_x) {
  if (layer.algorithm == kWinograd)
    return (norm_of_x == nullptr || norm_of_x->has_relu()) && std::isnan(layer.clamp.high) ? How::winograd : How::apart;
  if constexpr (std::is_same_v<T, float>) {
    if (layer.algorithm == kDepthwise) return How::depthwise;
    const Tensor& w = layer.weight;
    const bool one = w.size(2) == 1 && w.size(3) == 1 && layer.stride == std::vector<int64_t>{1, 1} &&
                     layer.padding == std::vector<int64_t>{0, 0};
    if (layer.algorithm == kProduct && one &&
        is_pointwise(x.size(0) * x.size(2) * x.size(3), x.size(1), layer.channels))
      return How::pointwise;
  }
  return How::apart;
}

// activation(norm(c)), in memory.
template <class T>
Tensor applied(const Norm& norm, const Tensor& c, const Tensor* residual) {
  Tensor a = torch::stable::empty_like(c);
  norm_apply<T>(norm.tasks(), rows_of<T>(c, 1), residual ? rows_of<T>(*residual, 1) : Rows<const T>{nullptr, 0},
                rows_of<T>(a, 1), norm.mean, norm.scale.data(), norm.bias.data(), norm.clamp);
  return a;
}

// c = conv(norm(x)), of x itself with norm null, and the statistics of c. x is a matrix of rows.
template <class T>
Tensor convolve(const char* op, const Layer& layer, const Tensor& x, const Norm* norm, Tensor& mean, Tensor& rstd) {
  check_layer(op, layer, x);
  const How done_as = how<T>(layer, x, norm);
  Tensor c = done_as == How::apart ? torch::stable::new_empty(x, {0})
                                   : new_images(x, layer.channels, output_size(layer, x, 0), output_size(layer, x, 1));
  if (done_as == How::apart) {
    const Tensor a = norm ? applied<T>(*norm, x, nullptr) : x;
    switch (layer.algorithm) {
      case kWinograd:
        c = conv2d_3x3(a, layer.weight, {}, layer.channels, layer.filters);
        break;
      case kWinogradStride2:
        c = conv2d_3x3_stride2(a, layer.weight, {}, layer.channels);
        break;
      case kDepthwise:
        c = depthwise_conv2d(a, layer.weight, {}, layer.stride, layer.padding, {1, 1});
        break;
      default:
        c = conv2d(a, layer.weight, {}, layer.channels, layer.stride, layer.padding, {1, 1}, 1);
    }
  }
  const int64_t views = mean.size(0), rows_of_image = c.size(2) * c.size(3), rows = c.size(0) * rows_of_image;
  const Rows<T> to = rows_of<T>(c, 1);
  const auto moments_of = [&](int64_t parts) {
    return Moments<T>({to.data, to.stride}, layer.channels, parts, views, rows / views);
  };
  const auto finish = [&](Moments<T>& moments) {
    moments.finish(layer.eps, mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
  };
  if (done_as == How::winograd) {
    const WinogradPlan plan(x, layer.channels);
    const std::vector<float> no_bias(layer.channels);
    Moments<T> moments = moments_of(plan.parts());
    const NormOnRead norm_on_read = norm ? on_read(*norm) : NormOnRead{};
    winograd_forward<T>(plan, images_of(rows_of<T>(x, 1), x), norm ? &norm_on_read : nullptr,
                        winograd_filters_of(op, plan, layer.weight, layer.filters, false), no_bias.data(), dense_pixels<T>(c),
                        images_done([&](int64_t part, Range r) { moments.add(part, r); }, rows_of_image));
    finish(moments);
    return c;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (done_as == How::pointwise) {
      Moments<T> moments = moments_of(pointwise_parts(rows));
      pointwise_forward(rows, rows_of<T>(x, 1), norm, pointwise_weight(layer, x.size(1)), to,
                        [&](int64_t part, Range r) { moments.add(part, r); });
      finish(moments);
      return c;
    }
    if (done_as == How::depthwise) {
      Moments<T> moments = moments_of(depthwise_parts(x.size(0)));
      depthwise_forward(x, norm, layer.weight, layer.stride, layer.padding, c,
                        [&](int64_t part, Range r) { moments.add(part, r); });
      finish(moments);
      return c;
    }
  }
  const int64_t parts = balanced_parts(rows, 1);
  Moments<T> moments = moments_of(parts);
  parallel_if_large(c.numel(), parts, [&](int64_t i) { moments.add(i, part(rows, i, parts)); });
  finish(moments);
  return c;
}

// What the backward of one layer has, and where its results go.
struct LayerBackward {
  const Tensor& x;                       // a matrix of rows, what the convolution reads
  Norm* norm_of_x;                       // if it reads norm(x)
  const Tensor &grad, &c;                // the gradient behind the norm of c
  const Norm& norm;
  bool masked;  // whether that gradient has yet to go through the activation
  std::optional<Tensor> dw;
  float *dnorm_weight, *dnorm_bias;  // of the norm of x
  bool need_dx;
  Tensor* dx;  // what dx is added to, unless null
};

// dx, which is the one given, or a new one; and of the norm of x, if any, slope and offset.
template <class T>
Tensor convolve_backward(const char* op, const Layer& layer, const LayerBackward& work) {
  const Tensor& x = work.x;
  const Tensor nothing = torch::stable::new_empty(x, {0});
  if (!work.need_dx && !work.dw.has_value()) return nothing;
  if (work.dw.has_value()) check_weight(op, "gradients", layer, *work.dw, x);
  const How done_as = how<T>(layer, x, work.norm_of_x);
  const OutputGradient<T> dy{rows_of<T>(work.grad, 1), rows_of<T>(work.c, 1), work.norm, work.masked};
  const int64_t rows_of_image = x.size(2) * x.size(3), rows = x.size(0) * rows_of_image;
  Tensor dx = nothing;
  if (done_as == How::apart) {
    Tensor dc = torch::stable::empty_like(work.c);
    const Norm& norm = work.norm;
    norm_input_gradient<T>(norm.tasks(), dy.grad, dy.c, rows_of<T>(dc, 1), norm.mean, norm.scale.data(),
                           work.masked ? norm.bias.data() : nullptr, norm.clamp, norm.slope.data(), norm.offset.data());
    const Tensor a = work.norm_of_x && work.dw.has_value() ? applied<T>(*work.norm_of_x, x, nullptr) : x;
    switch (layer.algorithm) {
      case kWinograd:
        dx = conv2d_3x3_backward(dc, a, layer.weight, work.dw, work.need_dx, layer.filters);
        break;
      case kWinogradStride2:
        dx = conv2d_3x3_stride2_backward(dc, a, layer.weight, work.dw, work.need_dx);
        break;
      case kDepthwise:
        dx = depthwise_conv2d_backward(dc, a, layer.weight, work.dw, work.need_dx, layer.stride, layer.padding, {1, 1});
        break;
      default:
        dx = conv2d_backward(dc, a, layer.weight, work.dw, {}, work.need_dx, layer.stride, layer.padding, {1, 1}, 1);
    }
  } else if (work.need_dx) {
    dx = work.dx != nullptr ? *work.dx : new_images(x, x.size(1), x.size(2), x.size(3));
  }

  std::optional<GradientSums<T>> sums;
  const auto sums_of = [&](int64_t parts) -> RowsDone {
    if (work.norm_of_x == nullptr || !work.need_dx) return {};
    const Rows<T> grad = rows_of<T>(dx, 1);
    sums.emplace(OutputGradient<T>{{grad.data, grad.stride}, rows_of<T>(x, 1), *work.norm_of_x,
                                   work.norm_of_x->has_activation()},
                 parts);
    return [&](int64_t part, Range r) { sums->add(part, r); };
  };
  const auto finish = [&] {
    if (sums) sums->finish(*work.norm_of_x, work.dnorm_weight, work.dnorm_bias);
    return dx;
  };
  if (done_as == How::winograd) {
    const WinogradPlan plan(x, layer.channels);
    const NormOnRead norm_on_read = work.norm_of_x ? on_read(*work.norm_of_x) : NormOnRead{};
    NormOnRead backward_on_read = on_read(work.norm);
    if (!work.masked) backward_on_read.bias = nullptr;
    const NormBackwardOnRead<T> norm_backward{images_of(dy.c, work.c), backward_on_read, work.norm.slope.data(),
                                              work.norm.offset.data()};
    WinogradBackward<T> backward{images_of(rows_of<T>(x, 1), x), images_of(dy.grad, work.c)};
    backward.norm_of_x = work.norm_of_x ? &norm_on_read : nullptr;
    backward.norm_of_dy = &norm_backward;
    backward.w = winograd_filters_of(op, plan, layer.weight, layer.filters, true);
    std::optional<Filters<float>> dw;
    if (work.dw.has_value()) {
      check_filters(op, "grad_weights", *work.dw, layer.channels, x.size(1));
      dw = input_lanes(work.dw->mutable_data_ptr<float>(), *work.dw, layer.channels, x.size(1));
      backward.dw = &*dw;
    }
    Pixels<T> to{};
    if (work.need_dx) {
      to = images_of(rows_of<T>(dx, 1), x);
      backward.dx = &to;
      backward.add_to_dx = work.dx != nullptr;
      if (RowsDone done = sums_of(plan.parts())) backward.done = images_done(std::move(done), rows_of_image);
    }
    winograd_backward(plan, backward);
    return finish();
  }
  if constexpr (std::is_same_v<T, float>) {
    if (done_as == How::pointwise) {
      PointwiseBackward backward{rows_of<T>(x, 1), work.norm_of_x, dy, pointwise_weight(layer, x.size(1))};
      if (work.dw.has_value()) {
        backward.dw = work.dw->mutable_data_ptr<float>();
        backward.dw_out = work.dw->stride(0);
        backward.dw_in = work.dw->stride(1);
      }
      if (work.need_dx) {
        backward.dx = rows_of<T>(dx, 1);
        backward.add_to_dx = work.dx != nullptr;
        backward.done = sums_of(pointwise_parts(rows));
      }
      pointwise_backward(rows, backward);
      return finish();
    }
    if (done_as == How::depthwise) {
      std::optional<Tensor> dw = work.dw;
      depthwise_backward({x, work.norm_of_x, layer.weight, layer.stride, layer.padding, dy,
                          dw ? &*dw : nullptr, work.need_dx ? &dx : nullptr,
                          work.need_dx ? sums_of(depthwise_parts(x.size(0))) : RowsDone{}});
      return finish();
    }
  }
  const int64_t parts = balanced_parts(rows, 1);
  if (const RowsDone done = sums_of(parts))
    parallel_if_large(x.numel(), parts, [&](int64_t i) { done(i, part(rows, i, parts)); });
  return finish();
}

// a + b, to a.
template <class T>
void add_to(Tensor& a, const Tensor& b) {
  const int64_t channels = a.size(1);
  const std::vector<float> zeros(channels), ones(channels, 1.f);
  const Tasks tasks(1, a.numel() / channels, channels);
  constexpr float none = std::numeric_limits<float>::quiet_NaN();
  norm_apply<T>(tasks, rows_of<T>(std::as_const(a), 1), rows_of<T>(b, 1), rows_of<T>(a, 1), zeros.data(), ones.data(),
                nullptr, {none, none});
}

void check_chain_input(const char* op, const Tensor& x, int64_t views) {
  check_float_or_bfloat16_images(op, "x", x);
  STD_TORCH_CHECK(x.numel() > 0, op, ": x: expected images, got ", shape_of(x));
  STD_TORCH_CHECK(views >= 1 && x.size(0) % views == 0, op, ": views: expected a divisor of the batch of ", x.size(0),
                  ", got ", views);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> conv_chain(
    const Tensor& x, std::optional<Tensor> residual, std::vector<Tensor> parameters,
    std::vector<std::optional<Tensor>> filters, std::vector<int64_t> sizes, std::vector<double> eps, int64_t views) {
  const char* op = "conv_chain";
  check_chain_input(op, x, views);
  const std::vector<Layer> layers = layers_of(op, parameters, filters, sizes, eps);
  std::vector<Tensor> convolved, statistics;
  std::optional<Norm> norm;
  Tensor in = as_rows(x);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = layers[i];
      Tensor mean = torch::stable::new_empty(x, {views, layer.channels}, ScalarType::Float);
      Tensor rstd = torch::stable::new_empty(x, {views, layer.channels}, ScalarType::Float);
      in = convolve<T>(op, layer, in, norm ? &*norm : nullptr, mean, rstd);
      norm.emplace(op, in, mean, rstd, layer.norm_weight, layer.norm_bias, layer.clamp);
      convolved.push_back(in);
      statistics.push_back(mean);
      statistics.push_back(rstd);
    }
    if (residual.has_value()) {
      check_like(op, "residual", *residual, in, "the result");
      residual = as_rows(*residual);
    }
    return applied<T>(*norm, in, residual ? &*residual : nullptr);
  };
  const Tensor y = x.scalar_type() == ScalarType::Float ? run(float{}) : run(BFloat16{});
  return {y, convolved, statistics};
}

std::tuple<Tensor, Tensor> conv_chain_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> y, std::vector<Tensor> parameters,
    std::vector<std::optional<Tensor>> filters, std::vector<int64_t> sizes, std::vector<double> eps,
    std::vector<Tensor> convolved, std::vector<Tensor> statistics, std::vector<std::optional<Tensor>> gradients,
    bool need_grad_x, bool residual_is_x) {
  const char* op = "conv_chain_backward";
  const std::vector<Layer> layers = layers_of(op, parameters, filters, sizes, eps);
  const int64_t n = layers.size();
  STD_TORCH_CHECK(static_cast<int64_t>(convolved.size()) == n && static_cast<int64_t>(statistics.size()) == 2 * n &&
                      static_cast<int64_t>(gradients.size()) == 3 * n,
                  op, ": expected a result, two statistics and three gradients for each of the ", n, " weights");
  check_chain_input(op, x, statistics[0].dim() == 2 ? statistics[0].size(0) : 0);
  const Tensor in = as_rows(x);
  const int64_t views = statistics[0].size(0);
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& from = i == 0 ? in : convolved[i - 1];
    const Tensor c = convolved[i] = as_rows(convolved[i]);  // hooks on saved tensors may change strides
    const int64_t channels = layers[i].channels;
    check_layer(op, layers[i], from);
    STD_TORCH_CHECK(c.dim() == 4 && c.scalar_type() == x.scalar_type() && c.size(0) == x.size(0) &&
                        c.size(1) == channels && c.size(2) == output_size(layers[i], from, 0) &&
                        c.size(3) == output_size(layers[i], from, 1),
                    op, ": convolved: expected the results of the forward, got ", shape_of(c));
    for (const Tensor& t : {statistics[2 * i], statistics[2 * i + 1]})
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == views &&
                          t.size(1) == channels && t.is_contiguous(),
                      op, ": statistics: expected float32 [", views, ", ", channels, "], got ", shape_of(t));
  }
  const Tensor& result = convolved[n - 1];
  check_like(op, "grad", grad, result, "the result");
  if (y.has_value()) {
    check_like(op, "y", *y, result, "the result");
    STD_TORCH_CHECK(!std::isnan(layers[n - 1].clamp.low), op, ": y: expected none without an activation");
    y = as_rows(*y);
  }
  std::vector<Norm> norms;
  for (int64_t i = 0; i < n; ++i)
    norms.emplace_back(op, convolved[i], statistics[2 * i], statistics[2 * i + 1], layers[i].norm_weight,
                       layers[i].norm_bias, layers[i].clamp);
  const auto norm_gradient = [&](int64_t i, int which) {
    return output_vector(op, which == 1 ? "gradient of a norm's weight" : "gradient of a norm's bias",
                         gradients[3 * i + which], layers[i].channels);
  };

  const auto run = [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    // The last norm. Behind the activation of a sum is the gradient of the residual as well.
    Norm& last = norms[n - 1];
    const Tensor& c = convolved[n - 1];
    Tensor g = as_rows(grad), dresidual = torch::stable::new_empty(x, {0});
    const bool split = y.has_value(), masked = last.has_activation() && !split;
    Rows<const T> output{nullptr, 0};
    Rows<T> into{nullptr, 0};
    if (split) {
      dresidual = new_images(c, c.size(1), c.size(2), c.size(3));
      output = rows_of<T>(std::as_const(*y), 1);
      into = rows_of<T>(dresidual, 1);
    }
    norm_reduce<T>(last.tasks(), rows_of<T>(std::as_const(g), 1), rows_of<T>(c, 1), output, into, last.mean, last.rstd,
                   last.scale.data(), masked ? last.bias.data() : nullptr, last.clamp, norm_gradient(n - 1, 1),
                   norm_gradient(n - 1, 2), last.slope.data(), last.offset.data());
    if (split) g = dresidual;

    // Through the convolutions, the last first. What the first gives is added to the residual's gradient where it can be.
    const Tensor of_residual = split ? dresidual : g;
    const bool add = need_grad_x && residual_is_x;
    const How first_is = how<T>(layers[0], in, nullptr);
    const bool add_in_place = add && n > 1 && (first_is == How::winograd || first_is == How::pointwise);
    Tensor sum = of_residual;
    if (add_in_place && !split) {  // grad is not ours to write to
      sum = new_images(c, c.size(1), c.size(2), c.size(3));
      torch::stable::copy_(sum, g);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      const bool first = i == 0;
      const Tensor from = g;
      g = convolve_backward<T>(
          op, layers[i],
          {first ? in : convolved[i - 1], first ? nullptr : &norms[i - 1], from, convolved[i],
           norms[i], i == n - 1 ? masked : norms[i].has_activation(), gradients[3 * i],
           first ? nullptr : norm_gradient(i - 1, 1), first ? nullptr : norm_gradient(i - 1, 2), !first || need_grad_x,
           first && add_in_place ? &sum : nullptr});
    }
    if (add && !add_in_place) add_to<T>(g, of_residual);
    return {g, dresidual};
  };
  return x.scalar_type() == ScalarType::Float ? run(float{}) : run(BFloat16{});
}

}  // namespace us3l
