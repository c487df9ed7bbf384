#include "api.hpp"

#include "operations.hpp"

#include <cstring>
#include <stdexcept>

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
    ggml_context * ctx = api.ggml_init({8 * api.ggml_tensor_overhead(), nullptr, true});
    check(ctx != nullptr, "ggml_init");
    ggml_tensor * mask = api.ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 3, 5, 1, 1);
    ggml_tensor * q = api.ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 8, 5, 2, 1);
    ggml_tensor * k = api.ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 8, 3, 2, 1);
    ggml_tensor * node = api.ggml_flash_attn_ext(ctx, q, k, k, mask, 0.25f, 2.0f, 30.0f);
    api.ggml_set_name(mask, "abi");
    float params[3];
    std::memcpy(params, node->op_params, sizeof(params));
    const bool leaf = mask->type == GGML_TYPE_F16 && mask->ne[0] == 3 && mask->ne[1] == 5 &&
                      mask->nb[1] == 6 && mask->nb[2] == 30 && op_of(mask) == GGML_OP_NONE &&
                      mask->src[0] == nullptr && mask->view_src == nullptr &&
                      mask->data == nullptr && std::strcmp(mask->name, "abi") == 0;
    const bool attention = op_of(node) == GGML_OP_FLASH_ATTN_EXT && node->src[0] == q &&
                           node->src[1] == k && node->src[3] == mask && params[0] == 0.25f &&
                           params[1] == 2.0f && params[2] == 30.0f;
    api.ggml_free(ctx);
    check(leaf && attention, "fields of ggml_tensor");
}

// A sampler of ours must be called as these headers say, on tokens laid out as they say.
void check_sampler_layout(const Api & api) {
    static SamplerInterface interface;
    interface.known.name = [](const llama_sampler *) { return "abi"; };
    interface.known.apply = [](llama_sampler *, llama_token_data_array * cur) {
        const bool same = cur->size == 2 && cur->data[1].id == 7 && cur->data[1].logit == 0.5f;
        cur->selected = same ? 1 : 0;
    };
    llama_token_data tokens[] = {{3, 1.0f, 0.0f}, {7, 0.5f, 0.0f}};
    llama_token_data_array all = {tokens, 2, -1, false};
    llama_sampler * sampler = api.llama_sampler_init(&interface.known, nullptr);
    const bool named = std::strcmp(api.llama_sampler_name(sampler), "abi") == 0;
    api.llama_sampler_apply(sampler, &all);
    api.llama_sampler_free(sampler);
    check(named && all.selected == 1, "llama_sampler");
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
    resolve_operations(next);
    check_tensor_layout(next);
    check_sampler_layout(next);
    bound = next;
}

} // namespace cmg
