// The border to Python: arrays are checked here, once; below are plain pointers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "fault.h"
#include "measure.h"
#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace eightfold {

void bind_sample(nb::module_& m);  // bind_sample.cc

namespace {

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Weight = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = std::vector<float>;

Floats floats(const Vector<float>& from) { return {from.data(), from.data() + from.size()}; }

constexpr int kMaxThreads = 1024;
constexpr int kMaxHeads = 65536;      // times head_dim is far below 2**31
constexpr int kMaxExperts = 65536;
constexpr size_t kMaxRows = 1 << 30;  // of a weight, and its columns

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

DType float_type(const Weight& weight) {
    if (weight.dtype() == nb::dtype<float>()) return DType::f32;
    if (weight.dtype() == nb::dtype<uint16_t>()) return DType::bf16;  // numpy has no bfloat16
    const nb::dlpack::dtype half{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    require(weight.dtype() == half, "expected float32, float16, or bfloat16 as uint16");
    return DType::f16;
}

void require_size(const Weight& weight) {
    require(weight.shape(0) <= kMaxRows && weight.shape(1) <= kMaxRows, "weight: expected up to 2**30 rows, columns");
}

// Keeps the arrays alive that a model reads.
struct Bound {
    Model model;
    int vocab, ranks;
    const ModelConfig config;
    std::vector<nb::object> kept;
    std::mutex mutex;  // one step at a time
};

LinearKind kind_of(const std::string& name) {
    const std::pair<const char*, LinearKind> kinds[] = {{"float", LinearKind::floating},
                                                        {"w8a8", LinearKind::w8a8},
                                                        {"dynamic", LinearKind::dynamic},
                                                        {"mix", LinearKind::mix},
                                                        {"w8a16", LinearKind::w8a16}};
    for (const auto& [known, kind] : kinds)
        if (name == known) return kind;
    throw std::invalid_argument("unknown kind of linear: " + name);
}

Group& group_of(Model& model, int layer, const std::string& group) {
    if (group == "head") return model.weights.head;
    Layer& of = model.weights.layers.at(layer);
    if (group == "qkv") return of.qkv;
    if (group == "o") return of.o;
    if (group == "gate_up") return of.gate_up;
    if (group == "down") return of.down;
    throw std::invalid_argument("unknown group of linears: " + group);
}

Linear make_linear(Bound& self, const std::string& kind, Weight weight, const Vector<float>& scale,
                   const Vector<float>& offset, const Vector<float>& bias, const Vector<float>& deq_scale,
                   const Vector<int32_t>& quant_bias, float inv_input_scale, float input_offset) {
    require_size(weight);
    Linear linear;
    linear.kind = kind_of(kind);
    linear.outputs = static_cast<int>(weight.shape(0));
    linear.inputs = static_cast<int>(weight.shape(1));
    const size_t n = weight.shape(0);
    const bool is_int = linear.kind != LinearKind::floating;
    require(is_int == (weight.dtype() == nb::dtype<int8_t>()), "the weight's dtype does not suit its kind");
    if (!is_int) linear.dtype = float_type(weight);
    require(scale.size() == (is_int ? n : 0), "weight_scale: expected one for each row");
    require(offset.size() == 0 || offset.size() == n, "weight_offset: expected one for each row");
    require(bias.size() == 0 || bias.size() == n, "bias: expected one for each row");
    const size_t static_size = linear.is_static() ? n : 0;
    require(deq_scale.size() == static_size && quant_bias.size() == static_size,
            "deq_scale and quant_bias: expected one for each row");
    linear.weight = weight.data();
    linear.scale = floats(scale);
    linear.offset = floats(offset);
    linear.bias = floats(bias);
    linear.deq_scale = floats(deq_scale);
    linear.quant_bias.assign(quant_bias.data(), quant_bias.data() + quant_bias.size());
    linear.weight_sum.resize(is_int ? n : 0);
    linear.inv_input_scale = inv_input_scale;
    linear.input_offset = input_offset;
    linear.ordinal = static_cast<int>(self.kept.size());
    self.kept.push_back(nb::cast(weight));
    return linear;
}

void add_linear(Bound& self, int layer, const std::string& group, const std::string& kind, Weight weight,
                const Vector<float>& scale, const Vector<float>& offset, const Vector<float>& bias,
                const Vector<float>& deq_scale, const Vector<int32_t>& quant_bias, float inv_input_scale,
                float input_offset) {
    std::vector<Linear>& to = group_of(self.model, layer, group).linears;
    to.push_back(
        make_linear(self, kind, weight, scale, offset, bias, deq_scale, quant_bias, inv_input_scale, input_offset));
}

// Rows are counted: a router's are the experts that it chooses.
void add_router(Bound& self, int layer, Weight weight, std::optional<Weight> shared_gate) {
    const int count = self.config.experts.count, shared_size = self.config.experts.shared_size;
    Group& to = self.model.weights.layers.at(layer).router;
    self.model.weights.layers.at(layer).experts.resize(count + (shared_size > 0 ? 1 : 0));
    require(count > 0, "router: the model has no experts");
    require(to.linears.empty(), "router: expected one a layer");
    require(shared_gate.has_value() == (shared_size > 0), "shared_gate: expected one where there is a shared expert");
    const auto add = [&](const Weight& rows, int expected) {
        require(static_cast<int>(rows.shape(0)) == expected && static_cast<int>(rows.shape(1)) == self.config.hidden,
                "router: expected (experts, hidden size), and shared_gate (1, hidden size)");
        to.linears.push_back(make_linear(self, "float", rows, {}, {}, {}, {}, {}, 0, 0));
    };
    add(weight, count);
    if (shared_gate.has_value()) add(*shared_gate, 1);
}

// `expert`: its number; that of experts is the shared one's. Its parts come as gate, up, down, all inputs of each.
void add_expert(Bound& self, int layer, int expert, const std::string& part, const std::string& kind, Weight weight,
                const Vector<float>& scale, const Vector<float>& offset, const Vector<float>& bias,
                const Vector<float>& deq_scale, const Vector<int32_t>& quant_bias, float inv_input_scale,
                float input_offset) {
    const ExpertConfig& config = self.config.experts;
    std::vector<Expert>& experts = self.model.weights.layers.at(layer).experts;
    const bool is_shared = expert == config.count;
    require(config.count > 0 && expert >= 0 && expert < config.count + (config.shared_size > 0 ? 1 : 0),
            "expert: outside of the experts");
    require(config.has(self.config.rank, expert), "expert: another rank's");
    const int hidden = self.config.hidden, size = is_shared ? config.shared_size : config.size;
    const bool is_down = part == "down", is_cut = is_shared || !config.is_whole();
    require(is_down || part == "gate" || part == "up", "part: expected gate, up or down");
    const std::vector<int>& cuts = is_down     ? self.config.hidden_cuts
                                   : is_shared ? config.shared_cuts
                                               : config.size_cuts;
    const int all = is_down ? hidden : size;
    const int rows = is_cut ? cuts[self.config.rank + 1] - cuts[self.config.rank] : all;
    require(static_cast<int>(weight.shape(0)) == rows && static_cast<int>(weight.shape(1)) == (is_down ? size : hidden),
            "expert: expected (intermediate size, hidden size), and the other way round for down, or rows of them");
    experts.resize(config.count + (config.shared_size > 0 ? 1 : 0));
    Expert& to = experts[expert];
    std::vector<Linear>& linears = is_down ? to.down.linears : to.gate_up.linears;
    require(linears.size() == (part == "up" ? 1 : 0), "expert: expected gate, up and down once each, in this order");
    linears.push_back(
        make_linear(self, kind, weight, scale, offset, bias, deq_scale, quant_bias, inv_input_scale, input_offset));
}

void set_norms(Bound& self, int layer, const Vector<float>& input_gain, const Vector<float>& input_bias,
               const Vector<float>& post_gain, const Vector<float>& post_bias) {
    Layer& to = self.model.weights.layers.at(layer);
    to.input_gain = floats(input_gain);
    to.input_bias = floats(input_bias);
    to.post_gain = floats(post_gain);
    to.post_bias = floats(post_bias);
}

void set_term_norms(Bound& self, int layer, const Vector<float>& o_gain, const Vector<float>& o_bias,
                    const Vector<float>& down_gain, const Vector<float>& down_bias) {
    Layer& to = self.model.weights.layers.at(layer);
    to.o_gain = floats(o_gain);
    to.o_bias = floats(o_bias);
    to.down_gain = floats(down_gain);
    to.down_bias = floats(down_bias);
}

void set_attention(Bound& self, int layer, const std::string& kind, int window, const Vector<float>& query_norm,
                   const Vector<float>& key_norm, const Vector<float>& query_inv, const Vector<float>& score_scale,
                   const std::vector<Floats>& key, const std::vector<Floats>& value, bool is_local) {
    AttentionParams& to = self.model.weights.attention.at(layer);
    require(kind == "bf16" || kind == "int8" || kind == "int8x2", "kind of cache: expected bf16, int8 or int8x2");
    to.kind = kind == "bf16" ? CacheKind::bf16 : kind == "int8" ? CacheKind::int8 : CacheKind::int8x2;
    to.window = window;
    to.is_local = is_local;
    require(!is_local || self.model.has_local_rope(), "is_local: expected set_local_rope before");
    to.query_norm = floats(query_norm);
    to.key_norm = floats(key_norm);
    to.query_inv = floats(query_inv);
    to.score_scale = floats(score_scale);
    if (to.kind == CacheKind::bf16) return;
    require(key.size() == 3 && value.size() == 3, "expected scales, reciprocals and offsets");
    to.key_scale = key[0], to.key_inv = key[1], to.key_offset = key[2];
    to.value_scale = value[0], to.value_inv = value[1], to.value_offset = value[2];
}

// One token after the other, in pages that are there.
void require_sequence(const Batch& batch, int sequence, int pages) {
    const int first = batch.starts[sequence], end = batch.starts[sequence + 1];
    const int64_t begin = batch.positions[first];
    require(begin >= 0, "positions: negative");
    for (int t = first; t < end; t++) {
        require(batch.positions[t] == begin + (t - first), "positions: expected to rise by one");
    }
    const int last = batch.positions[end - 1] / kPage;
    require(last < batch.table_width, "tables: too narrow for the positions");
    for (int i = 0; i <= last; i++) {
        const int page = batch.table(sequence)[i];
        require(page >= 0 && page < pages, "tables: a page outside the cache");
    }
    require(!batch.float_prompts || batch.generated[first] || begin == 0,
            "float_prompts: expected a prompt whole, from its first token on");
}

// `starts` as large as the sequences need it.
void require_batch(const Batch& batch, int vocab, int pages) {
    require(batch.starts[batch.sequences] == batch.tokens,
            "starts: expected one for each sequence, and the number of tokens");
    require(batch.starts[0] == 0, "starts: expected to begin at 0");
    for (int s = 0; s < batch.sequences; s++) {
        require(batch.starts[s] < batch.starts[s + 1], "starts: expected at least one token a sequence");
    }
    for (int s = 0; s < batch.sequences; s++) require_sequence(batch, s, pages);
    for (int t = 0; t < batch.tokens; t++) {
        require(batch.token_ids[t] >= 0 && batch.token_ids[t] < vocab, "token_ids: outside the vocabulary");
    }
    const auto require_inside = [&](const int32_t* wanted, int count) {
        for (int r = 0; r < count; r++) {
            require(wanted[r] >= 0 && wanted[r] < batch.tokens, "logit_tokens, choice_tokens: outside the batch");
        }
    };
    require_inside(batch.logit_tokens, batch.logit_rows);
    require_inside(batch.choice_tokens, batch.choice_rows);
}

void forward(Bound& self, const Vector<int32_t>& token_ids, const Vector<int32_t>& positions,
             const Vector<uint8_t>& generated, const Vector<int32_t>& starts, const Matrix<int32_t>& tables,
             const Vector<int32_t>& logit_tokens, Output<float> logits, Output<int32_t> best,
             const Vector<int32_t>& choice_tokens, Output<int32_t> choices, std::optional<Output<float>> margins,
             bool float_prompts) {
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(self.mutex);
    const size_t tokens = token_ids.size(), rows = logit_tokens.size();
    require(positions.size() == tokens && generated.size() == tokens, "positions, generated: expected one a token");
    require(starts.size() == tables.shape(0) + 1, "starts: expected one for each sequence, and the number of tokens");
    require(logits.size() == rows * static_cast<size_t>(self.vocab), "logits: expected (rows, vocabulary)");
    require(best.size() == rows, "best: expected one for each row");
    require(choices.size() == choice_tokens.size(), "choices: expected one for each token");
    require(!margins || (margins->size() == choices.size() && self.ranks == 1),
            "margins: expected one for each token, of a whole model");
    Batch batch;
    batch.tokens = static_cast<int>(tokens);
    batch.sequences = static_cast<int>(tables.shape(0));
    batch.table_width = static_cast<int>(tables.shape(1));
    batch.logit_rows = static_cast<int>(rows);
    batch.token_ids = token_ids.data();
    batch.positions = positions.data();
    batch.generated = generated.data();
    batch.starts = starts.data();
    batch.tables = tables.data();
    batch.logit_tokens = logit_tokens.data();
    batch.logits = logits.data();
    batch.best = best.data();
    batch.choice_rows = static_cast<int>(choices.size());
    batch.choice_tokens = choice_tokens.data();
    batch.choices = choices.data();
    batch.margins = margins ? margins->data() : nullptr;
    batch.float_prompts = float_prompts;
    require_batch(batch, self.vocab, self.model.cache_pages());
    require(self.ranks == 1 || self.model.is_joined(), "the model is a share, and has not met the others");
    if (tokens > 0) self.model.forward(batch);
}

void allocate_cache(Bound& self, int pages) {
    require(pages >= 0, "pages: expected 0 or more");
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(self.mutex);
    self.model.allocate_cache(pages);
}

bool populate_cache(Bound& self, int layer, int page) {
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(self.mutex);
    const int layers = static_cast<int>(self.model.weights.layers.size());
    require(layer >= 0 && layer < layers && page >= 0 && page < self.model.cache_pages(), "no such page of a layer");
    return self.model.populate_cache(layer, page);
}

// Steps are shared with other processes of this host, through files in memory.
void share_memory(Bound& self, int rank, int counters, const std::vector<int>& places) {
    const size_t ranks = places.size() / 2;
    require(places.size() == 2 * ranks && static_cast<int>(ranks) == self.ranks, "places: expected two for each rank");
    require(rank >= 0 && rank < self.ranks, "rank: outside of the ranks");
    self.model.set_exchange(std::make_unique<SharedExchange>(rank, self.ranks, counters, places));
}

// Steps are shared through a function of a part (bytes / 4,) and of the parts of all ranks (ranks, bytes / 4), int32.
void share_by_call(Bound& self, int rank, nb::callable meet) {
    require(rank >= 0 && rank < self.ranks, "rank: outside of the ranks");
    using Words = nb::ndarray<nb::numpy, int32_t, nb::device::cpu>;
    const auto hook = [meet, ranks = static_cast<size_t>(self.ranks)](void* mine, void* all, size_t bytes) {
        const nb::gil_scoped_acquire gil;
        const size_t words = bytes / sizeof(int32_t);
        meet(Words(mine, {words}, nb::none()), Words(all, {ranks, words}, nb::none()));
    };
    self.model.set_exchange(std::make_unique<HookExchange>(rank, self.ranks, hook));
}

// `numbers`: how many there are, and how many a token has; nothing: there are none. The rest as in ExpertConfig.
ExpertConfig experts_of(const std::vector<int>& numbers, const std::vector<int>& sizes, const std::vector<int>& shared,
                        const std::vector<int>& owners, bool normalizes, size_t cuts) {
    if (numbers.empty()) return {};
    require(numbers.size() == 2, "experts: expected how many, and how many of a token");
    const int count = numbers[0], per_token = numbers[1];
    require(count >= 1 && count <= kMaxExperts, "experts: expected 1 to 65536");
    require(per_token >= 1 && per_token <= count, "experts of a token: expected 1 to all of them");
    const auto rise = [&](const std::vector<int>& of) {
        return of.size() == cuts && of.front() == 0 && std::is_sorted(of.begin(), of.end());
    };
    require(rise(sizes) && sizes.back() >= 1 && rise(shared) && (owners.empty() || rise(owners)),
            "expert_sizes, shared_sizes, expert_owners: expected rising cuts from 0 on");
    require(owners.empty() || owners.back() == count, "expert_owners: expected cuts of the experts");
    return {count, per_token, sizes.back(), shared.back(), normalizes, sizes, shared, owners};
}

// `hidden`, `intermediate`, `vocab`: where each rank's share begins, and how many there are.
void make_model(Bound* self, const std::string& isa, int threads, int num_layers, const std::vector<int>& hidden,
                const std::vector<int>& intermediate, const std::vector<int>& vocab, int rank, int heads, int kv_heads,
                int head_dim, float eps, bool symmetric_tokens, const Vector<float>& inv_freq,
                const std::vector<int>& experts, const std::vector<int>& expert_sizes,
                const std::vector<int>& shared_sizes, const std::vector<int>& expert_owners, bool normalizes_experts) {
    require(threads >= 1 && threads <= kMaxThreads, "threads: expected 1 to 1024");
    for (const std::vector<int>* cuts : {&hidden, &intermediate, &vocab}) {
        require(cuts->size() >= 2 && cuts->size() == vocab.size() && cuts->front() == 0 &&
                    std::is_sorted(cuts->begin(), cuts->end()) && cuts->back() >= 1,
                "hidden, intermediate, vocab: expected rising cuts from 0 on");
    }
    require(rank >= 0 && rank + 1 < static_cast<int>(vocab.size()), "rank: outside of the ranks");
    require(num_layers >= 0, "num_layers: expected 0 or more");
    require(kv_heads >= 1 && heads >= kv_heads && heads <= kMaxHeads && heads % kv_heads == 0,
            "heads: expected a multiple of kv_heads, up to 65536");
    require(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= 512, "head_dim: expected an even number from 2 to 512");
    require(inv_freq.size() >= 1 && static_cast<int>(inv_freq.size()) <= head_dim / 2,
            "inv_freq: expected one for each pair of channels that is turned");
    const auto own = [&](const std::vector<int>& cuts) { return cuts[rank + 1] - cuts[rank]; };
    ModelConfig config;
    config.layers = num_layers;
    config.hidden = hidden.back();
    config.intermediate = own(intermediate);
    config.vocab = own(vocab);
    config.shape = {heads, kv_heads, head_dim};
    config.eps = eps;
    config.symmetric_tokens = symmetric_tokens;
    config.inv_freq = floats(inv_freq);
    config.rank = rank;
    config.vocab_cuts = vocab;
    config.intermediate_cuts = intermediate;
    config.hidden_cuts = hidden;
    config.experts = experts_of(experts, expert_sizes, shared_sizes, expert_owners, normalizes_experts, vocab.size());
    new (self) Bound{{config, kernels_for(isa), threads}, vocab.back(), config.ranks(), config, {}, {}};
}

bool is_scale(float x) { return std::isfinite(x) && x > 0; }

void set_rope_scale(Bound& self, float scale) {
    require(is_scale(scale), "scale: expected a finite number above 0");
    self.model.set_rope_scale(scale);
}

void set_local_rope(Bound& self, const Vector<float>& inv_freq, float scale) {
    require(is_scale(scale), "scale: expected a finite number above 0");
    require(!self.model.has_local_rope(), "local rope: it is set already");
    require(inv_freq.size() == self.model.rope_pairs(), "inv_freq: expected as many as of the other rope");
    self.model.set_local_rope(floats(inv_freq), scale);
}

// Where a family differs from Llama. Multipliers of 1 and soft caps of 0 change nothing; a score_multiplier of 0 is
// 1 / sqrt(head_dim).
void set_switches(Bound& self, const std::string& activation, bool interleaved, float embedding_multiplier,
                  float residual_multiplier, float score_multiplier, float logits_multiplier, float attention_softcap,
                  float logits_softcap) {
    require(activation == "silu" || activation == "gelu_tanh", "activation: expected silu or gelu_tanh");
    for (const float x : {embedding_multiplier, residual_multiplier, logits_multiplier}) {
        require(is_scale(x), "multipliers: expected finite numbers above 0");
    }
    for (const float x : {score_multiplier, attention_softcap, logits_softcap}) {
        require(x == 0 || is_scale(x), "score_multiplier, soft caps: expected finite numbers above 0, or 0");
    }
    Switches switches;
    switches.activation = activation == "silu" ? Activation::silu : Activation::gelu;
    switches.interleaved = interleaved;
    switches.embedding_multiplier = embedding_multiplier;
    switches.residual_multiplier = residual_multiplier;
    switches.score_multiplier = score_multiplier;
    switches.logits_multiplier = logits_multiplier;
    switches.attention_softcap = attention_softcap;
    switches.logits_softcap = logits_softcap;
    self.model.set_switches(switches);
}

void set_embedding(Bound& self, Weight weight) {
    require_size(weight);
    Linear& embedding = self.model.weights.embedding;
    embedding.kind = LinearKind::floating;
    embedding.outputs = static_cast<int>(weight.shape(0));
    embedding.inputs = static_cast<int>(weight.shape(1));
    embedding.weight = weight.data();
    embedding.dtype = float_type(weight);
    embedding.ordinal = static_cast<int>(self.kept.size());
    self.kept.push_back(nb::cast(weight));
}

void set_final_norm(Bound& self, const Vector<float>& gain, const Vector<float>& bias) {
    self.model.weights.final_gain = floats(gain);
    self.model.weights.final_bias = floats(bias);
}

int finish(Bound& self, bool forgets_head) {
    for (const Layer& layer : self.model.weights.layers) {
        require(layer.is_sparse() == !layer.router.linears.empty(), "router: expected one where there are experts");
        require(!layer.is_sparse() || layer.down_gain.empty(), "norms of what is added: not of experts");
        for (size_t e = 0; e < layer.experts.size(); e++) {
            const Expert& expert = layer.experts[e];
            const size_t parts = expert.gate_up.linears.size() + expert.down.linears.size();
            require(parts == (self.config.experts.has(self.config.rank, static_cast<int>(e)) ? 3 : 0),
                    "experts: expected gate, up and down of each");
        }
    }
    return self.model.finish(forgets_head ? HeadPages::released : HeadPages::kept);
}

// Writes a byte that wakes whoever polls the other end. Python's own writes let go of the interpreter, which the woken
// thread would then take, and the caller wait for it; this one keeps it.
void wake(int descriptor) {
    const char byte = 0;
    [[maybe_unused]] const auto written = ::write(descriptor, &byte, 1);  // a full pipe wakes as well
}

}  // namespace

NB_MODULE(_core, m) {
    nb::set_leak_warnings(false);
    nb::class_<Isa>(m, "Isa")
        .def_ro("name", &Isa::name)
        .def_ro("needs", &Isa::needs)
        .def_ro("dot", &Isa::dot)
        .def_ro("fma", &Isa::fma)
        .def_prop_ro("weight_rows", [](const Isa& self) { return self.tiles.weight_rows; })
        .def_prop_ro("tokens", [](const Isa& self) { return self.tiles.tokens; })
        .def_prop_ro("packed_tokens", [](const Isa& self) { return self.tiles.packed_tokens; })
        .def_prop_ro("float_tokens", [](const Isa& self) { return self.tiles.float_tokens; });
    m.def("isas", &isas);
    m.def("available_isas", &available_isas);
    m.def("usable_cpus", &usable_cpus);
    m.def("wake", &wake, "descriptor"_a);
    m.def("watch_mapping", &watch_mapping, "begin"_a, "nbytes"_a, "name"_a);
    m.attr("PAGE") = kPage;
    m.attr("FEW_TOKENS") = kFewTokens;
    bind_sample(m);
    m.def("int8_tops", &int8_tops, "threads"_a, "passes"_a, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<ReadProbe>(m, "ReadProbe")
        .def(nb::init<int, size_t>(), "threads"_a, "nbytes"_a)
        .def("gb_s", &ReadProbe::gb_s, "passes"_a, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Bound>(m, "Model")
        .def("__init__", &make_model, nb::kw_only(), "isa"_a, "threads"_a, "num_layers"_a, "hidden"_a, "intermediate"_a,
             "vocab"_a, "rank"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a, "symmetric_tokens"_a, "inv_freq"_a,
             "experts"_a = std::vector<int>(), "expert_sizes"_a = std::vector<int>(),
             "shared_sizes"_a = std::vector<int>(), "expert_owners"_a = std::vector<int>(),
             "normalizes_experts"_a = false)
        .def("add_linear", &add_linear, "layer"_a, "group"_a, "kind"_a, "weight"_a, nb::kw_only(), "scale"_a,
             "offset"_a, "bias"_a, "deq_scale"_a, "quant_bias"_a, "inv_input_scale"_a, "input_offset"_a)
        .def("add_router", &add_router, "layer"_a, "weight"_a, "shared_gate"_a = nb::none())
        .def("add_expert", &add_expert, "layer"_a, "expert"_a, "part"_a, "kind"_a, "weight"_a, nb::kw_only(), "scale"_a,
             "offset"_a, "bias"_a, "deq_scale"_a, "quant_bias"_a, "inv_input_scale"_a, "input_offset"_a)
        .def("set_norms", &set_norms, "layer"_a, nb::kw_only(), "input_gain"_a, "input_bias"_a, "post_gain"_a,
             "post_bias"_a)
        .def("set_term_norms", &set_term_norms, "layer"_a, nb::kw_only(), "o_gain"_a, "o_bias"_a, "down_gain"_a,
             "down_bias"_a)
        .def("set_attention", &set_attention, "layer"_a, "kind"_a, nb::kw_only(), "window"_a, "query_norm"_a,
             "key_norm"_a, "query_inv"_a, "score_scale"_a, "key"_a, "value"_a, "is_local"_a = false)
        .def("set_rope_scale", &set_rope_scale, "scale"_a)
        .def("set_local_rope", &set_local_rope, "inv_freq"_a, "scale"_a)
        .def("set_switches", &set_switches, nb::kw_only(), "activation"_a, "interleaved"_a, "embedding_multiplier"_a,
             "residual_multiplier"_a, "score_multiplier"_a, "logits_multiplier"_a, "attention_softcap"_a,
             "logits_softcap"_a)
        .def("set_embedding", &set_embedding, "weight"_a)
        .def("set_final_norm", &set_final_norm, "gain"_a, "bias"_a)
        .def("finish", &finish, "forgets_head"_a = false, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "leave_alone", [](Bound& self, bool alone) { self.model.leave_alone(alone); }, "alone"_a)
        .def("abandon", [](Bound& self) { self.model.abandon(); })
        .def("share_memory", &share_memory, "rank"_a, "counters"_a, "places"_a)
        .def("share_by_call", &share_by_call, "rank"_a, "meet"_a)
        .def("allocate_cache", &allocate_cache, "pages"_a)
        .def("populate_cache", &populate_cache, "layer"_a, "page"_a)
        .def("forward", &forward, nb::kw_only(), "token_ids"_a, "positions"_a, "generated"_a, "starts"_a, "tables"_a,
             "logit_tokens"_a, "logits"_a.noconvert(), "best"_a.noconvert(), "choice_tokens"_a, "choices"_a.noconvert(),
             "margins"_a.noconvert() = nb::none(), "float_prompts"_a = false)
        .def_prop_ro("threads", [](const Bound& self) { return self.model.threads(); })
        .def_prop_ro("page_bytes", [](const Bound& self) { return self.model.page_bytes(); })
        .def_prop_ro("weight_bytes", [](const Bound& self) { return self.model.weight_bytes(); });
}

}  // namespace eightfold
