#include "masking.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace cmg {
namespace {

void write_neg_inf(ggml_type type, uint8_t * entry) {
    constexpr float f32 = -std::numeric_limits<float>::infinity();
    constexpr uint16_t f16 = 0xFC00;
    if (type == GGML_TYPE_F16) {
        std::memcpy(entry, &f16, sizeof(f16));
    } else {
        std::memcpy(entry, &f32, sizeof(f32));
    }
}

// Whether the row hides any token in layer `il`.
bool hides(const MicroBatch & batch, int32_t r, int32_t il) {
    const Part & part = batch.part(r);
    return part.masks(il) && !part.selections->empty(batch.row(r).mask, il);
}

} // namespace

// A graph that is reused still points at our tensor; in a new one, what a node points at is its
// own.
void Masking::restore(ggml_tensor * node, AttentionNode & attention) {
    const auto swap = swaps_.find(node);
    if (swap == swaps_.end()) {
        return;
    }
    if (swap->second.ours == attention.mask) {
        attention.mask = swap->second.original;
        node->src[attention.mask_src] = attention.mask;
    }
    swaps_.erase(swap);
}

void Masking::mask(ggml_tensor * node, const AttentionNode & a, MicroBatch & batch) {
    const std::vector<int32_t> rows = batch.masked(a.il);
    if (rows.empty()) {
        return;
    }
    check_mask(a, batch.n_rows());
    if (std::none_of(rows.begin(), rows.end(), [&](int32_t r) { return hides(batch, r, a.il); })) {
        return;
    }
    ggml_tensor * ours = find_made(a, batch);
    if (ours == nullptr) {
        ours = make(a, batch);
        made_.push_back({a.il, a.cache_il, a.mask, ours});
    }
    swaps_[node] = {a.mask, ours};
    node->src[a.mask_src] = ours;
}

// What ran before has been computed: llama.cpp has written the inputs of the graph to come.
void Masking::begin_micro_batch() {
    if (made_.empty()) {
        return; // nothing is freed for rows without masks, which come between others
    }
    for (auto & [il, mask] : masks_) {
        const bool used = std::any_of(made_.begin(), made_.end(),
                                      [il = il](const Made & made) { return made.il == il; });
        if (!used) {
            mask.release_if_large();
        }
    }
    made_.clear();
}

ggml_tensor * Masking::make(const AttentionNode & a, MicroBatch & batch) {
    std::vector<uint8_t> bytes = batch.host_copy(a.il, a.mask);
    for (const int32_t r : batch.masked(a.il)) {
        hide_cells(a, batch, r, bytes);
    }
    n_masks_++;
    return masks_[a.il].assign(a.mask, bytes);
}

// The slots hold what they held when the masks were made: a layer's tokens are written before its
// mask is made, and not again in this micro-batch.
ggml_tensor * Masking::find_made(const AttentionNode & a, const MicroBatch & batch) const {
    const auto & rows = batch.masked();
    for (const Made & made : made_) {
        if (made.original == a.mask && std::all_of(rows.begin(), rows.end(), [&](int32_t r) {
                return hides_same(made, a, batch, r);
            })) {
            return made.ours;
        }
    }
    return nullptr;
}

// Whether the row hides the same cells in both layers.
bool Masking::hides_same(const Made & made, const AttentionNode & a, const MicroBatch & batch,
                         int32_t r) const {
    const bool here = hides(batch, r, a.il);
    if (here != hides(batch, r, made.il)) {
        return false;
    }
    const Row & row = batch.row(r);
    return !here || (batch.part(r).selections->same(row.mask, made.il, a.il) &&
                     (made.cache_il == a.cache_il ||
                      ledger_.cells(row.seq, made.cache_il) == ledger_.cells(row.seq, a.cache_il)));
}

// Writes -inf where the row may not look. A row never loses its own cell.
void Masking::hide_cells(const AttentionNode & a, const MicroBatch & batch, int32_t r,
                         std::vector<uint8_t> & mask) const {
    const Row & row = batch.row(r);
    const Part & part = batch.part(r);
    const auto & cells = ledger_.cells(row.seq, a.cache_il);
    uint8_t * line = mask.data() + static_cast<size_t>(r) * a.mask->nb[1];
    for (const int32_t token : part.selections->tokens(row.mask, a.il)) {
        if (token >= part.n_image_tokens) {
            throw layer_error(a.il, "image token " + std::to_string(token) +
                                        " is hidden and the prompt has " +
                                        std::to_string(part.n_image_tokens));
        }
        // Not there yet: an image behind this row, which it does not see anyway.
        const bool known = static_cast<size_t>(token) < cells.size();
        const int64_t cell = known ? cells[static_cast<size_t>(token)] : -1;
        if (token != row.image_token && cell >= 0 && cell < a.mask->ne[0]) {
            write_neg_inf(a.mask->type, line + static_cast<size_t>(cell) * a.mask->nb[0]);
        }
    }
}

} // namespace cmg
