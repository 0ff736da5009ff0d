// The paged cache of keys and values, and how new tokens enter it. Layout of a page: see AttnRows in kernels.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace eightfold {

// How one layer keeps keys and values, and reads queries.
struct AttentionParams {
    CacheKind kind = CacheKind::bf16;
    int window = 0;
    bool is_local = false;  // turns queries and keys as Attention::set_local_rope says
    // int8: one scale for each head. int8x2: one for each channel, with offsets. Products of reals and reciprocals.
    std::vector<float> query_inv;  // (H)
    std::vector<float> score_scale;  // (H): q_scale * k_scale * score multiplier
    std::vector<float> key_scale, key_inv, key_offset;  // (G, D)
    std::vector<float> value_scale, value_inv, value_offset;  // (G, D)
    // Empty, (D) where each head is normed by itself, or of all ranks' heads, which are normed as one row.
    std::vector<float> query_norm, key_norm;
};

struct Shape {
    int heads = 0, kv_heads = 0, head_dim = 0;
    int query_dim() const { return (head_dim + 3) / 4 * 4; }
    int value_dim() const { return (head_dim + 15) / 16 * 16; }
    int queries_per_kv() const { return heads / kv_heads; }
};

// Pages of all layers in one allocation; pages that were never written take no memory.
class Cache {
public:
    Cache(Shape shape, const std::vector<AttentionParams>& layers, int pages);
    ~Cache();
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    int pages() const { return pages_; }
    size_t bytes() const { return bytes_; }
    static size_t page_bytes(Shape shape, CacheKind kind);  // of one layer, keys and values of all heads

    uint8_t* keys(int layer, int page, int head) const;
    uint8_t* values(int layer, int page, int head) const;

    // Puts one token's rotated key and its value, (D) float32 each, of one head at a position of a page.
    void store(const Kernels& kernels, int layer, int page, int at, int head, const float* k, const float* v) const;
    // The same for kStored tokens at once, from a position that is a multiple of it on; rows are `ld` floats apart.
    static constexpr int kStored = 4;
    void store_run(const Kernels& kernels, int layer, int page, int at, int head, const float* k, size_t ldk,
                   const float* v, size_t ldv) const;
    // Takes memory from the system for what one layer has of a page, which changes nothing in it. False: the system
    // cannot, and gives memory when it is written.
    bool populate(int layer, int page) const;
    // Asks for a page of one head.
    void prefetch(int layer, int page, int head) const;
    // Asks for the memory that `store` will write.
    void prefetch_place(int layer, int page, int at, int head) const;

private:
    Shape shape_;
    const std::vector<AttentionParams>& layers_;
    int pages_;
    std::vector<size_t> layer_at_;
    size_t bytes_ = 0;
    uint8_t* memory_ = nullptr;
};

}  // namespace eightfold
