// What a decode is to do besides computing: told by the engine, row by row of its batch.
#pragma once

#include "fork.hpp"
#include "policy.hpp"

#include <cstdint>
#include <vector>

namespace cmg {

// What one row of a batch is to the patch. The default: nothing.
struct Row {
    int32_t seq = 0;          // sequence whose image tokens are meant
    int32_t image_token = -1; // number of the image token that this row is; -1 = text
    int32_t observe = -1;     // slot that this row's selection is written to
    int32_t mask = -1;        // slot whose tokens this row may not see
};

// Set before `llama_decode` and dropped after it.
struct Plan {
    std::vector<Row> rows;            // rows of the batch, over all its micro-batches
    std::vector<char> observe_layers; // [n_layer]
    std::vector<char> mask_layers;    // [n_layer]
    TokenPolicy policy;
    int32_t n_image_tokens = 0;  // of the whole prompt; slots name tokens below it
    bool keep_influence = false; // keep the observed rows' influence in their slots
    bool read_residual = false;  // read the batch's last row (one micro-batch) for `cosines`
    ForkPlan fork;               // rows that are not computed below a layer (one micro-batch)
};

} // namespace cmg
