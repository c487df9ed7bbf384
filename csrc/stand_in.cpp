#include "stand_in.hpp"

#include "api.hpp"
#include "attention_node.hpp"
#include "operations.hpp"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace cmg {
namespace {

constexpr size_t large = 1u << 20; // bytes

} // namespace

StandIn::~StandIn() {
    release();
}

void StandIn::release_if_large() {
    if (capacity_ > large) {
        release();
    }
}

void StandIn::release() {
    if (buffer_ != nullptr) {
        api().ggml_backend_buffer_free(buffer_);
        buffer_ = nullptr;
        capacity_ = 0;
    }
}

ggml_tensor * StandIn::assign(const ggml_tensor * original, const std::vector<uint8_t> & bytes) {
    const auto type = api().ggml_backend_buffer_get_type(root(original)->buffer);
    // A long prompt's mask is not kept for the two rows of a decode step.
    const bool too_large = capacity_ > large && capacity_ > 4 * bytes.size();
    if (buffer_ == nullptr || capacity_ < bytes.size() || too_large ||
        api().ggml_backend_buffer_get_type(buffer_) != type) {
        release();
        capacity_ = bytes.size() + (bytes.size() < large ? bytes.size() / 4 : 0);
        buffer_ = api().ggml_backend_buft_alloc_buffer(type, capacity_);
        if (buffer_ == nullptr) {
            throw std::runtime_error("no memory for an input of " + std::to_string(capacity_) +
                                     " bytes");
        }
    }
    tensor_ = *original;
    tensor_.op = loaded_numbers().none;
    std::fill(std::begin(tensor_.src), std::end(tensor_.src), nullptr);
    tensor_.view_src = nullptr;
    tensor_.view_offs = 0;
    tensor_.buffer = nullptr;
    tensor_.data = nullptr;
    tensor_.extra = nullptr;
    api().ggml_backend_tensor_alloc(buffer_, &tensor_, api().ggml_backend_buffer_get_base(buffer_));
    api().ggml_backend_tensor_set(&tensor_, bytes.data(), 0, bytes.size());
    return &tensor_;
}

} // namespace cmg
