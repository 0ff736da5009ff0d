#define EF_ISA isa_avx2
#define EF_NAME "avx2"
#include "simd_avx2.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& avx2_kernels() { return EF_ISA::kTable; }

Tiles avx2_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
