// Four lanes: Advanced SIMD of Arm. Bytes of activations are signed, as the instructions that sum products of bytes
// multiply signed by signed. Compiled three times: without those instructions (EF_DOTPROD is 0), with sdot (1), and with
// smmla and usdot as well (2).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace eightfold::EF_ISA {

constexpr int W = 4;
constexpr int kAttnCols = 8;
constexpr int kZero = 0;
constexpr bool kFlips = EF_DOTPROD < 2;
using F = float32x4_t;
using I = int32x4_t;

inline F f_set(float x) { return vdupq_n_f32(x); }
inline F f_load(const float* p) { return vld1q_f32(p); }
inline F f_load_n(const float* p, int n) {
    alignas(16) float values[4] = {};
    std::memcpy(values, p, 4 * static_cast<size_t>(n));
    return vld1q_f32(values);
}
inline void f_store(float* p, F x) { vst1q_f32(p, x); }
inline void f_store_n(float* p, F x, int n) {
    alignas(16) float values[4];
    vst1q_f32(values, x);
    std::memcpy(p, values, 4 * static_cast<size_t>(n));
}
inline F f_add(F a, F b) { return vaddq_f32(a, b); }
inline F f_sub(F a, F b) { return vsubq_f32(a, b); }
inline F f_mul(F a, F b) { return vmulq_f32(a, b); }
inline F f_div(F a, F b) { return vdivq_f32(a, b); }
inline F f_fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F f_fms(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
inline F f_min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }  // b where one is NaN; fmin would return NaN
inline F f_max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F f_round(F x) { return vrndnq_f32(x); }
inline float f_hsum(F x) { return vaddvq_f32(x); }
inline float f_hmax(F x) {
    const F halves = f_max(x, vextq_f32(x, x, 2));
    return vgetq_lane_f32(f_max(halves, vextq_f32(halves, halves, 1)), 0);
}
inline float f_hmin(F x) {
    const F halves = f_min(x, vextq_f32(x, x, 2));
    return vgetq_lane_f32(f_min(halves, vextq_f32(halves, halves, 1)), 0);
}

inline I i_set(int32_t x) { return vdupq_n_s32(x); }
inline I i_load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline I i_load_bytes(const void* p, int n) {
    alignas(16) uint8_t bytes[16] = {};
    std::memcpy(bytes, p, n);
    return i_load(bytes);
}
inline I i_load_n(const int32_t* p, int n) { return i_load_bytes(p, 4 * n); }
inline void i_store(int32_t* p, I x) { vst1q_s32(p, x); }
inline void i_store_n(int32_t* p, I x, int n) {
    alignas(16) int32_t values[4];
    vst1q_s32(values, x);
    std::memcpy(p, values, 4 * static_cast<size_t>(n));
}
inline I i_add(I a, I b) { return vaddq_s32(a, b); }
inline I i_sub(I a, I b) { return vsubq_s32(a, b); }
inline I i_mul(I a, I b) { return vmulq_s32(a, b); }
inline I i_and(I a, I b) { return vandq_s32(a, b); }
inline I i_sra8(I a) { return vshrq_n_s32(a, 8); }
inline I i_shift(I a, int left) { return vshlq_s32(a, vdupq_n_s32(left)); }
inline int32_t i_hsum(I x) { return vaddvq_s32(x); }
inline F to_f(I x) { return vcvtq_f32_s32(x); }
inline F as_f(I x) { return vreinterpretq_f32_s32(x); }
inline I to_i(F x) { return vcvtnq_s32_f32(x); }
inline F scale_2n(F x, F n) {
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(to_i(n), vdupq_n_s32(127)), 23)));
}
inline void store_low_bytes(void* p, I x, int n) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(x), twos = vuzp1q_u8(bytes, bytes), fours = vuzp1q_u8(twos, twos);
    const uint32_t four = vgetq_lane_u32(vreinterpretq_u32_u8(fours), 0);
    std::memcpy(p, &four, n);
}

inline F f_acc(F acc, F a, F b) { return vfmaq_f32(acc, a, b); }

inline int8x16_t bytes(I x) { return vreinterpretq_s8_s32(x); }

// acc + a0 b0 + a1 b1 + a2 b2 + a3 b3 of signed bytes, in each lane.
inline I dot4(I acc, I a, I b) {
#if EF_DOTPROD
    return vdotq_s32(acc, bytes(a), bytes(b));
#else
    const int16x8_t low = vmull_s8(vget_low_s8(bytes(a)), vget_low_s8(bytes(b)));
    const int16x8_t high = vmull_high_s8(bytes(a), bytes(b));
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

// The same products, but any of them in any lane.
inline I dot4_anywhere(I acc, I a, I b) {
#if EF_DOTPROD
    return dot4(acc, a, b);
#else
    acc = vpadalq_s16(acc, vmull_s8(vget_low_s8(bytes(a)), vget_low_s8(bytes(b))));
    return vpadalq_s16(acc, vmull_high_s8(bytes(a), bytes(b)));
#endif
}

// The same of the unsigned bytes of a. Where no instruction does that, whoever calls has flipped their sign bits, and
// takes off what that adds.
inline I dot4_unsigned(I acc, I a, I b) {
#if EF_DOTPROD == 2
    return vusdotq_s32(acc, vreinterpretq_u8_s32(a), bytes(b));
#else
    return dot4(acc, a, b);
#endif
}

inline uint16x4_t load_halves(const uint16_t* p, int n) {
    if (n >= W) return vld1_u16(p);
    alignas(8) uint16_t values[4] = {};
    std::memcpy(values, p, 2 * static_cast<size_t>(n));
    return vld1_u16(values);
}
inline F load_bf16(const uint16_t* p, int n) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p, n), 16)); }
inline F load_f16(const uint16_t* p, int n) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p, n))); }
inline F low_bf16(I x) { return vreinterpretq_f32_s32(vshlq_n_s32(x, 16)); }
inline F high_bf16(I x) { return vreinterpretq_f32_s32(vandq_s32(x, vdupq_n_s32(-65536))); }

// Calls row(i, lanes) for the columns of a square of W rows of W lanes: pairs are woven, then pairs of pairs.
template <typename T, typename Row>
inline void turn(const T* in, size_t ld, Row row) {
    const I a = i_load(in), b = i_load(in + ld), c = i_load(in + 2 * ld), d = i_load(in + 3 * ld);
    const int64x2_t even_ab = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), odd_ab = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t even_cd = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), odd_cd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    row(0, vreinterpretq_s32_s64(vtrn1q_s64(even_ab, even_cd)));
    row(1, vreinterpretq_s32_s64(vtrn1q_s64(odd_ab, odd_cd)));
    row(2, vreinterpretq_s32_s64(vtrn2q_s64(even_ab, even_cd)));
    row(3, vreinterpretq_s32_s64(vtrn2q_s64(odd_ab, odd_cd)));
}

inline void hsum4(const I a[4], int32_t out[4]) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])));
}
inline void hsum4(const F a[4], float out[4]) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}

}  // namespace eightfold::EF_ISA
