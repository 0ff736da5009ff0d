// A decoder's shape and weights, or those of the share of it that a process holds.
//
// Letters: E hidden size, F intermediate size, H query heads, G key/value heads, D head_dim, V vocabulary.
#pragma once

#include <vector>

#include "cache.h"
#include "linears.h"

namespace eightfold {

struct ModelConfig {
    int layers = 0, hidden = 0, intermediate = 0, vocab = 0;
    Shape shape;
    float eps = 0;
    bool symmetric_tokens = false;  // how dynamic linears quantize a token
    std::vector<float> inv_freq;    // (D / 2)
    std::vector<int> vocab_cuts;    // (ranks + 1): rank r holds the tokens from vocab_cuts[r] on
    std::vector<int> intermediate_cuts, hidden_cuts;  // likewise

    int ranks() const { return static_cast<int>(vocab_cuts.size()) - 1; }
    bool is_shared() const { return ranks() > 1; }
};

struct Layer {
    Group qkv, o, gate_up, down;
    std::vector<float> input_gain, input_bias, post_gain, post_bias;  // (E); biases may be empty
};

struct Weights {
    std::vector<Layer> layers;
    std::vector<AttentionParams> attention;  // of each layer
    Group head;
    std::vector<float> final_gain, final_bias;  // (E); the bias may be empty
    Linear embedding;                           // floating, (V, E)
};

}  // namespace eightfold
