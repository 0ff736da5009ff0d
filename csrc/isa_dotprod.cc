#define EF_ISA isa_dotprod
#define EF_NAME "dotprod"
#define EF_DOTPROD 1
#include "simd_neon.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& dotprod_kernels() { return EF_ISA::kTable; }

Tiles dotprod_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
