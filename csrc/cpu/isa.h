// Which instruction set the CPU kernels run with. No torch headers.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace us3l {

enum class Isa { portable, avx2, avx512 };

// The best the CPU has, or what the environment variable US3L_ISA names (read once).
// Throws std::runtime_error if that is unknown or the CPU does not have it.
Isa isa();
const char* isa_name(Isa isa);

// Whether the CPU has products of bfloat16 pairs (AVX512-BF16), and isa() is avx512.
bool has_bfloat16_pairs();

// What this CPU has of what the kernels use: name, present.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace us3l
