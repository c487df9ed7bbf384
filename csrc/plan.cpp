#include "plan.hpp"

#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {
namespace {

std::string name_of(size_t r) {
    return "row " + std::to_string(r);
}

void check_fork(const ForkPlan & fork, size_t n_rows) {
    if (fork.layer < 0) {
        throw std::invalid_argument("a fork at layer " + std::to_string(fork.layer) +
                                    ": 1 and up, or 0 for none");
    }
    if (fork.n_below < 0 || static_cast<size_t>(fork.n_below) > n_rows) {
        throw std::invalid_argument(std::to_string(fork.n_below) + " rows below a fork of " +
                                    std::to_string(n_rows) + " rows");
    }
    if (fork.survey && (fork.layer > 0 || n_rows < 2)) {
        throw std::invalid_argument("a survey is made of 2 rows and more, and without a fork");
    }
}

void check_part(const Plan & plan, size_t r) {
    const Row & row = plan.rows[r];
    if (row.part < -1 || row.part >= static_cast<int64_t>(plan.parts.size())) {
        throw std::invalid_argument(name_of(r) + " is of part " + std::to_string(row.part) +
                                    " and the plan has " + std::to_string(plan.parts.size()) +
                                    " (-1 = none)");
    }
    const bool asks =
        row.image_token >= 0 || row.observe >= 0 || row.mask >= 0 || row.residual >= 0;
    if (row.part == -1 && asks) {
        throw std::invalid_argument(name_of(r) + " is of no part and has an image token or a "
                                                 "slot; name its part");
    }
}

void check_residual(const Plan & plan, size_t r) {
    const Row & row = plan.rows[r];
    if (row.residual >= 0 && !plan.forks()) {
        throw std::invalid_argument(name_of(r) + " names residual " + std::to_string(row.residual) +
                                    " and the plan has no fork");
    }
    if (row.residual >= 0 && plan.part(row).residuals == nullptr) {
        throw std::invalid_argument(name_of(r) + " names residual " + std::to_string(row.residual) +
                                    " and its part has none");
    }
    if (!plan.enters(r)) {
        return;
    }
    if (row.residual < 0) {
        throw std::invalid_argument(name_of(r) + " enters at layer " +
                                    std::to_string(plan.fork.layer) + " and names no residual");
    }
    const Part & part = plan.part(row);
    if (part.read_residual) {
        throw std::invalid_argument(name_of(r) + " enters at layer " +
                                    std::to_string(plan.fork.layer) +
                                    " and the residual stream of its part is to be read below");
    }
    for (int32_t il = 0; il < plan.fork.layer; il++) {
        const bool known = il < part.selections->n_layer();
        const bool masked = known && row.mask >= 0 && part.masks(il);
        const bool observed = known && row.observe >= 0 && part.observes(il);
        if (masked || observed) {
            throw std::invalid_argument(
                name_of(r) + " enters at layer " + std::to_string(plan.fork.layer) + " and is " +
                (masked ? "masked" : "observed") + " below, in layer " + std::to_string(il));
        }
    }
}

// A fork reads what rows below it write in the same decode.
void check_noted(const Plan & plan) {
    std::set<std::pair<const Residuals *, int32_t>> written;
    for (size_t r = 0; r < plan.rows.size(); r++) {
        const Row & row = plan.rows[r];
        if (row.residual < 0) {
            continue;
        }
        const Residuals * residuals = plan.part(row).residuals.get();
        if (!plan.enters(r)) {
            written.emplace(residuals, row.residual);
        } else if (written.count({residuals, row.residual}) == 0) {
            const Residuals::Row * noted = residuals->find(row.residual);
            if (noted == nullptr || noted->layer != plan.fork.layer) {
                throw std::out_of_range(
                    name_of(r) + " enters at layer " + std::to_string(plan.fork.layer) +
                    " with residual " + std::to_string(row.residual) +
                    (noted == nullptr ? ", where nothing was noted"
                                      : ", noted at layer " + std::to_string(noted->layer)));
            }
        }
    }
}

void check_recordings(const Plan & plan) {
    for (size_t part = 0; part < plan.parts.size(); part++) {
        const Part & of = plan.parts[part];
        if (of.record < 0) {
            continue;
        }
        const std::string name = "part " + std::to_string(part);
        if (of.recording == nullptr) {
            throw std::invalid_argument(name + " names record " + std::to_string(of.record) +
                                        " and has no recording");
        }
        for (const int32_t il : of.recording->layers()) {
            if (il >= of.selections->n_layer()) {
                throw std::invalid_argument(name + " records layer " + std::to_string(il) + " of " +
                                            std::to_string(of.selections->n_layer()));
            }
        }
        if (plan.recorded_row(part) < 0) {
            throw std::invalid_argument(name + " has no row that could be recorded: all of its "
                                               "rows hide something or enter a fork");
        }
    }
}

} // namespace

int64_t Plan::recorded_row(size_t part) const {
    if (parts[part].record < 0) {
        return -1;
    }
    for (size_t r = rows.size(); r > 0; r--) {
        const Row & row = rows[r - 1];
        if (row.part == static_cast<int64_t>(part) && row.mask < 0 && !enters(r - 1)) {
            return static_cast<int64_t>(r - 1);
        }
    }
    return -1;
}

void check_plan(const Plan & plan) {
    check_fork(plan.fork, plan.rows.size());
    for (size_t r = 0; r < plan.rows.size(); r++) {
        check_part(plan, r);
        check_residual(plan, r);
    }
    check_recordings(plan);
}

void check_slots(const Plan & plan, int32_t n_layer) {
    for (const Part & part : plan.parts) {
        if (part.selections->n_layer() != n_layer) {
            throw std::invalid_argument("a part for " + std::to_string(part.selections->n_layer()) +
                                        " layers, a patch for " + std::to_string(n_layer));
        }
    }
    for (size_t r = 0; r < plan.rows.size(); r++) {
        const Row & row = plan.rows[r];
        const int32_t size = row.part < 0 ? 0 : plan.part(row).selections->size();
        for (const int32_t slot : {row.observe, row.mask}) {
            if (slot >= 0 && slot >= size) {
                throw std::out_of_range(name_of(r) + " names slot " + std::to_string(slot) +
                                        " of " + std::to_string(size));
            }
        }
    }
    check_noted(plan);
}

} // namespace cmg
