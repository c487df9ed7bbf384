// What llama.cpp calls while it works, other than the graph patch. None of it may be Python code
// that ctypes calls: an interrupt that waits for Python to run (Ctrl-C) would be raised there, be
// printed, and be lost.
#include "bindings.hpp"
#include "log.hpp"

#include "ggml.h"

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace cmg {
namespace {

// Addresses come as integers: Python has looked them up through ctypes.
void bind_log_addresses(const std::vector<std::uintptr_t> & setters, std::uintptr_t usual) {
    std::vector<LogSetter> functions;
    for (const std::uintptr_t setter : setters) {
        functions.push_back(reinterpret_cast<LogSetter>(setter));
    }
    bind_log(std::move(functions), reinterpret_cast<ggml_log_callback>(usual));
}

std::vector<py::bytes> close(LogCapture & capture) {
    const std::vector<std::string> errors = capture.close();
    return {errors.begin(), errors.end()};
}

// llama_progress_callback: calls report(share); what that raises ends the loading and is parked.
class LoadProgress {
  public:
    explicit LoadProgress(py::function report) : report_(std::move(report)) {}

    static bool callback(float share, void * self) {
        auto & progress = *static_cast<LoadProgress *>(self);
        const py::gil_scoped_acquire gil;
        try {
            progress.report_(share);
        } catch (...) {
            progress.parked_ = std::current_exception();
        }
        return progress.parked_ == nullptr;
    }

    void rethrow() {
        if (parked_ != nullptr) {
            std::rethrow_exception(std::exchange(parked_, nullptr));
        }
    }

  private:
    py::function report_;
    std::exception_ptr parked_;
};

} // namespace

void bind_callbacks(py::module_ & m) {
    m.def("bind_log", &bind_log_addresses, py::arg("setters"), py::arg("usual"));
    py::class_<LogCapture>(m, "LogCapture")
        .def(py::init<bool>(), py::arg("verbose"))
        .def("close", &close);
    py::class_<LoadProgress>(m, "LoadProgress")
        .def(py::init<py::function>(), py::arg("report"))
        .def_property_readonly("callback",
                               [](const LoadProgress &) {
                                   return reinterpret_cast<std::uintptr_t>(&LoadProgress::callback);
                               })
        .def_property_readonly(
            "user_data",
            [](LoadProgress & self) { return reinterpret_cast<std::uintptr_t>(&self); })
        .def("rethrow", &LoadProgress::rethrow);
}

} // namespace cmg
