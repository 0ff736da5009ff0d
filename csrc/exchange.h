// How the ranks of a model, processes that hold a share of it each, show each other what they have computed.
//
// There is one operation, a meeting: every rank writes its part into a place of its own and, after the meeting, reads
// the parts of all. Sums are formed by every rank for itself, in the order of ranks; so they have the same bits on all.
//
// SharedExchange lies in memory that the processes of one host share: nothing is copied. A part stays as it is until
// the next meeting but one is under way: two places are used in turn, and whoever arrives at a meeting has read what
// the one before it brought. HookExchange calls a function that does the meeting, for ranks on several hosts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace eightfold {

class Exchange {
public:
    Exchange(int rank, int ranks) : rank_(rank), ranks_(ranks) {}
    virtual ~Exchange() = default;
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;

    int rank() const { return rank_; }
    int ranks() const { return ranks_; }

    // Makes room for parts of so many bytes; all ranks do so between the same two steps.
    virtual void reserve(size_t bytes) = 0;
    virtual size_t capacity() const = 0;
    // Where this rank's next part goes.
    virtual void* mine() = 0;
    // Returns when all ranks have come with a part of so many bytes, a multiple of 4. May throw.
    virtual void meet(size_t bytes) = 0;
    // A rank's part of the last meeting.
    virtual const void* part(int rank) const = 0;

private:
    int rank_, ranks_;
};

class SharedExchange final : public Exchange {
public:
    // Files in memory: one for counters, and two for the parts of each rank. They stay the caller's, open.
    SharedExchange(int rank, int ranks, int counters, std::vector<int> places);
    ~SharedExchange() override;

    void reserve(size_t bytes) override;
    size_t capacity() const override { return capacity_; }
    void* mine() override { return at(rank(), meetings_.load(std::memory_order_relaxed) + 1); }
    void meet(size_t bytes) override;
    const void* part(int rank) const override { return at(rank, meetings_.load(std::memory_order_relaxed)); }

private:
    struct alignas(64) Arrivals {  // of a rank
        std::atomic<uint32_t> meetings;
        std::atomic<uint32_t> sleepers;  // who may have to be woken
    };
    void* at(int rank, uint32_t meeting) const { return maps_[2 * rank + meeting % 2]; }
    void wait_for(Arrivals& other, uint32_t meeting) const;
    void unmap();

    std::vector<int> places_;
    std::vector<void*> maps_;
    size_t capacity_ = 0;
    Arrivals* arrivals_;
    std::atomic<uint32_t> meetings_{0};
};

class HookExchange final : public Exchange {
public:
    // Sends `mine` to all ranks, and puts the parts of all, one after the other, into `all`.
    using Hook = std::function<void(void* mine, void* all, size_t bytes)>;

    HookExchange(int rank, int ranks, Hook hook) : Exchange(rank, ranks), hook_(std::move(hook)) {}

    void reserve(size_t bytes) override;
    size_t capacity() const override { return mine_.size(); }
    void* mine() override { return mine_.data(); }
    void meet(size_t bytes) override;
    const void* part(int rank) const override { return all_.data() + rank * bytes_; }

private:
    Hook hook_;
    std::vector<std::byte> mine_, all_;
    size_t bytes_ = 0;  // of a part of the last meeting
};

}  // namespace eightfold
