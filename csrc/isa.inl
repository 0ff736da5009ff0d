// One instruction set's kernels: included by isa_*.cc after the lanes (simd_*.h) were chosen.
#include "attend.h"
#include "gemm.h"
#include "kernels.h"
#include "packed.h"
#include "rows.h"

namespace eightfold::EF_ISA {

constexpr Kernels kTable = {
    EF_NAME,      W,
    kZero,  // of simd_*.h
    gemm_i8,      gemm_packed, packed_static, packed_16, gated_static,    gated_16,       pack,        gemm_float,
    dot_rows,     row_sums,    rms_norm,      widen,     quantize_static, quantize_token, quantize_16, finish_static,
    finish_token, finish_16,   add,           add_times, gate_mul,        soften,         rope,        quantize_heads,
    scale_heads,  attend,      merge,         argmax,    shadow_row,      squares,        bounds,
};

}  // namespace eightfold::EF_ISA
