#include "log.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <utility>

namespace cmg {

struct LogCapture::State {
    const bool verbose;
    std::mutex mutex; // a capture may be closed by another thread than logs
    bool open = true;
    std::vector<std::string> errors;
};

namespace {

using States = std::vector<std::shared_ptr<LogCapture::State>>;

// This thread's captures, the last one innermost. One that another thread closed is dropped later.
thread_local States captures;

struct Process {
    std::mutex mutex; // never held while llama.cpp logs, which may wait for Python
    std::vector<LogSetter> setters;
    ggml_log_callback usual = nullptr;
    int64_t n_open = 0;
    std::atomic<bool> verbose{false}; // of the last capture

    void set(ggml_log_callback callback) const {
        for (const LogSetter setter : setters) {
            setter(callback, nullptr);
        }
    }
};

Process process;

// Whether the line was for this capture.
bool take(LogCapture::State & capture, ggml_log_level level, const char * text) {
    const std::lock_guard<std::mutex> lock(capture.mutex);
    if (capture.open && level == GGML_LOG_LEVEL_ERROR) {
        capture.errors.emplace_back(text);
    } else if (capture.open && capture.verbose) {
        std::fputs(text, stderr);
    }
    return capture.open;
}

void on_log(ggml_log_level level, const char * text, void * user_data) {
    while (!captures.empty()) {
        if (take(*captures.back(), level, text)) {
            return;
        }
        captures.pop_back();
    }
    process.usual(level, text, user_data);
}

} // namespace

void bind_log(std::vector<LogSetter> setters, ggml_log_callback usual) {
    const std::lock_guard<std::mutex> lock(process.mutex);
    process.setters = std::move(setters);
    process.usual = usual;
    process.set(usual);
}

LogCapture::LogCapture() : LogCapture(process.verbose) {}

LogCapture::LogCapture(bool verbose) : state_(new State{verbose, {}, true, {}}) {
    process.verbose = verbose;
    captures.push_back(state_);
    const std::lock_guard<std::mutex> lock(process.mutex);
    if (process.n_open++ == 0) {
        process.set(&on_log);
    }
}

LogCapture::~LogCapture() {
    close();
}

std::vector<std::string> LogCapture::close() {
    const auto state = std::exchange(state_, nullptr);
    if (state == nullptr) {
        return {};
    }
    captures.erase(std::remove(captures.begin(), captures.end(), state), captures.end());
    {
        const std::lock_guard<std::mutex> lock(process.mutex);
        if (--process.n_open == 0) {
            process.set(process.usual);
        }
    }
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->open = false;
    return std::move(state->errors);
}

} // namespace cmg
