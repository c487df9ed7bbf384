// Observing: what rows of the original branch attend to among the image tokens, what the policy
// picks from it, and the record of it that heat maps are drawn from.
//
// Flash attention writes its weights nowhere, so they are computed again from q and K. Those must
// have been computed when the attention node is asked about: a boundary behind the layer's write
// into its K cache sees to that, and each costs one synchronisation of the backend.
#pragma once

#include "attention_node.hpp"
#include "ledger.hpp"
#include "micro_batch.hpp"

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace cmg {

class Observation {
  public:
    // ledger: kept by the caller, for longer than this. n_threads: for the rows' attention.
    Observation(const Ledger & ledger, int32_t n_threads)
        : ledger_(ledger), n_threads_(n_threads) {}

    void begin_micro_batch() { readable_layer_ = -1; }
    // The node is about to run, behind all those asked about so far.
    void asked(const ggml_tensor * node, const MicroBatch & batch);
    // All nodes asked about have run.
    void reached_boundary() { asked_.clear(); }
    // They include the write of layer `il` into its K cache: the boundary that `wants` asked for.
    void reached_keys(int32_t il);
    // Whether rows are observed or recorded in this layer.
    bool wants(const MicroBatch & batch, int32_t il) const;
    // Writes what the observed rows pick in this layer, by their parts' policies, to their slots,
    // and what the recorded rows attend to into their parts' recordings. The node's mask must be
    // the graph's own. Throws std::runtime_error where q and K are not there.
    void observe(const AttentionNode & attention, MicroBatch & batch);

    // Boundaries since construction.
    int64_t n_boundaries() const { return n_boundaries_; }

  private:
    void check_readable(const AttentionNode & attention) const;
    void observe_rows(const AttentionNode & attention, MicroBatch & batch,
                      const std::vector<int32_t> & rows);
    void select(const AttentionNode & attention, const Part & part, const Row & row,
                const float * mask, const float * weights) const;
    void record(const AttentionNode & attention, const Part & part, const Row & row,
                const float * mask, const float * weights) const;

    const Ledger & ledger_;
    int32_t n_threads_;
    int32_t readable_layer_ = -1;            // layer whose q and K are computed
    std::vector<const ggml_tensor *> asked_; // nodes asked since the last boundary
    int64_t n_boundaries_ = 0;
};

} // namespace cmg
