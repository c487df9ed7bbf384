#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
    m.doc() = "Graph patch, influence, token policies and guidance sampler. Private: use cmg_gguf.";
    cmg::bind_functions(m);
    cmg::bind_owned(m);
    cmg::bind_callbacks(m);
    cmg::bind_policies(m);
    cmg::bind_encoder(m);
    cmg::bind_graph_patch(m);
    cmg::bind_layers(m);
    cmg::bind_sampler(m);
}
