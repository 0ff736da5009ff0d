// The choice of tokens from rows of logits.
//
// Each row is computed by one thread, and all sums run in one order on every instruction set: what is chosen does not
// depend on other rows. NaN counts as minus infinity.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "pool.h"

namespace eightfold {

// What one thread needs besides its row.
struct SampleScratch {
    std::vector<float> scores;        // a row that was changed
    std::vector<float> maxima, some;  // of the blocks of a row
    std::vector<float> score, mass;   // of tokens that may be drawn, and
    std::vector<int32_t> id;          // what they are
    std::vector<double> sums;         // of blocks of masses
    std::vector<int32_t> left;        // places among which a cut lies
    void reserve(int vocab);
};

// Of the tokens in falling order of logits, ties by rising id, the first are kept: `top_k` of them (0: all), of these
// those with at least `min_p` of the first one's probability, and of these as many as it takes to reach `top_p`.
struct DrawParams {
    double temperature = 0;  // 0: take the likeliest
    int top_k = 0;
    double top_p = 1;
    double min_p = 0;
};

// What is done to logits before that, in this order.
struct EditParams {
    std::vector<int32_t> stop_ids;  // have no chance in an answer of fewer than `min_tokens`
    int64_t min_tokens = 0;
    std::vector<int32_t> bias_ids;
    std::vector<float> biases;  // are added
    float repetition = 1;       // divides positive logits of tokens in prompt and answer, multiplies others
    float frequency = 0;        // is subtracted for each time a token is in the answer
    float presence = 0;         // is subtracted if it is there at all
};

// Chooses the tokens of one answer and remembers those it needs to.
class Chooser {
public:
    Chooser(int vocab, const DrawParams& draw, EditParams edits, const std::vector<int32_t>& prompt);

    int vocab() const { return vocab_; }

    // The token is part of the answer from now on.
    void accept(int token);

    // Chooses from (V) logits by a number u from [0, 1). A zero in `mask`, one bit a token, forbids one; null: all may.
    int choose(const float* logits, const uint32_t* mask, double u, SampleScratch& scratch) const;

private:
    const float* edited(const float* logits, const uint32_t* mask, bool stops, SampleScratch& scratch) const;
    void penalize(float* x) const;
    void count(int token, int times);
    bool waits() const { return length_ < edits_.min_tokens && !edits_.stop_ids.empty(); }
    bool has_penalties() const { return edits_.repetition != 1 || edits_.frequency != 0 || edits_.presence != 0; }

    int vocab_;
    DrawParams draw_;
    EditParams edits_;
    int64_t length_ = 0;  // of the answer
    std::vector<int32_t> seen_, counts_;         // tokens, and how often each is in the answer
    std::unordered_map<int32_t, int32_t> place_;  // of a token among those
};

// Natural logarithm of the sum of exp(logit); infinite where all logits are minus infinity, or one is plus infinity.
double log_sum_exp(const float* x, int n, SampleScratch& scratch);

// Of a logit of that sum: its log-probability, never NaN.
double log_prob(float logit, double log_sum);

// The ids of the largest logits, at most n, largest first, ties by rising id; NaN and minus infinity are none: what is
// missing is -1.
void largest(const float* x, int n, int count, int32_t* ids, SampleScratch& scratch);

// Threads that take rows.
class SamplePool {
public:
    explicit SamplePool(int threads) : jobs_(Pool::kSlots), scratch_(threads), pool_(threads, 1) {}

    // Calls work(row, scratch) for each row; few rows are not worth waking anybody.
    void run(int rows, int vocab, std::function<void(int, SampleScratch&)> work);

private:
    struct Job {
        std::function<void(int, SampleScratch&)> work;
        int rows = 0;
    };

    static void program(void* pool, Pool::Walk& walk);

    std::mutex mutex_;  // one call at a time
    std::vector<Job> jobs_;
    std::vector<SampleScratch> scratch_;
    Pool pool_;  // ends first: a late thread may still look at the others
};

}  // namespace eightfold
