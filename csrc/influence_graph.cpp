#include "influence_graph.hpp"

#include "api.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace cmg {
namespace {

constexpr size_t most_nodes = 32;
constexpr size_t row_block = 32; // rows at once: bounds the scores of a long prompt

// A leaf over the memory of `t`, from row (dimension 1) `first` on.
ggml_tensor * leaf_over(ggml_context * ctx, const ggml_tensor * t, int64_t first, int64_t n_rows) {
    ggml_tensor * leaf = api().ggml_new_tensor_4d(ctx, t->type, t->ne[0], n_rows, t->ne[2], 1);
    std::copy(std::begin(t->nb), std::end(t->nb), leaf->nb);
    leaf->buffer = root(t)->buffer;
    leaf->data = static_cast<char *>(t->data) + static_cast<size_t>(first) * t->nb[1];
    return leaf;
}

ggml_tensor * input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = api().ggml_new_tensor_4d(ctx, type, ne0, ne1, 1, 1);
    t->flags |= GGML_TENSOR_FLAG_INPUT;
    return t;
}

// K [head_dim, n_kv, n_head_kv] as floats that a product takes without rounding q to K's type.
// ggml's Vulkan rounds F32 to F16 where it is not contiguous.
ggml_tensor * keys(ggml_context * ctx, const AttentionNode & a) {
    ggml_tensor * k = leaf_over(ctx, a.k, 0, a.k->ne[1]);
    if (k->type == GGML_TYPE_F16) {
        return k;
    }
    if (k->type == GGML_TYPE_F32) {
        return api().ggml_cont(ctx, k);
    }
    // As the cache has it, so that what is cast is contiguous: [head_dim * n_head_kv, n_kv].
    const int64_t width = k->ne[0] * k->ne[2];
    ggml_tensor * cache = api().ggml_new_tensor_4d(ctx, k->type, width, k->ne[1], 1, 1);
    cache->buffer = k->buffer;
    cache->data = k->data;
    ggml_tensor * cast = api().ggml_cast(ctx, cache, GGML_TYPE_F32);
    ggml_tensor * heads = api().ggml_reshape_3d(ctx, cast, k->ne[0], k->ne[2], k->ne[1]);
    return api().ggml_cont(ctx, api().ggml_permute(ctx, heads, 0, 2, 1, 3));
}

} // namespace

// Of `n_rows` consecutive rows.
struct InfluenceGraph::Graph {
    Graph(std::vector<uint8_t> & memory, const AttentionNode & a, int64_t first, int64_t n_rows,
          int64_t n_cells)
        : ctx(api().ggml_init({memory.size(), memory.data(), true})) {
        if (ctx == nullptr) {
            throw std::runtime_error("ggml_init failed");
        }
        ggml_tensor * q = api().ggml_cont(ctx, leaf_over(ctx, a.q, first, n_rows));
        ggml_tensor * scores = api().ggml_mul_mat(ctx, keys(ctx, a), q);
        const int32_t precision = GGML_PREC_F32;
        std::memcpy(scores->op_params, &precision, sizeof(precision));
        float scale = a.scale;
        if (a.softcap > 0.0f) {
            scores = api().ggml_tanh(ctx, api().ggml_scale(ctx, scores, scale / a.softcap));
            scale = a.softcap;
        }
        mask = input(ctx, GGML_TYPE_F32, a.k->ne[1], n_rows);
        ggml_tensor * weights = api().ggml_soft_max_ext(ctx, scores, mask, scale, a.max_bias);
        if (a.sinks != nullptr) {
            api().ggml_soft_max_add_sinks(weights, leaf_over(ctx, a.sinks, 0, 1));
        }
        ggml_tensor * by_head = api().ggml_cont(ctx, api().ggml_permute(ctx, weights, 1, 2, 0, 3));
        cells = input(ctx, GGML_TYPE_I32, n_cells, n_rows);
        sums = api().ggml_get_rows(ctx, api().ggml_sum_rows(ctx, by_head), cells);
        sums->flags |= GGML_TENSOR_FLAG_OUTPUT;
        graph = api().ggml_new_graph_custom(ctx, most_nodes, false);
        api().ggml_build_forward_expand(graph, sums);
    }
    ~Graph() { api().ggml_free(ctx); }
    Graph(const Graph &) = delete;
    Graph & operator=(const Graph &) = delete;

    ggml_context * ctx;
    ggml_tensor * mask;  // [n_kv, n_rows] F32
    ggml_tensor * cells; // [n_cells, n_rows] I32, the same for each row
    ggml_tensor * sums;  // [1, n_cells, n_rows] F32: over heads
    ggml_cgraph * graph;
};

void InfluenceGraph::Free::operator()(ggml_backend * backend) const {
    api().ggml_backend_free(backend);
}

void InfluenceGraph::Free::operator()(ggml_gallocr * allocator) const {
    api().ggml_gallocr_free(allocator);
}

std::string InfluenceGraph::compute(const AttentionNode & a, const std::vector<int32_t> & rows,
                                    const std::vector<float> & mask,
                                    const std::vector<int32_t> & cells, Transfers & transfers,
                                    std::vector<float> & weights) {
    const bool together =
        device_of(a.q) == device_ && (a.sinks == nullptr || device_of(a.sinks) == device_);
    const bool packed = a.k->nb[2] == api().ggml_row_size(a.k->type, a.k->ne[0]) &&
                        a.k->nb[1] == api().ggml_row_size(a.k->type, a.k->ne[0] * a.k->ne[2]);
    const bool direct = a.k->type == GGML_TYPE_F32 || a.k->type == GGML_TYPE_F16;
    if (!together || (!packed && !direct)) {
        return together ? "K is quantised, and more than K lies in its rows"
                        : "q, K and sinks lie on several devices";
    }
    if (nodes_.empty()) {
        nodes_.resize(2 * most_nodes * api().ggml_tensor_overhead() +
                      api().ggml_graph_overhead_custom(most_nodes, false));
    }
    const auto n_kv = static_cast<size_t>(a.k->ne[1]);
    std::vector<float> found(rows.size() * cells.size());
    for (size_t i = 0, n = 0; i < rows.size(); i += n) {
        n = 1;
        while (n < row_block && i + n < rows.size() && rows[i + n] == rows[i + n - 1] + 1) {
            n++;
        }
        const Graph graph(nodes_, a, rows[i], static_cast<int64_t>(n),
                          static_cast<int64_t>(cells.size()));
        std::string obstacle = unsupported(graph.graph);
        if (!obstacle.empty()) {
            return obstacle;
        }
        std::vector<int32_t> of_all_rows;
        for (size_t row = 0; row < n; row++) {
            of_all_rows.insert(of_all_rows.end(), cells.begin(), cells.end());
        }
        prepare(graph);
        api().ggml_backend_tensor_set(graph.mask, mask.data() + i * n_kv, 0,
                                      n * n_kv * sizeof(float));
        api().ggml_backend_tensor_set(graph.cells, of_all_rows.data(), 0,
                                      of_all_rows.size() * sizeof(int32_t));
        if (api().ggml_backend_graph_compute(backend_.get(), graph.graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error(std::string(api().ggml_backend_dev_name(device_)) +
                                     " failed to compute the attention of a row");
        }
        transfers.read(graph.sums, found.data() + i * cells.size(), 0,
                       n * cells.size() * sizeof(float));
    }
    for (float & weight : found) {
        weight /= static_cast<float>(a.q->ne[2]);
    }
    weights = std::move(found);
    return "";
}

std::string InfluenceGraph::unsupported(ggml_cgraph * graph) const {
    for (int i = 0; i < api().ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * node = api().ggml_graph_node(graph, i);
        if (!api().ggml_backend_dev_supports_op(device_, node)) {
            return std::string(api().ggml_backend_dev_name(device_)) + " has no " +
                   api().ggml_op_name(node->op) + " of this kind";
        }
    }
    return "";
}

// Makes the backend where there is none yet, and gives the graph its memory.
void InfluenceGraph::prepare(const Graph & graph) {
    const std::string name = api().ggml_backend_dev_name(device_);
    if (backend_ == nullptr) {
        backend_.reset(api().ggml_backend_dev_init(device_, nullptr));
        if (backend_ == nullptr) {
            throw std::runtime_error(name + " cannot be used a second time: no memory is left?");
        }
        const auto set_n_threads =
            reinterpret_cast<ggml_backend_set_n_threads_t>(api().ggml_backend_reg_get_proc_address(
                api().ggml_backend_dev_backend_reg(device_), "ggml_backend_set_n_threads"));
        if (set_n_threads != nullptr) {
            set_n_threads(backend_.get(), n_threads_);
        }
        allocator_.reset(
            api().ggml_gallocr_new(api().ggml_backend_get_default_buffer_type(backend_.get())));
    }
    if (!api().ggml_gallocr_alloc_graph(allocator_.get(), graph.graph)) {
        throw std::runtime_error(name + " has no memory for the attention of the observed rows");
    }
}

} // namespace cmg
