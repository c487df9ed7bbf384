// What llama.cpp allocated for us, and its end. It is freed by compiled code: in a finalizer that
// is Python code, an interrupt that waits for Python to run (Ctrl-C) would be raised, be printed,
// and be lost.
#include "bindings.hpp"

#include <cstdint>
#include <iterator>
#include <map>
#include <utility>

namespace cmg {
namespace {

// Frees `pointer` when it is dropped or closed; keeps `kept` alive until then.
class Owned {
  public:
    Owned(std::uintptr_t pointer, std::uintptr_t free, py::args kept)
        : pointer_(reinterpret_cast<void *>(pointer)), free_(reinterpret_cast<Free>(free)),
          kept_(std::move(kept)), number_(n_made_++) {
        open().emplace(number_, this);
    }

    Owned(const Owned &) = delete;
    Owned & operator=(const Owned &) = delete;

    ~Owned() { close(); }

    void close() {
        open().erase(number_);
        if (pointer_ == nullptr) {
            return;
        }
        void * pointer = std::exchange(pointer_, nullptr);
        {
            const py::gil_scoped_release unlocked; // a thread that ends in there may want it
            free_(pointer);
        }
        kept_ = py::object();
    }

    bool is_open() const { return pointer_ != nullptr; }

    // The newest first: what is made from a model is freed before it.
    static void close_all() {
        while (!open().empty()) {
            std::prev(open().end())->second->close();
        }
    }

  private:
    using Free = void (*)(void *);

    // By number, in order. Never destroyed: Python drops objects until the process ends.
    static std::map<std::uint64_t, Owned *> & open() {
        static auto & all = *new std::map<std::uint64_t, Owned *>;
        return all;
    }

    inline static std::uint64_t n_made_ = 0;

    void * pointer_;
    Free free_;
    py::object kept_;
    std::uint64_t number_;
};

} // namespace

void bind_owned(py::module_ & m) {
    py::class_<Owned>(m, "Owned")
        .def(py::init<std::uintptr_t, std::uintptr_t, py::args>(), py::arg("pointer"),
             py::arg("free"))
        .def("close", &Owned::close)
        .def_property_readonly("is_open", &Owned::is_open);
    py::module_::import("atexit").attr("register")(py::cpp_function(&Owned::close_all));
}

} // namespace cmg
