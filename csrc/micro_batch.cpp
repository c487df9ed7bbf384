#include "micro_batch.hpp"

#include "attention_node.hpp"

#include <algorithm>
#include <iterator>
#include <string>

namespace cmg {
namespace {

bool in_any(const std::vector<char> & layers) {
    return std::any_of(layers.begin(), layers.end(), [](char flag) { return flag != 0; });
}

} // namespace

void MicroBatch::reset() {
    first_ = 0;
    n_rows_ = 0;
    observed_.clear();
    recorded_.clear();
    masked_.clear();
    copies_.clear();
}

void MicroBatch::next(int64_t n_rows) {
    const int64_t first = n_seen();
    reset();
    first_ = first;
    n_rows_ = n_rows;
    for (int32_t r = 0; r < n_rows; r++) {
        if (row(r).observe >= 0 && in_any(part(r).observe_layers)) {
            observed_.push_back(r);
        }
        if (row(r).mask >= 0 && in_any(part(r).mask_layers)) {
            masked_.push_back(r);
        }
    }
    for (size_t part = 0; part < plan_.parts.size(); part++) {
        const int64_t r = plan_.recorded_row(part) - first_;
        if (r >= 0 && r < n_rows_) {
            recorded_.push_back(static_cast<int32_t>(r));
        }
    }
}

const Row & MicroBatch::row(int32_t r) const {
    static const Row nothing;
    const auto i = static_cast<size_t>(first_ + r);
    return i < plan_.rows.size() ? plan_.rows[i] : nothing;
}

std::vector<int32_t> MicroBatch::observed(int32_t il) const {
    std::vector<int32_t> rows;
    std::copy_if(observed_.begin(), observed_.end(), std::back_inserter(rows),
                 [&](int32_t r) { return part(r).observes(il); });
    return rows;
}

std::vector<int32_t> MicroBatch::recorded(int32_t il) const {
    std::vector<int32_t> rows;
    std::copy_if(recorded_.begin(), recorded_.end(), std::back_inserter(rows),
                 [&](int32_t r) { return part(r).records(il); });
    return rows;
}

std::vector<int32_t> MicroBatch::masked(int32_t il) const {
    std::vector<int32_t> rows;
    std::copy_if(masked_.begin(), masked_.end(), std::back_inserter(rows),
                 [&](int32_t r) { return part(r).masks(il); });
    return rows;
}

const std::vector<uint8_t> & MicroBatch::host_copy(int32_t il, const ggml_tensor * input) {
    if (is_computed(input)) {
        throw layer_error(il, std::string(input->name) +
                                  " is computed in the graph, where an input is expected; this "
                                  "model's graph is not understood");
    }
    auto & bytes = copies_[input];
    if (bytes.empty()) {
        bytes = transfers_.read_all(input);
    }
    return bytes;
}

} // namespace cmg
