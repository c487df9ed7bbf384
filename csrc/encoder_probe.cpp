#include "encoder_probe.hpp"

#include "api.hpp"
#include "attention_node.hpp"
#include "operations.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace cmg {
namespace {

// A copy for another backend is named "CUDA0#inp_raw#0".
bool is_input(const ggml_tensor * t) {
    const char * copied = std::strchr(t->name, '#');
    const char * name = copied != nullptr ? copied + 1 : t->name;
    const size_t n = std::strlen("inp_raw");
    return std::strncmp(name, "inp_raw", n) == 0 && (name[n] == '\0' || name[n] == '#') &&
           op_of(t) == GGML_OP_NONE && t->type == GGML_TYPE_F32 && t->buffer != nullptr;
}

} // namespace

void EncoderProbe::begin() {
    is_probing_ = true;
    pixels_.clear();
    parked_ = nullptr;
}

const std::vector<float> & EncoderProbe::pixels() const {
    if (parked_ != nullptr) {
        std::rethrow_exception(parked_);
    }
    if (pixels_.empty()) {
        throw std::runtime_error("no node of the image encoder's graph reads pixels");
    }
    return pixels_;
}

bool EncoderProbe::callback(ggml_tensor * node, bool ask, void * self) {
    auto & probe = *static_cast<EncoderProbe *>(self);
    if (!probe.is_probing_) {
        return probe.mend_ != nullptr ? EncoderMend::callback(node, ask, probe.mend_) : !ask;
    }
    if (!ask) {
        return false;
    }
    try {
        return probe.probe(node);
    } catch (...) {
        if (probe.parked_ == nullptr) {
            probe.parked_ = std::current_exception();
        }
        return true;
    }
}

// True where nothing behind the node is needed.
bool EncoderProbe::probe(const ggml_tensor * node) {
    for (int i = 0; i < GGML_MAX_SRC && pixels_.empty(); i++) {
        const ggml_tensor * source = node->src[i] == nullptr ? nullptr : root(node->src[i]);
        if (source != nullptr && is_input(source)) {
            std::copy(std::begin(source->ne), std::end(source->ne), shape_.begin());
            pixels_.resize(api().ggml_nbytes(source) / sizeof(float));
            api().ggml_backend_tensor_get(source, pixels_.data(), 0,
                                          pixels_.size() * sizeof(float));
        }
    }
    return !pixels_.empty();
}

} // namespace cmg
