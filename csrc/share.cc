#include "share.h"

#include <algorithm>

#include "head.h"

namespace eightfold {

namespace {

constexpr int kColumns = 2048;  // of a row, summed at a time

}  // namespace

void Share::take(Group& group) {
    Linear& linear = group.linears.front();
    linear.keeps_sums = config_.is_shared() && linear.kind != LinearKind::floating;
    has_ranges_ |= needs_ranges(group);
    widest_part_ = std::max({widest_part_, part_width(linear), static_cast<size_t>(linear.inputs)});
    if (linear.kind == LinearKind::floating) gathered_width_ = std::max(gathered_width_, linear.inputs);
}

void Share::reserve_tokens(int tokens) {
    if (config_.is_shared()) gathered_.resize(static_cast<size_t>(tokens) * gathered_width_);
}

void Share::reserve_parts(const Batch& batch, size_t numbers) {
    const size_t heads = config_.shape.heads + config_.shape.kv_heads;
    const size_t hidden = batch.tokens * std::max({widest_part_, size_t(config_.hidden), heads}) * sizeof(float);
    const size_t logits = static_cast<size_t>(batch.logit_rows) * widest(config_.vocab_cuts) * sizeof(float);
    const size_t bytes = std::max({hidden, logits, batch.choice_rows * sizeof(Choice), numbers * sizeof(float)});
    if (bytes <= exchange_->capacity()) return;
    pool_.quiesce();
    exchange_->reserve(bytes);
}

void Share::rethrow_failure(uint64_t run) const {
    if (failed_.load() == run) std::rethrow_exception(failure_);
}

bool Share::needs_ranges(const Group& group) const {
    const LinearKind kind = group.linears.front().kind;
    return config_.is_shared() && kind != LinearKind::floating && kind != LinearKind::w8a8;
}

int Share::owner_of(int token) const {
    const std::vector<int>& cuts = config_.vocab_cuts;
    return static_cast<int>(std::upper_bound(cuts.begin(), cuts.end(), token) - cuts.begin()) - 1;
}

size_t Share::part_width(const Linear& linear) const {
    constexpr size_t line = kAlign / sizeof(int32_t);
    const size_t outputs = linear.outputs;
    return linear.kind == LinearKind::w8a16 ? 2 * outputs + line : outputs;
}

int Share::widest(const std::vector<int>& cuts) const {
    int most = 0;
    for (int r = 0; r < config_.ranks(); r++) most = std::max(most, cuts[r + 1] - cuts[r]);
    return most;
}

bool Share::gather_embedding(Pool::Walk& walk, const Run& run, float* x) {
    const size_t size = config_.hidden;
    if (!meet(walk, run, run.batch.tokens * size * sizeof(float))) return false;
    return walk.phase(run.batch.tokens, [&](int t) {
        const auto* rows = part_of<float>(owner_of(run.batch.token_ids[t]));
        std::copy_n(rows + t * size, size, x + t * size);
    });
}

bool Share::meet_ranges(Pool::Walk& walk, const Run& run, const Group& group, const float* x) {
    const int width = group.inputs();
    const auto show = [&](int t) {
        const float* row = x + static_cast<size_t>(t) * width;
        float lo[kLanes] = {}, hi[kLanes] = {};  // side by side, so that they need not wait for each other
        const auto take = [&](int i, int lane) {
            lo[lane] = row[i] < lo[lane] ? row[i] : lo[lane];
            hi[lane] = row[i] > hi[lane] ? row[i] : hi[lane];
        };
        int i = 0;
        for (; i + kLanes <= width; i += kLanes)
            for (int lane = 0; lane < kLanes; lane++) take(i + lane, lane);
        for (; i < width; i++) take(i, 0);
        static_cast<Range*>(exchange_->mine())[t] = {*std::min_element(lo, lo + kLanes),
                                                     *std::max_element(hi, hi + kLanes)};
    };
    return walk.phase(run.batch.tokens, show) && meet(walk, run, run.batch.tokens * sizeof(Range));
}

void Share::prepare(const Group& group, Token token, Layout layout, std::vector<Prepared>& prepared, Scratch& scratch) {
    const Linear& linear = group.linears.front();
    if (linear.reads_static(token.origin)) return group.prepare(kernels_, token, layout, prepared, scratch);
    const int width = group.inputs(), many = planes(linear.kind), t = token.t;
    const size_t ld = row_bytes(width), wide = row_bytes(width + 2);
    // Two more inputs, the least and the largest of all ranks'. No weight meets them.
    scratch.row.assign(token.x, token.x + width);
    Range range{0, 0};
    for (int r = 0; r < exchange_->ranks(); r++) {
        const Range of = part_of<Range>(r)[t];
        range = {std::min(range.lo, of.lo), std::max(range.hi, of.hi)};
    }
    scratch.row.insert(scratch.row.end(), {range.lo, range.hi});
    scratch.wide.resize(2 * wide);
    uint8_t *high = scratch.wide.data(), *low = high + wide;
    RowParams& params = prepared[0].params[t];
    if (linear.kind == LinearKind::w8a16) {
        params = kernels_.quantize_16(scratch.row.data(), width + 2, high, low);
        for (int i = width; i < width + 2; i++) params.sum -= of_halves(high[i], low[i], kernels_.zero);
        static_cast<int32_t*>(exchange_->mine())[t * part_width(linear) + 2 * linear.outputs] = params.sum;
    } else {
        params = kernels_.quantize_token(scratch.row.data(), width + 2, config_.symmetric_tokens, high);
    }
    std::fill(high + width, high + ld, static_cast<uint8_t>(kernels_.zero));
    std::fill(low + width, low + ld, 0);
    const bool packed = layout == Layout::packed;
    if (packed) scratch.rows.resize(2 * kLanes * ld);
    uint8_t* to =
        packed ? scratch.rows.data() + t % kLanes * ld : prepared[0].bytes.data() + static_cast<size_t>(t) * many * ld;
    std::copy_n(high, ld, to);
    if (many == 2) std::copy_n(low, ld, to + (packed ? kLanes : 1) * ld);
}

bool Share::take_sums(Pool::Walk& walk, const Run& run, const Group& group, const Prepared& prepared, Output out) {
    const Linear& linear = group.linears.front();
    if (!meet(walk, run, run.batch.tokens * part_width(linear) * sizeof(float))) return false;
    return walk.phase(run.batch.tokens, [&](int t) {
        take_row(linear, run.batch.origin(t), summed_params(linear, prepared, t), t, out);
    });
}

// Of a row of the input of all ranks.
RowParams Share::summed_params(const Linear& linear, const Prepared& prepared, int t) const {
    RowParams params = prepared.params[t];
    params.sum = 0;
    for (int r = 0; linear.kind == LinearKind::w8a16 && r < exchange_->ranks(); r++) {
        params.sum += part_of<int32_t>(r)[t * part_width(linear) + 2 * linear.outputs];
    }
    return params;
}

// Sums wrap around as the products do.
void Share::sum_terms(size_t from, int count, int32_t* to) const {
    std::copy_n(part_of<int32_t>(0) + from, count, to);
    for (int r = 1; r < exchange_->ranks(); r++) {
        const uint32_t* part = part_of<uint32_t>(r) + from;
        for (int i = 0; i < count; i++) to[i] = static_cast<int32_t>(static_cast<uint32_t>(to[i]) + part[i]);
    }
}

void Share::take_row(const Linear& linear, Origin origin, RowParams params, int t, Output out) const {
    static const std::vector<int32_t> zeros(kColumns);
    const size_t row = t * part_width(linear);
    float* to = out.y + static_cast<size_t>(t) * out.ld;
    alignas(kAlign) int32_t sums[kColumns], low[kColumns];
    for (int n = 0; n < linear.outputs; n += kColumns) {
        const int count = std::min(kColumns, linear.outputs - n);
        sum_terms(row + n, count, sums);
        if (linear.reads_static(origin)) {
            kernels_.finish_static(sums, count, zeros.data(), linear.deq_scale.data() + n, out.adds, to + n);
        } else if (linear.kind == LinearKind::w8a16) {
            sum_terms(row + linear.outputs + n, count, low);
            const float* offset = linear.offset.empty() ? nullptr : linear.offset.data() + n;
            const Scales16 scales{zeros.data(), linear.scale.data() + n, offset, linear.bias_at(n)};
            kernels_.finish_16(sums, low, count, scales, params, out.adds, to + n);
        } else {
            kernels_.finish_token(sums, count, zeros.data(), linear.scale.data() + n, linear.bias_at(n), params,
                                  out.adds, to + n);
        }
    }
}

bool Share::gather_inputs(Pool::Walk& walk, const Run& run, const float* x, const std::vector<int>& cuts) {
    const size_t all = cuts.back(), own = cuts[rank() + 1] - cuts[rank()];
    const int tokens = run.batch.tokens;
    const auto show = [&](size_t t) { std::copy_n(x + t * own, own, part() + t * own); };
    if (!walk.phase(tokens, show)) return false;
    if (!meet(walk, run, static_cast<size_t>(tokens) * widest(cuts) * sizeof(float))) return false;
    return walk.phase(tokens, [&](size_t t) {
        each_part(cuts, t, [&](size_t at, const float* from, size_t count) {
            std::copy_n(from, count, gathered_.data() + t * all + at);
        });
    });
}

bool Share::take_outputs(Pool::Walk& walk, const Run& run, Output out) {
    const std::vector<int>& cuts = config_.hidden_cuts;
    const size_t tokens = run.batch.tokens;
    if (!meet(walk, run, tokens * widest(cuts) * sizeof(float))) return false;
    return walk.phase(run.batch.tokens, [&](size_t t) {
        each_part(cuts, t, [&](size_t at, const float* from, size_t count) {
            float* to = out.y + t * out.ld + at;
            if (out.adds) kernels_.add(to, from, static_cast<int>(count));
            else std::copy_n(from, count, to);
        });
    });
}

bool Share::gather_logits(Pool::Walk& walk, const Run& run) {
    const Batch& batch = run.batch;
    const std::vector<int>& cuts = config_.vocab_cuts;
    if (!meet(walk, run, static_cast<size_t>(batch.logit_rows) * widest(cuts) * sizeof(float))) return false;
    if (rank() != 0) return true;
    const size_t all = cuts.back();
    return walk.phase(batch.logit_rows, [&](int row) {
        float* to = batch.logits + row * all;
        each_part(cuts, row, [&](size_t at, const float* from, size_t count) { std::copy_n(from, count, to + at); });
        finish_logits(kernels_, config_.switches, to, static_cast<int>(all), batch.best[row]);
    });
}

bool Share::gather_choices(Pool::Walk& walk, const Run& run) {
    const Batch& batch = run.batch;
    if (!meet(walk, run, batch.choice_rows * sizeof(Choice))) return false;
    if (rank() != 0) return true;
    return walk.phase(batch.choice_rows, [&](int row) {
        Choice best{0, -1};
        for (int r = 0; r < config_.ranks(); r++) {
            const Choice from = part_of<Choice>(r)[row];
            if (from.token >= 0 && (best.token < 0 || from.logit > best.logit)) {
                best = {from.logit, from.token + config_.vocab_cuts[r]};
            }
        }
        batch.choices[row] = std::max(best.token, 0);
    });
}

}  // namespace eightfold
