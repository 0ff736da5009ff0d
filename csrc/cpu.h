// Which kernels this machine can run, how many threads it lends us, and how much memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernels.h"

namespace eightfold {

// Names of the instruction sets this machine has, best last.
std::vector<std::string> available_isas();

// The kernels of a name, or the best when it is empty. Throws std::invalid_argument naming what the machine lacks.
const Kernels& kernels_for(const std::string& name);

// CPUs this process may use: its affinity, cut by the container's quota.
int usable_cpus();

}  // namespace eightfold
