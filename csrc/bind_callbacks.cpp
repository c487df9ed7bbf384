// What llama.cpp calls while it works, other than the graph patch. None of it may be Python code
// that ctypes calls: an interrupt that waits for Python to run (Ctrl-C) would be raised there, be
// printed, and be lost.
#include "bindings.hpp"

#include "ggml.h"

#include <cstdint>
#include <cstdio>
#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace cmg {
namespace {

// The process has one log, and so has this: what is logged as an error since the last `begin`.
class Log {
  public:
    static void callback(ggml_log_level level, const char * text, void * /*user_data*/) {
        Log & log = instance();
        const std::lock_guard<std::mutex> lock(log.mutex_);
        if (level == GGML_LOG_LEVEL_ERROR) {
            log.errors_.emplace_back(text);
        } else if (log.verbose_) {
            std::fputs(text, stderr);
        }
    }

    // verbose: what is no error goes to stderr.
    static void begin(bool verbose) {
        Log & log = instance();
        const std::lock_guard<std::mutex> lock(log.mutex_);
        log.verbose_ = verbose;
        log.errors_.clear();
    }

    static std::vector<py::bytes> errors() {
        Log & log = instance();
        const std::lock_guard<std::mutex> lock(log.mutex_);
        return {log.errors_.begin(), log.errors_.end()};
    }

  private:
    static Log & instance() {
        static Log log;
        return log;
    }

    std::mutex mutex_;
    std::vector<std::string> errors_;
    bool verbose_ = false;
};

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
    m.def("log_callback", [] { return reinterpret_cast<std::uintptr_t>(&Log::callback); });
    m.def("log_begin", &Log::begin, py::arg("verbose"));
    m.def("log_errors", &Log::errors);
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
