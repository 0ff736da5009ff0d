#include "pool.h"

#include <algorithm>
#include <bit>
#include <chrono>

#ifdef EIGHTFOLD_X86
#include <immintrin.h>
#endif

namespace eightfold {

namespace {

// About 20 and 60 microseconds: longer than a chunk of a decode step, and than what Python does between two steps.
constexpr int kPhaseSpins = 1000, kRunSpins = 3000;

// A thread is at most kSlots runs late, so few bits tell runs apart; the others count chunks.
constexpr int kCountBits = 24;

uint32_t none_done(uint32_t epoch) { return epoch << kCountBits; }

// A run is sleepy when the first thread slept a quarter of it; then runs are walked alone for up to so long. In time and
// not in runs: a long prompt is worth many steps of a few tokens.
constexpr int64_t kSleepyShare = 4;
constexpr int64_t kMostAloneNs = 250'000'000;

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void relax() {
#ifdef EIGHTFOLD_X86
    _mm_pause();
#elif defined(EIGHTFOLD_ARM)
    asm volatile("isb");  // about as long as x86's pause; yield is over at once
#else
    std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(int threads, int max_phases)
    : max_phases_(max_phases), phases_(new Phase[max_phases]), places_(new Place[threads]) {
    try {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {  // a limit on threads: those that have started must not be left behind
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stops_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

int Pool::next_slot() {
    const uint32_t epoch = epoch_.load() + 1;
    leave_before(epoch >= kSlots ? epoch - kSlots + 1 : 0);
    return static_cast<int>(epoch % kSlots);
}

void Pool::quiesce() {
    // An empty run: from here on, nobody enters the last one.
    const uint32_t epoch = epoch_.load() + 1;
    leave_before(epoch >= kSlots ? epoch - kSlots + 1 : 0);
    jobs_[epoch % kSlots] = {};
    epoch_.store(epoch);
    leave_before(epoch);
}

void Pool::leave_before(uint32_t epoch) {
    for (int i = 1; i < threads(); i++) {
        for (uint32_t walks; (walks = places_[i].epoch.load()) != 0 && walks < epoch;) std::this_thread::yield();
    }
}

void Pool::run(Program program, void* context, Crew crew) {
    const uint32_t epoch = epoch_.load() + 1;
    const int64_t start = now_ns();
    const bool alone = crew == Crew::caller || start < alone_until_ns_;
    jobs_[epoch % kSlots] = alone ? Job{} : Job{program, context};
    for (int i = 0; i < max_phases_; i++) {
        phases_[i].next.store(static_cast<uint64_t>(epoch) << 32, std::memory_order_relaxed);
        phases_[i].done.store(none_done(epoch), std::memory_order_relaxed);
    }
    epoch_.store(epoch);
    if (!alone) epoch_.notify_all();
    Walk walk(*this, 0, epoch);
    program(context, walk);
    if (!alone) learn(walk.slept_ns_, start, now_ns());
}

void Pool::learn(int64_t slept_ns, int64_t start_ns, int64_t end_ns) {
    if (workers_.empty()) return;
    if (slept_ns * kSleepyShare <= end_ns - start_ns) {
        alone_ns_ /= 2;
        return;
    }
    alone_ns_ = std::min(std::max(2 * alone_ns_, end_ns - start_ns), kMostAloneNs);
    alone_until_ns_ = end_ns + alone_ns_;
}

void Pool::work(int worker) {
    uint32_t seen = 0;
    for (;;) {
        uint32_t epoch = epoch_.load();
        for (int i = 0; i < kRunSpins && epoch == seen; i++) {
            relax();
            epoch = epoch_.load();
        }
        if (epoch == seen) {
            epoch_.wait(seen);
            continue;
        }
        if (stops_.load()) return;
        // Announced first, then looked at again: whoever reuses a slot sees the announcement, or is seen here.
        places_[worker].epoch.store(epoch);
        if (epoch_.load() == epoch) {
            const Job job = jobs_[epoch % kSlots];
            Walk walk(*this, worker, epoch);
            if (job.program != nullptr) job.program(job.context, walk);
            seen = epoch;
        }
        places_[worker].epoch.store(0);
    }
}

// Returns a chunk nobody has claimed, or -1 if there is none.
int Pool::Walk::claim(Phase& phase, int chunks) const {
    uint64_t value = phase.next.load(std::memory_order_relaxed);
    while (value >> 32 == epoch_) {
        int chunk = static_cast<int>(value & 0xffffffffu);
        uint64_t claimed = value + 1;
        if (chunks <= kOwned) {
            const uint64_t left = ~value & ((uint64_t{1} << chunks) - 1), own = left & owned_;
            if (left == 0) return -1;
            chunk = own != 0 ? std::countr_zero(own) : std::bit_width(left) - 1;
            claimed = value | uint64_t{1} << chunk;
        } else if (chunk >= chunks) {
            return -1;
        }
        if (phase.next.compare_exchange_weak(value, claimed, std::memory_order_acq_rel)) return chunk;
    }
    return -1;
}

void Pool::Walk::finish(Phase& phase, int chunks) const {
    if (phase.done.fetch_add(1) + 1 == none_done(epoch_) + static_cast<uint32_t>(chunks)) phase.done.notify_all();
}

// Whether this is a late thread, whose run has ended.
bool Pool::Walk::is_over(const Phase& phase) const {
    return (phase.done.load() ^ none_done(epoch_)) >> kCountBits != 0;
}

bool Pool::Walk::wait(Phase& phase, int chunks) const {
    for (int spins = 0;; spins++) {
        const uint32_t done = phase.done.load();
        // A late thread must not wait on a later run's count, which may happen to be the one it has read.
        if ((done ^ none_done(epoch_)) >> kCountBits != 0) return false;
        if (done == none_done(epoch_) + static_cast<uint32_t>(chunks)) return true;
        if (spins < kPhaseSpins) {
            relax();
        } else {
            const int64_t start = now_ns();
            phase.done.wait(done);
            slept_ns_ += now_ns() - start;
        }
    }
}

}  // namespace eightfold
