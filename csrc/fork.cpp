#include "fork.hpp"

#include "api.hpp"
#include "row_dim.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace cmg {

const std::string * Fork::obstacle(int32_t layer, int64_t n_rows, int64_t n_below) const {
    const bool shrinks = n_below > 0 && n_below < n_rows;
    const ForkSurvey * survey = shrinks ? pair_.get() : single_.get();
    if (survey == nullptr) {
        return nullptr;
    }
    const std::string & enter = survey->cannot_enter(layer);
    return enter.empty() && shrinks ? &survey->cannot_shrink(layer) : &enter;
}

void Fork::begin(ForkPlan plan, int64_t n_rows) {
    const bool shrinks = plan.n_below > 0 && plan.n_below < n_rows;
    const bool surveyed = !shrinks || (n_rows == 2 && pair_ != nullptr);
    if (plan.layer > 0 && (plan.slots.size() != static_cast<size_t>(n_rows) || !surveyed)) {
        throw std::invalid_argument("a fork of " + std::to_string(plan.slots.size()) +
                                    " residuals, " + std::to_string(plan.n_below) +
                                    " rows below it, for " + std::to_string(n_rows) +
                                    " rows, or without a survey");
    }
    plan_ = std::move(plan);
    n_rows_ = n_rows;
    n_asked_ = 0;
    entered_ = false;
}

bool Fork::ask(ggml_tensor * node) {
    if (plan_.survey) {
        asked_.push_back(node);
    }
    if (plan_.layer == 0) {
        return false;
    }
    if (!entered_) {
        if (leaves_out()) {
            leave_out(node);
        }
        return residual_layer(node) == plan_.layer - 1;
    }
    if (leaves_out()) {
        for (const ggml_tensor * src : node->src) {
            if (src != nullptr && below_.count(src) != 0) {
                throw std::runtime_error(std::string("layer ") + std::to_string(plan_.layer) +
                                         " and up read " + src->name +
                                         " from below, unlike in the decode that was surveyed");
            }
        }
    }
    return false;
}

void Fork::leave_out(ggml_tensor * node) {
    const auto change = [&] {
        Changed before{node, {}, {}, node->flags};
        std::copy_n(node->ne, GGML_MAX_DIMS, before.ne);
        std::copy_n(node->nb, GGML_MAX_DIMS, before.nb);
        changed_.push_back(before);
    };
    below_.insert(node);
    if (plan_.n_below == 0) {
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0) {
            change();
            node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
        }
        return;
    }
    const auto & nodes = pair_->nodes();
    const size_t i = n_asked_++;
    if (i >= nodes.size() || !nodes[i].is(node) || nodes[i].row_dim == unclear_rows) {
        throw std::runtime_error(std::string(node->name) +
                                 " is not as in the decode that was surveyed");
    }
    const int32_t dim = nodes[i].row_dim;
    if (dim != no_rows) {
        if (node->ne[dim] % n_rows_ != 0) {
            throw std::runtime_error(std::string(node->name) + " does not have a row a token");
        }
        change();
        shrink_rows_inplace(node, dim, n_rows_, plan_.n_below);
    }
}

void Fork::computed(ggml_tensor * node) {
    if (plan_.layer > 0 && !entered_ && residual_layer(node) == plan_.layer - 1) {
        restore();
        enter(node);
    }
}

void Fork::enter(ggml_tensor * residual) {
    entered_ = true;
    below_.erase(residual);
    const bool rows = residual->type == GGML_TYPE_F32 && residual->ne[1] == n_rows_;
    if (!rows) {
        throw std::runtime_error(std::string(residual->name) + " is not one row of F32 a token");
    }
    const auto n_embd = static_cast<size_t>(residual->ne[0]);
    for (int64_t r = 0; r < n_rows_; r++) {
        const int32_t slot = plan_.slots[static_cast<size_t>(r)];
        const size_t offset = static_cast<size_t>(r) * residual->nb[1];
        if (r < plan_.n_below && slot >= 0) {
            residuals_.resize(std::max(residuals_.size(), static_cast<size_t>(slot) + 1));
            auto & row = residuals_[static_cast<size_t>(slot)];
            row.resize(n_embd);
            api().ggml_backend_tensor_get(residual, row.data(), offset, n_embd * sizeof(float));
        } else if (r >= plan_.n_below) {
            const auto & row = residuals_.at(static_cast<size_t>(slot));
            if (row.size() != n_embd) {
                throw std::runtime_error("residual " + std::to_string(slot) + " is empty");
            }
            api().ggml_backend_tensor_set(residual, row.data(), offset, n_embd * sizeof(float));
        }
    }
    n_left_out_ += n_rows_ - std::min<int64_t>(n_rows_, plan_.n_below);
}

void Fork::end() {
    const bool missed = plan_.layer > 0 && !entered_;
    if (plan_.survey && n_rows_ <= 2) {
        (n_rows_ == 1 ? single_ : pair_) = std::make_unique<ForkSurvey>(asked_, n_layer_, n_rows_);
    }
    const int32_t layer = plan_.layer;
    abandon();
    if (missed) {
        throw std::runtime_error("l_out-" + std::to_string(layer - 1) +
                                 ", what the layers below give, was not found in the graph");
    }
}

void Fork::abandon() {
    restore();
    plan_ = ForkPlan{};
    asked_.clear();
    below_.clear();
}

void Fork::restore() {
    for (const Changed & before : changed_) {
        std::copy_n(before.ne, GGML_MAX_DIMS, before.node->ne);
        std::copy_n(before.nb, GGML_MAX_DIMS, before.node->nb);
        before.node->flags = before.flags;
    }
    changed_.clear();
}

} // namespace cmg
