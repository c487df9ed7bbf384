#include "fork_survey.hpp"

#include "operations.hpp"

#include "attention_node.hpp"
#include "row_dim.hpp"

#include <algorithm>
#include <cstring>

namespace cmg {
namespace {

bool is_view_op(ggml_op op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

bool is_residual(const ggml_tensor * node, int64_t n_rows) {
    return node->type == GGML_TYPE_F32 && node->view_src == nullptr && node->ne[1] == n_rows &&
           node->ne[2] == 1 && node->ne[3] == 1 &&
           node->nb[1] == static_cast<size_t>(node->ne[0]) * sizeof(float);
}

} // namespace

int32_t residual_layer(const ggml_tensor * node) {
    return layer_in_name(node, "l_out-");
}

ForkSurvey::ForkSurvey(const std::vector<ggml_tensor *> & nodes, int32_t n_layer, int64_t n_rows)
    : residuals_(static_cast<size_t>(n_layer), -1),
      cannot_enter_(static_cast<size_t>(n_layer), "its layers' outputs are not found"),
      cannot_shrink_(static_cast<size_t>(n_layer)) {
    Places places;
    for (size_t i = 0; i < nodes.size(); i++) {
        const auto place = static_cast<int32_t>(i);
        places.emplace(nodes[i], place);
        const auto [named, is_first] = named_.emplace(nodes[i]->name, Named{place, true});
        named->second.alone = is_first;
        const int32_t il = residual_layer(nodes[i]);
        if (il >= 0 && il < n_layer && is_residual(nodes[i], n_rows)) {
            residuals_[static_cast<size_t>(il)] = place;
        }
    }
    for (size_t layer = 1; layer < cannot_enter_.size(); layer++) {
        if (residuals_[layer - 1] >= 0) {
            cannot_enter_[layer].clear();
        }
    }
    find_crossings(nodes, places);
    find_row_dims(nodes, places, n_rows);
}

// Where the two differ, it is not known which of their nodes are the same from there on.
void ForkSurvey::agree_with(const ForkSurvey & other) {
    for (size_t layer = 1; layer < cannot_enter_.size(); layer++) {
        if (cannot_enter_[layer].empty()) {
            cannot_enter_[layer] = other.cannot_enter_[layer];
        }
    }
    size_t i = 0;
    for (; i < nodes_.size() && i < other.nodes_.size(); i++) {
        Node & node = nodes_[i];
        const Node & same = other.nodes_[i];
        if (node.op != same.op || node.name != same.name || node.sources != same.sources ||
            node.is_copied != same.is_copied) {
            break;
        }
        if (node.row_dim != same.row_dim || node.n_per_row != same.n_per_row) {
            node.row_dim = unclear_rows;
            forbid_shrinking(static_cast<int32_t>(i), "rows of " + node.name + " cannot be told");
        }
    }
    if (i < std::max(nodes_.size(), other.nodes_.size())) {
        const std::string where = i < nodes_.size() ? nodes_[i].name : "its end";
        forbid_shrinking(static_cast<int32_t>(i),
                         "its graph depends on the number of rows, from " + where + " on");
        nodes_.resize(i);
    }
}

const std::string & ForkSurvey::at(const std::vector<std::string> & reasons, int32_t layer) {
    static const std::string no_layer = "nothing lies below it";
    const bool known = layer > 0 && static_cast<size_t>(layer) < reasons.size();
    return known ? reasons[static_cast<size_t>(layer)] : no_layer;
}

// What is read at place `to` was written at place `from`.
void ForkSurvey::forbid(int32_t from, int32_t to, const ggml_tensor * read) {
    for (size_t layer = 1; layer < cannot_enter_.size(); layer++) {
        const int32_t residual = residuals_[layer - 1];
        if (from < residual && residual < to && cannot_enter_[layer].empty()) {
            cannot_enter_[layer] = std::string("it reads ") + read->name + " from below";
        }
    }
}

int32_t ForkSurvey::copied(const ggml_tensor * t) const {
    const std::string name = copied_name(t);
    const auto it = name.empty() ? named_.end() : named_.find(name);
    return it == named_.end() ? -1 : it->second.place;
}

// Backends move views to where they like: what counts is whose memory a view looks at.
void ForkSurvey::find_crossings(const std::vector<ggml_tensor *> & nodes, const Places & places) {
    const auto origin = [&](const ggml_tensor * src) {
        const int32_t place = copied(src);
        return root(place < 0 ? src : nodes[static_cast<size_t>(place)]);
    };
    Places written; // memory that is no node's own, as caches: where it is first written
    for (size_t i = 0; i < nodes.size(); i++) {
        const auto place = static_cast<int32_t>(i);
        for (const ggml_tensor * src : nodes[i]->src) {
            if (src == nullptr) {
                continue;
            }
            const auto node = places.find(origin(src));
            if (node != places.end()) {
                forbid(node->second, place, src);
            }
            const auto memory = written.find(origin(src));
            if (memory != written.end()) {
                forbid(memory->second, place, src);
            }
        }
        if (!is_view_op(op_of(nodes[i])) && nodes[i]->view_src != nullptr) {
            written.emplace(root(nodes[i]), place);
        }
    }
}

// Of all layers above which the node at place `from` lies below.
void ForkSurvey::forbid_shrinking(int32_t from, const std::string & why) {
    for (size_t layer = 1; layer < cannot_shrink_.size(); layer++) {
        if (residuals_[layer - 1] >= from && cannot_shrink_[layer].empty()) {
            cannot_shrink_[layer] = why;
        }
    }
}

ForkSurvey::Source ForkSurvey::source_of(const ggml_tensor * src, const Places & places) const {
    if (src == nullptr) {
        return {};
    }
    const auto node = places.find(src);
    const bool is_copy = node == places.end();
    const int32_t place = is_copy ? copied(src) : node->second;
    const bool before = place >= 0 && static_cast<size_t>(place) < nodes_.size();
    const bool rows = before && nodes_[static_cast<size_t>(place)].row_dim != no_rows;
    return rows ? Source{place, is_copy} : Source{};
}

void ForkSurvey::find_row_dims(const std::vector<ggml_tensor *> & nodes, const Places & places,
                               int64_t n_rows) {
    std::vector<char> is_copied(nodes.size(), 0);
    for (const ggml_tensor * node : nodes) {
        for (const ggml_tensor * src : node->src) {
            if (const int32_t place = src == nullptr ? -1 : copied(src); place >= 0) {
                is_copied[static_cast<size_t>(place)] = 1;
            }
        }
    }
    const auto dim_of = [&](const ggml_tensor * src) {
        const Source source = source_of(src, places);
        if (source.place < 0) {
            return no_rows;
        }
        const Node & known = nodes_[static_cast<size_t>(source.place)];
        if (source.is_copy) {
            const bool clear = named_.at(known.name).alone;
            const ggml_tensor * node = nodes[static_cast<size_t>(source.place)];
            return clear ? row_dim_of_copy(src, node, known.row_dim) : unclear_rows;
        }
        // What is copied is whole again before others that read it are asked about.
        return known.is_copied ? unclear_rows : known.row_dim;
    };
    for (const ggml_tensor * node : nodes) {
        const ggml_tensor * positions = sectioned_positions(node, n_rows);
        const bool computed = positions != nullptr && copied(positions) >= 0;
        const int32_t dim = computed ? unclear_rows : row_dim(node, n_rows, dim_of);
        const bool copied = is_copied[nodes_.size()] != 0;
        Node known{node->op, node->name, dim, dim < 0 ? 0 : node->ne[dim] / n_rows, copied, {}};
        std::transform(std::begin(node->src), std::end(node->src), known.sources.begin(),
                       [&](const ggml_tensor * src) { return source_of(src, places); });
        nodes_.push_back(known);
        if (dim == unclear_rows) {
            forbid_shrinking(static_cast<int32_t>(nodes_.size() - 1),
                             "rows of " + known.name + " cannot be told");
        }
    }
}

} // namespace cmg
