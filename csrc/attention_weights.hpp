// Attention weights of observed rows: where they are computed.
//
// Where K lies in the host's memory, here (influence.hpp). On a device, there
// (influence_graph.hpp): K stays, and the weights of the cells that are asked for come back.
#pragma once

#include "attention_node.hpp"
#include "influence_graph.hpp"
#include "transfers.hpp"

#include "ggml-backend.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cmg {

class AttentionWeights {
  public:
    // transfers: kept by the caller, for longer than this. n_threads: on the host.
    AttentionWeights(int32_t n_threads, Transfers & transfers)
        : n_threads_(n_threads), transfers_(transfers) {}

    // [rows.size(), cells.size()]: softmax(scale * q K^T + mask) of the given rows at the given
    // cells, averaged over heads. q and K must have been computed. rows: ascending. mask:
    // [rows.size(), n_kv] float32, in which each row sees a cell; cells: each in 0 to n_kv - 1.
    // Throws std::runtime_error where the device has no memory for it.
    std::vector<float> read(const AttentionNode & attention, const std::vector<int32_t> & rows,
                            const std::vector<float> & mask, const std::vector<int32_t> & cells);

    // Why K of a device was brought to the host; "" = it never was.
    const std::string & host_reason() const { return host_reason_; }

  private:
    std::vector<float> on_host(const AttentionNode & attention, const std::vector<int32_t> & rows,
                               const std::vector<float> & mask, const std::vector<int32_t> & cells);

    int32_t n_threads_;
    Transfers & transfers_;
    std::map<ggml_backend_dev_t, InfluenceGraph> graphs_;
    std::string host_reason_;
};

} // namespace cmg
