#include "attention_node.hpp"

#include "api.hpp"
#include "operations.hpp"

#include <cstdlib>
#include <cstring>

namespace cmg {
namespace {

float op_param(const ggml_tensor * t, size_t i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char *>(t->op_params) + i * sizeof(float),
                sizeof(float));
    return value;
}

AttentionNode from_flash(const ggml_tensor * node) {
    AttentionNode a;
    a.mask_src = 3;
    a.q = node->src[0];
    a.k = node->src[1];
    if (op_of(a.k) == GGML_OP_CPY) {
        a.k = a.k->src[0]; // an F32 cache is cast, and the cast is not computed when we are asked
    }
    a.sinks = node->src[4];
    a.scale = op_param(node, 0);
    a.max_bias = op_param(node, 1);
    a.softcap = op_param(node, 2);
    return a;
}

// kq = K q, then for some models outer * tanh(inner * kq), then SOFT_MAX(scale * that + mask).
AttentionNode from_soft_max(const ggml_tensor * node, const ggml_tensor * product) {
    float outer = 1.0f;
    float inner = 1.0f;
    bool capped = false;
    const ggml_tensor * kq = node->src[0];
    if (product != nullptr && op_of(kq) == GGML_OP_NONE && copied_name(kq) == product->name) {
        kq = product;
    }
    for (; kq != nullptr && op_of(kq) != GGML_OP_MUL_MAT; kq = kq->src[0]) {
        if (op_of(kq) == GGML_OP_SCALE && op_param(kq, 1) == 0.0f) {
            (capped ? inner : outer) *= op_param(kq, 0);
        } else if (op_of(kq) == GGML_OP_UNARY && !capped &&
                   api().ggml_get_unary_op(kq) == loaded_numbers().tanh) {
            capped = true;
        } else {
            return {};
        }
    }
    if (kq == nullptr) {
        return {};
    }
    AttentionNode a;
    a.mask_src = 1;
    a.k = kq->src[0];
    a.q = kq->src[1];
    a.sinks = node->src[2];
    a.max_bias = op_param(node, 1);
    // In the terms of AttentionShape: softcap * tanh(scale * kq / softcap).
    a.softcap = capped ? outer * op_param(node, 0) : 0.0f;
    a.scale = capped ? inner * a.softcap : outer * op_param(node, 0);
    return a;
}

} // namespace

const ggml_tensor * root(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
}

bool is_host(const ggml_tensor * t) {
    return api().ggml_backend_buffer_is_host(root(t)->buffer);
}

// The CPU's buffers do not name it.
ggml_backend_dev_t device_of(const ggml_tensor * t) {
    const ggml_backend_dev_t named =
        api().ggml_backend_buft_get_device(api().ggml_backend_buffer_get_type(root(t)->buffer));
    return named != nullptr ? named : api().ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

int32_t layer_in_name(const ggml_tensor * t, const char * prefix) {
    // A copy for another backend is named "CUDA0#<name>#0".
    const char * copied = std::strchr(t->name, '#');
    const char * name = copied != nullptr ? copied + 1 : t->name;
    const size_t n = std::strlen(prefix);
    const bool matches = std::strncmp(name, prefix, n) == 0 && name[n] >= '0' && name[n] <= '9';
    return matches ? std::atoi(name + n) : -1;
}

std::string copied_name(const ggml_tensor * t) {
    const char * begin = std::strchr(t->name, '#');
    const char * end = std::strrchr(t->name, '#');
    return begin != nullptr && end > begin ? std::string(begin + 1, end) : std::string();
}

bool is_computed(const ggml_tensor * t) {
    return op_of(root(t)) != GGML_OP_NONE;
}

void check_mask(const AttentionNode & a, int64_t n_rows) {
    const ggml_tensor * mask = a.mask;
    const bool known_type = mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32;
    const bool one = mask->ne[0] == a.k->ne[1] && mask->ne[2] == 1 && mask->ne[3] == 1;
    if (!known_type || !one || mask->ne[1] < n_rows) {
        throw layer_error(a.il, "the attention mask is not one [n_kv, n_tokens] matrix of F16 or "
                                "F32 (the context needs kv_unified = true)");
    }
}

std::runtime_error layer_error(int32_t il, const std::string & what) {
    return std::runtime_error("layer " + std::to_string(il) + ": " + what);
}

void to_float(ggml_type type, const uint8_t * from, float * to, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        const auto convert = api().ggml_cpu_fp16_to_fp32 != nullptr ? api().ggml_cpu_fp16_to_fp32
                                                                    : api().ggml_fp16_to_fp32_row;
        convert(reinterpret_cast<const ggml_fp16_t *>(from), to, n);
    } else {
        api().ggml_get_type_traits(type)->to_float(from, to, n);
    }
}

AttentionNode find_attention(const ggml_tensor * node, const ggml_tensor * product) {
    AttentionNode a = op_of(node) == GGML_OP_FLASH_ATTN_EXT ? from_flash(node)
                      : op_of(node) == GGML_OP_SOFT_MAX     ? from_soft_max(node, product)
                                                            : AttentionNode{};
    if (a.mask_src >= 0 && node->src[a.mask_src] != nullptr) {
        a.mask = node->src[a.mask_src];
        a.cache_il = layer_in_name(root(a.k), "cache_k_l");
    }
    return a;
}

} // namespace cmg
