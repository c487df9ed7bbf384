#include "selections.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {
namespace {

constexpr size_t word_bits = 64;

size_t words_for(int64_t n_tokens) {
    return (static_cast<size_t>(n_tokens) + word_bits - 1) / word_bits;
}

// [n_rows, from] -> [n_rows, to], to > from.
std::vector<uint64_t> widened(const std::vector<uint64_t> & bits, size_t from, size_t to) {
    const size_t n_rows = from == 0 ? 0 : bits.size() / from;
    std::vector<uint64_t> wide(n_rows * to, 0);
    for (size_t r = 0; r < n_rows; r++) {
        std::copy_n(bits.data() + r * from, from, wide.data() + r * to);
    }
    return wide;
}

} // namespace

void Selections::resize(int32_t n_slots) {
    layers_ = std::vector<Layer>(layers_.size()); // `assign` would keep their memory
    size_ = std::max(n_slots, 0);
}

void Selections::grow(int32_t n_slots) {
    size_ = std::max(size_, n_slots);
}

void Selections::keep_last() {
    if (size_ <= 1) {
        return;
    }
    for (int32_t il = 0; il < n_layer(); il++) {
        const Line last = line(size_ - 1, il);
        Layer kept;
        kept.n_words = last.size;
        kept.bits.assign(last.begin, last.begin + last.size);
        auto & layer = layers_[static_cast<size_t>(il)];
        const auto influence = layer.influence.find(size_ - 1);
        if (influence != layer.influence.end()) {
            kept.influence.emplace(0, std::move(influence->second));
        }
        layer = std::move(kept);
    }
    size_ = 1;
}

size_t Selections::n_bytes() const {
    size_t n = sizeof(*this) + layers_.capacity() * sizeof(Layer);
    for (const Layer & layer : layers_) {
        n += layer.bits.capacity() * sizeof(uint64_t);
        for (const auto & entry : layer.influence) {
            n += sizeof(entry) + entry.second.capacity() * sizeof(float);
        }
    }
    return n;
}

std::vector<int32_t> Selections::tokens(int32_t slot, int32_t il) const {
    const Line bits = line(slot, il);
    std::vector<int32_t> tokens;
    for (size_t w = 0; w < bits.size; w++) {
        for (size_t b = 0; b < word_bits && bits.begin[w] >> b != 0; b++) {
            if ((bits.begin[w] >> b & 1) != 0) {
                tokens.push_back(static_cast<int32_t>(w * word_bits + b));
            }
        }
    }
    return tokens;
}

void Selections::set_tokens(int32_t slot, int32_t il, const std::vector<int32_t> & tokens,
                            int32_t n_tokens) {
    check(slot, il);
    int64_t needed = n_tokens;
    for (const int32_t token : tokens) {
        if (token < 0) {
            throw std::invalid_argument("image token " + std::to_string(token) +
                                        " does not exist: they are counted from 0");
        }
        needed = std::max(needed, int64_t{token} + 1);
    }
    Layer & layer = layers_[static_cast<size_t>(il)];
    if (layer.n_words < words_for(needed)) {
        layer.bits = widened(layer.bits, layer.n_words, words_for(needed));
        layer.n_words = words_for(needed);
    }
    const size_t all = static_cast<size_t>(size_) * layer.n_words;
    const size_t begin = static_cast<size_t>(slot) * layer.n_words;
    if (layer.bits.size() < begin + layer.n_words) {
        layer.bits.reserve(all); // no more than that, as `resize` alone might
        layer.bits.resize(all, 0);
    }
    std::fill_n(layer.bits.begin() + static_cast<std::ptrdiff_t>(begin), layer.n_words, 0);
    for (const int32_t token : tokens) {
        const auto t = static_cast<size_t>(token);
        layer.bits[begin + t / word_bits] |= uint64_t{1} << (t % word_bits);
    }
}

bool Selections::empty(int32_t slot, int32_t il) const {
    const Line bits = line(slot, il);
    return std::all_of(bits.begin, bits.begin + bits.size, [](uint64_t word) { return word == 0; });
}

bool Selections::same(int32_t slot, int32_t il, int32_t other_il) const {
    Line a = line(slot, il);
    Line b = line(slot, other_il);
    if (a.size > b.size) {
        std::swap(a, b);
    }
    return std::equal(a.begin, a.begin + a.size, b.begin) &&
           std::all_of(b.begin + a.size, b.begin + b.size, [](uint64_t word) { return word == 0; });
}

const std::vector<float> & Selections::influence(int32_t slot, int32_t il) const {
    static const std::vector<float> none;
    check(slot, il);
    const auto & kept = layers_[static_cast<size_t>(il)].influence;
    const auto it = kept.find(slot);
    return it == kept.end() ? none : it->second;
}

void Selections::set_influence(int32_t slot, int32_t il, std::vector<float> influence) {
    check(slot, il);
    layers_[static_cast<size_t>(il)].influence[slot] = std::move(influence);
}

Selections::Line Selections::line(int32_t slot, int32_t il) const {
    check(slot, il);
    const Layer & layer = layers_[static_cast<size_t>(il)];
    const size_t begin = static_cast<size_t>(slot) * layer.n_words;
    const bool held = begin < layer.bits.size();
    return {held ? layer.bits.data() + begin : nullptr, held ? layer.n_words : 0};
}

void Selections::check(int32_t slot, int32_t il) const {
    if (slot < 0 || slot >= size_) {
        throw std::out_of_range("slot " + std::to_string(slot) + " of " + std::to_string(size_));
    }
    if (il < 0 || il >= n_layer()) {
        throw std::out_of_range("layer " + std::to_string(il) + " of " + std::to_string(n_layer()));
    }
}

} // namespace cmg
