// What ranks do together: a model's heads, intermediate channels and vocabulary are cut into one share for each.
//
//   embedding    whoever holds a token's row shows it
//   o, down      every rank has some of the inputs, so its int32 products are one term of a sum, which is what one
//                process has, to the last bit, and becomes real afterwards; floating ones: gathering_phases
//   head         every rank has some of the tokens
//
// Where a token is quantized by its own range, the ranks first tell each other their parts' ranges, for the same reason.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace eightfold {

namespace {

constexpr int kColumns = 2048;  // of a row, summed at a time

}  // namespace

int Model::owner_of(int token) const {
    const std::vector<int>& cuts = config_.vocab_cuts;
    return static_cast<int>(std::upper_bound(cuts.begin(), cuts.end(), token) - cuts.begin()) - 1;
}

int Model::widest_vocab() const {
    int most = 0;
    for (int r = 0; r < config_.ranks(); r++) {
        most = std::max(most, config_.vocab_cuts[r + 1] - config_.vocab_cuts[r]);
    }
    return most;
}

void Model::reserve_parts(const Batch& batch) {
    const size_t hidden = batch.tokens * std::max<size_t>(widest_part_, config_.hidden) * sizeof(float);
    const size_t logits = static_cast<size_t>(batch.logit_rows) * widest_vocab() * sizeof(float);
    const size_t bytes = std::max({hidden, logits, batch.choice_rows * sizeof(Choice)});
    if (bytes <= exchange_->capacity()) return;
    pool_.quiesce();
    exchange_->reserve(bytes);
}

bool Model::meet(Pool::Walk& walk, const Step& step, size_t bytes) {
    return walk.lone([&] {
        try {
            exchange_->meet(bytes);
        } catch (...) {
            failure_ = std::current_exception();
            failed_.store(step.id);
        }
    }) && failed_.load() != step.id;
}

bool Model::gather_embedding(Pool::Walk& walk, const Step& step) {
    const size_t size = config_.hidden;
    if (!meet(walk, step, step.batch.tokens * size * sizeof(float))) return false;
    return walk.phase(step.batch.tokens, [&](int t) {
        const auto* rows = static_cast<const float*>(exchange_->part(owner_of(step.batch.token_ids[t])));
        std::copy_n(rows + t * size, size, x_.data() + t * size);
    });
}

// Whether tokens are quantized by their own range, which is that of the inputs of all ranks.
bool Model::needs_ranges(const Group& group) const {
    const LinearKind kind = group.linears.front().kind;
    return is_shared() && kind != LinearKind::floating && kind != LinearKind::w8a8;
}

bool Model::meet_ranges(Pool::Walk& walk, const Step& step, const float* input, int width) {
    return walk.phase(step.batch.tokens, [&](int t) {
        const float* x = input + static_cast<size_t>(t) * width;
        float lo[kLanes] = {}, hi[kLanes] = {};  // side by side, so that they need not wait for each other
        const auto take = [&](int i, int lane) {
            lo[lane] = x[i] < lo[lane] ? x[i] : lo[lane];
            hi[lane] = x[i] > hi[lane] ? x[i] : hi[lane];
        };
        int i = 0;
        for (; i + kLanes <= width; i += kLanes)
            for (int lane = 0; lane < kLanes; lane++) take(i + lane, lane);
        for (; i < width; i++) take(i, 0);
        static_cast<Range*>(exchange_->mine())[t] = {*std::min_element(lo, lo + kLanes),
                                                     *std::max_element(hi, hi + kLanes)};
    }) && meet(walk, step, step.batch.tokens * sizeof(Range));
}

// Of floating weights sums depend on their order. So ranks have all inputs of some of the outputs: they show each other
// their inputs first, and then what has come of them.
bool Model::gathering_phases(Pool::Walk& walk, const Step& step, const Group& group, int use, const float* input,
                             const std::vector<int>& cuts, const Group& next) {
    const size_t tokens = step.batch.tokens, all = group.inputs(), hidden = config_.hidden;
    const std::vector<int>& outputs = config_.hidden_cuts;
    const int ranks = exchange_->ranks(), own = exchange_->rank();
    const size_t width = cuts[own + 1] - cuts[own];
    const auto widest = [&](const std::vector<int>& of) {
        int most = 0;
        for (int r = 0; r < ranks; r++) most = std::max(most, of[r + 1] - of[r]);
        return tokens * static_cast<size_t>(most) * sizeof(float);
    };
    // Row t of all ranks' parts, one after the other.
    const auto each = [&](const std::vector<int>& of, size_t t, auto take) {
        for (int r = 0; r < ranks; r++) {
            const size_t count = of[r + 1] - of[r];
            take(of[r], static_cast<const float*>(exchange_->part(r)) + t * count, count);
        }
    };
    if (!walk.phase(step.batch.tokens, [&](size_t t) {
            std::copy_n(input + t * width, width, static_cast<float*>(exchange_->mine()) + t * width);
        })) {
        return false;
    }
    if (!meet(walk, step, widest(cuts))) return false;
    if (!walk.phase(step.batch.tokens, [&](size_t t) {
            each(cuts, t, [&](size_t at, const float* from, size_t count) {
                std::copy_n(from, count, gathered_.data() + t * all + at);
            });
        })) {
        return false;
    }
    auto* part = static_cast<float*>(exchange_->mine());
    if (!linear_phases(walk, step, group, use, gathered_.data(), part, false, {&next, 0})) return false;
    if (!meet(walk, step, widest(outputs))) return false;
    return walk.phase(step.batch.tokens, [&](size_t t) {
        each(outputs, t, [&](size_t at, const float* from, size_t count) {
            kernels_.add(x_.data() + t * hidden + at, from, static_cast<int>(count));
        });
    });
}

// As Group::prepare, with two more inputs: the least and the largest of all ranks'. No weight meets them.
void Model::prepare_share(const Group& group, const float* x, int t, bool is_generated, bool packed, Scratch& scratch) {
    const Linear& linear = group.linears.front();
    if (linear.reads_static(is_generated)) {
        return group.prepare(kernels_, x, t, is_generated, config_.symmetric_tokens, packed, prepared_, scratch);
    }
    const int width = group.inputs(), many = planes(linear.kind);
    const size_t ld = row_bytes(width), wide = row_bytes(width + 2);
    scratch.row.assign(x, x + width);
    Range range{0, 0};
    for (int r = 0; r < exchange_->ranks(); r++) {
        const Range of = static_cast<const Range*>(exchange_->part(r))[t];
        range = {std::min(range.lo, of.lo), std::max(range.hi, of.hi)};
    }
    scratch.row.insert(scratch.row.end(), {range.lo, range.hi});
    scratch.wide.resize(2 * wide);
    uint8_t *high = scratch.wide.data(), *low = high + wide;
    RowParams& params = prepared_[0].params[t];
    if (linear.kind == LinearKind::w8a16) {
        params = kernels_.quantize_16(scratch.row.data(), width + 2, high, low);
        for (int i = width; i < width + 2; i++) params.sum -= (high[i] - 128) * 256 + low[i];
        static_cast<int32_t*>(exchange_->mine())[t * part_width(linear) + 2 * linear.outputs] = params.sum;
    } else {
        params = kernels_.quantize_token(scratch.row.data(), width + 2, config_.symmetric_tokens, high);
    }
    std::fill(high + width, high + ld, 128);
    std::fill(low + width, low + ld, 0);
    if (packed) scratch.rows.resize(2 * kLanes * ld);
    uint8_t* to =
        packed ? scratch.rows.data() + t % kLanes * ld : prepared_[0].bytes.data() + static_cast<size_t>(t) * many * ld;
    std::copy_n(high, ld, to);
    if (many == 2) std::copy_n(low, ld, to + (packed ? kLanes : 1) * ld);
}

// Numbers of a token's part: its products, of 16-bit inputs by halves and then the sum of the inputs.
size_t Model::part_width(const Linear& linear) const {
    constexpr size_t line = kAlign / sizeof(int32_t);
    const size_t outputs = linear.outputs;
    return linear.kind == LinearKind::w8a16 ? 2 * outputs + line : outputs;
}

bool Model::add_parts(Pool::Walk& walk, const Step& step, const Group& group) {
    const size_t bytes = step.batch.tokens * part_width(group.linears.front()) * sizeof(float);
    if (!meet(walk, step, bytes)) return false;
    return walk.phase(step.batch.tokens, [&](int t) { add_row(step, group, t, scratch_[walk.thread()]); });
}

// The input's, of all ranks.
RowParams Model::sum_params(const Linear& linear, int t) const {
    RowParams params = prepared_[0].params[t];
    params.sum = 0;
    for (int r = 0; linear.kind == LinearKind::w8a16 && r < exchange_->ranks(); r++) {
        const auto* part = static_cast<const int32_t*>(exchange_->part(r));
        params.sum += part[t * part_width(linear) + 2 * linear.outputs];
    }
    return params;
}

// x[t] += the sum of all ranks' terms.
void Model::add_row(const Step& step, const Group& group, int t, Scratch& scratch) {
    static const std::vector<int32_t> zeros(kColumns);
    const Linear& linear = group.linears.front();
    const size_t row = t * part_width(linear);
    float* x = x_.data() + static_cast<size_t>(t) * linear.outputs;
    const auto sum_of = [&](size_t from, int count, int32_t* to) {
        std::copy_n(static_cast<const int32_t*>(exchange_->part(0)) + row + from, count, to);
        for (int r = 1; r < exchange_->ranks(); r++) {
            const auto* part = static_cast<const uint32_t*>(exchange_->part(r)) + row + from;
            for (int i = 0; i < count; i++) to[i] = static_cast<int32_t>(static_cast<uint32_t>(to[i]) + part[i]);
        }
    };
    int32_t *sums = scratch.sums.data(), *low = sums + kColumns;
    for (int n = 0; n < linear.outputs; n += kColumns) {
        const int count = std::min(kColumns, linear.outputs - n);
        sum_of(n, count, sums);
        if (linear.reads_static(step.batch.generated[t] != 0)) {
            kernels_.finish_static(sums, count, zeros.data(), linear.deq_scale.data() + n, true, x + n);
        } else if (linear.kind == LinearKind::w8a16) {
            sum_of(linear.outputs + n, count, low);
            const float* offset = linear.offset.empty() ? nullptr : linear.offset.data() + n;
            const Scales16 scales{zeros.data(), linear.scale.data() + n, offset, linear.bias_at(n)};
            kernels_.finish_16(sums, low, count, scales, sum_params(linear, t), true, x + n);
        } else {
            kernels_.finish_token(sums, count, zeros.data(), linear.scale.data() + n, linear.bias_at(n),
                                  sum_params(linear, t), true, x + n);
        }
    }
}

// Logits of a share of the tokens, and rank 0 puts those of all together; the same with the likeliest.
bool Model::shared_head_phases(Pool::Walk& walk, const Step& step) {
    const Batch& batch = step.batch;
    auto* part = static_cast<float*>(exchange_->mine());
    if (batch.logit_rows > 0 && !(head_phases(walk, step, {batch.logit_rows, batch.logit_tokens, part, nullptr}) &&
                                  gather_logits(walk, step))) {
        return false;
    }
    if (batch.choice_rows == 0) return true;
    if (!shadow_.linears.empty()) return choice_phases(walk, step) && gather_choices(walk, step);
    float* logits = choice_logits_.data();
    return head_phases(walk, step, {batch.choice_rows, batch.choice_tokens, logits, nullptr}) &&
           walk.phase(batch.choice_rows,
                      [&](int row) {
                          const float* from = logits + static_cast<size_t>(row) * config_.vocab;
                          const int32_t best = kernels_.argmax(from, config_.vocab);
                          choose(step, row, from[best], std::isnan(from[best]) ? -1 : best);
                      }) &&
           gather_choices(walk, step);
}

bool Model::gather_logits(Pool::Walk& walk, const Step& step) {
    const Batch& batch = step.batch;
    if (!meet(walk, step, static_cast<size_t>(batch.logit_rows) * widest_vocab() * sizeof(float))) return false;
    if (exchange_->rank() != 0) return true;
    const size_t all = config_.vocab_cuts.back();
    return walk.phase(batch.logit_rows, [&](int row) {
        float* to = batch.logits + row * all;
        for (int r = 0; r < config_.ranks(); r++) {
            const int begin = config_.vocab_cuts[r], count = config_.vocab_cuts[r + 1] - begin;
            const auto* from = static_cast<const float*>(exchange_->part(r)) + static_cast<size_t>(row) * count;
            std::copy_n(from, count, to + begin);
        }
        batch.best[row] = kernels_.argmax(to, static_cast<int>(all));
    });
}

// Notes the likeliest token of a row; of several ranks, of this one's tokens.
void Model::choose(const Step& step, int row, float logit, int32_t token) {
    if (is_shared()) {
        static_cast<Choice*>(exchange_->mine())[row] = {logit, token};
    } else {
        step.batch.choices[row] = std::max(token, 0);
    }
}

bool Model::gather_choices(Pool::Walk& walk, const Step& step) {
    const Batch& batch = step.batch;
    if (!meet(walk, step, batch.choice_rows * sizeof(Choice))) return false;
    if (exchange_->rank() != 0) return true;
    return walk.phase(batch.choice_rows, [&](int row) {
        Choice best{0, -1};
        for (int r = 0; r < config_.ranks(); r++) {
            const Choice from = static_cast<const Choice*>(exchange_->part(r))[row];
            if (from.token >= 0 && (best.token < 0 || from.logit > best.logit)) {
                best = {from.logit, from.token + config_.vocab_cuts[r]};
            }
        }
        batch.choices[row] = std::max(best.token, 0);
    });
}

}  // namespace eightfold
