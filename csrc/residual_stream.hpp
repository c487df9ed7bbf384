// How far each layer turns the residual stream of a row: for the cosine layer policy.
//
// Read for the last row of every part that asks for it, each on its own.
#pragma once

#include "plan.hpp"
#include "transfers.hpp"

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace cmg {

class ResidualStream {
  public:
    // transfers: kept by the caller, for longer than this.
    ResidualStream(int32_t n_layer, Transfers & transfers)
        : n_layer_(n_layer), transfers_(transfers) {}

    // Before a decode (one micro-batch) with this plan.
    void begin(const Plan & plan);
    // The node is about to run.
    void asked(const ggml_tensor * node);
    // Whether `read` needs the node, and so a boundary behind it: the stream before layer 0 is what
    // its first norm reads; after layer il it is l_out-<il>.
    bool reads(const ggml_tensor * node) const;
    void read(const ggml_tensor * node);
    // After a decode: gives the parts' selections their cosines. std::runtime_error, and none is
    // given, if the graph did not show the stream at every layer.
    void end();
    // After any other.
    void abandon() { rows_.clear(); }

  private:
    struct Read {
        int64_t row; // of the batch
        std::shared_ptr<Selections> selections;
        std::vector<float> values;   // of the row, after the layer that was read last
        std::vector<double> cosines; // [n_layer]
    };

    int64_t place_of(int64_t row, const ggml_tensor * stream, int32_t il) const;

    int32_t n_layer_;
    Transfers & transfers_;
    int64_t n_rows_ = 0;
    ForkPlan fork_;
    std::vector<Read> rows_;
    std::vector<int32_t> kept_; // rows of the batch that the last layer goes on with
    bool entered_ = false;      // the stream before layer 0 was seen
};

} // namespace cmg
