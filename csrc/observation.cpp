#include "observation.hpp"

#include "policy.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace cmg {

void Observation::asked(const ggml_tensor * node, const MicroBatch & batch) {
    if (!batch.observed().empty()) {
        asked_.push_back(node);
    }
}

void Observation::reached_keys(int32_t il) {
    readable_layer_ = il;
    n_boundaries_++;
}

bool Observation::wants(const MicroBatch & batch, int32_t il) const {
    return !batch.observed().empty() && batch.plan().observe_layers[static_cast<size_t>(il)] != 0;
}

void Observation::observe(const AttentionNode & a, MicroBatch & batch) {
    if (!wants(batch, a.il)) {
        return;
    }
    check_readable(a);
    const auto & rows = batch.observed();
    const auto n_kv = static_cast<size_t>(a.k->ne[1]);
    std::vector<float> mask(rows.size() * n_kv);
    for (size_t i = 0; i < rows.size(); i++) {
        const size_t offset = static_cast<size_t>(rows[i]) * a.mask->nb[1];
        to_float(a.mask->type, batch.host_copy(a.mask).data() + offset, mask.data() + i * n_kv,
                 a.k->ne[1]);
    }
    const std::vector<float> weights = read_attention(a, rows, mask, n_threads_);
    for (size_t i = 0; i < rows.size(); i++) {
        select(a, batch.plan(), batch.row(rows[i]), mask.data() + i * n_kv,
               weights.data() + i * n_kv);
    }
}

void Observation::check_readable(const AttentionNode & a) const {
    const auto pending = [&](const ggml_tensor * t) {
        return std::find(asked_.begin(), asked_.end(), root(t)) != asked_.end();
    };
    if (readable_layer_ != a.il || pending(a.q) || pending(a.k) || a.q->type != GGML_TYPE_F32) {
        throw layer_error(a.il, "this model's graph does not compute q and K before its attention; "
                                "attention cannot be observed here");
    }
}

// mask, weights: [n_kv] of one observed row.
void Observation::select(const AttentionNode & a, const Plan & plan, const Row & row,
                         const float * mask, const float * weights) {
    const auto & cells = ledger_.cells(row.seq, a.cache_il);
    std::vector<int32_t> candidates;
    std::vector<float> influence;
    for (size_t token = 0; token < cells.size(); token++) {
        const int64_t cell = cells[token];
        const bool visible = cell >= 0 && cell < a.k->ne[1] && std::isfinite(mask[cell]);
        if (visible && static_cast<int32_t>(token) != row.image_token) {
            candidates.push_back(static_cast<int32_t>(token));
            influence.push_back(weights[cell]);
        }
    }
    auto picked = select_tokens(plan.policy, influence.data(), influence.size());
    for (auto & token : picked) {
        token = candidates[static_cast<size_t>(token)];
    }
    selections_->set_tokens(row.observe, a.il, picked, plan.n_image_tokens);
    if (plan.keep_influence) {
        std::vector<float> kept(cells.size(), 0.0f);
        for (size_t i = 0; i < candidates.size(); i++) {
            kept[static_cast<size_t>(candidates[i])] = influence[i];
        }
        selections_->set_influence(row.observe, a.il, std::move(kept));
    }
}

} // namespace cmg
