// Products of the groups of a model, by all threads: inputs are quantized once, by a phase of its own or by whoever makes
// them, and chunks of weights meet them.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "pool.h"
#include "share.h"
#include "weights.h"

namespace eightfold {

// The input of a group's product.
struct Input {
    const Group& group;
    const float* x;  // rows of group.inputs() numbers
    int tokens;  // rows that are multiplied
    const int32_t* rows = nullptr;  // which of x they are; null: the first ones
    bool handed = false;  // it was handed over already, quantized and packed; then x is not read
};

class Products {
public:
    Products(const ModelConfig& config, const Kernels& kernels, Pool& pool, Share& share);

    // Before the first step: finds the forms of a group's input, and cuts its rows into chunks.
    void take(Group& group);
    // Between steps.
    void reserve_tokens(int tokens);

    // Phases of a step; see Pool::Walk::phase.

    // out = the product of a group, whose linears lie side by side in it. `idle`: as in Pool.
    template <typename Idle>
    bool multiply(Pool::Walk& walk, const Run& run, const Input& input, Output out, Idle idle) {
        return prepare(walk, run, input) &&
               walk.phase(
                   input.group.chunk_total(input.tokens),
                   [&](int i) { multiply_chunk(run, input, i, out, walk.thread()); }, idle);
    }
    // Quantizes and packs the input, unless every thread does so for itself.
    bool prepare(Pool::Walk& walk, const Run& run, const Input& input);

    // Inside a phase after prepare(): the quantized input.
    const std::vector<Prepared>& prepared(const Run& run, const Input& input, int thread);
    // The same of the last group that all threads have prepared together.
    const std::vector<Prepared>& prepared() const { return prepared_; }
    // A piece of a group's product, for those that walk through its chunks themselves.
    Piece piece_of(const Input& input, int chunk) const;
    Scratch& scratch(int thread) { return scratch_[thread]; }

    // Whether whoever makes the input of a group hands it over: quantized with a static scale, in packed blocks.
    bool takes_handed(const Group& group, int tokens) const;
    // Inside a phase: hands over columns [column, column + count) for token t, a multiple of four each.
    void hand(const Group& to, int t, int column, int count, const float* values);
    // The same for a block of tokens and whole rows of packed columns: `values` are rows of `count` numbers.
    void hand_block(const Group& to, const Piece& piece, const float* values, int thread);
    Prepared& handed() { return handed_[0]; }

private:
    struct Own {  // a few rows, prepared by one thread alone
        uint64_t run = 0;
        const Group* group = nullptr;
        const int32_t* rows = nullptr;
        int tokens = 0;
        std::vector<Prepared> prepared;
    };

    Token token_of(const Run& run, const Input& input, int t) const;
    void multiply_chunk(const Run& run, const Input& input, int i, Output out, int thread);

    const ModelConfig& config_;
    const Kernels& kernels_;
    Pool& pool_;
    Share& share_;
    int real_width_ = 0;  // inputs of the widest group with floating linears
    std::vector<Scratch> scratch_;  // of each thread
    std::vector<Own> own_;  // likewise
    std::vector<Prepared> prepared_;  // shared by all
    std::vector<Prepared> handed_{1};  // quantized and packed where it was made
};

}  // namespace eightfold
