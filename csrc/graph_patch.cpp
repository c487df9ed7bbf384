#include "graph_patch.hpp"

#include "api.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace cmg {
namespace {

[[noreturn]] void fail(const std::string & what, int32_t il) {
    throw std::runtime_error("layer " + std::to_string(il) + ": " + what);
}

double cosine(const std::vector<float> & a, const std::vector<float> & b) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); i++) {
        ab += static_cast<double>(a[i]) * b[i];
        aa += static_cast<double>(a[i]) * a[i];
        bb += static_cast<double>(b[i]) * b[i];
    }
    return ab / std::sqrt(std::max(aa * bb, std::numeric_limits<double>::min()));
}

} // namespace

GraphPatch::GraphPatch(int32_t n_layer, std::shared_ptr<Selections> selections, int32_t n_threads)
    : n_layer_(n_layer), n_threads_(n_threads), selections_(std::move(selections)),
      ledger_(n_layer), fork_(n_layer), unattended_(static_cast<size_t>(n_layer), 0),
      written_layer_(n_layer) {}

void GraphPatch::begin(Plan plan) {
    fork_.begin(plan.fork, static_cast<int64_t>(plan.rows.size()));
    plan_ = std::move(plan);
    parked_ = nullptr;
    active_ = true;
    ubatch_begin_ = 0;
    ubatch_rows_ = 0;
    written_layer_ = n_layer_; // the first layer written starts the first micro-batch
    residual_.clear();
    unattended_.assign(static_cast<size_t>(n_layer_), 0);
    cosines_.assign(plan_.read_residual ? static_cast<size_t>(n_layer_) : 0,
                    std::numeric_limits<double>::quiet_NaN());
}

void GraphPatch::end() {
    const auto planned = static_cast<int64_t>(plan_.rows.size());
    const int64_t seen = ubatch_begin_ + ubatch_rows_;
    std::exception_ptr error = parked_;
    if (error == nullptr) {
        try {
            fork_.end();
        } catch (...) {
            error = std::current_exception();
        }
    }
    const Plan plan = std::move(plan_);
    abandon();
    if (error != nullptr) {
        std::rethrow_exception(error);
    }
    check_layers_attended(plan);
    if (std::any_of(cosines_.begin(), cosines_.end(), [](double c) { return std::isnan(c); })) {
        throw std::runtime_error("the residual stream cannot be read in this model's graph; name "
                                 "the layers or choose them by attention mass");
    }
    if (seen != planned) {
        throw std::runtime_error("the graph wrote " + std::to_string(seen) +
                                 " rows into its KV cache where " + std::to_string(planned) +
                                 " were planned; this architecture is not understood");
    }
}

void GraphPatch::abandon() {
    fork_.abandon();
    active_ = false;
    parked_ = nullptr;
    plan_ = Plan{};
    copies_.clear();
    asked_.clear();
    observed_.clear();
    masked_.clear();
}

bool GraphPatch::callback(ggml_tensor * node, bool ask, void * self) {
    auto & patch = *static_cast<GraphPatch *>(self);
    try {
        if (ask) {
            return patch.ask(node);
        }
        patch.computed(node);
    } catch (...) {
        patch.parked_ = std::current_exception();
        patch.active_ = false;
        patch.fork_.abandon();
    }
    return !ask;
}

bool GraphPatch::ask(ggml_tensor * node) {
    if (active_ && !observed_.empty()) {
        asked_.push_back(node);
    }
    const bool enters = active_ && fork_.ask(node);
    if (node->op == GGML_OP_SET_ROWS) {
        return ask_set_rows(node);
    }
    if (enters || (active_ && is_residual(node))) {
        return true;
    }
    AttentionNode attention = find_attention(node);
    if (!attention.found() || attention.cache_il >= n_layer_) {
        return false;
    }
    attention.mask = restored_mask(node, attention.mask);
    node->src[attention.mask_src] = attention.mask;
    if (!active_) {
        return false;
    }
    // Layers that share another layer's cache come after it, in order.
    attention.il = std::max(attention.cache_il, attention_layer_ + 1);
    attention_layer_ = attention.il;
    unattended_[static_cast<size_t>(attention.cache_il)] = 0;
    if (attention.il < n_layer_) {
        observe(attention);
        if (ggml_tensor * ours = patched_mask(attention)) {
            swaps_[node] = {attention.mask, ours};
            node->src[attention.mask_src] = ours;
        }
    }
    return false;
}

// A graph that is reused still points at our tensor; in a new one, what a node points at is its
// own.
ggml_tensor * GraphPatch::restored_mask(const ggml_tensor * node, ggml_tensor * current) {
    const auto swap = swaps_.find(node);
    if (swap == swaps_.end()) {
        return current;
    }
    ggml_tensor * original = swap->second.ours == current ? swap->second.original : current;
    swaps_.erase(swap);
    return original;
}

void GraphPatch::computed(ggml_tensor * node) {
    asked_.clear();
    if (!active_) {
        return;
    }
    fork_.computed(node);
    if (node->op == GGML_OP_SET_ROWS) {
        readable_layer_ = layer_in_name(root(node), "cache_k_l");
        n_boundaries_++;
    } else if (is_residual(node)) {
        read_residual(node);
    }
}

// Answers whether a boundary is needed behind this write into the cache. K of the rows at hand is
// complete there, and q stands before it in every order that backends bring the graph into.
// Without a plan too, for what is written may lie where image tokens lay.
bool GraphPatch::ask_set_rows(ggml_tensor * node) {
    const int32_t il = layer_in_name(root(node), "cache_k_l");
    if (il < 0 || il >= n_layer_) {
        return false;
    }
    enter_layer(il, node->src[1]->ne[0]);
    record_cells(node, il);
    return active_ && !observed_.empty() && plan_.observe_layers[static_cast<size_t>(il)] != 0;
}

// Layers are written in ascending order; a layer not above the last one opens a micro-batch.
void GraphPatch::enter_layer(int32_t il, int64_t n_rows) {
    if (il <= written_layer_) {
        if (active_) {
            check_layers_attended(plan_);
        }
        ubatch_begin_ += ubatch_rows_;
        ubatch_rows_ = n_rows;
        attention_layer_ = -1;
        readable_layer_ = -1;
        copies_.clear();
        observed_.clear();
        masked_.clear();
        std::fill(unattended_.begin(), unattended_.end(), 0);
        for (int32_t r = 0; r < n_rows; r++) {
            if (batch_row(r).observe >= 0) {
                observed_.push_back(r);
            }
            if (batch_row(r).mask >= 0) {
                masked_.push_back(r);
            }
        }
    }
    written_layer_ = il;
    unattended_[static_cast<size_t>(il)] = 1;
}

// A graph whose attention is not recognised must not pass for one with nothing to mask.
void GraphPatch::check_layers_attended(const Plan & plan) const {
    for (int32_t il = 0; il < n_layer_; il++) {
        const auto i = static_cast<size_t>(il);
        if (unattended_[i] != 0 && (plan.observe_layers[i] != 0 || plan.mask_layers[i] != 0)) {
            fail("its attention was not found in this model's graph", il);
        }
    }
}

const Row & GraphPatch::batch_row(int32_t ubatch_row) const {
    static const Row nothing;
    const auto i = static_cast<size_t>(ubatch_begin_ + ubatch_row);
    return i < plan_.rows.size() ? plan_.rows[i] : nothing;
}

const std::vector<uint8_t> & GraphPatch::host_copy(const ggml_tensor * t) {
    auto & bytes = copies_[t];
    if (bytes.empty()) {
        bytes.resize(api().ggml_nbytes(t));
        api().ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    }
    return bytes;
}

void GraphPatch::record_cells(const ggml_tensor * node, int32_t il) {
    const ggml_tensor * index = node->src[1];
    if (index->type != GGML_TYPE_I64) {
        fail("the KV cache is not indexed by 64-bit cells", il);
    }
    std::vector<int64_t> cells(static_cast<size_t>(ubatch_rows_));
    std::memcpy(cells.data(), host_copy(index).data(), cells.size() * sizeof(int64_t));
    for (int32_t r = 0; r < ubatch_rows_; r++) {
        const Row & row = batch_row(r);
        const int64_t cell = cells[static_cast<size_t>(r)];
        ledger_.forget(il, cell);
        if (row.image_token >= 0) {
            ledger_.record(row.seq, il, row.image_token, cell);
        }
    }
}

// Attention of the observed rows in this layer, and what the policy picks from it.
void GraphPatch::observe(const AttentionNode & a) {
    if (observed_.empty() || plan_.observe_layers[static_cast<size_t>(a.il)] == 0) {
        return;
    }
    const auto pending = [&](const ggml_tensor * t) {
        return std::find(asked_.begin(), asked_.end(), root(t)) != asked_.end();
    };
    if (readable_layer_ != a.il || pending(a.q) || pending(a.k) || a.q->type != GGML_TYPE_F32) {
        fail("this model's graph does not compute q and K before its attention; "
             "attention cannot be observed here",
             a.il);
    }
    const auto n_kv = static_cast<size_t>(a.k->ne[1]);
    std::vector<float> mask(observed_.size() * n_kv);
    for (size_t i = 0; i < observed_.size(); i++) {
        const size_t offset = static_cast<size_t>(observed_[i]) * a.mask->nb[1];
        to_float(a.mask->type, host_copy(a.mask).data() + offset, mask.data() + i * n_kv,
                 a.k->ne[1]);
    }
    const std::vector<float> weights = read_attention(a, observed_, mask, n_threads_);
    for (size_t i = 0; i < observed_.size(); i++) {
        select(a, batch_row(observed_[i]), mask.data() + i * n_kv, weights.data() + i * n_kv);
    }
}

// mask, weights: [n_kv] of one observed row.
void GraphPatch::select(const AttentionNode & a, const Row & row, const float * mask,
                        const float * weights) {
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
    auto picked = select_tokens(plan_.policy, influence.data(), influence.size());
    for (auto & token : picked) {
        token = candidates[static_cast<size_t>(token)];
    }
    selections_->set_tokens(row.observe, a.il, picked, plan_.n_image_tokens);
    if (plan_.keep_influence) {
        std::vector<float> kept(cells.size(), 0.0f);
        for (size_t i = 0; i < candidates.size(); i++) {
            kept[static_cast<size_t>(candidates[i])] = influence[i];
        }
        selections_->set_influence(row.observe, a.il, std::move(kept));
    }
}

// Our mask for this layer, or null if no row of the micro-batch hides anything here.
ggml_tensor * GraphPatch::patched_mask(const AttentionNode & a) {
    if (masked_.empty() || plan_.mask_layers[static_cast<size_t>(a.il)] == 0) {
        return nullptr;
    }
    const bool known_type = a.mask->type == GGML_TYPE_F16 || a.mask->type == GGML_TYPE_F32;
    if (!known_type || a.mask->ne[2] != 1 || a.mask->ne[3] != 1 || a.mask->ne[1] < ubatch_rows_) {
        fail("the attention mask is not one [n_kv, n_tokens] matrix of F16 or F32 "
             "(the context needs kv_unified = true)",
             a.il);
    }
    std::vector<uint8_t> bytes = host_copy(a.mask);
    bool any = false;
    for (const int32_t r : masked_) {
        any = hide_cells(a, r, bytes) || any;
    }
    if (!any) {
        return nullptr;
    }
    return masks_[a.il].assign(a.mask, bytes);
}

// Writes -inf where the row may not look. A row never loses its own cell.
bool GraphPatch::hide_cells(const AttentionNode & a, int32_t ubatch_row,
                            std::vector<uint8_t> & mask) {
    constexpr float f32_neg_inf = -std::numeric_limits<float>::infinity();
    constexpr uint16_t f16_neg_inf = 0xFC00;
    const Row & row = batch_row(ubatch_row);
    const auto & cells = ledger_.cells(row.seq, a.cache_il);
    const std::vector<int32_t> hidden = selections_->tokens(row.mask, a.il);
    uint8_t * line = mask.data() + static_cast<size_t>(ubatch_row) * a.mask->nb[1];
    for (const int32_t token : hidden) {
        if (token >= plan_.n_image_tokens) {
            fail("image token " + std::to_string(token) + " is hidden and the prompt has " +
                     std::to_string(plan_.n_image_tokens),
                 a.il);
        }
        // Not there yet: an image behind this row, which it does not see anyway.
        const bool known = static_cast<size_t>(token) < cells.size();
        const int64_t cell = known ? cells[static_cast<size_t>(token)] : -1;
        if (token == row.image_token || cell < 0 || cell >= a.mask->ne[0]) {
            continue;
        }
        uint8_t * entry = line + static_cast<size_t>(cell) * a.mask->nb[0];
        if (a.mask->type == GGML_TYPE_F16) {
            std::memcpy(entry, &f16_neg_inf, sizeof(f16_neg_inf));
        } else {
            std::memcpy(entry, &f32_neg_inf, sizeof(f32_neg_inf));
        }
    }
    return !hidden.empty();
}

// The residual stream before layer 0 is what its first norm reads; after layer il it is l_out-<il>.
bool GraphPatch::is_residual(const ggml_tensor * node) const {
    return plan_.read_residual && ((residual_.empty() && std::strcmp(node->name, "norm-0") == 0) ||
                                   layer_in_name(node, "l_out-") >= 0);
}

void GraphPatch::read_residual(const ggml_tensor * node) {
    const int32_t il = layer_in_name(node, "l_out-");
    const ggml_tensor * stream = il < 0 ? node->src[0] : node;
    if (stream->type != GGML_TYPE_F32 || stream->op == GGML_OP_MUL_MAT ||
        (il >= 0 && residual_.empty())) {
        return; // its cosine stays unknown, which `end` reports
    }
    std::vector<float> row(static_cast<size_t>(stream->ne[0]));
    const auto last = static_cast<size_t>(stream->ne[1] - 1);
    api().ggml_backend_tensor_get(stream, row.data(), last * stream->nb[1],
                                  row.size() * sizeof(float));
    if (il >= 0 && il < n_layer_) {
        cosines_[static_cast<size_t>(il)] = cosine(residual_, row);
    }
    residual_ = std::move(row);
}

} // namespace cmg
