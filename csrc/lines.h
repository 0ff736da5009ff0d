// Vectors that begin where a cache line does, so that loads and stores of whole lanes do not cross two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace eightfold {

// Bytes of a cache line, and to which rows of activations are padded; a kernel may read the padding of them, never that
// of weights.
constexpr int kAlign = 64;

template <typename T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlign})); }
    void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{kAlign}); }

    bool operator==(const LineAllocator&) const { return true; }
};

template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace eightfold
