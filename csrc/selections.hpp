// What observed rows of the original branch chose: the message from one branch to the other, within
// one session.
//
// A slot holds, for every layer, the image tokens that the policy picked from one row's attention.
// A row of the degraded branch names the slot whose tokens it may not see. Both rows can be in the
// same batch (the slot is written and read within one forward), in two batches, or in two contexts.
//
// A long prompt has thousands of rows, so what they picked is kept as sets of bits: for each layer
// that is observed one [n_slots, n_words] matrix of 64 tokens a word, a layer without any picks
// takes nothing. 576 image tokens are 72 bytes a row and layer.
//
// Each session has one of its own, and numbers its slots from 0. A decode writes to those of all
// its sessions: none may be looked at or changed from another thread meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cmg {

class Selections {
  public:
    explicit Selections(int32_t n_layer) : layers_(static_cast<size_t>(n_layer)) {}

    // n_slots empty slots; the memory of those there were is freed.
    void resize(int32_t n_slots);
    // Adds empty slots behind those there are, up to n_slots.
    void grow(int32_t n_slots);
    // Drops all slots but the last, which becomes slot 0.
    void keep_last();

    int32_t size() const { return size_; }
    int32_t n_layer() const { return static_cast<int32_t>(layers_.size()); }
    // Memory that is held for all slots.
    size_t n_bytes() const;

    // All of these throw std::out_of_range for a slot or a layer that does not exist.
    //
    // Numbers of the image tokens that were picked, ascending.
    std::vector<int32_t> tokens(int32_t slot, int32_t il) const;
    // tokens: 0 or more each, in any order; else std::invalid_argument. n_tokens: that the prompt
    // has, so that there is room for all of them at once; 0 = not known.
    void set_tokens(int32_t slot, int32_t il, const std::vector<int32_t> & tokens,
                    int32_t n_tokens = 0);
    bool empty(int32_t slot, int32_t il) const;
    // Whether the slot's tokens in two layers are the same.
    bool same(int32_t slot, int32_t il, int32_t other_il) const;
    // [n_image_tokens] by token number, or empty if it was not kept.
    const std::vector<float> & influence(int32_t slot, int32_t il) const;
    void set_influence(int32_t slot, int32_t il, std::vector<float> influence);

    // [n_layer] cosine similarity of the residual row before and after each layer, of the row that
    // was read last (Part::read_residual); empty before.
    const std::vector<double> & cosines() const { return cosines_; }
    void set_cosines(std::vector<double> cosines) { cosines_ = std::move(cosines); }

  private:
    struct Layer {
        size_t n_words = 0;         // of a slot
        std::vector<uint64_t> bits; // [n_slots, n_words]; slots behind its end are empty
        std::unordered_map<int32_t, std::vector<float>> influence; // by slot
    };
    struct Line {
        const uint64_t * begin;
        size_t size;
    };

    Line line(int32_t slot, int32_t il) const;
    void check(int32_t slot, int32_t il) const;

    std::vector<Layer> layers_;
    std::vector<double> cosines_;
    int32_t size_ = 0;
};

} // namespace cmg
