// A decoder step: the phases that all threads walk through.
//
//   x += o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x) * g
//   x += down(silu(gate(m)) * up(m))                     m = rms_norm(x) * g'; or what experts make of it
//
// Some families have no such norms, or further ones of what is added, or multiply that: see Switches.
//
// Letters: T tokens, E hidden size, F intermediate size.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "batch.h"
#include "experts.h"
#include "head.h"
#include "pool.h"
#include "products.h"
#include "share.h"
#include "weights.h"

namespace eightfold {

// What a step is made of.
struct Parts {
    Share& share;
    Products& products;
    Attention& attention;
    Experts& experts;
    Head& head;
};

class Step {
public:
    Step(const ModelConfig& config, const Weights& weights, const Kernels& kernels, Pool& pool, Parts parts);

    // The most phases that a step has.
    static int phases(const ModelConfig& config);

    // Throws what a meeting of ranks has thrown.
    void run(const Batch& batch);

private:
    struct Slot {  // what the threads of a run read; see Pool
        Run run;
        AttentionPlan attention;
    };
    struct Term {  // what is added to x: a group's product with what a part of the layer has computed
        Input input;
        const std::vector<int>& cuts;  // of the inputs, between ranks
        const Group& next;             // is read afterwards
        const std::vector<float>&gain, &bias;  // of its norm; empty: it has none
    };

    static void program(void* step, Pool::Walk& walk);
    void reserve_tokens(int tokens);
    void walk_through(Pool::Walk& walk, const Slot& slot);
    bool layer_phases(Pool::Walk& walk, const Slot& slot, int layer, const Group& after);
    void embed(const Run& run, int t);
    // Whether what is added is made apart, and finished before.
    bool is_finished(const Term& term) const { return !term.gain.empty() || config_.switches.residual_multiplier != 1; }
    bool add(Pool::Walk& walk, const Run& run, const Term& term);
    bool multiply(Pool::Walk& walk, const Run& run, const Term& term, Output out);
    void finish(const Term& term, int t);
    bool hands_gated(const Layer& layer, int tokens) const;
    bool feed_forward(Pool::Walk& walk, const Run& run, int layer, const Group& after);
    bool gate(Pool::Walk& walk, const Run& run, const Layer& layer);
    void gate_piece(const Source& from, const Layer& layer, const Piece& piece, bool hands, int thread);

    const ModelConfig& config_;
    const Weights& weights_;
    const Kernels& kernels_;
    Pool& pool_;
    Parts parts_;
    std::vector<int> head_cuts_;  // (ranks + 1): channels of attention
    std::array<Slot, Pool::kSlots> slots_;
    AttentionPlan plan_;  // of the step that comes next
    uint64_t count_ = 0;  // of steps
    int capacity_ = 0;    // tokens
    Lines<float> x_;      // (T, E)
    Lines<float> gated_;  // (T, F)
    Lines<float> term_;   // (T, E): what is finished before it is added to x
};

}  // namespace eightfold
