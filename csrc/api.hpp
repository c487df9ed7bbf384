// The llama.cpp functions this extension calls, as addresses.
//
// Nothing is linked: llama-cpp-python has already loaded the libraries, and a second copy of ggml
// in the process would crash it. Python looks every name up in the loaded handles and passes the
// addresses to `bind_api` once, at import. The declarations come from the headers that
// llama-cpp-python installs, so one build serves CPU, CUDA and Metal builds. It serves other
// versions, too, as long as what these headers say of layouts holds, which `bind_api` tries.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cmg {

#define CMG_API_FUNCTIONS(X)                \
    X(ggml_backend_buffer_free)             \
    X(ggml_backend_buffer_get_base)         \
    X(ggml_backend_buffer_get_type)         \
    X(ggml_backend_buffer_is_host)          \
    X(ggml_backend_buft_alloc_buffer)       \
    X(ggml_backend_buft_get_device)         \
    X(ggml_backend_dev_backend_reg)         \
    X(ggml_backend_dev_buffer_type)         \
    X(ggml_backend_dev_by_name)             \
    X(ggml_backend_dev_by_type)             \
    X(ggml_backend_dev_init)                \
    X(ggml_backend_dev_name)                \
    X(ggml_backend_dev_supports_op)         \
    X(ggml_backend_free)                    \
    X(ggml_backend_get_default_buffer_type) \
    X(ggml_backend_graph_compute)           \
    X(ggml_backend_reg_get_proc_address)    \
    X(ggml_backend_tensor_alloc)            \
    X(ggml_backend_tensor_get)              \
    X(ggml_backend_tensor_set)              \
    X(ggml_build_forward_expand)            \
    X(ggml_cast)                            \
    X(ggml_cont)                            \
    X(ggml_flash_attn_ext)                  \
    X(ggml_fp16_to_fp32_row)                \
    X(ggml_free)                            \
    X(ggml_gallocr_alloc_graph)             \
    X(ggml_gallocr_free)                    \
    X(ggml_gallocr_new)                     \
    X(ggml_get_rows)                        \
    X(ggml_get_type_traits)                 \
    X(ggml_get_unary_op)                    \
    X(ggml_glu_op_name)                     \
    X(ggml_graph_n_nodes)                   \
    X(ggml_graph_node)                      \
    X(ggml_graph_overhead_custom)           \
    X(ggml_init)                            \
    X(ggml_mul_mat)                         \
    X(ggml_nbytes)                          \
    X(ggml_new_graph_custom)                \
    X(ggml_new_tensor_4d)                   \
    X(ggml_op_name)                         \
    X(ggml_permute)                         \
    X(ggml_reshape_3d)                      \
    X(ggml_row_size)                        \
    X(ggml_scale)                           \
    X(ggml_set_name)                        \
    X(ggml_soft_max_add_sinks)              \
    X(ggml_soft_max_ext)                    \
    X(ggml_sum_rows)                        \
    X(ggml_tanh)                            \
    X(ggml_tensor_overhead)                 \
    X(ggml_unary_op_name)                   \
    X(llama_sampler_accept)                 \
    X(llama_sampler_apply)                  \
    X(llama_sampler_free)                   \
    X(llama_sampler_init)                   \
    X(llama_sampler_name)

struct Api {
#define CMG_API_MEMBER(name) decltype(&::name) name = nullptr;
    CMG_API_FUNCTIONS(CMG_API_MEMBER)
#undef CMG_API_MEMBER
    // Vectorised for the CPU at hand; optional, `ggml_fp16_to_fp32_row` stands in.
    void (*ggml_cpu_fp16_to_fp32)(const ggml_fp16_t *, float *, int64_t) = nullptr;
};

// Functions of a sampler of ours. A llama.cpp newer than these headers reads further ones behind
// them: there are none.
struct SamplerInterface {
    llama_sampler_i known{};
    void * later[16] = {};
};

// The bound functions. Null until `bind_api` has succeeded.
const Api & api();

// Names that `bind_api` needs an address for.
std::vector<std::string> required_functions();

// Binds the addresses and checks that the structures these headers describe are the ones the
// loaded libraries use. Throws std::runtime_error naming what differs.
void bind_api(const std::map<std::string, std::uintptr_t> & addresses);

} // namespace cmg
