#define EF_ISA isa_i8mm
#define EF_NAME "i8mm"
#define EF_DOTPROD 2
#include "simd_neon.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& i8mm_kernels() { return EF_ISA::kTable; }

Tiles i8mm_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
