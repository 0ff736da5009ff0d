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
// Letters: T tokens, E hidden size, F intermediate size of an expert, k experts of a token, P pairs of a token and an
// expert of its, each bunch's from a place on that may leave some free.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "pool.h"
#include "products.h"
#include "weights.h"

namespace eightfold {

class Experts {
public:
    Experts(const ModelConfig& config, std::vector<Layer>& layers, const Kernels& kernels, Pool& pool,
            Products& products)
        : config_(config), layers_(layers), kernels_(kernels), pool_(pool), products_(products), own_(pool.threads()) {}

    static constexpr int kPhases = 8;  // at most, of add()

    // Before the first step, and before the layer's router is taken: its input's forms follow from who else reads it.
    void take(Layer& layer);
    // Between steps.
    void reserve_tokens(int tokens);

    // x (T, E) += what the experts make of it. Phases of a step; see Pool::Walk::phase. `idle`: as there.
    template <typename Idle>
    bool add(Pool::Walk& walk, const Run& run, int layer, float* x, Idle idle) {
        const Place of{run, layers_[layer], x};
        return route(walk, of) && gate(walk, of) &&
               walk.phase(down_chunks(run.batch.tokens), [&](int i) { down_chunk(of, i, walk.thread()); }, idle);
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
        std::vector<Bunch> bunches;  // in rising order, then the shared expert's
        std::vector<int> order;  // of bunches, the largest first
        std::vector<Block> blocks;
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
    // The most that there can be of so many tokens, so that threads agree about the chunks of a phase without having to
    // know what was chosen.
    int most_bunches(int tokens) const;  // but the shared one
    int most_places(int tokens) const;
    int most_blocks(int tokens) const;
    int gate_rows(int tokens) const;
    int down_rows(int tokens) const;
    int gate_units(bool is_shared, int tokens) const { return chunk_count(size_of(is_shared), gate_rows(tokens)); }
    int gate_chunks(int tokens) const {
        return most_bunches(tokens) * gate_units(false, tokens) + gate_units(true, tokens);
    }
    int down_chunks(int tokens) const { return chunk_count(config_.hidden, down_rows(tokens)); }

    void take(Expert& expert, Layer& layer);
    void reserve(Plan& plan, int tokens) const;

    bool route(Pool::Walk& walk, const Place& of);
    bool gate(Pool::Walk& walk, const Place& of);
    Input input_of(const Place& of) const { return {of.layer.router, of.x, of.run.batch.tokens}; }

    void choose(const Place& of, int t, Plan& plan) const;
    void make_bunches(const Place& of, Plan& plan) const;
    void make_blocks(Plan& plan) const;
    Plan& plan_of(const Place& of, int thread);
    const Plan& quantized_plan_of(const Place& of, int thread);
    void gather(const Place& of, const Block& block, int thread);
    void gather_row(const Group& group, const std::vector<Prepared>& from, int t, Room& room, int at, Layout layout,
                    Scratch& scratch) const;
    void gate_chunk(const Place& of, int chunk, int thread);
    void gate_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, int thread);
    void quantize(const Place& of, Plan& plan, const Block& block, int thread);
    void down_chunk(const Place& of, int chunk, int thread);
    void add_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, int thread);

    const ModelConfig& config_;
    std::vector<Layer>& layers_;  // their experts' sums are found when they are first read
    const Kernels& kernels_;
    Pool& pool_;
    Products& products_;
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
