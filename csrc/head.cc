#include "head.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace eightfold {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kExact = 64;  // exact logits that are computed at a time

// Lets go of the pages that lie wholly inside some bytes of a mapped file.
void forget(const void* at, size_t bytes) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto first = (reinterpret_cast<uintptr_t>(at) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(at) + bytes) / page * page;
    if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

// How far below the largest logit the next one is looked for.
float depth_of(const Batch& batch) { return batch.margins != nullptr ? kMostMargin : 0; }

float largest_but(const float* logits, int count, int32_t token) {
    float largest = -kInfinity;
    for (int i = 0; i < count; i++) {
        if (i != token) largest = std::max(largest, logits[i]);
    }
    return largest;
}

}  // namespace

void finish_logits(const Kernels& kernels, const Switches& switches, float* logits, int vocab, int32_t& best) {
    best = kernels.argmax(logits, vocab);
    const float multiplier = switches.logits_multiplier, cap = switches.logits_softcap;
    if (multiplier != 1) kernels.scale_heads(logits, vocab, multiplier, nullptr, nullptr, logits);
    if (cap != 0) kernels.soften(logits, vocab, cap);
}

void Head::make_shadow() {
    const Linear& from = group_.linears.front();
    if (group_.linears.size() != 1 || from.kind != LinearKind::floating || !from.bias.empty()) return;
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
    shadow_.gain = group_.gain;
    shadow_.norm_bias = group_.norm_bias;
    shadow_.wants_norm = true;
    shadow_.cut = Cut::first;
    products_.take(shadow_);
}

void Head::shadow_rows(int begin, int end, HeadPages pages) {
    if (!has_shadow()) return;
    Linear& to = shadow_.linears[0];
    const DType dtype = shadow_.linears[1].dtype;
    const size_t inputs = to.inputs, row = inputs * (dtype == DType::f32 ? 4 : 2);
    const auto* from = static_cast<const char*>(shadow_.linears[1].weight);
    for (int n = begin; n < end; n++) {
        int8_t* weight = shadow_weight_.data() + n * inputs;
        const ShadowRow made = kernels_.shadow_row(from + n * row, dtype, to.inputs, weight);
        to.scale[n] = made.scale;
        to.weight_sum[n] = made.sum;
        shadow_error_[n] = made.error;
        shadow_norm_[n] = made.norm;
    }
    if (pages == HeadPages::released) forget(from + begin * row, static_cast<size_t>(end - begin) * row);
}

void Head::reserve(const Batch& batch) {
    const size_t size = static_cast<size_t>(batch.choice_rows) * config_.vocab;
    if (has_shadow() || choice_logits_.size() >= size) return;
    pool_.quiesce();
    choice_logits_.resize(size);
}

size_t Head::weight_bytes() const {
    if (has_shadow()) return shadow_.linears.front().weight_bytes();
    size_t total = 0;
    for (const Linear& linear : group_.linears) total += linear.weight_bytes();
    return total;
}

bool Head::find(Pool::Walk& walk, const Run& run, const float* x) {
    return find_logits(walk, run, x) && find_choices(walk, run, x);
}

bool Head::find_logits(Pool::Walk& walk, const Run& run, const float* x) {
    const Batch& batch = run.batch;
    if (batch.logit_rows == 0) return true;
    const bool is_shared = config_.is_shared();
    float* logits = is_shared ? share_.part() : batch.logits;
    const Input input{group_, x, batch.logit_rows, batch.logit_tokens};
    const size_t ld = config_.vocab;
    if (!products_.multiply(walk, run, input, {logits, ld, false}, [] {})) return false;
    if (is_shared) return share_.gather_logits(walk, run);
    return walk.phase(batch.logit_rows, [&](int row) {
        finish_logits(kernels_, config_.switches, logits + row * ld, config_.vocab, batch.best[row]);
    });
}

bool Head::find_choices(Pool::Walk& walk, const Run& run, const float* x) {
    const Batch& batch = run.batch;
    if (batch.choice_rows == 0) return true;
    const bool goes_on = has_shadow()
                             ? choose_by_shadow(walk, run, {shadow_, x, batch.choice_rows, batch.choice_tokens})
                             : choose_by_logits(walk, run, x);
    return goes_on && (!config_.is_shared() || share_.gather_choices(walk, run));
}

bool Head::choose_by_logits(Pool::Walk& walk, const Run& run, const float* x) {
    const Batch& batch = run.batch;
    float* logits = choice_logits_.data();
    const size_t ld = config_.vocab;
    const Input input{group_, x, batch.choice_rows, batch.choice_tokens};
    return products_.multiply(walk, run, input, {logits, ld, false}, [] {}) &&
           walk.phase(batch.choice_rows, [&](int row) {
               const float* from = logits + row * ld;
               const int32_t best = kernels_.argmax(from, config_.vocab);
               const bool is_any = !config_.is_shared() || !std::isnan(from[best]);
               const float next = batch.margins != nullptr ? largest_but(from, config_.vocab, best) : -kInfinity;
               choose(run, row, {from[best], is_any ? best : -1, next});
           });
}

bool Head::choose_by_shadow(Pool::Walk& walk, const Run& run, const Input& input) {
    return products_.prepare(walk, run, input) && walk.phase(shadow_.chunk_total(input.tokens), [&](int i) {
        find_candidates(run, input, i, walk.thread());
    }) && walk.phase(input.tokens, [&](int row) { settle(run, input, row, walk.thread()); });
}

void Head::begin(Found& found, const Run& run) const {
    if (found.run == run.id) return;
    const int rows = run.batch.choice_rows;
    found.run = run.id;
    found.floors.assign(rows, -kInfinity);
    if (found.candidates.size() < static_cast<size_t>(rows)) found.candidates.resize(rows);
    for (int row = 0; row < rows; row++) found.candidates[row].clear();
    found.upper.resize(kProducts);
}

void Head::find_candidates(const Run& run, const Input& input, int chunk, int thread) {
    const std::vector<Prepared>& prepared = products_.prepared(run, input, thread);
    const Source from{prepared, layout_of(input.tokens), nullptr};
    const std::vector<RowParams>& params = prepared[shadow_.form_of[0]].params;
    Scratch& scratch = products_.scratch(thread);
    Found& found = scratch_[thread];
    begin(found, run);
    const Piece whole = products_.piece_of(input, chunk);
    by_rows({whole.linear, whole.begin, whole.count}, input.tokens, [&](int n, int count) {
        const float* y = scratch.first.data();
        const Output out{scratch.first.data(), static_cast<size_t>(count), false};
        shadow_.multiply(kernels_, {0, n, count, whole.t0, whole.t1}, from, out, scratch);
        for (int t = whole.t0; t < whole.t1; t++, y += count) {
            add_candidates(found, t, params[t], y, n, count, depth_of(run.batch));
        }
    });
}

// Of the tokens [begin, begin + count), whose logits are about y: those that may reach the largest less `depth`.
void Head::add_candidates(Found& found, int row, const RowParams& x, const float* y, int begin, int count,
                          float depth) const {
    std::vector<Candidate>& candidates = found.candidates[row];
    if (!(x.norm < 1e18f)) {  // bounds mean nothing: all are candidates
        for (int i = 0; i < count; i++) candidates.push_back({kInfinity, begin + i});
        return;
    }
    const float half_root = 0.5005f * std::sqrt(static_cast<float>(config_.hidden));
    float* upper = found.upper.data();
    const Bounds all = kernels_.bounds(y, count, shadow_error_.data() + begin, shadow_norm_.data() + begin, x.norm,
                                       x.scale * half_root, upper);
    float& floor = found.floors[row];
    floor = std::max(floor, all.lower);
    const float least = floor - depth;
    for (int i = 0; all.upper >= least && i < count; i++) {
        if (upper[i] >= least) candidates.push_back({upper[i], begin + i});
    }
}

void Head::settle(const Run& run, const Input& input, int row, int thread) {
    std::vector<int32_t>& indices = scratch_[thread].indices;
    gather_candidates(run, row, indices);
    const Prepared& prepared = products_.prepared(run, input, thread)[shadow_.form_of[1]];
    const float* x = prepared.real.data() + static_cast<size_t>(row) * shadow_.inputs();
    choose(run, row, largest_of(indices, x));
}

// Those of all threads that reach the highest floor, or nearly.
void Head::gather_candidates(const Run& run, int row, std::vector<int32_t>& indices) const {
    float floor = -kInfinity;
    for (const Found& from : scratch_) {
        if (from.run == run.id) floor = std::max(floor, from.floors[row]);
    }
    floor -= depth_of(run.batch);
    indices.clear();
    for (const Found& from : scratch_) {
        if (from.run != run.id) continue;
        for (const Candidate& candidate : from.candidates[row]) {
            if (candidate.upper >= floor) indices.push_back(candidate.index);
        }
    }
}

// By the exact logits of a normed state x (E).
Head::Choice Head::largest_of(const std::vector<int32_t>& indices, const float* x) const {
    const Linear& exact = shadow_.linears[1];
    Choice best{-kInfinity, -1, -kInfinity};
    float logits[kExact];
    for (size_t i = 0; i < indices.size(); i += kExact) {
        const int count = static_cast<int>(std::min<size_t>(kExact, indices.size() - i));
        kernels_.dot_rows(exact.weight, exact.dtype, exact.inputs, indices.data() + i, count, x, exact.inputs, logits);
        for (int j = 0; j < count; j++) {  // NaN is never the largest
            const int32_t index = indices[i + j];
            const bool is_first = logits[j] == best.logit && (best.token < 0 || index < best.token);
            if (logits[j] > best.logit || is_first) best = {logits[j], index, best.logit};
            else best.next = std::max(best.next, logits[j]);
        }
    }
    return best;
}

// Notes the likeliest token of a row; of several ranks, of this one's tokens.
void Head::choose(const Run& run, int row, Choice choice) {
    if (config_.is_shared()) share_.show_choice(row, choice.logit, choice.token);
    else run.batch.choices[row] = std::max(choice.token, 0);
    if (run.batch.margins != nullptr) run.batch.margins[row] = std::min(choice.logit - choice.next, kMostMargin);
}

}  // namespace eightfold
