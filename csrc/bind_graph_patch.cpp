#include "bindings.hpp"
#include "graph_patch.hpp"

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace cmg {
namespace {

std::vector<char> layer_flags(const std::vector<int32_t> & layers, int32_t n_layer) {
    std::vector<char> flags(static_cast<size_t>(n_layer), 0);
    for (const int32_t il : layers) {
        if (il < 0 || il >= n_layer) {
            throw std::invalid_argument("layer " + std::to_string(il) + " of " +
                                        std::to_string(n_layer));
        }
        flags[static_cast<size_t>(il)] = 1;
    }
    return flags;
}

std::vector<Row> to_rows(const Array<int32_t> & rows) {
    if (rows.ndim() != 2 || rows.shape(1) != 4) {
        throw std::invalid_argument("rows is [n_rows, 4]: seq, image_token, observe, mask");
    }
    std::vector<Row> out;
    const auto at = rows.unchecked<2>();
    for (py::ssize_t r = 0; r < rows.shape(0); r++) {
        out.push_back({at(r, 0), at(r, 1), at(r, 2), at(r, 3)});
    }
    return out;
}

Plan new_plan(const Array<int32_t> & rows, int32_t n_layer, const std::vector<int32_t> & observe,
              const std::vector<int32_t> & mask, const TokenPolicy & policy, int32_t n_image_tokens,
              bool keep_influence, bool read_residual, std::optional<ForkPlan> fork) {
    Plan plan;
    plan.rows = to_rows(rows);
    plan.observe_layers = layer_flags(observe, n_layer);
    plan.mask_layers = layer_flags(mask, n_layer);
    plan.policy = policy;
    plan.n_image_tokens = n_image_tokens;
    plan.keep_influence = keep_influence;
    plan.read_residual = read_residual;
    plan.fork = fork.value_or(ForkPlan{});
    return plan;
}

void begin(GraphPatch & patch, const Plan & plan) {
    if (static_cast<int32_t>(plan.mask_layers.size()) != patch.n_layer()) {
        throw std::invalid_argument("a plan for " + std::to_string(plan.mask_layers.size()) +
                                    " layers, a patch for " + std::to_string(patch.n_layer()));
    }
    patch.begin(plan);
}

std::vector<int64_t> cells(GraphPatch & patch, int32_t seq, int32_t il) {
    if (il < 0 || il >= patch.n_layer()) {
        throw std::out_of_range("layer " + std::to_string(il) + " of " +
                                std::to_string(patch.n_layer()));
    }
    return patch.ledger().cells(seq, il);
}

} // namespace

void bind_graph_patch(py::module_ & m) {
    py::class_<Selections, std::shared_ptr<Selections>>(m, "Selections")
        .def(py::init<int32_t>(), py::arg("n_layer"))
        .def("resize", &Selections::resize, py::arg("n_slots"))
        .def("keep_last", &Selections::keep_last)
        .def("grow", &Selections::grow, py::arg("n_slots"))
        .def("__len__", &Selections::size)
        .def_property_readonly("n_bytes", &Selections::n_bytes)
        .def("tokens", [](const Selections & s, int32_t slot,
                          int32_t il) { return to_array(s.tokens(slot, il)); })
        .def("set_tokens",
             [](Selections & s, int32_t slot, int32_t il, const Array<int32_t> & tokens) {
                 s.set_tokens(slot, il, {tokens.data(), tokens.data() + tokens.size()});
             })
        .def("influence", [](const Selections & s, int32_t slot, int32_t il) {
            return to_array(s.influence(slot, il));
        });
    py::class_<ForkPlan>(m, "ForkPlan")
        .def(py::init([](int32_t layer, int32_t n_below, std::vector<int32_t> slots, bool survey) {
                 return ForkPlan{layer, n_below, std::move(slots), survey};
             }),
             py::kw_only(), py::arg("layer"), py::arg("n_below"), py::arg("slots"),
             py::arg("survey") = false);
    py::class_<Plan>(m, "Plan").def(
        py::init(&new_plan), py::arg("rows"), py::kw_only(), py::arg("n_layer"),
        py::arg("observe_layers"), py::arg("mask_layers"), py::arg("policy"),
        py::arg("n_image_tokens"), py::arg("keep_influence") = false,
        py::arg("read_residual") = false, py::arg("fork") = std::nullopt);
    py::class_<GraphPatch>(m, "GraphPatch")
        .def(py::init<int32_t, std::shared_ptr<Selections>, int32_t>(), py::arg("n_layer"),
             py::arg("selections"), py::arg("n_threads") = 1)
        .def_property_readonly("callback",
                               [](const GraphPatch &) {
                                   return reinterpret_cast<std::uintptr_t>(&GraphPatch::callback);
                               })
        .def_property_readonly(
            "user_data",
            [](const GraphPatch & patch) { return reinterpret_cast<std::uintptr_t>(&patch); })
        .def_property_readonly(
            "n_boundaries",
            [](const GraphPatch & patch) { return patch.observation().n_boundaries(); })
        .def_property_readonly("n_masks",
                               [](const GraphPatch & patch) { return patch.masking().n_masks(); })
        .def_property_readonly("cosines",
                               [](const GraphPatch & patch) { return to_array(patch.cosines()); })
        .def_property_readonly("n_left_out",
                               [](const GraphPatch & patch) { return patch.fork().n_left_out(); })
        .def(
            "fork_obstacle",
            [](const GraphPatch & patch, int32_t layer, int64_t n_rows, int64_t n_below) {
                const std::string * why = patch.fork().obstacle(layer, n_rows, n_below);
                return why == nullptr ? std::nullopt : std::make_optional(*why);
            },
            py::arg("layer"), py::kw_only(), py::arg("n_rows"), py::arg("n_below"))
        .def("begin", &begin, py::arg("plan"))
        .def("end", &GraphPatch::end)
        .def("abandon", &GraphPatch::abandon)
        .def("cells", [](GraphPatch & patch, int32_t seq,
                         int32_t il) { return to_array(cells(patch, seq, il)); })
        .def("copy_image_tokens", [](GraphPatch & patch, int32_t src, int32_t dst,
                                     int32_t n_tokens) { patch.ledger().copy(src, dst, n_tokens); })
        .def("truncate_image_tokens",
             [](GraphPatch & patch, int32_t seq, int32_t n_tokens) {
                 patch.ledger().truncate(seq, n_tokens);
             })
        .def("clear_image_tokens", [](GraphPatch & patch) { patch.ledger().clear(); });
}

} // namespace cmg
