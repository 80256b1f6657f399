// The native operations for the CPU. Their schemas, and those of the CUDA kernels, are in registration.cpp.
//
// They face torch through LibTorch's stable ABI only: one binary runs with every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace us3l {

using torch::stable::Tensor;

// The codes of `activation`.
enum Activation : std::int64_t { kNone = 0, kRelu = 1, kRelu6 = 2 };

// y = activation((x - mean) * rstd * weight[:c] + bias[:c] + residual) per view, with mean [V, c] and rstd [V, c].
//
// x [N, c, *], float32 or bfloat16, channels innermost (channels_last, [N, c], or a prefix slice of such a tensor).
// Parameters and statistics are float32 vectors of at least c elements. training: the statistics are those of each of
// the V = views parts of the batch, and the running ones are updated V times; otherwise V = 1 and they are the
// running ones.
std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum, double eps,
    std::int64_t views, std::int64_t activation);

// Adds to grad_weight[:c] and grad_bias[:c]; returns dx and dresidual, each an empty tensor unless needed.
//
// With an activation its mask is told from y, the forward's output. If that had no residual, `bias` (the forward's) may
// be given instead: the mask is then computed from x once more, which is faster than to read y twice.
std::tuple<Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, std::optional<Tensor> weight, std::optional<Tensor> bias,
    const Tensor& mean, const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
    bool need_grad_x, bool need_grad_residual, bool training, std::int64_t activation);

// y = (x - mean) * rstd * weight[:c] + bias[:c] over the last dimension, with mean and rstd [..., 1] in float32.
//
// x [..., c], float32 or bfloat16, rows of contiguous channels at one distance. Parameters are float32 vectors of at
// least c elements. y is contiguous.
std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps);

// Adds to grad_weight[:c] and grad_bias[:c]; returns dx, contiguous, or an empty tensor unless needed.
Tensor layer_norm_backward(const Tensor& grad, const Tensor& x, std::optional<Tensor> weight, const Tensor& mean,
                           const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                           bool need_grad_x);

// y = conv2d(x, weight[:out_channels, :c], bias[:out_channels]) with 3x3 filters, stride 1 and padding 1.
//
// x [N, c, H, W], float32 or bfloat16, channels innermost, other strides free; everything is computed in float32. weight
// [K, C, 3, 3] and bias [K], float32, any strides. y is channels_last. `filters`: what winograd_filters_(weight, false) gives,
// which many calls can share until the weight changes; without it the active filters are transformed in the call.
Tensor conv2d_3x3(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::int64_t out_channels,
                  std::optional<Tensor> filters);

// Adds to grad_weight[:k, :c] (float32, any strides), where grad is [N, k, H, W]; returns dx, an empty tensor unless
// needed. `filters`: what winograd_filters_(weight, true) gives, or none.
Tensor conv2d_3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                           std::optional<Tensor> grad_weight, bool need_grad_x, std::optional<Tensor> filters);

// `filters`, a float32 vector of winograd_filters_size elements, becomes all filters of a weight [K, C, 3, 3], float32,
// transformed: four times its memory, laid out for the instruction set.
std::int64_t winograd_filters_size(const Tensor& weight, bool input_channels_in_lanes);
void winograd_filters_(Tensor filters, const Tensor& weight, bool input_channels_in_lanes);

// y = conv2d(x, weight[:out_channels, :c], bias[:out_channels]) with 3x3 filters, stride 2 and padding 1.
//
// x [N, c, H, W], float32, channels innermost, other strides free. weight [K, C, 3, 3] and bias [K], float32, any strides.
// y is channels_last.
Tensor conv2d_3x3_stride2(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::int64_t out_channels);

// Adds to grad_weight[:k, :c] (float32, any strides), where grad is [N, k, (H + 1) / 2, (W + 1) / 2]; returns dx, an empty
// tensor unless needed.
Tensor conv2d_3x3_stride2_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                   std::optional<Tensor> grad_weight, bool need_grad_x);

// y = conv2d(x, weight[:out_channels, :c], bias[:out_channels]), of any geometry; `groups` are the full layer's, and of
// them those are active whose channels x has.
//
// x [N, c, H, W], float32, channels innermost, other strides free; or bfloat16, on a CPU with AVX512-BF16, of which the
// strides, and the channels of x and y in a group, are even. weight [K, C / groups, kh, kw] and bias [K], float32, any
// strides. y is channels_last, in the dtype of x; the weight is rounded to it, and sums are in float32.
Tensor conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::int64_t out_channels,
              std::vector<std::int64_t> stride, std::vector<std::int64_t> padding, std::vector<std::int64_t> dilation,
              std::int64_t groups);

// Adds to grad_weight[:k, :c] and grad_bias[:k] (float32, any strides; no grad_bias with bfloat16); returns dx, an empty
// tensor unless needed.
Tensor conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x, std::vector<std::int64_t> stride,
                       std::vector<std::int64_t> padding, std::vector<std::int64_t> dilation, std::int64_t groups);

// y = x weight[:out_features, :c]' + bias[:out_features]. x [N, c], its rows contiguous; weight [K, C], any strides; bias
// [K]; all float32.
Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::int64_t out_features);

// Adds to grad_weight[:k, :c] (any strides) and grad_bias[:k]; returns dx, an empty tensor unless needed.
Tensor linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x);

// y = the depthwise convolution of x with weight[:c] and bias[:c], one filter per channel; stride, padding and dilation
// [2] as torch.nn.functional.conv2d takes them.
//
// x [N, c, H, W], float32 or bfloat16, channels innermost, other strides free. weight [C, 1, kh, kw], float32, any
// strides; bias [C], float32. Sums are in float32. y is channels_last.
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                        std::vector<std::int64_t> stride, std::vector<std::int64_t> padding,
                        std::vector<std::int64_t> dilation);

// Adds to grad_weight[:c] (any strides); returns dx, an empty tensor unless needed.
Tensor depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 std::optional<Tensor> grad_weight, bool need_grad_x,
                                 std::vector<std::int64_t> stride, std::vector<std::int64_t> padding,
                                 std::vector<std::int64_t> dilation);

// The optimizers' updates, each in one pass over memory. Element k of every list goes with parameter k and has its shape;
// all are float32, in any layout: dense ones laid out alike, rows outermost, are worked on where they lie.
using Tensors = std::vector<Tensor>;

// SGD with momentum (buffers: none if `momentum` is 0), where group g of the rows decays by weight_decay * (1 - alpha * g)
// (groups.h); then the teachers, if any, as in `ema_`.
void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors teachers, double lr, double momentum,
          double weight_decay, bool nesterov, double alpha, std::int64_t groups, double ema_momentum);

// AdamW whose decoupled decay is that of `sgd_`; `steps` counts each parameter's updates, this one included.
void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, std::vector<std::int64_t> steps,
            double lr, double beta1, double beta2, double eps, double weight_decay, double alpha, std::int64_t groups);

// teacher = momentum * teacher + (1 - momentum) * student; a teacher equal to its student stays exactly that.
void ema_(Tensors teachers, Tensors students, double momentum);

// How conv_chain computes a convolution.
enum Algorithm : std::int64_t { kProduct = 0, kWinograd = 1, kWinogradStride2 = 2, kDepthwise = 3 };

// Convolutions without bias, each with a batch norm, in training: c[i] = conv[i](a[i - 1]), a[i] = act[i](norm[i](c[i])), with
// a[0] = x, and act[n](norm[n](c[n]) + residual) in the end.
//
// x [N, c, H, W], float32 or bfloat16, channels innermost. For each convolution: three full `parameters`, float32 (weight
// [>= k, >= c, kh, kw], norm's weight and bias); for Winograd what winograd_filters_(weight, false) gives, or none; seven
// `sizes` (algorithm, k active output channels, two strides, two paddings, activation); the norm's eps. The algorithm is one
// that takes the convolution. A norm's statistics are those of each of the `views` parts of the batch. Returns y, all c, and
// the mean and rstd [views, k] of every norm.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> conv_chain(
    const Tensor& x, std::optional<Tensor> residual, std::vector<Tensor> parameters,
    std::vector<std::optional<Tensor>> filters, std::vector<std::int64_t> sizes, std::vector<double> eps,
    std::int64_t views);

// Adds to the prefixes of the gradients that are given, three for each convolution as in `parameters`; `filters` are those
// with the input channels in the lanes. y: of a forward with a residual and an activation behind the sum, else none. Returns
// dx (empty unless needed), with the residual's gradient in it if that was x; and, with y, dresidual. Without y the
// residual's gradient is `grad` itself.
std::tuple<Tensor, Tensor> conv_chain_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> y, std::vector<Tensor> parameters,
    std::vector<std::optional<Tensor>> filters, std::vector<std::int64_t> sizes, std::vector<double> eps,
    std::vector<Tensor> convolved, std::vector<Tensor> statistics, std::vector<std::optional<Tensor>> gradients,
    bool need_grad_x, bool residual_is_x);

}  // namespace us3l
