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
    const Group& last = step.batch.logit_rows > 0 || shadow_.linears.empty() ? head : shadow_;
    if (is_shared() && !gather_embedding(walk, step)) return;
    for (int i = 0; i < config_.layers; i++) {
        const Layer& layer = layers[i];
        const Group& after = i + 1 < config_.layers ? layers[i + 1].qkv : last;
        if (!linear_phases(walk, step, layer.qkv, 4 * i, x_.data(), qkv_.data(), false, {nullptr, i})) return;
        if (!attention_phases(walk, step, i, layer.o)) return;
        if (!adding_phases(walk, step, layer.o, 4 * i + 1, heads_.data(), head_cuts_, hands_heads(step, layer),
                           layer.gate_up)) {
            return;
        }
        if (!gated_phases(walk, step, layer, 4 * i + 2)) return;
        if (!adding_phases(walk, step, layer.down, 4 * i + 3, act_.data(), config_.intermediate_cuts,
                           hands_gated(step, layer), after)) {
            return;
        }
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

void Model::multiply_chunk(const Step& step, const Group& group, int i, const std::vector<Prepared>& prepared,
                           float* output, bool adds, Scratch& scratch) {
    const int tokens = step.batch.tokens, blocks = chunk_count(tokens, kTokenBlock);
    const Chunk& chunk = group.chunks(tokens)[i / blocks];
    const int t0 = i % blocks * kTokenBlock, t1 = std::min(tokens, t0 + kTokenBlock);
    if (is_packed(tokens)) group.prefetch(tokens, i + threads());
    const Linear& first = group.linears.front();
    const size_t ld = first.keeps_sums ? part_width(first) : group.outputs();
    size_t column = chunk.begin;
    for (int j = 0; j < chunk.linear; j++) column += group.linears[j].outputs;
    by_rows(chunk, tokens, [&](int n, int count) {
        group.multiply(kernels_, chunk.linear, n, count, t0, t1, step.batch.generated, prepared, is_packed(tokens),
                       adds, scratch, output + t0 * ld + column + (n - chunk.begin), ld);
    });
}

bool Model::linear_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                          float* output, bool adds, Next next) {
    const int tokens = step.batch.tokens;
    const bool of_share = group.linears.front().keeps_sums && needs_ranges(group);
    if (!prepare_phase(walk, step, group, input, tokens, nullptr, of_share)) return false;
    const int chunks = static_cast<int>(group.chunks(tokens).size());
    return walk.phase(
        chunks * chunk_count(tokens, kTokenBlock),
        [&](int i) {
            Scratch& scratch = scratch_[walk.thread()];
            const auto& prepared = prepared_for(scratch, step, group, use, input, tokens, nullptr);
            multiply_chunk(step, group, i, prepared, output, adds, scratch);
        },
        [&] {
            if (next.group != nullptr) next.group->prefetch(tokens, walk.thread());
            else if (step.single) prefetch_unit(step, next.layer, walk.thread() * step.turn);
        });
}

bool Model::takes_handed(const Step& step, const Group& group) const {
    return is_packed(step.batch.tokens) && group.linears.size() == 1 && group.linears[0].kind == LinearKind::w8a8;
}

bool Model::handed_phase(Pool::Walk& walk, const Step& step, const Group& group, float* output, bool adds,
                         const Group& next) {
    const int tokens = step.batch.tokens, chunks = static_cast<int>(group.chunks(tokens).size());
    return walk.phase(
        chunks * chunk_count(tokens, kTokenBlock),
        [&](int i) { multiply_chunk(step, group, i, handed_, output, adds, scratch_[walk.thread()]); },
        [&] { next.prefetch(tokens, walk.thread()); });
}

// x += a linear of the input. Of several ranks each has a share of the inputs, those between two of the cuts. `handed`:
// the input is in handed_.
bool Model::adding_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                          const std::vector<int>& cuts, bool handed, const Group& next) {
    const auto multiply = [&](float* output, bool adds) {
        if (handed) return handed_phase(walk, step, group, output, adds, next);
        return linear_phases(walk, step, group, use, input, output, adds, {&next, 0});
    };
    if (!is_shared()) return multiply(x_.data(), true);
    if (group.has_floating()) return gathering_phases(walk, step, group, use, input, cuts, next);
    if (needs_ranges(group) && !meet_ranges(walk, step, input, group.inputs())) return false;
    return multiply(static_cast<float*>(exchange_->mine()), false) && add_parts(walk, step, group);
}

bool Model::gated_phases(Pool::Walk& walk, const Step& step, const Layer& layer, int use) {
    const int tokens = step.batch.tokens;
    const Group& group = layer.gate_up;
    if (!prepare_phase(walk, step, group, x_.data(), tokens, nullptr)) return false;
    const std::vector<Chunk>& chunks = group.chunks(tokens);
    const int blocks = chunk_count(tokens, kTokenBlock);
    const size_t ld = config_.intermediate;
    const bool hands = hands_gated(step, layer);
    return walk.phase(
        static_cast<int>(chunks.size()) * blocks,
        [&](int i) {
            const Chunk& chunk = chunks[i / blocks];
            const int t0 = i % blocks * kTokenBlock, t1 = std::min(tokens, t0 + kTokenBlock);
            if (is_packed(tokens)) group.prefetch(tokens, i + threads());
            Scratch& scratch = scratch_[walk.thread()];
            const auto& prepared = prepared_for(scratch, step, group, use, x_.data(), tokens, nullptr);
            if (is_packed(tokens) && group.gates(hands ? &layer.down : nullptr)) {
                by_rows(chunk, tokens, [&](int n, int count) {
                    if (hands) group.gate(kernels_, n, count, t0, t1, prepared, layer.down, handed_[0]);
                    else group.gate(kernels_, n, count, t0, t1, prepared, act_.data() + t0 * ld + n, ld);
                });
                return;
            }
            float *gate = scratch.first.data(), *up = scratch.second.data();
            by_rows(chunk, tokens, [&](int n, int count) {
                for (int j = 0; j < 2; j++) {
                    group.multiply(kernels_, j, n, count, t0, t1, step.batch.generated, prepared, is_packed(tokens),
                                   false, scratch, j == 0 ? gate : up, count);
                }
                for (int t = 0; t < t1 - t0; t++) {
                    float* to = hands ? gate + t * count : act_.data() + (t0 + t) * ld + n;
                    kernels_.silu_mul(gate + t * count, up + t * count, count, to);
                }
                if (hands) hand_gated(layer.down, t0, t1, n, count, gate, scratch);
            });
        },
        [&] { layer.down.prefetch(tokens, walk.thread()); });
}

// Columns n .. n + count of the input of a linear, for tokens [t0, t1): `gated` (t1 - t0, count), count <= kManyRows.
void Model::hand_gated(const Group& next, int t0, int t1, int n, int count, const float* gated, Scratch& scratch) {
    const Form& form = next.forms[0];
    scratch.rows.resize(std::max(scratch.rows.size(), static_cast<size_t>(kTokenBlock) * kManyRows));
    for (int t = 0; t < t1 - t0; t++) {
        kernels_.quantize_static(gated + t * count, count, form.inv_scale, form.offset,
                                 scratch.rows.data() + t * kManyRows);
    }
    const size_t block = kLanes * row_bytes(next.inputs());
    for (int t = t0; t < t1; t += kLanes) {
        kernels_.pack(scratch.rows.data() + static_cast<size_t>(t - t0) * kManyRows, kManyRows,
                      handed_[0].bytes.data() + t / kLanes * block + static_cast<size_t>(n) * kLanes);
    }
}

}  // namespace eightfold
