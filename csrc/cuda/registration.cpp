// The CUDA kernels of the operations in ../registration.cpp.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(us3l_native, CUDA, m) {
  m.impl("batch_norm", TORCH_BOX(&us3l::cuda::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&us3l::cuda::batch_norm_backward));
  m.impl("conv2d", TORCH_BOX(&us3l::cuda::conv2d));
  m.impl("conv2d_backward", TORCH_BOX(&us3l::cuda::conv2d_backward));
  m.impl("depthwise_conv2d", TORCH_BOX(&us3l::cuda::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&us3l::cuda::depthwise_conv2d_backward));
  m.impl("sgd_", TORCH_BOX(&us3l::cuda::sgd_));
  m.impl("adamw_", TORCH_BOX(&us3l::cuda::adamw_));
  m.impl("ema_", TORCH_BOX(&us3l::cuda::ema_));
  m.impl("multi_tensor_pack", TORCH_BOX(&us3l::cuda::multi_tensor_pack));
  m.impl("multi_tensor_scatter_add", TORCH_BOX(&us3l::cuda::multi_tensor_scatter_add));
}
