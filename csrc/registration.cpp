// The ONE list of native schemas. The CPU kernels are bound here; the CUDA ones in csrc/cuda, with
// STABLE_TORCH_LIBRARY_IMPL(us3l_native, CUDA, m), in a library that is loaded after this one.

#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(us3l_native, m) {
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? residual, bool training, float momentum, float eps, int views, int activation) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
      "Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, bool need_grad_x, bool need_grad_residual, bool training, "
      "int activation) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor(a!)? grad_weight, "
      "Tensor(b!)? grad_bias, bool need_grad_x) -> Tensor");
  m.def("conv2d_3x3(Tensor x, Tensor weight, Tensor? bias, int out_channels, Tensor? filters) -> Tensor");
  m.def(
      "conv2d_3x3_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, bool need_grad_x, "
      "Tensor? filters) -> Tensor");
  m.def("conv2d_3x3_stride2(Tensor x, Tensor weight, Tensor? bias, int out_channels) -> Tensor");
  m.def(
      "conv2d_3x3_stride2_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, bool need_grad_x) "
      "-> Tensor");
  m.def("winograd_filters_size(Tensor weight, bool input_channels_in_lanes) -> int");
  m.def("winograd_filters_(Tensor(a!) filters, Tensor weight, bool input_channels_in_lanes) -> ()");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, int out_channels, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, "
      "bool need_grad_x, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, "
      "bool need_grad_x) -> Tensor");
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) "
      "-> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, bool need_grad_x, "
      "int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "conv_chain(Tensor x, Tensor? residual, Tensor[] parameters, Tensor?[] filters, int[] sizes, float[] eps, int views) "
      "-> (Tensor, Tensor[], Tensor[])");
  m.def(
      "conv_chain_backward(Tensor grad, Tensor x, Tensor? y, Tensor[] parameters, Tensor?[] filters, int[] sizes, "
      "float[] eps, Tensor[] convolved, Tensor[] statistics, Tensor(a!)?[] gradients, bool need_grad_x, "
      "bool residual_is_x) -> (Tensor, Tensor)");
  // Optimizers over lists of float32 tensors: csrc/cpu/multi_tensor.cpp, csrc/cuda/optimizers.cu
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] teachers, float lr, "
      "float momentum, float weight_decay, bool nesterov, float alpha, int groups, float ema_momentum) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, int[] steps, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, float alpha, int groups) -> ()");
  m.def("ema_(Tensor(a!)[] teachers, Tensor[] students, float momentum) -> ()");
  // Weights of one width for CUDA, and their gradients: csrc/cuda/pack.cu
  m.def("multi_tensor_pack(Tensor[] parameters, Tensor(a!)[] packed) -> ()");
  m.def("multi_tensor_scatter_add(Tensor[] gradients, Tensor(a!)[] full_gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(us3l_native, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&us3l::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&us3l::batch_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&us3l::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&us3l::layer_norm_backward));
  m.impl("conv2d_3x3", TORCH_BOX(&us3l::conv2d_3x3));
  m.impl("conv2d_3x3_backward", TORCH_BOX(&us3l::conv2d_3x3_backward));
  m.impl("conv2d_3x3_stride2", TORCH_BOX(&us3l::conv2d_3x3_stride2));
  m.impl("conv2d_3x3_stride2_backward", TORCH_BOX(&us3l::conv2d_3x3_stride2_backward));
  m.impl("winograd_filters_size", TORCH_BOX(&us3l::winograd_filters_size));
  m.impl("winograd_filters_", TORCH_BOX(&us3l::winograd_filters_));
  m.impl("conv2d", TORCH_BOX(&us3l::conv2d));
  m.impl("conv2d_backward", TORCH_BOX(&us3l::conv2d_backward));
  m.impl("linear", TORCH_BOX(&us3l::linear));
  m.impl("linear_backward", TORCH_BOX(&us3l::linear_backward));
  m.impl("conv_chain", TORCH_BOX(&us3l::conv_chain));
  m.impl("conv_chain_backward", TORCH_BOX(&us3l::conv_chain_backward));
  m.impl("depthwise_conv2d", TORCH_BOX(&us3l::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&us3l::depthwise_conv2d_backward));
  m.impl("sgd_", TORCH_BOX(&us3l::sgd_));
  m.impl("adamw_", TORCH_BOX(&us3l::adamw_));
  m.impl("ema_", TORCH_BOX(&us3l::ema_));
}
