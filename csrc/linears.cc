#include "linears.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace eightfold {

namespace {

// How much is asked for before it is read: by a few tokens' products, and by those of a block.
constexpr size_t kPrefetchBytes = 32 << 10, kPrefetchPacked = 8 << 10;

// Chunks of a group for each thread, of a few tokens: memory is read best in long runs, so one chunk until it is so
// large that threads would not end together.
constexpr double kFewTurns = 4, kFewBytes = 1 << 20;

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
        quant_bias[n] =
            static_cast<int32_t>(static_cast<uint32_t>(quant_bias[n]) -
                                 static_cast<uint32_t>(kernels.zero) * static_cast<uint32_t>(weight_sum[n]));
    }
    return true;
}

void Linear::prepare_new(const Kernels& kernels, int begin, int count) {
    const std::atomic_ref<int> unknown(unknown_rows);
    if (unknown.load(std::memory_order_relaxed) == 0) return;
    const int32_t *from = weight_sum.data() + begin, *end = from + count;
    while ((from = std::find(from, end, kUnknownSum)) != end) {
        const int32_t* known = std::find_if(from, end, [](int32_t sum) { return sum != kUnknownSum; });
        (void)prepare(kernels, static_cast<int>(from - weight_sum.data()), static_cast<int>(known - weight_sum.data()));
        unknown.fetch_sub(static_cast<int>(known - from), std::memory_order_relaxed);
        from = known;
    }
}

void Linear::prefetch(int begin, int rows, int runs, size_t most) const {
    const size_t row = weight_bytes() / static_cast<size_t>(outputs);
    const auto* at = static_cast<const char*>(weight) + row * static_cast<size_t>(begin);
    const size_t apart = row * static_cast<size_t>(rows / runs), bytes = std::min(apart, most / runs);
    for (size_t j = 0; j < bytes; j += 64)
        for (int r = 0; r < runs; r++) __builtin_prefetch(at + r * apart + j, 0, 2);
}

StaticRows Linear::static_rows(int n) const {
    const auto* rows = static_cast<const int8_t*>(weight) + static_cast<size_t>(n) * inputs;
    return {rows, quant_bias.data() + n, deq_scale.data() + n};
}

Rows16 Linear::rows_16(int n) const {
    const auto* rows = static_cast<const int8_t*>(weight) + static_cast<size_t>(n) * inputs;
    return {rows, {weight_sum.data() + n, scale.data() + n, offset.empty() ? nullptr : offset.data() + n, bias_at(n)}};
}

// Both wrap around as the products do: only the total of all shares has to fit.
void Linear::keep_static_sums(const int32_t* acc, int begin, int count, float* out) const {
    for (int n = 0; n < count; n++) {
        const uint32_t kept = static_cast<uint32_t>(acc[n]) + static_cast<uint32_t>(quant_bias[begin + n]);
        std::memcpy(out + n, &kept, sizeof kept);
    }
}

void Linear::keep_token_sums(const int32_t* acc, int begin, int count, int32_t times, float* out) const {
    for (int n = 0; n < count; n++) {
        const uint32_t kept =
            static_cast<uint32_t>(acc[n]) - static_cast<uint32_t>(times) * static_cast<uint32_t>(weight_sum[begin + n]);
        std::memcpy(out + n, &kept, sizeof kept);
    }
}

namespace {

size_t in_blocks(int tokens) { return static_cast<size_t>(chunk_count(tokens, kLanes)) * kLanes; }

}  // namespace

void Prepared::reserve(int tokens, int width, int planes) {
    const size_t rows = in_blocks(tokens), size = planes * row_bytes(width) * rows;
    if (bytes.size() < size) bytes.resize(size);
    if (params.size() < rows) params.resize(rows);
}

void Prepared::reserve_real(int tokens, int width) {
    const size_t size = in_blocks(tokens) * width;
    if (real.size() < size) real.resize(size);
}

bool Group::has_floating() const {
    return std::any_of(linears.begin(), linears.end(),
                       [](const Linear& linear) { return linear.kind == LinearKind::floating; });
}

size_t Group::weight_bytes() const {
    size_t total = 0;
    for (const Linear& linear : linears) total += linear.weight_bytes();
    return total;
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

void Group::make_chunks(int threads) {
    const bool is_first = cut != Cut::each;
    const size_t distinct = is_first ? 1 : linears.size();
    size_t bytes = 0;
    for (size_t i = 0; i < distinct; i++) bytes += linears[i].weight_bytes();
    const double all = static_cast<double>(bytes);
    const double few_turns = std::clamp((is_first ? 2 : 1) * all / threads / kFewBytes, 1.0, kFewTurns);
    for (size_t i = 0; i < distinct; i++) {
        const int rows = linears[i].outputs, index = static_cast<int>(i);
        // Of a pair whole blocks, so that what is made of it can be packed.
        const int size = is_first && rows >= threads * kManyRows ? kManyRows : many_rows(rows, threads);
        for (int n = 0; n < rows; n += size) many.push_back({index, n, std::min(size, rows - n)});
        const double share = static_cast<double>(linears[i].weight_bytes()) / all;
        const int turns = std::max(1, static_cast<int>(std::lround(share * few_turns)));
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
    for (int i = chunk.linear; i < (cut == Cut::pairs && !few_tokens ? 2 : chunk.linear + 1); i++) {
        const Linear& linear = linears[i];
        const int rows = few_tokens ? std::min(chunk.count, rows_of_piece(chunk, tokens)) : chunk.count;
        linear.prefetch(chunk.begin, rows, few_tokens && rows % 4 == 0 ? 4 : 1, most);  // as gemm_i8 walks
    }
}

void Group::prepare(const Kernels& kernels, Token token, Layout layout, std::vector<Prepared>& prepared,
                    Scratch& scratch) const {
    const int width = inputs(), t = token.t;
    const bool packed = layout == Layout::packed;
    const float* x = token.x;
    if (gain != nullptr) {
        scratch.row.resize(width);
        kernels.rms_norm(x, width, gain, norm_bias, eps, scratch.row.data());
        x = scratch.row.data();
    }
    const size_t ld = row_bytes(width);
    if (packed) scratch.rows.resize(forms.size() * 2 * kLanes * ld);
    for (size_t i = 0; i < forms.size(); i++) {
        const Form& form = forms[i];
        if (form.kind == LinearKind::none) continue;
        Prepared& to = prepared[i];
        uint8_t* out = packed ? scratch.rows.data() + (2 * i * kLanes + t % kLanes) * ld
                              : to.bytes.data() + static_cast<size_t>(t) * planes(form.kind) * ld;
        if (form.kind == LinearKind::floating) {
            std::copy(x, x + width, to.real.data() + static_cast<size_t>(t) * width);
        } else if (form.kind == LinearKind::w8a16) {
            to.params[t] = kernels.quantize_16(x, width, out, out + (packed ? kLanes : 1) * ld);
            if (wants_norm) to.params[t].norm = std::sqrt(kernels.squares(x, width));
        } else if (form.kind == LinearKind::w8a8 ||
                   (form.kind == LinearKind::mix && token.origin == Origin::generated)) {
            kernels.quantize_static(x, width, form.inv_scale, form.offset, out);
        } else {
            to.params[t] = kernels.quantize_token(x, width, symmetric_tokens, out);
        }
    }
}

void Group::pack(const Kernels& kernels, int block, std::vector<Prepared>& prepared, const Scratch& scratch) const {
    const size_t ld = row_bytes(inputs()), size = kLanes * ld;
    for (size_t i = 0; i < forms.size(); i++) {
        if (forms[i].kind == LinearKind::floating || forms[i].kind == LinearKind::none) continue;
        const int count = planes(forms[i].kind);
        uint8_t* to = prepared[i].bytes.data() + static_cast<size_t>(block) * count * size;
        for (int plane = 0; plane < count; plane++) {
            kernels.pack(scratch.rows.data() + (2 * i + plane) * size, ld, to + plane * size);
        }
    }
}

PackedInput Group::packed_input(const Piece& piece, const std::vector<Prepared>& prepared) const {
    const size_t ld = row_bytes(inputs());
    const int many = planes(linears[piece.linear].kind);
    const uint8_t* blocks = prepared[form_of[piece.linear]].bytes.data() + static_cast<size_t>(piece.t0) * many * ld;
    return {blocks, kLanes * ld, piece.t1 - piece.t0, inputs()};
}

bool Group::gates(const Group* next) const {
    if (linears.size() != 2 || form_of[0] != form_of[1]) return false;
    return forms[form_of[0]].kind == (next != nullptr ? LinearKind::w8a8 : LinearKind::w8a16);
}

void Group::gate(const Kernels& kernels, const Piece& piece, const std::vector<Prepared>& prepared, const Group& next,
                 Prepared& handed) const {
    const int n = piece.begin;
    const size_t block = kLanes * row_bytes(next.inputs());
    uint8_t* to = handed.bytes.data() + piece.t0 / kLanes * block + static_cast<size_t>(n) * kLanes;
    kernels.gated_static(activation, linears[0].static_rows(n), linears[1].static_rows(n), inputs(), piece.count,
                         packed_input(piece, prepared), {to, block, next.forms[0].inv_scale, next.forms[0].offset});
}

void Group::gate(const Kernels& kernels, const Piece& piece, const std::vector<Prepared>& prepared, Output out) const {
    kernels.gated_16(activation, linears[0].rows_16(piece.begin), linears[1].rows_16(piece.begin), inputs(),
                     piece.count, packed_input(piece, prepared), prepared[form_of[0]].params.data() + piece.t0, out);
}

void Group::multiply(const Kernels& kernels, const Piece& piece, const Source& from, Output out,
                     Scratch& scratch) const {
    const Linear& linear = linears[piece.linear];
    const Prepared& prepared = from.prepared[form_of[piece.linear]];
    if (linear.kind == LinearKind::floating) return multiply_floating(kernels, piece, prepared, out, scratch);
    const int many = planes(linear.kind), count = piece.count;
    const bool packed = from.layout == Layout::packed;
    const PackedInput x = packed_input(piece, from.prepared);
    if (packed && !linear.keeps_sums && linear.kind == LinearKind::w8a8) {
        return kernels.packed_static(linear.static_rows(piece.begin), x.inputs, count, x, out);
    }
    const Rows16 w = linear.rows_16(piece.begin);
    if (packed && !linear.keeps_sums && many == 2) {
        return kernels.packed_16(w, x.inputs, count, x, prepared.params.data() + piece.t0, out);
    }
    int32_t* sums = scratch.sums.data();
    if (packed) {
        const int blocks = chunk_count(x.tokens, kLanes) * many;
        kernels.gemm_packed(w.weight, x.inputs, count, x.blocks, x.block, blocks, x.inputs, sums, count);
    } else {
        kernels.gemm_i8(w.weight, x.inputs, count, x.blocks, row_bytes(x.inputs), x.tokens * many, x.inputs, sums,
                        count);
    }
    finish(kernels, piece, from, sums, out);
}

void Group::multiply_floating(const Kernels& kernels, const Piece& piece, const Prepared& from, Output out,
                              Scratch& scratch) const {
    const Linear& linear = linears[piece.linear];
    const int width = linear.inputs, rows = piece.t1 - piece.t0, count = piece.count;
    const size_t row = linear.weight_bytes() / static_cast<size_t>(linear.outputs);
    const auto* weight = static_cast<const char*>(linear.weight) + static_cast<size_t>(piece.begin) * row;
    float* to = out.adds ? scratch.first.data() : out.y;
    const size_t ld = out.adds ? count : out.ld;
    kernels.gemm_float(weight, linear.dtype, width, count, from.real.data() + static_cast<size_t>(piece.t0) * width,
                       width, rows, width, to, ld);
    for (int t = 0; t < rows; t++) {
        if (!linear.bias.empty()) kernels.add(to + t * ld, linear.bias_at(piece.begin), count);
        if (out.adds) kernels.add(out.y + t * out.ld, to + t * ld, count);
    }
}

// Sums of rows, or of the lanes of packed blocks, to what they mean.
void Group::finish(const Kernels& kernels, const Piece& piece, const Source& from, const int32_t* sums,
                   Output out) const {
    const Linear& linear = linears[piece.linear];
    const RowParams* params = from.prepared[form_of[piece.linear]].params.data() + piece.t0;
    const bool packed = from.layout == Layout::packed;
    const int many = planes(linear.kind), n = piece.begin, count = piece.count;
    for (int i = 0; i < piece.t1 - piece.t0; i++) {
        const size_t row = packed ? i / kLanes * kLanes * many + i % kLanes : static_cast<size_t>(i) * many;
        const int32_t* acc = sums + row * count;
        const int32_t* low = acc + static_cast<size_t>(packed ? kLanes : 1) * count;
        float* y = out.y + i * out.ld;
        const Origin origin = from.generated != nullptr && from.generated[i] ? Origin::generated : Origin::prompt;
        const bool reads_static = linear.reads_static(origin);
        if (linear.keeps_sums && reads_static) {
            linear.keep_static_sums(acc, n, count, y);
        } else if (linear.keeps_sums) {
            linear.keep_token_sums(acc, n, count, (many == 2 ? 0 : params[i].offset) + kernels.zero, y);
            if (many == 2) std::memcpy(y + linear.outputs, low, count * sizeof(int32_t));
        } else if (many == 2) {
            kernels.finish_16(acc, low, count, linear.rows_16(n).scales, params[i], out.adds, y);
        } else if (reads_static) {
            const StaticRows of = linear.static_rows(n);
            kernels.finish_static(acc, count, of.bias, of.deq_scale, out.adds, y);
        } else {
            kernels.finish_token(acc, count, linear.weight_sum.data() + n, linear.scale.data() + n, linear.bias_at(n),
                                 params[i], out.adds, y);
        }
    }
}

}  // namespace eightfold
