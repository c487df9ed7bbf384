#include "sampler.hpp"

#include "api.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace cmg {
namespace {

constexpr float neg_inf = -std::numeric_limits<float>::infinity();

// The lowest plausible logit.
float plausible_from(float highest, float beta) {
    return beta > 0 ? highest + std::log(beta) : neg_inf;
}

const char * guidance_name(const llama_sampler *) {
    return "cross-modal-guidance";
}

void guidance_apply(llama_sampler * smpl, llama_token_data_array * cur) {
    auto & state = *static_cast<GuidanceState *>(smpl->ctx);
    float highest = neg_inf;
    for (size_t i = 0; i < cur->size; i++) {
        highest = std::max(highest, cur->data[i].logit);
    }
    const float threshold = plausible_from(highest, state.beta);
    const bool guided = state.degraded != nullptr && state.alpha != 0;
    size_t kept = 0;
    for (size_t i = 0; i < cur->size; i++) {
        llama_token_data token = cur->data[i];
        if (token.logit < threshold || token.logit == neg_inf) {
            continue;
        }
        if (guided) {
            const float score =
                token.logit + state.alpha * (state.original[token.id] - state.degraded[token.id]);
            state.finite = state.finite && std::isfinite(score);
            token.logit = std::isfinite(score) ? score : token.logit;
        }
        cur->data[kept++] = token;
    }
    cur->size = kept;
    cur->sorted = cur->sorted && !guided;
}

llama_sampler_i make_interface() {
    llama_sampler_i interface{};
    interface.name = guidance_name;
    interface.apply = guidance_apply;
    return interface;
}

} // namespace

llama_sampler * new_guidance_sampler(GuidanceState * state) {
    static llama_sampler_i interface = make_interface();
    return api().llama_sampler_init(&interface, state);
}

PairSampler::PairSampler(int32_t n_vocab, llama_sampler * constraints, llama_sampler * guided,
                         llama_sampler * plain)
    : constraints_(constraints), guided_(guided), plain_(plain),
      guided_candidates_(static_cast<size_t>(n_vocab)),
      plain_candidates_(static_cast<size_t>(n_vocab)) {}

size_t PairSampler::prepare(const float * logits, float beta, size_t enough) {
    auto & candidates = guided_candidates_;
    for (size_t i = 0; i < candidates.size(); i++) {
        candidates[i] = {static_cast<llama_token>(i), logits[i], 0.0f};
    }
    llama_token_data_array all = {candidates.data(), candidates.size(), -1, false};
    if (constraints_ != nullptr) {
        api().llama_sampler_apply(constraints_, &all);
    }
    // An all-NaN or all-forbidden row would send the samplers below out of bounds.
    const auto last = std::remove_if(
        candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(all.size),
        [](const llama_token_data & t) { return !std::isfinite(t.logit); });
    n_candidates_ = static_cast<size_t>(last - candidates.begin());
    if (n_candidates_ == 0) {
        throw std::runtime_error("no token can follow: every logit is forbidden or not a number");
    }
    std::copy_n(candidates.begin(), n_candidates_, plain_candidates_.begin());
    float highest = neg_inf;
    for (size_t i = 0; i < n_candidates_; i++) {
        highest = std::max(highest, candidates[i].logit);
    }
    size_t n_plausible = 0;
    for (size_t i = 0; i < n_candidates_ && n_plausible < enough; i++) {
        n_plausible += candidates[i].logit >= plausible_from(highest, beta);
    }
    return n_plausible;
}

Sampled PairSampler::draw() {
    const llama_token plain = pick(plain_, plain_candidates_);
    return {pick(guided_, guided_candidates_), plain};
}

llama_token PairSampler::pick(llama_sampler * chain, std::vector<llama_token_data> & candidates) {
    llama_token_data_array cur = {candidates.data(), n_candidates_, -1, false};
    api().llama_sampler_apply(chain, &cur);
    if (cur.selected < 0 || static_cast<size_t>(cur.selected) >= cur.size) {
        throw std::runtime_error("the sampler chain selected no token");
    }
    return cur.data[cur.selected].id;
}

void PairSampler::accept(llama_token token) {
    for (llama_sampler * chain : {constraints_, guided_, plain_}) {
        if (chain != nullptr) {
            api().llama_sampler_accept(chain, token);
        }
    }
}

} // namespace cmg
