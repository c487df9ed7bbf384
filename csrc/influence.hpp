// Attention weights of chosen query rows, averaged over heads: softmax(scale * q K^T + mask).
//
// Flash attention never writes these weights anywhere, so they are computed again from q and K,
// for the few rows that are observed. Pure: arrays in, arrays out. For keys in the host's memory;
// ggml's CPU backend takes longer for the same (scripts/RESULTS.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace cmg {

struct AttentionShape {
    int64_t n_head = 0;
    int64_t n_head_kv = 0; // divides n_head
    int64_t head_dim = 0;
    int64_t n_kv = 0;
    float scale = 1.0f;
    float softcap = 0.0f;  // score = softcap * tanh(score / softcap) before the mask; 0 = none
    float max_bias = 0.0f; // ALiBi: the mask is multiplied by a slope per head; 0 = none
};

struct AttentionInput {
    std::vector<float> q;     // [n_rows, n_head, head_dim]
    std::vector<float> mask;  // [n_rows, n_kv]: 0 or a bias, -inf = not visible
    std::vector<float> sinks; // [n_head] extra logits in the denominator, or empty
    // Writes K [n_head_kv, head_dim] of one cell to its second argument. Called from n_threads
    // threads at once, only for cells that some row sees; may not throw.
    std::function<void(int64_t cell, float * k)> load_k;
};

// [n_rows, n_kv] float32, rows sum to 1 (less with sinks); exactly 0 where the mask is -inf. The
// same to the bit for any number of threads.
std::vector<float> attention_rows(const AttentionShape & shape, const AttentionInput & in,
                                  int32_t n_threads);

} // namespace cmg
