#include "fork.hpp"

#include "api.hpp"
#include "attention_node.hpp"
#include "row_dim.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace cmg {

const std::string * Fork::obstacle(int32_t layer, bool shrinks) const {
    if (surveyed_rows_.size() < 2) {
        return nullptr;
    }
    const std::string & enter = survey_->cannot_enter(layer);
    return enter.empty() && shrinks ? &survey_->cannot_shrink(layer) : &enter;
}

void Fork::check(const Plan & plan) const {
    const auto n = static_cast<int64_t>(plan.rows.size());
    if (!plan.forks() || plan.fork.n_below == n) {
        return;
    }
    const bool shrinks = plan.fork.n_below > 0;
    const std::string where = "rows cannot enter at layer " + std::to_string(plan.fork.layer);
    const std::string * why = obstacle(plan.fork.layer, shrinks);
    if (why == nullptr) {
        throw std::invalid_argument(where + ": two decodes of different numbers of rows must be "
                                            "surveyed before");
    }
    if (!why->empty()) {
        throw std::invalid_argument(where + ": " + *why);
    }
    const int64_t fewest = *surveyed_rows_.begin();
    const int64_t most = *surveyed_rows_.rbegin();
    if (shrinks && (n < fewest || n > most)) {
        throw std::invalid_argument(where + " behind others in a decode of " + std::to_string(n) +
                                    " rows: decodes of " + std::to_string(fewest) + " to " +
                                    std::to_string(most) + " were surveyed");
    }
}

void Fork::begin() {
    entered_ = false;
    asked_.clear();
    below_.clear();
    copies_.clear();
    fewer_.clear();
}

bool Fork::ask(ggml_tensor * node) {
    if (plan_.fork.survey) {
        asked_.push_back(node);
    }
    if (!plan_.forks()) {
        return false;
    }
    if (entered_) {
        check_not_from_below(node);
        return false;
    }
    if (leaves_out()) {
        leave_out(node);
    }
    return is_entrance(node) || is_copied(node);
}

bool Fork::is_entrance(const ggml_tensor * node) const {
    return plan_.forks() && !entered_ && residual_layer(node) == plan_.fork.layer - 1;
}

bool Fork::is_copied(const ggml_tensor * node) const {
    const auto it = below_.find(node);
    if (plan_.fork.n_below == 0 || it == below_.end()) {
        return false;
    }
    const ForkSurvey::Node & surveyed = survey_->nodes()[static_cast<size_t>(it->second)];
    return surveyed.is_copied && surveyed.row_dim != no_rows;
}

void Fork::leave_out(ggml_tensor * node) {
    const size_t place = below_.size();
    below_.emplace(node, static_cast<int32_t>(place));
    if (plan_.fork.n_below == 0) {
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0) {
            note_change(node);
            node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
            if (node->view_src == nullptr) {
                clear_choices(node, 0);
            }
        }
        return;
    }
    check_as_surveyed(node, place);
    const auto & nodes = survey_->nodes();
    for (ggml_tensor * src : node->src) {
        const ForkSurvey::Source source = source_of(src);
        if (source.is_copy && copies_.insert(src).second) {
            shrink(src, nodes[static_cast<size_t>(source.place)]);
        }
    }
    shrink(node, nodes[place]);
}

// Which experts a row takes is read by ggml's scheduler before their product is asked about, to
// copy those experts alone to a device, and one that does not exist ends the process. Rows that are
// left out have chosen none, so they take the first. Nothing else lives in the node's memory: it
// has been computed, or none that was asked about before it will be.
void Fork::clear_choices(ggml_tensor * node, size_t n_bytes_kept) {
    const size_t n_bytes = api().ggml_nbytes(node);
    if (node->type != GGML_TYPE_I32 || node->buffer == nullptr || n_bytes <= n_bytes_kept) {
        return;
    }
    const std::vector<uint8_t> zeros(n_bytes - n_bytes_kept, 0);
    api().ggml_backend_tensor_set(node, zeros.data(), n_bytes_kept, zeros.size());
}

void Fork::shrink(ggml_tensor * t, const ForkSurvey::Node & surveyed) {
    const int32_t dim = surveyed.row_dim;
    if (dim == no_rows) {
        return;
    }
    if (t->ne[dim] != surveyed.n_per_row * n_rows()) {
        throw std::runtime_error(std::string(t->name) + " does not have a row a token");
    }
    note_change(t);
    shrink_rows_inplace(t, dim, n_rows(), plan_.fork.n_below);
    shrink_positions(t);
}

void Fork::shrink_positions(ggml_tensor * node) {
    const ggml_tensor * positions = sectioned_positions(node, n_rows());
    if (positions != nullptr) {
        changed_.back().positions = node->src[1];
        node->src[1] = fewer_positions(positions);
    }
}

// The first positions of each section. They are read where they lie: an input is written, and
// copied for another backend, before any node that reads it is asked about.
ggml_tensor * Fork::fewer_positions(const ggml_tensor * positions) {
    ggml_tensor *& fewer = fewer_[positions];
    if (fewer != nullptr) {
        return fewer;
    }
    const size_t section = static_cast<size_t>(n_rows()) * sizeof(int32_t);
    const size_t kept = static_cast<size_t>(plan_.fork.n_below) * sizeof(int32_t);
    const size_t n_sections = api().ggml_nbytes(positions) / section;
    std::vector<uint8_t> bytes(n_sections * kept);
    for (size_t i = 0; i < n_sections; i++) {
        transfers_.read(positions, bytes.data() + i * kept, i * section, kept);
    }
    ggml_tensor shape = *positions;
    shape.ne[0] = static_cast<int64_t>(bytes.size() / sizeof(int32_t));
    std::fill_n(shape.nb + 1, GGML_MAX_DIMS - 1, bytes.size());
    if (stand_ins_.size() < fewer_.size()) {
        stand_ins_.emplace_back();
    }
    fewer = stand_ins_[fewer_.size() - 1].assign(&shape, bytes);
    return fewer;
}

ForkSurvey::Source Fork::source_of(const ggml_tensor * src) const {
    if (src == nullptr) {
        return {};
    }
    const auto it = below_.find(src);
    const bool is_copy = it == below_.end();
    const int32_t place = is_copy ? survey_->copied(src) : it->second;
    const auto & nodes = survey_->nodes();
    const bool below =
        place >= 0 && static_cast<size_t>(place) < std::min(below_.size(), nodes.size());
    const bool rows = below && nodes[static_cast<size_t>(place)].row_dim != no_rows;
    return rows ? ForkSurvey::Source{place, is_copy} : ForkSurvey::Source{};
}

void Fork::check_as_surveyed(const ggml_tensor * node, size_t place) const {
    const auto & nodes = survey_->nodes();
    const bool known = place < nodes.size() && nodes[place].is(node);
    if (!known || nodes[place].row_dim == unclear_rows) {
        throw std::runtime_error(std::string(node->name) +
                                 " is not as in the decodes that were surveyed");
    }
    const auto & surveyed = nodes[place];
    for (size_t i = 0; i < surveyed.sources.size(); i++) {
        if (!(source_of(node->src[i]) == surveyed.sources[i])) {
            throw std::runtime_error(std::string(node->name) + " reads " +
                                     (node->src[i] == nullptr ? "nothing" : node->src[i]->name) +
                                     ", unlike in the decodes that were surveyed");
        }
    }
}

void Fork::check_not_from_below(const ggml_tensor * node) const {
    if (!leaves_out()) {
        return;
    }
    for (const ggml_tensor * src : node->src) {
        if (src != nullptr && (below_.count(root(src)) != 0 || source_of(src).place >= 0)) {
            throw std::runtime_error(std::string("layer ") + std::to_string(plan_.fork.layer) +
                                     " and up read " + src->name +
                                     " from below, unlike in the decodes that were surveyed");
        }
    }
}

void Fork::computed(ggml_tensor * node) {
    if (is_entrance(node)) {
        restore();
        enter(node);
    } else if (is_copied(node)) {
        const size_t n_bytes_kept = api().ggml_nbytes(node);
        restore(node);
        clear_choices(node, n_bytes_kept);
    }
}

// Rows below come first, so that others may enter with what they note.
void Fork::enter(ggml_tensor * residual) {
    entered_ = true;
    below_.erase(residual);
    const bool rows = residual->type == GGML_TYPE_F32 && residual->ne[1] == n_rows();
    if (!rows) {
        throw std::runtime_error(std::string(residual->name) + " is not one row of F32 a token");
    }
    const auto n_embd = static_cast<size_t>(residual->ne[0]);
    for (size_t r = 0; r < plan_.rows.size(); r++) {
        const Row & row = plan_.rows[r];
        const size_t offset = r * residual->nb[1];
        if (plan_.enters(r)) {
            const Residuals::Row * noted = plan_.part(row).residuals->find(row.residual);
            if (noted == nullptr || noted->values.size() != n_embd) {
                throw std::runtime_error("residual " + std::to_string(row.residual) +
                                         " is none of this model's");
            }
            api().ggml_backend_tensor_set(residual, noted->values.data(), offset,
                                          n_embd * sizeof(float));
            n_left_out_++;
        } else if (row.residual >= 0) {
            auto & values = plan_.part(row).residuals->note(row.residual, plan_.fork.layer);
            values.resize(n_embd);
            transfers_.read(residual, values.data(), offset, n_embd * sizeof(float));
        }
    }
}

void Fork::end() {
    const bool missed = plan_.forks() && !entered_;
    if (plan_.fork.survey) {
        take_survey();
    }
    const int32_t layer = plan_.fork.layer;
    abandon();
    if (missed) {
        throw std::runtime_error("l_out-" + std::to_string(layer - 1) +
                                 ", what the layers below give, was not found in the graph");
    }
}

void Fork::take_survey() {
    auto survey = std::make_unique<ForkSurvey>(asked_, n_layer_, n_rows());
    if (survey_ == nullptr) {
        survey_ = std::move(survey);
    } else {
        survey_->agree_with(*survey);
    }
    surveyed_rows_.insert(n_rows());
}

void Fork::abandon() {
    restore();
    asked_.clear();
    below_.clear();
    copies_.clear();
    fewer_.clear();
}

void Fork::note_change(ggml_tensor * t) {
    Changed before{t, {}, {}, t->flags, nullptr};
    std::copy_n(t->ne, GGML_MAX_DIMS, before.ne);
    std::copy_n(t->nb, GGML_MAX_DIMS, before.nb);
    changed_.push_back(before);
}

void Fork::restore() {
    std::for_each(changed_.begin(), changed_.end(), undo);
    changed_.clear();
}

// Its change is the newest: a boundary lies behind it.
void Fork::restore(const ggml_tensor * node) {
    if (!changed_.empty() && changed_.back().t == node) {
        undo(changed_.back());
        changed_.pop_back();
    }
}

void Fork::undo(const Changed & before) {
    std::copy_n(before.ne, GGML_MAX_DIMS, before.t->ne);
    std::copy_n(before.nb, GGML_MAX_DIMS, before.t->nb);
    before.t->flags = before.flags;
    if (before.positions != nullptr) {
        before.t->src[1] = before.positions;
    }
}

} // namespace cmg
