// Matrix products as dot products of rows: both operands are contiguous along K, so weights are used as they lie in
// the file. Four weight rows meet kCols rows of activations; the sums stay in registers until K ends, then four
// registers at a time are folded into four numbers.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace eightfold::EF_ISA {

constexpr int kTileRows = 4;           // of weights
constexpr int kCols = W == 8 ? 2 : 6;      // accumulators are 4 * kCols of 16 or 32 registers
constexpr int kFloatCols = W == 8 ? 2 : 4;
constexpr int kTileBytes = 18 << 10;     // of activation rows in a tile: they stay in the first cache
constexpr int kFloatBlock = 2048;
constexpr int kAhead = 2048;               // bytes of a weight row

// Tiles of a few hundred bytes, one after the other: the next one's loads have to begin before the last one's sums are
// stored, and a call between them costs a fifth of the bandwidth. So what one token needs is forced into one function,
// whatever else the compiler has put into this file.
template <int C>
[[gnu::always_inline]] inline void tile_i8(const int8_t* const w[4], size_t next, const uint8_t* x, size_t ldx,
                                           int inner, int32_t sums[C][4]) {
    constexpr int step = 4 * W;
    // What is read kAhead bytes later: further along these rows, or the beginning of the next four, `next` bytes on. Of
    // short rows, those of a later four.
    const int ahead = std::min(kAhead, inner);
    const ptrdiff_t later_rows = std::max(1, kAhead / std::max(inner, 1));
    const ptrdiff_t wraps = later_rows * static_cast<ptrdiff_t>(next) - inner;
    I acc[kTileRows][C];
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = i_set(0);
    const auto fetch = [&](int k) __attribute__((always_inline)) {
        const ptrdiff_t later = k + ahead + (k + ahead < inner ? 0 : wraps);
        for (int r = 0; r < 4; r++) __builtin_prefetch(w[r] + later);
    };
    const auto products = [&](int k) __attribute__((always_inline)) {
        const I w0 = i_load(w[0] + k), w1 = i_load(w[1] + k), w2 = i_load(w[2] + k), w3 = i_load(w[3] + k);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const I xc = i_load(x + c * ldx + k);
            acc[0][c] = dot4_anywhere(acc[0][c], xc, w0);
            acc[1][c] = dot4_anywhere(acc[1][c], xc, w1);
            acc[2][c] = dot4_anywhere(acc[2][c], xc, w2);
            acc[3][c] = dot4_anywhere(acc[3][c], xc, w3);
        }
    };
    int k = 0;
    if constexpr (W == 4) {  // a step is a quarter of a cache line, which is prefetched once
        for (; k + 4 * step <= inner; k += 4 * step) {
            fetch(k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) products(k + i * step);
        }
    }
    for (; k + step <= inner; k += step) {
        fetch(k);
        products(k);
    }
    if (k < inner) {
        I wr[4];
        for (int r = 0; r < 4; r++) wr[r] = i_load_bytes(w[r] + k, inner - k);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            const I xc = i_load(x + c * ldx + k);  // padded
            for (int r = 0; r < 4; r++) acc[r][c] = dot4_anywhere(acc[r][c], xc, wr[r]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
        const I column[4] = {acc[0][c], acc[1][c], acc[2][c], acc[3][c]};
        hsum4(column, sums[c]);
    }
}

template <int C>
[[gnu::noinline]] void tile_i8_apart(const int8_t* const w[4], size_t next, const uint8_t* x, size_t ldx, int inner,
                                     int32_t sums[C][4]) {
    tile_i8<C>(w, next, x, ldx, inner, sums);
}

template <int C>
inline void tile_float(const void* const w[4], DType type, size_t next, const float* x, size_t ldx, int inner,
                       float sums[C][4]) {
    const int size = type == DType::f32 ? 4 : 2, ahead = std::min(kAhead / size, inner);
    const ptrdiff_t wraps = static_cast<ptrdiff_t>(next) - inner;
    F acc[kTileRows][C];
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < C; c++) acc[r][c] = f_set(0.0f);
    const auto step = [&](auto load, int k, int n) {
        F wr[4];
        for (int r = 0; r < 4; r++) wr[r] = load(w[r], k, n);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const F xc = n == W ? f_load(x + c * ldx + k) : f_load_n(x + c * ldx + k, n);
            for (int r = 0; r < 4; r++) acc[r][c] = f_acc(acc[r][c], xc, wr[r]);
        }
    };
    const auto run = [&](auto load) {
        int k = 0;
        for (; k + W <= inner; k += W) {
            const ptrdiff_t later = (k + ahead + (k + ahead < inner ? 0 : wraps)) * size;
            for (int r = 0; r < 4; r++) __builtin_prefetch(static_cast<const char*>(w[r]) + later);
            step(load, k, W);
        }
        if (k < inner) step(load, k, inner - k);
    };
    if (type == DType::bf16) {
        run([](const void* p, int k, int n) { return load_bf16(static_cast<const uint16_t*>(p) + k, n); });
    } else if (type == DType::f16) {
        run([](const void* p, int k, int n) { return load_f16(static_cast<const uint16_t*>(p) + k, n); });
    } else {
        run([](const void* p, int k, int n) {
            const float* at = static_cast<const float*>(p) + k;
            return n == W ? f_load(at) : f_load_n(at, n);
        });
    }
    for (int c = 0; c < C; c++) {
        const F column[4] = {acc[0][c], acc[1][c], acc[2][c], acc[3][c]};
        hsum4(column, sums[c]);
    }
}

// Four rows that are multiplied at once. Of a few activation rows each weight is needed once, and comes from memory:
// then they are far apart, four long runs, which is what machines read best.
struct Rows {
    int first, stride, count;
    int row(int r) const { return first + std::min(r, count - 1) * stride; }
};

// Writes or adds the sums of up to four weight rows to their places.
template <typename T, int C>
[[gnu::always_inline]] inline void put(const T sums[C][4], Rows at, T* out, size_t ldo, bool adds) {
    if (at.stride != 1) {
        for (int c = 0; c < C; c++)
            for (int r = 0; r < 4; r++) {
                T& to = out[c * ldo + r * at.stride];
                to = adds ? to + sums[c][r] : sums[c][r];
            }
        return;
    }
    const int rows = at.count;
    if (rows == 4 && !adds) {
        for (int c = 0; c < C; c++) std::memcpy(out + c * ldo, sums[c], sizeof sums[c]);
        return;
    }
    for (int c = 0; c < C; c++)
        for (int r = 0; r < rows; r++) out[c * ldo + r] = adds ? out[c * ldo + r] + sums[c][r] : sums[c][r];
}

// Walks over activation rows in tiles of nearly equal height, and over the weight rows for each.
template <int kMax, typename Tile>
[[gnu::always_inline]] inline void walk(int xrows, int rows, Tile tile) {
    const int tiles = (xrows + kMax - 1) / kMax;
    if (tiles == 1 && rows % 4 == 0) {
        const int stride = rows / 4;
        for (int n = 0; n < stride; n++) tile(0, xrows, Rows{n, stride, 4});
        return;
    }
    for (int i = 0, t = 0; i < tiles; i++) {
        const int height = (xrows - t) / (tiles - i);
        for (int n = 0; n < rows; n += 4) tile(t, height, Rows{n, 1, std::min(4, rows - n)});
        t += height;
    }
}

inline void gemm_i8(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t ldx, int xrows, int inner,
                    int32_t* out, size_t ldo) {
    // Few tokens read weight rows whole: rows that are read in parts are no long runs.
    const int block = kTileBytes / std::clamp(xrows, 1, kCols) / (4 * W) * (4 * W);
    for (int k = 0; k < inner; k += block) {
        const int length = std::min(block, inner - k);
        walk<kCols>(xrows, rows, [&](int t, int height, Rows at) __attribute__((always_inline)) {
            const int8_t* wr[4];
            for (int r = 0; r < 4; r++) wr[r] = w + at.row(r) * ldw + k;
            const uint8_t* xt = x + t * ldx + k;
            const auto run = [&]<int C>() __attribute__((always_inline)) {
                if constexpr (C <= kCols) {
                    alignas(64) int32_t sums[C][4];
                    const size_t next = at.stride == 1 ? 4 * ldw : ldw;
                    if constexpr (C <= 2) tile_i8<C>(wr, next, xt, ldx, length, sums);
                    else tile_i8_apart<C>(wr, next, xt, ldx, length, sums);
                    put<int32_t, C>(sums, at, out + t * ldo + at.first, ldo, k > 0);
                }
            };
            switch (height) {
                case 1: run.template operator()<1>(); break;
                case 2: run.template operator()<2>(); break;
                case 3: run.template operator()<3>(); break;
                case 4: run.template operator()<4>(); break;
                case 5: run.template operator()<5>(); break;
                default: run.template operator()<6>(); break;
            }
        });
    }
}

// The sums of one output are taken in the same order whatever the other rows are: results do not depend on the batch.
inline void gemm_float(const void* w, DType type, size_t ldw, int rows, const float* x, size_t ldx, int xrows,
                       int inner, float* out, size_t ldo) {
    const size_t size = type == DType::f32 ? 4 : 2;
    for (int k = 0; k < inner; k += kFloatBlock) {
        const int length = std::min(kFloatBlock, inner - k);
        walk<kFloatCols>(xrows, rows, [&](int t, int height, Rows at) {
            const void* wr[4];
            for (int r = 0; r < 4; r++) wr[r] = static_cast<const char*>(w) + (at.row(r) * ldw + k) * size;
            const float* xt = x + t * ldx + k;
            const auto run = [&]<int C>() {
                if constexpr (C <= kFloatCols) {
                    alignas(64) float sums[C][4];
                    tile_float<C>(wr, type, at.stride == 1 ? 4 * ldw : ldw, xt, ldx, length, sums);
                    put<float, C>(sums, at, out + t * ldo + at.first, ldo, k > 0);
                }
            };
            switch (height) {
                case 1: run.template operator()<1>(); break;
                case 2: run.template operator()<2>(); break;
                case 3: run.template operator()<3>(); break;
                default: run.template operator()<4>(); break;
            }
        });
    }
}

inline void dot_rows(const void* w, DType type, size_t ldw, const int32_t* rows, int count, const float* x, int inner,
                     float* out) {
    const size_t size = type == DType::f32 ? 4 : 2;
    for (int i = 0; i < count; i += 4) {
        for (int k = 0; k < inner; k += kFloatBlock) {
            const void* wr[4];
            for (int r = 0; r < 4; r++) {
                wr[r] = static_cast<const char*>(w) + (rows[std::min(i + r, count - 1)] * ldw + k) * size;
            }
            alignas(64) float sums[1][4];
            tile_float<1>(wr, type, 0, x + k, inner, std::min(kFloatBlock, inner - k), sums);
            for (int r = 0; r < std::min(4, count - i); r++) out[i + r] = k > 0 ? out[i + r] + sums[0][r] : sums[0][r];
        }
    }
}

inline void row_sums(const int8_t* w, size_t ldw, int rows, int inner, int32_t* out) {
    const I ones = i_set(0x01010101);  // of either sign
    for (int n = 0; n < rows; n++) {
        const int8_t* row = w + n * ldw;
        I acc = i_set(0);
        int k = 0;
        for (; k + 4 * W <= inner; k += 4 * W) acc = dot4_anywhere(acc, ones, i_load(row + k));
        if (k < inner) acc = dot4_anywhere(acc, ones, i_load_bytes(row + k, inner - k));
        out[n] = i_hsum(acc);
    }
}

}  // namespace eightfold::EF_ISA
