// Observing: what rows of the original branch attend to among the image tokens, what the policy
// picks from it, and the record of it that heat maps are drawn from.
//
// Flash attention writes its weights nowhere, so they are computed again from q and K. Those must
// have been computed when the attention node is asked about: a boundary behind the layer's write
// into its K cache sees to that, and each costs one synchronisation of the backend.
#pragma once

#include "attention_node.hpp"
#include "attention_weights.hpp"
#include "ledger.hpp"
#include "micro_batch.hpp"
#include "transfers.hpp"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cmg {

class Observation {
  public:
    // ledger, transfers: kept by the caller, for longer than this. n_threads: for the rows'
    // attention.
    Observation(const Ledger & ledger, int32_t n_threads, Transfers & transfers)
        : ledger_(ledger), weights_(n_threads, transfers) {}

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
    // Why K of a device was brought to the host; "" = it never was.
    const std::string & host_reason() const { return weights_.host_reason(); }

  private:
    // What a row attends to. Image tokens whose cells the node reads, and those cells.
    struct Seen {
        size_t n_tokens; // of the sequence, with those that have no cell
        const std::vector<int32_t> & tokens;
        const std::vector<int32_t> & cells;
        const float * mask;    // [n_kv] of the row
        const float * weights; // [cells.size()] of the row
    };

    void check_readable(const AttentionNode & attention) const;
    void observe_rows(const AttentionNode & attention, MicroBatch & batch,
                      const std::vector<int32_t> & rows);
    void select(int32_t il, const Part & part, const Row & row, const Seen & seen) const;
    void record(int32_t il, const Part & part, const Seen & seen) const;

    const Ledger & ledger_;
    AttentionWeights weights_;
    int32_t readable_layer_ = -1;            // layer whose q and K are computed
    std::vector<const ggml_tensor *> asked_; // nodes asked since the last boundary
    int64_t n_boundaries_ = 0;
};

} // namespace cmg
