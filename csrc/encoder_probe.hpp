// What stands between mtmd and the image encoder's graph: the mends, and a probe that looks at what
// the encoder is given and computes nothing of it.
//
// How a picture is scaled, padded, cut and cropped before its tokens are made is nowhere to be
// read: it differs by the kind of projector and by the version of llama.cpp. It is seen at the
// graph's input. While a probe is set, the pixels are copied when the first node that reads them is
// asked about, and every split of the graph is left behind its first node. What the encoder then
// gives is void.
#pragma once

#include "encoder_mend.hpp"

#include "ggml.h"

#include <array>
#include <cstdint>
#include <exception>
#include <vector>

namespace cmg {

class EncoderProbe {
  public:
    // mend: asked about the nodes of every graph that is not probed; null = none are mended. Kept
    // by the caller, for longer than this.
    explicit EncoderProbe(EncoderMend * mend) : mend_(mend) {}
    EncoderProbe(const EncoderProbe &) = delete;
    EncoderProbe & operator=(const EncoderProbe &) = delete;

    // The next graph is probed.
    void begin();
    // Later ones are not, whether it was or not.
    void end() { is_probing_ = false; }
    // Of the graph probed last: [n, n_channels, height, width] with the sizes {width, height,
    // n_channels, n}, as the encoder is given them. Throws what went wrong, and std::runtime_error
    // if no node of the graph reads pixels.
    const std::vector<float> & pixels() const;
    const std::array<int64_t, GGML_MAX_DIMS> & shape() const { return shape_; }

    // ggml_backend_sched_eval_callback, with the address of an EncoderProbe.
    static bool callback(ggml_tensor * node, bool ask, void * self);

  private:
    bool probe(const ggml_tensor * node);

    EncoderMend * mend_;
    bool is_probing_ = false;
    std::vector<float> pixels_;
    std::array<int64_t, GGML_MAX_DIMS> shape_{};
    std::exception_ptr parked_;
};

} // namespace cmg
