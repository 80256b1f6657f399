// The native operations for CUDA. Schemas are in ../registration.cpp, bound in registration.cpp. They have a device guard,
// run on the current stream, can be captured in a CUDA graph, and are deterministic.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace us3l::cuda {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// As in ../ops.h, with float16 as well.
std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum, double eps,
    int64_t views, int64_t activation);
std::tuple<Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, std::optional<Tensor> weight, std::optional<Tensor> bias,
    const Tensor& mean, const Tensor& rstd, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
    bool need_grad_x, bool need_grad_residual, bool training, int64_t activation);

// y = conv2d(x, weight[:out_channels, :c], bias[:out_channels]) with stride 1 and one group, on tensor cores, in bfloat16 or
// float16 with sums in float32.
//
// x [N, c, H, W], channels innermost; weight [K, C, kh, kw], of its dtype, input channels innermost; of both all strides and
// addresses are multiples of 8 elements. c and out_channels are multiples of 8. bias: float32. y is channels_last.
Tensor conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t out_channels,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups);

// Adds to grad_weight[:k, :c] (float32, any strides), where grad is [N, k, H', W']; returns dx, channels_last, an empty tensor
// unless needed. grad_bias: none.
Tensor conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, bool need_grad_x, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups);

// As in ../ops.h, with float16 as well.
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation);
Tensor depthwise_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 std::optional<Tensor> grad_weight, bool need_grad_x, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation);

// As in ../ops.h, for tensors that are contiguous or channels_last, like their parameter; up to 70 of them are one launch.
void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors teachers, double lr, double momentum,
          double weight_decay, bool nesterov, double alpha, int64_t groups, double ema_momentum);
void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, std::vector<int64_t> steps, double lr,
            double beta1, double beta2, double eps, double weight_decay, double alpha, int64_t groups);
void ema_(Tensors teachers, Tensors students, double momentum);

// packed[i] = the prefix of parameters[i] of packed[i]'s shape, rounded to its dtype: the weights of all layers at one
// width for kernels that take whole tensors. Up to 68 tensors are one launch.
//
// parameters[i]: float32, of 1 to 4 dimensions, in any layout whose last two dimensions lie like one (contiguous,
// channels_last, and slices of the first two dimensions of such). packed[i]: bfloat16, float16 or float32, the same for
// all; as many dimensions, each of the first two at most the parameter's, the others the same; channels_last or
// contiguous: dense.
void multi_tensor_pack(Tensors parameters, Tensors packed);

// The prefix of full_gradients[i] of gradients[i]'s shape += gradients[i]: the way back, with the layouts and dtypes of
// packed (gradients) and of parameters (full_gradients). What lies outside of the prefix is neither read nor written.
void multi_tensor_scatter_add(Tensors gradients, Tensors full_gradients);

}  // namespace us3l::cuda
