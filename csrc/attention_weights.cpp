#include "attention_weights.hpp"

#include "api.hpp"
#include "influence.hpp"

#include <cstring>

namespace cmg {
namespace {

// The bytes of a tensor (a view's own range) on the host: in place where they already are.
class HostView {
  public:
    HostView(const ggml_tensor * t, Transfers & transfers) {
        if (is_host(t)) {
            data_ = static_cast<const uint8_t *>(t->data);
            return;
        }
        bytes_ = transfers.read_all(t);
        data_ = bytes_.data();
    }
    const uint8_t * at(size_t offset) const { return data_ + offset; }

  private:
    std::vector<uint8_t> bytes_;
    const uint8_t * data_ = nullptr;
};

std::vector<float> read_queries(const ggml_tensor * q, const std::vector<int32_t> & rows,
                                Transfers & transfers) {
    const HostView view(q, transfers);
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

std::vector<float> AttentionWeights::read(const AttentionNode & a,
                                          const std::vector<int32_t> & rows,
                                          const std::vector<float> & mask,
                                          const std::vector<int32_t> & cells) {
    if (cells.empty()) {
        return {};
    }
    if (is_host(a.k)) {
        return on_host(a, rows, mask, cells);
    }
    const ggml_backend_dev_t device = device_of(a.k);
    InfluenceGraph & graph = graphs_.try_emplace(device, device, n_threads_).first->second;
    std::vector<float> weights;
    const std::string obstacle = graph.compute(a, rows, mask, cells, transfers_, weights);
    if (obstacle.empty()) {
        return weights;
    }
    host_reason_ = obstacle;
    return on_host(a, rows, mask, cells);
}

std::vector<float> AttentionWeights::on_host(const AttentionNode & a,
                                             const std::vector<int32_t> & rows,
                                             const std::vector<float> & mask,
                                             const std::vector<int32_t> & cells) {
    AttentionShape shape;
    shape.head_dim = a.q->ne[0];
    shape.n_head = a.q->ne[2];
    shape.n_head_kv = a.k->ne[2];
    shape.n_kv = a.k->ne[1];
    shape.scale = a.scale;
    shape.softcap = a.softcap;
    shape.max_bias = a.max_bias;

    AttentionInput in;
    in.q = read_queries(a.q, rows, transfers_);
    in.mask = mask;
    if (a.sinks != nullptr) {
        in.sinks.resize(static_cast<size_t>(shape.n_head));
        std::memcpy(in.sinks.data(), HostView(a.sinks, transfers_).at(0),
                    in.sinks.size() * sizeof(float));
    }
    const HostView k(a.k, transfers_);
    const ggml_type type = a.k->type;
    const bool packed = a.k->nb[2] == api().ggml_row_size(type, shape.head_dim);
    const int64_t n_runs = packed ? 1 : shape.n_head_kv;
    const int64_t run = shape.head_dim * shape.n_head_kv / n_runs;
    in.load_k = [&](int64_t cell, float * out) {
        for (int64_t i = 0; i < n_runs; i++) {
            const size_t offset =
                static_cast<size_t>(cell) * a.k->nb[1] + static_cast<size_t>(i) * a.k->nb[2];
            to_float(type, k.at(offset), out + i * run, run);
        }
    };
    const std::vector<float> all = attention_rows(shape, in, n_threads_);
    std::vector<float> weights;
    weights.reserve(rows.size() * cells.size());
    for (size_t row = 0; row < rows.size(); row++) {
        for (const int32_t cell : cells) {
            weights.push_back(
                all[row * static_cast<size_t>(shape.n_kv) + static_cast<size_t>(cell)]);
        }
    }
    return weights;
}

} // namespace cmg
