// Linears of every scheme, and groups of them that read the same input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace eightfold {

enum class LinearKind : int { none, floating, w8a8, dynamic, mix, w8a16 };

struct Linear {
    LinearKind kind = LinearKind::none;
    int outputs = 0, inputs = 0;  // N, K
    const void* weight = nullptr; // (N, K), as it lies in the file
    DType dtype = DType::f32;     // of floating weights
    int ordinal = 0;              // among all weights of a model, as they were added
    std::vector<float> scale;     // (N), weight_scale
    std::vector<float> offset;    // (N), weight_offset; empty: zero
    std::vector<float> bias;      // (N) or empty
    std::vector<float> deq_scale; // (N)
    std::vector<int32_t> quant_bias;  // (N), less 128 times the weight sums
    std::vector<int32_t> weight_sum;  // (N)
    float inv_input_scale = 0, input_offset = 0;
    bool keeps_sums = false;      // a share of the inputs: products come out as int32, to be summed with the others'

    bool is_static() const { return kind == LinearKind::w8a8 || kind == LinearKind::mix; }
    bool reads_static(bool is_generated) const {
        return kind == LinearKind::w8a8 || (kind == LinearKind::mix && is_generated);
    }
    size_t weight_bytes() const;

    // int32 products of some rows in the place of reals, less what offsets of activations have added to them.
    void keep_sums(const int32_t* acc, int n0, int count, bool is_static, int32_t offset, float* out) const;

    // Weight rows from n on, and what finishes their sums.
    StaticRows static_rows(int n) const;
    Rows16 rows_16(int n) const;

    // What an int8 kernel needs beside the file: sums of weight rows [begin, end). False: a floating weight of these
    // rows is not finite.
    bool prepare(const Kernels& kernels, int begin, int end);
    const float* bias_at(int n) const { return bias.empty() ? nullptr : bias.data() + n; }
};

// How an input is written down for one or several linears.
struct Form {
    LinearKind kind = LinearKind::none;
    float inv_scale = 0, offset = 0;
    bool operator==(const Form&) const = default;
};

// Rows of one input in one form.
struct Prepared {
    Lines<uint8_t> bytes;          // (T, planes, ld), or of many tokens (T / kLanes, planes) packed blocks
    Lines<float> real;             // (T, inputs), floating only
    std::vector<RowParams> params; // (T)
    void reserve(int tokens, int width, bool is_real);  // memory only grows
};

// Bytes of a quantized row in memory, and how many rows a token takes.
inline size_t row_bytes(int width) { return (static_cast<size_t>(width) + kAlign - 1) / kAlign * kAlign; }
inline int planes(LinearKind kind) { return kind == LinearKind::w8a16 ? 2 : 1; }

// How many weight rows meet how many tokens at a time: the products of both stay in the second cache. Of a few tokens the
// weights come from memory, which is read best in long runs.
constexpr int kManyRows = 64, kTokenBlock = 64;
constexpr int kFewTokens = 8;
constexpr int kProducts = 4096;
static_assert(kManyRows * kTokenBlock <= kProducts && kProducts % (4 * kFewTokens) == 0);

// A token whose value may turn out to be the largest.
struct Candidate {
    float upper;
    int32_t index;
};

// What one thread needs for products.
struct Scratch {
    Lines<int32_t> sums = Lines<int32_t>(2 * kProducts);
    Lines<float> first = Lines<float>(kProducts);
    Lines<float> second = Lines<float>(kProducts);
    Lines<float> row;                // one input row, before it is quantized
    std::vector<uint8_t> wide;       // a quantized row and what it is not to be quantized without
    Lines<uint8_t> rows;             // quantized rows of a block, before they are packed
    std::vector<Prepared> prepared;  // a few rows, prepared by this thread alone
    uint64_t prepared_for = 0;
    Lines<int8_t> q8;                // query rows of an attention unit, one below the other
    std::vector<int32_t> q_sum, last;
    Lines<float> qf, q_scale, states;
    std::vector<const uint8_t*> keys, values;
    uint64_t choices_for = 0;                        // the step of the following
    Lines<float> floors, upper;                      // (R): the likeliest of a row is at least that
    std::vector<std::vector<Candidate>> candidates;  // (R)
    std::vector<int32_t> indices;
};

struct Chunk {  // rows of one linear; of a paired group, of the first and the second at once
    int linear, begin, count;
};

// Whether so many tokens are prepared in packed blocks.
inline bool is_packed(int tokens) { return tokens > kFewTokens; }

inline int chunk_count(int rows, int of) { return (rows + of - 1) / of; }

// Rows of the pieces of a chunk that products are made of: of a few tokens, as few pieces as the scratch memory allows,
// of about equal size.
inline int rows_of_piece(const Chunk& chunk, int tokens) {
    if (tokens > kFewTokens) return kManyRows;
    const int pieces = chunk_count(chunk.count, kProducts / tokens / 4 * 4);
    return chunk_count(chunk_count(chunk.count, pieces), 4) * 4;
}

// Calls f(first row, rows) for them.
template <typename Step>
void by_rows(const Chunk& chunk, int tokens, Step f) {
    const int end = chunk.begin + chunk.count, step = rows_of_piece(chunk, tokens);
    for (int n = chunk.begin; n < end; n += step) f(n, std::min(step, end - n));
}

struct Group {
    std::vector<Linear> linears;
    std::vector<Form> forms;     // the different ones
    std::vector<int> form_of;    // of each linear
    const float* gain = nullptr; // of the norm before it; null: there is none
    const float* norm_bias = nullptr;
    float eps = 0;
    bool wants_norm = false;     // of 16-bit inputs
    bool is_paired = false;      // chunks are of two linears at once
    std::vector<Chunk> few, many;  // how the work is cut for a few tokens and for many

    void find_forms();
    void cut(int threads, bool paired);
    int inputs() const { return linears.front().inputs; }
    int outputs() const;
    bool has_floating() const;

    const std::vector<Chunk>& chunks(int tokens) const { return tokens <= kFewTokens ? few : many; }

    // Asks for the first weights of a chunk, if there are so many: a thread is likely to read those of its own number
    // first. Of many tokens each row takes long enough.
    void prefetch(int tokens, int chunk) const;

    // Writes row t of the input in every form; x (K) is read only. `symmetric`: how a token is quantized. `packed`:
    // quantized rows go to the scratch memory first, until pack() is called for their block.
    void prepare(const Kernels& kernels, const float* x, int t, bool is_generated, bool symmetric, bool packed,
                 std::vector<Prepared>& prepared, Scratch& scratch) const;
    void pack(const Kernels& kernels, int block, std::vector<Prepared>& prepared, const Scratch& scratch) const;

    // silu_mul of both linears for packed tokens [t0, t1), rows n0 on, where gates(): a part of the input of `next`, in
    // packed blocks, or rows of ldy floats if there is no `next`.
    bool gates(const Group* next) const;
    void gate(const Kernels& kernels, int n0, int count, int t0, int t1, const std::vector<Prepared>& prepared,
              const Group& next, Prepared& handed) const;
    void gate(const Kernels& kernels, int n0, int count, int t0, int t1, const std::vector<Prepared>& prepared,
              float* y, size_t ldy) const;

    // y[t - t0][0 .. count) of one linear, rows n0 on, tokens [t0, t1); ldy: floats from row to row. `packed`: how the
    // input was prepared; then t0 is the first of a block. `adds`: to what y holds.
    void multiply(const Kernels& kernels, int linear, int n0, int count, int t0, int t1, const uint8_t* generated,
                  const std::vector<Prepared>& prepared, bool packed, bool adds, Scratch& scratch, float* y,
                  size_t ldy) const;

private:
    struct Piece {  // of a product: rows of a linear and tokens
        int n0, count, t0, t1;
    };
    PackedInput packed_input(int which, const std::vector<Prepared>& prepared, int t0, int t1) const;
    void multiply_floating(const Kernels& kernels, const Linear& linear, const Prepared& from, Piece piece, bool adds,
                           Scratch& scratch, float* y, size_t ldy) const;
    void finish(const Kernels& kernels, const Linear& linear, const Prepared& from, Piece piece,
                const uint8_t* generated, bool packed, bool adds, const int32_t* sums, float* y, size_t ldy) const;
};

}  // namespace eightfold
