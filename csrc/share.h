// What ranks do together: a model's heads, intermediate channels and vocabulary are cut into one share for each.
//
//   embedding    whoever holds a token's row shows it
//   o, down      every rank has some of the inputs, so its int32 products are one term of a sum, which is what one
//                process has, to the last bit, and becomes real afterwards. Of floating weights sums depend on their
//                order: ranks have all inputs of some of the outputs, and show each other inputs first, then outputs
//   head         every rank has some of the tokens
//
// Where a token is quantized by its own range, the ranks first tell each other their parts' ranges, for the same reason.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>
#include <vector>

#include "batch.h"
#include "exchange.h"
#include "pool.h"
#include "weights.h"

namespace eightfold {

class Share {
public:
    Share(const ModelConfig& config, const Kernels& kernels, Pool& pool)
        : config_(config), kernels_(kernels), pool_(pool) {}

    // Before the first step: `group` is one whose inputs are cut, o or down.
    void take(Group& group);
    void set_exchange(std::unique_ptr<Exchange> exchange) { exchange_ = std::move(exchange); }
    bool is_joined() const { return exchange_ != nullptr; }

    // Between steps. `numbers`: of a part, where others than this class and its callers for a token's row need more.
    void reserve_tokens(int tokens);
    void reserve_parts(const Batch& batch, size_t numbers);
    void rethrow_failure(uint64_t run) const;  // of a meeting of that run

    // Whether some inputs are quantized by what all ranks have of them, and whether a group's is.
    bool has_ranges() const { return has_ranges_; }
    bool needs_ranges(const Group& group) const;

    int owner_of(int token) const;
    int rank() const { return exchange_->rank(); }
    // Where this rank's part of the next meeting goes.
    float* part() { return static_cast<float*>(exchange_->mine()); }
    // Numbers of a token in a part: its products, of 16-bit inputs by halves and then the sum of the inputs.
    size_t part_width(const Linear& linear) const;

    // Phases of a step; see Pool::Walk::phase.

    // x (T, E): the rows that ranks have written to their parts.
    bool gather_embedding(Pool::Walk& walk, const Run& run, float* x);
    // Shows the ranges of a group's input x (T, K).
    bool meet_ranges(Pool::Walk& walk, const Run& run, const Group& group, const float* x);
    // The sum of all ranks' terms of a group whose products are kept as sums, to `out`. `prepared`: its input.
    bool take_sums(Pool::Walk& walk, const Run& run, const Group& group, const Prepared& prepared, Output out);
    // Of an input x (T, K) cut at `cuts`, all ranks' into inputs(); and all ranks' outputs of it, (T, E), to `out`.
    bool gather_inputs(Pool::Walk& walk, const Run& run, const float* x, const std::vector<int>& cuts);
    const float* inputs() const { return gathered_.data(); }
    bool take_outputs(Pool::Walk& walk, const Run& run, Output out);
    // Of `width` numbers a token in part(), which are all ranks' in shown(rank).
    bool show(Pool::Walk& walk, const Run& run, int width) {
        return meet(walk, run, static_cast<size_t>(run.batch.tokens) * width * sizeof(float));
    }
    // The same for so many numbers as `numbers` returns, which is called by one thread.
    template <typename Numbers>
    bool show_numbers(Pool::Walk& walk, const Run& run, Numbers numbers) {
        return meet(walk, run, [&] { return numbers() * sizeof(float); });
    }
    const float* shown(int rank) const { return part_of<float>(rank); }
    int widest(const std::vector<int>& cuts) const;
    // Calls take(first column, numbers, how many) for row t of all ranks' parts.
    template <typename Take>
    void each_part(const std::vector<int>& cuts, size_t t, Take take) const {
        for (int r = 0; r < exchange_->ranks(); r++) {
            const size_t count = cuts[r + 1] - cuts[r];
            take(cuts[r], part_of<float>(r) + t * count, count);
        }
    }
    // Rank 0 puts together the logits, or the choices, that ranks have written to their parts.
    bool gather_logits(Pool::Walk& walk, const Run& run);
    bool gather_choices(Pool::Walk& walk, const Run& run);

    // Inside a phase, after meet_ranges: as Group::prepare, with the ranges of all ranks' inputs.
    void prepare(const Group& group, Token token, Layout layout, std::vector<Prepared>& prepared, Scratch& scratch);
    // Inside a phase: the likeliest of this rank's tokens in a row of choices; -1: none.
    void show_choice(int row, float logit, int32_t token) {
        static_cast<Choice*>(exchange_->mine())[row] = {logit, token};
    }

private:
    struct Choice {
        float logit;
        int32_t token;
    };
    struct Range {  // of a rank's inputs of a token, and zero
        float lo, hi;
    };

    template <typename T>
    const T* part_of(int rank) const {
        return static_cast<const T*>(exchange_->part(rank));
    }
    bool meet(Pool::Walk& walk, const Run& run, size_t bytes) {
        return meet(walk, run, [=] { return bytes; });
    }
    template <typename Bytes>
        requires std::is_invocable_v<Bytes>
    bool meet(Pool::Walk& walk, const Run& run, Bytes bytes) {
        const bool goes_on = walk.lone([&] {
            try {
                exchange_->meet(bytes());
            } catch (...) {
                failure_ = std::current_exception();
                failed_.store(run.id);
            }
        });
        return goes_on && failed_.load() != run.id;
    }
    RowParams summed_params(const Linear& linear, const Prepared& prepared, int t) const;
    void sum_terms(size_t from, int count, int32_t* to) const;
    void take_row(const Linear& linear, Origin origin, RowParams params, int t, Output out) const;

    const ModelConfig& config_;
    const Kernels& kernels_;
    Pool& pool_;
    std::unique_ptr<Exchange> exchange_;
    std::atomic<uint64_t> failed_{0};  // the run whose meeting failed
    std::exception_ptr failure_;
    bool has_ranges_ = false;
    size_t widest_part_ = 0;  // of a token, in numbers
    int gathered_width_ = 0;
    Lines<float> gathered_;  // (T, K): inputs of all ranks
};

}  // namespace eightfold
