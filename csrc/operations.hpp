// Operations by name. A release of ggml that adds one moves the numbers of those behind it, so the
// numbers of the loaded ggml are looked up once, at import, and every node is read through them.
#pragma once

#include "api.hpp"

namespace cmg {

// What a node computes, as these headers number it; GGML_OP_COUNT where nothing here asks for it.
ggml_op op_of(const ggml_tensor * node);

// The loaded ggml's numbers of what is written into nodes, or compared as it is.
struct LoadedNumbers {
    ggml_op none = GGML_OP_NONE;
    ggml_op permute = GGML_OP_PERMUTE;
    ggml_unary_op tanh = GGML_UNARY_OP_TANH;
    ggml_unary_op gelu = GGML_UNARY_OP_GELU;
    ggml_unary_op gelu_quick = GGML_UNARY_OP_GELU_QUICK;
    ggml_glu_op geglu = GGML_GLU_OP_GEGLU;
    ggml_glu_op geglu_quick = GGML_GLU_OP_GEGLU_QUICK;
};
const LoadedNumbers & loaded_numbers();

// Looks the numbers up. Throws std::runtime_error naming an operation that the ggml has not.
void resolve_operations(const Api & api);

} // namespace cmg
