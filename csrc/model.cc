#include "model.h"

#include <algorithm>
#include <cmath>

namespace eightfold {

namespace {

constexpr int kPhasesOfLayer = 10, kOtherPhases = 4;

// Up to so many tokens, each thread prepares the inputs of products itself: a phase of its own would take longer.
constexpr int kAloneTokens = 2;

}  // namespace

Model::Model(ModelConfig config, const Kernels& kernels, int threads)
    : layers(config.layers),
      attention(config.layers),
      config_(std::move(config)),
      kernels_(kernels),
      pool_(threads, config_.layers * kPhasesOfLayer + kOtherPhases),
      scratch_(threads) {}

int Model::finish() {
    std::vector<Linear*> linears;
    size_t forms = 1;
    const auto take = [&](Group& group, const std::vector<float>* gain, const std::vector<float>* bias, bool paired) {
        group.normalizes = gain != nullptr;
        group.gain = gain != nullptr ? gain->data() : nullptr;
        group.norm_bias = bias != nullptr && !bias->empty() ? bias->data() : nullptr;
        group.eps = config_.eps;
        group.find_forms();
        group.cut(threads(), paired);
        forms = std::max(forms, group.forms.size());
        for (Linear& linear : group.linears) linears.push_back(&linear);
    };
    for (Layer& layer : layers) {
        take(layer.qkv, &layer.input_gain, &layer.input_bias, false);
        take(layer.o, nullptr, nullptr, false);
        take(layer.gate_up, &layer.post_gain, &layer.post_bias, true);
        take(layer.down, nullptr, nullptr, false);
    }
    take(head, &final_gain, &final_bias, false);
    prepared_.resize(forms);
    for (Scratch& scratch : scratch_) scratch.prepared.resize(forms);

    // Weight sums, in pieces of rows, by all threads: this also brings the file into memory.
    struct Job {
        std::vector<std::pair<Linear*, int>> pieces;
        const Kernels& kernels;
        std::atomic<int> damaged;
    } job{{}, kernels_, -1};
    constexpr int rows = 256;
    if (embedding.weight != head.linears.front().weight) linears.push_back(&embedding);
    for (Linear* linear : linears)
        for (int n = 0; n < linear->outputs; n += rows) job.pieces.emplace_back(linear, n);
    pool_.next_slot();
    pool_.run(
        [](void* context, Pool::Walk& walk) {
            Job& job = *static_cast<Job*>(context);
            (void)walk.phase(static_cast<int>(job.pieces.size()), [&](int i) {
                auto [linear, n] = job.pieces[i];
                if (!linear->prepare(job.kernels, n, std::min(n + rows, linear->outputs))) job.damaged = linear->ordinal;
            });
        },
        &job);
    pool_.quiesce();
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
    add(head);
    return total;
}

std::vector<Model::Unit> Model::plan_units(const Batch& batch) const {
    const int per_kv = config_.shape.queries_per_kv();
    const int heads = std::min(per_kv, kMaxAttnRows), tile_tokens = std::max(1, kMaxAttnRows / per_kv);
    std::vector<Unit> tiles;
    for (int s = 0; s < batch.sequences; s++) {
        for (int t = batch.starts[s], next; t < batch.starts[s + 1]; t = next) {
            int tokens = 1;
            while (tokens < tile_tokens && t + tokens < batch.starts[s + 1] &&
                   (!batch.float_prompts || batch.generated[t + tokens] == batch.generated[t])) {
                tokens++;
            }
            next = t + tokens;
            const int end = batch.positions[next - 1] + 1;
            for (int g = 0; g < config_.shape.kv_heads; g++)
                for (int h = 0; h < per_kv; h += heads) {
                    const int tile = static_cast<int>(tiles.size());
                    tiles.push_back({s, t, tokens, g * per_kv + h, std::min(heads, per_kv - h), g, 0, end, tile, 0, 1});
                }
        }
    }
    if (static_cast<int>(tiles.size()) >= 8 * threads()) return tiles;
    std::vector<Unit> units;  // long contexts in parts, so that all threads have something to do
    for (Unit tile : tiles) {
        const int end = tile.end;
        tile.parts = (end + kSplit - 1) / kSplit;
        for (tile.part = 0; tile.part < tile.parts; tile.part++) {
            tile.begin = tile.part * kSplit;
            tile.end = std::min(end, tile.begin + kSplit);
            units.push_back(tile);
        }
    }
    return units;
}

void Model::reserve(const Batch& batch, const std::vector<Unit>& units) {
    const Shape& shape = config_.shape;
    const int tokens = std::max(batch.tokens, batch.logit_rows);
    if (tokens > capacity_) {
        pool_.quiesce();
        capacity_ = tokens;
        const size_t n = static_cast<size_t>(tokens), heads = n * shape.heads;
        sequence_of_.resize(n);
        x_.resize(n * config_.hidden);
        qkv_.resize(n * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
        heads_.resize(heads * shape.head_dim);
        act_.resize(n * config_.intermediate);
        cos_.resize(n * shape.head_dim / 2);
        sin_.resize(n * shape.head_dim / 2);
        q8_.resize(heads * 2 * shape.query_dim());
        q_sum_.resize(heads * 2);
        q_scale_.resize(heads);
        qf_.resize(heads * shape.query_dim());
        const int widest = std::max({config_.hidden, config_.intermediate, shape.heads * shape.head_dim});
        for (Prepared& prepared : prepared_) {
            prepared.reserve(tokens, widest);
            prepared.real.resize(n * widest);
        }
    }
    if (batch.float_prompts) {
        int pages = 0;
        fresh_page_.resize(batch.sequences);
        for (int s = 0; s < batch.sequences; s++) {
            fresh_page_[s] = pages;
            pages += batch.positions[batch.starts[s + 1] - 1] / kPage + 1;
        }
        if (fresh_ == nullptr || fresh_->pages() < pages) {
            pool_.quiesce();
            fresh_ = std::make_unique<Cache>(shape, fresh_params_, pages);
        }
    }
    int tiles = 0, parts = 1;
    for (const Unit& unit : units) {
        tiles = std::max(tiles, unit.tile + 1);
        parts = std::max(parts, unit.parts);
    }
    partial_stride_ = static_cast<size_t>(kMaxAttnRows) * (2 + shape.value_dim());
    if (parts > 1 && partial_.size() < units.size() * partial_stride_) {
        pool_.quiesce();
        partial_.resize(units.size() * partial_stride_);
    }
    if (tiles > tiles_) {
        pool_.quiesce();
        tiles_ = tiles;
        parts_done_ = std::make_unique<std::atomic<int>[]>(tiles);
    }
}

void Model::forward(const Batch& batch) {
    const std::vector<Unit> units = plan_units(batch);
    reserve(batch, units);  // may take a slot
    Step& step = steps_[pool_.next_slot()];
    step.batch = batch;
    step.alone = batch.tokens <= kAloneTokens;
    step.single = batch.tokens == batch.sequences && !batch.float_prompts &&
                  config_.shape.queries_per_kv() <= kMaxAttnRows;
    step.units = units;
    step.id = ++step_count_;
    for (int s = 0; s < batch.sequences; s++) {
        std::fill(sequence_of_.begin() + batch.starts[s], sequence_of_.begin() + batch.starts[s + 1], s);
    }
    for (int i = 0; i < tiles_; i++) parts_done_[i].store(0, std::memory_order_relaxed);
    pool_.run(program, this);
}

}  // namespace eightfold
