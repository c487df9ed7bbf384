#include "bindings.hpp"
#include "encoder_mend.hpp"

#include <cstdint>

namespace cmg {

void bind_encoder(py::module_ & m) {
    py::class_<EncoderMend>(m, "EncoderMend")
        .def(py::init<>())
        .def_property_readonly("callback",
                               [](const EncoderMend &) {
                                   return reinterpret_cast<std::uintptr_t>(&EncoderMend::callback);
                               })
        .def_property_readonly(
            "user_data", [](EncoderMend & self) { return reinterpret_cast<std::uintptr_t>(&self); })
        .def_property_readonly("mended", &EncoderMend::mended)
        .def("begin", &EncoderMend::begin)
        .def("end", &EncoderMend::end);
}

} // namespace cmg
