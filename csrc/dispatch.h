// Which kernels this machine can run, how many threads it lends us, and how much memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernels.h"

namespace eightfold {

// How many of what meet in registers.
struct Tiles {
    int weight_rows;   // of a tile
    int tokens;        // that meet them in int8, where a step has at most kFewTokens
    int packed_tokens; // the same where it has more: tokens are then the lanes
    int float_tokens;  // the same in float32
};

// An instruction set: what it needs, and how it computes, in words.
struct Isa {
    const char* name;
    const char* needs;  // of the CPU
    const char* dot;    // how four unsigned bytes meet four signed ones in each lane
    const char* fma;    // how float32 products are summed
    bool available;
    const Kernels& kernels;
    Tiles tiles;
};

// All that were built, best last.
const std::vector<Isa>& isas();

// Names of those that this machine has, best last.
std::vector<std::string> available_isas();

// The kernels of a name, or the best when it is empty. Throws std::invalid_argument naming what the machine lacks.
const Kernels& kernels_for(const std::string& name);

// CPUs this process may use: its affinity, cut by the container's quota.
int usable_cpus();

}  // namespace eightfold
