// Group-regularised SGD with momentum, and the teacher's moving average, over a list of tensors in one pass over memory.
//
// All of the kernel but its launch, in C++ that nvcc and any host compiler understand: the tests run it on a CPU.
#pragma once

#include <cstdint>

#include "../groups.h"

#ifdef __CUDACC__
#define US3L_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define US3L_HOST_DEVICE inline
#endif

namespace us3l {

// A block updates one chunk of one tensor.
constexpr int kThreads = 256;
constexpr int kChunk = 4096;

// Tensors of one launch: as many as fit into the 4 KiB of kernel arguments that every GPU and toolkit takes.
// The table travels as an argument: no copy to the device, nothing to keep alive, and a CUDA graph records it.
constexpr int kMaxTensors = 72;

struct SgdTensor {
  float* param;
  const float* grad;
  float* momentum;  // null without momentum
  float* teacher;   // null without a teacher
  int64_t numel;
  int64_t group_numel;  // elements of a group of rows; rows are the outermost dimension, so a group is contiguous
};

struct SgdTable {
  SgdTensor tensors[kMaxTensors];
  int32_t first_block[kMaxTensors + 1];  // blocks of tensor t: first_block[t] .. first_block[t + 1] - 1
  int32_t size = 0;

  SgdTable() { first_block[0] = 0; }

  void add(const SgdTensor& tensor) {
    tensors[size] = tensor;
    first_block[size + 1] = first_block[size] + static_cast<int32_t>((tensor.numel + kChunk - 1) / kChunk);
    ++size;
  }
  bool full() const { return size == kMaxTensors; }
  int32_t blocks() const { return first_block[size]; }
};

struct SgdOptions {
  float lr;
  float momentum;
  float weight_decay;
  float alpha;       // decay of group g: weight_decay * (1 - alpha * g)
  int32_t groups;
  float ema_weight;  // 1 - momentum of the teacher
  bool nesterov;
};

// Four floats that are loaded and stored in one 16-byte access.
struct alignas(16) Float4 {
  float at[4];
};

// The group of every element of a chunk. One 64-bit division for the chunk; the elements count in 32 bits from its
// beginning, where lengths beyond the chunk's are all the same.
struct ChunkGroups {
  int32_t first;  // the group of the first element
  int32_t next;   // where the next group begins, at most kChunk
  int32_t numel;  // elements of a group, at most kChunk
  int32_t last;   // what is left over after the last group belongs to it

  US3L_HOST_DEVICE ChunkGroups(int64_t begin, int64_t group_numel, int32_t groups) {
    const int64_t group = begin / group_numel, left = (group + 1) * group_numel - begin;
    last = groups - 1;
    first = group < last ? static_cast<int32_t>(group) : last;
    next = left < kChunk ? static_cast<int32_t>(left) : kChunk;
    numel = group_numel < kChunk ? static_cast<int32_t>(group_numel) : kChunk;
  }

  US3L_HOST_DEVICE float decay(int i, const SgdOptions& o) const {
    int32_t group = first;
    if (i >= next) group += 1 + (i - next) / numel;
    return o.weight_decay * (1.0f - o.alpha * static_cast<float>(group < last ? group : last));
  }
};

template <bool kMomentum, bool kTeacher>
US3L_HOST_DEVICE void update_element(float& param, float grad, float& momentum, float& teacher, float decay,
                                     const SgdOptions& o) {
  grad += decay * param;
  if (kMomentum) {
    momentum = o.momentum * momentum + grad;
    grad = o.nesterov ? grad + o.momentum * momentum : momentum;
  }
  param -= o.lr * grad;
  if (kTeacher) teacher += o.ema_weight * (param - teacher);
}

US3L_HOST_DEVICE bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Float4) == 0; }

// The tensor that a block works on: the last one that begins at or before it.
US3L_HOST_DEVICE int tensor_of_block(const SgdTable& table, int32_t block) {
  int low = 0, high = table.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// What one thread of one block does.
template <bool kMomentum, bool kTeacher>
US3L_HOST_DEVICE void update_chunk(const SgdTable& table, const SgdOptions& o, int32_t block, int thread) {
  const int t = tensor_of_block(table, block);
  const SgdTensor& tensor = table.tensors[t];
  const int64_t begin = static_cast<int64_t>(block - table.first_block[t]) * kChunk;
  const int64_t left = tensor.numel - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;

  const ChunkGroups groups(begin, tensor.group_numel, o.groups);
  float* const param = tensor.param + begin;
  const float* const grad = tensor.grad + begin;
  float* const momentum = kMomentum ? tensor.momentum + begin : nullptr;
  float* const teacher = kTeacher ? tensor.teacher + begin : nullptr;

  // Views into larger storage may start anywhere: those go element by element, like the last count % 4 of the others.
  const bool vectors = aligned(param) && aligned(grad) && aligned(momentum) && aligned(teacher);
  const int vector_end = vectors ? count / 4 * 4 : 0;
  for (int i = 4 * thread; i < vector_end; i += 4 * kThreads) {
    Float4 p = *reinterpret_cast<const Float4*>(param + i);
    const Float4 g = *reinterpret_cast<const Float4*>(grad + i);
    Float4 m{}, e{};
    if (kMomentum) m = *reinterpret_cast<const Float4*>(momentum + i);
    if (kTeacher) e = *reinterpret_cast<const Float4*>(teacher + i);
    for (int k = 0; k < 4; ++k) {
      update_element<kMomentum, kTeacher>(p.at[k], g.at[k], m.at[k], e.at[k], groups.decay(i + k, o), o);
    }
    *reinterpret_cast<Float4*>(param + i) = p;
    if (kMomentum) *reinterpret_cast<Float4*>(momentum + i) = m;
    if (kTeacher) *reinterpret_cast<Float4*>(teacher + i) = e;
  }
  for (int i = vector_end + thread; i < count; i += kThreads) {
    float p = param[i], m = kMomentum ? momentum[i] : 0.0f, e = kTeacher ? teacher[i] : 0.0f;
    update_element<kMomentum, kTeacher>(p, grad[i], m, e, groups.decay(i, o), o);
    param[i] = p;
    if (kMomentum) momentum[i] = m;
    if (kTeacher) teacher[i] = e;
  }
}

}  // namespace us3l
