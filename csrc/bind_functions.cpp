#include "api.hpp"
#include "bindings.hpp"

namespace cmg {

void bind_functions(py::module_ & m) {
    m.def("required_functions", &required_functions);
    m.def("bind_api", &bind_api, py::arg("addresses"));
}

} // namespace cmg
