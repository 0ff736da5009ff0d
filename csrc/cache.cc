#include "cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace eightfold {

namespace {

int group_of(CacheKind kind) { return kind == CacheKind::bf16 ? 2 : 4; }
int size_of(CacheKind kind) { return kind == CacheKind::bf16 ? 2 : 1; }

size_t key_bytes(Shape shape, CacheKind kind) { return static_cast<size_t>(shape.query_dim()) * kPage * size_of(kind); }
size_t value_bytes(Shape shape, CacheKind kind) {
    return static_cast<size_t>(shape.value_dim()) * kPage * size_of(kind);
}

uint16_t to_bf16(float x) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A key among those of a page. 128 more is the other sign bit.
void put_key(const int8_t* k, int dim, int zero, uint8_t* to) {
    const uint32_t others = zero == 0 ? 0u : 0x80808080u;
    const auto put = [&](int d, int count) {
        uint32_t four = 0;
        std::memcpy(&four, k + d, count);
        four ^= others;
        std::memcpy(to + static_cast<size_t>(d) * kPage, &four, count);
    };
    const int whole = dim / 4 * 4;
    for (int d = 0; d < whole; d += 4) put(d, 4);  // of a constant count: one load, one store
    if (whole < dim) put(whole, dim - whole);
}

// Values of four positions, dimension by dimension.
void put_values(const int8_t v[Cache::kStored][512], int dim, uint8_t* to) {
    for (int d = 0; d < dim; d++) {
        uint32_t four = 0;
        for (int i = 0; i < Cache::kStored; i++) four |= static_cast<uint32_t>(static_cast<uint8_t>(v[i][d])) << 8 * i;
        std::memcpy(to + static_cast<size_t>(d) * Cache::kStored, &four, sizeof four);
    }
}

}  // namespace

size_t Cache::page_bytes(Shape shape, CacheKind kind) {
    return static_cast<size_t>(shape.kv_heads) * (key_bytes(shape, kind) + value_bytes(shape, kind));
}

Cache::Cache(Shape shape, const std::vector<AttentionParams>& layers, int pages)
    : shape_(shape), layers_(layers), pages_(pages) {
    for (const AttentionParams& layer : layers) {
        layer_at_.push_back(bytes_);
        bytes_ += page_bytes(shape, layer.kind) * static_cast<size_t>(pages);
    }
    if (bytes_ == 0) return;
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    madvise(memory_, bytes_, MADV_HUGEPAGE);
}

Cache::~Cache() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
}

uint8_t* Cache::keys(int layer, int page, int head) const {
    const CacheKind kind = layers_[layer].kind;
    const size_t one_head = key_bytes(shape_, kind) + value_bytes(shape_, kind);
    return memory_ + layer_at_[layer] + page_bytes(shape_, kind) * static_cast<size_t>(page) + one_head * head;
}

uint8_t* Cache::values(int layer, int page, int head) const {
    return keys(layer, page, head) + key_bytes(shape_, layers_[layer].kind);
}

void Cache::store(const Kernels& kernels, int layer, int page, int at, int head, const float* k, const float* v) const {
    const AttentionParams& params = layers_[layer];
    const int dim = shape_.head_dim, value_dim = shape_.value_dim(), group = group_of(params.kind);
    uint8_t *keys_at = keys(layer, page, head), *values_at = values(layer, page, head);
    if (params.kind == CacheKind::bf16) {
        auto* keys16 = reinterpret_cast<uint16_t*>(keys_at);
        auto* values16 = reinterpret_cast<uint16_t*>(values_at);
        for (int d = 0; d < dim; d++) {
            keys16[(d / group * kPage + at) * group + d % group] = to_bf16(k[d]);
            values16[(at / group * value_dim + d) * group + at % group] = to_bf16(v[d]);
        }
        return;
    }
    int8_t k8[512], v8[512];
    const size_t first = static_cast<size_t>(head) * dim;
    kernels.quantize_heads(k, dim, params.key_inv.data() + first, params.key_offset.data() + first, 1, k8);
    kernels.quantize_heads(v, dim, params.value_inv.data() + first, params.value_offset.data() + first, 1, v8);
    put_key(k8, dim, kernels.zero, keys_at + at * group);
    uint8_t* value = values_at + at / group * value_dim * group + at % group;
    for (int d = 0; d < dim; d++) value[d * group] = static_cast<uint8_t>(v8[d]);
}

void Cache::store_run(const Kernels& kernels, int layer, int page, int at, int head, const float* k, size_t ldk,
                      const float* v, size_t ldv) const {
    const AttentionParams& params = layers_[layer];
    if (params.kind == CacheKind::bf16) {
        for (int i = 0; i < kStored; i++) store(kernels, layer, page, at + i, head, k + i * ldk, v + i * ldv);
        return;
    }
    const int dim = shape_.head_dim;
    const size_t first = static_cast<size_t>(head) * dim;
    int8_t k8[512], v8[kStored][512];
    for (int i = 0; i < kStored; i++) {
        kernels.quantize_heads(k + i * ldk, dim, params.key_inv.data() + first, params.key_offset.data() + first, 1,
                               k8);
        put_key(k8, dim, kernels.zero, keys(layer, page, head) + (at + i) * kStored);
        kernels.quantize_heads(v + i * ldv, dim, params.value_inv.data() + first, params.value_offset.data() + first, 1,
                               v8[i]);
    }
    put_values(v8, dim, values(layer, page, head) + static_cast<size_t>(at) * shape_.value_dim());
}

bool Cache::populate(int layer, int page) const {
#ifdef MADV_POPULATE_WRITE
    constexpr uintptr_t unit = 4096;
    const auto first = reinterpret_cast<uintptr_t>(keys(layer, page, 0)) / unit * unit;
    const size_t bytes = page_bytes(shape_, layers_[layer].kind) + unit;
    const size_t left = reinterpret_cast<uintptr_t>(memory_) + bytes_ - first;
    return madvise(reinterpret_cast<void*>(first), std::min(bytes, left), MADV_POPULATE_WRITE) == 0;
#else
    (void)layer, (void)page;
    return false;
#endif
}

void Cache::prefetch(int layer, int page, int head) const {
    const uint8_t* at = keys(layer, page, head);
    const uint8_t* end = values(layer, page, head) + value_bytes(shape_, layers_[layer].kind);
    for (; at < end; at += 64) __builtin_prefetch(at);
}

void Cache::prefetch_place(int layer, int page, int at, int head) const {
    const CacheKind kind = layers_[layer].kind;
    const int group = group_of(kind);
    constexpr int line = 64, run = 4;  // bytes of a position in a row of keys
    const uint8_t* key = keys(layer, page, head) + at * run;
    for (int d = 0; d < shape_.head_dim; d += group) __builtin_prefetch(key + d / group * kPage * run, 1);
    const size_t row = value_bytes(shape_, kind) / kPage * group;
    const uint8_t* value = values(layer, page, head) + at / group * row;
    for (size_t i = 0; i < row; i += line) __builtin_prefetch(value + i, 1);
}

}  // namespace eightfold
