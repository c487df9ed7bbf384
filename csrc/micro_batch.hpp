// The rows that are in the graph now: llama.cpp cuts a batch into micro-batches, one graph each.
#pragma once

#include "plan.hpp"
#include "transfers.hpp"

#include "ggml.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace cmg {

class MicroBatch {
  public:
    // plan: of the batch, looked at whenever a micro-batch begins. Rows that it does not name are
    // `Row{}`; without a decode to plan it names none.
    MicroBatch(const Plan & plan, Transfers & transfers) : plan_(plan), transfers_(transfers) {}

    // Before the batch's first micro-batch, and behind its last.
    void reset();
    // The next n_rows rows of the batch.
    void next(int64_t n_rows);

    const Plan & plan() const { return plan_; }
    int64_t n_rows() const { return n_rows_; }
    // Rows of the batch so far, with those of this micro-batch.
    int64_t n_seen() const { return first_ + n_rows_; }
    // r: 0 to n_rows - 1, as in all lists below.
    const Row & row(int32_t r) const;
    // Of a row that is not plain.
    const Part & part(int32_t r) const { return plan_.part(row(r)); }
    // Rows that are observed, or masked, in any layer.
    const std::vector<int32_t> & observed() const { return observed_; }
    const std::vector<int32_t> & masked() const { return masked_; }
    // Rows whose attention is looked at in any layer: observed, or recorded.
    bool watches() const { return !observed_.empty() || !recorded_.empty(); }
    // Those of them whose parts observe, record or mask layer `il`.
    std::vector<int32_t> observed(int32_t il) const;
    std::vector<int32_t> recorded(int32_t il) const;
    std::vector<int32_t> masked(int32_t il) const;
    // The bytes of an input of the graph that layer `il` reads, read once. Throws if it is none,
    // but computed in the graph: it may not be there yet.
    const std::vector<uint8_t> & host_copy(int32_t il, const ggml_tensor * input);

  private:
    const Plan & plan_;
    Transfers & transfers_;
    int64_t first_ = 0; // row of the batch that comes first here
    int64_t n_rows_ = 0;
    std::vector<int32_t> observed_;
    std::vector<int32_t> recorded_;
    std::vector<int32_t> masked_;
    std::unordered_map<const ggml_tensor *, std::vector<uint8_t>> copies_;
};

} // namespace cmg
