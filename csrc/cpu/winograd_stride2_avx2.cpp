#include "winograd_stride2_kernels.h"

// The options are set here and not on the command line, after every header: no inline function of another file may be
// compiled with instructions that the CPU might not have.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

namespace us3l::avx2::stride2 {
constexpr int LANES = 8;
#include "winograd_stride2_body.h"
}  // namespace us3l::avx2::stride2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
