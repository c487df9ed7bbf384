// What llama.cpp's image encoders do otherwise than the models were trained, put right in the
// graph.
//
//   class token   CLIP as LLaVA uses it. The class token is appended behind the patches, but places
//                 (0 1 2 ...) and the rows that are kept (1 2 3 ...) are those of one that stands
//                 before them. Here the places become 1 2 3 ... 0 and the rows 0 1 2 ...
//   places        InternVL, CogVLM. The same order, and the learned places are added as they are,
//                 place 0 first. Here they are added with place 0 last.
//   rows          Llama 4. Four patches make one token, and the last step of that is left out: a
//                 square's tokens come column by column. Here they come row by row.
//   activation    Gemma 4, CogVLM. Their files name no activation, which llama.cpp reads as CLIP's
//                 quick GELU. CLIP's networks have no gate: a gated one gets GELU, and CogVLM's.
//   cleared       Pixtral. Memory that nothing has written is "cleared" by a factor of 0, which
//                 leaves NaN where there was NaN or infinity. Here it is cleared.
//
// Each is told by the nodes themselves, in the order in which they are asked about, and by the
// values of the inputs: a graph that is in order already is left alone, whatever model it is of.
// CogVLM's nodes are those of Llama 4, whose class token is behind the patches by right, and of
// CLIP: they are mended where the kind of the projector says so.
#pragma once

#include "stand_in.hpp"

#include "ggml.h"

#include <cstdint>
#include <exception>
#include <set>
#include <string>

namespace cmg {

class EncoderMend {
  public:
    // kind: of the projector, as its file names it.
    explicit EncoderMend(const std::string & kind) : is_cogvlm_(kind == "cogvlm") {}
    EncoderMend(const EncoderMend &) = delete;
    EncoderMend & operator=(const EncoderMend &) = delete;

    // A graph is about to run. `end` throws what went wrong in it.
    void begin();
    void end();
    // What has been mended in the graph since `begin`, in the words above.
    const std::set<std::string> & mended() const { return mended_; }

    // ggml_backend_sched_eval_callback, with the address of an EncoderMend.
    static bool callback(ggml_tensor * node, bool ask, void * self);

  private:
    bool ask(ggml_tensor * node);
    void ask_get_rows(const ggml_tensor * node);
    void ask_add(ggml_tensor * node);
    void ask_cont(ggml_tensor * node);
    void replace(ggml_tensor * node, int32_t quick, int32_t usual);

    bool is_cogvlm_;
    int64_t n_rows_ = 0;       // patches and the class token behind them; 0 = there is none
    bool is_repeated_ = false; // the class token, for each picture of a batch
    bool has_places_ = false;  // they have been found
    bool has_rows_ = false;    // those that are kept have been found
    StandIn places_;
    ggml_tensor by_rows_{}; // a view of tokens that stand column by column
    std::set<std::string> mended_;
    std::exception_ptr parked_;
};

} // namespace cmg
