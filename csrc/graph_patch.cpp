#include "graph_patch.hpp"

#include "api.hpp"
#include "influence.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace cmg {
namespace {

const ggml_tensor * root(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
}

// The number after `prefix` in the tensor's name, or -1 if the name does not start with it.
int32_t layer_in_name(const ggml_tensor * t, const char * prefix) {
    const size_t n = std::strlen(prefix);
    return std::strncmp(t->name, prefix, n) == 0 && t->name[n] >= '0' && t->name[n] <= '9'
               ? std::atoi(t->name + n)
               : -1;
}

bool is_image_row(const Row & row) {
    return row.image_token >= 0;
}

[[noreturn]] void fail(const std::string & what, int32_t il) {
    throw std::runtime_error("layer " + std::to_string(il) + ": " + what);
}

// The bytes of a tensor (a view's own range) on the host: in place where they already are.
class HostView {
  public:
    explicit HostView(const ggml_tensor * t) {
        const ggml_tensor * owner = root(t);
        if (api().ggml_backend_buffer_is_host(owner->buffer)) {
            data_ = static_cast<const uint8_t *>(t->data);
            return;
        }
        bytes_.resize(api().ggml_nbytes(t));
        api().ggml_backend_tensor_get(t, bytes_.data(), 0, bytes_.size());
        data_ = bytes_.data();
    }
    const uint8_t * at(size_t offset) const { return data_ + offset; }

  private:
    std::vector<uint8_t> bytes_;
    const uint8_t * data_ = nullptr;
};

void to_float(ggml_type type, const uint8_t * from, float * to, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        const auto convert = api().ggml_cpu_fp16_to_fp32 != nullptr ? api().ggml_cpu_fp16_to_fp32
                                                                    : api().ggml_fp16_to_fp32_row;
        convert(reinterpret_cast<const ggml_fp16_t *>(from), to, n);
    } else {
        api().ggml_get_type_traits(type)->to_float(from, to, n);
    }
}

float op_param(const ggml_tensor * t, size_t i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char *>(t->op_params) + i * sizeof(float),
                sizeof(float));
    return value;
}

double cosine(const std::vector<float> & a, const std::vector<float> & b) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); i++) {
        ab += static_cast<double>(a[i]) * b[i];
        aa += static_cast<double>(a[i]) * a[i];
        bb += static_cast<double>(b[i]) * b[i];
    }
    return ab / std::sqrt(std::max(aa * bb, std::numeric_limits<double>::min()));
}

} // namespace

// An attention node, with or without flash attention, as seen through its sources.
struct GraphPatch::Attention {
    int32_t il = -1;       // layer
    int32_t cache_il = -1; // layer whose KV cache it reads: another one where layers share a cache
    int mask_src = -1;     // node->src[mask_src] is the mask
    ggml_tensor * mask = nullptr;        // the original mask [n_kv, n_rows]
    const ggml_tensor * q = nullptr;     // [head_dim, n_rows, n_head] F32
    const ggml_tensor * k = nullptr;     // [head_dim, n_kv, n_head_kv]
    const ggml_tensor * sinks = nullptr; // [n_head] F32, or null
    float scale = 1.0f;
    float softcap = 0.0f;
    float max_bias = 0.0f;

    bool found() const { return mask_src >= 0; }
    static Attention from_node(const ggml_tensor * node);
    static Attention from_flash(const ggml_tensor * node);
    static Attention from_soft_max(const ggml_tensor * node);
};

GraphPatch::Attention GraphPatch::Attention::from_node(const ggml_tensor * node) {
    Attention a = node->op == GGML_OP_FLASH_ATTN_EXT ? from_flash(node)
                  : node->op == GGML_OP_SOFT_MAX     ? from_soft_max(node)
                                                     : Attention{};
    if (a.found()) {
        a.cache_il = layer_in_name(root(a.k), "cache_k_l");
        a.mask = node->src[a.mask_src];
    }
    // The image encoder, MoE routers and cross attention read no KV cache: not ours.
    return a.found() && a.cache_il >= 0 && a.mask != nullptr ? a : Attention{};
}

GraphPatch::Attention GraphPatch::Attention::from_flash(const ggml_tensor * node) {
    Attention a;
    a.mask_src = 3;
    a.q = node->src[0];
    a.k = node->src[1];
    a.sinks = node->src[4];
    a.scale = op_param(node, 0);
    a.max_bias = op_param(node, 1);
    a.softcap = op_param(node, 2);
    return a;
}

// kq = K q, then for some models softcap * tanh(kq * inner / softcap), then SOFT_MAX(kq * scale).
GraphPatch::Attention GraphPatch::Attention::from_soft_max(const ggml_tensor * node) {
    Attention a;
    const ggml_tensor * kq = node->src[0];
    float outer = 1.0f;
    float inner = 1.0f;
    bool capped = false;
    for (; kq != nullptr && kq->op != GGML_OP_MUL_MAT; kq = kq->src[0]) {
        if (kq->op == GGML_OP_SCALE && op_param(kq, 1) == 0.0f) {
            (capped ? inner : outer) *= op_param(kq, 0);
        } else if (kq->op == GGML_OP_UNARY && !capped) {
            capped = true;
        } else {
            return a;
        }
    }
    if (kq == nullptr) {
        return a;
    }
    a.k = kq->src[0];
    a.q = kq->src[1];
    a.mask_src = 1;
    a.sinks = node->src[2];
    const float scale = op_param(node, 0);
    a.max_bias = op_param(node, 1);
    a.softcap = capped ? outer * scale : 0.0f;
    a.scale = capped ? inner * a.softcap : outer * scale;
    return a;
}

struct GraphPatch::Mask {
    ggml_tensor tensor{};
    ggml_backend_buffer_t buffer = nullptr;
    size_t capacity = 0;

    ~Mask() { release(); }

    void release() {
        if (buffer != nullptr) {
            api().ggml_backend_buffer_free(buffer);
            buffer = nullptr;
        }
    }

    // Makes `tensor` a leaf like `original`, in a buffer of the same type, with these bytes.
    void assign(const ggml_tensor * original, const std::vector<uint8_t> & bytes) {
        const auto type = api().ggml_backend_buffer_get_type(root(original)->buffer);
        const bool too_large = capacity > 4 * bytes.size() && capacity > (1u << 20);
        if (buffer == nullptr || capacity < bytes.size() || too_large ||
            api().ggml_backend_buffer_get_type(buffer) != type) {
            release();
            capacity = bytes.size() + bytes.size() / 4;
            buffer = api().ggml_backend_buft_alloc_buffer(type, capacity);
            if (buffer == nullptr) {
                throw std::runtime_error("no memory for a mask of " + std::to_string(capacity) +
                                         " bytes");
            }
        }
        tensor = *original;
        tensor.op = GGML_OP_NONE;
        std::fill(std::begin(tensor.src), std::end(tensor.src), nullptr);
        tensor.view_src = nullptr;
        tensor.view_offs = 0;
        tensor.buffer = nullptr;
        tensor.data = nullptr;
        tensor.extra = nullptr;
        api().ggml_backend_tensor_alloc(buffer, &tensor,
                                        api().ggml_backend_buffer_get_base(buffer));
        api().ggml_backend_tensor_set(&tensor, bytes.data(), 0, bytes.size());
    }
};

GraphPatch::GraphPatch(int32_t n_layer, std::shared_ptr<Selections> selections)
    : n_layer_(n_layer), selections_(std::move(selections)), ledger_(n_layer) {}

GraphPatch::~GraphPatch() = default;

void GraphPatch::begin(Plan plan) {
    plan_ = std::move(plan);
    parked_ = nullptr;
    active_ = true;
    ubatch_begin_ = 0;
    ubatch_rows_ = 0;
    written_layer_ = n_layer_; // the first layer written starts the first micro-batch
    residual_.clear();
    cosines_.assign(plan_.read_residual ? static_cast<size_t>(n_layer_) : 0, 1.0);
}

void GraphPatch::end() {
    active_ = false;
    plan_ = Plan{};
    copies_.clear();
    asked_.clear();
    if (parked_ != nullptr) {
        std::rethrow_exception(std::exchange(parked_, nullptr));
    }
}

bool GraphPatch::callback(ggml_tensor * node, bool ask, void * self) {
    auto & patch = *static_cast<GraphPatch *>(self);
    try {
        if (ask) {
            return patch.ask(node);
        }
        patch.computed(node);
    } catch (...) {
        patch.parked_ = std::current_exception();
        patch.active_ = false;
    }
    return !ask;
}

bool GraphPatch::ask(ggml_tensor * node) {
    if (active_ && !observed_.empty()) {
        asked_.push_back(node);
    }
    if (node->op == GGML_OP_SET_ROWS) {
        return active_ && ask_set_rows(node);
    }
    if (active_ && is_residual(node)) {
        return true;
    }
    Attention attention = Attention::from_node(node);
    if (!attention.found()) {
        return false;
    }
    attention.mask = restored_mask(node, attention.mask);
    node->src[attention.mask_src] = attention.mask;
    if (!active_) {
        return false;
    }
    // Layers that share another layer's cache come after it, in order.
    attention.il = std::max(attention.cache_il, attention_layer_ + 1);
    attention_layer_ = attention.il;
    if (attention.il < n_layer_) {
        observe(attention);
        if (ggml_tensor * ours = patched_mask(attention)) {
            swaps_[node] = {attention.mask, ours};
            node->src[attention.mask_src] = ours;
        }
    }
    return false;
}

// A graph that is reused still points at our tensor; in a new one, what a node points at is its
// own.
ggml_tensor * GraphPatch::restored_mask(const ggml_tensor * node, ggml_tensor * current) {
    const auto swap = swaps_.find(node);
    if (swap == swaps_.end()) {
        return current;
    }
    ggml_tensor * original = swap->second.ours == current ? swap->second.original : current;
    swaps_.erase(swap);
    return original;
}

void GraphPatch::computed(ggml_tensor * node) {
    asked_.clear();
    if (!active_) {
        return;
    }
    if (node->op == GGML_OP_SET_ROWS) {
        readable_layer_ = layer_in_name(root(node), "cache_v_l");
        n_boundaries_++;
    } else if (is_residual(node)) {
        read_residual(node);
    }
}

// Answers whether a boundary is needed behind this write into the cache.
bool GraphPatch::ask_set_rows(ggml_tensor * node) {
    const ggml_tensor * cache = root(node);
    if (const int32_t il = layer_in_name(cache, "cache_k_l"); il >= 0 && il < n_layer_) {
        enter_layer(il, node->src[1]->ne[0]);
        record_cells(node, il);
        return false;
    }
    const int32_t il = layer_in_name(cache, "cache_v_l");
    return il >= 0 && il < n_layer_ && !observed_.empty() &&
           plan_.observe_layers[static_cast<size_t>(il)] != 0;
}

// Layers are written in ascending order; a layer not above the last one opens a micro-batch.
void GraphPatch::enter_layer(int32_t il, int64_t n_rows) {
    if (il <= written_layer_) {
        ubatch_begin_ += ubatch_rows_;
        ubatch_rows_ = n_rows;
        attention_layer_ = -1;
        readable_layer_ = -1;
        copies_.clear();
        observed_.clear();
        masked_.clear();
        for (int32_t r = 0; r < n_rows; r++) {
            if (batch_row(r).observe >= 0) {
                observed_.push_back(r);
            }
            if (batch_row(r).mask >= 0) {
                masked_.push_back(r);
            }
        }
    }
    written_layer_ = il;
}

const Row & GraphPatch::batch_row(int32_t ubatch_row) const {
    static const Row nothing;
    const auto i = static_cast<size_t>(ubatch_begin_ + ubatch_row);
    return i < plan_.rows.size() ? plan_.rows[i] : nothing;
}

const std::vector<uint8_t> & GraphPatch::host_copy(const ggml_tensor * t) {
    auto & bytes = copies_[t];
    if (bytes.empty()) {
        bytes.resize(api().ggml_nbytes(t));
        api().ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    }
    return bytes;
}

void GraphPatch::record_cells(const ggml_tensor * node, int32_t il) {
    const ggml_tensor * index = node->src[1];
    for (int32_t r = 0; r < ubatch_rows_; r++) {
        const Row & row = batch_row(r);
        if (!is_image_row(row)) {
            continue;
        }
        if (index->type != GGML_TYPE_I64) {
            fail("the KV cache is not indexed by 64-bit cells", il);
        }
        int64_t cell;
        std::memcpy(&cell, host_copy(index).data() + static_cast<size_t>(r) * sizeof(cell),
                    sizeof(cell));
        ledger_.record(row.seq, il, row.image_token, cell);
    }
}

// Attention of the observed rows in this layer, and what the policy picks from it.
void GraphPatch::observe(const Attention & a) {
    if (observed_.empty() || plan_.observe_layers[static_cast<size_t>(a.il)] == 0) {
        return;
    }
    const bool pending = std::find(asked_.begin(), asked_.end(), root(a.q)) != asked_.end();
    if (readable_layer_ != a.il || pending || a.q->type != GGML_TYPE_F32) {
        fail("this model's graph does not compute q and K before its attention; "
             "attention cannot be observed here",
             a.il);
    }
    AttentionShape shape;
    shape.head_dim = a.q->ne[0];
    shape.n_head = a.q->ne[2];
    shape.n_head_kv = a.k->ne[2];
    shape.n_kv = a.k->ne[1];
    shape.scale = a.scale;
    shape.softcap = a.softcap;
    shape.max_bias = a.max_bias;

    AttentionInput in;
    const HostView q(a.q);
    const auto dim = static_cast<size_t>(shape.head_dim);
    const size_t n_kv = static_cast<size_t>(shape.n_kv);
    in.q.resize(observed_.size() * static_cast<size_t>(shape.n_head) * dim);
    in.mask.resize(observed_.size() * n_kv);
    for (size_t i = 0; i < observed_.size(); i++) {
        const auto r = static_cast<size_t>(observed_[i]);
        for (int64_t h = 0; h < shape.n_head; h++) {
            const size_t head = static_cast<size_t>(h);
            std::memcpy(in.q.data() + (i * static_cast<size_t>(shape.n_head) + head) * dim,
                        q.at(r * a.q->nb[1] + head * a.q->nb[2]), dim * sizeof(float));
        }
        to_float(a.mask->type, host_copy(a.mask).data() + r * a.mask->nb[1],
                 in.mask.data() + i * n_kv, shape.n_kv);
    }
    if (a.sinks != nullptr) {
        in.sinks.resize(static_cast<size_t>(shape.n_head));
        std::memcpy(in.sinks.data(), HostView(a.sinks).at(0), in.sinks.size() * sizeof(float));
    }
    const HostView k(a.k);
    const bool packed = a.k->nb[2] == api().ggml_row_size(a.k->type, shape.head_dim);
    const int64_t n_runs = packed ? 1 : shape.n_head_kv;
    const int64_t run = shape.head_dim * shape.n_head_kv / n_runs;
    in.load_k = [&](int64_t cell, float * out) {
        for (int64_t h = 0; h < n_runs; h++) {
            to_float(
                a.k->type,
                k.at(static_cast<size_t>(cell) * a.k->nb[1] + static_cast<size_t>(h) * a.k->nb[2]),
                out + h * run, run);
        }
    };
    const std::vector<float> weights = attention_rows(shape, in);
    for (size_t i = 0; i < observed_.size(); i++) {
        select(a, batch_row(observed_[i]), in.mask.data() + i * n_kv, weights.data() + i * n_kv);
    }
}

// mask, weights: [n_kv] of one observed row.
void GraphPatch::select(const Attention & a, const Row & row, const float * mask,
                        const float * weights) {
    const auto & cells = ledger_.cells(row.seq, a.cache_il);
    std::vector<int32_t> candidates;
    std::vector<float> influence;
    for (size_t token = 0; token < cells.size(); token++) {
        const int64_t cell = cells[token];
        const bool visible = cell >= 0 && cell < a.k->ne[1] && std::isfinite(mask[cell]);
        if (visible && static_cast<int32_t>(token) != row.image_token) {
            candidates.push_back(static_cast<int32_t>(token));
            influence.push_back(weights[cell]);
        }
    }
    Slot & slot = selections_->at(row.observe);
    auto & picked = slot.tokens[static_cast<size_t>(a.il)];
    picked = select_tokens(plan_.policy, influence.data(), influence.size());
    for (auto & token : picked) {
        token = candidates[static_cast<size_t>(token)];
    }
    if (plan_.keep_influence) {
        auto & kept = slot.influence[static_cast<size_t>(a.il)];
        kept.assign(cells.size(), 0.0f);
        for (size_t i = 0; i < candidates.size(); i++) {
            kept[static_cast<size_t>(candidates[i])] = influence[i];
        }
    }
}

// Our mask for this layer, or null if no row of the micro-batch hides anything here.
ggml_tensor * GraphPatch::patched_mask(const Attention & a) {
    if (masked_.empty() || plan_.mask_layers[static_cast<size_t>(a.il)] == 0) {
        return nullptr;
    }
    const bool known_type = a.mask->type == GGML_TYPE_F16 || a.mask->type == GGML_TYPE_F32;
    if (!known_type || a.mask->ne[2] != 1 || a.mask->ne[3] != 1 || a.mask->ne[1] < ubatch_rows_) {
        fail("the attention mask is not one [n_kv, n_tokens] matrix of F16 or F32 "
             "(the context needs kv_unified = true)",
             a.il);
    }
    std::vector<uint8_t> bytes = host_copy(a.mask);
    bool any = false;
    for (const int32_t r : masked_) {
        any = hide_cells(a, r, bytes) || any;
    }
    if (!any) {
        return nullptr;
    }
    auto & mask = masks_[a.il];
    if (mask == nullptr) {
        mask = std::make_unique<Mask>();
    }
    mask->assign(a.mask, bytes);
    return &mask->tensor;
}

// Writes -inf where the row may not look. A row never loses its own cell.
bool GraphPatch::hide_cells(const Attention & a, int32_t ubatch_row, std::vector<uint8_t> & mask) {
    constexpr float f32_neg_inf = -std::numeric_limits<float>::infinity();
    constexpr uint16_t f16_neg_inf = 0xFC00;
    const Row & row = batch_row(ubatch_row);
    const auto & cells = ledger_.cells(row.seq, a.cache_il);
    const auto & hidden = selections_->at(row.mask).tokens[static_cast<size_t>(a.il)];
    uint8_t * line = mask.data() + static_cast<size_t>(ubatch_row) * a.mask->nb[1];
    for (const int32_t token : hidden) {
        if (static_cast<size_t>(token) >= cells.size() || token < 0) {
            fail("image token " + std::to_string(token) + " is not in sequence " +
                     std::to_string(row.seq) + ", which has " + std::to_string(cells.size()),
                 a.il);
        }
        const int64_t cell = cells[static_cast<size_t>(token)];
        if (token == row.image_token || cell < 0 || cell >= a.mask->ne[0]) {
            continue;
        }
        uint8_t * entry = line + static_cast<size_t>(cell) * a.mask->nb[0];
        if (a.mask->type == GGML_TYPE_F16) {
            std::memcpy(entry, &f16_neg_inf, sizeof(f16_neg_inf));
        } else {
            std::memcpy(entry, &f32_neg_inf, sizeof(f32_neg_inf));
        }
    }
    return !hidden.empty();
}

// The residual stream before layer 0 is what its first norm reads; after layer il it is l_out-<il>.
bool GraphPatch::is_residual(const ggml_tensor * node) const {
    return plan_.read_residual && ((residual_.empty() && std::strcmp(node->name, "norm-0") == 0) ||
                                   layer_in_name(node, "l_out-") >= 0);
}

void GraphPatch::read_residual(const ggml_tensor * node) {
    const int32_t il = layer_in_name(node, "l_out-");
    const ggml_tensor * stream = il < 0 ? node->src[0] : node;
    if (stream->type != GGML_TYPE_F32 || (il >= 0 && residual_.empty())) {
        fail("the residual stream cannot be read in this model's graph; name the layers or choose "
             "them by attention mass",
             std::max(il, 0));
    }
    std::vector<float> row(static_cast<size_t>(stream->ne[0]));
    const auto last = static_cast<size_t>(stream->ne[1] - 1);
    api().ggml_backend_tensor_get(stream, row.data(), last * stream->nb[1],
                                  row.size() * sizeof(float));
    if (il >= 0 && il < n_layer_) {
        cosines_[static_cast<size_t>(il)] = cosine(residual_, row);
    }
    residual_ = std::move(row);
}

} // namespace cmg
