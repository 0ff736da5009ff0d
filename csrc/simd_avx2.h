// Eight lanes: AVX2, FMA and F16C. Bytes are widened to 16 bit before they are multiplied: the instruction that
// multiplies bytes directly saturates its pair sums.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace eightfold::EF_ISA {

constexpr int W = 8;
constexpr int kAttnCols = 4;
constexpr int kZero = 128;
constexpr bool kFlips = false;
using F = __m256;
using I = __m256i;

inline I mask_n(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

inline F f_set(float x) { return _mm256_set1_ps(x); }
inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
inline F f_load_n(const float* p, int n) { return _mm256_maskload_ps(p, mask_n(n)); }
inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void f_store_n(float* p, F x, int n) { _mm256_maskstore_ps(p, mask_n(n), x); }
inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F f_fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
inline F f_min(F a, F b) { return _mm256_min_ps(a, b); }
inline F f_max(F a, F b) { return _mm256_max_ps(a, b); }
inline F f_round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float f_hsum(F x) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float f_hmax(F x) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline float f_hmin(F x) { return -f_hmax(f_sub(f_set(0.0f), x)); }

inline I i_set(int32_t x) { return _mm256_set1_epi32(x); }
inline I i_load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
inline I i_load_bytes(const void* p, int n) {
    alignas(32) uint8_t bytes[32] = {};
    std::memcpy(bytes, p, n);
    return _mm256_load_si256(reinterpret_cast<const I*>(bytes));
}
inline I i_load_n(const int32_t* p, int n) { return _mm256_maskload_epi32(p, mask_n(n)); }
inline void i_store(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
inline void i_store_n(int32_t* p, I x, int n) { _mm256_maskstore_epi32(p, mask_n(n), x); }
inline I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I i_mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I i_and(I a, I b) { return _mm256_and_si256(a, b); }
inline I i_sra8(I a) { return _mm256_srai_epi32(a, 8); }
inline I i_shift(I a, int left) { return _mm256_slli_epi32(a, left); }
inline int32_t i_hsum(I x) {
    const __m128i a = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i b = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
inline F to_f(I x) { return _mm256_cvtepi32_ps(x); }
inline F as_f(I x) { return _mm256_castsi256_ps(x); }
inline I to_i(F x) { return _mm256_cvtps_epi32(x); }
inline F scale_2n(F x, F n) {
    const I power = _mm256_slli_epi32(_mm256_add_epi32(to_i(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
inline void store_low_bytes(void* p, I x, int n) {
    const I order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                     0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const I packed = _mm256_shuffle_epi8(x, order);
    const int32_t halves[2] = {_mm256_extract_epi32(packed, 0), _mm256_extract_epi32(packed, 4)};
    std::memcpy(p, halves, n);
}

inline F f_acc(F acc, F a, F b) { return _mm256_fmadd_ps(a, b, acc); }
inline I dot4(I acc, I a, I b) {
    const I even =
        _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline I dot4_anywhere(I acc, I a, I b) { return dot4(acc, a, b); }
inline I dot4_unsigned(I acc, I a, I b) { return dot4(acc, a, b); }

inline __m128i load_halves(const uint16_t* p, int n) {
    if (n >= W) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint16_t values[8] = {};
    std::memcpy(values, p, 2 * static_cast<size_t>(n));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(values));
}
inline F load_bf16(const uint16_t* p, int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16));
}
inline F load_f16(const uint16_t* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
inline F low_bf16(I x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline F high_bf16(I x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536))); }

// Calls row(i, lanes) for the columns of a square of W rows of W lanes: pairs are woven, then pairs of pairs, then
// halves.
template <typename T, typename Row>
inline void turn(const T* in, size_t ld, Row row) {
    I a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = i_load(in + i * ld);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        row(i, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        row(i + 4, _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}

inline void hsum4(const I a[4], int32_t out[4]) {
    const I t = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1)));
}
inline void hsum4(const F a[4], float out[4]) {
    const F t = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}

}  // namespace eightfold::EF_ISA
