#include "encoder_mend.hpp"

#include "api.hpp"
#include "operations.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

namespace cmg {
namespace {

// A weight, an input, or a backend's copy of one: nothing that the graph computes.
bool is_leaf(const ggml_tensor * t) {
    return op_of(t) == GGML_OP_NONE && t->view_src == nullptr;
}

float op_param(const ggml_tensor * node, int i) {
    float value = 0.0f;
    std::memcpy(&value, reinterpret_cast<const char *>(node->op_params) + sizeof(float) * i,
                sizeof(value));
    return value;
}

// [n_embd, n] with one learned row appended, the same for every picture of a batch.
bool appends_class_token(const ggml_tensor * node) {
    const ggml_tensor * patches = node->src[0];
    const ggml_tensor * last = node->src[1];
    const bool learned = is_leaf(last) || (op_of(last) == GGML_OP_REPEAT && is_leaf(last->src[0]));
    return node->op_params[0] == 1 && !is_leaf(patches) && learned && last->ne[1] == 1 &&
           patches->ne[1] > 1;
}

// Whether `index` is a leaf of the n numbers `first`, `first` + 1, ...
bool counts_from(const ggml_tensor * index, int32_t first, int64_t n) {
    if (!is_leaf(index) || index->type != GGML_TYPE_I32 || index->ne[0] != n || index->ne[1] != 1 ||
        index->buffer == nullptr) {
        return false;
    }
    std::vector<int32_t> values(static_cast<size_t>(n));
    api().ggml_backend_tensor_get(index, values.data(), 0, values.size() * sizeof(int32_t));
    for (const int32_t value : values) {
        if (value != first++) {
            return false;
        }
    }
    return true;
}

void write(ggml_tensor * index, const std::vector<int32_t> & values) {
    api().ggml_backend_tensor_set(index, values.data(), 0, values.size() * sizeof(int32_t));
}

// [n, a * b] of [n, a, b], which has been made contiguous from another order just before: there is
// nothing to do, unless a second reordering was to stand between.
bool leaves_tokens_by_column(const ggml_tensor * node) {
    const ggml_tensor * from = node->src[0];
    if (op_of(from) != GGML_OP_CONT || op_of(from->src[0]) != GGML_OP_PERMUTE ||
        op_of(from->src[0]->src[0]) != GGML_OP_RESHAPE) {
        return false;
    }
    const int32_t * axes = from->src[0]->op_params;
    const bool swaps = axes[0] == 0 && axes[1] == 2 && axes[2] == 1 && axes[3] == 3;
    return swaps && from->ne[1] > 1 && from->ne[1] == from->ne[2] && from->ne[3] == 1 &&
           node->ne[0] == from->ne[0] && node->ne[1] == from->ne[1] * from->ne[2];
}

// 0 times something that is no value of the model's.
bool clears(const ggml_tensor * node) {
    return op_of(node) == GGML_OP_SCALE && op_param(node, 0) == 0.0f && op_param(node, 1) == 0.0f &&
           is_leaf(node->src[0]);
}

} // namespace

void EncoderMend::begin() {
    n_rows_ = 0;
    is_repeated_ = has_places_ = has_rows_ = false;
    mended_.clear();
    parked_ = nullptr;
}

void EncoderMend::end() {
    if (parked_ != nullptr) {
        std::rethrow_exception(std::exchange(parked_, nullptr));
    }
}

bool EncoderMend::callback(ggml_tensor * node, bool ask, void * self) {
    auto & mend = *static_cast<EncoderMend *>(self);
    try {
        if (ask) {
            return mend.ask(node);
        }
        if (clears(node)) {
            const std::vector<uint8_t> zeros(api().ggml_nbytes(node), 0);
            api().ggml_backend_tensor_set(node, zeros.data(), 0, zeros.size());
            mend.mended_.insert("cleared");
        }
    } catch (...) {
        if (mend.parked_ == nullptr) {
            mend.parked_ = std::current_exception();
        }
    }
    return !ask;
}

// True where the node is to be computed, and shown again, before anything else is.
bool EncoderMend::ask(ggml_tensor * node) {
    switch (op_of(node)) {
    case GGML_OP_CONCAT:
        if (n_rows_ == 0 && appends_class_token(node)) {
            n_rows_ = node->ne[1];
            is_repeated_ = !is_leaf(node->src[1]);
        }
        return false;
    case GGML_OP_GET_ROWS:
        ask_get_rows(node);
        return false;
    case GGML_OP_ADD:
        ask_add(node);
        return false;
    case GGML_OP_CONT:
        ask_cont(node);
        return false;
    case GGML_OP_GLU:
        replace(node, loaded_numbers().geglu_quick, loaded_numbers().geglu);
        return false;
    case GGML_OP_UNARY:
        if (is_cogvlm_) {
            replace(node, loaded_numbers().gelu_quick, loaded_numbers().gelu);
        }
        return false;
    default:
        return clears(node);
    }
}

// The inputs are written anew for every graph, so this changes no later one.
void EncoderMend::ask_get_rows(const ggml_tensor * node) {
    if (n_rows_ == 0) {
        return;
    }
    const ggml_tensor * from = node->src[0];
    ggml_tensor * index = node->src[1];
    if (!has_places_ && is_leaf(from) && counts_from(index, 0, n_rows_)) {
        std::vector<int32_t> places(static_cast<size_t>(n_rows_));
        std::iota(places.begin(), places.end() - 1, 1);
        places.back() = 0;
        write(index, places);
        has_places_ = true;
        mended_.insert("class token");
    } else if (has_places_ && !has_rows_ && !is_leaf(from) && from->ne[1] == n_rows_ &&
               counts_from(index, 1, n_rows_ - 1)) {
        std::vector<int32_t> rows(static_cast<size_t>(n_rows_ - 1));
        std::iota(rows.begin(), rows.end(), 0);
        write(index, rows);
        has_rows_ = true;
    }
}

// Where the class token is one for all pictures of a batch, the model has it behind the patches
// (Llama 4), and its places are in order; but for CogVLM.
void EncoderMend::ask_add(ggml_tensor * node) {
    const ggml_tensor * places = node->src[1];
    const bool is_first = is_repeated_ || is_cogvlm_;
    if (n_rows_ == 0 || !is_first || has_places_ || node->ne[1] != n_rows_ || !is_leaf(places) ||
        places->buffer == nullptr || places->ne[0] != node->ne[0] || places->ne[1] != n_rows_ ||
        places->ne[2] != 1) {
        return;
    }
    std::vector<uint8_t> bytes(api().ggml_nbytes(places));
    api().ggml_backend_tensor_get(places, bytes.data(), 0, bytes.size());
    const auto row = static_cast<std::ptrdiff_t>(places->nb[1]);
    std::rotate(bytes.begin(), bytes.begin() + row, bytes.end());
    node->src[1] = places_.assign(places, bytes);
    has_places_ = true;
    mended_.insert("places");
}

void EncoderMend::ask_cont(ggml_tensor * node) {
    if (!leaves_tokens_by_column(node)) {
        return;
    }
    ggml_tensor * tokens = node->src[0];
    by_rows_ = *tokens;
    by_rows_.op = loaded_numbers().permute;
    std::fill(std::begin(by_rows_.src), std::end(by_rows_.src), nullptr);
    by_rows_.src[0] = tokens;
    by_rows_.view_src = tokens;
    std::swap(by_rows_.nb[1], by_rows_.nb[2]); // as many rows as columns
    node->src[0] = &by_rows_;
    mended_.insert("rows");
}

void EncoderMend::replace(ggml_tensor * node, int32_t quick, int32_t usual) {
    if (node->op_params[0] == quick) {
        node->op_params[0] = usual;
        mended_.insert("activation");
    }
}

} // namespace cmg
