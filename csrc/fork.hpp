// Rows that are not computed below the first masked layer.
//
// Up to there a row of the degraded branch is what the original's row of the same token is. So the
// first n_below rows of a batch are computed from the embedding on, the others from `layer` on:
// what they enter it with, the residual stream between two layers, is written in. They write no
// cells of the layers below, so every later row of their sequence must be left out there too.
//
//     node                      what happens when it is asked about
//     below `layer`             n_below = 0: is not computed (it loses ggml's flag COMPUTE);
//                               else: the rows that are left out go, from its shape and strides
//     l_out-<layer - 1>         asks for a boundary; once computed, all nodes become what they were
//     above                     may read nothing from below, else the decode is void
//
// The nodes are changed from when they are asked about until the boundary, or until the decode ends
// in any other way: a graph that is reused, or rebuilt, never sees it.
#pragma once

#include "fork_survey.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

namespace cmg {

struct ForkPlan {
    int32_t layer = 0;          // first layer that all rows run through; 0 = no fork
    int32_t n_below = 0;        // rows computed below it: the first of the batch
    std::vector<int32_t> slots; // [n_rows] the residual slot that a row below writes to (-1 =
                                // none), and that each other row reads from
    bool survey = false;        // learn the graph of a decode without a fork
};

class Fork {
  public:
    explicit Fork(int32_t n_layer) : n_layer_(n_layer) {}

    // Why decodes of n_rows rows, the first n_below of them computed below `layer`, cannot be. ""
    // = they can; null = no survey has been made yet.
    const std::string * obstacle(int32_t layer, int64_t n_rows, int64_t n_below) const;

    void begin(ForkPlan plan, int64_t n_rows);
    // Answers whether a boundary is needed behind the node.
    bool ask(ggml_tensor * node);
    void computed(ggml_tensor * node);
    // After a decode that succeeded. Throws if the rows never entered.
    void end();
    // After any other: all nodes become what they were.
    void abandon();

    // Rows left out below a layer since construction.
    int64_t n_left_out() const { return n_left_out_; }

  private:
    bool leaves_out() const { return plan_.layer > 0 && plan_.n_below < n_rows_; }
    void leave_out(ggml_tensor * node);
    void enter(ggml_tensor * residual);
    void restore();

    int32_t n_layer_;
    std::unique_ptr<ForkSurvey> single_; // of a decode of one row
    std::unique_ptr<ForkSurvey> pair_;   // of two
    std::vector<std::vector<float>> residuals_;
    int64_t n_left_out_ = 0;

    // The current decode.
    ForkPlan plan_;
    int64_t n_rows_ = 0;
    bool entered_ = false;
    std::vector<ggml_tensor *> asked_; // all nodes so far, for the survey
    size_t n_asked_ = 0;
    struct Changed {
        ggml_tensor * node;
        int64_t ne[GGML_MAX_DIMS];
        size_t nb[GGML_MAX_DIMS];
        int32_t flags;
    };
    std::vector<Changed> changed_;
    std::unordered_set<const ggml_tensor *> below_;
};

} // namespace cmg
