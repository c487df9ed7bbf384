#include "bindings.hpp"
#include "influence.hpp"
#include "policy.hpp"

#include <cstring>
#include <stdexcept>

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
}

} // namespace cmg
