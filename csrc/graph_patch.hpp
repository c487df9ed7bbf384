// The graph patch: per-layer, per-row attention masks in llama.cpp's graph, and what they are made
// of.
//
// `llama_context_params.cb_eval` is called for every node before anything of that node runs. While
// it is asked about an attention node, the patch may point that node's mask at a tensor of its own,
// of the same type and shape and in the same kind of buffer, in which chosen rows do not see chosen
// image tokens. The library is unmodified; the kernels, flash attention or not, are the library's.
//
//     node                          what the patch does when asked
//     SET_ROWS into cache_k_l<il>   notes the KV cells of image rows (the ledger), and without a
//                                   plan forgets those that others take; asks for a boundary if a
//                                   row of this layer is observed, so that q and K are there when
//                                   the attention node is asked
//     FLASH_ATTN_EXT, SOFT_MAX      observes rows (influence -> token policy -> slot), then builds
//                                   the layer's mask from the slots and swaps it in
//     l_out-<il>                    reads one row of the residual stream (cosine layer policy)
//     all nodes, in a fork          see fork.hpp
//
// Graphs are reused between decodes, so a swapped mask stays until it is put back: every attention
// node is either patched or restored each time it is asked.
#pragma once

#include "attention_node.hpp"
#include "fork.hpp"
#include "ledger.hpp"
#include "mask_tensor.hpp"
#include "policy.hpp"
#include "selections.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace cmg {

// What one row of a batch is to the patch. The default: nothing.
struct Row {
    int32_t seq = 0;          // sequence whose image tokens are meant
    int32_t image_token = -1; // number of the image token that this row is; -1 = text
    int32_t observe = -1;     // slot that this row's selection is written to
    int32_t mask = -1;        // slot whose tokens this row may not see
};

// What a decode is to do, set before `llama_decode` and dropped after it.
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

class GraphPatch {
  public:
    // n_threads: for the observed rows' attention.
    GraphPatch(int32_t n_layer, std::shared_ptr<Selections> selections, int32_t n_threads);
    GraphPatch(const GraphPatch &) = delete;
    GraphPatch & operator=(const GraphPatch &) = delete;

    // For llama_context_params. The patch must outlive the context.
    static bool callback(ggml_tensor * node, bool ask, void * self);

    void begin(Plan plan);
    // Drops the plan after a decode that succeeded. Rethrows what went wrong inside the callback:
    // nothing may be thrown through ggml, so errors are parked, the rest of that decode runs
    // unpatched and its result is void. Throws if the graph had other rows than the plan.
    void end();
    // Drops the plan after a decode that failed.
    void abandon();

    Ledger & ledger() { return ledger_; }
    const Fork & fork() const { return fork_; }
    Selections & selections() { return *selections_; }
    // [n_layer] cosine similarity of the residual row before and after each layer, last plan.
    const std::vector<double> & cosines() const { return cosines_; }
    // Boundaries for observing since construction: each costs one synchronisation of the backend.
    int64_t n_boundaries() const { return n_boundaries_; }

  private:
    bool ask(ggml_tensor * node);
    ggml_tensor * restored_mask(const ggml_tensor * node, ggml_tensor * current);
    void computed(ggml_tensor * node);
    bool ask_set_rows(ggml_tensor * node);
    bool is_residual(const ggml_tensor * node) const;
    void read_residual(const ggml_tensor * node);
    void enter_layer(int32_t il, int64_t n_rows);
    void check_layers_attended(const Plan & plan) const;
    void record_cells(const ggml_tensor * node, int32_t il);
    void observe(const AttentionNode & attention);
    void select(const AttentionNode & attention, const Row & row, const float * mask,
                const float * weights);
    ggml_tensor * patched_mask(const AttentionNode & attention);
    bool hide_cells(const AttentionNode & attention, int32_t ubatch_row,
                    std::vector<uint8_t> & mask);
    const Row & batch_row(int32_t ubatch_row) const;
    const std::vector<uint8_t> & host_copy(const ggml_tensor * t);

    int32_t n_layer_;
    int32_t n_threads_;
    std::shared_ptr<Selections> selections_;
    Ledger ledger_;
    Fork fork_;
    Plan plan_;
    bool active_ = false; // a plan is set and nothing has gone wrong in it
    std::exception_ptr parked_;

    // Where we are within the decode.
    int64_t ubatch_begin_ = 0;               // batch row of the micro-batch's first row
    int64_t ubatch_rows_ = 0;                // rows of the current micro-batch
    std::vector<int32_t> observed_;          // its rows that are observed
    std::vector<int32_t> masked_;            // its rows that are masked
    std::vector<char> unattended_;           // [n_layer] K written, attention not asked yet
    int32_t written_layer_ = -1;             // layer whose K was written last
    int32_t attention_layer_ = -1;           // layer whose attention was asked last
    int32_t readable_layer_ = -1;            // layer whose q and K are computed
    std::vector<const ggml_tensor *> asked_; // nodes asked since the last boundary
    std::unordered_map<const ggml_tensor *, std::vector<uint8_t>> copies_; // of this micro-batch
    std::vector<float> residual_;
    std::vector<double> cosines_;
    int64_t n_boundaries_ = 0;

    std::unordered_map<int32_t, MaskTensor> masks_; // by layer
    struct Swap {
        ggml_tensor * original;
        const ggml_tensor * ours;
    };
    std::unordered_map<const ggml_tensor *, Swap> swaps_; // attention nodes whose mask is ours
};

} // namespace cmg
