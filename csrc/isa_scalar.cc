#define EF_ISA isa_scalar
#define EF_NAME "scalar"
#include "simd_scalar.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& scalar_kernels() { return EF_ISA::kTable; }

Tiles scalar_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
