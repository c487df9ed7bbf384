#include "influence.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

// The dot products are most of the work here. A wheel is built for the oldest x86-64; let the
// loader pick the AVX2 clone where the CPU has it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CMG_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CMG_CLONES
#endif

namespace cmg {
namespace {

constexpr float neg_inf = -std::numeric_limits<float>::infinity();
constexpr size_t row_block = 32; // rows at once: bounds the scores of a long prompt
constexpr size_t tile = 32;      // cells at once: their keys of one head stay in the L1 cache
constexpr size_t worth_threads = size_t{1} << 21; // multiplications

// out[i] = q . k[i] for n keys of dim floats each.
CMG_CLONES void dots(const float * q, const float * k, size_t n, size_t dim, float * out) {
    constexpr size_t lanes = 16; // independent sums: lets the compiler use vector registers
    for (size_t i = 0; i < n; i++, k += dim) {
        float sums[lanes] = {};
        size_t x = 0;
        for (; x + lanes <= dim; x += lanes) {
            for (size_t j = 0; j < lanes; j++) {
                sums[j] += q[x + j] * k[x + j];
            }
        }
        float total = 0;
        for (size_t j = 0; j < lanes; j++) {
            total += sums[j];
        }
        for (; x < dim; x++) {
            total += q[x] * k[x];
        }
        out[i] = total;
    }
}

// Slope of head h under ALiBi, as ggml_soft_max_ext and ggml_flash_attn_ext define it.
float alibi_slope(const AttentionShape & shape, size_t h) {
    if (shape.max_bias <= 0.0f) {
        return 1.0f;
    }
    const double n = std::exp2(std::floor(std::log2(static_cast<double>(shape.n_head))));
    const double head = static_cast<double>(h);
    const double exponent = head < n ? head + 1 : head - n + 0.5;
    return static_cast<float>(std::exp2(-shape.max_bias / n * exponent));
}

// Scores of one head to weights, in place.
void soft_max(const AttentionShape & shape, size_t head, const float * mask, const float * sink,
              float * scores, size_t n) {
    const float slope = alibi_slope(shape, head);
    float highest = sink != nullptr ? *sink : neg_inf;
    for (size_t j = 0; j < n; j++) {
        float s = scores[j] * shape.scale;
        if (shape.softcap > 0.0f) {
            s = shape.softcap * std::tanh(s / shape.softcap);
        }
        scores[j] = s + slope * mask[j];
        highest = std::max(highest, scores[j]);
    }
    if (highest == neg_inf) {
        std::fill_n(scores, n, 0.0f);
        return;
    }
    double total = sink != nullptr ? std::exp(static_cast<double>(*sink) - highest) : 0.0;
    for (size_t j = 0; j < n; j++) {
        scores[j] = std::exp(scores[j] - highest);
        total += scores[j];
    }
    const auto weight = static_cast<float>(1.0 / total);
    for (size_t j = 0; j < n; j++) {
        scores[j] *= weight;
    }
}

// Cells that any row sees, ascending.
std::vector<int64_t> visible_cells(const std::vector<float> & mask, size_t n_kv) {
    std::vector<char> seen(n_kv, 0);
    for (size_t i = 0; i < mask.size(); i++) {
        seen[i % n_kv] |= static_cast<char>(mask[i] != neg_inf);
    }
    std::vector<int64_t> cells;
    for (size_t j = 0; j < n_kv; j++) {
        if (seen[j] != 0) {
            cells.push_back(static_cast<int64_t>(j));
        }
    }
    return cells;
}

// Everything about one block of rows; columns are the visible cells only.
struct Block {
    const AttentionShape & shape;
    const AttentionInput & in;
    const std::vector<int64_t> & cells;
    size_t first; // row
    size_t n_rows;
    std::vector<float> & scores; // [n_rows, n_head, cells.size()]

    float * scores_of(size_t row, size_t head) const {
        return scores.data() + (row * static_cast<size_t>(shape.n_head) + head) * cells.size();
    }

    // Scores of all query heads that share this KV head. keys: [tile, head_dim] scratch.
    void score(size_t kv_head, float * keys) const {
        const auto dim = static_cast<size_t>(shape.head_dim);
        const auto n_head = static_cast<size_t>(shape.n_head);
        const size_t group = n_head / static_cast<size_t>(shape.n_head_kv);
        for (size_t begin = 0; begin < cells.size(); begin += tile) {
            const size_t n = std::min(tile, cells.size() - begin);
            for (size_t i = 0; i < n; i++) {
                in.load_k(cells[begin + i], static_cast<int64_t>(kv_head), keys + i * dim);
            }
            for (size_t row = 0; row < n_rows; row++) {
                for (size_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
                    const float * q = in.q.data() + ((first + row) * n_head + h) * dim;
                    dots(q, keys, n, dim, scores_of(row, h) + begin);
                }
            }
        }
    }

    // Weights of one row and head, in place of its scores. mask: [cells.size()] of the row.
    void weigh(size_t row, size_t head, const float * mask) const {
        const float * sink = in.sinks.empty() ? nullptr : in.sinks.data() + head;
        soft_max(shape, head, mask, sink, scores_of(row, head), cells.size());
    }

    // Adds the mean over heads to `out` [n_kv].
    void add_mean(size_t row, float * out) const {
        const auto n_head = static_cast<size_t>(shape.n_head);
        for (size_t h = 0; h < n_head; h++) {
            const float * weights = scores_of(row, h);
            for (size_t j = 0; j < cells.size(); j++) {
                out[cells[j]] += weights[j] / static_cast<float>(n_head);
            }
        }
    }
};

} // namespace

std::vector<float> attention_rows(const AttentionShape & shape, const AttentionInput & in,
                                  int32_t n_threads) {
    const auto n_kv = static_cast<size_t>(shape.n_kv);
    const auto n_head = static_cast<size_t>(shape.n_head);
    const auto n_head_kv = static_cast<size_t>(shape.n_head_kv);
    const auto dim = static_cast<size_t>(shape.head_dim);
    const size_t n_rows = in.mask.size() / std::max<size_t>(n_kv, 1);
    const std::vector<int64_t> cells = visible_cells(in.mask, n_kv);
    std::vector<float> mean(n_rows * n_kv, 0.0f);
    const size_t most_rows = std::min(row_block, n_rows);
    const bool parallel = most_rows * n_head * cells.size() * dim > worth_threads;
    const int threads = parallel ? std::max(n_threads, 1) : 1;
    (void)threads; // where there is no OpenMP
    std::vector<float> scores(most_rows * n_head * cells.size());
    std::vector<float> masks(most_rows * cells.size());
    std::vector<float> keys(n_head_kv * tile * dim);
    for (size_t first = 0; first < n_rows; first += row_block) {
        const Block block{shape, in, cells, first, std::min(row_block, n_rows - first), scores};
        for (size_t row = 0; row < block.n_rows; row++) {
            for (size_t j = 0; j < cells.size(); j++) {
                masks[row * cells.size() + j] =
                    in.mask[(first + row) * n_kv + static_cast<size_t>(cells[j])];
            }
        }
        const auto n_tasks = static_cast<int64_t>(block.n_rows * n_head);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t h = 0; h < shape.n_head_kv; h++) {
                block.score(static_cast<size_t>(h),
                            keys.data() + static_cast<size_t>(h) * tile * dim);
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < n_tasks; task++) {
                const size_t row = static_cast<size_t>(task) / n_head;
                block.weigh(row, static_cast<size_t>(task) % n_head,
                            masks.data() + row * cells.size());
            }
        }
        for (size_t row = 0; row < block.n_rows; row++) {
            block.add_mean(row, mean.data() + (first + row) * n_kv);
        }
    }
    return mean;
}

} // namespace cmg
