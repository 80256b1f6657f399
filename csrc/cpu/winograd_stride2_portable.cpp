#include "winograd_stride2_kernels.h"

namespace us3l::portable::stride2 {
constexpr int LANES = 4;  // SSE2, NEON and most others have vectors of 16 bytes
#include "winograd_stride2_body.h"
}  // namespace us3l::portable::stride2
