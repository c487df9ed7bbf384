#include "policy.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace cmg {
namespace {

// The k most influential positions, ascending.
std::vector<int32_t> top_k(const float * influence, size_t n, size_t k) {
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int32_t a, int32_t b) {
        return influence[a] != influence[b] ? influence[a] > influence[b] : a < b;
    };
    if (k < n) {
        std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(),
                         before);
        order.resize(k);
    }
    std::sort(order.begin(), order.end());
    return order;
}

std::vector<int32_t> above(const float * influence, size_t n, double threshold) {
    std::vector<int32_t> picked;
    for (size_t i = 0; i < n; i++) {
        if (influence[i] > threshold) {
            picked.push_back(static_cast<int32_t>(i));
        }
    }
    return picked;
}

double mean_plus_std(const float * influence, size_t n, double factor) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += influence[i];
    }
    const double mean = sum / static_cast<double>(n);
    double squares = 0;
    for (size_t i = 0; i < n; i++) {
        squares += (influence[i] - mean) * (influence[i] - mean);
    }
    return mean + factor * std::sqrt(squares / static_cast<double>(n));
}

size_t count_for_mass(const float * influence, size_t n, double share) {
    std::vector<float> sorted(influence, influence + n);
    std::sort(sorted.begin(), sorted.end(), [](float a, float b) { return a > b; });
    const double wanted = share * std::accumulate(sorted.begin(), sorted.end(), 0.0);
    double held = 0;
    size_t k = 0;
    while (k < n && held < wanted) {
        held += sorted[k++];
    }
    return k;
}

} // namespace

std::vector<int32_t> select_tokens(const TokenPolicy & policy, const float * influence, size_t n) {
    if (n == 0) {
        return {};
    }
    switch (policy.rule) {
    case TokenRule::mean_std:
        return above(influence, n, mean_plus_std(influence, n, policy.value));
    case TokenRule::cumulative_mass:
        return top_k(influence, n, count_for_mass(influence, n, policy.value));
    case TokenRule::top_ratio:
        break;
    }
    if (policy.value <= 0) {
        return {};
    }
    const auto k = static_cast<size_t>(std::floor(policy.value * static_cast<double>(n) + 0.5));
    return top_k(influence, n, std::clamp<size_t>(k, 1, n));
}

} // namespace cmg
