// Mixtures of experts: a router chooses a few of a layer's feed-forward networks for each token.
//
//   p = softmax(R m)                                        m = rms_norm(x) * g, float32
//   x += sum_e w_e down_e(silu(gate_e(m)) * up_e(m))        over the k likeliest experts e, in rising order; of equal
//                                                           ones the first. w_e = p_e, or p_e / their sum
//      + sigmoid(s m) down(silu(gate(m)) * up(m))           the shared expert, if there is one
//
// A step's tokens are put in bunches, one for each expert that somebody has chosen. Chunks are rows of weights, which
// meet the whole bunch: so a weight is read once a step, what is not chosen is never read, and whoever is the first to
// read rows may find their sums without asking anybody.
//
// Of several ranks every one has the routers, and so knows all that is chosen. Where it has some channels of every expert,
// the ranks show each other what they have gated, and then the outputs of which each has the weights. Where it has all of
// some experts, each shows the outputs of its pairs, and all ranks add them up. Either way every number is computed as
// one process does, and sums have its order.
//
// Letters: T tokens, E hidden size, F intermediate size of an expert, k experts of a token, P pairs of a token and an
// expert of its, each bunch's from a place on that may leave some free.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "pool.h"
#include "products.h"
#include "share.h"
#include "weights.h"

namespace eightfold {

class Experts {
public:
    Experts(const ModelConfig& config, std::vector<Layer>& layers, const Kernels& kernels, Pool& pool,
            Products& products, Share& share)
        : config_(config),
          layers_(layers),
          kernels_(kernels),
          pool_(pool),
          products_(products),
          share_(share),
          own_(pool.threads()) {}

    static constexpr int kPhases = 8;  // at most, of add(), but for meetings

    // Before the first step, and before the layer's router is taken: its input's forms follow from who else reads it.
    void take(Layer& layer);
    // Between steps.
    void reserve_tokens(int tokens);
    // Numbers that a rank shows the others at once, at most.
    size_t shown(int tokens) const;

    // x (T, E) += what the experts make of it. Phases of a step; see Pool::Walk::phase. `idle`: as there.
    template <typename Idle>
    bool add(Pool::Walk& walk, const Run& run, int layer, float* x, Idle idle) {
        const Place of{run, layers_[layer], x};
        return route(walk, of) && gate(walk, of) &&
               walk.phase(
                   down_chunks(run.batch.tokens), [&](int i) { down_chunk(of, i, walk.thread()); }, idle) &&
               (!config_.is_shared() || take_shown(walk, of));
    }

private:
    struct Place {  // what a layer's phases work on
        const Run& run;
        Layer& layer;
        float* x;
    };
    struct Bunch {  // the tokens of an expert
        int expert, begin, count;  // pairs of its room from `begin` on
        int input;  // the first row of its input, in the room or among the tokens
        bool is_shared;
    };
    struct Block {  // some pairs of a bunch, quantized at a time
        int bunch, begin, count;  // from the bunch's first on
        Layout layout;
    };
    struct Room {  // of the pairs of all experts that are chosen, or of the shared one
        std::vector<Prepared> inputs, middle;  // quantized
        std::vector<int32_t> tokens;  // (P)
        std::vector<float> weights;  // (P)
        std::vector<uint8_t> generated;  // (P)
    };
    struct Choice {
        int32_t expert;
        float weight;
    };
    struct Plan {  // of a layer's tokens
        std::vector<Choice> choices;  // (T, k), in rising order
        std::vector<float> shared;  // (T): the shared expert's weight
        std::vector<int> counts;  // of each expert's tokens
        std::vector<int32_t> places;  // (T, k) of the choices, in the room
        std::vector<int> firsts;  // (ranks + 1): where the places of each rank's own experts begin
        std::vector<Bunch> bunches;  // in rising order, then the shared expert's
        std::vector<int> order;  // of bunches that this rank has weights of, the largest first, but the shared one
        std::vector<Block> blocks;  // likewise, and the shared one's
        Room rooms[2];
    };
    struct alignas(kAlign) Own {  // of a thread that finds out for itself who goes where
        uint64_t run = 0, middle_run = 0;
        const Layer *layer = nullptr, *middle_layer = nullptr;
        Plan plan;
    };

    // How an input is written down: as the router reads it, then for whatever reads it, the last two by an expert alone.
    enum Slot { kReal, kToken, kWide, kStatic, kOtherStatic, kSlots };
    // And what is between the two products.
    enum MiddleSlot { kMiddle, kWideMiddle, kMiddleSlots };

    bool has_shared() const { return config_.experts.shared_size > 0; }
    // Whether every thread chooses for itself, and reads inputs where the router does.
    static bool is_alone(const Place& of) { return of.run.alone && !of.layer.reads_static; }
    int size_of(bool is_shared) const { return is_shared ? config_.experts.shared_size : config_.experts.size; }
    // Between ranks.
    bool is_cut(bool is_shared) const { return config_.is_shared() && (is_shared || !config_.experts.is_whole()); }
    const std::vector<int>& cuts_of(bool is_shared) const {
        return is_shared ? config_.experts.shared_cuts : config_.experts.size_cuts;
    }
    static int length(const std::vector<int>& cuts, int rank) { return cuts[rank + 1] - cuts[rank]; }
    // What this rank has of an expert of which it has weights.
    int own_size(bool is_shared) const {
        return is_cut(is_shared) ? length(cuts_of(is_shared), config_.rank) : size_of(is_shared);
    }
    int own_outputs(bool is_shared) const {
        return is_cut(is_shared) ? length(config_.hidden_cuts, config_.rank) : config_.hidden;
    }
    bool has(int expert) const { return config_.experts.has(config_.rank, expert); }
    // Where ranks show what they have gated for a room, and where outputs of pairs, behind those of the shared expert.
    size_t gated_at(const Plan& plan, bool is_shared, int rank) const;
    size_t pairs_at(int tokens) const { return has_shared() ? tokens * share_.widest(config_.hidden_cuts) : 0; }
    // The most that there can be of so many tokens, so that threads agree about the chunks of a phase without having to
    // know what was chosen.
    int most_bunches(int tokens) const;  // but the shared one
    int most_places(int tokens) const;
    int most_blocks(int tokens) const;
    int gate_rows(int tokens) const;
    int down_rows(int tokens) const;
    int gate_units(bool is_shared, int tokens) const { return chunk_count(own_size(is_shared), gate_rows(tokens)); }
    int gate_chunks(int tokens) const {
        return most_bunches(tokens) * gate_units(false, tokens) + gate_units(true, tokens);
    }
    int down_units(bool is_shared, int tokens) const { return chunk_count(own_outputs(is_shared), down_rows(tokens)); }
    int down_chunks(int tokens) const {
        const bool apart = config_.experts.is_whole() && has_shared();
        return down_units(false, tokens) + (apart ? down_units(true, tokens) : 0);
    }

    void take(Expert& expert, Layer& layer);
    void reserve(Plan& plan, int tokens) const;

    bool route(Pool::Walk& walk, const Place& of);
    bool gate(Pool::Walk& walk, const Place& of);
    bool show_gated(Pool::Walk& walk, const Place& of);
    bool take_shown(Pool::Walk& walk, const Place& of);
    Input input_of(const Place& of) const { return {of.layer.router, of.x, of.run.batch.tokens}; }

    void choose(const Place& of, int t, Plan& plan) const;
    void make_bunches(const Place& of, Plan& plan) const;
    void make_blocks(Plan& plan) const;
    static void ask_for(Expert& expert);
    Plan& plan_of(const Place& of, int thread);
    const Plan& quantized_plan_of(const Place& of, int thread);
    void gather(const Place& of, const Block& block, int thread);
    void gather_row(const Group& group, const std::vector<Prepared>& from, int t, Room& room, int at, Layout layout,
                    Scratch& scratch) const;
    void gate_chunk(const Place& of, int chunk, int thread);
    void gate_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, int thread);
    const float* gated_row(const Plan& plan, bool is_shared, int at, Scratch& scratch) const;
    void quantize(const Place& of, Plan& plan, const Block& block, int thread);
    void down_chunk(const Place& of, int chunk, int thread);
    void show_chunk(const Place& of, const Plan& plan, int chunk, int thread);
    template <typename Take>
    void each_product(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, Take take) const;
    void add_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, float* sums, int thread);
    void add_shown(const Place& of, int t, int thread);
    void finish_sums(const Place& of, int t, int n, int count, float* sums, bool adds) const;

    const ModelConfig& config_;
    std::vector<Layer>& layers_;  // their experts' sums are found when they are first read
    const Kernels& kernels_;
    Pool& pool_;
    Products& products_;
    Share& share_;
    int capacity_ = 0;  // tokens
    // Some layer has them; of `middle`, reals too.
    bool is_used_ = false, has_[kSlots] = {}, has_middle_[kMiddleSlots] = {}, has_real_middle_ = false;
    Lines<float> logits_;  // (T, experts and the shared one's gate)
    Lines<float> gated_[2];  // (P, F) of each room
    Lines<float> sums_;  // (T, E)
    Plan plan_;
    std::vector<Own> own_;  // of each thread
};

}  // namespace eightfold
