#include "sampler.hpp"

#include "api.hpp"
#include "simd.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace cmg {
namespace {

constexpr float neg_inf = -std::numeric_limits<float>::infinity();

constexpr size_t block = 64; // logits that are looked at together

// Makes what is no number, or forbidden, -inf; returns the highest of the others.
float keep_finite_inplace(float * logits, size_t n) {
    float highest = neg_inf;
    CMG_SIMD(reduction(max : highest))
    for (size_t i = 0; i < n; i++) {
        const bool finite = std::fabs(logits[i]) <= std::numeric_limits<float>::max();
        logits[i] = finite ? logits[i] : neg_inf;
        highest = logits[i] > highest ? logits[i] : highest;
    }
    return highest;
}

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

SamplerInterface make_interface() {
    SamplerInterface interface;
    interface.known.name = guidance_name;
    interface.known.apply = guidance_apply;
    return interface;
}

} // namespace

llama_sampler * new_guidance_sampler(GuidanceState * state) {
    static SamplerInterface interface = make_interface();
    return api().llama_sampler_init(&interface.known, state);
}

PairSampler::PairSampler(int32_t n_vocab, llama_sampler * constraints, llama_sampler * guided,
                         llama_sampler * plain)
    : n_vocab_(static_cast<size_t>(n_vocab)), constraints_(constraints), guided_(guided),
      plain_(plain), logits_(n_vocab_), block_bests_((n_vocab_ + block - 1) / block),
      candidates_(n_vocab_) {}

size_t PairSampler::prepare(const float * logits, float beta) {
    if (constraints_ == nullptr) {
        std::copy_n(logits, n_vocab_, logits_.begin());
    } else {
        constrain(logits);
    }
    // All-NaN or all-forbidden rows would send the samplers out of bounds.
    for (size_t b = 0; b < block_bests_.size(); b++) {
        const size_t n = std::min(block, n_vocab_ - b * block);
        block_bests_[b] = keep_finite_inplace(logits_.data() + b * block, n);
    }
    const auto best = std::max_element(block_bests_.begin(), block_bests_.end());
    if (*best == neg_inf) {
        throw std::runtime_error("no token can follow: every logit is forbidden or not a number");
    }
    const auto first = static_cast<size_t>(best - block_bests_.begin()) * block;
    best_ = static_cast<llama_token>(
        std::find(logits_.begin() + static_cast<std::ptrdiff_t>(first), logits_.end(), *best) -
        logits_.begin());
    n_guided_ = collect(plausible_from(*best, beta));
    return n_guided_;
}

// The row behind the constraints, which may drop tokens and leave the others in any order.
void PairSampler::constrain(const float * logits) {
    for (size_t i = 0; i < n_vocab_; i++) {
        candidates_[i] = {static_cast<llama_token>(i), logits[i], 0.0f};
    }
    llama_token_data_array all = {candidates_.data(), n_vocab_, -1, false};
    api().llama_sampler_apply(constraints_, &all);
    std::fill(logits_.begin(), logits_.end(), neg_inf);
    for (size_t i = 0; i < all.size; i++) {
        logits_[static_cast<size_t>(all.data[i].id)] = all.data[i].logit;
    }
}

// Makes candidates of the tokens with logits of at least `lowest`, by number; returns how many.
size_t PairSampler::collect(float lowest) {
    size_t n = 0;
    for (size_t b = 0; b < block_bests_.size(); b++) {
        if (block_bests_[b] < lowest || block_bests_[b] == neg_inf) {
            continue;
        }
        for (size_t i = b * block; i < std::min((b + 1) * block, n_vocab_); i++) {
            if (logits_[i] >= lowest && logits_[i] != neg_inf) {
                candidates_[n++] = {static_cast<llama_token>(i), logits_[i], 0.0f};
            }
        }
    }
    return n;
}

Sampled PairSampler::draw() {
    const llama_token token = pick(guided_, n_guided_);
    return {token, plain_ == nullptr ? best_ : pick(plain_, collect(neg_inf))};
}

llama_token PairSampler::pick(llama_sampler * chain, size_t n) {
    llama_token_data_array cur = {candidates_.data(), n, -1, false};
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
