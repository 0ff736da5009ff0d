#define EF_ISA isa_avx512
#define EF_NAME "avx512"
#include "simd_avx512.h"

#include "dispatch.h"
#include "isa.inl"

namespace eightfold {

const Kernels& avx512_kernels() { return EF_ISA::kTable; }

Tiles avx512_tiles() {
    using namespace EF_ISA;
    return {kTileRows, kCols, kMostBlocks * kLanes, kFloatCols};
}

}  // namespace eightfold
