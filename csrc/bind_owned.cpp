// What llama.cpp allocated for us, and its end. It is taken and freed by compiled code: where
// Python code does it, an interrupt that waits for Python to run (Ctrl-C) comes between an
// allocation and who frees it; and in a finalizer it would be raised, be printed, and be lost.
#include "bindings.hpp"
#include "log.hpp"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace cmg {
namespace {

using Free = void (*)(void *);

// Frees `pointer` once. All that are not freed yet are in a list, the newest last.
class Ending : public std::enable_shared_from_this<Ending> {
  public:
    static std::shared_ptr<Ending> begun(void * pointer, Free free) {
        static std::uint64_t n_made = 0;
        const std::shared_ptr<Ending> made(new Ending(pointer, free, n_made++));
        if (pointer != nullptr) {
            all().emplace(made->number_, made);
        }
        return made;
    }

    // The newest first: what is made from a model is freed before it.
    static void free_all() {
        while (!all().empty()) {
            const std::shared_ptr<Ending> newest = std::prev(all().end())->second;
            newest->free();
        }
    }

    // Freed where `holder` is dropped: before anything that it holds is, and also before finalizers
    // are called of what is dropped with it. `kept` is needed until then.
    void hold(const py::object & holder, py::object kept) {
        kept_ = std::move(kept);
        dropped_ = py::weakref(holder, py::cpp_function([this](py::handle) { free(); }));
    }

    // Whoever calls it while another thread does waits for that.
    void free() {
        if (is_over_) {
            return;
        }
        const auto self = shared_from_this();
        {
            const py::gil_scoped_release unlocked; // a thread that ends in `free_` may want it
            const std::lock_guard<std::recursive_mutex> lock(freeing_);
            if (void * pointer = pointer_.exchange(nullptr); pointer != nullptr) {
                free_told(pointer);
            }
        }
        is_over_ = true;
        all().erase(number_);
        const py::object kept = std::exchange(kept_, py::object());
    }

    void * pointer() const { return pointer_; }

  private:
    // What it logs meanwhile is not for Python code to hear, see bind_callbacks.cpp.
    void free_told(void * pointer) const {
        LogCapture log;
        free_(pointer);
        for (const std::string & error : log.close()) {
            std::fputs(error.c_str(), stderr);
        }
    }

    Ending(void * pointer, Free free, std::uint64_t number)
        : pointer_(pointer), free_(free), number_(number), is_over_(pointer == nullptr) {}

    // Never destroyed: Python drops objects until the process ends.
    static std::map<std::uint64_t, std::shared_ptr<Ending>> & all() {
        static auto & endings = *new std::map<std::uint64_t, std::shared_ptr<Ending>>;
        return endings;
    }

    std::atomic<void *> pointer_;
    Free free_;
    std::uint64_t number_;
    bool is_over_;
    std::recursive_mutex freeing_;
    py::object kept_;
    py::object dropped_;
};

// For Python: see cmg_gguf/llama/owned.py.
class Owned {
  public:
    Owned(void * pointer, Free free) : ending_(Ending::begun(pointer, free)) {}
    Owned(const Owned &) = delete;
    Owned & operator=(const Owned &) = delete;
    ~Owned() { ending_->free(); }

    void close() { ending_->free(); }
    void hold(const py::object & holder, py::args kept) { ending_->hold(holder, std::move(kept)); }
    std::uintptr_t pointer() const { return reinterpret_cast<std::uintptr_t>(ending_->pointer()); }
    bool is_open() const { return ending_->pointer() != nullptr; }

  private:
    std::shared_ptr<Ending> ending_;
};

// An `errcheck` of ctypes: it is called with the address that a function returned, None for null.
py::cpp_function owner(std::uintptr_t free) {
    return [free](const py::object & pointer, const py::object &, const py::object &) {
        const auto address = pointer.is_none() ? 0 : pointer.cast<std::uintptr_t>();
        return std::make_unique<Owned>(reinterpret_cast<void *>(address),
                                       reinterpret_cast<Free>(free));
    };
}

} // namespace

void bind_owned(py::module_ & m) {
    py::class_<Owned>(m, "Owned")
        .def("close", &Owned::close)
        .def("hold", &Owned::hold, py::arg("holder"))
        .def_property_readonly("pointer", &Owned::pointer)
        .def("__bool__", &Owned::is_open);
    m.def("owner", &owner, py::arg("free"));
    py::module_::import("atexit").attr("register")(py::cpp_function(&Ending::free_all));
}

} // namespace cmg
