// Matrix products of many tokens: lanes are tokens, so a product ends without sums across lanes. Activations are packed
// in blocks of kLanes tokens, [K / 4][kLanes][4] bytes; four bytes of a weight row meet all tokens of a block at once,
// and weights are read as they lie in the file.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "rows.h"

namespace eightfold::EF_ISA {

static_assert(kLanes % W == 0);
constexpr int kVectors = kLanes / W;              // of a block, for four bytes of K
constexpr int kMostBlocks = W == 16 ? 4 : 1;      // that a weight meets at once
constexpr int kPackedRows = 64;                   // weight rows whose sums are kept before they are transposed

// Weight rows that meet so many blocks in registers.
template <int B>
constexpr int kRowsFor = W == 16 && B <= 2 ? 8 : 4;

// sums[r][lane] = sum_k x[lane][k] w[r][k] of R rows and B blocks. A function of its own: its loop needs all registers.
template <int R, int B>
[[gnu::noinline]] void tile_packed(const int8_t* w, size_t ldw, const uint8_t* x, size_t block, int inner, int32_t* sums) {
    constexpr int V = B * kVectors;
    const int ahead = std::min(2048, inner);
    const ptrdiff_t wraps = static_cast<ptrdiff_t>(R * ldw) - inner;
    I acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = i_set(0);
    const auto step = [&](const int8_t* four, const uint8_t* lanes, int bytes) __attribute__((always_inline)) {
        I xs[V];
        const int8_t* other = four + 4 * ldw;  // addresses of four rows each need no more than two registers
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) xs[v] = i_load(lanes + v / kVectors * block + v % kVectors * (4 * W));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {  // one row's weights at a time, so that all sums stay in registers
            int32_t value = 0;
            std::memcpy(&value, (r < 4 ? four : other) + r % 4 * ldw, bytes);
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

// Calls done.operator()<B>(sums, b, first, count) for runs of rows and of B blocks from b on: sums is (rows, B kLanes).
template <typename Done>
inline void by_tiles(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int blocks, int inner,
                     Done done) {
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
            // Whole squares are turned.
            const int whole = (count + W - 1) / W * W;
            std::fill(sums + count * B * kLanes, sums + whole * B * kLanes, 0);
            done.template operator()<B>(sums, b, first, count);
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

// out[16 b + lane][n] = sum_k x[b][lane][k] w[n][k] for all lanes of all blocks.
inline void gemm_packed(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int blocks, int inner,
                        int32_t* out, size_t ldo) {
    by_tiles(w, ldw, rows, x, block, blocks, inner, [&]<int B>(const int32_t* sums, int b, int first, int count) {
        alignas(64) int32_t square[W * W];
        for (int lane = 0; lane < B * kLanes; lane += W) {
            int32_t* to = out + (static_cast<size_t>(b) * kLanes + lane) * ldo + first;
            for (int n = 0; n < count; n += W) {
                const int32_t* from = sums + n * B * kLanes + lane;
                if (n + W <= count) {
                    transpose(from, B * kLanes, to + n, ldo);
                    continue;
                }
                transpose(from, B * kLanes, square, W);
                for (int i = 0; i < W; i++) i_store_n(to + i * ldo + n, i_load(square + i * W), count - n);
            }
        }
    });
}

// Calls row(i, sums) for the first `tokens` of W lanes, with the sums of W weight rows.
template <typename Row>
inline void by_lanes(const int32_t* sums, size_t ld, int tokens, Row row) {
    alignas(64) int32_t square[W * W];
    transpose(sums, ld, square, W);
    for (int i = 0; i < std::min(W, tokens); i++) row(i, i_load(square + i * W));
}

inline void packed_static(const int8_t* w, size_t ldw, int rows, PackedInput x, const int32_t* bias,
                          const float* deq_scale, Output out) {
    const int blocks = (x.tokens + kLanes - 1) / kLanes;
    by_tiles(w, ldw, rows, x.blocks, x.block, blocks, x.inputs,
             [=]<int B>(const int32_t* sums, int b, int first, int count) {
        for (int n = 0; n < count; n += W) {
            const int m = std::min(W, count - n), at = first + n;
            const I add = get(bias + at, m);
            const F scale = get(deq_scale + at, m);
            for (int lane = 0; lane < B * kLanes; lane += W) {
                const int t = b * kLanes + lane;
                const auto run = [=](auto n_of) {
                    by_lanes(sums + n * B * kLanes + lane, B * kLanes, x.tokens - t, [=](int i, I acc) {
                        put(out.y + (t + i) * out.ld + at, real_static(acc, add, scale), n_of(m), out.adds);
                    });
                };
                if (m == W) run([](int) { return W; });
                else run([](int some) { return some; });
            }
        }
    });
}

// Sums of high halves wait for those of the low ones, where a weight meets one block at a time.
inline void packed_16(const int8_t* w, size_t ldw, int rows, PackedInput x, Scales16 scales, const RowParams* params,
                      Output out) {
    const int blocks = 2 * ((x.tokens + kLanes - 1) / kLanes);
    constexpr int kKept = kMostBlocks == 1 ? kPackedRows * kLanes : 1;
    alignas(64) int32_t kept[kKept];
    const auto finish = [&](const int32_t* high, const int32_t* low, size_t ld, int t, int first, int count) {
        alignas(64) int32_t square[W * W];
        for (int n = 0; n < count; n += W) {
            const int m = std::min(W, count - n), at = first + n;
            const Lanes16 of(scales, at, m);
            for (int lane = 0; lane < kLanes; lane += W) {
                transpose(low + n * ld + lane, ld, square, W);
                by_lanes(high + n * ld + lane, ld, x.tokens - t - lane, [&](int i, I acc) {
                    const F v = of.real(acc, i_load(square + i * W), params[t + lane + i]);
                    put(out.y + (t + lane + i) * out.ld + at, v, m, out.adds);
                });
            }
        }
    };
    const auto run = [&](int b, int many, int first, int count, auto done) {
        by_tiles(w + first * ldw, ldw, count, x.blocks + b * x.block, x.block, many, x.inputs, done);
    };
    if constexpr (kMostBlocks > 1) {
        run(0, blocks, 0, rows, [&]<int B>(const int32_t* sums, int b, int first, int count) {
            for (int i = 0; i < B; i += 2) {
                finish(sums + i * kLanes, sums + (i + 1) * kLanes, B * kLanes, (b + i) / 2 * kLanes, first, count);
            }
        });
    } else {
        for (int b = 0; b < blocks; b += 2)
            for (int first = 0; first < rows; first += kPackedRows) {
                const int some = std::min(kPackedRows, rows - first);
                run(b, 1, first, some, [&]<int B>(const int32_t* sums, int, int, int count) {
                    std::copy_n(sums, (count + W - 1) / W * W * kLanes, kept);
                });
                run(b + 1, 1, first, some, [&]<int B>(const int32_t* sums, int, int, int count) {
                    finish(kept, sums, kLanes, b / 2 * kLanes, first, count);
                });
            }
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
