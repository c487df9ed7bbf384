// A tensor of our own that stands in for an input of the graph: a mask, or positions.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace cmg {

class StandIn {
  public:
    StandIn() = default;
    ~StandIn();
    StandIn(const StandIn &) = delete;
    StandIn & operator=(const StandIn &) = delete;

    // Becomes a leaf of the type and shape of `original`, in a buffer of the same type, holding
    // `bytes`. The tensor's address stays the same; the buffer is reused while it fits.
    ggml_tensor * assign(const ggml_tensor * original, const std::vector<uint8_t> & bytes);
    // Frees a buffer that only a long prompt's mask needs. The tensor's address stays the same.
    void release_if_large();

  private:
    void release();

    ggml_tensor tensor_{};
    ggml_backend_buffer_t buffer_ = nullptr;
    size_t capacity_ = 0;
};

} // namespace cmg
