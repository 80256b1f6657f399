// The optimizers' updates for lists of float32 tensors, each in one pass over memory.

#include <array>
#include <cmath>

#include "multi_tensor.h"
#include "ops.h"
#include "types.h"

namespace us3l::cuda {
namespace {

// One parameter and what goes with it: kArrays tensors of as many elements, in the same order.
template <int kArrays>
struct Item {
  float* data[kArrays];  // the second is only read
  int64_t numel;
  int64_t group_numel;  // elements of a group of rows; rows are the outermost dimension, so a group is contiguous
};

// An update has: kArrays; Item; groups; and `update(x, decay, item)`, which computes x[k], an element of array k, from
// the share of the weight decay that is left to the element's group, 1 - alpha * group.
template <class Update>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Table<typename Update::Item> table, const __grid_constant__ Update update) {
  constexpr int kArrays = Update::kArrays, kReadOnly = 1, W = kWidth<float>;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int t = table.entry_of(block);
  const auto& item = table.entries[t];
  const Chunk chunk(block - table.first_block[t], item.numel);
  const ChunkGroups groups(chunk.begin, item.group_numel, update.groups);

  // Views into larger storage may start anywhere: those go element by element, like the last count % 4 of the others.
  bool vectors = true;
#pragma unroll
  for (int k = 0; k < kArrays; ++k) vectors = vectors && aligned(item.data[k]);
  const int vector_end = vectors ? chunk.count / W * W : 0, thread = static_cast<int>(threadIdx.x);
  for (int i = W * thread; i < vector_end; i += W * kThreads) {
    float values[kArrays][W];
#pragma unroll
    for (int k = 0; k < kArrays; ++k) load(item.data[k] + chunk.begin + i, values[k]);
#pragma unroll
    for (int e = 0; e < W; ++e) {
      float x[kArrays];
#pragma unroll
      for (int k = 0; k < kArrays; ++k) x[k] = values[k][e];
      update(x, 1.0f - update.alpha * static_cast<float>(groups.of(i + e)), item);
#pragma unroll
      for (int k = 0; k < kArrays; ++k) values[k][e] = x[k];
    }
#pragma unroll
    for (int k = 0; k < kArrays; ++k)
      if (k != kReadOnly) store(item.data[k] + chunk.begin + i, values[k]);
  }
  for (int i = vector_end + thread; i < chunk.count; i += kThreads) {
    float x[kArrays];
#pragma unroll
    for (int k = 0; k < kArrays; ++k) x[k] = item.data[k][chunk.begin + i];
    update(x, 1.0f - update.alpha * static_cast<float>(groups.of(i)), item);
#pragma unroll
    for (int k = 0; k < kArrays; ++k)
      if (k != kReadOnly) item.data[k][chunk.begin + i] = x[k];
  }
}

// From whichever end is nearer, so that both ends are reached exactly.
__device__ __forceinline__ float lerp(float start, float end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end - (1.0f - weight) * (end - start);
}

template <bool kMomentum, bool kTeacher>
struct Sgd {
  static constexpr int kArrays = 2 + kMomentum + kTeacher;  // param, grad, momentum, teacher
  using Item = cuda::Item<kArrays>;

  float lr, momentum, weight_decay, alpha;
  int32_t groups;
  float average;  // 1 - momentum of the teacher
  bool nesterov;

  __device__ __forceinline__ void operator()(float (&x)[kArrays], float share, const Item&) const {
    float grad = x[1] + weight_decay * share * x[0];
    if constexpr (kMomentum) {
      x[2] = momentum * x[2] + grad;
      grad = nesterov ? grad + momentum * x[2] : x[2];
    }
    x[0] -= lr * grad;
    if constexpr (kTeacher) x[kArrays - 1] = lerp(x[kArrays - 1], x[0], average);
  }
};

struct Adamw {
  static constexpr int kArrays = 4;  // param, grad, exp_avg, exp_avg_sq
  struct Item : cuda::Item<kArrays> {
    float step_size;            // lr / (1 - beta1^step)
    float inverse_correction2;  // 1 / sqrt(1 - beta2^step)
  };

  float rest1, beta2, rest2;  // 1 - beta1, beta2, 1 - beta2
  float eps;
  float lr_decay;  // lr * weight_decay
  float alpha;
  int32_t groups;

  __device__ __forceinline__ void operator()(float (&x)[kArrays], float share, const Item& item) const {
    x[2] = lerp(x[2], x[1], rest1);
    x[3] = beta2 * x[3] + rest2 * x[1] * x[1];
    const float deviation = sqrtf(x[3]) * item.inverse_correction2 + eps;
    x[0] = (1.0f - lr_decay * share) * x[0] - item.step_size * x[2] / deviation;
  }
};

struct Ema {
  static constexpr int kArrays = 2;  // teacher, student
  using Item = cuda::Item<kArrays>;

  float average;  // 1 - momentum
  float alpha;
  int32_t groups;

  __device__ __forceinline__ void operator()(float (&x)[kArrays], float, const Item&) const {
    x[0] = lerp(x[0], x[1], average);
  }
};

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// One list of an operator's arguments.
struct Operand {
  const char* name;
  const Tensors& tensors;
};

// The data of a tensor that goes with `param`: laid out like it, without gaps and with the first dimension outermost.
// Element i is then the same in all of them, and belongs to row i / (numel / rows).
float* checked_data(const char* op, const Operand& operand, size_t index, const Tensor& param, const Tensor& first) {
  const Tensor& t = operand.tensors[index];
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == first.get_device_index() &&
                      t.scalar_type() == ScalarType::Float,
                  op, ": ", operand.name, "[", index, "]: expected a float32 tensor on the device of the first");
  bool same_shape = t.dim() == param.dim();
  for (int64_t dim = 0; same_shape && dim < t.dim(); ++dim) same_shape = t.size(dim) == param.size(dim);
  STD_TORCH_CHECK(same_shape, op, ": ", operand.name, "[", index, "]: expected the shape of its parameter");
  STD_TORCH_CHECK((t.is_contiguous() && param.is_contiguous()) || (is_channels_last(t) && is_channels_last(param)), op,
                  ": ", operand.name, "[", index,
                  "]: expected it and its parameter to be both contiguous or both channels_last");
  return static_cast<float*>(t.mutable_data_ptr());
}

// `finish(item, k)` may set more of an item.
template <class Update, class Finish>
void run(const char* op, const std::array<Operand, Update::kArrays>& operands, const Update& update,
         const Finish& finish) {
  const Tensors& params = operands[0].tensors;
  for (const Operand& operand : operands)
    STD_TORCH_CHECK(operand.tensors.size() == params.size(), op, ": ", operand.name, ": expected ", params.size(),
                    " tensors, one for each parameter, got ", operand.tensors.size());
  STD_TORCH_CHECK(update.groups >= 1, op, ": groups: expected at least 1, got ", update.groups);
  if (params.empty()) return;
  const Stream stream(params[0]);
  const auto launch = [&](const auto& table) {
    static_assert(sizeof(table) + sizeof(Update) <= 4096, "kernel arguments");
    stream.launch(update_kernel<Update>, dim3(table.blocks()), kThreads, table, update);
  };
  Launches<typename Update::Item, decltype(launch)> launches(launch);
  for (size_t k = 0; k < params.size(); ++k) {
    const Tensor& param = params[k];
    typename Update::Item item{};
    for (size_t i = 0; i < operands.size(); ++i) item.data[i] = checked_data(op, operands[i], k, param, params[0]);
    item.numel = param.numel();
    if (item.numel == 0) continue;
    item.group_numel = group_numel(param.dim(), param.dim() > 0 ? param.size(0) : 1, item.numel, update.groups);
    finish(item, k);
    launches.add(item, item.numel);
  }
  launches.flush();
}

}  // namespace

void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors teachers, double lr, double momentum,
          double weight_decay, bool nesterov, double alpha, int64_t groups, double ema_momentum) {
  STD_TORCH_CHECK(momentum_buffers.empty() == (momentum == 0.0) || params.empty(), "sgd_: momentum_buffers: expected ",
                  momentum == 0.0 ? "none without momentum" : "one for each parameter, got none");
  const Operand p{"params", params}, g{"grads", grads}, m{"momentum_buffers", momentum_buffers},
      t{"teachers", teachers};
  const auto as = [&](auto update, const auto& operands) {
    update = {static_cast<float>(lr),      static_cast<float>(momentum),          static_cast<float>(weight_decay),
              static_cast<float>(alpha),   static_cast<int32_t>(groups),          static_cast<float>(1.0 - ema_momentum),
              nesterov};
    run("sgd_", operands, update, [](auto&, size_t) {});
  };
  if (momentum != 0.0)
    teachers.empty() ? as(Sgd<true, false>{}, std::array<Operand, 3>{p, g, m})
                     : as(Sgd<true, true>{}, std::array<Operand, 4>{p, g, m, t});
  else
    teachers.empty() ? as(Sgd<false, false>{}, std::array<Operand, 2>{p, g})
                     : as(Sgd<false, true>{}, std::array<Operand, 3>{p, g, t});
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, std::vector<int64_t> steps, double lr,
            double beta1, double beta2, double eps, double weight_decay, double alpha, int64_t groups) {
  STD_TORCH_CHECK(steps.size() == params.size(), "adamw_: steps: expected ", params.size(), ", one for each parameter, got ",
                  steps.size());
  const Adamw update{static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                     static_cast<float>(eps),         static_cast<float>(lr * weight_decay),
                     static_cast<float>(alpha),       static_cast<int32_t>(groups)};
  const std::array<Operand, 4> operands{
      {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}};
  run("adamw_", operands, update, [&](Adamw::Item& item, size_t k) {
    STD_TORCH_CHECK(steps[k] >= 1, "adamw_: steps: expected at least 1, got ", steps[k]);
    const auto step = static_cast<double>(steps[k]);
    item.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
    item.inverse_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  });
}

void ema_(Tensors teachers, Tensors students, double momentum) {
  const std::array<Operand, 2> operands{{{"teachers", teachers}, {"students", students}}};
  run("ema_", operands, Ema{static_cast<float>(1.0 - momentum), 0.0f, 1}, [](auto&, size_t) {});
}

}  // namespace us3l::cuda
