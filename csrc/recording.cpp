#include "recording.hpp"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {

Recording::Recording(std::vector<int32_t> layers, int32_t n_image_tokens)
    : layers_(std::move(layers)), n_image_tokens_(n_image_tokens) {
    const std::set<int32_t> distinct(layers_.begin(), layers_.end());
    if (distinct.size() != layers_.size() || (!distinct.empty() && *distinct.begin() < 0)) {
        throw std::invalid_argument("layers are counted from 0, and each is named once");
    }
    if (n_image_tokens < 0) {
        throw std::invalid_argument(std::to_string(n_image_tokens) + " image tokens");
    }
}

int32_t Recording::size() const {
    return slot_size() == 0 ? 0 : static_cast<int32_t>(weights_.size() / slot_size());
}

void Recording::set(int32_t slot, int32_t il, const std::vector<float> & weights) {
    const size_t place = place_of(il);
    if (slot < 0 || place == layers_.size()) {
        throw std::out_of_range("slot " + std::to_string(slot) + ", layer " + std::to_string(il) +
                                " of a recording");
    }
    if (weights.size() != static_cast<size_t>(n_image_tokens_)) {
        throw std::invalid_argument(std::to_string(weights.size()) + " weights for " +
                                    std::to_string(n_image_tokens_) + " image tokens");
    }
    const size_t begin = static_cast<size_t>(slot) * slot_size();
    if (weights_.size() < begin + slot_size()) {
        weights_.resize(begin + slot_size(), std::numeric_limits<float>::quiet_NaN());
    }
    std::copy(weights.begin(), weights.end(),
              weights_.begin() + static_cast<std::ptrdiff_t>(begin + place * weights.size()));
}

size_t Recording::place_of(int32_t il) const {
    const auto found = std::find(layers_.begin(), layers_.end(), il);
    return static_cast<size_t>(found - layers_.begin());
}

} // namespace cmg
