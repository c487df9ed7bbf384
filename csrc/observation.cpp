#include "observation.hpp"

#include "policy.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <utility>

namespace cmg {

void Observation::asked(const ggml_tensor * node, const MicroBatch & batch) {
    if (batch.watches()) {
        asked_.push_back(node);
    }
}

void Observation::reached_keys(int32_t il) {
    readable_layer_ = il;
    n_boundaries_++;
}

bool Observation::wants(const MicroBatch & batch, int32_t il) const {
    return !batch.observed(il).empty() || !batch.recorded(il).empty();
}

// Rows of one sequence see the same cells. Those of several would have all cells of all of them
// looked at, and their sums made in another order than alone.
void Observation::observe(const AttentionNode & a, MicroBatch & batch) {
    const std::vector<int32_t> recorded = batch.recorded(a.il);
    std::vector<int32_t> rows = batch.observed(a.il);
    rows.insert(rows.end(), recorded.begin(), recorded.end());
    if (rows.empty()) {
        return;
    }
    check_mask(a, batch.n_rows());
    check_readable(a);
    std::map<int32_t, std::set<int32_t>> by_seq;
    for (const int32_t r : rows) {
        by_seq[batch.row(r).seq].insert(r);
    }
    for (const auto & entry : by_seq) {
        observe_rows(a, batch, {entry.second.begin(), entry.second.end()});
    }
}

void Observation::observe_rows(const AttentionNode & a, MicroBatch & batch,
                               const std::vector<int32_t> & rows) {
    const auto n_kv = static_cast<size_t>(a.k->ne[1]);
    std::vector<float> mask(rows.size() * n_kv);
    for (size_t i = 0; i < rows.size(); i++) {
        const size_t offset = static_cast<size_t>(rows[i]) * a.mask->nb[1];
        to_float(a.mask->type, batch.host_copy(a.il, a.mask).data() + offset,
                 mask.data() + i * n_kv, a.k->ne[1]);
    }
    const std::vector<int64_t> & of_tokens = ledger_.cells(batch.row(rows[0]).seq, a.cache_il);
    std::vector<int32_t> tokens;
    std::vector<int32_t> cells;
    for (size_t token = 0; token < of_tokens.size(); token++) {
        if (of_tokens[token] >= 0 && of_tokens[token] < a.k->ne[1]) {
            tokens.push_back(static_cast<int32_t>(token));
            cells.push_back(static_cast<int32_t>(of_tokens[token]));
        }
    }
    const std::vector<float> weights = weights_.read(a, rows, mask, cells);
    const std::vector<int32_t> recorded = batch.recorded(a.il);
    for (size_t i = 0; i < rows.size(); i++) {
        const Part & part = batch.part(rows[i]);
        const Row & row = batch.row(rows[i]);
        const Seen seen{of_tokens.size(), tokens, cells, mask.data() + i * n_kv,
                        weights.data() + i * cells.size()};
        if (row.observe >= 0 && part.observes(a.il)) {
            select(a.il, part, row, seen);
        }
        if (std::find(recorded.begin(), recorded.end(), rows[i]) != recorded.end()) {
            record(a.il, part, seen);
        }
    }
}

void Observation::check_readable(const AttentionNode & a) const {
    const auto pending = [&](const ggml_tensor * t) {
        return std::find(asked_.begin(), asked_.end(), root(t)) != asked_.end();
    };
    const bool sinks = a.sinks == nullptr || !pending(a.sinks);
    if (readable_layer_ != a.il || pending(a.q) || pending(a.k) || a.q->type != GGML_TYPE_F32 ||
        !sinks) {
        throw layer_error(a.il, "this model's graph does not compute q and K before its attention; "
                                "attention cannot be observed here");
    }
}

void Observation::select(int32_t il, const Part & part, const Row & row, const Seen & seen) const {
    std::vector<int32_t> candidates;
    std::vector<float> influence;
    for (size_t i = 0; i < seen.tokens.size(); i++) {
        if (std::isfinite(seen.mask[seen.cells[i]]) && seen.tokens[i] != row.image_token) {
            candidates.push_back(seen.tokens[i]);
            influence.push_back(seen.weights[i]);
        }
    }
    auto picked = select_tokens(part.policy, influence.data(), influence.size());
    for (auto & token : picked) {
        token = candidates[static_cast<size_t>(token)];
    }
    part.selections->set_tokens(row.observe, il, picked, part.n_image_tokens);
    if (part.keep_influence) {
        std::vector<float> kept(seen.n_tokens, 0.0f);
        for (size_t i = 0; i < candidates.size(); i++) {
            kept[static_cast<size_t>(candidates[i])] = influence[i];
        }
        part.selections->set_influence(row.observe, il, std::move(kept));
    }
}

// A token that the row cannot see has no weight; of one whose cell was given away none is known.
void Observation::record(int32_t il, const Part & part, const Seen & seen) const {
    const auto n_tokens = static_cast<size_t>(part.recording->n_image_tokens());
    std::vector<float> of_tokens(n_tokens, std::numeric_limits<float>::quiet_NaN());
    for (size_t i = 0; i < seen.tokens.size(); i++) {
        const auto token = static_cast<size_t>(seen.tokens[i]);
        if (token < n_tokens) {
            of_tokens[token] = std::isfinite(seen.mask[seen.cells[i]]) ? seen.weights[i] : 0.0f;
        }
    }
    part.recording->set(part.record, il, of_tokens);
}

} // namespace cmg
