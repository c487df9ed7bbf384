// What is copied from where a backend keeps its tensors to memory of ours, counted.
//
// On a device each copy waits for it; between host and host they cost little.
#pragma once

#include "api.hpp"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cmg {

class Transfers {
  public:
    void read(const ggml_tensor * t, void * to, size_t offset, size_t n_bytes) {
        api().ggml_backend_tensor_get(t, to, offset, n_bytes);
        n_bytes_ += static_cast<int64_t>(n_bytes);
    }
    // A view's own range.
    std::vector<uint8_t> read_all(const ggml_tensor * t) {
        std::vector<uint8_t> bytes(api().ggml_nbytes(t));
        read(t, bytes.data(), 0, bytes.size());
        return bytes;
    }

    // Bytes copied since construction.
    int64_t n_bytes() const { return n_bytes_; }

  private:
    int64_t n_bytes_ = 0;
};

} // namespace cmg
