#include "measure.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#ifdef EIGHTFOLD_X86
#include <immintrin.h>
#endif

namespace eightfold {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLine = 64;

std::atomic<uint64_t> kept{0};  // what is read ends here, so that no loop is dropped

// Seconds from the first thread's start of `work` to the last one's end.
template <typename Work>
double timed(int threads, Work work) {
    std::barrier ready(threads);
    std::vector<Clock::time_point> begins(threads), ends(threads);
    const auto body = [&](int thread) {
        ready.arrive_and_wait();
        begins[thread] = Clock::now();
        work(thread);
        ends[thread] = Clock::now();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(body, i);
    body(0);
    for (std::thread& thread : others) thread.join();
    const auto begin = *std::min_element(begins.begin(), begins.end());
    return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - begin).count();
}

// --- reading: xor of kStreams parts that lie one behind the other

uint64_t read_words(const uint8_t* p, size_t part) {
    uint64_t sums[ReadProbe::kStreams] = {};
    for (size_t at = 0; at < part; at += kLine)
        for (int s = 0; s < ReadProbe::kStreams; s++)
            for (int i = 0; i < kLine; i += 8) {
                uint64_t word;
                std::memcpy(&word, p + s * part + at + i, 8);
                sums[s] ^= word;
            }
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

#ifdef EIGHTFOLD_X86

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* p, size_t part) {
    __m256i sums[ReadProbe::kStreams] = {};
    for (size_t at = 0; at < part; at += kLine) {
#pragma GCC unroll 4
        for (int s = 0; s < ReadProbe::kStreams; s++) {
            const auto* line = reinterpret_cast<const __m256i*>(p + s * part + at);
            const __m256i both = _mm256_xor_si256(_mm256_load_si256(line), _mm256_load_si256(line + 1));
            sums[s] = _mm256_xor_si256(sums[s], both);
        }
    }
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), all);
    return words[0] ^ words[1] ^ words[2] ^ words[3];
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t* p, size_t part) {
    __m512i sums[ReadProbe::kStreams] = {};
    for (size_t at = 0; at < part; at += kLine) {
#pragma GCC unroll 4
        for (int s = 0; s < ReadProbe::kStreams; s++) {
            sums[s] = _mm512_xor_si512(sums[s], _mm512_load_si512(p + s * part + at));
        }
    }
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3]));
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, all);
    uint64_t result = 0;
    for (const uint64_t word : words) result ^= word;
    return result;
}

#endif

// --- multiplying: so many rounds of independent sums, enough of them to hide the latency of one

constexpr int64_t kRounds = 24'000'000;

// Products and sums of one round are not written down as asm, so the compiler has to be kept from foreseeing them.
#define EIGHTFOLD_OPAQUE(kind, x) asm volatile("" : "+" kind(x))

int64_t multiply_words(int64_t rounds) {
    int32_t sums[16] = {};
    int32_t a = 3, b = -5;
    for (int64_t i = 0; i < rounds; i++) {
        for (int32_t& sum : sums) {
            EIGHTFOLD_OPAQUE("r", a);
            sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(a * b));
        }
        EIGHTFOLD_OPAQUE("r", b);
    }
    for (const int32_t sum : sums) kept.fetch_add(static_cast<uint32_t>(sum));
    return rounds * 16;
}

#ifdef EIGHTFOLD_X86

// Without VNNI: pairs of byte products, pairs of those, and the sum, three instructions for 32 products. Our own AVX2
// kernel takes more of them, because these saturate.
__attribute__((target("avx2"))) int64_t multiply_avx2(int64_t rounds) {
    constexpr int count = 6;
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5), ones = _mm256_set1_epi16(1);
    __m256i sums[count];
    for (int i = 0; i < count; i++) sums[i] = _mm256_set1_epi32(i);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 6
        for (__m256i& sum : sums) {
            EIGHTFOLD_OPAQUE("x", a);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
        }
    }
    alignas(32) uint64_t words[4 * count];
    for (int i = 0; i < count; i++) _mm256_store_si256(reinterpret_cast<__m256i*>(words) + i, sums[i]);
    for (const uint64_t word : words) kept.fetch_add(word);
    return rounds * count * 32;
}

__attribute__((target("avx512f,avx512vnni"))) int64_t multiply_avx512(int64_t rounds) {
    constexpr int count = 12;
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    __m512i sums[count];
    for (int i = 0; i < count; i++) sums[i] = _mm512_set1_epi32(i);  // sums that begin alike would be taken as one
    for (int64_t i = 0; i < rounds; i++) {
        EIGHTFOLD_OPAQUE("v", a);
#pragma GCC unroll 12
        for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    }
    alignas(64) uint64_t words[8 * count];
    for (int i = 0; i < count; i++) _mm512_store_si512(words + 8 * i, sums[i]);
    for (const uint64_t word : words) kept.fetch_add(word);
    return rounds * count * 64;
}

#endif

struct Probes {
    uint64_t (*read)(const uint8_t* p, size_t part);
    int64_t (*multiply)(int64_t rounds);  // returns how many products it took
};

Probes probes() {
    Probes best = {read_words, multiply_words};
#ifdef EIGHTFOLD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) best = {read_avx2, multiply_avx2};
    if (__builtin_cpu_supports("avx512f")) best.read = read_avx512;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) best.multiply = multiply_avx512;
#endif
    return best;
}

}  // namespace

void ReadProbe::Free::operator()(void* memory) const { std::free(memory); }

ReadProbe::ReadProbe(int threads, size_t bytes) : threads_(threads) {
    const size_t step = static_cast<size_t>(threads) * kStreams * kLine;
    bytes_ = (bytes + step - 1) / step * step;
    part_ = bytes_ / threads / kStreams;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kLine, bytes_)));
    if (!memory_) throw std::bad_alloc();
    timed(threads_,
          [&](int thread) { std::memset(memory_.get() + thread * kStreams * part_, thread + 1, kStreams * part_); });
}

double ReadProbe::gb_s(int passes) {
    double best = 0;
    for (int i = 0; i < passes; i++) {
        const double seconds = timed(threads_, [&](int thread) {
            kept.fetch_add(probes().read(memory_.get() + thread * kStreams * part_, part_));
        });
        best = std::max(best, static_cast<double>(bytes_) / seconds / 1e9);
    }
    return best;
}

double int8_tops(int threads, int passes) {
    const auto multiply = probes().multiply;
    std::atomic<int64_t> products{0};
    double best = 0;
    for (int i = 0; i < passes; i++) {
        products = 0;
        const double seconds = timed(threads, [&](int) { products.fetch_add(multiply(kRounds)); });
        best = std::max(best, 2.0 * static_cast<double>(products) / seconds / 1e12);
    }
    return best;
}

}  // namespace eightfold
