// What tile_packed of packed.h is where instructions sum four products: sixteen bytes of each weight row are one register,
// of which each instruction takes four, so no weight is broadcast. smmla multiplies two tokens by two rows, eight bytes
// each, which is twice as much.
#pragma once

#include "kernels.h"

namespace eightfold::EF_ISA {

constexpr int kWhole = 16;  // bytes of K that are taken at a time
constexpr int kQuads = kLanes / 4;

// One row's sums after 16 more bytes: fours [kLanes][4] of x lie one after the other.
template <int kFour, int R>
[[gnu::always_inline]] inline void step_four(I acc[R][kQuads], const I weights[R], const uint8_t* x) {
    I xs[kQuads];
#pragma GCC unroll 4
    for (int v = 0; v < kQuads; v++) xs[v] = i_load(x + (kFour * kQuads + v) * 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kQuads; v++) {
            acc[r][v] = vdotq_laneq_s32(acc[r][v], bytes(xs[v]), bytes(weights[r]), kFour);
        }
}

template <int R>
inline void tile_dot(const int8_t* w, size_t ldw, const uint8_t* x, int whole, ptrdiff_t ahead, int32_t* sums) {
    I acc[R][kQuads];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kQuads; v++) acc[r][v] = i_set(0);
    for (int k = 0; k < whole; k += kWhole, x += kWhole * kLanes) {
        if (k % 64 == 0)
            for (int r = 0; r < R; r++) __builtin_prefetch(w + r * ldw + k + ahead);
        I weights[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) weights[r] = i_load(w + r * ldw + k);
        step_four<0, R>(acc, weights, x);
        step_four<1, R>(acc, weights, x);
        step_four<2, R>(acc, weights, x);
        step_four<3, R>(acc, weights, x);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kQuads; v++) i_store(sums + r * kLanes + v * 4, acc[r][v]);
}

#if EF_DOTPROD == 2
inline I low_halves(I a, I b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline I high_halves(I a, I b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// The sums of two tokens with two rows are a register: (t0 r0, t0 r1, t1 r0, t1 r1).
template <int R>
inline void tile_squares(const int8_t* w, size_t ldw, const uint8_t* x, int whole, ptrdiff_t ahead, int32_t* sums) {
    constexpr int P = R / 2;
    I acc[P][2 * kQuads];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kQuads; v++) acc[p][v] = i_set(0);
    for (int k = 0; k < whole; k += kWhole) {
        if (k % 64 == 0)
            for (int r = 0; r < R; r++) __builtin_prefetch(w + r * ldw + k + ahead);
        I weights[2][P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const I even = i_load(w + 2 * p * ldw + k), odd = i_load(w + (2 * p + 1) * ldw + k);
            weights[0][p] = low_halves(even, odd), weights[1][p] = high_halves(even, odd);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, x += 8 * kLanes)
#pragma GCC unroll 4
            for (int v = 0; v < kQuads; v++) {
                const I first = i_load(x + v * 16), second = i_load(x + 4 * kLanes + v * 16);
                const I tokens[2] = {vzip1q_s32(first, second), vzip2q_s32(first, second)};
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) {
                        I& sum = acc[p][2 * v + i];
                        sum = vmmlaq_s32(sum, bytes(tokens[i]), bytes(weights[half][p]));
                    }
            }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int v = 0; v < kQuads; v++) {
            int32_t* to = sums + 2 * p * kLanes + v * 4;
            i_store(to, vuzp1q_s32(acc[p][2 * v], acc[p][2 * v + 1]));
            i_store(to + kLanes, vuzp2q_s32(acc[p][2 * v], acc[p][2 * v + 1]));
        }
}
#endif

template <int R, int B>
[[gnu::noinline]] void tile_packed(const int8_t* w, size_t ldw, const uint8_t* x, size_t, int inner, int32_t* sums) {
    static_assert(B == 1 && (R == 1 || R == 4));
    const int whole = inner / kWhole * kWhole;
    const ptrdiff_t ahead = static_cast<ptrdiff_t>(R * ldw);  // the same bytes of the next rows
#if EF_DOTPROD == 2
    if constexpr (R == 4) return tile_squares<R>(w, ldw, x, whole, ahead, sums);
#endif
    tile_dot<R>(w, ldw, x, whole, ahead, sums);
}

}  // namespace eightfold::EF_ISA
