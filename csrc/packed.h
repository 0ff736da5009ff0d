// Matrix products of many tokens: lanes are tokens, so a product ends without sums across lanes. Activations are packed
// in blocks of kLanes tokens, [K / 4][kLanes][4] bytes; four bytes of a weight row meet all tokens of a block at once,
// and weights are read as they lie in the file.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "rows.h"
#if defined(EF_DOTPROD) && EF_DOTPROD > 0
#include "tile_neon.h"
#define EF_OWN_TILE
#endif

namespace eightfold::EF_ISA {

static_assert(kLanes % W == 0);
constexpr int kVectors = kLanes / W;  // of a block, for four bytes of K
constexpr int kMostBlocks = W == 16 ? 4 : 1;  // that a weight meets at once
constexpr int kPackedRows = 16;  // weight rows whose sums wait in the first cache to be finished
static_assert(kPackedRows % W == 0);

inline int blocks_of(int tokens) { return (tokens + kLanes - 1) / kLanes; }

// Weight rows that meet so many blocks in registers.
template <int B>
constexpr int kRowsFor = W == 16 && B <= 2 ? 8 : 4;

#ifndef EF_OWN_TILE
constexpr int kWhole = 4;  // bytes of K that are taken at a time

// sums[r][lane] = sum_k x[lane][k] w[r][k] of R rows and B blocks, whole fours of K. A function of its own: its loop needs
// all registers.
template <int R, int B>
[[gnu::noinline]] void tile_packed(const int8_t* w, size_t ldw, const uint8_t* x, size_t block, int inner,
                                   int32_t* sums) {
    constexpr int V = B * kVectors;
    const int ahead = std::min(2048, inner);
    const ptrdiff_t wraps = static_cast<ptrdiff_t>(R * ldw) - inner;
    I acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) acc[r][v] = i_set(0);
    const auto step = [&](const int8_t* four, const uint8_t* lanes) __attribute__((always_inline)) {
        I xs[V];
        const int8_t* other = four + 4 * ldw;  // addresses of four rows each need no more than two registers
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) xs[v] = i_load(lanes + v / kVectors * block + v % kVectors * (4 * W));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {  // one row's weights at a time, so that all sums stay in registers
            int32_t value;
            std::memcpy(&value, (r < 4 ? four : other) + r % 4 * ldw, sizeof value);
            const I weights = i_set(value);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[r][v] = dot4(acc[r][v], xs[v], weights);
        }
    };
    const int whole = inner / 4 * 4;
    for (int k = 0; k < whole;) {
        const int8_t* later = w + k + ahead + (k + ahead < inner ? 0 : wraps);
        for (int r = 0; r < R; r++) __builtin_prefetch(later + r * ldw);
        for (const int end = std::min(whole, k + 64); k < end; k += 4) step(w + k, x + static_cast<size_t>(k) * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) i_store(sums + r * B * kLanes + v * W, acc[r][v]);
}

#endif

// What the last of K add, fewer than kWhole.
template <int B>
inline void add_rest(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int inner, int32_t* sums) {
    for (int k = inner / kWhole * kWhole; k < inner; k += 4)
        for (int r = 0; r < rows; r++) {
            int32_t value = 0;
            std::memcpy(&value, w + r * ldw + k, std::min(4, inner - k));
            for (int lane = 0; lane < B * kLanes; lane += W) {
                const I xs = i_load(x + lane / kLanes * block + static_cast<size_t>(k) * kLanes + lane % kLanes * 4);
                int32_t* sum = sums + r * B * kLanes + lane;
                i_store(sum, dot4(i_load(sum), xs, i_set(value)));
            }
        }
}

// Sums of up to kPackedRows rows, (rows, B kLanes); whole squares are turned, so rows that are missing there are zero.
template <int B>
inline void product(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int inner, int32_t* sums) {
    constexpr int R = kRowsFor<B>;
    int n = 0;
    for (; n + R <= rows; n += R) tile_packed<R, B>(w + n * ldw, ldw, x, block, inner, sums + n * B * kLanes);
    for (; n < rows; n++) tile_packed<1, B>(w + n * ldw, ldw, x, block, inner, sums + n * B * kLanes);
    if (inner % kWhole != 0) add_rest<B>(w, ldw, rows, x, block, inner, sums);
    std::fill(sums + rows * B * kLanes, sums + (rows + W - 1) / W * W * B * kLanes, 0);
}

// Calls run.operator()<B>(b) for runs of B blocks from b on, of at most so many.
template <int kMost, typename Run>
inline void by_blocks(int blocks, Run run) {
    for (int b = 0; b < blocks;) {
        const int count = std::min(kMost, blocks - b);
        if (count == 1) run.template operator()<1>(b);
        if constexpr (kMost >= 2)
            if (count == 2) run.template operator()<2>(b);
        if constexpr (kMost >= 4) {
            if (count == 3) run.template operator()<3>(b);
            if (count == 4) run.template operator()<4>(b);
        }
        b += count;
    }
}

// Calls step(first, count) for runs of rows whose sums are kept at a time.
template <typename Step>
inline void by_packed_rows(int rows, Step step) {
    for (int first = 0; first < rows; first += kPackedRows) step(first, std::min(kPackedRows, rows - first));
}

// Calls done.operator()<B>(sums, b, first, count) for runs of rows and of B blocks from b on: sums is (rows, B kLanes).
template <typename Done>
inline void by_tiles(const int8_t* w, size_t ldw, int rows, PackedInput x, Done done) {
    alignas(64) int32_t sums[kPackedRows * kMostBlocks * kLanes];
    by_blocks<kMostBlocks>(blocks_of(x.tokens), [&]<int B>(int b) {
        by_packed_rows(rows, [&](int first, int count) {
            product<B>(w + first * ldw, ldw, count, x.blocks + b * x.block, x.block, x.inputs, sums);
            done.template operator()<B>(sums, b, first, count);
        });
    });
}

// out[16 b + lane][n] = sum_k x[b][lane][k] w[n][k] for all lanes of all blocks.
inline void gemm_packed(const int8_t* w, size_t ldw, int rows, const uint8_t* x, size_t block, int blocks, int inner,
                        int32_t* out, size_t ldo) {
    const PackedInput input{x, block, blocks * kLanes, inner};
    by_tiles(w, ldw, rows, input, [&]<int B>(const int32_t* sums, int b, int first, int count) {
        for (int lane = 0; lane < B * kLanes; lane += W) {
            int32_t* to = out + (static_cast<size_t>(b) * kLanes + lane) * ldo + first;
            for (int n = 0; n < count; n += W) {
                const int m = std::min(W, count - n);
                turn(sums + n * B * kLanes + lane, B * kLanes,
                     [=](int i, I acc) { i_store_n(to + i * ldo + n, acc, m); });
            }
        }
    });
}

// Calls row(i, lanes) for the first `tokens` rows of a turned square, of which `of` are there.
template <typename T, typename Row>
inline void turn_some(const T* square, size_t ld, int tokens, Row row) {
    if (tokens >= W) return turn(square, ld, row);
    turn(square, ld, [=](int i, I lanes) {
        if (i < tokens) row(i, lanes);
    });
}

inline void packed_static(StaticRows w, size_t ldw, int rows, PackedInput x, Output out) {
    by_tiles(w.weight, ldw, rows, x, [=]<int B>(const int32_t* sums, int b, int first, int count) {
        for (int n = 0; n < count; n += W) {
            const int m = std::min(W, count - n), at = first + n;
            const I add = get(w.bias + at, m);
            const F scale = get(w.deq_scale + at, m);
            for (int lane = 0; lane < B * kLanes; lane += W) {
                const int t = b * kLanes + lane;
                const auto run = [=](auto n_of) {
                    turn_some(sums + n * B * kLanes + lane, B * kLanes, x.tokens - t, [=](int i, I acc) {
                        put(out.y + (t + i) * out.ld + at, real_static(acc, add, scale), n_of(m), out.adds);
                    });
                };
                if (m == W) run([](int) { return W; });
                else run([](int some) { return some; });
            }
        }
    });
}

// Blocks of tokens whose halves of 16 bit are multiplied at once, and the sums of both.
constexpr int kMostPairs = std::max(1, kMostBlocks / 2);

template <int P>
struct Sums16 {
    static constexpr bool kTogether = kMostBlocks > 1;  // a weight meets both halves
    static constexpr size_t kRow = (kTogether ? 2 * P : 1) * kLanes, kLow = kTogether ? kLanes : kPackedRows * kLanes;
    alignas(64) int32_t sums[2 * P * kPackedRows * kLanes];

    Sums16(const int8_t* w, size_t ldw, int rows, PackedInput x, int b) {
        const uint8_t* blocks = x.blocks + 2 * b * x.block;
        if constexpr (kTogether) {
            product<2 * P>(w, ldw, rows, blocks, x.block, x.inputs, sums);
        } else {
            for (int i = 0; i < 2; i++) {
                product<1>(w, ldw, rows, blocks + i * x.block, x.block, x.inputs, sums + i * kLow);
            }
        }
    }
    const int32_t* high(int n, int lane) const { return sums + n * kRow + lane / kLanes * 2 * kLanes + lane % kLanes; }
    I low(int n, int lane) const { return i_load(high(n, lane) + kLow); }
};

// What is known of the tokens that are lanes of P blocks from b on.
template <int P>
struct Tokens16 {
    alignas(64) float scale[P * kLanes], minus_sum[P * kLanes];

    Tokens16(const RowParams* params, int b, int tokens) {
        for (int i = 0; i < P * kLanes; i++) {
            const int t = b * kLanes + i;
            scale[i] = t < tokens ? params[t].scale : 0.0f;
            minus_sum[i] = t < tokens ? static_cast<float>(-params[t].sum) : 0.0f;
        }
    }

    // Of weight row `at`, whose sums are those of row n.
    F real(const Sums16<P>& sums, int n, int lane, Scales16 of, int at) const {
        const I correction = i_mul(i_set(kZero), i_set(of.weight_sum[at]));
        F v = f_fma(to_f(i_sub(i_load(sums.high(n, lane)), correction)), f_set(256.0f), to_f(sums.low(n, lane)));
        if (of.offset != nullptr) v = f_fma(f_load(minus_sum + lane), f_set(of.offset[at]), v);
        v = f_mul(f_mul(v, f_load(scale + lane)), f_set(of.scale[at]));
        return of.bias != nullptr ? f_add(v, f_set(of.bias[at])) : v;
    }
};

// Turns the reals that value(n, lane) gives of `count` weight rows from `first` on and of P blocks from b on.
template <int P, typename Value>
inline void put_turned(int b, int tokens, int first, int count, Output out, Value value) {
    alignas(64) float square[W * W] = {};
    for (int n = 0; n < count; n += W) {
        const int m = std::min(W, count - n);
        for (int lane = 0; lane < P * kLanes; lane += W) {
            const int t = b * kLanes + lane;
            for (int i = 0; i < m; i++) f_store(square + i * W, value(n + i, lane));
            turn_some(square, W, tokens - t,
                      [=](int i, I bits) { put(out.y + (t + i) * out.ld + first + n, as_f(bits), m, out.adds); });
        }
    }
}

inline void packed_16(Rows16 w, size_t ldw, int rows, PackedInput x, const RowParams* params, Output out) {
    by_blocks<kMostPairs>(blocks_of(x.tokens), [&]<int P>(int b) {
        const Tokens16<P> tokens(params, b, x.tokens);
        by_packed_rows(rows, [&](int first, int count) {
            const Sums16<P> sums(w.weight + first * ldw, ldw, count, x, b);
            put_turned<P>(b, x.tokens, first, count, out,
                          [&](int n, int lane) { return tokens.real(sums, n, lane, w.scales, first + n); });
        });
    });
}

// Values are quantized where tokens are lanes, and stay there. Four bytes are a sum, and `zero` is added to all at once.
template <Activation kActivation>
inline void gated_static_by(StaticRows gate, StaticRows up, size_t ldw, int rows, PackedInput x, PackedOutput out) {
    const F inverse = f_set(out.inv_scale), offset = f_set(out.offset);
    alignas(64) int32_t sums[2][kPackedRows * kMostBlocks * kLanes];
    by_blocks<kMostBlocks>(blocks_of(x.tokens), [&]<int B>(int b) {
        const uint8_t* blocks = x.blocks + b * x.block;
        by_packed_rows(rows, [&](int first, int count) {
            product<B>(gate.weight + first * ldw, ldw, count, blocks, x.block, x.inputs, sums[0]);
            product<B>(up.weight + first * ldw, ldw, count, blocks, x.block, x.inputs, sums[1]);
            const auto real = [&](const StaticRows& of, const int32_t* acc, int n, int lane) {
                return real_static(i_load(acc + n * B * kLanes + lane), i_set(of.bias[first + n]),
                                   f_set(of.deq_scale[first + n]));
            };
            const auto value = [&](int n, int lane) {
                const F gated = gate_times<kActivation>(real(gate, sums[0], n, lane), real(up, sums[1], n, lane));
                return to_int8(f_mul(gated, inverse), offset);
            };
            for (int n = 0; n < count; n += 4)
                for (int lane = 0; lane < B * kLanes; lane += W) {
                    I four = i_set(kZero == 0 ? 0 : static_cast<int32_t>(0x80808080u));
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        if (n + i >= count) continue;
                        const I q = value(n + i, lane);
                        four = i_add(four, i_shift(kZero == 0 ? i_and(q, i_set(255)) : q, 8 * i));
                    }
                    uint8_t* to = out.blocks + (b + lane / kLanes) * out.block + (first + n) * kLanes;
                    i_store(reinterpret_cast<int32_t*>(to) + lane % kLanes, four);
                }
        });
    });
}

inline void gated_static(Activation activation, StaticRows gate, StaticRows up, size_t ldw, int rows, PackedInput x,
                         PackedOutput out) {
    by_activation(activation,
                  [=]<Activation kActivation>() { gated_static_by<kActivation>(gate, up, ldw, rows, x, out); });
}

template <Activation kActivation>
inline void gated_16_by(Rows16 gate, Rows16 up, size_t ldw, int rows, PackedInput x, const RowParams* params,
                        Output out) {
    by_blocks<kMostPairs>(blocks_of(x.tokens), [&]<int P>(int b) {
        const Tokens16<P> tokens(params, b, x.tokens);
        by_packed_rows(rows, [&](int first, int count) {
            const Sums16<P> gates(gate.weight + first * ldw, ldw, count, x, b);
            const Sums16<P> ups(up.weight + first * ldw, ldw, count, x, b);
            put_turned<P>(b, x.tokens, first, count, out, [&](int n, int lane) {
                return gate_times<kActivation>(tokens.real(gates, n, lane, gate.scales, first + n),
                                               tokens.real(ups, n, lane, up.scales, first + n));
            });
        });
    });
}

inline void gated_16(Activation activation, Rows16 gate, Rows16 up, size_t ldw, int rows, PackedInput x,
                     const RowParams* params, Output out) {
    by_activation(activation,
                  [=]<Activation kActivation>() { gated_16_by<kActivation>(gate, up, ldw, rows, x, params, out); });
}

// A block from kLanes rows of ld bytes, a multiple of kAlign.
inline void pack(const uint8_t* rows, size_t ld, uint8_t* block) {
    const auto* from = reinterpret_cast<const int32_t*>(rows);
    auto* to = reinterpret_cast<int32_t*>(block);
    for (size_t k = 0; k < ld / 4; k += W)
        for (int lane = 0; lane < kLanes; lane += W) {
            int32_t* at = to + k * kLanes + lane;
            turn(from + lane * ld / 4 + k, ld / 4, [=](int i, I lanes) { i_store(at + i * kLanes, lanes); });
        }
}

}  // namespace eightfold::EF_ISA
