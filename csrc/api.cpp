#include "api.hpp"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace cmg {
namespace {

Api bound;

// `struct ggml_object`, private to ggml.c, stands before every tensor: two sizes, a pointer, an
// enum, four bytes of padding.
constexpr size_t ggml_object_size = 32;

void check(bool ok, const std::string & what) {
    if (!ok) {
        throw std::runtime_error("the loaded ggml differs from the headers at build time: " + what);
    }
}

void check_tensor_layout(const Api & api) {
    check(api.ggml_tensor_overhead() == sizeof(ggml_tensor) + ggml_object_size,
          "sizeof(ggml_tensor)");
    ggml_init_params params = {4 * api.ggml_tensor_overhead(), nullptr, true};
    ggml_context * ctx = api.ggml_init(params);
    check(ctx != nullptr, "ggml_init");
    const ggml_tensor * t = api.ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 3, 5, 7, 11);
    api.ggml_set_name(const_cast<ggml_tensor *>(t), "abi");
    const bool same = t->type == GGML_TYPE_F16 && t->ne[0] == 3 && t->ne[3] == 11 &&
                      t->nb[1] == 6 && t->nb[2] == 30 && t->op == GGML_OP_NONE &&
                      t->src[0] == nullptr && t->view_src == nullptr && t->data == nullptr &&
                      std::strcmp(t->name, "abi") == 0;
    api.ggml_free(ctx);
    check(same, "fields of ggml_tensor");
}

void check_op_names(const Api & api) {
    const std::pair<ggml_op, const char *> ops[] = {
        {GGML_OP_FLASH_ATTN_EXT, "FLASH_ATTN_EXT"},
        {GGML_OP_SOFT_MAX, "SOFT_MAX"},
        {GGML_OP_SET_ROWS, "SET_ROWS"},
        {GGML_OP_MUL_MAT, "MUL_MAT"},
        {GGML_OP_SCALE, "SCALE"},
        {GGML_OP_UNARY, "UNARY"},
    };
    for (const auto & [op, name] : ops) {
        check(std::strcmp(api.ggml_op_name(op), name) == 0, std::string("operation ") + name);
    }
}

} // namespace

const Api & api() {
    return bound;
}

std::vector<std::string> required_functions() {
    return {
#define CMG_API_NAME(name) #name,
        CMG_API_FUNCTIONS(CMG_API_NAME)
#undef CMG_API_NAME
    };
}

void bind_api(const std::map<std::string, std::uintptr_t> & addresses) {
    Api next;
    const auto find = [&](const char * name) {
        const auto it = addresses.find(name);
        check(it != addresses.end() && it->second != 0, std::string("no function ") + name);
        return it->second;
    };
#define CMG_API_BIND(name) next.name = reinterpret_cast<decltype(next.name)>(find(#name));
    CMG_API_FUNCTIONS(CMG_API_BIND)
#undef CMG_API_BIND
    if (addresses.count("ggml_cpu_fp16_to_fp32") != 0) {
        next.ggml_cpu_fp16_to_fp32 = reinterpret_cast<decltype(next.ggml_cpu_fp16_to_fp32)>(
            addresses.at("ggml_cpu_fp16_to_fp32"));
    }
    check_tensor_layout(next);
    check_op_names(next);
    bound = next;
}

} // namespace cmg
