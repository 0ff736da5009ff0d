#include "step.h"

#include <algorithm>
#include <utility>

namespace eightfold {

namespace {

constexpr int kPhasesOfLayer = 8, kPhasesOfDense = 5, kOtherPhases = 7;

// And where several ranks meet: two for every meeting.
constexpr int kMeetingsOfLayer = 6, kOtherMeetings = 3;

// Up to so many tokens, each thread prepares the inputs of products itself: a phase of its own would take longer.
constexpr int kAloneTokens = 2;

constexpr int kRowsOfChunk = 8;  // tokens of a chunk where each is little work

}  // namespace

Step::Step(const ModelConfig& config, const Weights& weights, const Kernels& kernels, Pool& pool, Parts parts)
    : config_(config), weights_(weights), kernels_(kernels), pool_(pool), parts_(parts) {
    for (int r = 0; r <= config_.ranks(); r++) {
        head_cuts_.push_back(r * config_.shape.heads * config_.shape.head_dim);
    }
}

int Step::phases(const ModelConfig& config) {
    const int feeding = config.experts.count > 0 ? Experts::kPhases : kPhasesOfDense;
    const int alone = config.layers * (kPhasesOfLayer + feeding) + kOtherPhases;
    return config.is_shared() ? alone + 2 * (config.layers * kMeetingsOfLayer + kOtherMeetings) : alone;
}

void Step::run(const Batch& batch) {
    parts_.attention.plan(batch, plan_);
    reserve_tokens(std::max({batch.tokens, batch.logit_rows, batch.choice_rows}));
    parts_.head.reserve(batch);
    if (config_.is_shared()) parts_.share.reserve_parts(batch, parts_.experts.shown(batch.tokens));
    Slot& slot = slots_[pool_.next_slot()];  // last: to reserve may take a slot
    const bool alone = batch.tokens <= kAloneTokens && !parts_.share.has_ranges();
    slot.run = {batch, ++count_, alone};
    std::swap(slot.attention, plan_);
    parts_.attention.begin(batch);
    pool_.run(program, this);
    parts_.share.rethrow_failure(count_);
}

void Step::reserve_tokens(int tokens) {
    if (tokens <= capacity_) return;
    pool_.quiesce();
    capacity_ = tokens;
    x_.resize(static_cast<size_t>(tokens) * config_.hidden);
    gated_.resize(static_cast<size_t>(tokens) * config_.intermediate);
    term_.resize(static_cast<size_t>(tokens) * config_.hidden);
    parts_.attention.reserve_tokens(tokens);
    parts_.products.reserve_tokens(tokens);
    parts_.experts.reserve_tokens(tokens);
    parts_.share.reserve_tokens(tokens);
}

void Step::program(void* step, Pool::Walk& walk) {
    Step& self = *static_cast<Step*>(step);
    self.walk_through(walk, self.slots_[walk.slot()]);
}

void Step::walk_through(Pool::Walk& walk, const Slot& slot) {
    const Run& run = slot.run;
    const int tokens = run.batch.tokens;
    const auto embed_some = [&](int i) {
        for (int t = i * kRowsOfChunk; t < std::min(tokens, (i + 1) * kRowsOfChunk); t++) embed(run, t);
    };
    if (!walk.phase(chunk_count(tokens, kRowsOfChunk), embed_some)) return;
    if (config_.is_shared() && !parts_.share.gather_embedding(walk, run, x_.data())) return;
    for (int i = 0; i < config_.layers; i++) {
        const bool is_last = i + 1 == config_.layers;
        const Group& after = is_last ? parts_.head.first(run.batch) : weights_.layers[i + 1].qkv;
        if (!layer_phases(walk, slot, i, after)) return;
    }
    (void)parts_.head.find(walk, run, x_.data());
}

bool Step::layer_phases(Pool::Walk& walk, const Slot& slot, int i, const Group& after) {
    const Run& run = slot.run;
    const int tokens = run.batch.tokens;
    const Layer& layer = weights_.layers[i];
    Attention& attention = parts_.attention;
    const auto ask_for_keys = [&] { attention.prefetch(slot.attention, i, walk.thread()); };
    const Output qkv{.y = attention.qkv(), .ld = static_cast<size_t>(layer.qkv.outputs()), .adds = false};
    const bool hands_heads = attention.hands_heads(layer.o, tokens);
    const Term o{{.group = layer.o, .x = attention.heads(), .tokens = tokens, .handed = hands_heads},
                 head_cuts_,
                 layer.is_sparse() ? layer.router : layer.gate_up,
                 layer.o_gain,
                 layer.o_bias};
    return parts_.products.multiply(walk, run, {layer.qkv, x_.data(), tokens}, qkv, ask_for_keys) &&
           attention.attend_all(walk, run, slot.attention, i, layer.o) && add(walk, run, o) &&
           feed_forward(walk, run, i, after);
}

bool Step::feed_forward(Pool::Walk& walk, const Run& run, int i, const Group& after) {
    const Layer& layer = weights_.layers[i];
    const int tokens = run.batch.tokens;
    if (layer.is_sparse()) {
        return parts_.experts.add(walk, run, i, x_.data(), [&] { after.prefetch(tokens, walk.thread()); });
    }
    const Input input{.group = layer.down, .x = gated_.data(), .tokens = tokens, .handed = hands_gated(layer, tokens)};
    return gate(walk, run, layer) &&
           add(walk, run, {input, config_.intermediate_cuts, after, layer.down_gain, layer.down_bias});
}

void Step::embed(const Run& run, int t) {
    const Linear& embedding = weights_.embedding;
    const size_t size = config_.hidden;
    const int token = run.batch.token_ids[t], owner = parts_.share.owner_of(token);
    if (!config_.is_shared() || owner == parts_.share.rank()) {
        const size_t row = static_cast<size_t>(token - config_.vocab_cuts[owner]) * size;
        const size_t bytes = embedding.dtype == DType::f32 ? 4 : 2;
        float* to = (config_.is_shared() ? parts_.share.part() : x_.data()) + static_cast<size_t>(t) * size;
        kernels_.widen(static_cast<const char*>(embedding.weight) + row * bytes, embedding.dtype, config_.hidden, to);
        const float multiplier = config_.switches.embedding_multiplier;
        if (multiplier != 1) kernels_.scale_heads(to, config_.hidden, multiplier, nullptr, nullptr, to);
    }
    parts_.attention.find_angles(run.batch, t);
}

bool Step::add(Pool::Walk& walk, const Run& run, const Term& term) {
    const size_t ld = config_.hidden;
    if (!is_finished(term)) return multiply(walk, run, term, {.y = x_.data(), .ld = ld, .adds = true});
    const int tokens = run.batch.tokens;
    return multiply(walk, run, term, {.y = term_.data(), .ld = ld, .adds = false}) &&
           walk.phase(chunk_count(tokens, kRowsOfChunk), [&](int i) {
               for (int t = i * kRowsOfChunk; t < std::min(tokens, (i + 1) * kRowsOfChunk); t++) finish(term, t);
           });
}

// Of a token: norm, multiplier and sum.
void Step::finish(const Term& term, int t) {
    const int size = config_.hidden;
    const size_t at = static_cast<size_t>(t) * size;
    const float multiplier = config_.switches.residual_multiplier;
    float* row = term_.data() + at;
    const float* bias = term.bias.empty() ? nullptr : term.bias.data();
    if (!term.gain.empty()) kernels_.rms_norm(row, size, term.gain.data(), bias, config_.eps, row);
    if (multiplier != 1) kernels_.scale_heads(row, size, multiplier, nullptr, nullptr, row);
    kernels_.add(x_.data() + at, row, size);
}

// out = a term, or out += it.
bool Step::multiply(Pool::Walk& walk, const Run& run, const Term& term, Output out) {
    const Input& input = term.input;
    const Group& group = input.group;
    const Linear& linear = group.linears.front();
    Products& products = parts_.products;
    Share& share = parts_.share;
    const auto ask_for_weights = [&] { term.next.prefetch(input.tokens, walk.thread()); };
    if (!config_.is_shared()) {
        return products.multiply(walk, run, input, out, ask_for_weights);
    }
    if (group.has_floating()) {
        return share.gather_inputs(walk, run, input.x, term.cuts) &&
               products.multiply(walk, run, {group, share.inputs(), input.tokens},
                                 {.y = share.part(), .ld = static_cast<size_t>(linear.outputs), .adds = false},
                                 ask_for_weights) &&
               share.take_outputs(walk, run, out);
    }
    if (share.needs_ranges(group) && !share.meet_ranges(walk, run, group, input.x)) return false;
    return products.multiply(walk, run, input, {.y = share.part(), .ld = share.part_width(linear), .adds = false},
                             ask_for_weights) &&
           share.take_sums(walk, run, group, products.prepared()[0], out);
}

// Whether what comes out of the gate is quantized and packed at once.
bool Step::hands_gated(const Layer& layer, int tokens) const {
    return layer.gate_up.many.front().count % kAlign == 0 && parts_.products.takes_handed(layer.down, tokens);
}

bool Step::gate(Pool::Walk& walk, const Run& run, const Layer& layer) {
    const int tokens = run.batch.tokens;
    const Group& group = layer.gate_up;
    const Input input{group, x_.data(), tokens};
    const Layout layout = layout_of(tokens);
    const bool hands = hands_gated(layer, tokens);
    Products& products = parts_.products;
    if (!products.prepare(walk, run, input)) return false;
    return walk.phase(
        group.chunk_total(tokens),
        [&](int i) {
            const Piece whole = products.piece_of(input, i);
            if (layout == Layout::packed) group.prefetch(tokens, i + pool_.threads());
            const Source from{products.prepared(run, input, walk.thread()), layout, run.batch.generated + whole.t0};
            by_rows({whole.linear, whole.begin, whole.count}, tokens, [&](int n, int count) {
                gate_piece(from, layer, {0, n, count, whole.t0, whole.t1}, hands, walk.thread());
            });
        },
        [&] { layer.down.prefetch(tokens, walk.thread()); });
}

void Step::gate_piece(const Source& from, const Layer& layer, const Piece& piece, bool hands, int thread) {
    const Group& group = layer.gate_up;
    Products& products = parts_.products;
    const int count = piece.count;
    const size_t ld = config_.intermediate;
    float* out = gated_.data() + piece.t0 * ld + piece.begin;
    if (from.layout == Layout::packed && group.gates(hands ? &layer.down : nullptr)) {
        if (hands) group.gate(kernels_, piece, from.prepared, layer.down, products.handed());
        else group.gate(kernels_, piece, from.prepared, {.y = out, .ld = ld, .adds = false});
        return;
    }
    Scratch& scratch = products.scratch(thread);
    float *gate = scratch.first.data(), *up = scratch.second.data();
    const size_t width = count;
    Piece half = piece;
    for (half.linear = 0; half.linear < 2; half.linear++) {
        group.multiply(kernels_, half, from, {.y = half.linear == 0 ? gate : up, .ld = width, .adds = false}, scratch);
    }
    for (int t = 0; t < piece.t1 - piece.t0; t++) {
        float* to = hands ? gate + t * count : out + t * ld;
        kernels_.gate_mul(group.activation, gate + t * count, up + t * count, count, to);
    }
    if (hands) products.hand_block(layer.down, piece, gate, thread);
}

}  // namespace eightfold
