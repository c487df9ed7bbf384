// Whether a graph can be run with fewer rows below a layer: read off its structure.
//
// One graph's shapes do not say which dimension counts the rows of the batch: a count of heads, or
// the product of two others, may be the same number. So the graphs of two decodes of different
// numbers of rows are looked at, two primes say, and nothing is believed that only one of them
// shows.
#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace cmg {

// Number of the layer whose output the node is; -1 = it is none.
int32_t residual_layer(const ggml_tensor * node);

// What one decode's graph showed, or what several agree in, for every layer. A reason says why
// something cannot be done; "" means that it can.
class ForkSurvey {
  public:
    // nodes: all that were asked about in one decode of n_rows > 1 rows, in order, shapes
    // untouched.
    ForkSurvey(const std::vector<ggml_tensor *> & nodes, int32_t n_layer, int64_t n_rows);

    // Keeps what the graph of another decode shows too, node by node.
    void agree_with(const ForkSurvey & other);

    // Why rows cannot enter at `layer` with nothing of them computed below: from there on more is
    // read from below than the residual stream.
    const std::string & cannot_enter(int32_t layer) const { return at(cannot_enter_, layer); }
    // Why rows cannot be left out of the nodes below `layer` while others are computed there.
    const std::string & cannot_shrink(int32_t layer) const { return at(cannot_shrink_, layer); }

    // The node of which the tensor is another backend's copy, by its place; -1 = it is none's.
    int32_t copied(const ggml_tensor * t) const;

    // What is read of a node's source that has rows: the node that it is, or of which it is a copy,
    // by its place.
    struct Source {
        int32_t place = -1; // -1 = no node, or none with rows
        bool is_copy = false;

        bool operator==(const Source & other) const {
            return place == other.place && is_copy == other.is_copy;
        }
    };
    using Sources = std::array<Source, GGML_MAX_SRC>;

    // What is known of the i-th node that is asked about. llama.cpp names a node by what it
    // computes, or by its place in the graph: not by the decode.
    struct Node {
        ggml_op op;
        std::string name;
        int32_t row_dim;
        int64_t n_per_row; // size along row_dim, for each row of the batch; 0 without one
        bool is_copied;    // for another backend, which copies all of its rows
        Sources sources;

        bool is(const ggml_tensor * node) const { return op == node->op && name == node->name; }
    };
    const std::vector<Node> & nodes() const { return nodes_; }

  private:
    using Places = std::unordered_map<const ggml_tensor *, int32_t>; // of nodes in their order

    static const std::string & at(const std::vector<std::string> & reasons, int32_t layer);
    void find_crossings(const std::vector<ggml_tensor *> & nodes, const Places & places);
    void find_row_dims(const std::vector<ggml_tensor *> & nodes, const Places & places,
                       int64_t n_rows);
    Source source_of(const ggml_tensor * src, const Places & places) const;
    void forbid(int32_t from, int32_t to, const ggml_tensor * read);
    void forbid_shrinking(int32_t from, const std::string & why);

    std::vector<Node> nodes_;
    struct Named {
        int32_t place; // of the first node of this name
        bool alone;    // there is no other
    };
    std::unordered_map<std::string, Named> named_;
    std::vector<int32_t> residuals_; // [n_layer] place of l_out-<il>, -1 = none
    std::vector<std::string> cannot_enter_;
    std::vector<std::string> cannot_shrink_;
};

} // namespace cmg
