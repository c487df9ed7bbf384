#include "operations.hpp"

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cmg {
namespace {

#define CMG_OPERATIONS(X) \
    X(ADD)                \
    X(ARGSORT)            \
    X(CLAMP)              \
    X(CONCAT)             \
    X(CONT)               \
    X(CPY)                \
    X(DIV)                \
    X(FLASH_ATTN_EXT)     \
    X(GET_ROWS)           \
    X(GLU)                \
    X(L2_NORM)            \
    X(MUL)                \
    X(MUL_MAT)            \
    X(MUL_MAT_ID)         \
    X(NONE)               \
    X(NORM)               \
    X(PAD)                \
    X(PERMUTE)            \
    X(REPEAT)             \
    X(RESHAPE)            \
    X(RMS_NORM)           \
    X(ROPE)               \
    X(SCALE)              \
    X(SET_ROWS)           \
    X(SOFT_MAX)           \
    X(SQR)                \
    X(SUB)                \
    X(SUM_ROWS)           \
    X(TRANSPOSE)          \
    X(UNARY)              \
    X(VIEW)

// ggml keeps the table of its operations' names before one of as many symbols, and checks no
// bounds: this many numbers can be asked about while it has 64 operations or more (it has 96).
constexpr int n_op_numbers = 128;
constexpr int n_kind_numbers = 16; // of unary and gated operations; ours are among the first

std::array<ggml_op, n_op_numbers> as_here;
LoadedNumbers loaded;

template <typename Number>
Number number_of(const char * (*name_of)(Number), int n_numbers, const char * name) {
    for (int i = 0; i < n_numbers; i++) {
        const char * found = name_of(static_cast<Number>(i));
        if (found != nullptr && std::strcmp(found, name) == 0) {
            return static_cast<Number>(i);
        }
    }
    throw std::runtime_error(std::string("the loaded ggml has no operation ") + name);
}

} // namespace

ggml_op op_of(const ggml_tensor * node) {
    const auto number = static_cast<size_t>(node->op);
    return number < as_here.size() ? as_here[number] : GGML_OP_COUNT;
}

const LoadedNumbers & loaded_numbers() {
    return loaded;
}

void resolve_operations(const Api & api) {
    std::array<ggml_op, n_op_numbers> next;
    next.fill(GGML_OP_COUNT);
    const auto op = [&](const char * name) {
        return number_of(api.ggml_op_name, n_op_numbers, name);
    };
#define CMG_RESOLVE(name) next[static_cast<size_t>(op(#name))] = GGML_OP_##name;
    CMG_OPERATIONS(CMG_RESOLVE)
#undef CMG_RESOLVE
    const LoadedNumbers numbers = {
        op("NONE"),
        op("PERMUTE"),
        number_of(api.ggml_unary_op_name, n_kind_numbers, "TANH"),
        number_of(api.ggml_unary_op_name, n_kind_numbers, "GELU"),
        number_of(api.ggml_unary_op_name, n_kind_numbers, "GELU_QUICK"),
        number_of(api.ggml_glu_op_name, n_kind_numbers, "GEGLU"),
        number_of(api.ggml_glu_op_name, n_kind_numbers, "GEGLU_QUICK"),
    };
    as_here = next;
    loaded = numbers;
}

} // namespace cmg
