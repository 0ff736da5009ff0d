// The decoder: one forward() is the whole step of a flattened batch, prompts and generated tokens in any mix.
//
//   x += o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x) * g
//   x += down(silu(gate(m)) * up(m))                     m = rms_norm(x) * g'
//
// Several processes may hold a share of the heads, of the intermediate size and of the vocabulary each; what they make
// of it is put together in meetings (exchange.h, model_exchange.cc). Sizes below are those of the share.
//
// Letters: T tokens of all sequences, S sequences, E hidden size, F intermediate size, H query heads, G key/value
// heads, D head_dim, V vocabulary.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "cache.h"
#include "exchange.h"
#include "linear.h"
#include "pool.h"

namespace eightfold {

struct ModelConfig {
    int layers = 0, hidden = 0, intermediate = 0, vocab = 0;
    Shape shape;
    float eps = 0;
    bool symmetric_tokens = false;     // how dynamic linears quantize a token
    std::vector<float> inv_freq;       // (D / 2)
    std::vector<int> vocab_cuts;       // (ranks + 1): rank r holds the tokens from vocab_cuts[r] on
    std::vector<int> intermediate_cuts, hidden_cuts;  // likewise

    int ranks() const { return static_cast<int>(vocab_cuts.size()) - 1; }
};

// What a step computes on. Pointers need to last for the call.
struct Batch {
    int tokens = 0, sequences = 0, table_width = 0, logit_rows = 0;
    const int32_t* token_ids = nullptr;    // (T)
    const int32_t* positions = nullptr;    // (T), rising by one inside a sequence
    const uint8_t* generated = nullptr;    // (T): not part of a prompt
    const int32_t* starts = nullptr;       // (S + 1): tokens of sequence s are starts[s] .. starts[s + 1] - 1
    const int32_t* tables = nullptr;       // (S, table_width): pages of each sequence
    const int32_t* logit_tokens = nullptr; // (R): tokens whose logits are wanted
    float* logits = nullptr;               // (R, V)
    int32_t* best = nullptr;               // (R) the likeliest token of each
    int choice_rows = 0;
    const int32_t* choice_tokens = nullptr;  // (C): tokens of which only the likeliest next one is wanted
    int32_t* choices = nullptr;              // (C)
    bool float_prompts = false;  // a prompt's tokens attend over the fresh keys and values, not over int8 ones
};

class Model {
public:
    Model(ModelConfig config, const Kernels& kernels, int threads);
    ~Model() { pool_.quiesce(); }  // late threads still read steps_

    // Filled in before finish().
    struct Layer {
        Group qkv, o, gate_up, down;
        std::vector<float> input_gain, input_bias, post_gain, post_bias;  // biases may be empty
    };
    std::vector<Layer> layers;
    std::vector<AttentionParams> attention;
    Group head;
    std::vector<float> final_gain, final_bias;
    Linear embedding;  // floating, (V, E)

    // Returns -1, or the ordinal of a weight that is not finite. `forgets_head`: the head lies in a mapped file, whose
    // pages need not stay in memory after its shadow was made.
    int finish(bool forgets_head);
    // While it is left alone, finish() computes on its caller's thread, and leaves the other cores to somebody else.
    void leave_alone(bool alone) { left_alone_ = alone; }
    // Lets finish() return soon, with a model that cannot be used.
    void abandon() { is_abandoned_ = true; }
    void set_exchange(std::unique_ptr<Exchange> exchange) { exchange_ = std::move(exchange); }
    void allocate_cache(int pages);
    void forward(const Batch& batch);

    bool is_joined() const { return exchange_ != nullptr; }
    int threads() const { return pool_.threads(); }
    int cache_pages() const { return cache_ ? cache_->pages() : 0; }
    size_t page_bytes() const;  // of all layers
    size_t weight_bytes() const;  // that a step of greedy decoding reads

private:
    struct Unit {  // some query rows of one key/value head, over some of their context
        int sequence, first_token, tokens, head, heads, kv_head;
        int begin, end;  // positions
        int tile;
        int parts, slot;  // of a tile that several units share: its runs of kSplit positions; where the unit's first is
        int position, first_page, last_page;  // of the first token; pages of `begin` and of that token
    };
    struct Step {  // what a run reads; see Pool
        Batch batch;
        bool alone;  // every thread prepares the few input rows for itself
        bool single;  // one token a sequence: a unit of attention rotates and stores what it needs itself
        int turn;  // units that a thread takes at a time
        std::vector<Unit> units;
        uint64_t id;
    };

    static void program(void* model, Pool::Walk& walk);
    void walk_through(Pool::Walk& walk, const Step& step);
    bool attention_phases(Pool::Walk& walk, const Step& step, int layer, const Group& next);
    struct Next {  // what is read after a phase: weights, or, where there are none, the cache of a layer
        const Group* group;
        int layer;
    };
    bool linear_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                       float* output, bool adds, Next next);
    // The same where whoever made the input has put it into handed_.
    bool handed_phase(Pool::Walk& walk, const Step& step, const Group& group, float* output, bool adds,
                      const Group& next);
    void multiply_chunk(const Step& step, const Group& group, int i, const std::vector<Prepared>& prepared,
                        float* output, bool adds, Scratch& scratch);
    bool gated_phases(Pool::Walk& walk, const Step& step, const Layer& layer, int use);
    bool adding_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                       const std::vector<int>& cuts, bool handed, const Group& next);
    struct HeadRows {  // tokens whose logits are computed
        int count;
        const int32_t* tokens;
        float* logits;
        int32_t* best;
    };
    bool head_phases(Pool::Walk& walk, const Step& step, HeadRows rows);
    bool shared_head_phases(Pool::Walk& walk, const Step& step);
    bool choice_phases(Pool::Walk& walk, const Step& step);
    void find_candidates(const Step& step, const Chunk& chunk, int t0, int t1, Scratch& scratch);
    void settle(const Step& step, int row, Scratch& scratch);
    void make_shadow();
    void shadow_rows(int begin, int end, bool forgets);
    bool prepare_phase(Pool::Walk& walk, const Step& step, const Group& group, const float* input, int tokens,
                       const int32_t* rows, bool of_share = false);
    const std::vector<Prepared>& prepared_for(Scratch& scratch, const Step& step, const Group& group, int use,
                                              const float* input, int tokens, const int32_t* rows);

    // Whether the input of a linear is quantized and packed by whoever makes it.
    bool takes_handed(const Step& step, const Group& group) const;
    bool hands_heads(const Step& step, const Layer& layer) const {
        return config_.shape.head_dim % 4 == 0 && takes_handed(step, layer.o);
    }
    bool hands_gated(const Step& step, const Layer& layer) const {
        return layer.gate_up.many.front().count % kAlign == 0 && takes_handed(step, layer.down);
    }
    void hand_gated(const Group& next, int t0, int t1, int n, int count, const float* gated, Scratch& scratch);
    void hand_head(const Group& next, int t, int head, const float* values);

    // What ranks have to tell each other; model_exchange.cc.
    struct Choice {  // of a rank: the likeliest of its tokens, -1: none
        float logit;
        int32_t token;
    };
    bool meet(Pool::Walk& walk, const Step& step, size_t bytes);
    bool gather_embedding(Pool::Walk& walk, const Step& step);
    struct Range {  // of a rank's inputs of a token, and zero
        float lo, hi;
    };
    bool meet_ranges(Pool::Walk& walk, const Step& step, const float* input, int width);
    void prepare_share(const Group& group, const float* x, int t, bool is_generated, bool packed, Scratch& scratch);
    bool gathering_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                          const std::vector<int>& cuts, const Group& next);
    bool add_parts(Pool::Walk& walk, const Step& step, const Group& group);
    bool gather_logits(Pool::Walk& walk, const Step& step);
    bool gather_choices(Pool::Walk& walk, const Step& step);
    void add_row(const Step& step, const Group& group, int t, Scratch& scratch);
    RowParams sum_params(const Linear& linear, int t) const;
    size_t part_width(const Linear& linear) const;
    void reserve_parts(const Batch& batch);
    void choose(const Step& step, int row, float logit, int32_t token);
    bool is_shared() const { return config_.ranks() > 1; }
    int owner_of(int token) const;
    int widest_vocab() const;
    bool needs_ranges(const Group& group) const;

    void embed(const Step& step, int t);
    struct Query {  // where a quantized query goes
        int8_t* q8;
        int32_t* sum;
        float *scale, *real;
    };
    Query query_at(int t, int head);
    void rotate(int layer, int t, int head, float* to);
    void rotate_query(const Step& step, int layer, int t, int head, const Query& to);
    bool is_run(const Batch& batch, int t, int end) const;
    void rotate_and_store_keys(const Step& step, int layer, int t, int count, int kv_head);
    void quantize_query(const AttentionParams& params, int head, const float* q, const Query& to) const;
    void gather_queries(const Step& step, int layer, const Unit& unit, CacheKind kind, Scratch& scratch);
    // `next`: the unit that the thread is likely to take after this one, or null.
    void attend(const Step& step, int layer, const Unit& unit, const Unit* next, Scratch& scratch);
    int first_position(int layer, const Batch& batch, const Unit& unit) const;
    void prefetch_unit(const Step& step, int layer, int u) const;
    void prefetch_place(const Batch& batch, int layer, int t, int kv_head) const;
    void write_heads(const Step& step, int layer, const Unit& unit, AttnState state);
    void plan_units(const Batch& batch);
    void find_pages(const Batch& batch);
    void reserve_tokens(int tokens);
    void reserve_choices(int rows);
    void reserve_prompts(const Batch& batch);
    void reserve_units();
    bool is_fresh(const Batch& batch, int layer, int t) const {
        return batch.float_prompts && !batch.generated[t] && attention[layer].kind != CacheKind::bf16;
    }
    float* head_row(int t, int head) {  // queries first, then keys, then values
        const Shape& shape = config_.shape;
        const size_t all = shape.heads + 2 * static_cast<size_t>(shape.kv_heads);
        return qkv_.data() + (static_cast<size_t>(t) * all + head) * shape.head_dim;
    }
    int row_len(const Unit& unit) const { return unit.tokens * unit.heads; }

    ModelConfig config_;
    std::unique_ptr<Exchange> exchange_;  // of several ranks
    std::atomic<uint64_t> failed_{0};  // the step whose meeting failed
    std::exception_ptr failure_;
    std::atomic<bool> left_alone_{false}, is_abandoned_{false};
    bool has_ranges_ = false;  // some inputs are quantized by what all ranks have of them
    size_t widest_part_ = 0;  // of a token, in numbers
    int gathered_width_ = 0;
    static constexpr int kHeadUses = 3;  // inputs of the head: for logits, for logits of choices, for the shadow

    const Kernels& kernels_;
    Pool pool_;
    std::unique_ptr<Cache> cache_;
    std::vector<AttentionParams> fresh_params_{1};  // bf16
    std::unique_ptr<Cache> fresh_;  // of one layer at a time: keys and values of whole prompts
    std::array<Step, Pool::kSlots> steps_;
    std::vector<Scratch> scratch_;  // of each thread
    std::vector<Prepared> prepared_;  // shared by all
    std::vector<Prepared> handed_{1};  // quantized and packed where it was made
    std::vector<Unit> units_;  // of the step being planned
    uint64_t step_count_ = 0;
    // A float head as int8, 16-bit activations: its products and their error bounds leave a few tokens whose exact
    // logits decide which is the likeliest.
    Group shadow_;  // and the head itself, for the form of its input; empty: there is none
    Lines<int8_t> shadow_weight_;  // (V, E)
    Lines<float> shadow_error_, shadow_norm_;  // (V)
    Lines<float> choice_logits_;  // (C, V) where there is no shadow
    int real_width_ = 0;  // inputs of the widest group with floating linears

    int capacity_ = 0;  // tokens
    std::vector<int> sequence_of_;  // (T)
    std::vector<int> fresh_page_;  // (S): first page of each sequence in fresh_
    std::vector<int> head_cuts_;  // (ranks + 1): channels of attention
    Lines<float> gathered_;  // (T, K): inputs of all ranks
    Lines<float> x_, qkv_, heads_, act_, cos_, sin_;
    Lines<int8_t> q8_;  // (T, H, planes, Dq)
    std::vector<int32_t> q_sum_;  // (T, H, planes)
    Lines<float> q_scale_, qf_;  // (T, H), (T, H, Dq)
    Lines<float> partial_;  // states of split units
    std::unique_ptr<std::atomic<int>[]> parts_done_;  // of each tile
    size_t partial_stride_ = 0;
    int tiles_ = 0;  // most of all steps
    int slots_ = 0;  // of the step being planned
};

}  // namespace eightfold
