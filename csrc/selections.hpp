// What an observed row of the original branch chose: the message from one branch to the other.
//
// A slot holds, for every layer, the image tokens that the policy picked from one row's attention.
// A row of the degraded branch names the slot whose tokens it may not see. Both rows can be in the
// same batch (the slot is written and read within one forward), in two batches, or in two contexts.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cmg {

struct Slot {
    std::vector<std::vector<int32_t>> tokens;  // [n_layer][...] image token numbers, ascending
    std::vector<std::vector<float>> influence; // [n_layer][n_image_tokens], if it was kept
};

class Selections {
  public:
    explicit Selections(int32_t n_layer) : n_layer_(n_layer) {}

    // n_slots empty slots.
    void resize(int32_t n_slots) {
        size_ = 0;
        grow(n_slots);
    }

    // Adds empty slots behind those there are, up to n_slots.
    void grow(int32_t n_slots) {
        const auto n = static_cast<size_t>(n_layer_);
        for (; size_ < n_slots; size_++) {
            const auto i = static_cast<size_t>(size_);
            if (i == slots_.size()) {
                slots_.push_back(
                    {std::vector<std::vector<int32_t>>(n), std::vector<std::vector<float>>(n)});
            }
            for (size_t il = 0; il < n; il++) {
                slots_[i].tokens[il].clear();
                slots_[i].influence[il].clear();
            }
        }
    }

    // Drops all slots but the last, which becomes slot 0.
    void keep_last() {
        if (size_ > 1) {
            std::swap(slots_.front(), slots_[static_cast<size_t>(size_ - 1)]);
            size_ = 1;
        }
    }

    int32_t size() const { return size_; }
    int32_t n_layer() const { return n_layer_; }

    Slot & at(int32_t slot) {
        if (slot < 0 || slot >= size()) {
            throw std::out_of_range("slot " + std::to_string(slot) + " of " +
                                    std::to_string(size()));
        }
        return slots_[static_cast<size_t>(slot)];
    }

  private:
    int32_t n_layer_;
    int32_t size_ = 0;
    std::vector<Slot> slots_; // the first `size_` count; the others keep their memory
};

} // namespace cmg
