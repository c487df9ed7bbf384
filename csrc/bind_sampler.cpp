#include "bindings.hpp"
#include "sampler.hpp"

namespace cmg {
namespace {

// Addresses cross the boundary as integers: Python owns the chains through ctypes.
template <typename T> T * pointer(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

std::unique_ptr<PairSampler> new_pair_sampler(int32_t n_vocab, std::uintptr_t constraints,
                                              std::uintptr_t guided, std::uintptr_t plain) {
    return std::make_unique<PairSampler>(n_vocab, pointer<llama_sampler>(constraints),
                                         pointer<llama_sampler>(guided),
                                         pointer<llama_sampler>(plain));
}

} // namespace

void bind_sampler(py::module_ & m) {
    py::class_<GuidanceState>(m, "GuidanceState")
        .def(py::init([](float alpha, float beta) { return GuidanceState{alpha, beta}; }),
             py::arg("alpha"), py::arg("beta"))
        .def("new_sampler",
             [](GuidanceState & state) {
                 return reinterpret_cast<std::uintptr_t>(new_guidance_sampler(&state));
             })
        .def(
            "set_rows",
            [](GuidanceState & state, std::uintptr_t original, std::uintptr_t degraded) {
                state.original = pointer<const float>(original);
                state.degraded = pointer<const float>(degraded);
            },
            py::arg("original"), py::arg("degraded"))
        .def_readonly("finite", &GuidanceState::finite);
    py::class_<PairSampler>(m, "PairSampler")
        .def(py::init(&new_pair_sampler), py::arg("n_vocab"), py::arg("constraints"),
             py::arg("guided"), py::arg("plain"))
        .def(
            "prepare",
            [](PairSampler & sampler, std::uintptr_t logits, float beta) {
                return sampler.prepare(pointer<const float>(logits), beta);
            },
            py::arg("logits"), py::arg("beta"),
            "takes the row at this address; how many of its tokens are plausible")
        .def(
            "draw",
            [](PairSampler & sampler) {
                const Sampled s = sampler.draw();
                return py::make_tuple(s.token, s.plain);
            },
            "(guided, plain) tokens from the row that was prepared")
        .def("accept", &PairSampler::accept, py::arg("token"));
}

} // namespace cmg
