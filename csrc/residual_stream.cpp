#include "residual_stream.hpp"

#include "api.hpp"
#include "fork_survey.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
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

void ResidualStream::begin(int32_t n_layer) {
    row_.clear();
    cosines_.assign(static_cast<size_t>(n_layer), std::numeric_limits<double>::quiet_NaN());
}

bool ResidualStream::reads(const ggml_tensor * node) const {
    const bool enters = row_.empty() && std::strcmp(node->name, "norm-0") == 0;
    return !cosines_.empty() && (enters || residual_layer(node) >= 0);
}

void ResidualStream::read(const ggml_tensor * node) {
    const int32_t il = residual_layer(node);
    const ggml_tensor * stream = il < 0 ? node->src[0] : node;
    if (stream->type != GGML_TYPE_F32 || stream->op == GGML_OP_MUL_MAT ||
        (il >= 0 && row_.empty())) {
        return; // its cosine stays unknown, which `check` reports
    }
    std::vector<float> row(static_cast<size_t>(stream->ne[0]));
    const auto last = static_cast<size_t>(stream->ne[1] - 1);
    api().ggml_backend_tensor_get(stream, row.data(), last * stream->nb[1],
                                  row.size() * sizeof(float));
    if (il >= 0 && static_cast<size_t>(il) < cosines_.size()) {
        cosines_[static_cast<size_t>(il)] = cosine(row_, row);
    }
    row_ = std::move(row);
}

void ResidualStream::check() const {
    if (std::any_of(cosines_.begin(), cosines_.end(), [](double c) { return std::isnan(c); })) {
        throw std::runtime_error("the residual stream cannot be read in this model's graph; name "
                                 "the layers or choose them by attention mass");
    }
}

} // namespace cmg
