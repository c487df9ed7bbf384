// What rows of the original branch attend to among the image tokens, in numbers: what heat maps are
// drawn from.
//
// Of a row that is recorded, every layer named keeps the attention on each image token of the
// prompt, the mean over the heads. Slots are rows, counted from 0; each holds n_layers *
// n_image_tokens floats, and is there from when it is first written. Each session has one of its
// own, which must not be looked at from another thread during a decode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cmg {

class Recording {
  public:
    // layers: those that are recorded. Throws std::invalid_argument where one is below 0 or named
    // twice, or n_image_tokens is below 0.
    Recording(std::vector<int32_t> layers, int32_t n_image_tokens);

    const std::vector<int32_t> & layers() const { return layers_; }
    int32_t n_image_tokens() const { return n_image_tokens_; }
    // Slots up to the last that was written.
    int32_t size() const;
    bool holds(int32_t il) const { return place_of(il) < layers_.size(); }

    // weights: [n_image_tokens] of one row in layer `il`. Throws std::out_of_range for a layer that
    // is not recorded or a slot below 0, std::invalid_argument for another number of weights.
    void set(int32_t slot, int32_t il, const std::vector<float> & weights);
    // [size, n_layers, n_image_tokens]; NaN where nothing was written.
    const std::vector<float> & weights() const { return weights_; }

  private:
    size_t place_of(int32_t il) const;
    size_t slot_size() const { return layers_.size() * static_cast<size_t>(n_image_tokens_); }

    std::vector<int32_t> layers_;
    int32_t n_image_tokens_;
    std::vector<float> weights_;
};

} // namespace cmg
