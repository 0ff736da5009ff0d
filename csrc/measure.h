// What this machine can do at most, as a program can reach it: all threads reading memory, all threads multiplying
// bytes. Both take the widest instructions of the CPU, whatever the model uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace eightfold {

// A buffer too large for any cache, first touched by the threads that read it.
class ReadProbe {
public:
    ReadProbe(int threads, size_t bytes);

    // 10^9 bytes a second: the best of some passes over the whole buffer. Each thread reads kStreams parts of its share
    // side by side, which keeps more lines in flight than one.
    double gb_s(int passes);

    size_t bytes() const { return bytes_; }

    static constexpr int kStreams = 4;

private:
    struct Free {
        void operator()(void* memory) const;
    };

    int threads_;
    size_t part_;  // bytes of a stream
    size_t bytes_;
    std::unique_ptr<uint8_t, Free> memory_;
};

// 10^12 operations a second of the best pass: products of unsigned and signed bytes that are summed in registers, two
// operations for each product and sum.
double int8_tops(int threads, int passes);

}  // namespace eightfold
