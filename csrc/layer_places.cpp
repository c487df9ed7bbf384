#include "layer_places.hpp"

#include "api.hpp"
#include "attention_node.hpp"

namespace cmg {
namespace {

void note(std::vector<std::string> & places, int32_t il, const ggml_tensor * t) {
    if (il < 0 || static_cast<size_t>(il) >= places.size() || t->buffer == nullptr) {
        return;
    }
    places[static_cast<size_t>(il)] =
        is_host(t) ? "CPU" : api().ggml_backend_dev_name(device_of(t));
}

} // namespace

bool LayerPlaces::callback(ggml_tensor * node, bool ask, void * self) {
    if (ask) {
        try {
            static_cast<LayerPlaces *>(self)->ask(node);
        } catch (...) { // out of memory: the layer stays unknown
        }
    }
    return !ask;
}

void LayerPlaces::ask(ggml_tensor * node) {
    node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    for (const ggml_tensor * src : node->src) {
        if (src != nullptr && copied_name(src).empty()) {
            note(weights_, layer_in_name(src, "blk."), src);
        }
    }
    const ggml_tensor * memory = root(node);
    for (const char * cache : {"cache_k_l", "cache_r_l", "cache_s_l"}) {
        note(caches_, layer_in_name(memory, cache), memory);
    }
}

} // namespace cmg
