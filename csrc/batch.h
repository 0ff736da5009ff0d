// What a step computes on.
//
// Letters: T tokens of all sequences, S sequences, V vocabulary.
#pragma once

#include <cstdint>

#include "linears.h"

namespace eightfold {

constexpr float kMostMargin = 2;  // of a choice: beyond it is certain enough, and finding it takes time

// Prompts and generated tokens of several sequences, in any mix. Pointers need to last for the call.
struct Batch {
    int tokens = 0, sequences = 0, table_width = 0, logit_rows = 0;
    const int32_t* token_ids = nullptr;     // (T)
    const int32_t* positions = nullptr;     // (T), rising by one inside a sequence
    const uint8_t* generated = nullptr;     // (T): not part of a prompt
    const int32_t* starts = nullptr;        // (S + 1): tokens of sequence s are starts[s] .. starts[s + 1] - 1
    const int32_t* tables = nullptr;        // (S, table_width): pages of each sequence
    const int32_t* logit_tokens = nullptr;  // (R): tokens whose logits are wanted
    float* logits = nullptr;                // (R, V)
    int32_t* best = nullptr;                // (R) the likeliest token of each
    int choice_rows = 0;
    const int32_t* choice_tokens = nullptr;  // (C): tokens of which only the likeliest next one is wanted
    int32_t* choices = nullptr;              // (C)
    // (C) by how much each one's logit exceeds the next lower one's, kMostMargin at most; nullptr: not wanted.
    float* margins = nullptr;
    bool float_prompts = false;  // a prompt's tokens attend over the fresh keys and values, not over int8 ones

    Origin origin(int t) const { return generated[t] != 0 ? Origin::generated : Origin::prompt; }
    const int32_t* table(int sequence) const { return tables + static_cast<size_t>(sequence) * table_width; }
};

// A step as its threads see it. It lives in a slot of the pool's; see there.
struct Run {
    Batch batch;
    uint64_t id = 0;     // another for every step, from 1 on
    bool alone = false;  // every thread prepares the few input rows for itself
};

}  // namespace eightfold
