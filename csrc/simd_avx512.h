// Sixteen lanes: AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace eightfold::EF_ISA {

constexpr int W = 16;
constexpr int kAttnCols = 8;
constexpr int kZero = 128;
constexpr bool kFlips = false;
using F = __m512;
using I = __m512i;

inline __mmask16 mask_n(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline F f_load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(mask_n(n), p); }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void f_store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask_n(n), x); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float f_hsum(F x) { return _mm512_reduce_add_ps(x); }
inline float f_hmax(F x) { return _mm512_reduce_max_ps(x); }
inline float f_hmin(F x) { return _mm512_reduce_min_ps(x); }

inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
inline I i_load_bytes(const void* p, int n) { return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1ull, p); }
inline I i_load_n(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(mask_n(n), p); }
inline void i_store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline void i_store_n(int32_t* p, I x, int n) { _mm512_mask_storeu_epi32(p, mask_n(n), x); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
inline I i_sra8(I a) { return _mm512_srai_epi32(a, 8); }
inline I i_shift(I a, int left) { return _mm512_slli_epi32(a, left); }
inline int32_t i_hsum(I x) { return _mm512_reduce_add_epi32(x); }
inline F to_f(I x) { return _mm512_cvtepi32_ps(x); }
inline F as_f(I x) { return _mm512_castsi512_ps(x); }
inline I to_i(F x) { return _mm512_cvtps_epi32(x); }
inline F scale_2n(F x, F n) { return _mm512_scalef_ps(x, n); }
inline void store_low_bytes(void* p, I x, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, mask_n(n), x); }

// As instructions and not as intrinsics: compilers have been seen to copy and spill accumulators around those.
inline F f_acc(F acc, F a, F b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
inline I dot4(I acc, I a, I b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
inline I dot4_anywhere(I acc, I a, I b) { return dot4(acc, a, b); }
inline I dot4_unsigned(I acc, I a, I b) { return dot4(acc, a, b); }

inline __m256i load_halves(const uint16_t* p, int n) {
    return n >= W ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(mask_n(n), p);
}
inline F load_bf16(const uint16_t* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p, n)), 16));
}
inline F load_f16(const uint16_t* p, int n) { return _mm512_cvtph_ps(load_halves(p, n)); }
inline F low_bf16(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline F high_bf16(I x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536))); }

// Calls row(i, lanes) for the columns of a square of W rows of W lanes: pairs are woven, then pairs of pairs, then
// quarters, twice.
template <typename T, typename Row>
inline void turn(const T* in, size_t ld, Row row) {
    I a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = i_load(in + i * ld);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            b[8 * j + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + i + 4], 0x88);
            b[8 * j + i + 4] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        row(i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        row(i + 8, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

// Four horizontal sums: lanes are added pairwise while the four are woven into one.
inline void hsum4(const I a[4], int32_t out[4]) {
    const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    const I all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
inline void hsum4(const F a[4], float out[4]) {
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    const F all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

}  // namespace eightfold::EF_ISA
