// The table of kernels: what an instruction set has to provide. Every function is pure: it reads and writes only what
// its arguments point to, so any number of threads may call it.
//
// Letters: T tokens, K inputs and N outputs of a linear, D head_dim. Weights are (N, K), row-major, as in the file.
//
// Bytes of activations of int8 linears, and of keys, are int8 + zero. Where dot-product instructions multiply unsigned
// by signed (x86), zero is 128 and the bytes are unsigned: `sum x w = sum (x + 128) w - 128 sum w`, and the last term
// is known once for each weight row. Where they multiply signed by signed (Arm), zero is 0 and the bytes are signed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lines.h"

namespace eightfold {

enum class DType : int { f32, f16, bf16 };

// Positions of one page of the KV cache, and of one block of the online softmax.
constexpr int kPage = 128;

// Rows of activations that one call of `attend` takes.
constexpr int kMaxAttnRows = 24;

// Key positions whose partial softmax is computed in one go; the cut is fixed so that results do not depend on threads.
constexpr int kSplit = 256;

// Tokens of a block of packed activations.
constexpr int kLanes = 16;

enum class CacheKind : int {
    bf16,    // keys and values in bfloat16
    int8,    // int8 by head; queries int8, probabilities 8 bit (FAQuant)
    int8x2,  // int8 by channel; queries and probabilities 16 bit (C8)
};

// A page of keys and values of one head.
//   keys    [D / g][kPage][g]    g = 4 bytes: 4 int8 + zero, or 2 bfloat16
//   values  [kPage / g][Dv][g]   Dv: D rounded up to 16
struct AttnRows {
    CacheKind kind;
    int rows;      // queries of several tokens and of all heads that share the keys
    int head_dim;  // D
    const int8_t* q8;       // int8: (rows, Dq); int8x2: (rows, 2, Dq), high and low half; Dq: D rounded up to 4
    const float* qf;        // bf16: (rows, Dq), already times 1 / sqrt(D)
    const int32_t* q_sum;   // sum of q8, for each row (and half)
    const float* q_scale;   // from integer products to scores, for each row
    const float* q_shift;   // what is taken from such a score, where scores are softened
    float softcap;          // scores s become softcap tanh(s / softcap) before they are compared; 0: they stay
    const int32_t* last;    // the last position a row sees
    int window;             // how many positions a row sees; 0 for all
    const uint8_t* const* keys;    // pages of this head, by position / kPage
    const uint8_t* const* values;  // likewise
    int first;   // first position, a multiple of kPage
    int end;     // one past the last position
    int ahead;   // one past the last position that is needed soon, by this call or the next
    const uint8_t* after;  // keys that are needed after that, or null
    int after_columns;     // positions of them
};

// Softmax of some positions: sum of exp(s - max), and that times the values (rows, Dv), in units of the value scale.
struct AttnState {
    float* max;
    float* sum;
    float* acc;
};

struct RowParams {   // of one quantized row of activations
    float scale;
    int32_t offset;  // int8 offset; activations are (q - offset) * scale
    int32_t sum;     // of 16-bit activations
    float norm;      // |x|, where a group asks for it
};

// What a gate goes through before it meets what lies beside it.
enum class Activation : int { silu, gelu };  // gelu: by tanh

struct PackedInput {  // blocks of kLanes tokens each, see gemm_packed; of two planes, the blocks of both alternate
    const uint8_t* blocks;
    size_t block;  // bytes from one to the next
    int tokens, inputs;
};

struct Output {  // rows of ld floats; `adds`: to what is there
    float* y;
    size_t ld;
    bool adds;
};

struct PackedOutput {  // the same, of int8 + zero made of reals with one scale
    uint8_t* blocks;
    size_t block;
    float inv_scale, offset;
};

struct StaticRows {  // weight rows, and what finish_static needs of them
    const int8_t* weight;
    const int32_t* bias;
    const float* deq_scale;
};

struct Scales16 {  // what finish_16 needs of weight rows; offset and bias may be null
    const int32_t* weight_sum;
    const float *scale, *offset, *bias;
};

struct Rows16 {
    const int8_t* weight;
    Scales16 scales;
};

struct ShadowRow {  // of a float row w that is kept as int8 too, w = scale q + e
    float scale;
    int32_t sum;    // of q
    float error;    // |e|, and what float32 sums of w x / |x| may be off by; an upper bound
    float norm;     // |scale q|, an upper bound
};

struct Bounds {
    float lower, upper;  // the largest of each
};

struct Kernels {
    const char* name;
    int lanes;
    int zero;  // of bytes of activations: 128 where they are unsigned, 0 where they are signed

    // out[t][n] = sum_k x[t][k] w[n][k]; x rows start at multiples of ldx bytes, out rows at multiples of ldo.
    void (*gemm_i8)(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t ldx, int xrows, int inner,
                    int32_t* out, size_t ldo);
    // Many tokens: x in packed blocks, [blocks][ceil(K / kAlign) kAlign / 4][kLanes][4], `block` bytes from one to the
    // next; out rows are the lanes of all blocks.
    void (*gemm_packed)(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int blocks, int inner,
                        int32_t* out, size_t ldo);
    // The same and finish_static, or finish_16 of two planes, for each token.
    void (*packed_static)(StaticRows w, size_t ldw, int rows, PackedInput x, Output out);
    void (*packed_16)(Rows16 w, size_t ldw, int rows, PackedInput x, const RowParams* params, Output out);
    // gate_mul of two such products. Quantized rows of a block come in fours: the last may be followed by anything.
    void (*gated_static)(Activation activation, StaticRows gate, StaticRows up, size_t ldw, int rows, PackedInput x,
                         PackedOutput out);
    void (*gated_16)(Activation activation, Rows16 gate, Rows16 up, size_t ldw, int rows, PackedInput x,
                     const RowParams* params, Output out);
    // kLanes rows of ld bytes, a multiple of kAlign, to a block.
    void (*pack)(const uint8_t* rows, size_t ld, uint8_t* block);
    void (*gemm_float)(const void* w, DType type, size_t ldw, int rows, const float* x, size_t ldx, int xrows,
                       int inner, float* out, size_t ldo);
    // out[i] = sum_k x[k] w[rows[i]][k], to the last bit as gemm_float has it.
    void (*dot_rows)(const void* w, DType type, size_t ldw, const int32_t* rows, int count, const float* x, int inner,
                     float* out);
    void (*row_sums)(const int8_t* w, size_t ldw, int rows, int inner, int32_t* out);

    // y = x / rms(x) * gain + bias; gain null: y = x / rms(x) only. y may be x.
    void (*rms_norm)(const float* x, int n, const float* gain, const float* bias, float eps, float* y);
    void (*widen)(const void* x, DType type, int n, float* y);

    // Activations to int8 + zero, up to the next multiple of kAlign filled with zero.
    void (*quantize_static)(const float* x, int n, float inv_scale, float offset, uint8_t* out);
    RowParams (*quantize_token)(const float* x, int n, bool symmetric, uint8_t* out);
    // 16 bit: `high` holds int8 + zero, x = (256 high + low) * scale; `low` is signed where the bytes are.
    RowParams (*quantize_16)(const float* x, int n, uint8_t* high, uint8_t* low);

    // Integer products to reals, which become y, or are added to it.
    void (*finish_static)(const int32_t* acc, int n, const int32_t* bias, const float* deq_scale, bool adds, float* y);
    void (*finish_token)(const int32_t* acc, int n, const int32_t* weight_sum, const float* weight_scale,
                         const float* bias, RowParams row, bool adds, float* y);
    void (*finish_16)(const int32_t* high, const int32_t* low, int n, Scales16 scales, RowParams row, bool adds,
                      float* y);

    void (*add)(float* x, const float* y, int n);
    void (*add_times)(float* x, const float* y, float factor, int n);  // x += factor y, rounded twice
    // y = activation(gate) * up.
    void (*gate_mul)(Activation activation, const float* gate, const float* up, int n, float* y);
    // x = cap tanh(x / cap); NaN becomes -cap.
    void (*soften)(float* x, int n, float cap);
    // Rotates halves: (a, b) -> (a cos - b sin, b cos + a sin); cos and sin (n / 2). y may be x.
    void (*rope)(const float* x, int n, const float* cos, const float* sin, float* y);
    // int8 with one scale for each element, or one for all when step is 0: clamp(rne(x * inv + offset)). Returns their
    // sum.
    int32_t (*quantize_heads)(const float* x, int n, const float* inv_scale, const float* offset, int step,
                              int8_t* out);
    // What attention's sums mean: y = (acc * inverse - offset) * scale; scale null: y = acc * inverse.
    void (*scale_heads)(const float* acc, int n, float inverse, const float* offset, const float* scale, float* y);

    void (*attend)(const AttnRows& in, AttnState out);
    // Takes the positions that follow those of `into` into it.
    void (*merge)(AttnState into, AttnState from, int rows, int value_dim);

    int (*argmax)(const float* x, int n);

    // A row of a shadow; q (n).
    ShadowRow (*shadow_row)(const void* w, DType type, int n, int8_t* q);
    float (*squares)(const float* x, int n);  // their sum
    // Of estimates y of w x: upper[i] = y[i] + error[i] x_norm + norm[i] x_error.
    Bounds (*bounds)(const float* y, int n, const float* error, const float* norm, float x_norm, float x_error,
                     float* upper);
};

// The two bytes of a 16-bit activation, as a number.
inline int32_t of_halves(uint8_t high, uint8_t low, int zero) {
    return (zero == 0 ? static_cast<int8_t>(high) : high - zero) * 256 + (zero == 0 ? static_cast<int8_t>(low) : low);
}

const Kernels& scalar_kernels();
#ifdef EIGHTFOLD_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef EIGHTFOLD_ARM
const Kernels& neon_kernels();
const Kernels& dotprod_kernels();
const Kernels& i8mm_kernels();
#endif

}  // namespace eightfold
