// The phases of a step.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace eightfold {

namespace {

constexpr int kRowsOfChunk = 8;  // tokens of a chunk where each is little work

}  // namespace

void Model::program(void* model, Pool::Walk& walk) {
    Model& self = *static_cast<Model*>(model);
    self.walk_through(walk, self.steps_[walk.slot()]);
}

void Model::walk_through(Pool::Walk& walk, const Step& step) {
    const int tokens = step.batch.tokens;
    if (!walk.phase(chunk_count(tokens, kRowsOfChunk), [&](int i) {
            for (int t = i * kRowsOfChunk; t < std::min(tokens, (i + 1) * kRowsOfChunk); t++) embed(step, t);
        })) {
        return;
    }
    if (is_shared() && !gather_embedding(walk, step)) return;
    for (int i = 0; i < config_.layers; i++) {
        const Layer& layer = layers[i];
        const Group& after = i + 1 < config_.layers ? layers[i + 1].qkv : head;
        if (!linear_phases(walk, step, layer.qkv, 4 * i, x_.data(), qkv_.data(), false, layer.o)) return;
        if (!attention_phases(walk, step, i, layer.o)) return;
        if (!adding_phases(walk, step, layer.o, 4 * i + 1, heads_.data(), head_cuts_, layer.gate_up)) return;
        if (!gated_phases(walk, step, layer.gate_up, 4 * i + 2, layer.down)) return;
        if (!adding_phases(walk, step, layer.down, 4 * i + 3, act_.data(), config_.intermediate_cuts, after)) return;
    }
    if (is_shared()) {
        (void)shared_head_phases(walk, step);
        return;
    }
    const Batch& batch = step.batch;
    if (!head_phases(walk, step, {batch.logit_rows, batch.logit_tokens, batch.logits, batch.best})) return;
    if (!shadow_.linears.empty()) {
        (void)choice_phases(walk, step);
    } else {
        (void)head_phases(walk, step, {batch.choice_rows, batch.choice_tokens, choice_logits_.data(), batch.choices});
    }
}

void Model::embed(const Step& step, int t) {
    const int size = config_.hidden, half = config_.shape.head_dim / 2;
    const int token = step.batch.token_ids[t], owner = owner_of(token);
    if (!is_shared() || owner == exchange_->rank()) {
        const size_t row = static_cast<size_t>(token - config_.vocab_cuts[owner]) * size;
        const size_t bytes = embedding.dtype == DType::f32 ? 4 : 2;
        float* to = is_shared() ? static_cast<float*>(exchange_->mine()) : x_.data();
        kernels_.widen(static_cast<const char*>(embedding.weight) + row * bytes, embedding.dtype, size,
                       to + static_cast<size_t>(t) * size);
    }
    for (int i = 0; i < half; i++) {
        const float angle = static_cast<float>(step.batch.positions[t]) * config_.inv_freq[i];
        cos_[static_cast<size_t>(t) * half + i] = std::cos(angle);
        sin_[static_cast<size_t>(t) * half + i] = std::sin(angle);
    }
}

bool Model::prepare_phase(Pool::Walk& walk, const Step& step, const Group& group, const float* input, int tokens,
                          const int32_t* rows, bool of_share) {
    if (step.alone) return true;
    const bool packed = is_packed(tokens);
    const int size = packed ? kLanes : 1;
    return walk.phase(chunk_count(tokens, size), [&](int i) {
        Scratch& scratch = scratch_[walk.thread()];
        for (int t = i * size; t < std::min(tokens, (i + 1) * size); t++) {
            const int row = rows != nullptr ? rows[t] : t;
            const float* x = input + static_cast<size_t>(row) * group.inputs();
            const bool is_generated = step.batch.generated[row] != 0;
            if (of_share) prepare_share(group, x, t, is_generated, packed, scratch);
            else group.prepare(kernels_, x, t, is_generated, config_.symmetric_tokens, packed, prepared_, scratch);
        }
        if (packed) group.pack(kernels_, i, prepared_, scratch);
    });
}

const std::vector<Prepared>& Model::prepared_for(Scratch& scratch, const Step& step, const Group& group, int use,
                                                 const float* input, int tokens, const int32_t* rows) {
    if (!step.alone) return prepared_;
    const uint64_t key = step.id * (4 * static_cast<uint64_t>(config_.layers) + kHeadUses) + use + 1;
    if (scratch.prepared_for == key) return scratch.prepared;
    scratch.prepared_for = key;
    for (Prepared& prepared : scratch.prepared) prepared.reserve(tokens, group.inputs(), group.has_floating());
    for (int t = 0; t < tokens; t++) {
        const int row = rows != nullptr ? rows[t] : t;
        group.prepare(kernels_, input + static_cast<size_t>(row) * group.inputs(), t, step.batch.generated[row],
                      config_.symmetric_tokens, false, scratch.prepared, scratch);
    }
    return scratch.prepared;
}

bool Model::linear_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                          float* output, bool adds, const Group& next) {
    const int tokens = step.batch.tokens;
    const bool of_share = group.linears.front().keeps_sums && needs_ranges(group);
    if (!prepare_phase(walk, step, group, input, tokens, nullptr, of_share)) return false;
    const std::vector<Chunk>& chunks = tokens <= kFewTokens ? group.few : group.many;
    const int blocks = chunk_count(tokens, kTokenBlock);
    const size_t ld = group.linears.front().keeps_sums ? part_width(group.linears.front()) : group.outputs();
    return walk.phase(static_cast<int>(chunks.size()) * blocks, [&](int i) {
        const Chunk& chunk = chunks[i / blocks];
        const int t0 = i % blocks * kTokenBlock, t1 = std::min(tokens, t0 + kTokenBlock);
        size_t column = chunk.begin;
        for (int j = 0; j < chunk.linear; j++) column += group.linears[j].outputs;
        Scratch& scratch = scratch_[walk.thread()];
        const auto& prepared = prepared_for(scratch, step, group, use, input, tokens, nullptr);
        by_rows(chunk, tokens, [&](int n, int count) {
            float* out = output + t0 * ld + column + (n - chunk.begin);
            float* to = adds ? scratch.first.data() : out;
            const size_t ldy = adds ? count : ld;
            group.multiply(kernels_, chunk.linear, n, count, t0, t1, step.batch.generated, prepared, is_packed(tokens),
                           scratch, to, ldy);
            for (int t = 0; adds && t < t1 - t0; t++) kernels_.add(out + t * ld, to + t * ldy, count);
        });
    }, [&] { if (step.alone) next.prefetch(walk.thread()); });
}

// x += a linear of the input. Of several ranks each has a share of the inputs, those between two of the cuts.
bool Model::adding_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                          const std::vector<int>& cuts, const Group& next) {
    if (!is_shared()) return linear_phases(walk, step, group, use, input, x_.data(), true, next);
    if (group.has_floating()) return gathering_phases(walk, step, group, use, input, cuts, next);
    if (needs_ranges(group) && !meet_ranges(walk, step, input, group.inputs())) return false;
    auto* part = static_cast<float*>(exchange_->mine());
    return linear_phases(walk, step, group, use, input, part, false, next) && add_parts(walk, step, group);
}

bool Model::gated_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const Group& next) {
    const int tokens = step.batch.tokens;
    if (!prepare_phase(walk, step, group, x_.data(), tokens, nullptr)) return false;
    const std::vector<Chunk>& chunks = tokens <= kFewTokens ? group.few : group.many;
    const int blocks = chunk_count(tokens, kTokenBlock);
    const size_t ld = config_.intermediate;
    return walk.phase(static_cast<int>(chunks.size()) * blocks, [&](int i) {
        const Chunk& chunk = chunks[i / blocks];
        const int t0 = i % blocks * kTokenBlock, t1 = std::min(tokens, t0 + kTokenBlock);
        Scratch& scratch = scratch_[walk.thread()];
        const auto& prepared = prepared_for(scratch, step, group, use, x_.data(), tokens, nullptr);
        float *gate = scratch.first.data(), *up = scratch.second.data();
        by_rows(chunk, tokens, [&](int n, int count) {
            for (int j = 0; j < 2; j++) {
                group.multiply(kernels_, j, n, count, t0, t1, step.batch.generated, prepared, is_packed(tokens),
                               scratch, j == 0 ? gate : up, count);
            }
            for (int t = 0; t < t1 - t0; t++) {
                kernels_.silu_mul(gate + t * count, up + t * count, count, act_.data() + (t0 + t) * ld + n);
            }
        });
    }, [&] { if (step.alone) next.prefetch(walk.thread()); });
}

}  // namespace eightfold
