// The graph patch: per-layer, per-row attention masks in llama.cpp's graph, and what they are made
// of.
//
// `llama_context_params.cb_eval` is called for every node before anything of that node runs. While
// it is asked about an attention node, the patch may point that node's mask at a tensor of its own,
// in which chosen rows do not see chosen image tokens. The library is unmodified; the kernels,
// flash attention or not, are the library's. A batch may hold rows of many sessions (plan.hpp): all
// of the following is done row by row, by what the row's own part says. This file is the table of
// what is asked where:
//
//     node                          what the patch does when asked
//     SET_ROWS into cache_k_l<il>   notes the KV cells of image rows (ledger.hpp), and without a
//                                   plan forgets those that others take; asks for a boundary if a
//                                   row of this layer is observed, so that q and K are there when
//                                   the attention node is asked
//     FLASH_ATTN_EXT, SOFT_MAX      observes rows (observation.hpp: influence -> token policy ->
//                                   slot), then builds the layer's one mask from the slots of all
//                                   its rows and swaps it in (masking.hpp)
//     Qcur_pos-<il>                 asks for that boundary where layer il writes no K, but reads an
//                                   earlier layer's (Gemma 3n, Gemma 4 E2B and E4B)
//     l_out-<il>                    reads a row of the residual stream for each part that asks for
//                                   it (residual_stream.hpp)
//     all nodes, in a fork          see fork.hpp
#pragma once

#include "fork.hpp"
#include "ledger.hpp"
#include "masking.hpp"
#include "micro_batch.hpp"
#include "observation.hpp"
#include "plan.hpp"
#include "residual_stream.hpp"
#include "transfers.hpp"

#include "ggml.h"

#include <cstdint>
#include <exception>
#include <vector>

namespace cmg {

class GraphPatch {
  public:
    // n_threads: for the observed rows' attention.
    GraphPatch(int32_t n_layer, int32_t n_threads);
    GraphPatch(const GraphPatch &) = delete;
    GraphPatch & operator=(const GraphPatch &) = delete;

    // For llama_context_params. The patch must outlive the context.
    static bool callback(ggml_tensor * node, bool ask, void * self);

    // Throws std::runtime_error, once, if something went wrong in the callback since the last plan
    // was dropped: in a decode without one. Throws what `check_slots` and `Fork::check` throw where
    // the plan cannot be. No plan is set then.
    void begin(Plan plan);
    // Drops the plan after a decode that succeeded. Rethrows what went wrong inside the callback:
    // nothing may be thrown through ggml, so errors are parked, the rest of that decode runs
    // unpatched and its result is void. Throws if the graph had other rows than the plan, and if it
    // showed no attention of a layer in which a part masks or observes: some layers have none.
    void end();
    // Drops the plan after a decode that failed.
    void abandon();

    Ledger & ledger() { return ledger_; }
    const Fork & fork() const { return fork_; }
    const Observation & observation() const { return observation_; }
    const Masking & masking() const { return masking_; }
    const Transfers & transfers() const { return transfers_; }
    int32_t n_layer() const { return n_layer_; }
    // Layers whose attention was asked about in any decode so far, ascending.
    std::vector<int32_t> attended_layers() const;

  private:
    bool ask(ggml_tensor * node);
    void computed(ggml_tensor * node);
    bool ask_set_rows(ggml_tensor * node);
    int32_t sharing_layer(const ggml_tensor * node) const;
    void check_layer(const AttentionNode & attention) const;
    void enter_layer(int32_t il, int64_t n_rows);
    void check_layers_attended() const;
    void record_cells(const ggml_tensor * node, int32_t il);
    void park_error();
    void tell_parked_error();

    int32_t n_layer_;
    Plan plan_;
    Transfers transfers_;
    MicroBatch batch_{plan_, transfers_};
    Ledger ledger_;
    Fork fork_;
    Observation observation_;
    Masking masking_;
    ResidualStream stream_;
    bool active_ = false;       // a plan is set and nothing has gone wrong in it
    std::exception_ptr parked_; // the first error of the decode

    // Where we are within the micro-batch.
    std::vector<char> written_;             // [n_layer] K was written
    std::vector<char> attended_;            // [n_layer] attention was asked
    int32_t written_layer_;                 // layer whose K was written last
    int32_t attention_layer_ = -1;          // layer whose attention was asked last
    const ggml_tensor * product_ = nullptr; // K q that was asked about last, by its name

    std::vector<char> ever_attended_; // [n_layer] attention was asked in any decode
    std::vector<char> ever_written_;  // [n_layer] K was written in any decode
};

} // namespace cmg
