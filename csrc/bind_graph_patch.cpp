#include "bindings.hpp"
#include "graph_patch.hpp"

#include <memory>
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
    if (rows.ndim() != 2 || rows.shape(1) != 6) {
        throw std::invalid_argument(
            "rows is [n_rows, 6]: seq, part, image_token, observe, mask, residual");
    }
    std::vector<Row> out;
    const auto at = rows.unchecked<2>();
    for (py::ssize_t r = 0; r < rows.shape(0); r++) {
        out.push_back({at(r, 0), at(r, 1), at(r, 2), at(r, 3), at(r, 4), at(r, 5)});
    }
    return out;
}

Part new_part(std::shared_ptr<Selections> selections, const TokenPolicy & policy,
              int32_t n_image_tokens, const std::vector<int32_t> & observe,
              const std::vector<int32_t> & mask, std::shared_ptr<Residuals> residuals,
              bool keep_influence, bool read_residual, std::shared_ptr<Recording> recording,
              int32_t record) {
    Part part;
    part.policy = policy;
    part.n_image_tokens = n_image_tokens;
    part.observe_layers = layer_flags(observe, selections->n_layer());
    part.mask_layers = layer_flags(mask, selections->n_layer());
    part.selections = std::move(selections);
    part.residuals = std::move(residuals);
    part.keep_influence = keep_influence;
    part.read_residual = read_residual;
    part.recording = std::move(recording);
    part.record = record;
    return part;
}

Plan new_plan(const Array<int32_t> & rows, std::vector<Part> parts, std::optional<ForkPlan> fork) {
    Plan plan{to_rows(rows), std::move(parts), fork.value_or(ForkPlan{})};
    check_plan(plan);
    return plan;
}

std::vector<int64_t> cells(GraphPatch & patch, int32_t seq, int32_t il) {
    if (il < 0 || il >= patch.n_layer()) {
        throw std::out_of_range("layer " + std::to_string(il) + " of " +
                                std::to_string(patch.n_layer()));
    }
    return patch.ledger().cells(seq, il);
}

void bind_selections(py::module_ & m) {
    py::class_<Selections, std::shared_ptr<Selections>>(m, "Selections")
        .def(py::init<int32_t>(), py::arg("n_layer"))
        .def("resize", &Selections::resize, py::arg("n_slots"))
        .def("keep_last", &Selections::keep_last)
        .def("grow", &Selections::grow, py::arg("n_slots"))
        .def("__len__", &Selections::size)
        .def_property_readonly("n_layer", &Selections::n_layer)
        .def_property_readonly("n_bytes", &Selections::n_bytes)
        .def("tokens", [](const Selections & s, int32_t slot,
                          int32_t il) { return to_array(s.tokens(slot, il)); })
        .def("set_tokens",
             [](Selections & s, int32_t slot, int32_t il, const Array<int32_t> & tokens) {
                 s.set_tokens(slot, il, {tokens.data(), tokens.data() + tokens.size()});
             })
        .def("influence", [](const Selections & s, int32_t slot,
                             int32_t il) { return to_array(s.influence(slot, il)); })
        .def_property_readonly("cosines",
                               [](const Selections & s) { return to_array(s.cosines()); });
    py::class_<Residuals, std::shared_ptr<Residuals>>(m, "Residuals").def(py::init<>());
    py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
        .def(py::init<std::vector<int32_t>, int32_t>(), py::arg("layers"),
             py::arg("n_image_tokens"))
        .def("__len__", &Recording::size)
        .def_property_readonly("layers", [](const Recording & r) { return to_array(r.layers()); })
        .def("weights", [](const Recording & r) {
            const std::vector<py::ssize_t> shape = {
                r.size(), static_cast<py::ssize_t>(r.layers().size()), r.n_image_tokens()};
            return py::array_t<float>(shape, r.weights().data());
        });
}

void bind_plan(py::module_ & m) {
    py::class_<Part>(m, "Part").def(
        py::init(&new_part), py::kw_only(), py::arg("selections").none(false), py::arg("policy"),
        py::arg("n_image_tokens"), py::arg("observe_layers") = std::vector<int32_t>{},
        py::arg("mask_layers") = std::vector<int32_t>{},
        py::arg("residuals") = std::shared_ptr<Residuals>(), py::arg("keep_influence") = false,
        py::arg("read_residual") = false, py::arg("recording") = std::shared_ptr<Recording>(),
        py::arg("record") = -1);
    py::class_<ForkPlan>(m, "ForkPlan")
        .def(py::init([](int32_t layer, int32_t n_below, bool survey) {
                 return ForkPlan{layer, n_below, survey};
             }),
             py::kw_only(), py::arg("layer"), py::arg("n_below"), py::arg("survey") = false);
    py::class_<Plan>(m, "Plan").def(py::init(&new_plan), py::arg("rows"), py::arg("parts"),
                                    py::kw_only(), py::arg("fork") = std::nullopt);
}

} // namespace

void bind_graph_patch(py::module_ & m) {
    bind_selections(m);
    bind_plan(m);
    py::class_<GraphPatch>(m, "GraphPatch")
        .def(py::init<int32_t, int32_t>(), py::arg("n_layer"), py::arg("n_threads") = 1)
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
        .def_property_readonly("n_bytes_read",
                               [](const GraphPatch & patch) { return patch.transfers().n_bytes(); })
        .def_property_readonly(
            "host_reason",
            [](const GraphPatch & patch) { return patch.observation().host_reason(); })
        .def_property_readonly("attended_layers", &GraphPatch::attended_layers)
        .def_property_readonly("n_left_out",
                               [](const GraphPatch & patch) { return patch.fork().n_left_out(); })
        .def(
            "fork_obstacle",
            [](const GraphPatch & patch, int32_t layer, bool shrinks) {
                const std::string * why = patch.fork().obstacle(layer, shrinks);
                return why == nullptr ? std::nullopt : std::make_optional(*why);
            },
            py::arg("layer"), py::kw_only(), py::arg("shrinks"))
        .def("begin", &GraphPatch::begin, py::arg("plan"))
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
