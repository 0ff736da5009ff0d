#include "model.h"

#include <algorithm>

namespace eightfold {

namespace {

constexpr int kPreparedRows = 256;
constexpr int kPiecesAlone = 32;  // of rows, on one thread, before it is asked again whether it is left alone

}  // namespace

Model::Model(ModelConfig config, const Kernels& kernels, int threads)
    : config_(std::move(config)),
      kernels_(kernels),
      pool_(threads, Step::phases(config_)),
      share_(config_, kernels_, pool_),
      products_(config_, kernels_, pool_, share_),
      attention_(config_, weights.attention, kernels_, pool_, products_, share_),
      experts_(config_, weights.layers, kernels_, pool_, products_, share_),
      head_(config_, weights.head, kernels_, pool_, products_, share_),
      step_(config_, weights, kernels_, pool_, {share_, products_, attention_, experts_, head_}) {
    weights.layers.resize(config_.layers);
    weights.attention.resize(config_.layers);
}

// Returns the linears of all groups.
std::vector<Linear*> Model::take_groups() {
    std::vector<Linear*> linears;
    const auto take = [&](Group& group) {
        products_.take(group);
        for (Linear& linear : group.linears) linears.push_back(&linear);
    };
    const auto take_normed = [&](Group& group, const std::vector<float>& gain, const std::vector<float>& bias) {
        group.gain = gain.empty() ? nullptr : gain.data();
        group.norm_bias = bias.empty() ? nullptr : bias.data();
        take(group);
    };
    for (Layer& layer : weights.layers) {
        take_normed(layer.qkv, layer.input_gain, layer.input_bias);
        take(layer.o);
        share_.take(layer.o);
        if (layer.is_sparse()) {
            experts_.take(layer);
            take_normed(layer.router, layer.post_gain, layer.post_bias);
            continue;
        }
        layer.gate_up.cut = Cut::pairs;
        layer.gate_up.activation = config_.switches.activation;
        take_normed(layer.gate_up, layer.post_gain, layer.post_bias);
        take(layer.down);
        share_.take(layer.down);
    }
    take_normed(weights.head, weights.final_gain, weights.final_bias);
    head_.make_shadow();
    return linears;
}

int Model::finish(HeadPages pages) {
    std::vector<Linear*> linears = take_groups();
    Linear& embedding = weights.embedding;
    if (embedding.weight != weights.head.linears.front().weight) linears.push_back(&embedding);
    std::vector<Rows> all;
    for (Linear* linear : linears)
        for (int n = 0; n < linear->outputs; n += kPreparedRows) {
            all.push_back({linear, n, std::min(n + kPreparedRows, linear->outputs)});
        }
    return prepare(all, pages);
}

// In pieces of rows, by all threads: this also brings the file into memory.
int Model::prepare(const std::vector<Rows>& all, HeadPages pages) {
    struct Job {
        const std::vector<Rows>& all;
        Model& model;
        HeadPages pages;
        std::atomic<int> damaged;
        int first, count;  // of a run's pieces
    } job{all, *this, pages, -1, 0, 0};
    const auto program = [](void* context, Pool::Walk& walk) {
        Job& job = *static_cast<Job*>(context);
        (void)walk.phase(job.count, [&](int i) {
            if (job.model.is_abandoned_) return;
            const auto [linear, begin, end] = job.all[job.first + i];
            if (!linear->prepare(job.model.kernels_, begin, end)) job.damaged = linear->ordinal;
            if (linear == &job.model.weights.head.linears.front()) job.model.head_.shadow_rows(begin, end, job.pages);
        });
    };
    const int size = static_cast<int>(all.size());
    for (; job.first < size; job.first += job.count) {
        const bool alone = left_alone_;
        job.count = alone ? std::min(kPiecesAlone, size - job.first) : size - job.first;
        pool_.next_slot();
        pool_.run(program, &job, alone ? Pool::Crew::caller : Pool::Crew::all);
        pool_.quiesce();  // of a run's arguments there is one place
    }
    return job.damaged;
}

size_t Model::weight_bytes() const {
    size_t total = head_.weight_bytes();
    for (const Layer& layer : weights.layers) {
        for (const Group* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down, &layer.router}) {
            total += group->weight_bytes();
        }
        for (const Expert& expert : layer.experts) total += expert.gate_up.weight_bytes() + expert.down.weight_bytes();
    }
    return total;
}

}  // namespace eightfold
