// A decoder's shape and weights, or those of the share of it that a process holds.
//
// Letters: E hidden size, F intermediate size, H query heads, G key/value heads, D head_dim, V vocabulary.
#pragma once

#include <vector>

#include "cache.h"
#include "linears.h"

namespace eightfold {

// What some families do and Llama does not.
struct Switches {
    Activation activation = Activation::silu;
    bool interleaved = false;  // rotary pairs are neighbours, not as far apart as half of what is turned
    // What hidden states are multiplied by as they come from the embedding, what attention and MLP give before it is
    // added to them, and logits.
    float embedding_multiplier = 1, residual_multiplier = 1, logits_multiplier = 1;
    float score_multiplier = 0;  // of queries and keys; 0: 1 / sqrt(D)
    float attention_softcap = 0, logits_softcap = 0;  // x becomes cap tanh(x / cap); 0: it stays
};

struct ModelConfig {
    int layers = 0, hidden = 0, intermediate = 0, vocab = 0;
    Shape shape;
    float eps = 0;
    bool symmetric_tokens = false;  // how dynamic linears quantize a token
    std::vector<float> inv_freq;  // up to (D / 2): of the channels of a head that are turned, the first ones
    std::vector<int> vocab_cuts;  // (ranks + 1): rank r holds the tokens from vocab_cuts[r] on
    std::vector<int> intermediate_cuts, hidden_cuts;  // likewise
    Switches switches;

    int ranks() const { return static_cast<int>(vocab_cuts.size()) - 1; }
    bool is_shared() const { return ranks() > 1; }
};

struct Layer {
    Group qkv, o, gate_up, down;
    std::vector<float> input_gain, input_bias, post_gain, post_bias;  // (E) or empty: of what qkv and gate_up read
    std::vector<float> o_gain, o_bias, down_gain, down_bias;  // likewise: of what these give, before it is added
};

struct Weights {
    std::vector<Layer> layers;
    std::vector<AttentionParams> attention;  // of each layer
    Group head;
    std::vector<float> final_gain, final_bias;  // (E); the bias may be empty
    Linear embedding;  // floating, (V, E)
};

}  // namespace eightfold
