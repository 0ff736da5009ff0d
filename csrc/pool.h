// A pool whose threads all walk through the same program of phases.
//
// A phase is a number of chunks. Of up to kOwned, chunk i is first of all thread i % threads', which so knows what it
// will read next; who has none left takes others', the last ones first. More are claimed one after the other from a
// counter.
//
// A phase has ended when all its chunks are done, not when all threads have come by: a thread whose core is busy
// elsewhere holds nobody up unless it was stopped inside a chunk. It finds the phases it has missed finished, or the run
// over. Waiting is a short spin, then a futex.
//
// Where a run still had to sleep for long (some other program keeps a core busy), the next ones are walked alone, and
// after ever more of them the others are tried again.
//
// What a program reads between chunks must stay as it is while a late thread may still read it. So the arguments of a
// run live in one of kSlots places that are used in turn, and what they only point to is read inside chunks alone.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace eightfold {

class Pool {
    struct alignas(64) Phase {
        std::atomic<uint64_t> next{0};  // epoch in the high half; in the low one the next chunk, or which are claimed
        std::atomic<uint32_t> done{0};  // the epoch's last 8 bits, and how many chunks are done
    };

public:
    static constexpr uint32_t kSlots = 8;
    static constexpr int kOwned = 32;  // chunks of a phase that have an owner

    Pool(int threads, int max_phases);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // What one thread sees of a run.
    class Walk {
    public:
        int thread() const { return thread_; }
        int slot() const { return static_cast<int>(epoch_ % kSlots); }

        // Does some of the next phase's chunks; returns when all are done. False: the run is over, return at once.
        template <typename Chunk>
        [[nodiscard]] bool phase(int chunks, Chunk chunk) {
            return phase(chunks, chunk, [] {});
        }

        // As above; when no chunk is left to claim, `idle` may bring in what comes next while others finish.
        template <typename Chunk, typename Idle>
        [[nodiscard]] bool phase(int chunks, Chunk chunk, Idle idle) {
            Phase& phase = pool_.phases_[index_++];
            for (int i; (i = claim(phase, chunks)) >= 0;) {
                chunk(i);
                finish(phase, chunks);
            }
            if (is_over(phase)) return false;
            idle();
            return wait(phase, chunks);
        }

        // A phase of one chunk that waits for something outside: that the others sleep meanwhile is no sign of a busy
        // machine.
        template <typename Chunk>
        [[nodiscard]] bool lone(Chunk chunk) {
            const int64_t slept = slept_ns_;
            const bool goes_on = phase(1, [&](int) { chunk(); });
            slept_ns_ = slept;
            return goes_on;
        }

    private:
        friend class Pool;
        Walk(Pool& pool, int thread, uint32_t epoch) : pool_(pool), thread_(thread), epoch_(epoch) {
            for (int i = thread; i < kOwned; i += pool.threads()) owned_ |= uint64_t{1} << i;
        }

        Pool& pool_;
        int thread_;
        uint32_t epoch_;
        uint64_t owned_ = 0;  // bits of the chunks that are this thread's
        int index_ = 0;
        mutable int64_t slept_ns_ = 0;

        int claim(Phase& phase, int chunks) const;
        void finish(Phase& phase, int chunks) const;
        bool is_over(const Phase& phase) const;
        bool wait(Phase& phase, int chunks) const;
    };

    using Program = void (*)(void* context, Walk& walk);

    // The slot of the next run; its arguments may now be written.
    int next_slot();

    // Waits until no thread reads anything of earlier runs.
    void quiesce();

    enum class Crew { all, caller };

    // Runs a program on all threads, or on the caller's alone; returns when its chunks are done. One caller at a time.
    void run(Program program, void* context, Crew crew = Crew::all);

private:
    struct Job {
        Program program = nullptr;
        void* context = nullptr;
    };
    struct alignas(64) Place {
        std::atomic<uint32_t> epoch{0};  // that its worker walks through, 0: none
    };

    void work(int worker);
    void learn(int64_t slept_ns, int64_t start_ns, int64_t end_ns);
    void stop();
    void leave_before(uint32_t epoch);

    int max_phases_;
    std::unique_ptr<Phase[]> phases_;
    std::unique_ptr<Place[]> places_;
    std::array<Job, kSlots> jobs_{};
    std::atomic<uint32_t> epoch_{0};
    std::atomic<bool> stops_{false};
    int64_t alone_ns_ = 0;  // how long runs were walked alone after the last sleepy one, halved by each good one
    int64_t alone_until_ns_ = 0;  // until then they are
    std::vector<std::thread> workers_;
};

}  // namespace eightfold
