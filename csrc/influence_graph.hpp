// The attention weights of influence.hpp as a ggml graph, on the device that K lies on.
//
//     product = K q                            [n_kv, n_rows, n_head]
//     capped  = softcap * tanh(scale * product / softcap), where the node has a cap
//     weights = softmax(scale * product + mask), with the node's sinks
//     sums    = over heads                     [1, n_kv, n_rows]
//     rows of the cells asked for              [1, n_cells, n_rows]: all that comes back
//
// The device is in the middle of llama.cpp's graph then, so the graph runs on a backend of its own
// of that device, with memory of its own. K and q are read where they are: they must have been
// computed, and the other backend must have been waited for.
#pragma once

#include "attention_node.hpp"
#include "transfers.hpp"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cmg {

class InfluenceGraph {
  public:
    // n_threads: where the device is the CPU.
    InfluenceGraph(ggml_backend_dev_t device, int32_t n_threads)
        : device_(device), n_threads_(n_threads) {}

    // cells: not empty. Writes what AttentionWeights::read returns to `weights`, and returns "".
    // Where the device cannot compute it, returns why, and nothing has been done. Throws
    // std::runtime_error where it has no memory for it, or fails.
    std::string compute(const AttentionNode & attention, const std::vector<int32_t> & rows,
                        const std::vector<float> & mask, const std::vector<int32_t> & cells,
                        Transfers & transfers, std::vector<float> & weights);

  private:
    struct Graph;

    struct Free {
        void operator()(ggml_backend * backend) const;
        void operator()(ggml_gallocr * allocator) const;
    };

    // Which node of the graph the device cannot compute, or "".
    std::string unsupported(ggml_cgraph * graph) const;
    void prepare(const Graph & graph);

    ggml_backend_dev_t device_;
    int32_t n_threads_;
    std::unique_ptr<ggml_backend, Free> backend_; // made when it is first needed
    std::unique_ptr<ggml_gallocr, Free> allocator_;
    std::vector<uint8_t> nodes_; // memory of the graph's nodes
};

} // namespace cmg
