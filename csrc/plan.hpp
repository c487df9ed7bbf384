// What a decode is to do besides computing: told by the engine, row by row of its batch.
//
// A batch holds rows of any number of sessions. What the rows of one session have in common is a
// part of the plan: its token policy, its layers, and where its slots are. So no session can see or
// change what is another's, and slots are numbered by each session for itself:
//
//     row    seq    part   image_token   observe   mask   residual
//     0      4       0         -1           7       -1       7       an original row of one session
//     1      9      -1         -1          -1       -1      -1       a plain answer's row
//     2      6       1         -1           0       -1      -1       an original row of another
//     3      7       1         -1          -1        0      -1       its degraded row
//     4      5       0         -1          -1        7       7       the first one's, in a fork
#pragma once

#include "policy.hpp"
#include "recording.hpp"
#include "residuals.hpp"
#include "selections.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace cmg {

// What one row of a batch is to the patch. The default: nothing, but whatever image token lay in
// the cell that it takes lies there no more.
struct Row {
    int32_t seq = 0;          // sequence whose image tokens are meant
    int32_t part = -1;        // the session it is of, by its place in Plan::parts; -1 = plain
    int32_t image_token = -1; // number of the image token that this row is; -1 = text
    int32_t observe = -1;     // slot that this row's selection is written to
    int32_t mask = -1;        // slot whose tokens this row may not see
    int32_t residual = -1;    // slot that a row below a fork writes to, and another reads from
};

// What the rows of one session share.
struct Part {
    std::shared_ptr<Selections> selections; // that `observe` and `mask` are slots of; never null
    TokenPolicy policy;
    int32_t n_image_tokens = 0;           // of the whole prompt; slots name tokens below it
    std::vector<char> observe_layers;     // [n_layer] where rows with a slot `observe` are observed
    std::vector<char> mask_layers;        // [n_layer] where rows with a slot `mask` are masked
    std::shared_ptr<Residuals> residuals; // that `residual` is a slot of; null = there are none
    bool keep_influence = false;          // keep the observed rows' influence in their slots
    bool read_residual = false;           // read the part's last row (one micro-batch) for cosines
    std::shared_ptr<Recording> recording; // that `record` is a slot of; null = there is none
    int32_t record = -1; // slot that the newest row of the original branch is recorded into: the
                         // part's last that hides nothing and enters no fork; -1 = it is not

    bool observes(int32_t il) const { return observe_layers[static_cast<size_t>(il)] != 0; }
    bool masks(int32_t il) const { return mask_layers[static_cast<size_t>(il)] != 0; }
    bool records(int32_t il) const { return record >= 0 && recording->holds(il); }
};

// Rows that are not computed below a layer (one micro-batch): see fork.hpp.
struct ForkPlan {
    int32_t layer = 0;   // first layer that all rows run through; 0 = no fork
    int32_t n_below = 0; // rows computed below it: the first of the batch
    bool survey = false; // learn the graph of a decode without a fork
};

// Set before `llama_decode` and dropped after it.
struct Plan {
    std::vector<Row> rows; // rows of the batch, over all its micro-batches
    std::vector<Part> parts;
    ForkPlan fork;

    // Of a row that is not plain.
    const Part & part(const Row & row) const { return parts[static_cast<size_t>(row.part)]; }
    bool forks() const { return fork.layer > 0; }
    bool enters(size_t row) const { return forks() && row >= static_cast<size_t>(fork.n_below); }
    // The row that a part records, -1 = none.
    int64_t recorded_row(size_t part) const;
};

// Throws std::invalid_argument if the plan is none: a row names a part that is not there, or asks
// for what its part or the fork cannot give.
void check_plan(const Plan & plan);

// Right before a decode with it. Throws std::invalid_argument if a part is not for n_layer layers,
// std::out_of_range if a slot is not there, or nothing was noted in it that a row could enter with.
void check_slots(const Plan & plan, int32_t n_layer);

} // namespace cmg
