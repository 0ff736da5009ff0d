// Attention of a few query rows over a run of cached positions: softmax by pages, each with its own maximum.
//
//   S = q . k * q_scale          m_b = max of S over page b          or S = c tanh((q . k * q_scale - q_shift) / c)
//   int8     p = rne(255 exp(S - m_b))      int8x2   p = rne(65535 exp(S - m_b)), as two bytes      bf16   p = exp(S - m_b)
//   acc = sum_b e^(m_b - m) p . v           sum = sum_b e^(m_b - m) sum p
//
// Pages begin at multiples of kPage, and pages are taken in order, so a row's result depends on nothing but its own
// query and the cache. Online softmax over blocks: Dao et al. 2022, arXiv:2205.14135.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "rows.h"

namespace eightfold::EF_ISA {

constexpr int kQueryRows = W == 8 ? 2 : 3;  // rows whose scores share a load of keys
constexpr int kValueRows = W == 8 ? 2 : 4;  // rows whose sums share a load of values
constexpr int kValueCols = 4;
constexpr int kRun = W < 4 ? 4 : W;  // columns come in such runs: whole lanes, and whole groups of values

// Lines of the next page that are asked for in a step of each loop: of a page of 64 channels about a quarter while
// scores are computed, a quarter in the softmax, the rest with the values.
constexpr int kScoreLines = 6, kRowLines = 12, kWeighLines = 3;

// Asks for the next page while this one is computed, a few lines at a time: pages lie anywhere, so the machine cannot
// guess, and many lines at once would have to wait for each other.
struct Ahead {
    const uint8_t* at;
    const uint8_t* end;

    template <int kLines>
    void ask() {
        if (at >= end) return;
        for (int i = 0; i < kLines; i++) __builtin_prefetch(at + 64 * i);
        at += 64 * kLines;
    }
};

// The same for a page that is hardly begun: what is needed lies scattered, at the beginnings of `rows` rows of kPage
// positions, and then `value_bytes` from the values' beginning on.
struct AheadInRows {
    const uint8_t* at;
    int rows, columns;
    const uint8_t* values;
    size_t value_bytes;

    void ask(int most) {
        for (; rows > 0 && most > 0; rows--, most--, at += kPage * 4)
            for (int i = 0; i < columns * 4; i += 64) __builtin_prefetch(at + i);
    }
    void ask_values() const {
        for (size_t i = 0; i < value_bytes; i += 64) __builtin_prefetch(values + i);
    }
};

struct Visible {
    int begin, end;  // inside the page
};

inline Visible visible(const AttnRows& in, int row, int first) {
    const int last = in.last[row];
    const int begin = in.window > 0 ? std::max(0, last - in.window + 1 - first) : 0;
    return {std::min(begin, kPage), std::clamp(last + 1 - first, 0, std::min(kPage, in.end - first))};
}

// Calls f.operator()<NC>(at) for runs of NC * W columns, kAttnCols or a smaller power of two at a time.
template <typename Step>
inline void by_columns(int columns, Step f) {
    int at = 0;
    for (; at + kAttnCols * W <= columns; at += kAttnCols * W) f.template operator()<kAttnCols>(at);
    if constexpr (kAttnCols >= 8) {
        if (at + 4 * W <= columns) f.template operator()<4>(at), at += 4 * W;
    }
    if constexpr (kAttnCols >= 4) {
        if (at + 2 * W <= columns) f.template operator()<2>(at), at += 2 * W;
    }
    if (at < columns) f.template operator()<1>(at);
}

// Scores of NR rows of int8 queries: sums of (k + zero) q.
template <int NR>
inline void score_i8(const uint8_t* keys, const int8_t* q, size_t ldq, int groups, int columns, Ahead& ahead,
                     int32_t* out) {
    by_columns(columns, [&]<int NC>(int at) {
        I acc[NR][NC];
        for (int r = 0; r < NR; r++)
            for (int c = 0; c < NC; c++) acc[r][c] = i_set(0);
        for (int d = 0; d < groups; d++) {
            ahead.ask<kScoreLines>();
            const uint8_t* line = keys + (d * kPage + at) * 4;
            I qr[NR];
            for (int r = 0; r < NR; r++) {
                int32_t four;
                std::memcpy(&four, q + r * ldq + d * 4, 4);
                qr[r] = i_set(four);
            }
#pragma GCC unroll 8
            for (int c = 0; c < NC; c++) {
                const I k = i_load(line + c * W * 4);
                for (int r = 0; r < NR; r++) acc[r][c] = dot4(acc[r][c], k, qr[r]);
            }
        }
        for (int r = 0; r < NR; r++)
            for (int c = 0; c < NC; c++) i_store(out + r * kPage + at + c * W, acc[r][c]);
    });
}

// Scores of NR rows of float queries over bfloat16 keys.
template <int NR>
inline void score_bf16(const uint8_t* keys, const float* q, size_t ldq, int groups, int columns, float* out) {
    by_columns(columns, [&]<int NC>(int at) {
        F acc[NR][NC];
        for (int r = 0; r < NR; r++)
            for (int c = 0; c < NC; c++) acc[r][c] = f_set(0.0f);
        for (int d = 0; d < groups; d++) {
            const uint8_t* line = keys + (d * kPage + at) * 4;
#pragma GCC unroll 8
            for (int c = 0; c < NC; c++) {
                const I k = i_load(line + c * W * 4);
                for (int r = 0; r < NR; r++) {
                    acc[r][c] = f_acc(acc[r][c], low_bf16(k), f_set(q[r * ldq + 2 * d]));
                    acc[r][c] = f_acc(acc[r][c], high_bf16(k), f_set(q[r * ldq + 2 * d + 1]));
                }
            }
        }
        for (int r = 0; r < NR; r++)
            for (int c = 0; c < NC; c++) f_store(out + r * kPage + at + c * W, acc[r][c]);
    });
}

// out[r][d] = sum over positions of p v; p: (NR, kPage) unsigned bytes. Where the instruction takes signed ones alone,
// p v = (p - 128) v - (-128 v): p - 128 is p with the other sign bit, and the second product is the same for all rows.
template <int NR>
inline void weigh_i8(const uint8_t* values, const uint8_t* p, int groups, int value_dim, Ahead& ahead, int32_t* out) {
    constexpr int32_t kFlip = kFlips ? static_cast<int32_t>(0x80808080u) : 0;
    for (int at = 0; at < value_dim; at += kValueCols * W) {
        const int cols = std::min(kValueCols, (value_dim - at) / W);
        const auto run = [&]<int NC>() {
            I acc[NR][NC], flipped[NC];
            for (int r = 0; r < NR; r++)
                for (int c = 0; c < NC; c++) acc[r][c] = i_set(0);
            for (int c = 0; c < NC; c++) flipped[c] = i_set(0);
            for (int g = 0; g < groups; g++) {
                ahead.ask<kWeighLines>();
                const uint8_t* line = values + (g * value_dim + at) * 4;
                I v[NC];
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) {
                    v[c] = i_load(line + c * W * 4);
                    if constexpr (kFlips) flipped[c] = dot4(flipped[c], i_set(kFlip), v[c]);
                }
                for (int r = 0; r < NR; r++) {
                    int32_t four;
                    std::memcpy(&four, p + r * kPage + g * 4, 4);
                    const I pr = i_set(four ^ kFlip);
#pragma GCC unroll 4
                    for (int c = 0; c < NC; c++) acc[r][c] = dot4_unsigned(acc[r][c], pr, v[c]);
                }
            }
            for (int r = 0; r < NR; r++)
                for (int c = 0; c < NC; c++) i_store(out + r * value_dim + at + c * W, i_sub(acc[r][c], flipped[c]));
        };
        switch (cols) {
            case 1: run.template operator()<1>(); break;
            case 2: run.template operator()<2>(); break;
            case 3: run.template operator()<3>(); break;
            default: run.template operator()<4>(); break;
        }
    }
}

template <int NR>
inline void weigh_bf16(const uint8_t* values, const float* p, int positions, int value_dim, float* out) {
    const int groups = positions / 2;
    for (int at = 0; at < value_dim; at += W) {
        F acc[NR];
        for (int r = 0; r < NR; r++) acc[r] = f_set(0.0f);
        for (int g = 0; g < groups; g++) {
            const I v = i_load(values + (g * value_dim + at) * 4);
            for (int r = 0; r < NR; r++) {
                acc[r] = f_acc(acc[r], low_bf16(v), f_set(p[r * kPage + 2 * g]));
                acc[r] = f_acc(acc[r], high_bf16(v), f_set(p[r * kPage + 2 * g + 1]));
            }
        }
        if (positions % 2 != 0) {
            const I v = i_load(values + (groups * value_dim + at) * 4);
            for (int r = 0; r < NR; r++) acc[r] = f_acc(acc[r], low_bf16(v), f_set(p[r * kPage + 2 * groups]));
        }
        for (int r = 0; r < NR; r++) f_store(out + r * value_dim + at, acc[r]);
    }
}

// Calls f.operator()<NR>(row) for all rows, kMax or fewer at a time.
template <int kMax, typename Step>
inline void by_rows(int rows, Step f) {
    for (int r = 0; r < rows;) {
        const int n = std::min(kMax, rows - r);
        if (n == 1) f.template operator()<1>(r);
        if constexpr (kMax >= 2)
            if (n == 2) f.template operator()<2>(r);
        if constexpr (kMax >= 3)
            if (n == 3) f.template operator()<3>(r);
        if constexpr (kMax >= 4)
            if (n == 4) f.template operator()<4>(r);
        r += n;
    }
}

// kLevels exp(s - max) over what is visible, zero elsewhere, in place; returns max, or minus infinity if nothing is
// visible.
template <int kLevels>
inline float exponentials(float* s, Visible see, int columns) {
    if (see.begin >= see.end) {
        std::fill(s, s + columns, 0.0f);
        return -std::numeric_limits<float>::infinity();
    }
    F top = f_set(s[see.begin]);
    int i = see.begin;
    for (; i + W <= see.end; i += W) top = f_max(top, f_load(s + i));
    float max = f_hmax(top);
    for (; i < see.end; i++) max = std::max(max, s[i]);
    const F shift = f_set(max), most = f_set(0.0f);  // what is not visible may be anything
    for (i = 0; i < columns; i += W) {
        f_store(s + i, exp_levels<kLevels>(f_min(f_sub(f_load(s + i), shift), most)));
    }
    std::fill(s, s + see.begin, 0.0f);
    std::fill(s + see.end, s + columns, 0.0f);
    return max;
}

struct Page {
    alignas(64) int32_t scores[2 * kMaxAttnRows * kPage];  // integers, then floats in the same place
    alignas(64) float real[kMaxAttnRows * kPage];
    alignas(64) uint8_t high[kMaxAttnRows * kPage];
    alignas(64) uint8_t low[kMaxAttnRows * kPage];
    float max[kMaxAttnRows];
    float sum[kMaxAttnRows];
};

inline void score_page(const AttnRows& in, const uint8_t* keys, int columns, Ahead& ahead, Page& page) {
    const int dq = (in.head_dim + 3) / 4 * 4;
    if (in.kind == CacheKind::bf16) {
        by_rows<kQueryRows>(in.rows, [&]<int NR>(int r) {
            score_bf16<NR>(keys, in.qf + r * dq, dq, in.head_dim / 2, columns, page.real + r * kPage);
        });
        return;
    }
    const int planes = in.kind == CacheKind::int8x2 ? 2 : 1;
    by_rows<kQueryRows>(in.rows * planes, [&]<int NR>(int r) {
        score_i8<NR>(keys, in.q8 + r * dq, dq, dq / 4, columns, ahead, page.scores + r * kPage);
    });
}

// Scores of a row as they are compared.
inline void soften_scores(const AttnRows& in, int r, int columns, Page& page) {
    float* s = page.real + r * kPage;
    if (in.kind == CacheKind::int8x2) {
        const F shift = f_set(in.q_shift[r]);
        for (int i = 0; i < columns; i += W) f_store(s + i, f_sub(f_load(s + i), shift));
    }
    soften(s, columns, in.softcap);
}

// Integer products of a row to scores.
inline void finish_scores(const AttnRows& in, int r, int columns, Page& page) {
    const int planes = in.kind == CacheKind::int8x2 ? 2 : 1;
    const int32_t* s = page.scores + r * planes * kPage;
    const I shift = i_set(kZero * in.q_sum[r * planes]);
    const F scale = f_set(in.q_scale[r]);
    for (int i = 0; i < columns; i += W) {
        F v = to_f(i_sub(i_load(s + i), shift));
        if (planes == 2) {
            const I shift_low = i_set(kZero * in.q_sum[r * 2 + 1]);
            v = f_fma(v, f_set(256.0f), to_f(i_sub(i_load(s + kPage + i), shift_low)));
        }
        f_store(page.real + r * kPage + i, f_mul(v, scale));
    }
}

// The same for a row that sees the whole page, int8: its scores stay in registers.
inline void normalize_whole(const AttnRows& in, int r, Page& page) {
    constexpr int N = kPage / W;
    const int32_t* scores = page.scores + r * kPage;
    const I shift = i_set(kZero * in.q_sum[r]);
    const F scale = f_set(in.q_scale[r]);
    F s[N];
    for (int i = 0; i < N; i++) s[i] = f_mul(to_f(i_sub(i_load(scores + i * W), shift)), scale);
    F top = s[0];
    for (int i = 1; i < N; i++) top = f_max(top, s[i]);
    page.max[r] = f_hmax(top);
    const F most = f_set(page.max[r]);
    I sum = i_set(0);
    for (int i = 0; i < N; i++) {
        const I q = to_i(exp_levels<255>(f_sub(s[i], most)));
        sum = i_add(sum, q);
        store_low_bytes(page.high + r * kPage + i * W, q, W);
    }
    page.sum[r] = static_cast<float>(i_hsum(sum));
}

// Softmax numerators of a page, quantized as the cache's kind has it, and their sums.
inline void normalize_page(const AttnRows& in, int first, int columns, Ahead& ahead, Page& page) {
    const bool softens = in.softcap > 0;
    for (int r = 0; r < in.rows; r++) {
        ahead.ask<kRowLines>();
        const Visible see = visible(in, r, first);
        if (in.kind == CacheKind::int8 && !softens && see.begin == 0 && see.end == kPage) {
            normalize_whole(in, r, page);
            ahead.ask<kRowLines>();
            continue;
        }
        if (in.kind != CacheKind::bf16) finish_scores(in, r, columns, page);
        if (softens) soften_scores(in, r, columns, page);
        float* s = page.real + r * kPage;
        if (in.kind == CacheKind::bf16) {
            page.max[r] = exponentials<1>(s, see, columns);
            F sum = f_set(0.0f);
            for (int i = 0; i < columns; i += W) sum = f_add(sum, f_load(s + i));
            page.sum[r] = f_hsum(sum);
            continue;
        }
        const bool wide = in.kind == CacheKind::int8x2;
        page.max[r] = wide ? exponentials<65535>(s, see, columns) : exponentials<255>(s, see, columns);
        ahead.ask<kRowLines>();
        const I mask = i_set(255);
        I sum = i_set(0);
        for (int i = 0; i < columns; i += W) {
            const I q = to_i(f_load(s + i));
            sum = i_add(sum, q);
            store_low_bytes(page.high + r * kPage + i, wide ? i_sra8(q) : q, W);
            if (wide) store_low_bytes(page.low + r * kPage + i, i_and(q, mask), W);
        }
        page.sum[r] = static_cast<float>(i_hsum(sum));
    }
}

// Adds what a page contributes: state = state e^(old - max) + page e^(page max - max).
inline void accumulate(AttnState out, int r, float page_max, float page_sum, const float* page_acc, int value_dim) {
    if (page_max == -std::numeric_limits<float>::infinity()) return;
    const float max = std::max(out.max[r], page_max);
    const float smaller = std::exp(std::min(out.max[r], page_max) - max);  // the other is one
    const float old_weight = page_max > out.max[r] ? smaller : 1.0f,
                new_weight = page_max > out.max[r] ? 1.0f : smaller;
    const F a = f_set(old_weight), b = f_set(new_weight);
    float* acc = out.acc + r * value_dim;
    for (int i = 0; i < value_dim; i += W) {
        f_store(acc + i, f_fma(f_load(acc + i), a, f_mul(f_load(page_acc + i), b)));
    }
    out.sum[r] = out.sum[r] * old_weight + page_sum * new_weight;
    out.max[r] = max;
}

// Positions from `end` on hold what an earlier owner of the page left: their weight is zero, and where a zero would not
// cancel them (bfloat16 has NaN) they are not read.
inline void weigh_page(const AttnRows& in, const uint8_t* values, int columns, int end, Ahead& ahead, Page& page,
                       AttnState out) {
    const int value_dim = (in.head_dim + 15) / 16 * 16;
    alignas(64) int32_t product[2][kValueRows * 512];
    alignas(64) float real[kValueRows * 512];
    by_rows<kValueRows>(in.rows, [&]<int NR>(int r) {
        if (in.kind == CacheKind::bf16) {
            weigh_bf16<NR>(values, page.real + r * kPage, end, value_dim, real);
        } else {
            const bool wide = in.kind == CacheKind::int8x2;
            const int groups = columns / 4;
            weigh_i8<NR>(values, page.high + r * kPage, groups, value_dim, ahead, product[0]);
            if (wide) weigh_i8<NR>(values, page.low + r * kPage, groups, value_dim, ahead, product[1]);
            for (int i = 0; i < NR * value_dim; i += W) {
                F v = to_f(i_load(product[0] + i));
                if (wide) v = f_fma(v, f_set(256.0f), to_f(i_load(product[1] + i)));
                f_store(real + i, v);
            }
        }
        for (int i = 0; i < NR; i++) {
            accumulate(out, r + i, page.max[r + i], page.sum[r + i], real + i * value_dim, value_dim);
        }
    });
}

inline void attend(const AttnRows& in, AttnState out) {
    const int value_dim = (in.head_dim + 15) / 16 * 16;
    std::fill(out.max, out.max + in.rows, -std::numeric_limits<float>::infinity());
    std::fill(out.sum, out.sum + in.rows, 0.0f);
    std::fill(out.acc, out.acc + in.rows * value_dim, 0.0f);
    const size_t element = in.kind == CacheKind::bf16 ? 2 : 1;
    const size_t key_bytes = (in.head_dim + 3) / 4 * 4 * kPage * element, value_row = value_dim * element;
    Page page;
    for (int first = in.first; first < in.end; first += kPage) {
        int end = 0;
        for (int r = 0; r < in.rows; r++) {
            const Visible see = visible(in, r, first);
            if (see.begin < see.end) end = std::max(end, see.end);
        }
        if (end == 0) continue;
        const int columns = (end + kRun - 1) / kRun * kRun;
        const bool is_last = first + kPage >= in.ahead;
        const uint8_t* next = is_last ? in.after : in.keys[first / kPage + 1];
        const int few = is_last ? in.after_columns : std::min(kPage, in.ahead - first - kPage);
        const bool whole = next != nullptr && few > kPage / 2;
        Ahead ahead{next, whole ? next + key_bytes + kPage * value_row : next};
        AheadInRows in_rows{};
        if (next != nullptr && !whole) {
            in_rows = {next, static_cast<int>(key_bytes / (kPage * 4)), few, next + key_bytes, few * value_row};
        }
        in_rows.ask(in_rows.rows / 2);
        score_page(in, in.keys[first / kPage], columns, ahead, page);
        in_rows.ask(in_rows.rows);
        normalize_page(in, first, columns, ahead, page);
        in_rows.ask_values();
        weigh_page(in, in.values[first / kPage], columns, end, ahead, page, out);
        while (ahead.at < ahead.end) ahead.ask<8>();
    }
}

inline void merge(AttnState into, AttnState from, int rows, int value_dim) {
    for (int r = 0; r < rows; r++) {
        accumulate(into, r, from.max[r], from.sum[r], from.acc + r * value_dim, value_dim);
    }
}

}  // namespace eightfold::EF_ISA
