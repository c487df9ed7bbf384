#include "influence.hpp"

#include "simd.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

// The dot products are most of the work here. A wheel is built for the oldest x86-64; let the
// loader pick the AVX2 clone where the CPU has it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define CMG_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else // which has no levels to tell CPUs by, only what they can do
#define CMG_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CMG_CLONES
#endif

// Four of the values of two vectors, by their places.
#if defined(__clang__)
#define CMG_SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif defined(__GNUC__)
#define CMG_SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

namespace cmg {
namespace {

constexpr float neg_inf = -std::numeric_limits<float>::infinity();
constexpr size_t row_block = 32; // rows at once: bounds the scores of a long prompt
constexpr size_t tile = 16;      // cells at once: their keys stay in the cache for all rows
constexpr size_t worth_threads = size_t{1} << 20; // multiplications

inline float dot(const float * q, const float * k, size_t dim) {
    float sum = 0;
    CMG_SIMD(reduction(+ : sum))
    for (size_t x = 0; x < dim; x++) {
        sum += q[x] * k[x];
    }
    return sum;
}

#ifdef CMG_SHUFFLED
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(16)));
#endif

// out[i] = q . k[i] for n keys of dim floats, `stride` apart.
CMG_CLONES void dots(const float * q, const float * k, size_t n, size_t dim, size_t stride,
                     float * out) {
    size_t i = 0;
#ifdef CMG_SHUFFLED
    // Eight products side by side, of four keys at a time, so that the sums do not wait for each
    // other. Left to the compiler, adding up the eight takes longer than the products.
    const size_t whole = dim - dim % 8;
    for (; i + 4 <= n; i += 4, k += 4 * stride) {
        Eight products[4] = {};
        for (size_t x = 0; x < whole; x += 8) {
            const Eight of_q = *reinterpret_cast<const Eight *>(q + x);
            for (size_t j = 0; j < 4; j++) {
                products[j] += of_q * *reinterpret_cast<const Eight *>(k + j * stride + x);
            }
        }
        Four halves[4];
        for (size_t j = 0; j < 4; j++) {
            const auto * both = reinterpret_cast<const Four *>(products + j);
            halves[j] = both[0] + both[1];
        }
        Four pairs[2];
        for (size_t j = 0; j < 2; j++) {
            const Four & a = halves[2 * j];
            const Four & b = halves[2 * j + 1];
            pairs[j] = CMG_SHUFFLED(a, b, 0, 4, 1, 5) + CMG_SHUFFLED(a, b, 2, 6, 3, 7);
        }
        Four sums = CMG_SHUFFLED(pairs[0], pairs[1], 0, 1, 4, 5) +
                    CMG_SHUFFLED(pairs[0], pairs[1], 2, 3, 6, 7);
        for (size_t x = whole; x < dim; x++) {
            sums += q[x] * Four{k[x], k[stride + x], k[2 * stride + x], k[3 * stride + x]};
        }
        *reinterpret_cast<Four *>(out + i) = sums;
    }
#endif
    for (; i < n; i++, k += stride) {
        out[i] = dot(q, k, dim);
    }
}

CMG_CLONES void add(const float * values, size_t n, float * sums) {
    for (size_t i = 0; i < n; i++) {
        sums[i] += values[i];
    }
}

// exp(x) for x <= 0, 0 below -87, to 2e-7 of its value: in a form that compilers vectorise.
// exp(x) = 2^n * exp(r), |r| <= ln(2)/2, the latter by its Taylor series.
inline float exp_of_negative(float x) {
    const float clamped = std::max(x, -87.0f);
    const auto n = static_cast<int32_t>(clamped * 1.44269504f - 0.5f); // rounds, for x <= 0
    const float r = (clamped - static_cast<float>(n) * 0.693359375f) +
                    static_cast<float>(n) * 2.12194440e-4f; // ln(2) in two parts
    const float series =
        1.0f +
        r * (1.0f +
             r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    const int32_t bits = (n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return series * power * static_cast<float>(x >= -87.0f);
}

// scores = scale * scores + slope * mask; returns the highest, or `highest` if that is higher.
CMG_CLONES float masked_scores(float * scores, const float * mask, size_t n, float scale,
                               float slope, float highest) {
    CMG_SIMD(reduction(max : highest))
    for (size_t j = 0; j < n; j++) {
        scores[j] = scores[j] * scale + slope * mask[j];
        highest = scores[j] > highest ? scores[j] : highest;
    }
    return highest;
}

// scores = exp(scores - highest); returns their sum.
CMG_CLONES float exponentials(float * scores, size_t n, float highest) {
    float total = 0;
    CMG_SIMD(reduction(+ : total))
    for (size_t j = 0; j < n; j++) {
        scores[j] = exp_of_negative(scores[j] - highest);
        total += scores[j];
    }
    return total;
}

CMG_CLONES void multiply(float * values, size_t n, float factor) {
    for (size_t i = 0; i < n; i++) {
        values[i] *= factor;
    }
}

size_t thread_number() {
#ifdef _OPENMP
    return static_cast<size_t>(omp_get_thread_num());
#else
    return 0;
#endif
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
    float scale = shape.scale;
    if (shape.softcap > 0.0f) {
        for (size_t j = 0; j < n; j++) {
            scores[j] = shape.softcap * std::tanh(scores[j] * scale / shape.softcap);
        }
        scale = 1.0f;
    }
    const float lowest = sink != nullptr ? *sink : neg_inf;
    const float highest = masked_scores(scores, mask, n, scale, alibi_slope(shape, head), lowest);
    if (highest == neg_inf) {
        std::fill_n(scores, n, 0.0f);
        return;
    }
    const float extra = sink != nullptr ? std::exp(*sink - highest) : 0.0f;
    multiply(scores, n, 1.0f / (exponentials(scores, n, highest) + extra));
}

// Cells that any row sees, ascending.
std::vector<int64_t> visible_cells(const std::vector<float> & mask, size_t n_kv) {
    std::vector<char> seen(n_kv, 0);
    for (size_t row = 0; row < mask.size(); row += n_kv) {
        for (size_t j = 0; j < n_kv; j++) {
            seen[j] |= static_cast<char>(mask[row + j] != neg_inf);
        }
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

    // Scores of the cells [begin, begin + tile) under all heads. keys: [tile, n_head_kv * head_dim]
    // scratch.
    void score(size_t begin, float * keys) const {
        const auto dim = static_cast<size_t>(shape.head_dim);
        const auto n_head = static_cast<size_t>(shape.n_head);
        const auto n_head_kv = static_cast<size_t>(shape.n_head_kv);
        const size_t n = std::min(tile, cells.size() - begin);
        const size_t stride = n_head_kv * dim;
        for (size_t i = 0; i < n; i++) {
            in.load_k(cells[begin + i], keys + i * stride);
        }
        for (size_t row = 0; row < n_rows; row++) {
            for (size_t h = 0; h < n_head; h++) {
                const float * q = in.q.data() + ((first + row) * n_head + h) * dim;
                const float * k = keys + h / (n_head / n_head_kv) * dim;
                dots(q, k, n, dim, stride, scores_of(row, h) + begin);
            }
        }
    }

    // Weights of one row and head, in place of its scores. mask: [cells.size()] of the row.
    void weigh(size_t row, size_t head, const float * mask) const {
        const float * sink = in.sinks.empty() ? nullptr : in.sinks.data() + head;
        soft_max(shape, head, mask, sink, scores_of(row, head), cells.size());
    }

    // Writes the mean over heads to `out` [n_kv]. The weights of the row are no more after it.
    void write_mean(size_t row, float * out) const {
        const auto n_head = static_cast<size_t>(shape.n_head);
        float * mean = scores_of(row, 0);
        for (size_t h = 1; h < n_head; h++) {
            add(scores_of(row, h), cells.size(), mean);
        }
        for (size_t j = 0; j < cells.size(); j++) {
            out[cells[j]] = mean[j] / static_cast<float>(n_head);
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

    std::vector<float> scores(most_rows * n_head * cells.size());
    std::vector<float> masks(most_rows * cells.size());
    const auto n_tiles = static_cast<int64_t>((cells.size() + tile - 1) / tile);
    std::vector<float> keys(static_cast<size_t>(threads) * tile * n_head_kv * dim);
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
            float * scratch = keys.data() + thread_number() * tile * n_head_kv * dim;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n_tiles; i++) {
                block.score(static_cast<size_t>(i) * tile, scratch);
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < n_tasks; task++) {
                const size_t row = static_cast<size_t>(task) / n_head;
                block.weigh(row, static_cast<size_t>(task) % n_head,
                            masks.data() + row * cells.size());
            }
        }
        for (size_t row = 0; row < block.n_rows; row++) {
            block.write_mean(row, mean.data() + (first + row) * n_kv);
        }
    }
    return mean;
}

} // namespace cmg
