// On which device each layer of a model lies, asked of the memory of its weights and its KV cache.
//
// For a context of its own that is thrown away afterwards: of the one decode that it sees, nothing
// is computed.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

namespace cmg {

class LayerPlaces {
  public:
    explicit LayerPlaces(int32_t n_layer)
        : weights_(static_cast<size_t>(n_layer)), caches_(static_cast<size_t>(n_layer)) {}

    // ggml_backend_sched_eval_callback, with the address of a LayerPlaces.
    static bool callback(ggml_tensor * node, bool ask, void * self);

    // Names of devices by layer; "CPU" for the host's memory, "" where none was seen.
    const std::vector<std::string> & weights() const { return weights_; }
    const std::vector<std::string> & caches() const { return caches_; }

  private:
    void ask(ggml_tensor * node);

    std::vector<std::string> weights_;
    std::vector<std::string> caches_;
};

} // namespace cmg
