// Work on single rows: norms, quantization, what follows an integer product, rotations, activations.
// No product is fused with a sum unless it says so: the reference rounds after each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels.h"

namespace eightfold::EF_ISA {

// Calls f(i, n): n lanes from i on, n < W only at the end.
template <typename Step>
inline void lanes(int size, Step f) {
    int i = 0;
    for (; i + W <= size; i += W) f(i, W);
    if (i < size) f(i, size - i);
}

inline F get(const float* p, int n) { return n == W ? f_load(p) : f_load_n(p, n); }
inline void set(float* p, F x, int n) { n == W ? f_store(p, x) : f_store_n(p, x, n); }
inline I get(const int32_t* p, int n) { return n == W ? i_load(p) : i_load_n(p, n); }
inline void put(float* p, F x, int n, bool adds) { set(p, adds ? f_add(get(p, n), x) : x, n); }

// kLevels 2**r, |r| <= 1/2, by the polynomial whose largest relative error is least: 1.5e-7 with 1 at zero.
template <int kLevels>
inline F exp2_rest(F r) {
    F p = f_set(kLevels * 0.0013277938903143492);
    for (const double c : {0.009675757640753286, 0.05550709598139147, 0.24022114337835265, 0.6931469682296734, 1.0}) {
        p = f_fma(p, r, f_set(static_cast<float>(kLevels * c)));
    }
    return p;
}

constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.9259630e-8f;  // log2 e in two parts

// e**x = 2**n 2**r, relative error below 2.5e-7.
inline F exp_lanes(F x) {
    x = f_min(f_max(x, f_set(-87.0f)), f_set(88.0f));
    const F log2_e = f_set(kLog2E), n = f_round(f_mul(x, log2_e));
    return scale_2n(exp2_rest<1>(f_fma(x, f_set(kLog2ERest), f_fms(x, log2_e, n))), n);
}

// kLevels e**x for x <= 0, relative error below 3e-7 down to -12 and 1.3e-6 down to -87; what lies below counts as
// that. Of other x anything.
template <int kLevels>
inline F exp_levels(F x) {
    x = f_max(x, f_set(-87.0f));
    const F log2_e = f_set(kLog2E), n = f_round(f_mul(x, log2_e));
    return scale_2n(exp2_rest<kLevels>(f_fms(x, log2_e, n)), n);
}

inline float squares(const float* x, int n) {
    F sum = f_set(0.0f);
    lanes(n, [&](int i, int m) {
        const F v = get(x + i, m);
        sum = f_fma(v, v, sum);
    });
    return f_hsum(sum);
}

inline void rms_norm(const float* x, int n, const float* gain, const float* bias, float eps, float* y) {
    const float mean = squares(x, n) / static_cast<float>(n);
    const F inverse = f_set(1.0f / std::sqrt(mean + eps));
    lanes(n, [&](int i, int m) {
        F v = f_mul(get(x + i, m), inverse);
        if (gain != nullptr) v = f_mul(v, get(gain + i, m));
        if (bias != nullptr) v = f_add(v, get(bias + i, m));
        set(y + i, v, m);
    });
}

inline void widen(const void* x, DType type, int n, float* y) {
    lanes(n, [&](int i, int m) {
        if (type == DType::bf16) set(y + i, load_bf16(static_cast<const uint16_t*>(x) + i, m), m);
        if (type == DType::f16) set(y + i, load_f16(static_cast<const uint16_t*>(x) + i, m), m);
        if (type == DType::f32) set(y + i, get(static_cast<const float*>(x) + i, m), m);
    });
}

// clamp(rne(scaled + offset)): the clamp goes first, integers beyond 32 bit have no conversion.
inline I to_int8(F scaled, F offset) {
    return to_i(f_min(f_max(f_add(scaled, offset), f_set(-128.0f)), f_set(127.0f)));
}

inline void pad_row(uint8_t* out, int n, uint8_t value) {
    const int padded = (n + kAlign - 1) / kAlign * kAlign;
    std::memset(out + n, value, static_cast<size_t>(padded - n));
}

inline void quantize_static(const float* x, int n, float inv_scale, float offset, uint8_t* out) {
    const F inv = f_set(inv_scale), off = f_set(offset);
    const I bias = i_set(kZero);
    lanes(n, [&](int i, int m) { store_low_bytes(out + i, i_add(to_int8(f_mul(get(x + i, m), inv), off), bias), m); });
    pad_row(out, n, kZero);
}

struct Range {
    float lo, hi;
};

// Smallest and largest value, and zero.
inline Range range_with_zero(const float* x, int n) {
    F lo = f_set(0.0f), hi = f_set(0.0f);
    lanes(n, [&](int i, int m) {
        const F v = get(x + i, m);  // missing lanes are zeros
        lo = f_min(lo, v);
        hi = f_max(hi, v);
    });
    return {f_hmin(lo), f_hmax(hi)};
}

constexpr float kEps = 1.1920928955078125e-07f;  // least scale, as in the reference

inline RowParams quantize_token(const float* x, int n, bool symmetric, uint8_t* out) {
    const Range range = range_with_zero(x, n);
    float scale, offset = 0.0f;
    if (symmetric) {
        scale = std::max(std::max(-range.lo, range.hi) / 127.0f, kEps);
    } else {
        scale = std::max((range.hi - range.lo) / 255.0f, kEps);
        offset = std::nearbyint(-range.lo / scale) - 128.0f;
    }
    quantize_static(x, n, 1.0f / scale, offset, out);
    // Outside int8, or NaN, where the row is not finite: its products mean nothing then, but sums stay inside 32 bits.
    return {scale, offset >= -128.0f && offset <= 127.0f ? static_cast<int32_t>(offset) : 0, 0, 0.0f};
}

inline RowParams quantize_16(const float* x, int n, uint8_t* high, uint8_t* low) {
    const Range range = range_with_zero(x, n);
    // 32512 = 127 * 256: the high half stays inside int8.
    const float scale = std::max(std::max(-range.lo, range.hi) / 32512.0f, 1e-30f);
    const F inv = f_set(1.0f / scale), limit = f_set(32512.0f), minus = f_set(-32512.0f);
    const I bias = i_set(kZero), mask = i_set(255);
    I sum = i_set(0);
    lanes(n, [&](int i, int m) {
        const I q = to_i(f_min(f_max(f_mul(get(x + i, m), inv), minus), limit));
        sum = i_add(sum, q);
        // A signed low half is 256 less than the unsigned one from 128 on, which are the same bits.
        store_low_bytes(high + i, kZero == 0 ? i_sra8(i_add(q, i_set(128))) : i_add(i_sra8(q), bias), m);
        store_low_bytes(low + i, i_and(q, mask), m);
    });
    pad_row(high, n, kZero);
    pad_row(low, n, 0);
    return {scale, 0, i_hsum(sum), 0.0f};
}

inline F real_static(I acc, I bias, F deq_scale) { return f_mul(to_f(i_add(acc, bias)), deq_scale); }

inline void finish_static(const int32_t* acc, int n, const int32_t* bias, const float* deq_scale, bool adds, float* y) {
    lanes(n, [&](int i, int m) {
        put(y + i, real_static(get(acc + i, m), get(bias + i, m), get(deq_scale + i, m)), m, adds);
    });
}

inline void finish_token(const int32_t* acc, int n, const int32_t* weight_sum, const float* weight_scale,
                         const float* bias, RowParams row, bool adds, float* y) {
    const I offset = i_set(row.offset + kZero);
    const F scale = f_set(row.scale);
    lanes(n, [&](int i, int m) {
        const I sums = i_sub(get(acc + i, m), i_mul(offset, get(weight_sum + i, m)));
        F v = f_mul(f_mul(to_f(sums), scale), get(weight_scale + i, m));
        if (bias != nullptr) v = f_add(v, get(bias + i, m));
        put(y + i, v, m, adds);
    });
}

// Lanes of weight rows from n on, m of them.
struct Lanes16 {
    I correction;
    F scale, offset, bias;
    bool has_offset, has_bias;

    Lanes16(Scales16 from, int n, int m)
        : correction(i_mul(i_set(kZero), get(from.weight_sum + n, m))),
          scale(get(from.scale + n, m)),
          offset(from.offset != nullptr ? get(from.offset + n, m) : f_set(0.0f)),
          bias(from.bias != nullptr ? get(from.bias + n, m) : f_set(0.0f)),
          has_offset(from.offset != nullptr),
          has_bias(from.bias != nullptr) {}

    F real(I high, I low, RowParams row) const {
        F v = f_fma(to_f(i_sub(high, correction)), f_set(256.0f), to_f(low));
        if (has_offset) v = f_fma(f_set(static_cast<float>(-row.sum)), offset, v);
        v = f_mul(f_mul(v, f_set(row.scale)), scale);
        return has_bias ? f_add(v, bias) : v;
    }
};

inline void finish_16(const int32_t* high, const int32_t* low, int n, Scales16 scales, RowParams row, bool adds,
                      float* y) {
    lanes(n, [&](int i, int m) {
        put(y + i, Lanes16(scales, i, m).real(get(high + i, m), get(low + i, m), row), m, adds);
    });
}

inline void add(float* x, const float* y, int n) {
    lanes(n, [&](int i, int m) { set(x + i, f_add(get(x + i, m), get(y + i, m)), m); });
}

inline void add_times(float* x, const float* y, float factor, int n) {
    const F times = f_set(factor);
    lanes(n, [&](int i, int m) { set(x + i, f_add(get(x + i, m), f_mul(times, get(y + i, m))), m); });
}

// gate / (1 + e**-z) up. silu: z = gate; gelu: z = 2 sqrt(2 / pi) (gate + 0.044715 gate**3), which is
// gate (1 + tanh(z / 2)) / 2 (Hendrycks and Gimpel 2016, arXiv:1606.08415).
template <Activation kActivation>
inline F gate_times(F gate, F up) {
    F z = gate;
    if constexpr (kActivation == Activation::gelu) {
        constexpr float slope = 1.5957691216057308f, bend = 0.044715f * slope;
        z = f_mul(gate, f_fma(f_mul(gate, gate), f_set(bend), f_set(slope)));
    }
    return f_mul(f_div(gate, f_add(f_set(1.0f), exp_lanes(f_sub(f_set(0.0f), z)))), up);
}

// Calls f.operator()<activation>().
template <typename Step>
inline void by_activation(Activation activation, Step f) {
    if (activation == Activation::gelu) f.template operator()<Activation::gelu>();
    else f.template operator()<Activation::silu>();
}

inline void gate_mul(Activation activation, const float* gate, const float* up, int n, float* y) {
    by_activation(activation, [=]<Activation kActivation>() {
        lanes(n, [=](int i, int m) { set(y + i, gate_times<kActivation>(get(gate + i, m), get(up + i, m)), m); });
    });
}

// tanh x = e / (e + 2), e = e**2x - 1 = 2**n (2**r - 1) + 2**n - 1; of 2**r - 1 = r p(r), |r| <= 1/2, the polynomial
// whose largest relative error is least, 1.1e-8, so that small x lose nothing. Beyond 10 it is one.
inline F tanh_lanes(F x) {
    x = f_min(f_max(x, f_set(-10.0f)), f_set(10.0f));
    const F twice = f_add(x, x), log2_e = f_set(kLog2E), n = f_round(f_mul(twice, log2_e));
    const F r = f_fma(twice, f_set(kLog2ERest), f_fms(twice, log2_e, n)), one = f_set(1.0f), power = scale_2n(one, n);
    F p = f_set(1.54035102e-4f);
    for (const float c : {1.33907355e-3f, 9.61823750e-3f, 5.55035743e-2f, 2.40226498e-1f, 6.93147188e-1f}) {
        p = f_fma(p, r, f_set(c));
    }
    const F e = f_fma(power, f_mul(p, r), f_sub(power, one));
    return f_div(e, f_add(e, f_set(2.0f)));
}

inline void soften(float* x, int n, float cap) {
    const F most = f_set(cap), inverse = f_set(1.0f / cap);
    lanes(n, [=](int i, int m) { set(x + i, f_mul(tanh_lanes(f_mul(get(x + i, m), inverse)), most), m); });
}

inline void rope(const float* x, int n, const float* cos, const float* sin, float* y) {
    const int half = n / 2;
    lanes(half, [&](int i, int m) {
        const F a = get(x + i, m), b = get(x + half + i, m), c = get(cos + i, m), s = get(sin + i, m);
        set(y + i, f_sub(f_mul(a, c), f_mul(b, s)), m);
        set(y + half + i, f_add(f_mul(b, c), f_mul(a, s)), m);
    });
}

inline int32_t quantize_heads(const float* x, int n, const float* inv_scale, const float* offset, int step,
                              int8_t* out) {
    I sum = i_set(0);
    int32_t rest = 0;
    lanes(n, [&](int i, int m) {
        const F inv = step ? get(inv_scale + i, m) : f_set(*inv_scale);
        const F off = offset == nullptr ? f_set(0.0f) : step ? get(offset + i, m) : f_set(*offset);
        const I q = to_int8(f_mul(get(x + i, m), inv), off);
        store_low_bytes(out + i, q, m);
        if (m == W) sum = i_add(sum, q);
        else rest = std::accumulate(out + i, out + i + m, 0);
    });
    return i_hsum(sum) + rest;
}

inline void scale_heads(const float* acc, int n, float inverse, const float* offset, const float* scale, float* y) {
    const F factor = f_set(inverse);
    lanes(n, [&](int i, int m) {
        F v = f_mul(get(acc + i, m), factor);
        if (scale != nullptr) v = f_mul(f_sub(v, get(offset + i, m)), get(scale + i, m));
        set(y + i, v, m);
    });
}

// The first of the largest; NaN is never it, and where there is nothing else the answer is 0.
inline int argmax(const float* x, int n) {
    F best = f_set(-std::numeric_limits<float>::infinity());
    lanes(n, [&](int i, int m) {  // f_max returns its second where one is NaN
        if (m == W) best = f_max(f_load(x + i), best);
        else
            for (int j = i; j < i + m; j++) best = f_max(f_set(x[j]), best);
    });
    const float* at = std::find(x, x + n, f_hmax(best));
    return at == x + n ? 0 : static_cast<int>(at - x);
}

inline F get(const void* x, DType type, int i, int n) {
    if (type == DType::bf16) return load_bf16(static_cast<const uint16_t*>(x) + i, n);
    if (type == DType::f16) return load_f16(static_cast<const uint16_t*>(x) + i, n);
    return get(static_cast<const float*>(x) + i, n);
}

// A float32 sum of n products, in whatever order, is off by less than n 2**-24 of the sum of their sizes, which is at
// most |w| |x|; twice that, and 1e-5 for the estimate's own few roundings, are added to the error.
inline ShadowRow shadow_row(const void* w, DType type, int n, int8_t* q) {
    F top = f_set(0.0f);
    lanes(n, [&](int i, int m) {
        const F v = get(w, type, i, m);
        top = f_max(top, f_max(v, f_sub(f_set(0.0f), v)));
    });
    const float scale = std::max(f_hmax(top) / 127.0f, 1e-30f);
    const F inv = f_set(1.0f / scale), minus = f_set(-scale), zero = f_set(0.0f);
    F errors = zero, squares = zero;
    I sum = i_set(0);
    lanes(n, [&](int i, int m) {
        const F v = get(w, type, i, m);
        const I integers = to_int8(f_mul(v, inv), zero);
        store_low_bytes(q + i, integers, m);
        sum = i_add(sum, integers);
        const F whole = to_f(integers), e = f_fma(whole, minus, v);
        errors = f_fma(e, e, errors);
        squares = f_fma(whole, whole, squares);
    });
    const float slack = 1.001f, length = scale * std::sqrt(f_hsum(squares)) * slack;
    const float error = std::sqrt(f_hsum(errors)) * slack;
    return {scale, i_hsum(sum), error + (error + length) * (1e-5f + 1.2e-7f * static_cast<float>(n)), length};
}

inline Bounds bounds(const float* y, int n, const float* error, const float* norm, float x_norm, float x_error,
                     float* upper) {
    const F a = f_set(x_norm), b = f_set(x_error), least = f_set(-std::numeric_limits<float>::infinity());
    F lowest = least, highest = least;
    int i = 0;
    for (; i + W <= n; i += W) {
        const F v = f_load(y + i), off = f_fma(f_load(error + i), a, f_mul(f_load(norm + i), b));
        const F high = f_add(v, off);
        f_store(upper + i, high);
        lowest = f_max(f_sub(v, off), lowest);
        highest = f_max(high, highest);
    }
    Bounds found{f_hmax(lowest), f_hmax(highest)};
    for (; i < n; i++) {
        const float off = std::fma(error[i], x_norm, norm[i] * x_error);
        upper[i] = y[i] + off;
        found.lower = std::max(found.lower, y[i] - off);
        found.upper = std::max(found.upper, upper[i]);
    }
    return found;
}

}  // namespace eightfold::EF_ISA
