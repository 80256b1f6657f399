// us3l_native::sgd_: the update of SGD (us3l_kernels/optim/sgd.py) for a list of fp32 CUDA tensors in one pass.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "sgd.h"

namespace us3l {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <bool kMomentum, bool kTeacher>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ SgdTable table, const __grid_constant__ SgdOptions options) {
  update_chunk<kMomentum, kTeacher>(table, options, static_cast<int32_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}
static_assert(sizeof(SgdTable) + sizeof(SgdOptions) <= 4096, "kernel arguments");

void launch(const SgdTable& table, const SgdOptions& options, bool momentum, bool teacher, cudaStream_t stream) {
  if (table.blocks() == 0) return;
  auto kernel = momentum ? (teacher ? sgd_kernel<true, true> : sgd_kernel<true, false>)
                         : (teacher ? sgd_kernel<false, true> : sgd_kernel<false, false>);
  kernel<<<table.blocks(), kThreads, 0, stream>>>(table, options);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// The data of a tensor that goes with `param`: fp32, on `device`, of its shape, and laid out like it, without gaps and
// with the first dimension outermost. Element i is then the same in all of them, and belongs to row i / (numel / rows).
float* checked_data(const Tensor& t, const Tensor& param, int32_t device, const char* name, size_t index) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, "sgd_: ", name, "[", index,
                  "] must be on the CUDA device of params[0]");
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, "sgd_: ", name, "[", index,
                  "] must be float32");
  bool same_shape = t.dim() == param.dim();
  for (int64_t dim = 0; same_shape && dim < t.dim(); ++dim) same_shape = t.size(dim) == param.size(dim);
  STD_TORCH_CHECK(same_shape, "sgd_: ", name, "[", index, "] must have the shape of its parameter");
  STD_TORCH_CHECK((t.is_contiguous() && param.is_contiguous()) || (is_channels_last(t) && is_channels_last(param)),
                  "sgd_: ", name, "[", index, "] and its parameter must both be contiguous or both channels_last");
  return static_cast<float*>(t.mutable_data_ptr());
}

void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors teachers, double lr, double momentum,
          double weight_decay, bool nesterov, double alpha, int64_t groups, double ema_momentum) {
  if (params.empty()) return;
  STD_TORCH_CHECK(grads.size() == params.size(), "sgd_: ", params.size(), " params, but ", grads.size(), " grads");
  STD_TORCH_CHECK(momentum_buffers.size() == (momentum != 0.0 ? params.size() : 0), "sgd_: ", params.size(),
                  " params and momentum ", momentum, ", but ", momentum_buffers.size(), " momentum_buffers");
  STD_TORCH_CHECK(teachers.empty() || teachers.size() == params.size(), "sgd_: ", params.size(), " params, but ",
                  teachers.size(), " teachers");
  STD_TORCH_CHECK(groups >= 1 && groups <= INT32_MAX, "sgd_: groups is ", groups);

  const auto device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  const SgdOptions options{static_cast<float>(lr),
                           static_cast<float>(momentum),
                           static_cast<float>(weight_decay),
                           static_cast<float>(alpha),
                           static_cast<int32_t>(groups),
                           static_cast<float>(1.0 - ema_momentum),
                           nesterov};
  const bool has_momentum = !momentum_buffers.empty(), has_teacher = !teachers.empty();
  SgdTable table;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    if (param.numel() == 0) continue;
    SgdTensor tensor{};
    tensor.param = checked_data(param, param, device, "params", i);
    tensor.grad = checked_data(grads[i], param, device, "grads", i);
    if (has_momentum) tensor.momentum = checked_data(momentum_buffers[i], param, device, "momentum_buffers", i);
    if (has_teacher) tensor.teacher = checked_data(teachers[i], param, device, "teachers", i);
    tensor.numel = param.numel();
    tensor.group_numel = group_numel(param.dim(), param.dim() > 0 ? param.size(0) : 1, param.numel(), groups);
    table.add(tensor);
    if (table.full()) {
      launch(table, options, has_momentum, has_teacher, static_cast<cudaStream_t>(stream));
      table = SgdTable();
    }
  }
  launch(table, options, has_momentum, has_teacher, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace us3l

STABLE_TORCH_LIBRARY_IMPL(us3l_native, CUDA, m) { m.impl("sgd_", TORCH_BOX(&us3l::sgd_)); }
