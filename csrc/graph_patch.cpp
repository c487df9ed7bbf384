#include "graph_patch.hpp"

#include "operations.hpp"

#include "attention_node.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {
namespace {

std::vector<int32_t> marked(const std::vector<char> & layers) {
    std::vector<int32_t> out;
    for (size_t il = 0; il < layers.size(); il++) {
        if (layers[il] != 0) {
            out.push_back(static_cast<int32_t>(il));
        }
    }
    return out;
}

// "3, 7, 11", or "none".
std::string names_of(const std::vector<char> & layers) {
    std::string names;
    for (const int32_t il : marked(layers)) {
        names += (names.empty() ? "" : ", ") + std::to_string(il);
    }
    return names.empty() ? "none" : names;
}

} // namespace

GraphPatch::GraphPatch(int32_t n_layer, int32_t n_threads)
    : n_layer_(n_layer), ledger_(n_layer), fork_(plan_, n_layer, transfers_),
      observation_(ledger_, n_threads, transfers_), masking_(ledger_), stream_(n_layer, transfers_),
      written_(static_cast<size_t>(n_layer), 0), attended_(written_), written_layer_(n_layer),
      ever_attended_(written_), ever_written_(written_) {}

void GraphPatch::begin(Plan plan) {
    tell_parked_error();
    abandon(); // what is left of a plan that no decode followed
    fork_.check(plan);
    check_slots(plan, n_layer_);
    plan_ = std::move(plan);
    active_ = true;
    written_layer_ = n_layer_; // the first layer written starts the first micro-batch
    std::fill(written_.begin(), written_.end(), 0);
    std::fill(attended_.begin(), attended_.end(), 0);
    fork_.begin();
    stream_.begin(plan_);
}

void GraphPatch::end() {
    const int64_t seen = batch_.n_seen();
    std::exception_ptr error = parked_;
    if (error == nullptr) {
        try {
            fork_.end();
            check_layers_attended();
            stream_.end();
        } catch (...) {
            error = std::current_exception();
        }
    }
    const auto planned = static_cast<int64_t>(plan_.rows.size());
    abandon();
    if (error != nullptr) {
        std::rethrow_exception(error);
    }
    if (seen != planned) {
        throw std::runtime_error("the graph wrote " + std::to_string(seen) +
                                 " rows into its KV cache where " + std::to_string(planned) +
                                 " were planned; this architecture is not understood");
    }
}

void GraphPatch::abandon() {
    fork_.abandon();
    stream_.abandon();
    active_ = false;
    parked_ = nullptr;
    plan_ = Plan{};
    batch_.reset();
    observation_.reached_boundary();
    product_ = nullptr; // its graph may be gone when the next one is asked about
}

std::vector<int32_t> GraphPatch::attended_layers() const {
    return marked(ever_attended_);
}

bool GraphPatch::callback(ggml_tensor * node, bool ask, void * self) {
    auto & patch = *static_cast<GraphPatch *>(self);
    try {
        if (ask) {
            return patch.ask(node);
        }
        patch.computed(node);
    } catch (...) {
        patch.park_error();
    }
    return !ask;
}

// What fails later in a decode that is void already would hide why.
void GraphPatch::park_error() {
    if (parked_ == nullptr) {
        parked_ = std::current_exception();
    }
    active_ = false;
    fork_.abandon();
}

// `end` and `abandon` leave none behind, so it comes from a decode that neither followed.
void GraphPatch::tell_parked_error() {
    if (parked_ == nullptr) {
        return;
    }
    try {
        std::rethrow_exception(std::exchange(parked_, nullptr));
    } catch (const std::exception & error) {
        throw std::runtime_error(std::string("an earlier decode without a plan met an error, and "
                                             "where image tokens lie is not known since: ") +
                                 error.what());
    }
}

bool GraphPatch::ask(ggml_tensor * node) {
    if (active_) {
        observation_.asked(node, batch_);
        stream_.asked(node);
    }
    const bool enters = active_ && fork_.ask(node);
    if (op_of(node) == GGML_OP_SET_ROWS) {
        return ask_set_rows(node);
    }
    if (enters || (active_ && stream_.reads(node))) {
        return true;
    }
    const int32_t sharing = active_ ? sharing_layer(node) : -1;
    if (sharing >= 0) {
        return observation_.wants(batch_, sharing);
    }
    if (layer_in_name(node, "kq-") >= 0) {
        product_ = node;
    }
    AttentionNode attention = find_attention(node, product_);
    if (!attention.found() || attention.cache_il >= n_layer_) {
        return false;
    }
    masking_.restore(node, attention);
    // Layers that share another layer's cache come after it, in order.
    attention.il = std::max(attention.cache_il, attention_layer_ + 1);
    attention_layer_ = attention.il;
    if (attention.il >= n_layer_) {
        return false;
    }
    attended_[static_cast<size_t>(attention.il)] = 1;
    ever_attended_[static_cast<size_t>(attention.il)] = 1;
    if (active_) {
        check_layer(attention);
        observation_.observe(attention, batch_);
        masking_.mask(node, attention, batch_);
    }
    return false;
}

void GraphPatch::computed(ggml_tensor * node) {
    observation_.reached_boundary();
    if (!active_) {
        return;
    }
    fork_.computed(node);
    if (op_of(node) == GGML_OP_SET_ROWS) {
        observation_.reached_keys(layer_in_name(root(node), "cache_k_l"));
    } else if (stream_.reads(node)) {
        stream_.read(node);
    } else if (const int32_t il = sharing_layer(node); il >= 0) {
        observation_.reached_keys(il);
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
    return active_ && observation_.wants(batch_, il);
}

// The layer whose q this node is, if the layer writes no K: the one that it reads was written in a
// layer below, so that both stand before this node's boundary. Else -1. A layer of whose writes
// nothing is known yet may pass for one; its boundary at its own write then comes behind this one.
int32_t GraphPatch::sharing_layer(const ggml_tensor * node) const {
    const int32_t il = layer_in_name(node, "Qcur_pos-");
    const bool above = il > written_layer_ && il < n_layer_;
    return above && ever_written_[static_cast<size_t>(il)] == 0 ? il : -1;
}

// Which layer shares a cache is known by its place in the graph; a name must not speak against it.
void GraphPatch::check_layer(const AttentionNode & attention) const {
    const int32_t named = layer_in_name(root(attention.q), "Qcur_pos-");
    if (named >= 0 && named != attention.il) {
        throw layer_error(attention.il, "its attention reads q of layer " + std::to_string(named) +
                                            "; this model's graph is not understood");
    }
}

// Layers are written in ascending order; a layer not above the last one opens a micro-batch.
void GraphPatch::enter_layer(int32_t il, int64_t n_rows) {
    if (il <= written_layer_) {
        if (active_ && batch_.n_rows() > 0) {
            check_layers_attended();
        }
        batch_.next(n_rows);
        observation_.begin_micro_batch();
        masking_.begin_micro_batch();
        attention_layer_ = -1;
        product_ = nullptr;
        std::fill(written_.begin(), written_.end(), 0);
        std::fill(attended_.begin(), attended_.end(), 0);
    } else if (active_ && attended_[static_cast<size_t>(il)] != 0) {
        throw layer_error(il, "its K is written behind its attention, or a layer below attends "
                              "twice; this model's graph is not understood");
    }
    written_layer_ = il;
    written_[static_cast<size_t>(il)] = 1;
    ever_written_[static_cast<size_t>(il)] = 1;
}

// A layer without attention, or whose attention is not recognised, must not pass for masked.
void GraphPatch::check_layers_attended() const {
    for (int32_t il = 0; il < n_layer_; il++) {
        const bool needed = std::any_of(plan_.parts.begin(), plan_.parts.end(), [il](auto & part) {
            return part.observes(il) || part.masks(il) || part.records(il);
        });
        if (needed && attended_[static_cast<size_t>(il)] == 0) {
            const bool writes = written_[static_cast<size_t>(il)] != 0;
            throw layer_error(
                il, std::string(writes ? "its attention was not found in this model's graph"
                                       : "it has no attention in this model's graph") +
                        "; those that do attend: " + names_of(attended_));
        }
    }
}

void GraphPatch::record_cells(const ggml_tensor * node, int32_t il) {
    const ggml_tensor * index = node->src[1];
    if (index->type != GGML_TYPE_I64) {
        throw layer_error(il, "the KV cache is not indexed by 64-bit cells");
    }
    if (index->ne[0] != batch_.n_rows()) {
        throw layer_error(il, "its KV cache is written in " + std::to_string(index->ne[0]) +
                                  " rows where the batch has " + std::to_string(batch_.n_rows()));
    }
    std::vector<int64_t> cells(static_cast<size_t>(batch_.n_rows()));
    std::memcpy(cells.data(), batch_.host_copy(il, index).data(), cells.size() * sizeof(int64_t));
    for (int32_t r = 0; r < batch_.n_rows(); r++) {
        const Row & row = batch_.row(r);
        const int64_t cell = cells[static_cast<size_t>(r)];
        if (cell < 0 || cell >= node->ne[1]) {
            throw layer_error(il, "its KV cache is written in cell " + std::to_string(cell) +
                                      " of " + std::to_string(node->ne[1]));
        }
        ledger_.forget(il, cell);
        if (row.image_token >= 0) {
            ledger_.record(row.seq, il, row.image_token, cell);
        }
    }
}

} // namespace cmg
