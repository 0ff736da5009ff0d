#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace eightfold {

namespace {

// How much is asked for before it is read: by a few tokens' products, and by those of a block.
constexpr size_t kPrefetchBytes = 32 << 10, kPrefetchPacked = 8 << 10;

// Chunks of a group for each thread.
constexpr int kFewTurns = 4;

// Whether no number has all exponent bits set.
template <typename T>
bool is_finite(const T* at, size_t count, uint32_t exponent) {
    bool found = false;
    for (size_t i = 0; i < count; i++) {
        T x;  // of any alignment
        std::memcpy(&x, at + i, sizeof x);
        found |= (x & exponent) == exponent;
    }
    return !found;
}

// Rows of a chunk for many tokens: as many as fit, but so that threads end together; kLanes rows leave a product at once.
int many_rows(int rows, int threads) {
    int best = kManyRows;
    const auto longest = [&](int size) { return chunk_count(chunk_count(rows, size), threads) * size; };
    for (int size = kManyRows - kLanes; size >= 2 * kLanes; size -= kLanes) {
        if (longest(size) < longest(best)) best = size;
    }
    return best;
}

}  // namespace

size_t Linear::weight_bytes() const {
    const size_t size = kind != LinearKind::floating ? 1 : dtype == DType::f32 ? 4 : 2;
    return size * static_cast<size_t>(outputs) * static_cast<size_t>(inputs);
}

bool Linear::prepare(const Kernels& kernels, int begin, int end) {
    if (kind == LinearKind::none) return true;
    if (kind == LinearKind::floating) {
        const size_t first = static_cast<size_t>(begin) * inputs, count = static_cast<size_t>(end - begin) * inputs;
        if (dtype == DType::f32) return is_finite(static_cast<const uint32_t*>(weight) + first, count, 0x7f800000u);
        return is_finite(static_cast<const uint16_t*>(weight) + first, count, dtype == DType::f16 ? 0x7c00u : 0x7f80u);
    }
    const auto* rows = static_cast<const int8_t*>(weight) + static_cast<size_t>(begin) * inputs;
    kernels.row_sums(rows, inputs, end - begin, inputs, weight_sum.data() + begin);
    if (!is_static()) return true;
    // Wraps around as the products do: only the total has to fit.
    for (int n = begin; n < end; n++) {
        quant_bias[n] = static_cast<int32_t>(static_cast<uint32_t>(quant_bias[n]) -
                                             128u * static_cast<uint32_t>(weight_sum[n]));
    }
    return true;
}

// Wraps around as the products do: only the total of all shares has to fit.
void Linear::keep_sums(const int32_t* acc, int n0, int count, bool is_static, int32_t offset, float* out) const {
    const auto times = static_cast<uint32_t>(offset + 128);
    for (int n = 0; n < count; n++) {
        const auto sum = static_cast<uint32_t>(acc[n]);
        const uint32_t kept = is_static ? sum + static_cast<uint32_t>(quant_bias[n0 + n])
                                        : sum - times * static_cast<uint32_t>(weight_sum[n0 + n]);
        std::memcpy(out + n, &kept, sizeof kept);
    }
}

void Prepared::reserve(int tokens, int width, bool is_real) {
    const size_t ld = row_bytes(width);
    const size_t rows = static_cast<size_t>(tokens + kLanes - 1) / kLanes * kLanes;
    const size_t bytes_needed = 2 * ld * rows + kAlign;
    if (storage.size() < bytes_needed) storage.resize(bytes_needed);
    const auto at = reinterpret_cast<uintptr_t>(storage.data());
    bytes = storage.data() + (kAlign - at % kAlign) % kAlign;
    if (params.size() < rows) params.resize(rows);
    if (is_real && real.size() < rows * width) real.resize(rows * width);
}

bool Group::has_floating() const {
    return std::any_of(linears.begin(), linears.end(),
                       [](const Linear& linear) { return linear.kind == LinearKind::floating; });
}

int Group::outputs() const {
    int total = 0;
    for (const Linear& linear : linears) total += linear.outputs;
    return total;
}

void Group::find_forms() {
    for (const Linear& linear : linears) {
        Form form{linear.kind, 0, 0};
        if (linear.is_static()) form = {linear.kind, linear.inv_input_scale, linear.input_offset};
        const auto at = std::find(forms.begin(), forms.end(), form);
        form_of.push_back(static_cast<int>(at - forms.begin()));
        if (at == forms.end()) forms.push_back(form);
    }
}

void Group::cut(int threads, bool paired) {
    is_paired = paired;
    const size_t distinct = paired ? 1 : linears.size();
    size_t bytes = 0;
    for (size_t i = 0; i < distinct; i++) bytes += linears[i].weight_bytes();
    for (size_t i = 0; i < distinct; i++) {
        const int rows = linears[i].outputs, index = static_cast<int>(i);
        // Of a pair whole blocks, so that what is made of it can be packed.
        const int size = paired && rows >= threads * kManyRows ? kManyRows : many_rows(rows, threads);
        for (int n = 0; n < rows; n += size) many.push_back({index, n, std::min(size, rows - n)});
        // For a few tokens chunks of about equal size, as many as threads like: memory is read best in long runs, and
        // all are to end together.
        const double share = static_cast<double>(linears[i].weight_bytes()) / static_cast<double>(bytes);
        const int turns = std::max(1, static_cast<int>(std::lround(share * kFewTurns)));
        const int step = std::max(8, (rows / (turns * threads) + 3) / 4 * 4);
        for (int n = 0; n < rows; n += step) few.push_back({index, n, std::min(step, rows - n)});
    }
}

void Group::prefetch(int tokens, int index) const {
    const std::vector<Chunk>& all = chunks(tokens);
    if (tokens > kTokenBlock || index >= static_cast<int>(all.size())) return;
    const Chunk& chunk = all[index];
    const bool few_tokens = tokens <= kFewTokens;
    const size_t most = few_tokens ? kPrefetchBytes : kPrefetchPacked;
    for (int i = chunk.linear; i < (is_paired && !few_tokens ? 2 : chunk.linear + 1); i++) {
        const Linear& linear = linears[i];
        const size_t row = linear.weight_bytes() / static_cast<size_t>(linear.outputs);
        const size_t bytes = std::min(row * static_cast<size_t>(chunk.count), most);
        const auto* at = static_cast<const char*>(linear.weight) + row * static_cast<size_t>(chunk.begin);
        for (size_t j = 0; j < bytes; j += 64) __builtin_prefetch(at + j, 0, 2);
    }
}

void Group::prepare(const Kernels& kernels, const float* x, int t, bool is_generated, bool symmetric, bool packed,
                    std::vector<Prepared>& prepared, Scratch& scratch) const {
    const int width = inputs();
    if (gain != nullptr) {
        scratch.row.resize(width);
        kernels.rms_norm(x, width, gain, norm_bias, eps, scratch.row.data());
        x = scratch.row.data();
    }
    const size_t ld = row_bytes(width);
    if (packed) scratch.rows.resize(forms.size() * 2 * kLanes * ld);
    for (size_t i = 0; i < forms.size(); i++) {
        const Form& form = forms[i];
        Prepared& to = prepared[i];
        uint8_t* out = packed ? scratch.rows.data() + (2 * i * kLanes + t % kLanes) * ld
                              : to.bytes + static_cast<size_t>(t) * planes(form.kind) * ld;
        if (form.kind == LinearKind::floating) {
            std::copy(x, x + width, to.real.data() + static_cast<size_t>(t) * width);
        } else if (form.kind == LinearKind::w8a16) {
            to.params[t] = kernels.quantize_16(x, width, out, out + (packed ? kLanes : 1) * ld);
            if (wants_norm) to.params[t].norm = kernels.norm(x, width);
        } else if (form.kind == LinearKind::w8a8 || (form.kind == LinearKind::mix && is_generated)) {
            kernels.quantize_static(x, width, form.inv_scale, form.offset, out);
        } else {
            to.params[t] = kernels.quantize_token(x, width, symmetric, out);
        }
    }
}

void Group::pack(const Kernels& kernels, int block, std::vector<Prepared>& prepared, const Scratch& scratch) const {
    const size_t ld = row_bytes(inputs()), size = kLanes * ld;
    for (size_t i = 0; i < forms.size(); i++) {
        if (forms[i].kind == LinearKind::floating) continue;
        const int count = planes(forms[i].kind);
        uint8_t* to = prepared[i].bytes + static_cast<size_t>(block) * count * size;
        for (int plane = 0; plane < count; plane++) {
            kernels.pack(scratch.rows.data() + (2 * i + plane) * size, ld, to + plane * size);
        }
    }
}

void Group::multiply(const Kernels& kernels, int which, int n0, int count, int t0, int t1, const uint8_t* generated,
                     const std::vector<Prepared>& prepared, bool packed, bool adds, Scratch& scratch, float* y,
                     size_t ldy) const {
    const Linear& linear = linears[which];
    const Prepared& from = prepared[form_of[which]];
    const int width = linear.inputs, rows = t1 - t0;
    if (linear.kind == LinearKind::floating) {
        const size_t size = linear.dtype == DType::f32 ? 4 : 2;
        const auto* weight = static_cast<const char*>(linear.weight) + static_cast<size_t>(n0) * width * size;
        float* to = adds ? scratch.first.data() : y;
        const size_t ld = adds ? count : ldy;
        kernels.gemm_float(weight, linear.dtype, width, count, from.real.data() + static_cast<size_t>(t0) * width,
                           width, rows, width, to, ld);
        for (int t = 0; t < rows; t++) {
            if (!linear.bias.empty()) kernels.add(to + t * ld, linear.bias_at(n0), count);
            if (adds) kernels.add(y + t * ldy, to + t * ld, count);
        }
        return;
    }
    const int many = planes(linear.kind);
    const size_t ld = row_bytes(width);
    const auto* weight = static_cast<const int8_t*>(linear.weight) + static_cast<size_t>(n0) * width;
    const uint8_t* x = from.bytes + static_cast<size_t>(t0) * many * ld;
    const bool is_static = linear.kind == LinearKind::w8a8;
    const Scales16 scales{linear.weight_sum.data() + n0, linear.scale.data() + n0,
                          linear.offset.empty() ? nullptr : linear.offset.data() + n0, linear.bias_at(n0)};
    if (packed && !linear.keeps_sums && (is_static || many == 2)) {
        const PackedInput input{x, kLanes * ld, rows, width};
        const Output output{y, ldy, adds};
        if (is_static) {
            kernels.packed_static(weight, width, count, input, linear.quant_bias.data() + n0,
                                  linear.deq_scale.data() + n0, output);
        } else {
            kernels.packed_16(weight, width, count, input, scales, from.params.data() + t0, output);
        }
        return;
    }
    int32_t* sums = scratch.sums.data();
    if (packed) {
        const int blocks = chunk_count(rows, kLanes) * many;
        kernels.gemm_packed(weight, width, count, x, kLanes * ld, blocks, width, sums, count);
    } else {
        kernels.gemm_i8(weight, width, count, x, ld, rows * many, width, sums, count);
    }
    for (int t = 0; t < rows; t++) {
        const size_t row = packed ? t / kLanes * kLanes * many + t % kLanes : static_cast<size_t>(t) * many;
        const int32_t* acc = sums + row * count;
        float* out = y + t * ldy;
        const int32_t* low = acc + static_cast<size_t>(packed ? kLanes : 1) * count;
        if (many == 2 && linear.keeps_sums) {
            linear.keep_sums(acc, n0, count, false, 0, out);
            std::memcpy(out + linear.outputs, low, count * sizeof(int32_t));
        } else if (many == 2) {
            kernels.finish_16(acc, low, count, scales, from.params[t0 + t], adds, out);
        } else if (linear.keeps_sums) {
            const bool reads_static = linear.reads_static(generated != nullptr && generated[t0 + t]);
            linear.keep_sums(acc, n0, count, reads_static, from.params[t0 + t].offset, out);
        } else if (is_static || (linear.kind == LinearKind::mix && generated[t0 + t])) {
            kernels.finish_static(acc, count, linear.quant_bias.data() + n0, linear.deq_scale.data() + n0, adds, out);
        } else {
            kernels.finish_token(acc, count, linear.weight_sum.data() + n0, linear.scale.data() + n0,
                                 linear.bias_at(n0), from.params[t0 + t], adds, out);
        }
    }
}

}  // namespace eightfold
