// What is said when the file behind mapped memory turns out to be shorter than it was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace eightfold {

// Takes note of a mapped file. From the first one on, a SIGBUS inside of such a file writes one line that names it to
// stderr and ends the process with exit code 1; any other goes to the handler that was there before. A name without
// bytes forgets the file that begins at the address. Beyond kMostFiles files nothing is noted.
void watch_mapping(uintptr_t begin, size_t nbytes, const std::string& name);

}  // namespace eightfold
