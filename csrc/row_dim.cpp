#include "row_dim.hpp"

#include "api.hpp"
#include "operations.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace cmg {
namespace {

constexpr int64_t n_sections = 4; // of ggml's M-RoPE, whatever their sizes

using Dims = int32_t[GGML_MAX_SRC]; // row dimension of each source

bool is_contiguous(const ggml_tensor * t) {
    size_t stride = api().ggml_row_size(t->type, t->ne[0]);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        if (t->ne[i] != 1 && t->nb[i] != stride) {
            return false;
        }
        stride *= static_cast<size_t>(t->ne[i]);
    }
    return true;
}

// Whether the rows lie one behind the other in the order of the tensor's elements.
bool is_outermost(const ggml_tensor * t, int32_t dim) {
    return std::all_of(t->ne + dim + 1, t->ne + GGML_MAX_DIMS, [](int64_t n) { return n == 1; });
}

// Whether no other stride of the tensor would change with the number of rows.
bool has_widest_stride(const ggml_tensor * t, int32_t dim) {
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        if (i != dim && t->ne[i] > 1 && t->nb[i] >= t->nb[dim]) {
            return false;
        }
    }
    return true;
}

// The same elements in the same order, in other dimensions.
int32_t of_reshape(const ggml_tensor * node, int32_t src_dim, int64_t n_rows) {
    if (!is_outermost(node->src[0], src_dim)) {
        const bool same = std::equal(node->ne, node->ne + GGML_MAX_DIMS, node->src[0]->ne);
        return same ? src_dim : unclear_rows;
    }
    int32_t dim = GGML_MAX_DIMS - 1;
    while (dim > 0 && node->ne[dim] == 1) {
        dim--;
    }
    return dim > 0 && node->ne[dim] % n_rows == 0 ? dim : unclear_rows;
}

// Whether the i-th row of a view lies in the memory of its source's i-th row, or of the row that
// the source looks at itself.
bool is_within_row(const ggml_tensor * view, int32_t dim) {
    const ggml_tensor * src = view->src[0];
    const size_t stride = view->nb[dim];
    const size_t begin = view->view_offs;
    const size_t src_begin = src->view_src == nullptr ? 0 : src->view_offs;
    size_t end = begin % stride + api().ggml_row_size(view->type, view->ne[0]);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        end += i == dim ? 0 : static_cast<size_t>(view->ne[i] - 1) * view->nb[i];
    }
    return begin / stride == src_begin / stride && end <= stride;
}

int32_t of_view(const ggml_tensor * node, int32_t src_dim, int64_t n_rows) {
    const ggml_tensor * src = node->src[0];
    for (int32_t dim = 1; dim < GGML_MAX_DIMS; dim++) {
        if (node->ne[dim] == n_rows && node->nb[dim] == src->nb[src_dim]) {
            const bool same = has_widest_stride(src, src_dim) && has_widest_stride(node, dim);
            const bool clear = same && src->ne[src_dim] == n_rows && is_within_row(node, dim);
            return clear ? dim : unclear_rows;
        }
    }
    return unclear_rows;
}

int32_t of_permute(const ggml_tensor * node, int32_t src_dim) {
    const int32_t dim = node->op_params[src_dim];
    return dim > 0 ? dim : unclear_rows;
}

int32_t of_binary(const ggml_tensor * node, const Dims & dims) {
    const bool both = dims[1] == dims[0];
    const bool broadcast = dims[1] == no_rows && dims[0] > 0 && node->src[1]->ne[dims[0]] == 1;
    return both || broadcast ? dims[0] : unclear_rows;
}

bool own_memory(const ggml_tensor * node) {
    return node->view_src == nullptr && is_contiguous(node);
}

bool only_first(const Dims & dims) {
    return std::all_of(dims + 1, std::end(dims), [](int32_t d) { return d == no_rows; });
}

int32_t of_rope(const ggml_tensor * node, int64_t n_rows, const Dims & dims) {
    const bool one_a_row = node->src[1]->ne[0] == n_rows;
    const bool known = one_a_row || sectioned_positions(node, n_rows) != nullptr;
    return only_first(dims) && dims[0] == 2 && known ? 2 : unclear_rows;
}

// Each row by itself grows.
int32_t of_pad(const ggml_tensor * node, const Dims & dims) {
    const bool same = std::equal(node->ne + 1, node->ne + GGML_MAX_DIMS, node->src[0]->ne + 1);
    return only_first(dims) && same ? dims[0] : unclear_rows;
}

int32_t of_computed(const ggml_tensor * node, int64_t n_rows, const Dims & dims) {
    switch (op_of(node)) {
    case GGML_OP_ADD:
    case GGML_OP_SUB:
    case GGML_OP_MUL:
    case GGML_OP_DIV:
        return of_binary(node, dims);
    case GGML_OP_GLU:
        return node->src[1] == nullptr || dims[1] == dims[0] ? dims[0] : unclear_rows;
    case GGML_OP_MUL_MAT:
        return dims[0] == no_rows ? dims[1] : unclear_rows;
    case GGML_OP_MUL_MAT_ID: // of the experts that a row has chosen
        return dims[0] == no_rows && dims[1] == 2 && dims[2] == 1 ? 2 : unclear_rows;
    case GGML_OP_GET_ROWS: // of a row's own weights, those of the experts that it has chosen
        return dims[0] == 2 && dims[1] == 1 ? 2 : unclear_rows;
    case GGML_OP_FLASH_ATTN_EXT:
        return only_first(dims) && dims[0] == 1 ? 2 : unclear_rows;
    case GGML_OP_CONT:
        return of_reshape(node, dims[0], n_rows);
    case GGML_OP_PAD:
        return of_pad(node, dims);
    case GGML_OP_ROPE:
        return of_rope(node, n_rows, dims);
    case GGML_OP_SOFT_MAX:
        return only_first(dims) && dims[0] == 1 ? 1 : unclear_rows;
    case GGML_OP_ARGSORT:
    case GGML_OP_CLAMP:
    case GGML_OP_L2_NORM:
    case GGML_OP_NORM:
    case GGML_OP_RMS_NORM:
    case GGML_OP_SCALE:
    case GGML_OP_SQR:
    case GGML_OP_SUM_ROWS:
    case GGML_OP_UNARY:
        return only_first(dims) ? dims[0] : unclear_rows;
    default:
        return unclear_rows;
    }
}

} // namespace

int32_t row_dim(const ggml_tensor * node, int64_t n_rows,
                const std::function<int32_t(const ggml_tensor *)> & dim_of) {
    Dims dims;
    std::transform(std::begin(node->src), std::end(node->src), dims,
                   [&](const ggml_tensor * src) { return src == nullptr ? no_rows : dim_of(src); });
    if (op_of(node) == GGML_OP_GET_ROWS && only_first(dims) && dims[0] == no_rows) {
        const bool embeds = node->src[1]->ne[0] == n_rows && own_memory(node);
        return embeds ? 1 : unclear_rows;
    }
    const auto none = [](int32_t d) { return d == no_rows; };
    if (std::all_of(std::begin(dims), std::end(dims), none)) {
        return no_rows;
    }
    if (std::count(std::begin(dims), std::end(dims), unclear_rows) != 0) {
        return unclear_rows;
    }
    switch (op_of(node)) {
    case GGML_OP_SET_ROWS: // as many as its source has
        return only_first(dims) && is_outermost(node->src[0], dims[0]) ? no_rows : unclear_rows;
    case GGML_OP_RESHAPE:
        return of_reshape(node, dims[0], n_rows);
    case GGML_OP_VIEW:
        return of_view(node, dims[0], n_rows);
    case GGML_OP_PERMUTE:
        return of_permute(node, dims[0]);
    case GGML_OP_TRANSPOSE:
        return dims[0] > 1 ? dims[0] : unclear_rows;
    default:
        break;
    }
    const int32_t dim = own_memory(node) ? of_computed(node, n_rows, dims) : unclear_rows;
    return dim > 0 ? dim : unclear_rows;
}

int32_t row_dim_of_copy(const ggml_tensor * copy, const ggml_tensor * node, int32_t dim) {
    const bool same = std::equal(copy->ne, copy->ne + GGML_MAX_DIMS, node->ne);
    return same && dim > 0 && has_widest_stride(copy, dim) ? dim : unclear_rows;
}

const ggml_tensor * sectioned_positions(const ggml_tensor * node, int64_t n_rows) {
    if (op_of(node) != GGML_OP_ROPE) {
        return nullptr;
    }
    const ggml_tensor * positions = node->src[1];
    const bool input = op_of(positions) == GGML_OP_NONE && positions->view_src == nullptr;
    const bool several = positions->ne[0] == n_sections * n_rows;
    return input && several && positions->type == GGML_TYPE_I32 ? positions : nullptr;
}

void shrink_rows_inplace(ggml_tensor * node, int32_t dim, int64_t n_rows, int64_t n_kept) {
    node->ne[dim] = node->ne[dim] / n_rows * n_kept;
    const ggml_tensor * src = node->src[0];
    switch (op_of(node)) {
    case GGML_OP_NONE: // a copy
    case GGML_OP_VIEW:
        return;
    case GGML_OP_PERMUTE:
        for (int i = 0; i < GGML_MAX_DIMS; i++) {
            node->nb[node->op_params[i]] = src->nb[i];
        }
        return;
    case GGML_OP_TRANSPOSE:
        std::copy(src->nb, src->nb + GGML_MAX_DIMS, node->nb);
        std::swap(node->nb[0], node->nb[1]);
        return;
    default:
        node->nb[1] = api().ggml_row_size(node->type, node->ne[0]);
        for (int i = 2; i < GGML_MAX_DIMS; i++) {
            node->nb[i] = node->nb[i - 1] * static_cast<size_t>(node->ne[i - 1]);
        }
    }
}

} // namespace cmg
