// Rows that are not computed below the first masked layer.
//
// Up to there a row of the degraded branch is what the original's row of the same token is. So the
// first n_below rows of a batch are computed from the embedding on, the others from `layer` on:
// what they enter it with, the residual stream between two layers, is written in. They write no
// cells of the layers below, so every later row of their sequence must be left out there too.
// The first rows need not have to do with the others: they are rows of any session.
//
//     node                      what happens when it is asked about
//     below `layer`             n_below = 0: is not computed (it loses ggml's flag COMPUTE), and
//                               which experts are taken is the first;
//                               else: the rows that are left out go, from its shape and strides
//     RoPE that reads several   reads an input of ours, with the positions of the rows that are
//     positions a row, below    left: where they lie depends on how many rows there are (M-RoPE)
//     one that is copied        asks for a boundary; once computed, it becomes what it was, for
//     below                     another backend copies all of it. The copy loses its rows when its
//                               first reader is asked about: it has been made by then
//     l_out-<layer - 1>         asks for a boundary; once computed, all nodes become what they
//     were,
//                               rows below are noted, and the others enter with what was
//     above                     may read nothing from below, else the decode is void
//
// The nodes are changed from when they are asked about until the boundary, or until the decode ends
// in any other way: a graph that is reused, or rebuilt, never sees it.
//
// Which dimension counts rows is known from two surveys, of decodes of different numbers of rows.
// Other numbers give the same graph, as long as its nodes are computed where they were: from some
// number of rows on, which depends on the node, ggml moves one whose weights lie on the host to a
// GPU, and copies what it reads there before anyone is asked, which must have its full size then.
// What lies in one place with the fewest rows surveyed and with the most lies there with all
// between them: a fork with others below it has no fewer rows and no more.
#pragma once

#include "fork_survey.hpp"
#include "plan.hpp"
#include "stand_in.hpp"
#include "transfers.hpp"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace cmg {

class Fork {
  public:
    // plan: of the decode at hand, looked at from `begin` on. Both outlive this.
    Fork(const Plan & plan, int32_t n_layer, Transfers & transfers)
        : plan_(plan), n_layer_(n_layer), transfers_(transfers) {}

    // Why rows cannot enter at `layer`, with others computed below it (shrinks) or none. "" = they
    // can; null = that is not known before decodes of two different numbers of rows were surveyed.
    const std::string * obstacle(int32_t layer, bool shrinks) const;
    // Throws std::invalid_argument if a decode with this plan cannot fork as it says.
    void check(const Plan & plan) const;

    void begin();
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
    int64_t n_rows() const { return static_cast<int64_t>(plan_.rows.size()); }
    bool leaves_out() const { return plan_.forks() && plan_.fork.n_below < n_rows(); }
    bool is_entrance(const ggml_tensor * node) const;
    bool is_copied(const ggml_tensor * node) const;
    void leave_out(ggml_tensor * node);
    static void clear_choices(ggml_tensor * node, size_t n_bytes_kept);
    void shrink(ggml_tensor * t, const ForkSurvey::Node & surveyed);
    void shrink_positions(ggml_tensor * node);
    ggml_tensor * fewer_positions(const ggml_tensor * positions);
    ForkSurvey::Source source_of(const ggml_tensor * src) const;
    void check_as_surveyed(const ggml_tensor * node, size_t place) const;
    void check_not_from_below(const ggml_tensor * node) const;
    void enter(ggml_tensor * residual);
    void take_survey();
    void restore();
    void restore(const ggml_tensor * node);

    const Plan & plan_;
    int32_t n_layer_;
    Transfers & transfers_;
    std::unique_ptr<ForkSurvey> survey_; // what all that were made agree in
    std::set<int64_t> surveyed_rows_;    // how many rows they were of
    int64_t n_left_out_ = 0;

    // The current decode.
    bool entered_ = false;
    std::vector<ggml_tensor *> asked_; // all nodes so far, for the survey
    struct Changed {
        ggml_tensor * t;
        int64_t ne[GGML_MAX_DIMS];
        size_t nb[GGML_MAX_DIMS];
        int32_t flags;
        ggml_tensor * positions; // that a stand-in is read for; null = for none
    };
    void note_change(ggml_tensor * t);
    static void undo(const Changed & before);
    std::vector<Changed> changed_;
    std::unordered_set<const ggml_tensor *> copies_;               // of nodes below, that lost rows
    std::unordered_map<const ggml_tensor *, int32_t> below_;       // nodes below, by their place
    std::unordered_map<const ggml_tensor *, ggml_tensor *> fewer_; // stand-ins for positions

    std::deque<StandIn> stand_ins_; // the first of them for `fewer_`, in all decodes
};

} // namespace cmg
