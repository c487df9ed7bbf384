// Which image tokens are masked: pure functions on one row's influence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cmg {

enum class TokenRule : int32_t {
    top_ratio,       // the round(value * n) most influential tokens, at least one if value > 0
    mean_std,        // those with influence > mean + value * std (population std)
    cumulative_mass, // the fewest tokens that hold a share `value` of all n tokens' influence
};

struct TokenPolicy {
    TokenRule rule = TokenRule::top_ratio;
    double value = 0.5;
};

// Positions in `influence` (n floats >= 0) that the policy picks, ascending. Equal influences are
// taken in order of position.
std::vector<int32_t> select_tokens(const TokenPolicy & policy, const float * influence, size_t n);

} // namespace cmg
