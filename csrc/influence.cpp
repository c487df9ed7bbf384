#include "influence.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

// The dot product is most of the work here. A wheel is built for the oldest x86-64; let the
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

// out[h] = q[h] . k[h / group] for every query head of one row, k of one cell.
CMG_CLONES void score_heads(const float * q, const float * k, int64_t n_head, int64_t group,
                            int64_t dim, float * out, int64_t stride) {
    constexpr int64_t lanes = 16; // independent sums: lets the compiler use vector registers
    for (int64_t h = 0; h < n_head; h++) {
        const float * a = q + h * dim;
        const float * b = k + (h / group) * dim;
        float sums[lanes] = {};
        int64_t x = 0;
        for (; x + lanes <= dim; x += lanes) {
            for (int64_t i = 0; i < lanes; i++) {
                sums[i] += a[x + i] * b[x + i];
            }
        }
        float total = 0;
        for (int64_t i = 0; i < lanes; i++) {
            total += sums[i];
        }
        for (; x < dim; x++) {
            total += a[x] * b[x];
        }
        out[h * stride] = total;
    }
}

// Slope of head h under ALiBi, as ggml_soft_max_ext and ggml_flash_attn_ext define it.
float alibi_slope(const AttentionShape & shape, int64_t h) {
    if (shape.max_bias <= 0.0f) {
        return 1.0f;
    }
    const auto n =
        static_cast<int64_t>(std::exp2(std::floor(std::log2(static_cast<double>(shape.n_head)))));
    const float per_head = shape.max_bias / static_cast<float>(n);
    return h < n ? std::exp2(-per_head * static_cast<float>(h + 1))
                 : std::exp2(-per_head / 2.0f * static_cast<float>(2 * (h - n) + 1));
}

// Adds softmax(scores)/n_head of one head to `mean`.
void add_softmax(const AttentionShape & shape, int64_t head, const std::vector<int64_t> & visible,
                 const float * mask, const float * sink, float * scores, float * mean) {
    const float slope = alibi_slope(shape, head);
    float highest = sink != nullptr ? *sink : neg_inf;
    for (const int64_t j : visible) {
        float s = scores[j] * shape.scale;
        if (shape.softcap > 0.0f) {
            s = shape.softcap * std::tanh(s / shape.softcap);
        }
        scores[j] = s + slope * mask[j];
        highest = std::max(highest, scores[j]);
    }
    double total = sink != nullptr ? std::exp(static_cast<double>(*sink) - highest) : 0.0;
    for (const int64_t j : visible) {
        scores[j] = std::exp(scores[j] - highest);
        total += scores[j];
    }
    const auto weight = static_cast<float>(1.0 / (total * static_cast<double>(shape.n_head)));
    for (const int64_t j : visible) {
        mean[j] += scores[j] * weight;
    }
}

std::vector<int64_t> visible_cells(const float * mask, int64_t n_kv) {
    std::vector<int64_t> cells;
    for (int64_t j = 0; j < n_kv; j++) {
        if (mask[j] != neg_inf) {
            cells.push_back(j);
        }
    }
    return cells;
}

} // namespace

std::vector<float> attention_rows(const AttentionShape & shape, const AttentionInput & in) {
    const int64_t n_kv = shape.n_kv;
    const int64_t q_row = shape.n_head * shape.head_dim;
    const int64_t n_rows = static_cast<int64_t>(in.q.size()) / q_row;
    std::vector<float> mean(static_cast<size_t>(n_rows * n_kv), 0.0f);
    std::vector<std::vector<int64_t>> visible;
    std::vector<char> needed(static_cast<size_t>(n_kv), 0);
    for (int64_t r = 0; r < n_rows; r++) {
        visible.push_back(visible_cells(in.mask.data() + r * n_kv, n_kv));
        for (const int64_t j : visible.back()) {
            needed[static_cast<size_t>(j)] = 1;
        }
    }
    // Rows in blocks, so that the scores of a long prompt stay small; every block reads K once.
    constexpr int64_t block = 32;
    std::vector<float> k(static_cast<size_t>(shape.n_head_kv * shape.head_dim));
    std::vector<float> scores(static_cast<size_t>(std::min(block, n_rows) * shape.n_head * n_kv));
    for (int64_t first = 0; first < n_rows; first += block) {
        const int64_t last = std::min(first + block, n_rows);
        for (int64_t j = 0; j < n_kv; j++) {
            if (!needed[static_cast<size_t>(j)]) {
                continue;
            }
            in.load_k(j, k.data());
            for (int64_t r = first; r < last; r++) {
                if (in.mask[static_cast<size_t>(r * n_kv + j)] != neg_inf) {
                    score_heads(in.q.data() + r * q_row, k.data(), shape.n_head,
                                shape.n_head / shape.n_head_kv, shape.head_dim,
                                scores.data() + (r - first) * shape.n_head * n_kv + j, n_kv);
                }
            }
        }
        for (int64_t r = first; r < last; r++) {
            for (int64_t h = 0; h < shape.n_head; h++) {
                add_softmax(shape, h, visible[static_cast<size_t>(r)], in.mask.data() + r * n_kv,
                            in.sinks.empty() ? nullptr : in.sinks.data() + h,
                            scores.data() + ((r - first) * shape.n_head + h) * n_kv,
                            mean.data() + r * n_kv);
            }
        }
    }
    return mean;
}

} // namespace cmg
