#include "residual_stream.hpp"

#include "fork_survey.hpp"
#include "operations.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {
namespace {

double cosine(const std::vector<float> & a, const std::vector<float> & b) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); i++) {
        ab += static_cast<double>(a[i]) * b[i];
        aa += static_cast<double>(a[i]) * a[i];
        bb += static_cast<double>(b[i]) * b[i];
    }
    return ab / std::sqrt(std::max(aa * bb, std::numeric_limits<double>::min()));
}

} // namespace

void ResidualStream::begin(const Plan & plan) {
    abandon();
    kept_.clear();
    entered_ = false;
    n_rows_ = static_cast<int64_t>(plan.rows.size());
    fork_ = plan.fork;
    std::vector<int64_t> last(plan.parts.size(), -1);
    for (size_t r = 0; r < plan.rows.size(); r++) {
        if (plan.rows[r].part >= 0) {
            last[static_cast<size_t>(plan.rows[r].part)] = static_cast<int64_t>(r);
        }
    }
    for (size_t i = 0; i < plan.parts.size(); i++) {
        if (plan.parts[i].read_residual && last[i] >= 0) {
            const double unknown = std::numeric_limits<double>::quiet_NaN();
            rows_.push_back({last[i],
                             plan.parts[i].selections,
                             {},
                             std::vector<double>(static_cast<size_t>(n_layer_), unknown)});
        }
    }
}

// In its last layer llama.cpp goes on with the rows alone whose logits are wanted: it picks them by
// an input of the graph that names them.
void ResidualStream::asked(const ggml_tensor * node) {
    if (rows_.empty() || op_of(node) != GGML_OP_GET_ROWS) {
        return;
    }
    const ggml_tensor * index = node->src[1];
    const bool input = op_of(index) == GGML_OP_NONE && index->type == GGML_TYPE_I32;
    if (input && node->src[0]->ne[1] == n_rows_ && index->ne[1] == 1) {
        kept_.resize(static_cast<size_t>(index->ne[0]));
        transfers_.read(index, kept_.data(), 0, kept_.size() * sizeof(int32_t));
    }
}

bool ResidualStream::reads(const ggml_tensor * node) const {
    const bool enters = !entered_ && std::strcmp(node->name, "norm-0") == 0;
    return !rows_.empty() && (enters || residual_layer(node) >= 0);
}

void ResidualStream::read(const ggml_tensor * node) {
    const int32_t il = residual_layer(node);
    const ggml_tensor * stream = il < 0 ? node->src[0] : node;
    if (stream->type != GGML_TYPE_F32 || op_of(stream) == GGML_OP_MUL_MAT || il >= n_layer_ ||
        (il >= 0 && !entered_)) {
        return; // its cosine stays unknown, which `end` reports
    }
    entered_ = true;
    for (Read & read : rows_) {
        const int64_t place = place_of(read.row, stream, il);
        if (place < 0) {
            continue;
        }
        std::vector<float> values(static_cast<size_t>(stream->ne[0]));
        transfers_.read(stream, values.data(), static_cast<size_t>(place) * stream->nb[1],
                        values.size() * sizeof(float));
        if (il >= 0 && read.values.size() == values.size()) {
            read.cosines[static_cast<size_t>(il)] = cosine(read.values, values);
        }
        read.values = std::move(values);
    }
}

// Where the row lies in the stream after layer `il`; -1 = it is not among its rows.
int64_t ResidualStream::place_of(int64_t row, const ggml_tensor * stream, int32_t il) const {
    const int64_t n = stream->ne[1];
    const bool below = il < fork_.layer - 1; // the first rows alone
    if (n == n_rows_ || (below && n == fork_.n_below)) {
        return row < n ? row : -1;
    }
    const auto kept = std::find(kept_.begin(), kept_.end(), static_cast<int32_t>(row));
    const bool picked = !below && n == static_cast<int64_t>(kept_.size());
    return picked && kept != kept_.end() ? kept - kept_.begin() : -1;
}

void ResidualStream::end() {
    const std::vector<Read> rows = std::exchange(rows_, {});
    for (const Read & read : rows) {
        if (std::any_of(read.cosines.begin(), read.cosines.end(),
                        [](double c) { return std::isnan(c); })) {
            throw std::runtime_error(
                "the residual stream of row " + std::to_string(read.row) +
                " cannot be read: its logits are not wanted, or this model's graph does not show "
                "it; name the layers or choose them by attention mass");
        }
    }
    for (const Read & read : rows) {
        read.selections->set_cosines(read.cosines);
    }
}

} // namespace cmg
