// Guidance as a llama.cpp sampler, and one sampling step for the two branches.
#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace cmg {

// What the guidance sampler reads; owned by the caller, outlives the sampler.
struct GuidanceState {
    float alpha = 1.0f;
    float beta = 0.1f;
    const float * original = nullptr; // l_o [n_vocab]
    const float * degraded = nullptr; // l_d [n_vocab], or null: as if equal to l_o
    bool finite = true;               // written by the sampler: false once a score is not a number
};

// A llama_sampler that
//     drops every token with logit < max(logit) + log(beta)     (beta = 0: none)
//     adds alpha * (l_o - l_d) to the logits of the others
// On untouched logits this is (1 + alpha) * l_o - alpha * l_d over the plausible tokens. Behind a
// logit bias or a grammar it acts on what those left: tokens at -inf stay out.
llama_sampler * new_guidance_sampler(GuidanceState * state);

struct Sampled {
    llama_token token; // drawn under guidance
    llama_token plain; // what the same chain and seed would have drawn without it
};

// Samples both ways from the same row, in two halves: `prepare` says how many tokens are plausible,
// and only if that is more than one must the degraded branch be known to `draw`. The chains are
// llama.cpp's and belong to the caller: constraints (logit bias, grammar) act first, once; `guided`
// begins with the guidance sampler; `plain` is the rest of the chain alone, null for one that takes
// the best token. The buffers are allocated once.
class PairSampler {
  public:
    PairSampler(int32_t n_vocab, llama_sampler * constraints, llama_sampler * guided,
                llama_sampler * plain);
    // Takes the row [n_vocab], applies the constraints, cuts at beta for the guided chain. Returns
    // how many tokens that leaves. Throws std::runtime_error if no token is left at all
    // (not-a-number logits, a dead-ended grammar).
    size_t prepare(const float * logits, float beta);
    Sampled draw();
    void accept(llama_token token);

  private:
    void constrain(const float * logits);
    size_t collect(float lowest);
    llama_token pick(llama_sampler * chain, size_t n);

    size_t n_vocab_;
    llama_sampler * constraints_;
    llama_sampler * guided_;
    llama_sampler * plain_;
    std::vector<float> logits_;      // [n_vocab] what is left of the row, -inf where nothing is
    std::vector<float> block_bests_; // highest of each block of it
    llama_token best_ = 0;
    std::vector<llama_token_data> candidates_; // of one chain after another
    size_t n_guided_ = 0;                      // the first of them, for the guided chain
};

} // namespace cmg
