// What llama.cpp allocated for us, and its end. It is freed by compiled code: in a finalizer that
// is Python code, an interrupt that waits for Python to run (Ctrl-C) would be raised, be printed,
// and be lost.
#include "bindings.hpp"

#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace cmg {
namespace {

using Free = void (*)(void *);

// Frees `pointer` once, with what it needs alive until then.
class Ending : public std::enable_shared_from_this<Ending> {
  public:
    Ending(void * pointer, Free free, py::object kept)
        : pointer_(pointer), free_(free), kept_(std::move(kept)) {}

    // All that are not freed yet, by number: the newest last. Never destroyed: Python drops objects
    // until the process ends.
    static std::map<std::uint64_t, std::shared_ptr<Ending>> & all() {
        static auto & endings = *new std::map<std::uint64_t, std::shared_ptr<Ending>>;
        return endings;
    }

    // Freed where `holder` is dropped: before anything that it holds is, and also before finalizers
    // are called of what is dropped with it.
    void enter(const py::object & holder) {
        static std::uint64_t n_made = 0;
        number_ = n_made++;
        all().emplace(number_, shared_from_this());
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
                free_(pointer);
            }
        }
        is_over_ = true;
        all().erase(number_);
        const py::object kept = std::exchange(kept_, py::object());
    }

    bool is_open() const { return pointer_ != nullptr; }

  private:
    std::atomic<void *> pointer_;
    Free free_;
    py::object kept_;
    py::object dropped_;
    std::uint64_t number_ = 0;
    std::recursive_mutex freeing_;
    bool is_over_ = false;
};

// For Python: see cmg_gguf/llama/owned.py.
class Owned {
  public:
    Owned(const py::object & holder, std::uintptr_t pointer, std::uintptr_t free, py::args kept)
        : ending_(std::make_shared<Ending>(reinterpret_cast<void *>(pointer),
                                           reinterpret_cast<Free>(free), std::move(kept))) {
        ending_->enter(holder);
    }
    Owned(const Owned &) = delete;
    Owned & operator=(const Owned &) = delete;
    ~Owned() { ending_->free(); }

    void close() { ending_->free(); }
    bool is_open() const { return ending_->is_open(); }

    // The newest first: what is made from a model is freed before it.
    static void close_all() {
        while (!Ending::all().empty()) {
            const std::shared_ptr<Ending> newest = std::prev(Ending::all().end())->second;
            newest->free();
        }
    }

  private:
    std::shared_ptr<Ending> ending_;
};

} // namespace

void bind_owned(py::module_ & m) {
    py::class_<Owned>(m, "Owned")
        .def(py::init<const py::object &, std::uintptr_t, std::uintptr_t, py::args>(),
             py::arg("holder"), py::arg("pointer"), py::arg("free"))
        .def("close", &Owned::close)
        .def_property_readonly("is_open", &Owned::is_open);
    py::module_::import("atexit").attr("register")(py::cpp_function(&Owned::close_all));
}

} // namespace cmg
