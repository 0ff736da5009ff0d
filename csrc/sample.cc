#include "sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace eightfold {

namespace {

// Four lanes are what every machine has, so all of them sum alike.
using F = float __attribute__((vector_size(16)));
using U = uint32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;

constexpr int kBlock = 64;  // logits whose maximum and mass are kept
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr double kLog2e = 1.4426950408889634;

constexpr int kWaysBits = 10, kWays = 1 << kWaysBits;  // parts that a range of scores is cut into at once
constexpr int kFew = 64;       // candidates that are sorted
constexpr int kFewRows = 4;    // that one thread takes

F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

F all(float x) { return F{x, x, x, x}; }

F select(U yes, F a, F b) { return std::bit_cast<F>((std::bit_cast<U>(a) & yes) | (std::bit_cast<U>(b) & ~yes)); }

// 2**y for y <= 0, and 0 below -125.5 and of NaN. A whole number and a rest, |rest| <= 1/2, of which 2**rest is a
// polynomial of least relative error, 2e-9; the roundings make it 1.7 half units in the last place. 2**0 is 1.
F exp2_of(F y) {
    const F shifted = y + 12582912.0f;  // 1.5 * 2**23: the sum's last bit is worth 1
    const F rest = y - (shifted - 12582912.0f);
    F p = rest * 0.00015353361959569156f + 0.0013398875016719103f;
    p = p * rest + 0.00961843691766262f;
    p = p * rest + 0.055503323674201965f;
    p = p * rest + 0.24022647738456726f;
    p = p * rest + 0.6931471824645996f;
    p = p * rest + 1.0f;
    const U bits = std::bit_cast<U>(p) + (std::bit_cast<U>(shifted) << 23);
    return std::bit_cast<F>(bits & std::bit_cast<U>(y >= -125.5f));
}

double sum_of(F v) { return (static_cast<double>(v[0]) + v[1]) + (static_cast<double>(v[2]) + v[3]); }

int block_count(int n) { return (n + kBlock - 1) / kBlock; }

// Calls f(block, its logits); the last block is filled up.
template <typename Step>
void blocks(const float* x, int n, Step f) {
    const int whole = n / kBlock;
    for (int b = 0; b < whole; b++) f(b, x + b * kBlock);
    if (n % kBlock == 0) return;
    float rest[kBlock];
    std::fill_n(rest, kBlock, kNone);
    std::copy(x + whole * kBlock, x + n, rest);
    f(whole, rest);
}

// Fills `maxima`, one a block; returns the largest.
float find_maxima(const float* x, int n, std::vector<float>& maxima) {
    F best = all(kNone);
    blocks(x, n, [&](int b, const float* p) {
        F m = all(kNone);
        for (int i = 0; i < kBlock; i += kLanes) {
            const F v = load(p + i);
            m = select(std::bit_cast<U>(v > m), v, m);
        }
        maxima[b] = std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
        best = select(std::bit_cast<U>(m > best), m, best);
    });
    return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
}

// Fills `mass` with 2**((x - max) scale), and `sums` with their sums, one a block; returns the sum of these.
double weigh(const float* x, int n, float max, float scale, float* mass, std::vector<double>& sums) {
    double total = 0;
    blocks(x, n, [&](int b, const float* p) {
        F sum = all(0.0f);
        for (int i = 0; i < kBlock; i += kLanes) {
            const F m = exp2_of((load(p + i) - max) * scale);
            store(mass + b * kBlock + i, m);
            sum += m;
        }
        sums[b] = sum_of(sum);
        total += sums[b];
    });
    return total;
}

// The first logit that is `max`, a maximum of `maxima`; 0 where there is none but NaN.
int first_of(const float* x, int n, float max, const std::vector<float>& maxima) {
    const auto block = std::find(maxima.begin(), maxima.begin() + block_count(n), max) - maxima.begin();
    const float* at = std::find(x + std::min<int64_t>(block * kBlock, n), x + n, max);
    return at == x + n ? 0 : static_cast<int>(at - x);
}

// A number at least as large as which are `count` logits or more, and few others: as many blocks hold such a one.
float bound_of_largest(int count, int n, SampleScratch& scratch) {
    const int blocks = block_count(n);
    if (count > blocks) return kLowest;
    std::copy_n(scratch.maxima.begin(), blocks, scratch.some.begin());
    std::nth_element(scratch.some.begin(), scratch.some.begin() + (count - 1), scratch.some.begin() + blocks,
                     std::greater<>());
    return std::max(scratch.some[count - 1], kLowest);
}

// What a token is drawn from: logits and their masses, which become zero where a cut leaves them out.
struct Candidates {
    const float* score;
    float* mass;
    const int32_t* id;  // in rising order; null: 0, 1, 2 and so on
    int size;
    float max, scale;
    std::vector<double>& sums;  // of the masses, one a block

    double weigh() { return eightfold::weigh(score, size, max, scale, mass, sums); }
};

int count_from(const float* x, int n, float bound) {
    U count = {};
    blocks(x, n, [&](int, const float* p) {
        for (int i = 0; i < kBlock; i += kLanes) count -= std::bit_cast<U>(load(p + i) >= bound);
    });
    return static_cast<int>(count[0] + count[1] + count[2] + count[3]);
}

// The logits that are not below a bound: brought together, or where they are if that spares little.
Candidates gather(const float* x, int n, float bound, float max, float scale, SampleScratch& scratch) {
    float *score = scratch.score.data(), *mass = scratch.mass.data();
    int32_t* id = scratch.id.data();
    if (bound == kLowest || count_from(x, n, bound) > n / 4) return {x, mass, nullptr, n, max, scale, scratch.sums};
    int size = 0;
    for (int b = 0; b < block_count(n); b++) {
        if (!(scratch.maxima[b] >= bound)) continue;
        for (int i = b * kBlock; i < std::min(n, (b + 1) * kBlock); i++) {
            score[size] = x[i];
            id[size] = i;
            size += x[i] >= bound;
        }
    }
    return {score, mass, id, size, max, scale, scratch.sums};
}

// Integers in the order of floats; both zeros are one.
uint32_t key_of(float score) {
    const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The last candidate that a cut leaves in: those behind it in falling order of scores, ties by place, are out.
struct Last {
    float score = kNone;
    int place = 0;
};

// How far a score is below the largest, in eighths of a factor 2 of its mass. The last ones have no mass.
int way_of(const Candidates& of, float score) {
    const float down = (of.max - score) * of.scale * 8;
    return down < kWays - 1 ? static_cast<int>(down) : kWays - 1;
}

// Of candidates that begin after others of weight `before`, finds the one with whom the sum reaches a target.
template <typename Weight>
Last find_among(const Candidates& of, std::vector<int32_t>& left, int size, double before, double target,
                Weight weight) {
    const auto key = [&](int i) { return key_of(of.score[left[i]]); };
    uint32_t low = ~0u, high = 0;
    for (int i = 0; i < size; i++) low = std::min(low, key(i)), high = std::max(high, key(i));
    while (size > kFew && high > low) {
        double sums[kWays] = {};
        const int shift = std::max(0, static_cast<int>(std::bit_width(high - low)) - kWaysBits);
        for (int i = 0; i < size; i++) sums[(high - key(i)) >> shift] += weight(left[i]);
        const uint32_t ways = ((high - low) >> shift) + 1, top = high;
        uint32_t way = 0;
        while (way + 1 < ways && before + sums[way] < target) before += sums[way++];
        int kept = 0;
        low = ~0u, high = 0;
        for (int i = 0; i < size; i++) {
            if ((top - key(i)) >> shift != way) continue;
            low = std::min(low, key(i)), high = std::max(high, key(i));
            left[kept++] = left[i];
        }
        size = kept;
    }
    if (high > low) {
        std::sort(left.begin(), left.begin() + size, [&](int32_t a, int32_t b) {
            return of.score[a] > of.score[b] || (of.score[a] == of.score[b] && a < b);
        });
    }
    int i = 0;
    while (i + 1 < size && before + weight(left[i]) < target) before += weight(left[i++]);
    return {of.score[left[i]], left[i]};
}

// Finds the candidate with whom, from the largest on, the sum of weights reaches a target.
template <typename Weight>
Last find_last(const Candidates& of, double target, std::vector<int32_t>& left, Weight weight) {
    double sums[kWays] = {}, before = 0;
    for (int i = 0; i < of.size; i++) sums[way_of(of, of.score[i])] += weight(i);
    int way = 0, size = 0;
    while (way + 1 < kWays && before + sums[way] < target) before += sums[way++];
    if (way + 1 == kWays) return {};
    for (int i = 0; i < of.size; i++) {
        left[size] = i;
        size += way_of(of, of.score[i]) == way;
    }
    return find_among(of, left, size, before, target, weight);
}

// Leaves out what comes after the last and what has less than a mass; returns the sum of what stays.
double cut(Candidates& of, Last last, float least) {
    double total = 0;
    U places = {0, 1, 2, 3};
    const uint32_t end = last.place;
    blocks(of.score, of.size, [&](int b, const float* p) {
        F sum = all(0.0f);
        for (int i = 0; i < kBlock; i += kLanes, places += kLanes) {
            const F score = load(p + i), mass = load(of.mass + b * kBlock + i);
            const U stays = std::bit_cast<U>(score > last.score) |
                            (std::bit_cast<U>(score == last.score) & std::bit_cast<U>(places <= end));
            const F m = select(stays & std::bit_cast<U>(mass >= least), mass, all(0.0f));
            store(of.mass + b * kBlock + i, m);
            sum += m;
        }
        of.sums[b] = sum_of(sum);
        total += of.sums[b];
    });
    return total;
}

// The first of some masses with whom their sum passes a target; the last that is not 0 if rounding keeps it below.
template <typename Mass>
int first_beyond(double& sum, double target, int count, const Mass* masses) {
    int last = 0;
    double before = sum;
    for (int i = 0; i < count; i++) {
        if (masses[i] == 0) continue;
        last = i;
        before = sum;
        sum += masses[i];
        if (sum > target) break;
    }
    sum = before;
    return last;
}

// Picks by a share of the sum of all masses: first a block, then one of its own.
int pick(const Candidates& of, double target) {
    double before = 0;
    const int block = first_beyond(before, target, block_count(of.size), of.sums.data());
    const int place = block * kBlock + first_beyond(before, target, kBlock, of.mass + block * kBlock);
    return of.id == nullptr ? place : of.id[place];
}

// A number below all logits with at least this share of the largest one's probability, a little less for roundings.
float bound_of_share(double share, float max, float scale) {
    const double bound = max + (std::log2(share) - 0.01) / scale;
    return static_cast<float>(std::max<double>(bound - 1e-6 * std::abs(bound), kLowest));
}

int draw(const float* x, int n, float max, const DrawParams& params, double u, SampleScratch& scratch) {
    const float scale = static_cast<float>(kLog2e / params.temperature);
    const bool by_mass = params.top_k == 0 && params.min_p == 0 && params.top_p < 1;
    double total = by_mass ? weigh(x, n, max, scale, scratch.mass.data(), scratch.sums) : 0;
    // By mass: logits below this share have less than 1 - top_p together.
    const double share = by_mass ? (1 - params.top_p) * total / n : params.min_p;
    const float bound =
        params.top_k > 0 ? bound_of_largest(params.top_k, n, scratch) : bound_of_share(share, max, scale);
    Candidates of = gather(x, n, bound, max, scale, scratch);
    if (!by_mass) total = of.weigh();
    else if (of.id != nullptr) of.weigh();  // the total stays that of all
    if (params.top_k > 0 && params.top_k < of.size) {
        total = cut(of, find_last(of, params.top_k, scratch.left, [](int) { return 1.0; }), 0);
    }
    if (params.min_p > 0) total = cut(of, {}, static_cast<float>(params.min_p));
    if (params.top_p < 1) {
        total = cut(of, find_last(of, params.top_p * total, scratch.left, [&](int i) { return of.mass[i]; }), 0);
    }
    return pick(of, u * total);
}

// Copies logits; those that a mask forbids become minus infinity.
void copy_masked(const float* x, int n, const uint32_t* mask, float* to) {
    const U lanes = {1, 2, 4, 8};
    for (int w = 0; w * 32 < n; w++) {
        const float* from = x + w * 32;
        if (mask[w] == 0 || mask[w] == ~0u || (w + 1) * 32 > n) {
            for (int i = 0; i < std::min(32, n - w * 32); i++) to[w * 32 + i] = mask[w] >> i & 1 ? from[i] : kNone;
            continue;
        }
        for (int i = 0; i < 32; i += kLanes) {
            const uint32_t bits = mask[w] >> i;
            const U yes = std::bit_cast<U>((U{bits, bits, bits, bits} & lanes) != 0u);
            store(to + w * 32 + i, select(yes, load(from + i), all(kNone)));
        }
    }
}

}  // namespace

void SampleScratch::reserve(int vocab) {
    const size_t blocks = block_count(vocab);
    if (maxima.size() >= blocks) return;
    for (std::vector<float>* of_blocks : {&maxima, &some}) of_blocks->resize(blocks);
    for (std::vector<float>* of_row : {&scores, &score, &mass}) of_row->resize(blocks * kBlock);
    for (std::vector<int32_t>* of_row : {&id, &left}) of_row->resize(blocks * kBlock);
    sums.resize(blocks);
}

Chooser::Chooser(int vocab, const DrawParams& draw, EditParams edits, const std::vector<int32_t>& prompt)
    : vocab_(vocab), draw_(draw), edits_(std::move(edits)) {
    if (edits_.repetition != 1) {
        for (const int32_t token : prompt) count(token, 0);
    }
}

void Chooser::accept(int token) {
    length_++;
    if (has_penalties()) count(token, 1);
}

void Chooser::count(int token, int times) {
    const auto [at, is_new] = place_.try_emplace(token, static_cast<int32_t>(seen_.size()));
    if (is_new) {
        seen_.push_back(token);
        counts_.push_back(0);
    }
    counts_[at->second] += times;
}

int Chooser::choose(const float* logits, const uint32_t* mask, double u, SampleScratch& scratch) const {
    const float* x = edited(logits, mask, waits(), scratch);
    float max = find_maxima(x, vocab_, scratch.maxima);
    if (max == kNone && waits()) {  // the mask lets only stop tokens pass
        x = edited(logits, mask, false, scratch);
        max = find_maxima(x, vocab_, scratch.maxima);
    }
    if (draw_.temperature == 0 || !std::isfinite(max)) return first_of(x, vocab_, max, scratch.maxima);
    return draw(x, vocab_, max, draw_, u, scratch);
}

const float* Chooser::edited(const float* logits, const uint32_t* mask, bool stops, SampleScratch& scratch) const {
    if (mask == nullptr && !stops && edits_.bias_ids.empty() && !has_penalties()) return logits;
    float* x = scratch.scores.data();
    if (mask != nullptr) copy_masked(logits, vocab_, mask, x);
    else std::copy_n(logits, vocab_, x);
    for (size_t i = 0; stops && i < edits_.stop_ids.size(); i++) x[edits_.stop_ids[i]] = kNone;
    for (size_t i = 0; i < edits_.bias_ids.size(); i++) x[edits_.bias_ids[i]] += edits_.biases[i];
    if (has_penalties()) penalize(x);
    return x;
}

void Chooser::penalize(float* x) const {
    for (size_t i = 0; i < seen_.size(); i++) {
        float& score = x[seen_[i]];
        score = score > 0 ? score / edits_.repetition : score * edits_.repetition;
        score -= edits_.frequency * static_cast<float>(counts_[i]);
        if (counts_[i] > 0) score -= edits_.presence;
    }
}

double log_sum_exp(const float* x, int n, SampleScratch& scratch) {
    const float max = find_maxima(x, n, scratch.maxima);
    if (!std::isfinite(max)) return max;
    return max + std::log(weigh(x, n, max, static_cast<float>(kLog2e), scratch.mass.data(), scratch.sums));
}

double log_prob(float logit, double log_sum) {
    const double difference = logit - log_sum;
    if (!std::isnan(difference)) return difference;
    return logit > 0 ? 0 : kNone;
}

void largest(const float* x, int n, int count, int32_t* ids, SampleScratch& scratch) {
    find_maxima(x, n, scratch.maxima);
    const float bound = bound_of_largest(count, n, scratch);
    std::vector<int32_t>& found = scratch.left;
    int size = 0;
    for (int b = 0; b < block_count(n); b++) {
        if (!(scratch.maxima[b] >= bound)) continue;
        for (int i = b * kBlock; i < std::min(n, (b + 1) * kBlock); i++) {
            found[size] = i;
            size += x[i] >= bound;
        }
    }
    const auto end = found.begin() + std::min(count, size);
    std::partial_sort(found.begin(), end, found.begin() + size,
                      [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
    std::fill(std::copy(found.begin(), end, ids), ids + count, -1);
}

void SamplePool::run(int rows, int vocab, std::function<void(int, SampleScratch&)> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SampleScratch& scratch : scratch_) scratch.reserve(vocab);
    if (rows < kFewRows || pool_.threads() == 1) {
        for (int r = 0; r < rows; r++) work(r, scratch_[0]);
        return;
    }
    jobs_[pool_.next_slot()] = {std::move(work), rows};
    pool_.run(program, this);
}

void SamplePool::program(void* pool, Pool::Walk& walk) {
    SamplePool& self = *static_cast<SamplePool*>(pool);
    const Job& job = self.jobs_[walk.slot()];
    (void)walk.phase(job.rows, [&](int r) { job.work(r, self.scratch_[walk.thread()]); });
}

}  // namespace eightfold
