#include "model.h"

#include <algorithm>
#include <cmath>

namespace eightfold {

namespace {

constexpr int kPhasesOfLayer = 10, kOtherPhases = 7;

// And where several ranks meet: two for every meeting.
constexpr int kMeetingsOfLayer = 5, kOtherMeetings = 3;

int most_phases(const ModelConfig& config) {
    const int alone = config.layers * kPhasesOfLayer + kOtherPhases;
    return config.ranks() == 1 ? alone : alone + 2 * (config.layers * kMeetingsOfLayer + kOtherMeetings);
}

// Up to so many tokens, each thread prepares the inputs of products itself: a phase of its own would take longer.
constexpr int kAloneTokens = 2;

// Units of attention for each thread, and runs of kSplit positions of one unit at most.
constexpr int kTurns = 8, kMostRun = 8;

// Units of one token each that a thread takes at a time: it asks for the next one's keys while it computes one.
constexpr int kMostTurn = 8;

}  // namespace

Model::Model(ModelConfig config, const Kernels& kernels, int threads)
    : layers(config.layers),
      attention(config.layers),
      config_(std::move(config)),
      kernels_(kernels),
      pool_(threads, most_phases(config_)),
      scratch_(threads) {
    for (int r = 0; r <= config_.ranks(); r++) {
        head_cuts_.push_back(r * config_.shape.heads * config_.shape.head_dim);
    }
}

int Model::finish(bool forgets_head) {
    std::vector<Linear*> linears;
    size_t forms = 1;
    const auto take = [&](Group& group, const std::vector<float>* gain, const std::vector<float>* bias, bool paired) {
        group.gain = gain != nullptr ? gain->data() : nullptr;
        group.norm_bias = bias != nullptr && !bias->empty() ? bias->data() : nullptr;
        group.eps = config_.eps;
        group.find_forms();
        group.cut(threads(), paired);
        forms = std::max(forms, group.forms.size());
        if (group.has_floating()) real_width_ = std::max(real_width_, group.inputs());
        for (Linear& linear : group.linears) linears.push_back(&linear);
    };
    for (Layer& layer : layers) {
        take(layer.qkv, &layer.input_gain, &layer.input_bias, false);
        take(layer.o, nullptr, nullptr, false);
        take(layer.gate_up, &layer.post_gain, &layer.post_bias, true);
        take(layer.down, nullptr, nullptr, false);
        for (Group* group : {&layer.o, &layer.down}) {
            Linear& linear = group->linears.front();
            linear.keeps_sums = is_shared() && linear.kind != LinearKind::floating;
            has_ranges_ |= needs_ranges(*group);
            widest_part_ = std::max({widest_part_, part_width(linear), static_cast<size_t>(linear.inputs)});
            if (linear.kind == LinearKind::floating) gathered_width_ = std::max(gathered_width_, linear.inputs);
        }
    }
    take(head, &final_gain, &final_bias, false);
    make_shadow();
    forms = std::max(forms, shadow_.forms.size());
    prepared_.resize(forms);
    for (Scratch& scratch : scratch_) scratch.prepared.resize(forms);

    // Weight sums, in pieces of rows, by all threads: this also brings the file into memory.
    struct Job {
        std::vector<std::pair<Linear*, int>> pieces;
        Model& model;
        bool forgets_head;
        std::atomic<int> damaged;
        int first, count;  // of a run's pieces
    } job{{}, *this, forgets_head, -1, 0, 0};
    constexpr int rows = 256, pieces_of_run = 32;  // as long as it is left alone
    if (embedding.weight != head.linears.front().weight) linears.push_back(&embedding);
    for (Linear* linear : linears)
        for (int n = 0; n < linear->outputs; n += rows) job.pieces.emplace_back(linear, n);
    const int all = static_cast<int>(job.pieces.size());
    for (; job.first < all; job.first += job.count) {
        const bool alone = left_alone_;
        job.count = alone ? std::min(pieces_of_run, all - job.first) : all - job.first;
        pool_.next_slot();
        pool_.run(
            [](void* context, Pool::Walk& walk) {
                Job& job = *static_cast<Job*>(context);
                (void)walk.phase(job.count, [&](int i) {
                    if (job.model.is_abandoned_) return;
                    auto [linear, n] = job.pieces[job.first + i];
                    const int end = std::min(n + rows, linear->outputs);
                    if (!linear->prepare(job.model.kernels_, n, end)) job.damaged = linear->ordinal;
                    if (linear == &job.model.head.linears.front()) job.model.shadow_rows(n, end, job.forgets_head);
                });
            },
            &job, alone);
        pool_.quiesce();  // of a run's arguments there is one place
    }
    return job.damaged;
}

void Model::allocate_cache(int pages) {
    pool_.quiesce();
    cache_.reset();
    cache_ = std::make_unique<Cache>(config_.shape, attention, pages);
}

size_t Model::page_bytes() const {
    size_t total = 0;
    for (const AttentionParams& layer : attention) total += Cache::page_bytes(config_.shape, layer.kind);
    return total;
}

size_t Model::weight_bytes() const {
    size_t total = 0;
    const auto add = [&](const Group& group) {
        for (const Linear& linear : group.linears) total += linear.weight_bytes();
    };
    for (const Layer& layer : layers)
        for (const Group* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) add(*group);
    if (shadow_.linears.empty()) add(head);
    else total += shadow_.linears.front().weight_bytes();
    return total;
}

void Model::plan_units(const Batch& batch) {
    const int per_kv = config_.shape.queries_per_kv();
    const int heads = std::min(per_kv, kMaxAttnRows), tile_tokens = std::max(1, kMaxAttnRows / per_kv);
    units_.clear();
    for (int s = 0; s < batch.sequences; s++) {
        for (int t = batch.starts[s], next; t < batch.starts[s + 1]; t = next) {
            next = t + 1;
            while (next < std::min(t + tile_tokens, batch.starts[s + 1]) &&
                   (!batch.float_prompts || batch.generated[next] == batch.generated[t])) {
                next++;
            }
            const int end = batch.positions[next - 1] + 1;
            for (int g = 0; g < config_.shape.kv_heads; g++)
                for (int h = 0; h < per_kv; h += heads) {
                    const int tile = static_cast<int>(units_.size());
                    units_.push_back(
                        {s, t, next - t, g * per_kv + h, std::min(heads, per_kv - h), g, 0, end, tile, 1, 0, 0, 0, 0});
                }
        }
    }
    slots_ = 0;
    const int tiles = static_cast<int>(units_.size());
    if (tiles >= kTurns * threads()) return;
    // Few tiles: their contexts in parts, so that all threads have something to do, but no more than they like: within a
    // unit the next page is on its way while one is computed.
    int total = 0, size = 0;
    for (Unit& unit : units_) total += unit.parts = chunk_count(unit.end, kSplit);
    const int run = std::clamp(total / (kTurns * threads()), 1, kMostRun) * kSplit;
    for (const Unit& unit : units_) size += chunk_count(unit.end, run);
    slots_ = total;
    units_.resize(size);
    for (int i = tiles - 1; i >= 0; i--) {
        const Unit tile = units_[i];
        total -= tile.parts;
        for (int part = chunk_count(tile.end, run) - 1; part >= 0; part--) {
            Unit& unit = units_[--size] = tile;
            unit.begin = part * run;
            unit.end = std::min(tile.end, unit.begin + run);
            unit.slot = total + unit.begin / kSplit;
        }
    }
}

void Model::find_pages(const Batch& batch) {
    for (Unit& unit : units_) {
        const int32_t* table = batch.tables + static_cast<size_t>(unit.sequence) * batch.table_width;
        unit.position = batch.positions[unit.first_token];
        unit.first_page = table[unit.begin / kPage];
        unit.last_page = table[unit.position / kPage];
    }
}

void Model::reserve_tokens(int tokens) {
    if (tokens <= capacity_) return;
    pool_.quiesce();
    capacity_ = tokens;
    const Shape& shape = config_.shape;
    const size_t n = static_cast<size_t>(tokens), heads = n * shape.heads;
    sequence_of_.resize(n);
    x_.resize(n * config_.hidden);
    qkv_.resize(n * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    heads_.resize(heads * shape.head_dim);
    act_.resize(n * config_.intermediate);
    if (is_shared()) gathered_.resize(n * gathered_width_);
    cos_.resize(n * shape.head_dim / 2);
    sin_.resize(n * shape.head_dim / 2);
    q8_.resize(heads * 2 * shape.query_dim());
    q_sum_.resize(heads * 2);
    q_scale_.resize(heads);
    qf_.resize(heads * shape.query_dim());
    const int widest = std::max({config_.hidden, config_.intermediate, shape.heads * shape.head_dim});
    handed_[0].reserve(tokens, widest, false);
    for (Prepared& prepared : prepared_) {
        prepared.reserve(tokens, real_width_, true);
        prepared.reserve(tokens, widest, false);
    }
}

void Model::reserve_choices(int rows) {
    const size_t size = static_cast<size_t>(rows) * config_.vocab;
    if (choice_logits_.size() >= size) return;
    pool_.quiesce();
    choice_logits_.resize(size);
}

// Room for the fresh keys and values of whole prompts.
void Model::reserve_prompts(const Batch& batch) {
    int pages = 0;
    fresh_page_.resize(batch.sequences);
    for (int s = 0; s < batch.sequences; s++) {
        fresh_page_[s] = pages;
        pages += batch.positions[batch.starts[s + 1] - 1] / kPage + 1;
    }
    if (fresh_ != nullptr && fresh_->pages() >= pages) return;
    pool_.quiesce();
    fresh_ = std::make_unique<Cache>(config_.shape, fresh_params_, pages);
}

void Model::reserve_units() {
    const int tiles = units_.empty() ? 0 : units_.back().tile + 1;
    partial_stride_ = static_cast<size_t>(kMaxAttnRows) * (2 + config_.shape.value_dim());
    if (partial_.size() < slots_ * partial_stride_) {
        pool_.quiesce();
        partial_.resize(slots_ * partial_stride_);
    }
    if (tiles > tiles_) {
        pool_.quiesce();
        tiles_ = tiles;
        parts_done_ = std::make_unique<std::atomic<int>[]>(tiles);
    }
}

void Model::forward(const Batch& batch) {
    plan_units(batch);
    find_pages(batch);
    reserve_tokens(std::max({batch.tokens, batch.logit_rows, batch.choice_rows}));
    if (shadow_.linears.empty()) reserve_choices(batch.choice_rows);
    if (batch.float_prompts) reserve_prompts(batch);
    reserve_units();
    if (is_shared()) reserve_parts(batch);
    Step& step = steps_[pool_.next_slot()];  // last: to reserve may take a slot
    step.batch = batch;
    step.alone = batch.tokens <= kAloneTokens && !has_ranges_;
    step.single =
        batch.tokens == batch.sequences && !batch.float_prompts && config_.shape.queries_per_kv() <= kMaxAttnRows;
    const int units = static_cast<int>(units_.size());
    step.turn = step.single && slots_ == 0 ? std::clamp(units / (kTurns * threads()), 1, kMostTurn) : 1;
    step.units.swap(units_);
    step.id = ++step_count_;
    for (int s = 0; s < batch.sequences; s++) {
        std::fill(sequence_of_.begin() + batch.starts[s], sequence_of_.begin() + batch.starts[s + 1], s);
    }
    for (int i = 0; i < tiles_; i++) parts_done_[i].store(0, std::memory_order_relaxed);
    pool_.run(program, this);
    if (failed_.load() == step_count_) std::rethrow_exception(failure_);
}

}  // namespace eightfold
