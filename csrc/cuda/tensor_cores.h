// What products on tensor cores need of a warp: copies to shared memory that run by themselves, fragments of matrices,
// and their product. sm_80 instructions, which later GPUs run as well. The tests give another header, of the same
// functions on the CPU.
//
// A warp's 32 threads call each of these together, except copy_async. A fragment is what one thread holds of a matrix; in
// words of 4 bytes, which are two neighbours of a row in half precision.
#pragma once

#ifdef US3L_CUDA_ON_HOST
#include "tensor_cores_on_host.h"
#else

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace us3l::cuda {

// 16 bytes from global to shared memory, or zeros, and nothing is read, unless `inside`; done when they are waited for.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// The thread's copies since the last call are one group.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of the thread's own groups but the last `Left`.
template <int Left>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four 8 x 8 matrices in half precision: thread t gives row t % 8 of matrix t / 8, 16 bytes in shared memory, and is given
// elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4 of each.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&to)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed(const void* row, uint32_t (&to)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// sum [16, 8] += a [16, 16] * b [16, 8]. Thread t has, of rows t / 4 and t / 4 + 8 of a, columns 2 (t % 4) and its neighbour,
// then the same columns + 8; of b, column t / 4 in the rows that these are; of sum, both rows in columns 2 (t % 4) and its
// neighbour.
template <class T>
__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sum)[4]) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace us3l::cuda

#endif
