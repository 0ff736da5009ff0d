// One lane: plain C++. What the others must equal in integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace eightfold::EF_ISA {

constexpr int W = 1;         // lanes of 4 bytes
constexpr int kAttnCols = 8; // accumulators for one query row
constexpr int kZero = 128;    // bytes of activations are unsigned
constexpr bool kFlips = false; // whether dot4_unsigned wants its first bytes with the other sign bit
using F = float;
using I = int32_t;

inline F f_set(float x) { return x; }
inline F f_load(const float* p) { return *p; }
inline F f_load_n(const float* p, int) { return *p; }
inline void f_store(float* p, F x) { *p = x; }
inline void f_store_n(float* p, F x, int) { *p = x; }
inline F f_add(F a, F b) { return a + b; }
inline F f_sub(F a, F b) { return a - b; }
inline F f_mul(F a, F b) { return a * b; }
inline F f_div(F a, F b) { return a / b; }
inline F f_fma(F a, F b, F c) { return std::fma(a, b, c); }
inline F f_fms(F a, F b, F c) { return std::fma(a, b, -c); }
inline F f_min(F a, F b) { return a < b ? a : b; }  // b where one is NaN, as the vector instructions have it
inline F f_max(F a, F b) { return a > b ? a : b; }
inline F f_round(F x) { return std::nearbyint(x); }
inline float f_hsum(F x) { return x; }
inline float f_hmax(F x) { return x; }
inline float f_hmin(F x) { return x; }

inline I i_set(int32_t x) { return x; }
inline I i_load(const void* p) {
    I x;
    std::memcpy(&x, p, 4);
    return x;
}
inline I i_load_bytes(const void* p, int n) {
    I x = 0;
    std::memcpy(&x, p, n);
    return x;
}
inline I i_load_n(const int32_t* p, int) { return *p; }
inline void i_store(int32_t* p, I x) { *p = x; }
inline void i_store_n(int32_t* p, I x, int) { *p = x; }
inline I i_add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
inline I i_sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
inline I i_mul(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
inline I i_and(I a, I b) { return a & b; }
inline I i_sra8(I a) { return a >> 8; }
inline I i_shift(I a, int left) { return static_cast<I>(static_cast<uint32_t>(a) << left); }
inline int32_t i_hsum(I x) { return x; }
inline F to_f(I x) { return static_cast<float>(x); }
inline I to_i(F x) { return static_cast<I>(std::nearbyint(x)); }  // to nearest even
inline F as_f(I x) {
    F y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline F scale_2n(F x, F n) { return x * as_f((static_cast<I>(n) + 127) << 23); }
inline void store_low_bytes(void* p, I x, int) {
    const uint8_t b = static_cast<uint8_t>(x);
    std::memcpy(p, &b, 1);
}

inline F f_acc(F acc, F a, F b) { return std::fma(a, b, acc); }  // as f_fma, where many are summed

// acc + a0 b0 + a1 b1 + a2 b2 + a3 b3 of the unsigned bytes of a and the signed bytes of b.
inline I dot4(I acc, I a, I b) {
    uint8_t x[4];
    int8_t y[4];
    std::memcpy(x, &a, 4);
    std::memcpy(y, &b, 4);
    return acc + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
}
// The same products, but any of them in any lane.
inline I dot4_anywhere(I acc, I a, I b) { return dot4(acc, a, b); }
inline I dot4_unsigned(I acc, I a, I b) { return dot4(acc, a, b); }

inline uint32_t load_half(const void* p) {  // of any alignment, as all loads
    uint16_t x;
    std::memcpy(&x, p, 2);
    return x;
}
inline F load_bf16(const uint16_t* p, int) { return as_f(static_cast<I>(load_half(p) << 16)); }
inline F load_f16(const uint16_t* p, int) {
    const uint32_t h = load_half(p), sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2**-24
        const float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return sign ? -x : x;
    }
    const uint32_t e = exponent == 31 ? 255 : exponent + 112;
    return as_f(static_cast<I>(sign | (e << 23) | (mantissa << 13)));
}
// The low and the high bfloat16 of each lane.
inline F low_bf16(I x) { return as_f(static_cast<I>(static_cast<uint32_t>(x) << 16)); }
inline F high_bf16(I x) { return as_f(static_cast<I>(static_cast<uint32_t>(x) & 0xffff0000u)); }

// Calls row(i, lanes) for the columns of a square of W rows of W lanes.
template <typename T, typename Row>
inline void turn(const T* in, size_t, Row row) {
    row(0, i_load(in));
}

inline void hsum4(const I a[4], int32_t out[4]) {
    for (int i = 0; i < 4; i++) out[i] = a[i];
}
inline void hsum4(const F a[4], float out[4]) {
    for (int i = 0; i < 4; i++) out[i] = a[i];
}

}  // namespace eightfold::EF_ISA
