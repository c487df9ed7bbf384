// llama.cpp's log, while threads capture what they themselves have it log.
//
// llama.cpp knows one callback for the whole process. While any capture is open that callback is
// ours, and every line goes by the thread that logs it:
//
//     thread                   where its line goes
//     has captures open        an error: to the one it opened last; any other line: to stderr if
//                              that capture is verbose, else nowhere
//     has none                 to the callback that is in force while nobody captures
//
// Worker threads that llama.cpp or mtmd start are of the second kind, whoever called: what they log
// is printed as if nobody captured, and is in no exception.
//
// This cannot be Python code that ctypes calls, see bind_callbacks.cpp.
#pragma once

#include "ggml.h"

#include <memory>
#include <string>
#include <vector>

namespace cmg {

// Before the first capture, once. setters: functions like `llama_log_set`, each with a log of its
// own. usual: the callback that is in force while nobody captures, from now on too.
using LogSetter = void (*)(ggml_log_callback callback, void * user_data);
void bind_log(std::vector<LogSetter> setters, ggml_log_callback usual);

// Open from its construction, for the thread that makes it, until `close` or its destruction by
// any thread, in any order.
class LogCapture {
  public:
    explicit LogCapture(bool verbose);
    // As verbose as the last one was.
    LogCapture();
    ~LogCapture();
    LogCapture(const LogCapture &) = delete;
    LogCapture & operator=(const LogCapture &) = delete;

    // What was logged as errors, in order; nothing the second time.
    std::vector<std::string> close();

    struct State;

  private:
    std::shared_ptr<State> state_; // null once closed
};

} // namespace cmg
