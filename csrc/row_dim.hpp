// Which dimension of a graph's node counts the rows of the batch, and how a node looks with fewer.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>

namespace cmg {

constexpr int32_t no_rows = -1;      // weights, caches, and what is computed from them alone
constexpr int32_t unclear_rows = -2; // computed from rows in a way that is not understood here

// The dimension of `node` along which its n_rows > 1 rows lie (a multiple of them where dimensions
// are merged), never 0. dim_of: the same of each of its sources; `no_rows` for what is no node.
int32_t row_dim(const ggml_tensor * node, int64_t n_rows,
                const std::function<int32_t(const ggml_tensor *)> & dim_of);

// The same of another backend's copy of `node`, whose rows lie along `dim`.
int32_t row_dim_of_copy(const ggml_tensor * copy, const ggml_tensor * node, int32_t dim);

// The input that `node` reads positions from, if a row has several, which lie section by section
// (M-RoPE): the first one of every row, then the second one of every row. Else null.
const ggml_tensor * sectioned_positions(const ggml_tensor * node, int64_t n_rows);

// Leaves the first n_kept of n_rows rows along `dim`. Its sources must have been shrunk before.
// A copy keeps its strides.
void shrink_rows_inplace(ggml_tensor * node, int32_t dim, int64_t n_rows, int64_t n_kept);

} // namespace cmg
