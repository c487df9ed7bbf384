// Rows of the residual stream, noted between two layers: what a degraded row enters a fork with.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace cmg {

// One session's, by slot. A slot is written by a row of the original branch and read by the
// degraded row that is its copy, in the same decode or in a later one.
class Residuals {
  public:
    struct Row {
        int32_t layer = 0;         // layer that it is the input of
        std::vector<float> values; // [n_embd]
    };

    // Null where nothing was noted.
    const Row * find(int32_t slot) const {
        const auto it = rows_.find(slot);
        return it == rows_.end() ? nullptr : &it->second;
    }
    // Notes the input of `layer`; what the slot held is gone. Returns where its values go.
    std::vector<float> & note(int32_t slot, int32_t layer) {
        Row & row = rows_[slot];
        row.layer = layer;
        return row.values;
    }

  private:
    std::unordered_map<int32_t, Row> rows_;
};

} // namespace cmg
