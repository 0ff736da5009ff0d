// Matrix products of many tokens: lanes are tokens, so a product ends without sums across lanes. Activations are packed
// in blocks of kLanes tokens, [K / 4][kLanes][4] bytes; four bytes of a weight row meet all tokens of a block at once,
// and weights are read as they lie in the file.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace eightfold::EF_ISA {

static_assert(kLanes % W == 0);
constexpr int kVectors = kLanes / W;              // of a block, for four bytes of K
constexpr int kMostBlocks = W == 16 ? 4 : 1;      // that a weight meets at once
constexpr int kPackedRows = 64;                   // weight rows whose sums are kept before they are transposed

// Weight rows that meet so many blocks in registers.
template <int B>
constexpr int kRowsFor = W == 16 && B <= 2 ? 8 : 4;

// sums[r][lane] = sum_k x[lane][k] w[r][k] of R rows and B blocks.
template <int R, int B>
inline void tile_packed(const int8_t* w, size_t ldw, const uint8_t* x, size_t block, int inner, int32_t* sums) {
    constexpr int V = B * kVectors;
    const int ahead = std::min(2048, inner);
    const ptrdiff_t wraps = static_cast<ptrdiff_t>(R * ldw) - inner;
    I acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = i_set(0);
    const auto step = [&](const int8_t* four, const uint8_t* lanes, int bytes) __attribute__((always_inline)) {
        I xs[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) xs[v] = i_load(lanes + v / kVectors * block + v % kVectors * (4 * W));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {  // one row's weights at a time, so that all sums stay in registers
            int32_t value = 0;
            std::memcpy(&value, four + r * ldw, bytes);
            const I weights = i_set(value);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[r][v] = dot4(acc[r][v], xs[v], weights);
        }
    };
    const int whole = inner / 4 * 4;
    for (int k = 0; k < whole;) {
        const int8_t* later = w + k + ahead + (k + ahead < inner ? 0 : wraps);
        for (int r = 0; r < R; r++) __builtin_prefetch(later + r * ldw);
        for (const int end = std::min(whole, k + 64); k < end; k += 4) step(w + k, x + static_cast<size_t>(k) * kLanes, 4);
    }
    if (whole < inner) step(w + whole, x + static_cast<size_t>(whole) * kLanes, inner - whole);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) i_store(sums + r * B * kLanes + v * W, acc[r][v]);
}

// out[lane][n] of a run of rows, from sums[n][lane].
inline void put_packed(const int32_t* sums, int rows, int lanes, int32_t* out, size_t ldo) {
    for (int lane = 0; lane < lanes; lane += W) {
        int n = 0;
        for (; n + W <= rows; n += W) transpose(sums + n * lanes + lane, lanes, out + lane * ldo + n, ldo);
        for (; n < rows; n++)
            for (int i = lane; i < lane + W; i++) out[i * ldo + n] = sums[n * lanes + i];
    }
}

// out[16 b + lane][n] = sum_k x[b][lane][k] w[n][k] for all lanes of all blocks.
inline void gemm_packed(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int blocks, int inner,
                        int32_t* out, size_t ldo) {
    alignas(64) int32_t sums[kPackedRows * kMostBlocks * kLanes];
    const auto run = [&]<int B>(int b) {
        for (int first = 0; first < rows; first += kPackedRows) {
            const int count = std::min(kPackedRows, rows - first);
            constexpr int R = kRowsFor<B>;
            const int8_t* row = w + first * ldw;
            const uint8_t* lanes = x + b * block;
            int n = 0;
            for (; n + R <= count; n += R) {
                tile_packed<R, B>(row + n * ldw, ldw, lanes, block, inner, sums + n * B * kLanes);
            }
            for (; n < count; n++) tile_packed<1, B>(row + n * ldw, ldw, lanes, block, inner, sums + n * B * kLanes);
            put_packed(sums, count, B * kLanes, out + static_cast<size_t>(b) * kLanes * ldo + first, ldo);
        }
    };
    for (int b = 0; b < blocks;) {
        const int count = std::min(kMostBlocks, blocks - b);
        if (count == 1) run.template operator()<1>(b);
        if constexpr (kMostBlocks >= 4) {
            if (count == 2) run.template operator()<2>(b);
            if (count == 3) run.template operator()<3>(b);
            if (count == 4) run.template operator()<4>(b);
        }
        b += count;
    }
}

// A block from kLanes rows of ld bytes, a multiple of kAlign.
inline void pack(const uint8_t* rows, size_t ld, uint8_t* block) {
    const auto* from = reinterpret_cast<const int32_t*>(rows);
    auto* to = reinterpret_cast<int32_t*>(block);
    for (size_t k = 0; k < ld / 4; k += W)
        for (int i = 0; i < kLanes; i += W) transpose(from + i * ld / 4 + k, ld / 4, to + k * kLanes + i, kLanes);
}

}  // namespace eightfold::EF_ISA
