#define EF_ISA isa_neon
#define EF_NAME "neon"
#define EF_DOTPROD 0
#include "simd_neon.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& neon_kernels() { return EF_ISA::kTable; }

Tiles neon_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
