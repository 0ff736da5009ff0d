// A decoder, or the share of it that one of several processes holds: its weights, its cache and its threads. One
// forward() is the whole step of a flattened batch, prompts and generated tokens in any mix.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "batch.h"
#include "experts.h"
#include "head.h"
#include "pool.h"
#include "products.h"
#include "share.h"
#include "step.h"
#include "weights.h"

namespace eightfold {

class Model {
public:
    Model(ModelConfig config, const Kernels& kernels, int threads);
    ~Model() { pool_.quiesce(); }  // late threads still read their step

    Weights weights;  // filled in before finish()

    // Makes the weights ready. Returns -1, or the ordinal of one that is not finite.
    int finish(HeadPages pages);
    // While it is left alone, finish() computes on its caller's thread, and leaves the other cores to somebody else.
    void leave_alone(bool alone) { left_alone_ = alone; }
    // Lets finish() return soon, with a model that cannot be used.
    void abandon() { is_abandoned_ = true; }
    void set_exchange(std::unique_ptr<Exchange> exchange) { share_.set_exchange(std::move(exchange)); }
    void set_rope_scale(float scale) { attention_.set_rope_scale(scale); }
    // Of the layers whose attention says so.
    void set_local_rope(std::vector<float> inv_freq, float scale) {
        attention_.set_local_rope(std::move(inv_freq), scale);
    }
    bool has_local_rope() const { return attention_.ropes() > 1; }
    size_t rope_pairs() const { return config_.inv_freq.size(); }
    void set_switches(const Switches& switches) { config_.switches = switches; }
    void allocate_cache(int pages) { attention_.allocate_cache(pages); }
    bool populate_cache(int layer, int page) const { return attention_.populate_cache(layer, page); }
    void forward(const Batch& batch) { step_.run(batch); }

    bool is_joined() const { return share_.is_joined(); }
    int threads() const { return pool_.threads(); }
    int cache_pages() const { return attention_.cache_pages(); }
    size_t page_bytes() const { return attention_.page_bytes(); }  // of all layers
    size_t weight_bytes() const;                                   // that steps of greedy decoding read

private:
    struct Rows {  // of a linear, that are made ready at a time
        Linear* linear;
        int begin, end;
    };

    std::vector<Linear*> take_groups();
    int prepare(const std::vector<Rows>& all, HeadPages pages);

    ModelConfig config_;
    const Kernels& kernels_;
    std::atomic<bool> left_alone_{false}, is_abandoned_{false};
    Pool pool_;
    Share share_;
    Products products_;
    Attention attention_;
    Experts experts_;
    Head head_;
    Step step_;
};

}  // namespace eightfold
