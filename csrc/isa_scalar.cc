#define EF_ISA isa_scalar
#define EF_NAME "scalar"
#include "simd_scalar.h"

#include "isa.inl"

namespace eightfold {

const Kernels& scalar_kernels() { return EF_ISA::kTable; }

}  // namespace eightfold
