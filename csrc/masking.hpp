// Masking: attention nodes are given masks in which chosen rows do not see chosen image tokens.
//
// A mask of ours has the type and shape of the graph's and lies in the same kind of buffer. Graphs
// are reused between decodes, so it stays in the node until it is put back: every attention node
// is restored, and then perhaps masked, each time it is asked about.
//
// Within a micro-batch a mask follows from four things: the graph's own mask, the rows, the tokens
// that each of them hides (none, where its part does not mask the layer), and the cells that these
// lie in. The rows are the same for all layers, so layers in which the other three are the same for
// every row share one mask of ours: it is filled and uploaded once. Behind a sliding window the
// graph has a second mask, and the tokens have other cells.
#pragma once

#include "attention_node.hpp"
#include "ledger.hpp"
#include "micro_batch.hpp"
#include "stand_in.hpp"

#include "ggml.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace cmg {

class Masking {
  public:
    // ledger: kept by the caller, for longer than this.
    explicit Masking(const Ledger & ledger) : ledger_(ledger) {}

    // Gives the node, and what was found of it, the graph's own mask.
    void restore(ggml_tensor * node, AttentionNode & attention);
    // Gives the node a mask of ours if a row of the micro-batch hides anything in its layer, by
    // what its slot holds now. Throws std::runtime_error if a slot names a token that its part's
    // prompt does not have, or if the graph's mask is not understood.
    void mask(ggml_tensor * node, const AttentionNode & attention, MicroBatch & batch);
    // The masks that were made so far serve no layer of the micro-batch to come.
    void begin_micro_batch();

    // Masks filled and uploaded since construction.
    int64_t n_masks() const { return n_masks_; }

  private:
    // The mask that was made for a layer of this micro-batch, and what it was made from.
    struct Made {
        int32_t il;
        int32_t cache_il;
        const ggml_tensor * original;
        ggml_tensor * ours;
    };

    ggml_tensor * find_made(const AttentionNode & attention, const MicroBatch & batch) const;
    ggml_tensor * make(const AttentionNode & attention, MicroBatch & batch);
    bool hides_same(const Made & made, const AttentionNode & attention, const MicroBatch & batch,
                    int32_t r) const;
    void hide_cells(const AttentionNode & attention, const MicroBatch & batch, int32_t r,
                    std::vector<uint8_t> & mask) const;

    const Ledger & ledger_;
    std::unordered_map<int32_t, StandIn> masks_; // by the layer they were made for
    std::vector<Made> made_;
    int64_t n_masks_ = 0;
    struct Swap {
        ggml_tensor * original;
        const ggml_tensor * ours;
    };
    std::unordered_map<const ggml_tensor *, Swap> swaps_; // attention nodes whose mask is ours
};

} // namespace cmg
