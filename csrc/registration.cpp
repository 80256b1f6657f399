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
  m.def("conv2d_3x3(Tensor x, Tensor weight, Tensor? bias, int out_channels) -> Tensor");
  m.def(
      "conv2d_3x3_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, bool need_grad_x) "
      "-> Tensor");
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) "
      "-> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? grad_weight, bool need_grad_x, "
      "int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  // csrc/cuda/multi_tensor.cu
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] teachers, float lr, "
      "float momentum, float weight_decay, bool nesterov, float alpha, int groups, float ema_momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(us3l_native, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&us3l::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&us3l::batch_norm_backward));
  m.impl("conv2d_3x3", TORCH_BOX(&us3l::conv2d_3x3));
  m.impl("conv2d_3x3_backward", TORCH_BOX(&us3l::conv2d_3x3_backward));
  m.impl("depthwise_conv2d", TORCH_BOX(&us3l::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&us3l::depthwise_conv2d_backward));
}
