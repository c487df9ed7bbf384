// The only include of pybind11. A binding converts and delegates.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace cmg {

namespace py = pybind11;

void bind_functions(py::module_ & m);   // addresses of llama.cpp's functions
void bind_owned(py::module_ & m);       // what llama.cpp allocated, and its end
void bind_callbacks(py::module_ & m);   // log and load progress
void bind_policies(py::module_ & m);    // influence and token policies on arrays
void bind_encoder(py::module_ & m);     // mends in the image encoder's graph
void bind_graph_patch(py::module_ & m); // plans, selections, the patch
void bind_layers(py::module_ & m);      // on which devices layers lie
void bind_sampler(py::module_ & m);     // guidance in llama.cpp's sampler chain

// An array argument: C-contiguous, converted if it has another type.
template <typename T> using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T> py::array_t<T> to_array(const std::vector<T> & v) {
    return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

} // namespace cmg
