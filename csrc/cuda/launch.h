// How an operation reaches the GPU: the device of its tensors, the current stream there, a checked launch.
//
// The sources of this folder are CUDA C++ with nothing but this header between them and the machine. The tests give
// another one, that runs the same kernels on the CPU (tests/kernels/cuda_host).
#pragma once

#ifdef US3L_CUDA_ON_HOST
#include "cuda_host.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace us3l::cuda {

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

// While it lives, the device of `t` is the current one.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace us3l::cuda

#endif
