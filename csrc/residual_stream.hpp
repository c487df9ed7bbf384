// How far each layer turns the residual stream of a batch's last row: for the cosine layer policy.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace cmg {

class ResidualStream {
  public:
    // n_layer: 0 = nothing is read in the decode to come.
    void begin(int32_t n_layer);
    // Whether `read` needs the node, and so a boundary behind it: the stream before layer 0 is what
    // its first norm reads; after layer il it is l_out-<il>.
    bool reads(const ggml_tensor * node) const;
    void read(const ggml_tensor * node);

    // [n_layer] cosine similarity of the row before and after each layer.
    const std::vector<double> & cosines() const { return cosines_; }
    // After a decode: std::runtime_error if the graph did not show the stream at every layer.
    void check() const;

  private:
    std::vector<float> row_; // after the layer that was read last
    std::vector<double> cosines_;
};

} // namespace cmg
