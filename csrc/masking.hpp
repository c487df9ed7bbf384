// Masking: attention nodes are given masks in which chosen rows do not see chosen image tokens.
//
// A mask of ours has the type and shape of the graph's and lies in the same kind of buffer. Graphs
// are reused between decodes, so it stays in the node until it is put back: every attention node
// is restored, and then perhaps masked, each time it is asked about.
#pragma once

#include "attention_node.hpp"
#include "ledger.hpp"
#include "mask_tensor.hpp"
#include "micro_batch.hpp"
#include "selections.hpp"

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cmg {

class Masking {
  public:
    // ledger: kept by the caller, for longer than this.
    Masking(const Ledger & ledger, std::shared_ptr<Selections> selections)
        : ledger_(ledger), selections_(std::move(selections)) {}

    // Gives the node, and what was found of it, the graph's own mask.
    void restore(ggml_tensor * node, AttentionNode & attention);
    // Gives the node a mask of ours if a row of the micro-batch hides anything in its layer, by
    // what its slot holds now. Throws std::runtime_error if a slot names a token that the prompt
    // does not have, or if the graph's mask is not understood.
    void mask(ggml_tensor * node, const AttentionNode & attention, MicroBatch & batch);

  private:
    bool hides_any(const MicroBatch & batch, int32_t il) const;
    void hide_cells(const AttentionNode & attention, const MicroBatch & batch, int32_t r,
                    std::vector<uint8_t> & mask) const;

    const Ledger & ledger_;
    std::shared_ptr<Selections> selections_;
    std::unordered_map<int32_t, MaskTensor> masks_; // by layer
    struct Swap {
        ggml_tensor * original;
        const ggml_tensor * ours;
    };
    std::unordered_map<const ggml_tensor *, Swap> swaps_; // attention nodes whose mask is ours
};

} // namespace cmg
