// Attention of a step: the new tokens' keys are turned by their positions and stored with the values, then queries meet
// the cache in units of a few rows.
//
//   heads[t] = softmax(rope(q) . rope(k)) v      over the positions that token t sees
//
// Letters: T tokens, S sequences, H query heads, G key/value heads, D head_dim.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "batch.h"
#include "cache.h"
#include "pool.h"
#include "products.h"
#include "share.h"
#include "weights.h"

namespace eightfold {

// How the attention of a step is cut.
struct AttentionPlan {
    struct Unit {  // some query rows of one key/value head, over some of their context
        int sequence, first_token, tokens, head, heads, kv_head;
        int begin, end;  // positions
        int tile;
        int parts, slot;  // of a tile that several units share: its runs of kSplit positions; where the unit's first is
        int position, first_page, last_page;  // of the first token; pages of `begin` and of that token

        int rows() const { return tokens * heads; }
    };
    std::vector<Unit> units;
    int tiles = 0, slots = 0;  // how many there are
    bool single = false;  // one token a sequence: a unit rotates and stores what it needs itself
    int turn = 1;  // units that a thread takes at a time
};

class Attention {
public:
    Attention(const ModelConfig& config, const std::vector<AttentionParams>& layers, const Kernels& kernels, Pool& pool,
              Products& products, Share& share)
        : config_(config),
          layers_(layers),
          kernels_(kernels),
          pool_(pool),
          products_(products),
          share_(share),
          scratch_(pool.threads()),
          ropes_{{config.inv_freq, 1}} {}

    // Between steps.
    void allocate_cache(int pages);
    bool populate_cache(int layer, int page) const { return cache_->populate(layer, page); }
    int cache_pages() const { return cache_ ? cache_->pages() : 0; }
    size_t page_bytes() const;  // of all layers
    void reserve_tokens(int tokens);
    // Cuts a step, and makes room for it.
    void plan(const Batch& batch, AttentionPlan& plan);
    // Right before it begins.
    void begin(const Batch& batch);

    // Where the projections of a step go, (T, H + 2 G, D): queries, keys, values; and what comes out, (T, H, D).
    float* qkv() { return qkv_.data(); }
    const float* heads() const { return heads_.data(); }

    // Whether the heads are handed over to `o`, instead.
    bool hands_heads(const Group& o, int tokens) const {
        return config_.shape.head_dim % 4 == 0 && products_.takes_handed(o, tokens);
    }
    // Before the first step: what cosines and sines are multiplied by, so that scores grow by its square.
    void set_rope_scale(float scale) { ropes_[0].scale = scale; }
    // And how layers turn that have another rope: as many channels.
    void set_local_rope(std::vector<float> inv_freq, float scale) { ropes_.push_back({std::move(inv_freq), scale}); }
    int ropes() const { return static_cast<int>(ropes_.size()); }
    // Inside a phase before the first layer: cosine and sine of a token's position.
    void find_angles(const Batch& batch, int t);
    // Phases of a layer; see Pool::Walk::phase. `o`: what reads the heads.
    bool attend_all(Pool::Walk& walk, const Run& run, const AttentionPlan& plan, int layer, const Group& o);
    // Between phases: asks for what a thread is going to read first.
    void prefetch(const AttentionPlan& plan, int layer, int thread) const;

private:
    using Unit = AttentionPlan::Unit;
    struct alignas(kAlign) Rows {  // what one thread has gathered of a unit
        Lines<int8_t> q8;  // query rows, one below the other
        std::vector<int32_t> q_sum, last;
        Lines<float> qf, q_scale, q_shift, states;
        std::vector<const uint8_t*> keys, values;
    };
    struct Query {  // where a quantized query goes
        int8_t* q8;
        int32_t* sum;
        float *scale, *shift, *real;
    };
    struct Rope {
        std::vector<float> inv_freq;
        float scale;
    };
    struct Place {  // what a phase of a layer works on
        const Batch& batch;
        const AttentionPlan& plan;
        int layer;
        const Group& o;
    };

    void cut_tiles(const Batch& batch, AttentionPlan& plan) const;
    void cut_contexts(AttentionPlan& plan) const;
    void reserve_fresh(const Batch& batch);
    void reserve_states(const AttentionPlan& plan);

    bool is_fresh(const Place& of, int t) const {
        return of.batch.float_prompts && !of.batch.generated[t] && layers_[of.layer].kind != CacheKind::bf16;
    }
    Query query_at(int t, int head);
    const float* row_of(int t, int head) const;
    bool norm_all_heads(Pool::Walk& walk, const Run& run, const AttentionParams& params);
    void norm_heads(int t, int head, int heads, const std::vector<float>& gain);
    void rotate(int layer, int t, int head, float* to) const;
    void rotate_query(const Place& of, int t, int head, const Query& to) const;
    void quantize_query(const AttentionParams& params, int head, const float* q, const Query& to) const;
    void rotate_and_store(const Place& of, int begin, int end);
    void rotate_and_store_keys(const Place& of, int t, int count, int kv_head);
    bool is_run(const Batch& batch, int t, int end) const;
    void gather_queries(const Place& of, const Unit& unit, CacheKind kind, Rows& rows);
    void gather_pages(const Place& of, const Unit& unit, int begin, Rows& rows) const;
    void ask_for(const Place& of, const Unit& next, AttnRows& in) const;
    // `next`: the unit that the thread is likely to take after this one, or null.
    void attend(const Place& of, const Unit& unit, const Unit* next, Rows& rows);
    void join_parts(const Place& of, const Unit& unit);
    AttnState part_state(const Unit& unit, int part);
    int first_position(const Place& of, const Unit& unit) const;
    void prefetch_place(const Place& of, int t, int kv_head) const;
    void write_heads(const Place& of, const Unit& unit, AttnState state);

    const ModelConfig& config_;
    const std::vector<AttentionParams>& layers_;
    const Kernels& kernels_;
    Pool& pool_;
    Products& products_;
    Share& share_;
    std::vector<Rows> scratch_;  // of each thread
    std::unique_ptr<Cache> cache_;
    std::vector<AttentionParams> fresh_params_{1};  // bf16
    std::unique_ptr<Cache> fresh_;  // of one layer at a time: keys and values of whole prompts
    std::vector<int> fresh_page_;  // (S): first page of each sequence in fresh_
    std::vector<int> sequence_of_;  // (T)
    Lines<float> qkv_, heads_;
    Lines<float> squares_;  // (T, H + G): their sums, where all heads are normed as one row
    std::vector<Rope> ropes_;  // and a local one, if there is one
    Lines<float> cos_, sin_;  // (T, ropes, pairs)
    Lines<int8_t> q8_;  // (T, H, planes, Dq)
    std::vector<int32_t> q_sum_;  // (T, H, planes)
    Lines<float> q_scale_, q_shift_, qf_;  // (T, H), (T, H), (T, H, Dq)
    Lines<float> partial_;  // states of units that share a tile
    size_t state_size_ = 0;  // numbers of a state
    std::unique_ptr<std::atomic<int>[]> parts_done_;  // of each tile
    int tiles_ = 0;  // most of all steps
};

}  // namespace eightfold
