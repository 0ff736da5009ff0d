// What ranks do together: a model's heads, intermediate channels and vocabulary are cut into one share for each.
//
//   embedding    whoever holds a token's row shows it
//   o, down      every rank has some of the inputs, so its products are one term of a sum
//   head         every rank has some of the tokens
//
// Of static W8A8 the terms are int32: their sum is what one process has, to the last bit, and becomes real afterwards.
// Other kinds sum float32 terms in the order of ranks.
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
    const size_t hidden = static_cast<size_t>(batch.tokens) * config_.hidden * sizeof(float);
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

bool Model::add_parts(Pool::Walk& walk, const Step& step, const Linear& linear) {
    if (!meet(walk, step, static_cast<size_t>(step.batch.tokens) * config_.hidden * sizeof(float))) return false;
    return walk.phase(step.batch.tokens, [&](int t) { add_row(linear, t, scratch_[walk.thread()]); });
}

// x[t] += the sum of all ranks' terms.
void Model::add_row(const Linear& linear, int t, Scratch& scratch) {
    static const std::vector<int32_t> zeros(kColumns);
    const int hidden = config_.hidden;
    const size_t row = static_cast<size_t>(t) * hidden;
    int32_t* sums = scratch.sums.data();
    float* reals = scratch.first.data();
    for (int n = 0; n < hidden; n += kColumns) {
        const int count = std::min(kColumns, hidden - n);
        if (linear.keeps_sums) {
            std::fill_n(sums, count, 0);
            for (int r = 0; r < exchange_->ranks(); r++) {
                const auto* part = static_cast<const uint32_t*>(exchange_->part(r)) + row + n;
                for (int i = 0; i < count; i++) sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) + part[i]);
            }
            kernels_.finish_static(sums, count, zeros.data(), linear.deq_scale.data() + n, reals);
        } else {
            std::copy_n(static_cast<const float*>(exchange_->part(0)) + row + n, count, reals);
            for (int r = 1; r < exchange_->ranks(); r++) {
                kernels_.add(reals, static_cast<const float*>(exchange_->part(r)) + row + n, count);
            }
        }
        kernels_.add(x_.data() + row + n, reals, count);
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
