#include "dispatch.h"

#include <sched.h>
#ifdef EIGHTFOLD_ARM
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>
#include <thread>

namespace eightfold {

// isa_*.cc
Tiles scalar_tiles();
#ifdef EIGHTFOLD_X86
Tiles avx2_tiles();
Tiles avx512_tiles();
#endif
#ifdef EIGHTFOLD_ARM
Tiles neon_tiles();
Tiles dotprod_tiles();
Tiles i8mm_tiles();
#endif

namespace {

std::vector<Isa> find_isas() {
    std::vector<Isa> found = {{"scalar", "any CPU", "plain integer products", "plain float32 products", true,
                               scalar_kernels(), scalar_tiles()}};
#ifdef EIGHTFOLD_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    found.push_back({"avx2", "AVX2, FMA and F16C", "vpmaddwd on bytes widened to 16 bits", "float32 FMA", avx2,
                     avx2_kernels(), avx2_tiles()});
    found.push_back({"avx512", "AVX-512 F, BW, VL, DQ and VNNI", "vpdpbusd", "float32 FMA", avx512, avx512_kernels(),
                     avx512_tiles()});
#endif
#ifdef EIGHTFOLD_ARM
    // Bits of Linux's interface to programs (asm/hwcap.h), which older headers lack.
    constexpr unsigned long kAsimdDp = 1ul << 20, kI8mm = 1ul << 13;
    const bool dotprod = (getauxval(AT_HWCAP) & kAsimdDp) != 0;
    const bool i8mm = dotprod && (getauxval(AT_HWCAP2) & kI8mm) != 0;
    found.push_back({"neon", "Advanced SIMD", "smull, with pairs added in 32 bits", "float32 FMA", true, neon_kernels(),
                     neon_tiles()});
    found.push_back({"dotprod", "Advanced SIMD with dot products (asimddp)", "sdot", "float32 FMA", dotprod,
                     dotprod_kernels(), dotprod_tiles()});
    found.push_back({"i8mm", "Advanced SIMD with dot products and products of int8 matrices (asimddp, i8mm)",
                     "sdot, and smmla for many tokens", "float32 FMA", i8mm, i8mm_kernels(), i8mm_tiles()});
#endif
    return found;
}

// CPUs of a cgroup's quota, or 0 when there is none.
int quota() {
    double limit = 0, period = 0;
    std::ifstream v2("/sys/fs/cgroup/cpu.max");
    std::string first;
    if (v2 >> first >> period && first != "max") limit = std::stod(first);
    if (limit <= 0) {
        std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
        std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
        if (!(quota_file >> limit && period_file >> period)) limit = 0;
    }
    return limit > 0 && period > 0 ? std::max(1, static_cast<int>(std::ceil(limit / period))) : 0;
}

}  // namespace

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = find_isas();
    return found;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.available) names.push_back(isa.name);
    return names;
}

const Kernels& kernels_for(const std::string& name) {
    const std::vector<Isa>& all = isas();
    if (name.empty()) {
        const auto best = std::find_if(all.rbegin(), all.rend(), [](const Isa& isa) { return isa.available; });
        return best->kernels;
    }
    std::string known;
    for (const Isa& isa : all) {
        if (name == isa.name) {
            if (isa.available) return isa.kernels;
            throw std::invalid_argument(std::string("this CPU lacks ") + isa.needs);
        }
        known += known.empty() ? isa.name : std::string(", ") + isa.name;
    }
    throw std::invalid_argument("expected one of " + known);
}

int usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    int count = static_cast<int>(std::thread::hardware_concurrency());
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
    const int most = quota();
    return std::max(1, most > 0 ? std::min(count, most) : count);
}

}  // namespace eightfold
