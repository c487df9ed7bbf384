#include "attention_node.hpp"

#include "api.hpp"
#include "influence.hpp"
#include "operations.hpp"

#include <cstdlib>
#include <cstring>

namespace cmg {
namespace {

// The bytes of a tensor (a view's own range) on the host: in place where they already are.
class HostView {
  public:
    explicit HostView(const ggml_tensor * t) {
        if (api().ggml_backend_buffer_is_host(root(t)->buffer)) {
            data_ = static_cast<const uint8_t *>(t->data);
            return;
        }
        bytes_.resize(api().ggml_nbytes(t));
        api().ggml_backend_tensor_get(t, bytes_.data(), 0, bytes_.size());
        data_ = bytes_.data();
    }
    const uint8_t * at(size_t offset) const { return data_ + offset; }

  private:
    std::vector<uint8_t> bytes_;
    const uint8_t * data_ = nullptr;
};

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

std::vector<float> read_queries(const ggml_tensor * q, const std::vector<int32_t> & rows) {
    const HostView view(q);
    const auto dim = static_cast<size_t>(q->ne[0]);
    const auto n_head = static_cast<size_t>(q->ne[2]);
    std::vector<float> out(rows.size() * n_head * dim);
    for (size_t i = 0; i < rows.size(); i++) {
        for (size_t h = 0; h < n_head; h++) {
            std::memcpy(out.data() + (i * n_head + h) * dim,
                        view.at(static_cast<size_t>(rows[i]) * q->nb[1] + h * q->nb[2]),
                        dim * sizeof(float));
        }
    }
    return out;
}

} // namespace

const ggml_tensor * root(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
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

std::vector<float> read_attention(const AttentionNode & node, const std::vector<int32_t> & rows,
                                  const std::vector<float> & mask, int32_t n_threads) {
    AttentionShape shape;
    shape.head_dim = node.q->ne[0];
    shape.n_head = node.q->ne[2];
    shape.n_head_kv = node.k->ne[2];
    shape.n_kv = node.k->ne[1];
    shape.scale = node.scale;
    shape.softcap = node.softcap;
    shape.max_bias = node.max_bias;

    AttentionInput in;
    in.q = read_queries(node.q, rows);
    in.mask = mask;
    if (node.sinks != nullptr) {
        in.sinks.resize(static_cast<size_t>(shape.n_head));
        std::memcpy(in.sinks.data(), HostView(node.sinks).at(0), in.sinks.size() * sizeof(float));
    }
    const HostView k(node.k);
    const ggml_type type = node.k->type;
    const bool packed = node.k->nb[2] == api().ggml_row_size(type, shape.head_dim);
    const int64_t n_runs = packed ? 1 : shape.n_head_kv;
    const int64_t run = shape.head_dim * shape.n_head_kv / n_runs;
    in.load_k = [&](int64_t cell, float * out) {
        for (int64_t i = 0; i < n_runs; i++) {
            const size_t offset =
                static_cast<size_t>(cell) * node.k->nb[1] + static_cast<size_t>(i) * node.k->nb[2];
            to_float(type, k.at(offset), out + i * run, run);
        }
    };
    return attention_rows(shape, in, n_threads);
}

} // namespace cmg
