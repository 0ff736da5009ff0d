// Single kernels, for tests: each takes the name of an instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <string>
#include <vector>

#include "cpu.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace eightfold {

namespace {

template <typename T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

// Rows as a model keeps them: padded, aligned.
Prepared padded(const uint8_t* x, size_t rows, size_t width) {
    Prepared to;
    to.reserve(static_cast<int>(rows), static_cast<int>(width));
    for (size_t t = 0; t < rows; t++) std::memcpy(to.bytes + t * to.ld, x + t * width, width);
    return to;
}

void gemm_i8(const std::string& isa, In<int8_t, 2> weight, In<uint8_t, 2> x, Out<int32_t> out) {
    const Prepared rows = padded(x.data(), x.shape(0), x.shape(1));
    kernels_for(isa).gemm_i8(weight.data(), weight.shape(1), static_cast<int>(weight.shape(0)), rows.bytes, rows.ld,
                             static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)), out.data(), weight.shape(0));
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

void quantize_static(const std::string& isa, In<float, 1> x, float inv_scale, float offset, Out<uint8_t> out) {
    std::vector<uint8_t> row(x.size() + kAlign);
    kernels_for(isa).quantize_static(x.data(), static_cast<int>(x.size()), inv_scale, offset, row.data());
    std::memcpy(out.data(), row.data(), x.size());
}

nb::tuple quantize_token(const std::string& isa, In<float, 1> x, bool symmetric, Out<uint8_t> out) {
    std::vector<uint8_t> row(x.size() + kAlign);
    const RowParams p = kernels_for(isa).quantize_token(x.data(), static_cast<int>(x.size()), symmetric, row.data());
    std::memcpy(out.data(), row.data(), x.size());
    return nb::make_tuple(p.scale, p.offset);
}

nb::tuple quantize_16(const std::string& isa, In<float, 1> x, Out<uint8_t> high, Out<uint8_t> low) {
    std::vector<uint8_t> a(x.size() + kAlign), b(x.size() + kAlign);
    const RowParams p = kernels_for(isa).quantize_16(x.data(), static_cast<int>(x.size()), a.data(), b.data());
    std::memcpy(high.data(), a.data(), x.size());
    std::memcpy(low.data(), b.data(), x.size());
    return nb::make_tuple(p.scale, p.sum);
}

void rms_norm(const std::string& isa, In<float, 1> x, In<float, 1> gain, float eps, Out<float> y) {
    kernels_for(isa).rms_norm(x.data(), static_cast<int>(x.size()), gain.data(), nullptr, eps, y.data());
}

void silu_mul(const std::string& isa, In<float, 1> gate, In<float, 1> up, Out<float> y) {
    kernels_for(isa).silu_mul(gate.data(), up.data(), static_cast<int>(gate.size()), y.data());
}

void rope(const std::string& isa, Out<float> x, In<float, 1> cos, In<float, 1> sin) {
    kernels_for(isa).rope(x.data(), static_cast<int>(x.size()), cos.data(), sin.data());
}

void widen(const std::string& isa, nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, int dtype,
           Out<float> y) {
    kernels_for(isa).widen(x.data(), static_cast<DType>(dtype), static_cast<int>(x.size()), y.data());
}

int argmax(const std::string& isa, In<float, 1> x) {
    return kernels_for(isa).argmax(x.data(), static_cast<int>(x.size()));
}

}  // namespace

void bind_kernels(nb::module_& m) {
    nb::module_ kernels = m.def_submodule("kernels");
    kernels.def("gemm_i8", &gemm_i8, "isa"_a, "weight"_a, "x"_a, "out"_a);
    kernels.def("gemm_float", &gemm_float, "isa"_a, "weight"_a, "dtype"_a, "x"_a, "out"_a);
    kernels.def("row_sums", &row_sums, "isa"_a, "weight"_a, "out"_a);
    kernels.def("quantize_static", &quantize_static, "isa"_a, "x"_a, "inv_scale"_a, "offset"_a, "out"_a);
    kernels.def("quantize_token", &quantize_token, "isa"_a, "x"_a, "symmetric"_a, "out"_a);
    kernels.def("quantize_16", &quantize_16, "isa"_a, "x"_a, "high"_a, "low"_a);
    kernels.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "gain"_a, "eps"_a, "y"_a);
    kernels.def("silu_mul", &silu_mul, "isa"_a, "gate"_a, "up"_a, "y"_a);
    kernels.def("rope", &rope, "isa"_a, "x"_a, "cos"_a, "sin"_a);
    kernels.def("widen", &widen, "isa"_a, "x"_a, "dtype"_a, "y"_a);
    kernels.def("argmax", &argmax, "isa"_a, "x"_a);
}

}  // namespace eightfold
