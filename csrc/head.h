// What follows the last layer: logits, or the likeliest token alone.
//
// A row of a float head is w = s q + e with q in int8, and a token's normed state x = t p + f with p in 16 bit. So
//
//   | w x - s t (q p) |  <=  |e| |x| + |s q| |f|            (Cauchy and Schwarz; |f| <= t sqrt(E) / 2)
//
// and only tokens whose upper bound reaches the largest lower bound can be the likeliest. Their exact logits decide, so
// the answer is the one that all logits give, for half of the bytes of a bfloat16 head.
//
// Letters: R rows of logits, C choices, E hidden size, V vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "pool.h"
#include "products.h"
#include "share.h"
#include "weights.h"

namespace eightfold {

// What becomes of a float head's pages after its shadow was made: those of a mapped file need not stay in memory.
enum class HeadPages { kept, released };

// Of a row of all logits: notes the likeliest token, then multiplies and softens them, which changes no order.
void finish_logits(const Kernels& kernels, const Switches& switches, float* logits, int vocab, int32_t& best);

class Head {
public:
    Head(const ModelConfig& config, const Group& group, const Kernels& kernels, Pool& pool, Products& products,
         Share& share)
        : config_(config),
          group_(group),
          kernels_(kernels),
          pool_(pool),
          products_(products),
          share_(share),
          scratch_(pool.threads()) {}

    // Before the first step, when the group was taken: room for its shadow, if there is to be one; then its rows
    // [begin, end), in any order and by any thread.
    void make_shadow();
    void shadow_rows(int begin, int end, HeadPages pages);
    // Between steps.
    void reserve(const Batch& batch);

    size_t weight_bytes() const;  // that a step of greedy decoding reads
    // What is read first.
    const Group& first(const Batch& batch) const { return batch.logit_rows > 0 || !has_shadow() ? group_ : shadow_; }
    // Phases of a step, see Pool::Walk::phase: logits and choices of the states x (T, E).
    bool find(Pool::Walk& walk, const Run& run, const float* x);

private:
    struct Candidate {  // a token that may turn out to be the likeliest
        float upper;
        int32_t index;
    };
    struct alignas(kAlign) Found {  // by one thread
        uint64_t run = 0;
        Lines<float> floors, upper;  // (C): the likeliest of a row is at least that
        std::vector<std::vector<Candidate>> candidates;  // (C)
        std::vector<int32_t> indices;
    };
    struct Choice {
        float logit;
        int32_t token;  // -1: none
        float next;  // the largest logit of the others that were looked at
    };

    bool has_shadow() const { return !shadow_.linears.empty(); }
    bool find_logits(Pool::Walk& walk, const Run& run, const float* x);
    bool find_choices(Pool::Walk& walk, const Run& run, const float* x);
    bool choose_by_shadow(Pool::Walk& walk, const Run& run, const Input& input);
    bool choose_by_logits(Pool::Walk& walk, const Run& run, const float* x);
    void begin(Found& found, const Run& run) const;
    void find_candidates(const Run& run, const Input& input, int chunk, int thread);
    void add_candidates(Found& found, int row, const RowParams& x, const float* y, int begin, int count,
                        float depth) const;
    void settle(const Run& run, const Input& input, int row, int thread);
    void gather_candidates(const Run& run, int row, std::vector<int32_t>& indices) const;
    Choice largest_of(const std::vector<int32_t>& indices, const float* x) const;
    void choose(const Run& run, int row, Choice choice);

    const ModelConfig& config_;
    const Group& group_;
    const Kernels& kernels_;
    Pool& pool_;
    Products& products_;
    Share& share_;
    std::vector<Found> scratch_;  // of each thread
    // A float head as int8, 16-bit activations, and the head itself, for the form of its input; empty: there is none.
    Group shadow_;
    Lines<int8_t> shadow_weight_;  // (V, E)
    Lines<float> shadow_error_, shadow_norm_;  // (V)
    Lines<float> choice_logits_;  // (C, V) where there is no shadow
};

}  // namespace eightfold
