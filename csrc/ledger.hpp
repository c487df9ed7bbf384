// Where each image token lies in the KV cache.
//
// Three indices, never mixed: an image token's number (0, 1, ... over all images of a sequence),
// its position (under M-RoPE not the same count), and its KV cell, which is the mask's column.
// Cells differ by layer where a model has two caches (sliding window).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace cmg {

class Ledger {
  public:
    explicit Ledger(int32_t n_layer) : n_layer_(n_layer), noted_(static_cast<size_t>(n_layer)) {}

    // `cell` of layer `il` is about to be written: no image token lies there any more. Cells come
    // free when a sequence ends, and behind a sliding window.
    void forget(int32_t il, int64_t cell) {
        auto & noted = noted_[static_cast<size_t>(il)];
        if (static_cast<size_t>(cell) >= noted.size() || noted[static_cast<size_t>(cell)] == 0) {
            return;
        }
        noted[static_cast<size_t>(cell)] = 0;
        for (auto & entry : cells_) {
            auto & cells = entry.second[static_cast<size_t>(il)];
            std::replace(cells.begin(), cells.end(), cell, int64_t{-1});
        }
    }

    // Notes that image token `token` of sequence `seq` was written to `cell` of layer `il`.
    void record(int32_t seq, int32_t il, int32_t token, int64_t cell) {
        auto & cells = layers_of(seq)[static_cast<size_t>(il)];
        if (cells.size() <= static_cast<size_t>(token)) {
            cells.resize(static_cast<size_t>(token) + 1, -1);
        }
        cells[static_cast<size_t>(token)] = cell;
        auto & noted = noted_[static_cast<size_t>(il)];
        noted.resize(std::max(noted.size(), static_cast<size_t>(cell) + 1), 0);
        noted[static_cast<size_t>(cell)] = 1;
    }

    // Cells of the image tokens of `seq` in layer `il`, by token number; -1 = not in this layer.
    const std::vector<int64_t> & cells(int32_t seq, int32_t il) const {
        static const std::vector<int64_t> none;
        const auto it = cells_.find(seq);
        return it == cells_.end() ? none : it->second[static_cast<size_t>(il)];
    }

    // `dst` shares the first n_tokens image tokens of `src`, and has no others.
    void copy(int32_t src, int32_t dst, int32_t n_tokens) {
        cells_[dst] = layers_of(src);
        truncate(dst, n_tokens);
    }

    // Forgets all image tokens of `seq` but the first n_tokens.
    void truncate(int32_t seq, int32_t n_tokens) {
        for (auto & cells : layers_of(seq)) {
            cells.resize(std::min(cells.size(), static_cast<size_t>(n_tokens)));
        }
    }

    void clear() { cells_.clear(); }

  private:
    using Layers = std::vector<std::vector<int64_t>>;

    Layers & layers_of(int32_t seq) {
        return cells_.try_emplace(seq, Layers(static_cast<size_t>(n_layer_))).first->second;
    }

    int32_t n_layer_;
    std::map<int32_t, Layers> cells_;
    std::vector<std::vector<char>> noted_; // [n_layer][cell]: 0 = no sequence names this cell
};

} // namespace cmg
