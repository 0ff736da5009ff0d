// Linears of every scheme, and groups of them that read the same input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace eightfold {

// Where a token comes from: some linears read a prompt's tokens in another way than those of an answer.
enum class Origin : uint8_t { prompt, generated };

enum class LinearKind : int { none, floating, w8a8, dynamic, mix, w8a16 };

constexpr int32_t kUnknownSum = INT32_MIN;  // no sum of up to 65793 bytes

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
    std::vector<int32_t> quant_bias;  // (N), less `zero` times the weight sums
    std::vector<int32_t> weight_sum;  // (N); kUnknownSum where prepare() has not been
    int unknown_rows = 0;             // how many those are
    float inv_input_scale = 0, input_offset = 0;
    bool keeps_sums = false;      // a share of the inputs: products come out as int32, to be summed with the others'

    bool is_static() const { return kind == LinearKind::w8a8 || kind == LinearKind::mix; }
    bool reads_static(Origin origin) const {
        return kind == LinearKind::w8a8 || (kind == LinearKind::mix && origin == Origin::generated);
    }
    size_t weight_bytes() const;

    // int32 products of rows [begin, begin + count) in the place of reals, less what an offset of the activations has
    // added to them; products of activations with a static scale have their bias instead.
    void keep_static_sums(const int32_t* acc, int begin, int count, float* out) const;
    void keep_token_sums(const int32_t* acc, int begin, int count, int32_t times, float* out) const;

    // Weight rows from n on, and what finishes their sums.
    StaticRows static_rows(int n) const;
    Rows16 rows_16(int n) const;

    // What an int8 kernel needs beside the file: sums of weight rows [begin, end). False: a floating weight of these
    // rows is not finite.
    bool prepare(const Kernels& kernels, int begin, int end);
    // The same for those rows of [begin, begin + count) that were never prepared; nobody else may read them meanwhile.
    void prepare_new(const Kernels& kernels, int begin, int count);
    // Asks for the first `most` bytes of so many rows, which are read in so many runs.
    void prefetch(int begin, int rows, int runs, size_t most) const;
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
    // Memory only grows.
    void reserve(int tokens, int width, int planes = 2);
    void reserve_real(int tokens, int width);
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

// How quantized rows lie: one below the other, or in packed blocks of kLanes tokens.
enum class Layout { rows, packed };

// What one thread needs for products.
struct alignas(kAlign) Scratch {
    Lines<int32_t> sums = Lines<int32_t>(2 * kProducts);
    Lines<float> first = Lines<float>(kProducts);
    Lines<float> second = Lines<float>(kProducts);
    Lines<float> row;           // one input row, before it is quantized
    std::vector<uint8_t> wide;  // a quantized row and what it is not to be quantized without
    Lines<uint8_t> rows;        // quantized rows of a block, before they are packed
};

struct Chunk {  // rows of one linear; of a paired group, of the first and the second at once
    int linear, begin, count;
};

// How so many tokens are prepared.
inline Layout layout_of(int tokens) { return tokens > kFewTokens ? Layout::packed : Layout::rows; }

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

// How the rows of a group are cut into chunks.
enum class Cut {
    each,   // of every linear by itself
    pairs,  // of the first two at once
    first,  // of the first alone: the others' rows are read one by one
};

// An input of a group, and which of its rows.
struct Token {
    const float* x;  // (K)
    int t;
    Origin origin;
};

// A part of a product: rows [begin, begin + count) of a linear meet tokens [t0, t1); of packed tokens, t0 is the first of
// a block.
struct Piece {
    int linear, begin, count, t0, t1;
};

// The input of a product.
struct Source {
    const std::vector<Prepared>& prepared;
    Layout layout;
    const uint8_t* generated;  // of a piece's tokens, from its first on; null: it does not matter
};

// Linears that read the same input.
struct Group {
    std::vector<Linear> linears;
    std::vector<Form> forms;     // the different ones
    std::vector<int> form_of;    // of each linear
    const float* gain = nullptr; // of the norm before it; null: there is none
    const float* norm_bias = nullptr;
    float eps = 0;
    bool symmetric_tokens = false;  // how dynamic linears quantize a token
    bool wants_norm = false;        // of 16-bit inputs
    Activation activation = Activation::silu;  // of the first of a pair
    bool keeps_rows = false;        // its input is never packed
    Cut cut = Cut::each;
    std::vector<Chunk> few, many;  // how the work is cut for a few tokens and for many

    void find_forms();
    void make_chunks(int threads);
    int inputs() const { return linears.front().inputs; }
    int outputs() const;
    bool has_floating() const;
    size_t weight_bytes() const;

    const std::vector<Chunk>& chunks(int tokens) const { return tokens <= kFewTokens ? few : many; }
    // Chunks of so many tokens' product: those of a block of tokens, then those of the next.
    int chunk_total(int tokens) const {
        return static_cast<int>(chunks(tokens).size()) * chunk_count(tokens, kTokenBlock);
    }

    // Asks for the first weights of a chunk, if there are so many: a thread is likely to read those of its own number
    // first. Of many tokens each row takes long enough.
    void prefetch(int tokens, int chunk) const;

    // Writes a row of the input in every form. Packed rows go to the scratch memory first, until pack() is called for
    // their block.
    void prepare(const Kernels& kernels, Token token, Layout layout, std::vector<Prepared>& prepared,
                 Scratch& scratch) const;
    void pack(const Kernels& kernels, int block, std::vector<Prepared>& prepared, const Scratch& scratch) const;

    // gate_mul of both linears for packed tokens, where gates(): a part of the input of `next`, in packed blocks, or
    // floats if there is no `next`. The piece's linear does not matter.
    bool gates(const Group* next) const;
    void gate(const Kernels& kernels, const Piece& piece, const std::vector<Prepared>& prepared, const Group& next,
              Prepared& handed) const;
    void gate(const Kernels& kernels, const Piece& piece, const std::vector<Prepared>& prepared, Output out) const;

    // A piece of a linear's product, to `out`.
    void multiply(const Kernels& kernels, const Piece& piece, const Source& from, Output out, Scratch& scratch) const;

private:
    PackedInput packed_input(const Piece& piece, const std::vector<Prepared>& prepared) const;
    void multiply_floating(const Kernels& kernels, const Piece& piece, const Prepared& from, Output out,
                           Scratch& scratch) const;
    void finish(const Kernels& kernels, const Piece& piece, const Source& from, const int32_t* sums, Output out) const;
};

}  // namespace eightfold
