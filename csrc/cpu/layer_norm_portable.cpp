#include "layer_norm_kernels.h"

namespace us3l::portable {
constexpr int LANES = 4;  // SSE2, NEON and most others have vectors of 16 bytes
#include "layer_norm_body.h"
}  // namespace us3l::portable
