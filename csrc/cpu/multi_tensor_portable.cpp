#include "multi_tensor_kernels.h"

namespace us3l::portable {
constexpr int LANES = 4;  // SSE2, NEON and most others have vectors of 16 bytes
#include "multi_tensor_body.h"
}  // namespace us3l::portable
