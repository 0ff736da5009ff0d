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

// A layer's networks of which every token goes through a few.
struct ExpertConfig {
    int count = 0, per_token = 0;  // 0: every layer is dense
    int size = 0, shared_size = 0;  // intermediate sizes of an expert, and of what all tokens go through; 0: nothing
    bool normalizes = false;  // the weights of a token's experts, to a sum of 1
    // (ranks + 1) each: where each rank's channels begin, and its experts. Without the last, which are optional, a rank
    // has some channels and some outputs of all experts; with them all of its own, and of the shared one as before.
    std::vector<int> size_cuts, shared_cuts, owners;

    bool is_whole() const { return owners.size() > 2; }  // one rank has all anyway
    // Whether a rank has weights of an expert; the shared one's number is `count`.
    bool has(int rank, int expert) const {
        return owners.empty() || expert == count || (expert >= owners[rank] && expert < owners[rank + 1]);
    }
};

struct ModelConfig {
    int layers = 0, hidden = 0, intermediate = 0, vocab = 0;
    Shape shape;
    float eps = 0;
    bool symmetric_tokens = false;  // how dynamic linears quantize a token
    std::vector<float> inv_freq;  // up to (D / 2): of the channels of a head that are turned, the first ones
    int rank = 0;
    std::vector<int> vocab_cuts;  // (ranks + 1): rank r holds the tokens from vocab_cuts[r] on
    std::vector<int> intermediate_cuts, hidden_cuts;  // likewise
    Switches switches;
    ExpertConfig experts;

    int ranks() const { return static_cast<int>(vocab_cuts.size()) - 1; }
    bool is_shared() const { return ranks() > 1; }
};

struct Expert {
    Group gate_up, down;
    bool is_asked = false;  // its weights for, when it was first chosen
};

struct Layer {
    Group qkv, o, gate_up, down;
    // Of a sparse layer, instead of gate_up and down:
    Group router;  // floating: a row for each expert, then the gate of the shared one
    std::vector<Expert> experts;  // then the shared one, if there is one
    bool reads_static = false;  // some of them quantize their input with scales of their own
    bool is_sparse() const { return !experts.empty(); }

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
