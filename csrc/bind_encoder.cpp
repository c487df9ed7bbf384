#include "bindings.hpp"
#include "encoder_mend.hpp"
#include "encoder_probe.hpp"

#include <cstdint>
#include <string>

namespace cmg {

void bind_encoder(py::module_ & m) {
    py::class_<EncoderMend>(m, "EncoderMend")
        .def(py::init<const std::string &>(), py::arg("kind"))
        .def_property_readonly("callback",
                               [](const EncoderMend &) {
                                   return reinterpret_cast<std::uintptr_t>(&EncoderMend::callback);
                               })
        .def_property_readonly(
            "user_data", [](EncoderMend & self) { return reinterpret_cast<std::uintptr_t>(&self); })
        .def_property_readonly("mended", &EncoderMend::mended)
        .def("begin", &EncoderMend::begin)
        .def("end", &EncoderMend::end);
    py::class_<EncoderProbe>(m, "EncoderProbe")
        .def(py::init<EncoderMend *>(), py::arg("mend").none(true), py::keep_alive<1, 2>())
        .def_property_readonly("callback",
                               [](const EncoderProbe &) {
                                   return reinterpret_cast<std::uintptr_t>(&EncoderProbe::callback);
                               })
        .def_property_readonly(
            "user_data",
            [](EncoderProbe & self) { return reinterpret_cast<std::uintptr_t>(&self); })
        .def("begin", &EncoderProbe::begin)
        .def("end", &EncoderProbe::end)
        .def("pixels", [](const EncoderProbe & self) {
            const std::vector<float> & pixels = self.pixels();
            const auto & ne = self.shape();
            const std::vector<py::ssize_t> shape(ne.rbegin(), ne.rend());
            return py::array_t<float>(shape, pixels.data());
        });
}

} // namespace cmg
