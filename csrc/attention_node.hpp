// An attention node of llama.cpp's graph, found and read through its sources.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cmg {

// The tensor that owns the memory a view looks at.
const ggml_tensor * root(const ggml_tensor * t);

// Whether it lies in memory that the CPU reads, and the device whose memory it lies in.
bool is_host(const ggml_tensor * t);
ggml_backend_dev_t device_of(const ggml_tensor * t);

// The number behind `prefix` in the tensor's own name, or -1 if that does not start with it.
int32_t layer_in_name(const ggml_tensor * t, const char * prefix);

// What ggml's scheduler copied for another backend has no source that says so, only a name,
// "CUDA0#l_out-3#0": that of the tensor it is a copy of. "" = it is no copy.
std::string copied_name(const ggml_tensor * t);

// Flash attention or not, the same picture. Names alone find nothing: on a GPU split the mask is a
// copy, and which cache is read is known only from the memory behind K.
struct AttentionNode {
    int32_t il = -1;                     // layer; for the caller to count
    int32_t cache_il = -1;               // layer whose KV cache it reads
    int mask_src = -1;                   // node->src[mask_src] is the mask
    ggml_tensor * mask = nullptr;        // [n_kv, n_rows] F16 or F32
    const ggml_tensor * q = nullptr;     // [head_dim, n_rows, n_head] F32
    const ggml_tensor * k = nullptr;     // [head_dim, n_kv, n_head_kv] of the cache's type
    const ggml_tensor * sinks = nullptr; // [n_head] F32, or null
    float scale = 1.0f;
    float softcap = 0.0f;
    float max_bias = 0.0f;

    // The image encoder, MoE routers and cross attention read no KV cache: they are not found.
    bool found() const { return cache_il >= 0; }
};

// product: the K q that was asked about last, or null. A backend that cannot multiply by this cache
// leaves that to the CPU, and its SOFT_MAX reads a copy.
AttentionNode find_attention(const ggml_tensor * node, const ggml_tensor * product);

// Whether a node of the graph computes it. It may hold what the last graph left, then, when a node
// that reads it is asked about. Inputs, and what ggml's scheduler copied for another backend, are
// there by then.
bool is_computed(const ggml_tensor * t);

// Throws if the mask is not one that rows of a batch of n_rows are seen in.
void check_mask(const AttentionNode & attention, int64_t n_rows);

// An error that names the layer.
std::runtime_error layer_error(int32_t il, const std::string & what);

// n values of any type ggml can dequantise, as float32.
void to_float(ggml_type type, const uint8_t * from, float * to, int64_t n);

} // namespace cmg
