#include "exchange.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <climits>
#include <system_error>

#ifdef EIGHTFOLD_X86
#include <immintrin.h>
#endif

namespace eightfold {

namespace {

// About 60 microseconds: longer than ranks of equal speed are apart.
constexpr int kSpins = 3000;

constexpr size_t kLeastBytes = 64 << 10;

void relax() {
#ifdef EIGHTFOLD_X86
    _mm_pause();
#elif defined(EIGHTFOLD_ARM)
    asm volatile("isb");
#endif
}

// A wait that other processes can end; std::atomic's are for the threads of one.
void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof word == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);
    (void)syscall(SYS_futex, &word, operation, value, nullptr, nullptr, 0);
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

void* map(int file, size_t bytes) {
    // Memory files only grow: making one smaller than another rank has made it is refused, and that is well.
    if (ftruncate(file, static_cast<off_t>(bytes)) != 0 && errno != EPERM) fail("shared memory");
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) fail("shared memory");
    return at;
}

}  // namespace

SharedExchange::SharedExchange(int rank, int ranks, int counters, std::vector<int> places)
    : Exchange(rank, ranks),
      places_(std::move(places)),
      arrivals_(static_cast<Arrivals*>(map(counters, ranks * sizeof(Arrivals)))) {}

SharedExchange::~SharedExchange() {
    unmap();
    munmap(arrivals_, ranks() * sizeof(Arrivals));
}

void SharedExchange::unmap() {
    for (void* at : maps_) munmap(at, capacity_);
    maps_.clear();
}

void SharedExchange::reserve(size_t bytes) {
    unmap();
    capacity_ = std::bit_ceil(std::max(bytes, kLeastBytes));
    for (int file : places_) maps_.push_back(map(file, capacity_));
}

void SharedExchange::meet(size_t) {
    const uint32_t meeting = meetings_.load(std::memory_order_relaxed) + 1;
    meetings_.store(meeting, std::memory_order_relaxed);
    Arrivals& own = arrivals_[rank()];
    own.meetings.store(meeting);
    if (own.sleepers.load() != 0) futex(own.meetings, FUTEX_WAKE, INT_MAX);
    for (int other = 0; other < ranks(); other++) {
        if (other != rank()) wait_for(arrivals_[other], meeting);
    }
}

void SharedExchange::wait_for(Arrivals& other, uint32_t meeting) const {
    for (int spins = 0;; spins++) {
        const uint32_t seen = other.meetings.load();
        if (static_cast<int32_t>(seen - meeting) >= 0) return;
        if (spins < kSpins) {
            relax();
            continue;
        }
        other.sleepers.fetch_add(1);
        futex(other.meetings, FUTEX_WAIT, seen);
        other.sleepers.fetch_sub(1);
    }
}

void HookExchange::reserve(size_t bytes) {
    mine_.resize(bytes);
    all_.resize(bytes * ranks());
}

void HookExchange::meet(size_t bytes) {
    bytes_ = bytes;
    hook_(mine_.data(), all_.data(), bytes);
}

}  // namespace eightfold
