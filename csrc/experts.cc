#include "experts.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

namespace eightfold {

namespace {

constexpr int kTokensOfChunk = 8;  // whose experts are chosen at a time
constexpr int kTurns = 8;          // chunks of the products for each thread, at least
constexpr int kDownRows = 256;     // of a chunk, whose sums of all tokens stay in the second cache

constexpr size_t kAskedBytes = 4 << 10;  // of the next bunch's weights, before they are read

int in_lanes(int places) { return chunk_count(places, kLanes) * kLanes; }

// How many of a bunch's tokens are packed. A last block would take as long as a full one, so of a few it is none.
int packed_of(int tokens) {
    const int rest = tokens % kLanes;
    return rest <= kFewTokens ? tokens - rest : tokens;
}

void ask_for_pages(const void* at, size_t bytes) {
    static const size_t page = sysconf(_SC_PAGESIZE);
    const size_t begin = reinterpret_cast<size_t>(at), first = begin / page * page;
    (void)madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_WILLNEED);
}

// Calls f(first row, rows, first token, end, layout) for the pieces of a product: some rows meet all tokens of a bunch,
// while they are in the second cache, before the next do.
template <typename Step>
void by_pieces(int tokens, int n, int count, Step f) {
    const int packed = packed_of(tokens);
    by_rows({0, n, count}, tokens, [&](int first, int rows) {
        for (int t = 0; t < packed; t += kTokenBlock) {
            f(first, rows, t, std::min(packed, t + kTokenBlock), Layout::packed);
        }
        if (packed < tokens) f(first, rows, packed, tokens, Layout::rows);
    });
}

}  // namespace

// Threads and what they share out.

int Experts::most_bunches(int tokens) const {
    return std::min(config_.experts.count, tokens * config_.experts.per_token);
}

int Experts::most_places(int tokens) const {
    const int pairs = tokens * config_.experts.per_token;
    // Those of bunches that are packed begin with a block, and end with one.
    const int packed = std::min(config_.experts.count, pairs / (kFewTokens + 1));
    return in_lanes(pairs + 2 * packed * kLanes);
}

int Experts::most_blocks(int tokens) const {
    const int pairs = tokens * config_.experts.per_token;
    return pairs / kLanes + most_bunches(tokens) + (has_shared() ? chunk_count(tokens, kLanes) : 0);
}

int Experts::gate_rows(int tokens) const {
    const int size = std::max(own_size(false), 1), bunches = most_bunches(tokens);
    const int pieces = std::clamp(chunk_count(pool_.threads() * kTurns, bunches), 1, chunk_count(size, kManyRows));
    return in_lanes(chunk_count(size, pieces));
}

int Experts::down_rows(int tokens) const {
    const int turn = config_.hidden / pool_.threads() / kLanes * kLanes;  // rows of a thread
    // Long enough runs, unless threads went without.
    const int least = tokens > kFewTokens ? kManyRows : std::clamp(turn, kLanes, kManyRows);
    return std::clamp(turn / kTurns / kLanes * kLanes, least, kDownRows);
}

// Ranks.

size_t Experts::gated_at(const Plan& plan, bool is_shared, int rank) const {
    if (!is_shared || !is_cut(false)) return 0;
    return static_cast<size_t>(plan.firsts.back()) * length(cuts_of(false), rank);
}

size_t Experts::shown(int tokens) const {
    if (!is_used_) return 0;
    const size_t places = most_places(tokens), rows = tokens;
    size_t gated = has_shared() ? rows * share_.widest(cuts_of(true)) : 0;
    if (is_cut(false)) return std::max(gated + places * share_.widest(cuts_of(false)), rows * config_.hidden);
    return std::max(gated, pairs_at(tokens) + places * config_.hidden);
}

// Before the first step.

void Experts::take(Layer& layer) {
    is_used_ = true;
    for (size_t e = 0; e < layer.experts.size(); e++) {
        if (has(static_cast<int>(e))) take(layer.experts[e], layer);
    }
    Group& router = layer.router;
    router.keeps_rows = true;
    router.forms.assign(kWide + 1, {});
    router.forms[kReal].kind = LinearKind::floating;
    for (const Expert& expert : layer.experts) {
        const std::vector<Form>& forms = expert.gate_up.forms;
        if (forms.empty()) continue;  // another rank's
        for (const Slot slot : {kToken, kWide}) {
            if (forms[slot].kind != LinearKind::none) router.forms[slot] = forms[slot];
        }
        for (const Slot slot : {kStatic, kOtherStatic}) {  // a prompt's tokens
            if (forms[slot].kind == LinearKind::mix) router.forms[kToken].kind = LinearKind::dynamic;
        }
    }
}

void Experts::take(Expert& expert, Layer& layer) {
    std::vector<Form>& forms = expert.gate_up.forms;
    forms.assign(kSlots, {});
    for (const Linear& linear : expert.gate_up.linears) {
        Form form{linear.kind, 0, 0};
        Slot slot = linear.kind == LinearKind::floating ? kReal : linear.kind == LinearKind::w8a16 ? kWide : kToken;
        if (linear.is_static()) {
            form = {linear.kind, linear.inv_input_scale, linear.input_offset};
            slot = forms[kStatic].kind == LinearKind::none || forms[kStatic] == form ? kStatic : kOtherStatic;
            layer.reads_static = true;
        }
        forms[slot] = form;
        has_[slot] = true;
    }
    const Linear& down = expert.down.linears.front();
    const MiddleSlot slot = down.kind == LinearKind::w8a16 ? kWideMiddle : kMiddle;
    expert.down.forms.assign(kMiddleSlots, {});
    expert.down.forms[slot] = {down.kind, 0, 0};
    if (down.is_static()) expert.down.forms[slot] = {down.kind, down.inv_input_scale, down.input_offset};
    if (down.kind == LinearKind::floating) has_real_middle_ = true;
    else has_middle_[slot] = true;
    for (Group* group : {&expert.gate_up, &expert.down}) {
        group->activation = config_.switches.activation;
        group->symmetric_tokens = config_.symmetric_tokens;
        group->find_forms();
        for (Linear& linear : group->linears) {
            std::fill(linear.weight_sum.begin(), linear.weight_sum.end(), kUnknownSum);
            linear.unknown_rows = static_cast<int>(linear.weight_sum.size());
        }
    }
}

void Experts::reserve_tokens(int tokens) {
    if (!is_used_) return;
    logits_.resize(static_cast<size_t>(tokens) * (config_.experts.count + 1));
    sums_.resize(static_cast<size_t>(tokens) * config_.hidden);
    gated_[0].resize(static_cast<size_t>(most_places(tokens)) * config_.experts.size);
    gated_[1].resize(static_cast<size_t>(tokens) * config_.experts.shared_size);
    reserve(plan_, tokens);
    for (Own& own : own_) reserve(own.plan, std::min(tokens, kFewTokens));
}

void Experts::reserve(Plan& plan, int tokens) const {
    plan.choices.resize(static_cast<size_t>(tokens) * config_.experts.per_token);
    plan.shared.resize(tokens);
    plan.counts.resize(config_.experts.count);
    plan.places.resize(plan.choices.size());
    plan.firsts.resize(config_.ranks() + 1);
    for (const bool is_shared : {false, true}) {
        Room& room = plan.rooms[is_shared];
        const int places = !is_shared ? most_places(tokens) : has_shared() ? in_lanes(tokens) : 0;
        room.tokens.resize(places);
        room.weights.resize(places);
        room.generated.resize(places);
        room.inputs.resize(kSlots);
        for (int slot = 0; slot < kSlots; slot++) {
            if (!has_[slot]) continue;
            if (slot == kReal) room.inputs[slot].reserve_real(places, config_.hidden);
            else room.inputs[slot].reserve(places, config_.hidden, slot == kWide ? 2 : 1);
        }
        room.middle.resize(kMiddleSlots);
        const int size = size_of(is_shared);
        if (has_real_middle_) room.middle[kMiddle].reserve_real(places, size);
        for (int slot = 0; slot < kMiddleSlots; slot++) {
            room.middle[slot].reserve(places, has_middle_[slot] ? size : 0, slot == kWideMiddle ? 2 : 1);
        }
    }
}

// Who goes where.

void Experts::choose(const Place& of, int t, Plan& plan) const {
    const int count = config_.experts.count, most = config_.experts.per_token;
    const float* logits = logits_.data() + static_cast<size_t>(t) * of.layer.router.outputs();
    Choice* chosen = plan.choices.data() + static_cast<size_t>(t) * most;
    int found = 0;
    for (int e = 0; e < count; e++) {  // falling by logit; NaN is chosen only where there is not enough else
        int at = found;
        while (at > 0 && chosen[at - 1].weight < logits[e]) at--;
        if (at == most) continue;
        if (found < most) found++;
        std::copy_backward(chosen + at, chosen + found - 1, chosen + found);
        chosen[at] = {e, logits[e]};
    }
    const float top = chosen[0].weight;
    float all = 0;
    for (int e = 0; e < count; e++) all += std::exp(logits[e] - top);
    float total = 0;
    for (int i = 0; i < most; i++) {
        chosen[i].weight = std::exp(chosen[i].weight - top) / all;
        total += chosen[i].weight;
    }
    for (int i = 0; config_.experts.normalizes && i < most; i++) chosen[i].weight /= total;
    std::sort(chosen, chosen + most, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
    if (has_shared()) plan.shared[t] = 1.0f / (1.0f + std::exp(-logits[count]));
}

void Experts::make_bunches(const Place& of, Plan& plan) const {
    const Batch& batch = of.run.batch;
    const int tokens = batch.tokens, most = config_.experts.per_token;
    const bool alone = is_alone(of);
    std::fill(plan.counts.begin(), plan.counts.end(), 0);
    for (int i = 0; i < tokens * most; i++) plan.counts[plan.choices[i].expert]++;
    const std::vector<int>& owners = config_.experts.owners;
    plan.bunches.clear();
    int place = 0, rank = 0;
    for (int e = 0; e < config_.experts.count; e++) {
        for (; rank < config_.ranks() && !owners.empty() && owners[rank] == e; rank++) plan.firsts[rank] = place;
        const int count = plan.counts[e];
        if (count == 0) continue;
        const bool packed = packed_of(count) > 0;
        if (packed) place = in_lanes(place);
        plan.bunches.push_back({e, place, count, place, false});
        plan.counts[e] = place;  // from here on: where the next of its tokens goes
        place += packed ? in_lanes(count) : count;
    }
    std::fill(plan.firsts.begin() + rank, plan.firsts.end(), place);
    Room& room = plan.rooms[0];
    for (int t = 0; t < tokens; t++)
        for (int i = t * most; i < (t + 1) * most; i++) {
            const Choice choice = plan.choices[i];
            const int at = plan.counts[choice.expert]++;
            plan.places[i] = at;
            room.tokens[at] = t;
            room.weights[at] = choice.weight;
            room.generated[at] = batch.generated[t];
        }
    // Few enough that those of a bunch lie one below the other.
    if (alone)
        for (Bunch& bunch : plan.bunches) bunch.input = room.tokens[bunch.begin];
    plan.order.clear();
    for (size_t i = 0; i < plan.bunches.size(); i++) {
        if (has(plan.bunches[i].expert)) plan.order.push_back(static_cast<int>(i));
    }
    if (tokens > kFewTokens) {
        std::stable_sort(plan.order.begin(), plan.order.end(),
                         [&](int a, int b) { return plan.bunches[a].count > plan.bunches[b].count; });
    }
    if (has_shared()) {
        plan.bunches.push_back({config_.experts.count, 0, tokens, 0, true});
        Room& all = plan.rooms[1];
        std::iota(all.tokens.begin(), all.tokens.begin() + tokens, 0);
        std::copy_n(plan.shared.begin(), tokens, all.weights.begin());
        std::copy_n(batch.generated, tokens, all.generated.begin());
    }
    make_blocks(plan);
}

void Experts::make_blocks(Plan& plan) const {
    plan.blocks.clear();
    for (size_t i = 0; i < plan.bunches.size(); i++) {
        const Bunch& bunch = plan.bunches[i];
        if (!has(bunch.expert)) continue;
        const int count = bunch.count, packed = packed_of(count);
        for (int begin = 0; begin < count; begin += kLanes) {
            const Layout layout = begin < packed ? Layout::packed : Layout::rows;
            plan.blocks.push_back({static_cast<int>(i), begin, std::min(kLanes, count - begin), layout});
        }
    }
}

// Whoever is the first to choose an expert asks the system to read its weights from the file, all at once: page by page,
// as they are used, a disk is several times slower.
void Experts::ask_for(Expert& expert) {
    if (std::atomic_ref<bool>(expert.is_asked).exchange(true, std::memory_order_relaxed)) return;
    for (const Group* group : {&expert.gate_up, &expert.down}) {
        for (const Linear& linear : group->linears) ask_for_pages(linear.weight, linear.weight_bytes());
    }
}

// Inside a phase.
Experts::Plan& Experts::plan_of(const Place& of, int thread) {
    if (!is_alone(of)) return plan_;
    Own& own = own_[thread];
    if (own.run == of.run.id && own.layer == &of.layer) return own.plan;
    own.run = of.run.id;
    own.layer = &of.layer;
    for (int t = 0; t < of.run.batch.tokens; t++) choose(of, t, own.plan);
    make_bunches(of, own.plan);
    for (const Bunch& bunch : own.plan.bunches) {
        if (has(bunch.expert)) ask_for(of.layer.experts[bunch.expert]);
    }
    return own.plan;
}

bool Experts::route(Pool::Walk& walk, const Place& of) {
    const int tokens = of.run.batch.tokens;
    const Output logits{.y = logits_.data(), .ld = static_cast<size_t>(of.layer.router.outputs()), .adds = false};
    if (!products_.multiply(walk, of.run, input_of(of), logits, [] {})) return false;
    if (is_alone(of)) return true;
    const auto choose_some = [&](int i) {
        for (int t = i * kTokensOfChunk; t < std::min(tokens, (i + 1) * kTokensOfChunk); t++) choose(of, t, plan_);
    };
    return walk.phase(chunk_count(tokens, kTokensOfChunk), choose_some) &&
           walk.phase(1, [&](int) { make_bunches(of, plan_); }) && walk.phase(most_blocks(tokens), [&](int i) {
               if (i < static_cast<int>(plan_.blocks.size())) gather(of, plan_.blocks[i], walk.thread());
           });
}

// What an expert reads.

void Experts::gather(const Place& of, const Block& block, int thread) {
    const Bunch& bunch = plan_.bunches[block.bunch];
    const Group& group = of.layer.experts[bunch.expert].gate_up;
    if (block.begin == 0) ask_for(of.layer.experts[bunch.expert]);
    const std::vector<Prepared>& from = products_.prepared(of.run, input_of(of), thread);
    const Layout layout = block.layout;
    Room& room = plan_.rooms[bunch.is_shared];
    Scratch& scratch = products_.scratch(thread);
    const int first = bunch.begin + block.begin;
    for (int at = first; at < first + block.count; at++) {
        gather_row(group, from, room.tokens[at], room, at, layout, scratch);
    }
    if (layout == Layout::packed) group.pack(kernels_, first / kLanes, room.inputs, scratch);
}

void Experts::gather_row(const Group& group, const std::vector<Prepared>& from, int t, Room& room, int at,
                         Layout layout, Scratch& scratch) const {
    const int width = config_.hidden;
    const size_t ld = row_bytes(width);
    const bool packed = layout == Layout::packed;
    if (packed) scratch.rows.resize(std::max(scratch.rows.size(), kSlots * 2 * kLanes * ld));
    const float* real = from[kReal].real.data() + static_cast<size_t>(t) * width;
    for (int slot = 0; slot < kSlots; slot++) {
        const Form& form = group.forms[slot];
        if (form.kind == LinearKind::none) continue;
        Prepared& to = room.inputs[slot];
        if (slot == kReal) {
            std::copy_n(real, width, to.real.data() + static_cast<size_t>(at) * width);
            continue;
        }
        const int many = planes(form.kind);
        uint8_t* out = packed ? scratch.rows.data() + (2 * slot * kLanes + at % kLanes) * ld
                              : to.bytes.data() + static_cast<size_t>(at) * many * ld;
        if (form.kind == LinearKind::w8a8 || (form.kind == LinearKind::mix && room.generated[at] != 0)) {
            kernels_.quantize_static(real, width, form.inv_scale, form.offset, out);
            continue;
        }
        const Prepared& source = from[form.kind == LinearKind::mix ? static_cast<int>(kToken) : slot];
        to.params[at] = source.params[t];
        for (int plane = 0; plane < many; plane++) {
            std::memcpy(out + plane * (packed ? kLanes : 1) * ld,
                        source.bytes.data() + (static_cast<size_t>(t) * many + plane) * ld, ld);
        }
    }
}

// Products.

bool Experts::gate(Pool::Walk& walk, const Place& of) {
    const int tokens = of.run.batch.tokens;
    if (!walk.phase(gate_chunks(tokens), [&](int i) { gate_chunk(of, i, walk.thread()); })) return false;
    if ((is_cut(false) || (is_cut(true) && has_shared())) && !show_gated(walk, of)) return false;
    if (is_alone(of)) return true;
    return walk.phase(most_blocks(tokens), [&](int i) {
        if (i < static_cast<int>(plan_.blocks.size())) quantize(of, plan_, plan_.blocks[i], walk.thread());
    });
}

bool Experts::show_gated(Pool::Walk& walk, const Place& of) {
    return share_.show_numbers(walk, of.run, [&] {
        size_t numbers = has_shared() ? of.run.batch.tokens * share_.widest(cuts_of(true)) : 0;
        if (is_cut(false)) numbers += plan_of(of, walk.thread()).firsts.back() * share_.widest(cuts_of(false));
        return numbers;
    });
}

// The shared expert's, which has all tokens, before the others'.
void Experts::gate_chunk(const Place& of, int chunk, int thread) {
    const Plan& plan = plan_of(of, thread);
    const int tokens = of.run.batch.tokens, rows = gate_rows(tokens);
    const int first = gate_units(true, tokens), units = gate_units(false, tokens);
    const bool is_shared = chunk < first;
    const size_t index = (chunk - first) / units;
    if (!is_shared && index >= plan.order.size()) return;
    const Bunch& bunch = is_shared ? plan.bunches.back() : plan.bunches[plan.order[index]];
    const int n = (is_shared ? chunk : (chunk - first) % units) * rows;
    gate_bunch(of, plan, bunch, n, std::min(rows, own_size(is_shared) - n), thread);
}

void Experts::gate_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, int thread) {
    Group& group = of.layer.experts[bunch.expert].gate_up;
    for (Linear& linear : group.linears) linear.prepare_new(kernels_, n, count);
    const Room& room = plan.rooms[bunch.is_shared];
    const std::vector<Prepared>& inputs = is_alone(of) ? products_.prepared(of.run, input_of(of), thread) : room.inputs;
    const size_t ld = own_size(bunch.is_shared);
    float* gated = is_cut(bunch.is_shared) ? share_.part() + gated_at(plan, bunch.is_shared, config_.rank)
                                           : gated_[bunch.is_shared].data();
    Scratch& scratch = products_.scratch(thread);
    float *gate = scratch.first.data(), *up = scratch.second.data();
    by_pieces(bunch.count, n, count, [&](int first, int rows, int t, int end, Layout layout) {
        Piece piece{0, first, rows, bunch.input + t, bunch.input + end};
        float* out = gated + (bunch.begin + t) * ld + first;
        if (layout == Layout::packed && group.gates(nullptr)) {
            return group.gate(kernels_, piece, inputs, {.y = out, .ld = ld, .adds = false});
        }
        const Source from{inputs, layout, room.generated.data() + bunch.begin + t};
        const size_t width = rows;
        for (piece.linear = 0; piece.linear < 2; piece.linear++) {
            group.multiply(kernels_, piece, from, {piece.linear == 0 ? gate : up, width, false}, scratch);
        }
        for (int i = 0; i < end - t; i++) {
            kernels_.gate_mul(group.activation, gate + i * width, up + i * width, rows, out + i * ld);
        }
    });
}

// What an expert has gated for a pair, of all ranks.
const float* Experts::gated_row(const Plan& plan, bool is_shared, int at, Scratch& scratch) const {
    if (!is_cut(is_shared)) return gated_[is_shared].data() + static_cast<size_t>(at) * size_of(is_shared);
    const std::vector<int>& cuts = cuts_of(is_shared);
    scratch.row.resize(size_of(is_shared));
    for (int r = 0; r < config_.ranks(); r++) {
        const size_t count = length(cuts, r);
        std::copy_n(share_.shown(r) + gated_at(plan, is_shared, r) + at * count, count, scratch.row.data() + cuts[r]);
    }
    return scratch.row.data();
}

// The same for its last product.
void Experts::quantize(const Place& of, Plan& plan, const Block& block, int thread) {
    const Bunch& bunch = plan.bunches[block.bunch];
    const Group& group = of.layer.experts[bunch.expert].down;
    const Layout layout = block.layout;
    Room& room = plan.rooms[bunch.is_shared];
    Scratch& scratch = products_.scratch(thread);
    const int first = bunch.begin + block.begin;
    for (int at = first; at < first + block.count; at++) {
        const Token token{gated_row(plan, bunch.is_shared, at, scratch), at,
                          room.generated[at] != 0 ? Origin::generated : Origin::prompt};
        group.prepare(kernels_, token, layout, room.middle, scratch);
    }
    if (layout == Layout::packed) group.pack(kernels_, first / kLanes, room.middle, scratch);
}

// Inside the last phase.
const Experts::Plan& Experts::quantized_plan_of(const Place& of, int thread) {
    Plan& plan = plan_of(of, thread);
    Own& own = own_[thread];
    if (!is_alone(of) || (own.middle_run == of.run.id && own.middle_layer == &of.layer)) return plan;
    own.middle_run = of.run.id;
    own.middle_layer = &of.layer;
    for (const Block& block : plan.blocks) quantize(of, plan, block, thread);
    return plan;
}

void Experts::down_chunk(const Place& of, int chunk, int thread) {
    const Plan& plan = quantized_plan_of(of, thread);
    if (config_.experts.is_whole()) return show_chunk(of, plan, chunk, thread);
    const int tokens = of.run.batch.tokens, rows = down_rows(tokens), n = chunk * rows;
    const size_t ld = own_outputs(false);
    const int count = std::min(rows, static_cast<int>(ld) - n);
    float* sums = (config_.is_shared() ? share_.part() : sums_.data()) + n;
    for (int t = 0; t < tokens; t++) std::fill_n(sums + t * ld, count, 0.0f);
    for (size_t i = 0; i < plan.bunches.size(); i++) {
        if (i + 1 < plan.bunches.size()) {
            const Linear& next = of.layer.experts[plan.bunches[i + 1].expert].down.linears.front();
            next.prefetch(n, count, count % 4 == 0 ? 4 : 1, kAskedBytes);
        }
        add_bunch(of, plan, plan.bunches[i], n, count, sums, thread);
    }
    for (int t = 0; t < tokens; t++) finish_sums(of, t, n, count, sums + t * ld, !config_.is_shared());
}

// Outputs [n, n + count) of a bunch: calls take(group, piece, source).
template <typename Take>
void Experts::each_product(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, Take take) const {
    Group& group = of.layer.experts[bunch.expert].down;
    group.linears.front().prepare_new(kernels_, n, count);
    const Room& room = plan.rooms[bunch.is_shared];
    by_pieces(bunch.count, n, count, [&](int first, int rows, int t, int end, Layout layout) {
        const Piece piece{0, first, rows, bunch.begin + t, bunch.begin + end};
        take(group, piece, Source{room.middle, layout, room.generated.data() + piece.t0});
    });
}

// `sums`: of the first token's outputs from n on.
void Experts::add_bunch(const Place& of, const Plan& plan, const Bunch& bunch, int n, int count, float* sums,
                        int thread) {
    const Room& room = plan.rooms[bunch.is_shared];
    const size_t ld = own_outputs(false);
    Scratch& scratch = products_.scratch(thread);
    float* y = scratch.second.data();
    each_product(of, plan, bunch, n, count, [&](const Group& group, const Piece& piece, const Source& from) {
        const size_t width = piece.count;
        group.multiply(kernels_, piece, from, {y, width, false}, scratch);
        for (int at = piece.t0; at < piece.t1; at++) {
            float* sum = sums + room.tokens[at] * ld + (piece.begin - n);
            kernels_.add_times(sum, y + (at - piece.t0) * width, room.weights[at], piece.count);
        }
    });
}

// Of a token's outputs [n, n + count): what is added to x, and that sum.
void Experts::finish_sums(const Place& of, int t, int n, int count, float* sums, bool adds) const {
    const float multiplier = config_.switches.residual_multiplier;
    if (multiplier != 1) kernels_.scale_heads(sums, count, multiplier, nullptr, nullptr, sums);
    if (adds) kernels_.add(of.x + static_cast<size_t>(t) * config_.hidden + n, sums, count);
}

// Between ranks.

// Of whole experts: the outputs of the shared one, of which this rank has some, and of this rank's pairs.
void Experts::show_chunk(const Place& of, const Plan& plan, int chunk, int thread) {
    const int tokens = of.run.batch.tokens, rows = down_rows(tokens);
    const int first = has_shared() ? down_units(true, tokens) : 0;
    const bool is_shared = chunk < first;
    const int n = (is_shared ? chunk : chunk - first) * rows;
    const size_t ld = own_outputs(is_shared);
    const int count = std::min(rows, static_cast<int>(ld) - n), begin = is_shared ? 0 : plan.firsts[config_.rank];
    float* to = share_.part() + (is_shared ? 0 : pairs_at(tokens));
    for (const Bunch& bunch : plan.bunches) {
        if (bunch.is_shared != is_shared || !has(bunch.expert)) continue;
        each_product(of, plan, bunch, n, count, [&](const Group& group, const Piece& piece, const Source& from) {
            float* out = to + (piece.t0 - begin) * ld + piece.begin;
            group.multiply(kernels_, piece, from, {out, ld, false}, products_.scratch(thread));
        });
    }
}

bool Experts::take_shown(Pool::Walk& walk, const Place& of) {
    const int tokens = of.run.batch.tokens;
    if (!config_.experts.is_whole()) {
        return share_.take_outputs(walk, of.run, {of.x, static_cast<size_t>(config_.hidden), true});
    }
    const auto numbers = [&] {
        const std::vector<int>& firsts = plan_of(of, walk.thread()).firsts;
        return pairs_at(tokens) + static_cast<size_t>(share_.widest(firsts)) * config_.hidden;
    };
    return share_.show_numbers(walk, of.run, numbers) &&
           walk.phase(tokens, [&](int t) { add_shown(of, t, walk.thread()); });
}

void Experts::add_shown(const Place& of, int t, int thread) {
    const Plan& plan = plan_of(of, thread);
    const std::vector<int>& owners = config_.experts.owners;
    const int most = config_.experts.per_token, width = config_.hidden;
    float* sums = sums_.data() + static_cast<size_t>(t) * width;
    std::fill_n(sums, width, 0.0f);
    for (int i = t * most; i < (t + 1) * most; i++) {
        const Choice choice = plan.choices[i];
        const auto after = std::upper_bound(owners.begin(), owners.end(), choice.expert);
        const int r = static_cast<int>(after - owners.begin()) - 1;
        const size_t row = plan.places[i] - plan.firsts[r];
        kernels_.add_times(sums, share_.shown(r) + pairs_at(of.run.batch.tokens) + row * width, choice.weight, width);
    }
    if (has_shared()) {
        share_.each_part(config_.hidden_cuts, t, [&](size_t at, const float* from, size_t count) {
            kernels_.add_times(sums + at, from, plan.shared[t], static_cast<int>(count));
        });
    }
    finish_sums(of, t, 0, width, sums, true);
}

}  // namespace eightfold
