#include "bindings.hpp"
#include "layer_places.hpp"

#include <cstdint>

namespace cmg {

void bind_layers(py::module_ & m) {
    py::class_<LayerPlaces>(m, "LayerPlaces")
        .def(py::init<int32_t>(), py::arg("n_layer"))
        .def_property_readonly("callback",
                               [](const LayerPlaces &) {
                                   return reinterpret_cast<std::uintptr_t>(&LayerPlaces::callback);
                               })
        .def_property_readonly(
            "user_data", [](LayerPlaces & self) { return reinterpret_cast<std::uintptr_t>(&self); })
        .def_property_readonly("weights", &LayerPlaces::weights)
        .def_property_readonly("caches", &LayerPlaces::caches);
}

} // namespace cmg
