// The choice of tokens, bound to Python: arrays are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace eightfold {

namespace {

template <typename T, size_t N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Ids = std::vector<int32_t>;

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void require_all_below(const int32_t* ids, size_t count, size_t end, const char* what) {
    require(std::all_of(ids, ids + count, [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < end; }), what);
}

void make_chooser(Chooser* self, int vocab, double temperature, int top_k, double top_p, double min_p,
                  const Ids& stop_ids, int64_t min_tokens, const Ids& bias_ids, const std::vector<float>& biases,
                  float repetition, float frequency, float presence, const Ids& prompt) {
    require(vocab >= 1, "vocab: expected 1 or more");
    require(temperature >= 0 && top_k >= 0 && top_p > 0 && min_p >= 0 && min_p <= 1,
            "temperature, top_k, top_p, min_p: outside their ranges");
    require(bias_ids.size() == biases.size(), "biases: expected one for each id");
    for (const Ids* ids : {&stop_ids, &bias_ids, &prompt}) {
        require_all_below(ids->data(), ids->size(), vocab, "token ids: outside the vocabulary");
    }
    new (self) Chooser(vocab, {temperature, top_k, top_p, min_p},
                       {stop_ids, min_tokens, bias_ids, biases, repetition, frequency, presence}, prompt);
}

void accept(Chooser& self, int token) {
    require(token >= 0 && token < self.vocab(), "token: outside the vocabulary");
    self.accept(token);
}

// Row r: chooser r looks at logits[rows[r]], with the mask masks[masked[r]] unless that is -1.
void choose(SamplePool& pool, const std::vector<const Chooser*>& choosers, const In<float, 2>& logits,
            const In<int32_t, 1>& rows, const In<int32_t, 2>& masks, const In<int32_t, 1>& masked,
            const In<double, 1>& uniforms, const Out<int32_t, 1>& tokens) {
    nb::gil_scoped_release release;
    const size_t count = choosers.size(), vocab = logits.shape(1), words = masks.shape(1);
    require(rows.size() == count && masked.size() == count && uniforms.size() == count && tokens.size() == count,
            "rows, masked, uniforms, tokens: expected one for each chooser");
    require_all_below(rows.data(), count, logits.shape(0), "rows: outside the logits");
    require(masks.shape(0) == 0 || words == (vocab + 31) / 32, "masks: expected a bit for each token");
    for (size_t r = 0; r < count; r++) {
        require(choosers[r] != nullptr && static_cast<size_t>(choosers[r]->vocab()) == vocab,
                "choosers: of another vocabulary");
        require(masked.data()[r] >= -1 && masked.data()[r] < static_cast<int64_t>(masks.shape(0)),
                "masked: outside the masks");
        require(uniforms.data()[r] >= 0 && uniforms.data()[r] < 1, "uniforms: expected numbers from [0, 1)");
    }
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(masks.data());
    pool.run(static_cast<int>(count), static_cast<int>(vocab), [&](int r, SampleScratch& scratch) {
        const int mask = masked.data()[r];
        tokens.data()[r] = choosers[r]->choose(logits.data() + rows.data()[r] * vocab,
                                               mask < 0 ? nullptr : bits + mask * words, uniforms.data()[r], scratch);
    });
}

// Row r: of logits[rows[r]], the log-probability of tokens[r], and the ids and log-probabilities of the likeliest.
void logprobs(SamplePool& pool, const In<float, 2>& logits, const In<int32_t, 1>& rows, const In<int32_t, 1>& tokens,
              const Out<double, 1>& chosen, const Out<int32_t, 2>& top_ids, const Out<double, 2>& top) {
    nb::gil_scoped_release release;
    const size_t count = rows.size(), vocab = logits.shape(1), width = top.shape(1);
    require(tokens.size() == count && chosen.size() == count && top.shape(0) == count && top_ids.shape(0) == count,
            "tokens, chosen, top_ids, top: expected one for each row");
    require(top_ids.shape(1) == width, "top_ids: expected as many as top");
    require_all_below(rows.data(), count, logits.shape(0), "rows: outside the logits");
    require_all_below(tokens.data(), count, vocab, "tokens: outside the vocabulary");
    pool.run(static_cast<int>(count), static_cast<int>(vocab), [&](int r, SampleScratch& scratch) {
        const float* x = logits.data() + rows.data()[r] * vocab;
        const double sum = log_sum_exp(x, static_cast<int>(vocab), scratch);
        chosen.data()[r] = log_prob(x[tokens.data()[r]], sum);
        int32_t* ids = top_ids.data() + r * width;
        if (width > 0) largest(x, static_cast<int>(vocab), static_cast<int>(width), ids, scratch);
        for (size_t i = 0; i < width; i++) top.data()[r * width + i] = ids[i] < 0 ? 0 : log_prob(x[ids[i]], sum);
    });
}

}  // namespace

void bind_sample(nb::module_& m) {
    nb::class_<Chooser>(m, "Chooser")
        .def("__init__", &make_chooser, nb::kw_only(), "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
             "stop_ids"_a, "min_tokens"_a, "bias_ids"_a, "biases"_a, "repetition"_a, "frequency"_a, "presence"_a,
             "prompt"_a)
        .def("accept", &accept, "token"_a);
    nb::class_<SamplePool>(m, "SamplePool")
        .def(
            "__init__",
            [](SamplePool* self, int threads) {
                require(threads >= 1 && threads <= 1024, "threads: expected 1 to 1024");
                new (self) SamplePool(threads);
            },
            "threads"_a)
        .def("choose", &choose, nb::kw_only(), "choosers"_a, "logits"_a, "rows"_a, "masks"_a, "masked"_a, "uniforms"_a,
             "tokens"_a.noconvert())
        .def("logprobs", &logprobs, nb::kw_only(), "logits"_a, "rows"_a, "tokens"_a, "chosen"_a.noconvert(),
             "top_ids"_a.noconvert(), "top"_a.noconvert());
}

}  // namespace eightfold
