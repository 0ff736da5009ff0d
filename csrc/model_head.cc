// What follows the last layer: logits, or the likeliest token alone.
//
// A row of a float head is w = s q + e with q in int8, and a token's normed state x = t p + f with p in 16 bit. So
//
//   | w x - s t (q p) |  <=  |e| |x| + |s q| |f|            (Cauchy and Schwarz; |f| <= t sqrt(K) / 2)
//
// and only tokens whose upper bound reaches the largest lower bound can be the likeliest. Their exact logits decide, so
// the answer is the one that all logits give, for half of the bytes of a bfloat16 head.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "model.h"

namespace eightfold {

namespace {

// Lets go of the pages that lie wholly inside some bytes of a mapped file.
void forget(const void* at, size_t bytes) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto first = (reinterpret_cast<uintptr_t>(at) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(at) + bytes) / page * page;
    if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

}  // namespace

bool Model::head_phases(Pool::Walk& walk, const Step& step, HeadRows rows) {
    if (rows.count == 0) return true;
    if (!prepare_phase(walk, step, head, x_.data(), rows.count, rows.tokens)) return false;
    const std::vector<Chunk>& chunks = rows.count <= kFewTokens ? head.few : head.many;
    const int blocks = chunk_count(rows.count, kTokenBlock);
    const size_t ld = config_.vocab;
    if (!walk.phase(static_cast<int>(chunks.size()) * blocks, [&](int i) {
            const Chunk& chunk = chunks[i / blocks];
            const int t0 = i % blocks * kTokenBlock, t1 = std::min(rows.count, t0 + kTokenBlock);
            Scratch& scratch = scratch_[walk.thread()];
            const int use = 4 * config_.layers + (rows.tokens == step.batch.logit_tokens ? 0 : 1);
            const auto& prepared = prepared_for(scratch, step, head, use, x_.data(), rows.count, rows.tokens);
            uint8_t generated[kTokenBlock];
            for (int t = t0; t < t1; t++) generated[t - t0] = step.batch.generated[rows.tokens[t]];
            by_rows(chunk, rows.count, [&](int n, int count) {
                head.multiply(kernels_, 0, n, count, t0, t1, generated - t0, prepared, is_packed(rows.count), false,
                              scratch, rows.logits + t0 * ld + n, ld);
            });
        })) {
        return false;
    }
    if (is_shared()) return true;  // the likeliest is found when all logits are there
    return walk.phase(rows.count, [&](int t) { rows.best[t] = kernels_.argmax(rows.logits + t * ld, config_.vocab); });
}

bool Model::choice_phases(Pool::Walk& walk, const Step& step) {
    const int rows = step.batch.choice_rows;
    if (rows == 0) return true;
    if (!prepare_phase(walk, step, shadow_, x_.data(), rows, step.batch.choice_tokens)) return false;
    const std::vector<Chunk>& chunks = rows <= kFewTokens ? shadow_.few : shadow_.many;
    const int blocks = chunk_count(rows, kTokenBlock);
    if (!walk.phase(static_cast<int>(chunks.size()) * blocks, [&](int i) {
            const int t0 = i % blocks * kTokenBlock, t1 = std::min(rows, t0 + kTokenBlock);
            find_candidates(step, chunks[i / blocks], t0, t1, scratch_[walk.thread()]);
        })) {
        return false;
    }
    return walk.phase(rows, [&](int row) { settle(step, row, scratch_[walk.thread()]); });
}

void Model::find_candidates(const Step& step, const Chunk& chunk, int t0, int t1, Scratch& scratch) {
    const int rows = step.batch.choice_rows, use = 4 * config_.layers + 2;
    const auto& prepared = prepared_for(scratch, step, shadow_, use, x_.data(), rows, step.batch.choice_tokens);
    constexpr float infinity = std::numeric_limits<float>::infinity();
    if (scratch.choices_for != step.id) {
        scratch.choices_for = step.id;
        scratch.floors.assign(rows, -infinity);
        if (scratch.candidates.size() < static_cast<size_t>(rows)) scratch.candidates.resize(rows);
        for (int t = 0; t < rows; t++) scratch.candidates[t].clear();
        scratch.upper.resize(kProducts);
    }
    const float half_root = 0.5005f * std::sqrt(static_cast<float>(config_.hidden));
    by_rows(chunk, rows, [&](int n, int count) {
        float* y = scratch.first.data();
        shadow_.multiply(kernels_, 0, n, count, t0, t1, nullptr, prepared, is_packed(rows), false, scratch, y, count);
        for (int t = t0; t < t1; t++, y += count) {
            const RowParams& x = prepared[shadow_.form_of[0]].params[t];
            std::vector<Candidate>& found = scratch.candidates[t];
            if (!(x.norm < 1e18f)) {  // bounds mean nothing: all are candidates
                for (int i = 0; i < count; i++) found.push_back({infinity, n + i});
                continue;
            }
            float* upper = scratch.upper.data();
            const Bounds all = kernels_.bounds(y, count, shadow_error_.data() + n, shadow_norm_.data() + n, x.norm,
                                               x.scale * half_root, upper);
            float& floor = scratch.floors[t];
            floor = std::max(floor, all.lower);
            for (int i = 0; all.upper >= floor && i < count; i++) {
                if (upper[i] >= floor) found.push_back({upper[i], n + i});
            }
        }
    });
}

// The exact logits of a row's candidates, and the largest of them.
void Model::settle(const Step& step, int row, Scratch& scratch) {
    const int rows = step.batch.choice_rows, use = 4 * config_.layers + 2;
    float floor = -std::numeric_limits<float>::infinity();
    for (const Scratch& from : scratch_) {
        if (from.choices_for == step.id) floor = std::max(floor, from.floors[row]);
    }
    std::vector<int32_t>& indices = scratch.indices;
    indices.clear();
    for (const Scratch& from : scratch_) {
        if (from.choices_for != step.id) continue;
        for (const Candidate& candidate : from.candidates[row]) {
            if (candidate.upper >= floor) indices.push_back(candidate.index);
        }
    }
    const auto& prepared = prepared_for(scratch, step, shadow_, use, x_.data(), rows, step.batch.choice_tokens);
    const Linear& exact = shadow_.linears[1];
    const float* x = prepared[shadow_.form_of[1]].real.data() + static_cast<size_t>(row) * exact.inputs;
    float most = -std::numeric_limits<float>::infinity();
    int32_t best = -1;
    constexpr int size = 64;
    float logits[size];
    for (size_t i = 0; i < indices.size(); i += size) {
        const int count = static_cast<int>(std::min<size_t>(size, indices.size() - i));
        kernels_.dot_rows(exact.weight, exact.dtype, exact.inputs, indices.data() + i, count, x, exact.inputs, logits);
        for (int j = 0; j < count; j++) {  // NaN is never the largest
            const int32_t index = indices[i + j];
            if (logits[j] > most || (logits[j] == most && (best < 0 || index < best))) {
                most = logits[j];
                best = index;
            }
        }
    }
    choose(step, row, most, best);
}

void Model::make_shadow() {
    const Linear& from = head.linears.front();
    if (head.linears.size() != 1 || from.kind != LinearKind::floating || !from.bias.empty()) return;
    const size_t rows = from.outputs, inputs = from.inputs;
    shadow_weight_.resize(rows * inputs);
    shadow_error_.resize(rows);
    shadow_norm_.resize(rows);
    Linear linear;
    linear.kind = LinearKind::w8a16;
    linear.outputs = from.outputs;
    linear.inputs = from.inputs;
    linear.weight = shadow_weight_.data();
    linear.scale.resize(rows);
    linear.weight_sum.resize(rows);
    shadow_.linears = {std::move(linear), from};
    shadow_.gain = head.gain;
    shadow_.norm_bias = head.norm_bias;
    shadow_.eps = head.eps;
    shadow_.wants_norm = true;
    shadow_.find_forms();
    shadow_.cut(threads(), true);
    shadow_.is_paired = false;  // of the second, rows are read one by one
}

void Model::shadow_rows(int begin, int end, bool forgets) {
    if (shadow_.linears.empty()) return;
    Linear& to = shadow_.linears[0];
    const size_t inputs = to.inputs, row = inputs * (shadow_.linears[1].dtype == DType::f32 ? 4 : 2);
    const auto* from = static_cast<const char*>(shadow_.linears[1].weight);
    auto* weight = const_cast<int8_t*>(static_cast<const int8_t*>(to.weight));
    for (int n = begin; n < end; n++) {
        const ShadowRow made =
            kernels_.shadow_row(from + n * row, shadow_.linears[1].dtype, to.inputs, weight + n * inputs);
        to.scale[n] = made.scale;
        to.weight_sum[n] = made.sum;
        shadow_error_[n] = made.error;
        shadow_norm_[n] = made.norm;
    }
    if (forgets) forget(from + begin * row, static_cast<size_t>(end - begin) * row);
}

}  // namespace eightfold
