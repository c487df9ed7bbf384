#include "api.hpp"
#include "attention_node.hpp"
#include "bindings.hpp"
#include "influence.hpp"
#include "influence_graph.hpp"
#include "policy.hpp"
#include "transfers.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace cmg {
namespace {

py::array_t<int32_t> select(const TokenPolicy & policy, const Array<float> & influence) {
    return to_array(select_tokens(policy, influence.data(), static_cast<size_t>(influence.size())));
}

py::array_t<float> attention(const Array<float> & q, const Array<float> & k,
                             const Array<float> & mask, float scale, float softcap, float max_bias,
                             const Array<float> & sinks, int32_t n_threads) {
    if (q.ndim() != 3 || k.ndim() != 3 || mask.ndim() != 2 || q.shape(0) != mask.shape(0) ||
        k.shape(0) != mask.shape(1) || k.shape(2) != q.shape(2) || k.shape(1) == 0 ||
        q.shape(1) % k.shape(1) != 0 || (sinks.size() != 0 && sinks.size() != q.shape(1))) {
        throw std::invalid_argument("q is [n_rows, n_head, head_dim], k is [n_kv, n_head_kv, "
                                    "head_dim], mask is [n_rows, n_kv], sinks is [n_head] or []");
    }
    AttentionShape shape;
    shape.n_head = q.shape(1);
    shape.n_head_kv = k.shape(1);
    shape.head_dim = q.shape(2);
    shape.n_kv = k.shape(0);
    shape.scale = scale;
    shape.softcap = softcap;
    shape.max_bias = max_bias;
    AttentionInput in;
    in.q.assign(q.data(), q.data() + q.size());
    in.mask.assign(mask.data(), mask.data() + mask.size());
    in.sinks.assign(sinks.data(), sinks.data() + sinks.size());
    const int64_t width = shape.n_head_kv * shape.head_dim;
    in.load_k = [&](int64_t cell, float * out) {
        std::memcpy(out, k.data() + cell * width, static_cast<size_t>(width) * sizeof(float));
    };
    const auto rows = attention_rows(shape, in, n_threads);
    return py::array_t<float>({mask.shape(0), mask.shape(1)}, rows.data());
}

// Tensors in one buffer of a device, one behind the other, for as long as this lives.
class OnDevice {
  public:
    OnDevice(ggml_backend_dev_t device, size_t n_bytes)
        : buffer_(api().ggml_backend_buft_alloc_buffer(api().ggml_backend_dev_buffer_type(device),
                                                       n_bytes + 4 * alignment)),
          ctx_(api().ggml_init({8 * api().ggml_tensor_overhead(), nullptr, true})) {
        if (buffer_ == nullptr || ctx_ == nullptr) {
            throw std::runtime_error("no memory for " + std::to_string(n_bytes) + " bytes");
        }
    }
    ~OnDevice() {
        api().ggml_free(ctx_);
        api().ggml_backend_buffer_free(buffer_);
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice & operator=(const OnDevice &) = delete;

    // [ne0, ne1, ne2] with the given bytes.
    ggml_tensor * put(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void * bytes) {
        ggml_tensor * t = api().ggml_new_tensor_4d(ctx_, type, ne0, ne1, ne2, 1);
        auto * base = static_cast<char *>(api().ggml_backend_buffer_get_base(buffer_));
        api().ggml_backend_tensor_alloc(buffer_, t, base + used_);
        api().ggml_backend_tensor_set(t, bytes, 0, api().ggml_nbytes(t));
        used_ += (api().ggml_nbytes(t) + alignment - 1) / alignment * alignment;
        return t;
    }
    // Its dimensions 1 and 2 change places.
    ggml_tensor * turned(ggml_tensor * t) { return api().ggml_permute(ctx_, t, 0, 2, 1, 3); }

  private:
    static constexpr size_t alignment = 256;
    ggml_backend_buffer_t buffer_;
    ggml_context * ctx_;
    size_t used_ = 0;
};

// What attention_rows returns of `rows` and `cells`, computed by the device. k: the cache's bytes,
// [n_kv, n_head_kv, head_dim] of `type_k`.
py::array_t<float> attention_on(const std::string & device, const Array<float> & q,
                                const Array<uint8_t> & k, int32_t type_k, int64_t n_head_kv,
                                const Array<float> & mask, const std::vector<int32_t> & rows,
                                const std::vector<int32_t> & cells, float scale, float softcap,
                                float max_bias, const Array<float> & sinks, int32_t n_threads) {
    const ggml_backend_dev_t dev = api().ggml_backend_dev_by_name(device.c_str());
    const auto type = static_cast<ggml_type>(type_k);
    const auto n_kv = static_cast<size_t>(mask.shape(1));
    const auto inside = [](const std::vector<int32_t> & all, py::ssize_t n) {
        return std::all_of(all.begin(), all.end(), [n](int32_t i) { return i >= 0 && i < n; });
    };
    if (dev == nullptr) {
        throw std::invalid_argument("no device " + device);
    }
    if (q.ndim() != 3 || mask.ndim() != 2 || q.shape(0) != mask.shape(0) || n_head_kv < 1 ||
        q.shape(1) % n_head_kv != 0 || cells.empty() || !inside(rows, q.shape(0)) ||
        !inside(cells, mask.shape(1)) || (sinks.size() != 0 && sinks.size() != q.shape(1)) ||
        static_cast<size_t>(k.size()) != n_kv * api().ggml_row_size(type, q.shape(2) * n_head_kv)) {
        throw std::invalid_argument("q is [n_rows, n_head, head_dim], k the bytes of [n_kv, "
                                    "n_head_kv, head_dim], mask is [n_rows, n_kv], sinks is "
                                    "[n_head] or []; rows and cells count from 0");
    }
    OnDevice memory(dev, static_cast<size_t>(q.nbytes() + k.nbytes() + sinks.nbytes()));
    AttentionNode a;
    a.q = memory.turned(memory.put(GGML_TYPE_F32, q.shape(2), q.shape(1), q.shape(0), q.data()));
    a.k = memory.turned(
        memory.put(type, q.shape(2), n_head_kv, static_cast<int64_t>(n_kv), k.data()));
    a.sinks =
        sinks.size() == 0 ? nullptr : memory.put(GGML_TYPE_F32, sinks.size(), 1, 1, sinks.data());
    for (ggml_tensor * t : {const_cast<ggml_tensor *>(a.q), const_cast<ggml_tensor *>(a.k)}) {
        t->data = t->view_src->data;
        t->buffer = t->view_src->buffer;
    }
    a.scale = scale;
    a.softcap = softcap;
    a.max_bias = max_bias;
    std::vector<float> of_rows;
    for (const int32_t row : rows) {
        of_rows.insert(of_rows.end(), mask.data(row), mask.data(row) + n_kv);
    }
    Transfers transfers;
    std::vector<float> weights;
    InfluenceGraph graph(dev, n_threads);
    const std::string obstacle = graph.compute(a, rows, of_rows, cells, transfers, weights);
    if (!obstacle.empty()) {
        throw std::runtime_error(obstacle);
    }
    return py::array_t<float>({rows.size(), cells.size()}, weights.data());
}

} // namespace

void bind_policies(py::module_ & m) {
    py::enum_<TokenRule>(m, "TokenRule")
        .value("top_ratio", TokenRule::top_ratio)
        .value("mean_std", TokenRule::mean_std)
        .value("cumulative_mass", TokenRule::cumulative_mass);
    py::class_<TokenPolicy>(m, "TokenPolicy")
        .def(py::init([](TokenRule rule, double value) { return TokenPolicy{rule, value}; }),
             py::arg("rule"), py::arg("value"));
    m.def("select_tokens", &select, py::arg("policy"), py::arg("influence"));
    m.def("attention_rows", &attention, py::arg("q"), py::arg("k"), py::arg("mask"), py::kw_only(),
          py::arg("scale"), py::arg("softcap") = 0.0f, py::arg("max_bias") = 0.0f,
          py::arg("sinks") = Array<float>(0), py::arg("n_threads") = 1);
    m.def("attention_on", &attention_on, py::arg("device"), py::arg("q"), py::arg("k"),
          py::arg("type_k"), py::arg("n_head_kv"), py::arg("mask"), py::arg("rows"),
          py::arg("cells"), py::kw_only(), py::arg("scale"), py::arg("softcap") = 0.0f,
          py::arg("max_bias") = 0.0f, py::arg("sinks") = Array<float>(0), py::arg("n_threads") = 1);
}

} // namespace cmg
