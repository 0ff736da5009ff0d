// A module for tests alone, in no wheel: single kernels, each by the name of an instruction set, and the pool.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cache.h"
#include "dispatch.h"
#include "linears.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace eightfold {

namespace {

template <typename T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

const float* or_null(const In<float, 1>& x) { return x.size() ? x.data() : nullptr; }

// Rows as a model keeps them: padded, aligned.
Prepared padded(const uint8_t* x, size_t rows, size_t width) {
    Prepared to;
    to.reserve(static_cast<int>(rows), static_cast<int>(width));
    const size_t ld = row_bytes(static_cast<int>(width));
    for (size_t t = 0; t < rows; t++) std::memcpy(to.bytes.data() + t * ld, x + t * width, width);
    return to;
}

void gemm_i8(const std::string& isa, In<int8_t, 2> weight, In<uint8_t, 2> x, Out<int32_t> out) {
    const Prepared rows = padded(x.data(), x.shape(0), x.shape(1));
    kernels_for(isa).gemm_i8(weight.data(), weight.shape(1), static_cast<int>(weight.shape(0)), rows.bytes.data(),
                             row_bytes(static_cast<int>(x.shape(1))), static_cast<int>(x.shape(0)),
                             static_cast<int>(x.shape(1)), out.data(), weight.shape(0));
}

// Planes of tokens as packed blocks, the planes of a block one after the other.
Prepared packed_blocks(const Kernels& kernels, const std::vector<In<uint8_t, 2>>& planes) {
    const size_t tokens = planes[0].shape(0), width = planes[0].shape(1), many = planes.size();
    const size_t ld = row_bytes(static_cast<int>(width)), block = kLanes * ld;
    Prepared packed;
    packed.reserve(static_cast<int>(many * ((tokens + kLanes - 1) / kLanes * kLanes)), static_cast<int>(width));
    for (size_t i = 0; i < many; i++) {
        const Prepared rows = padded(planes[i].data(), tokens, width);
        for (size_t b = 0; b * kLanes < tokens; b++) {
            kernels.pack(rows.bytes.data() + b * block, ld, packed.bytes.data() + (b * many + i) * block);
        }
    }
    return packed;
}

PackedInput packed_input(const Prepared& packed, const In<uint8_t, 2>& x) {
    const int tokens = static_cast<int>(x.shape(0)), inputs = static_cast<int>(x.shape(1));
    return {packed.bytes.data(), kLanes * row_bytes(inputs), tokens, inputs};
}

// The same by packed blocks; out (blocks kLanes, N) has all lanes.
void gemm_packed(const std::string& isa, In<int8_t, 2> weight, In<uint8_t, 2> x, Out<int32_t> out) {
    const Kernels& kernels = kernels_for(isa);
    const Prepared packed = packed_blocks(kernels, {x});
    const PackedInput input = packed_input(packed, x);
    kernels.gemm_packed(weight.data(), weight.shape(1), static_cast<int>(weight.shape(0)), packed.bytes.data(),
                        input.block, (input.tokens + kLanes - 1) / kLanes, input.inputs, out.data(), weight.shape(0));
}

void packed_static(const std::string& isa, In<int8_t, 2> weight, In<uint8_t, 2> x, In<int32_t, 1> bias,
                   In<float, 1> deq_scale, Out<float> y, bool adds) {
    const Kernels& kernels = kernels_for(isa);
    const Prepared packed = packed_blocks(kernels, {x});
    kernels.packed_static({weight.data(), bias.data(), deq_scale.data()}, weight.shape(1),
                          static_cast<int>(weight.shape(0)), packed_input(packed, x),
                          {y.data(), weight.shape(0), adds});
}

std::vector<RowParams> params_16(const In<float, 1>& scale, const In<int32_t, 1>& sum) {
    std::vector<RowParams> params;
    for (size_t t = 0; t < scale.size(); t++) params.push_back({scale.data()[t], 0, sum.data()[t], 0.0f});
    return params;
}

void packed_16(const std::string& isa, In<int8_t, 2> weight, In<uint8_t, 2> high, In<uint8_t, 2> low,
               In<int32_t, 1> weight_sum, In<float, 1> weight_scale, In<float, 1> weight_offset, In<float, 1> bias,
               In<float, 1> scale, In<int32_t, 1> sum, Out<float> y, bool adds) {
    const Kernels& kernels = kernels_for(isa);
    const Prepared packed = packed_blocks(kernels, {high, low});
    const std::vector<RowParams> params = params_16(scale, sum);
    const Scales16 scales{weight_sum.data(), weight_scale.data(), or_null(weight_offset), or_null(bias)};
    kernels.packed_16({weight.data(), scales}, weight.shape(1), static_cast<int>(weight.shape(0)),
                      packed_input(packed, high), params.data(), {y.data(), weight.shape(0), adds});
}

Activation activation_of(bool gelu) { return gelu ? Activation::gelu : Activation::silu; }

// Two linears (2, N, K); out (blocks, N in fours, kLanes, 4).
void gated_static(const std::string& isa, In<int8_t, 3> weight, In<uint8_t, 2> x, In<int32_t, 2> bias,
                  In<float, 2> deq_scale, float inv_scale, float offset, Out<uint8_t> out, bool gelu) {
    const Kernels& kernels = kernels_for(isa);
    const Prepared packed = packed_blocks(kernels, {x});
    const size_t rows = weight.shape(1), inputs = weight.shape(2);
    const auto of = [&](size_t i) -> StaticRows {
        return {weight.data() + i * rows * inputs, bias.data() + i * rows, deq_scale.data() + i * rows};
    };
    kernels.gated_static(activation_of(gelu), of(0), of(1), inputs, static_cast<int>(rows), packed_input(packed, x),
                         {out.data(), out.size() / out.shape(0), inv_scale, offset});
}

void gated_16(const std::string& isa, In<int8_t, 3> weight, In<uint8_t, 2> high, In<uint8_t, 2> low,
              In<int32_t, 2> weight_sum, In<float, 2> weight_scale, In<float, 2> weight_offset, In<float, 2> bias,
              In<float, 1> scale, In<int32_t, 1> sum, Out<float> y, bool gelu) {
    const Kernels& kernels = kernels_for(isa);
    const Prepared packed = packed_blocks(kernels, {high, low});
    const size_t rows = weight.shape(1), inputs = weight.shape(2);
    const auto some = [&](const In<float, 2>& x, size_t i) { return x.size() ? x.data() + i * rows : nullptr; };
    const auto of = [&](size_t i) -> Rows16 {
        return {weight.data() + i * rows * inputs,
                {weight_sum.data() + i * rows, weight_scale.data() + i * rows, some(weight_offset, i), some(bias, i)}};
    };
    kernels.gated_16(activation_of(gelu), of(0), of(1), inputs, static_cast<int>(rows), packed_input(packed, high),
                     params_16(scale, sum).data(), {y.data(), rows, false});
}

void gemm_float(const std::string& isa, nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu> weight,
                int dtype, In<float, 2> x, Out<float> out) {
    kernels_for(isa).gemm_float(weight.data(), static_cast<DType>(dtype), weight.shape(1),
                                static_cast<int>(weight.shape(0)), x.data(), x.shape(1), static_cast<int>(x.shape(0)),
                                static_cast<int>(x.shape(1)), out.data(), weight.shape(0));
}

void row_sums(const std::string& isa, In<int8_t, 2> weight, Out<int32_t> out) {
    kernels_for(isa).row_sums(weight.data(), weight.shape(1), static_cast<int>(weight.shape(0)),
                              static_cast<int>(weight.shape(1)), out.data());
}

// Outputs of the three that follow may have room for the padding: then it is seen too.
void quantize_static(const std::string& isa, In<float, 1> x, float inv_scale, float offset, Out<uint8_t> out) {
    std::vector<uint8_t> row(x.size() + kAlign);
    kernels_for(isa).quantize_static(x.data(), static_cast<int>(x.size()), inv_scale, offset, row.data());
    std::memcpy(out.data(), row.data(), std::min(row.size(), out.size()));
}

nb::tuple quantize_token(const std::string& isa, In<float, 1> x, bool symmetric, Out<uint8_t> out) {
    std::vector<uint8_t> row(x.size() + kAlign);
    const RowParams p = kernels_for(isa).quantize_token(x.data(), static_cast<int>(x.size()), symmetric, row.data());
    std::memcpy(out.data(), row.data(), std::min(row.size(), out.size()));
    return nb::make_tuple(p.scale, p.offset);
}

nb::tuple quantize_16(const std::string& isa, In<float, 1> x, Out<uint8_t> high, Out<uint8_t> low) {
    std::vector<uint8_t> a(x.size() + kAlign), b(x.size() + kAlign);
    const RowParams p = kernels_for(isa).quantize_16(x.data(), static_cast<int>(x.size()), a.data(), b.data());
    std::memcpy(high.data(), a.data(), std::min(a.size(), high.size()));
    std::memcpy(low.data(), b.data(), std::min(b.size(), low.size()));
    return nb::make_tuple(p.scale, p.sum);
}

void finish_static(const std::string& isa, In<int32_t, 1> acc, In<int32_t, 1> bias, In<float, 1> deq_scale,
                   Out<float> y, bool adds) {
    kernels_for(isa).finish_static(acc.data(), static_cast<int>(acc.size()), bias.data(), deq_scale.data(), adds,
                                   y.data());
}

void finish_token(const std::string& isa, In<int32_t, 1> acc, In<int32_t, 1> weight_sum, In<float, 1> weight_scale,
                  In<float, 1> bias, float scale, int offset, Out<float> y, bool adds) {
    kernels_for(isa).finish_token(acc.data(), static_cast<int>(acc.size()), weight_sum.data(), weight_scale.data(),
                                  or_null(bias), {scale, offset, 0, 0.0f}, adds, y.data());
}

void finish_16(const std::string& isa, In<int32_t, 1> high, In<int32_t, 1> low, In<int32_t, 1> weight_sum,
               In<float, 1> weight_scale, In<float, 1> weight_offset, In<float, 1> bias, float scale, int sum,
               Out<float> y, bool adds) {
    const Scales16 scales{weight_sum.data(), weight_scale.data(), or_null(weight_offset), or_null(bias)};
    kernels_for(isa).finish_16(high.data(), low.data(), static_cast<int>(high.size()), scales, {scale, 0, sum, 0.0f},
                               adds, y.data());
}

void add(const std::string& isa, Out<float> x, In<float, 1> y) {
    kernels_for(isa).add(x.data(), y.data(), static_cast<int>(y.size()));
}

int quantize_heads(const std::string& isa, In<float, 1> x, In<float, 1> inv_scale, In<float, 1> offset,
                   Out<int8_t> out) {
    return kernels_for(isa).quantize_heads(x.data(), static_cast<int>(x.size()), inv_scale.data(), or_null(offset),
                                           inv_scale.size() > 1, out.data());
}

void scale_heads(const std::string& isa, In<float, 1> acc, float inverse, In<float, 1> offset, In<float, 1> scale,
                 Out<float> y) {
    kernels_for(isa).scale_heads(acc.data(), static_cast<int>(acc.size()), inverse, or_null(offset), or_null(scale),
                                 y.data());
}

void rms_norm(const std::string& isa, In<float, 1> x, In<float, 1> gain, In<float, 1> bias, float eps, Out<float> y) {
    kernels_for(isa).rms_norm(x.data(), static_cast<int>(x.size()), or_null(gain), or_null(bias), eps, y.data());
}

void gate_mul(const std::string& isa, In<float, 1> gate, In<float, 1> up, Out<float> y, bool gelu) {
    kernels_for(isa).gate_mul(activation_of(gelu), gate.data(), up.data(), static_cast<int>(gate.size()), y.data());
}

void soften(const std::string& isa, Out<float> x, float cap) {
    kernels_for(isa).soften(x.data(), static_cast<int>(x.size()), cap);
}

void rope(const std::string& isa, In<float, 1> x, In<float, 1> cos, In<float, 1> sin, Out<float> y) {
    kernels_for(isa).rope(x.data(), static_cast<int>(x.size()), cos.data(), sin.data(), y.data());
}

void widen(const std::string& isa, nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, int dtype,
           Out<float> y) {
    kernels_for(isa).widen(x.data(), static_cast<DType>(dtype), static_cast<int>(x.size()), y.data());
}

int argmax(const std::string& isa, In<float, 1> x) {
    return kernels_for(isa).argmax(x.data(), static_cast<int>(x.size()));
}

// Rows of one head, padded from D to Dq.
template <typename T>
std::vector<T> padded_heads(const In<T, 2>& q, int width) {
    std::vector<T> to(q.shape(0) * static_cast<size_t>(width));
    for (size_t r = 0; r < q.shape(0); r++) std::copy_n(q.data() + r * q.shape(1), q.shape(1), to.data() + r * width);
    return to;
}

// k and v (C, D) go through a cache of one head with scales of one, its pages in reverse order.
void attend(const std::string& isa, int kind, In<int8_t, 2> q8, In<float, 2> qf, In<float, 1> q_scale,
            In<float, 1> q_shift, float softcap, In<int32_t, 1> last, int window, In<float, 2> k, In<float, 2> v,
            int first, int end, Out<float> max, Out<float> sum, Out<float> acc) {
    const int context = static_cast<int>(k.shape(0)), dim = static_cast<int>(k.shape(1));
    const int pages = (context + kPage - 1) / kPage, rows = static_cast<int>(last.size());
    AttentionParams params;
    params.kind = static_cast<CacheKind>(kind);
    params.key_inv = params.value_inv = std::vector<float>(dim, 1.0f);
    params.key_offset = params.value_offset = std::vector<float>(dim, 0.0f);
    const std::vector<AttentionParams> layers = {params};
    const Shape shape{1, 1, dim};
    const Cache cache(shape, layers, pages);
    const Kernels& kernels = kernels_for(isa);
    for (int c = 0; c < context; c++) {
        cache.store(kernels, 0, pages - 1 - c / kPage, c % kPage, 0, k.data() + c * dim, v.data() + c * dim);
    }
    std::vector<const uint8_t*> keys, values;
    for (int i = 0; i < pages; i++) {
        keys.push_back(cache.keys(0, pages - 1 - i, 0));
        values.push_back(cache.values(0, pages - 1 - i, 0));
    }
    const std::vector<int8_t> integers = padded_heads(q8, shape.query_dim());
    const std::vector<float> reals = padded_heads(qf, shape.query_dim());
    std::vector<int32_t> sums(q8.shape(0));
    for (size_t r = 0; r < q8.shape(0); r++) {
        sums[r] = std::accumulate(q8.data() + r * dim, q8.data() + (r + 1) * dim, 0);
    }
    const AttnRows in{params.kind,
                      rows,
                      dim,
                      integers.data(),
                      reals.data(),
                      sums.data(),
                      q_scale.data(),
                      q_shift.data(),
                      softcap,
                      last.data(),
                      window,
                      keys.data(),
                      values.data(),
                      first,
                      end,
                      end,
                      nullptr,
                      0};
    kernels.attend(in, {max.data(), sum.data(), acc.data()});
}

void merge(const std::string& isa, Out<float> max, Out<float> sum, Out<float> acc, Out<float> from_max,
           Out<float> from_sum, Out<float> from_acc) {
    const int rows = static_cast<int>(max.size());
    kernels_for(isa).merge({max.data(), sum.data(), acc.data()}, {from_max.data(), from_sum.data(), from_acc.data()},
                           rows, static_cast<int>(acc.size()) / rows);
}

// A program for the pool: chunk i of a phase adds to its number what the phase before made of another, so that a phase
// which begins early, or a chunk that is done twice or never, changes the result.
struct Chain {
    std::vector<std::vector<uint64_t>> numbers;  // of each phase's chunks

    static void program(void* context, Pool::Walk& walk) {
        Chain& chain = static_cast<Chain*>(context)[walk.slot()];
        for (size_t p = 0; p < chain.numbers.size(); p++) {
            std::vector<uint64_t>& made = chain.numbers[p];
            const bool goes_on = walk.phase(static_cast<int>(made.size()), [&](int i) {
                const size_t before = p > 0 ? chain.numbers[p - 1].size() : 0;
                made[i] += before > 0 ? 31 * chain.numbers[p - 1][i % before] + i : i + 1;
            });
            if (!goes_on) return;
        }
    }
};

// Runs one program after the other in one pool; returns the sum of each one's numbers.
std::vector<uint64_t> pool_runs(int threads, const std::vector<std::vector<int>>& chunks) {
    size_t most = 1;
    for (const std::vector<int>& run : chunks) most = std::max(most, run.size());
    std::vector<Chain> slots(Pool::kSlots);  // the old numbers of a slot are freed when it is used again
    std::vector<uint64_t> sums;
    Pool pool(threads, static_cast<int>(most));
    for (const std::vector<int>& run : chunks) {
        Chain& chain = slots[pool.next_slot()];
        chain.numbers.clear();
        for (int count : run) chain.numbers.emplace_back(count);
        pool.run(Chain::program, slots.data());
        uint64_t sum = 0;
        for (const std::vector<uint64_t>& made : chain.numbers) sum = std::accumulate(made.begin(), made.end(), sum);
        sums.push_back(sum);
        if (sums.size() % 100 == 0) pool.quiesce();
    }
    return sums;
}

}  // namespace

}  // namespace eightfold

NB_MODULE(_core_test, kernels) {
    using namespace eightfold;
    kernels.def("zero", [](const std::string& isa) { return kernels_for(isa).zero; }, "isa"_a);
    kernels.def("gemm_i8", &gemm_i8, "isa"_a, "weight"_a, "x"_a, "out"_a);
    kernels.def("gemm_packed", &gemm_packed, "isa"_a, "weight"_a, "x"_a, "out"_a);
    kernels.def("packed_static", &packed_static, "isa"_a, "weight"_a, "x"_a, "bias"_a, "deq_scale"_a, "y"_a,
                "adds"_a = false);
    kernels.def("packed_16", &packed_16, "isa"_a, "weight"_a, "high"_a, "low"_a, "weight_sum"_a, "weight_scale"_a,
                "weight_offset"_a, "bias"_a, "scale"_a, "sum"_a, "y"_a, "adds"_a = false);
    kernels.def("gated_static", &gated_static, "isa"_a, "weight"_a, "x"_a, "bias"_a, "deq_scale"_a, "inv_scale"_a,
                "offset"_a, "out"_a, "gelu"_a = false);
    kernels.def("gated_16", &gated_16, "isa"_a, "weight"_a, "high"_a, "low"_a, "weight_sum"_a, "weight_scale"_a,
                "weight_offset"_a, "bias"_a, "scale"_a, "sum"_a, "y"_a, "gelu"_a = false);
    kernels.def("gemm_float", &gemm_float, "isa"_a, "weight"_a, "dtype"_a, "x"_a, "out"_a);
    kernels.def("row_sums", &row_sums, "isa"_a, "weight"_a, "out"_a);
    kernels.def("quantize_static", &quantize_static, "isa"_a, "x"_a, "inv_scale"_a, "offset"_a, "out"_a);
    kernels.def("quantize_token", &quantize_token, "isa"_a, "x"_a, "symmetric"_a, "out"_a);
    kernels.def("quantize_16", &quantize_16, "isa"_a, "x"_a, "high"_a, "low"_a);
    kernels.def("finish_static", &finish_static, "isa"_a, "acc"_a, "bias"_a, "deq_scale"_a, "y"_a, "adds"_a = false);
    kernels.def("finish_token", &finish_token, "isa"_a, "acc"_a, "weight_sum"_a, "weight_scale"_a, "bias"_a, "scale"_a,
                "offset"_a, "y"_a, "adds"_a = false);
    kernels.def("finish_16", &finish_16, "isa"_a, "high"_a, "low"_a, "weight_sum"_a, "weight_scale"_a,
                "weight_offset"_a, "bias"_a, "scale"_a, "sum"_a, "y"_a, "adds"_a = false);
    kernels.def("add", &add, "isa"_a, "x"_a, "y"_a);
    kernels.def("quantize_heads", &quantize_heads, "isa"_a, "x"_a, "inv_scale"_a, "offset"_a, "out"_a);
    kernels.def("scale_heads", &scale_heads, "isa"_a, "acc"_a, "inverse"_a, "offset"_a, "scale"_a, "y"_a);
    kernels.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "gain"_a, "bias"_a, "eps"_a, "y"_a);
    kernels.def("gate_mul", &gate_mul, "isa"_a, "gate"_a, "up"_a, "y"_a, "gelu"_a = false);
    kernels.def("soften", &soften, "isa"_a, "x"_a, "cap"_a);
    kernels.def("rope", &rope, "isa"_a, "x"_a, "cos"_a, "sin"_a, "y"_a);
    kernels.def("widen", &widen, "isa"_a, "x"_a, "dtype"_a, "y"_a);
    kernels.def("argmax", &argmax, "isa"_a, "x"_a);
    kernels.def("attend", &attend, "isa"_a, "kind"_a, "q8"_a, "qf"_a, "q_scale"_a, "q_shift"_a, "softcap"_a, "last"_a,
                "window"_a, "k"_a, "v"_a, "first"_a, "end"_a, "max"_a, "sum"_a, "acc"_a);
    kernels.def("merge", &merge, "isa"_a, "max"_a, "sum"_a, "acc"_a, "from_max"_a, "from_sum"_a, "from_acc"_a);
    kernels.def("pool_runs", &pool_runs, "threads"_a, "chunks"_a, nb::call_guard<nb::gil_scoped_release>());
}
