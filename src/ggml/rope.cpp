#include "rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace turboquant::plugin {
namespace {

constexpr int kSteps = 64; // longer chains than any model has between RoPE and cache

// Operations that leave a head's channels where they are; what they do to their values, RoPE's turn survives.
bool keeps_channels(ggml_op op) {
    switch (op) {
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
    case GGML_OP_CONT:
    case GGML_OP_CPY:
    case GGML_OP_DUP:
    case GGML_OP_REPEAT: // one rope part for all heads
    case GGML_OP_SCALE:
    case GGML_OP_RMS_NORM:
    case GGML_OP_L2_NORM:
    case GGML_OP_NORM:
    case GGML_OP_MUL:
    case GGML_OP_DIV:
    case GGML_OP_ADD:
    case GGML_OP_ADD1:
    case GGML_OP_SUB:
    case GGML_OP_CLAMP: return true;
    default: return false;
    }
}

// Adds what `tensor`, whose heads' channels are first..first+channels of the row's heads, contributes.
RopeTrace::Kind follow(const ggml_tensor* tensor, int first, int channels, RopeTrace& trace) {
    for (int step = 0; step < kSteps && tensor != nullptr; ++step) {
        if (tensor->op == GGML_OP_ROPE) {
            if (tensor->ne[0] != channels) {
                return RopeTrace::Kind::unknown;
            }
            trace.parts.push_back({tensor, first});
            trace.positions = tensor->src[1];
            return RopeTrace::Kind::turns;
        }
        if (tensor->op == GGML_OP_CONCAT && tensor->op_params[0] == 0) {
            const ggml_tensor* a = tensor->src[0];
            const ggml_tensor* b = tensor->src[1];
            if (a == nullptr || b == nullptr || a->ne[0] + b->ne[0] != channels) {
                return RopeTrace::Kind::unknown;
            }
            const auto a_channels = static_cast<int>(a->ne[0]);
            const RopeTrace::Kind left = follow(a, first, a_channels, trace);
            const RopeTrace::Kind right = follow(b, first + a_channels, channels - a_channels, trace);
            if (left == RopeTrace::Kind::unknown || right == RopeTrace::Kind::unknown) {
                return RopeTrace::Kind::unknown;
            }
            return left == RopeTrace::Kind::turns ? left : right;
        }
        if (tensor->op == GGML_OP_NONE) {
            return RopeTrace::Kind::unknown;
        }
        if (!keeps_channels(tensor->op)) {
            return RopeTrace::Kind::still;
        }
        if (tensor->op == GGML_OP_VIEW) {
            // A part of a head would shift the channels. Whole heads may be picked from behind others.
            const ggml_tensor* source = tensor->src[0];
            const size_t offset = tensor->view_offs - (source->view_src != nullptr ? source->view_offs : 0);
            const size_t head_bytes = ggml_row_size(tensor->type, channels);
            const bool same_heads = source->ne[0] == channels || source->ne[0] % channels == 0;
            if (offset % head_bytes != 0 || !same_heads) {
                // Only a turn that lies further back would be misread; a view into a matrix product has none.
                RopeTrace behind;
                return follow(source, first, static_cast<int>(source->ne[0]), behind) == RopeTrace::Kind::still
                           ? RopeTrace::Kind::still
                           : RopeTrace::Kind::unknown;
            }
        }
        tensor = tensor->src[0];
    }
    return RopeTrace::Kind::unknown;
}

// Runs a ROPE on the unit vectors of its channels, all at position 1: out[unit][channel].
Status turn_units(const ggml_tensor* op, ggml_backend_t cpu, std::vector<float>& out) {
    const int64_t channels = op->ne[0];
    const ggml_tensor* factors = op->src[2];
    const int32_t mode = op->op_params[2];
    const bool sections = (mode & GGML_ROPE_TYPE_MROPE) != 0;
    const size_t bytes = static_cast<size_t>(2 * channels * channels) * sizeof(float) +
                         (factors != nullptr ? ggml_nbytes(factors) : 0) + 64;
    ggml_context* ctx = ggml_init({bytes + 8 * ggml_tensor_overhead() + ggml_graph_overhead() + 4096, nullptr, false});
    if (ctx == nullptr) {
        return {StatusCode::out_of_memory, "no memory to find out how keys turn"};
    }
    ggml_tensor* x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, channels, channels, 1);
    auto* values = static_cast<float*>(x->data);
    std::fill(values, values + channels * channels, 0.0F);
    for (int64_t i = 0; i < channels; ++i) {
        values[i * channels + i] = 1.0F;
    }
    ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, sections ? 4 : 1);
    std::fill_n(static_cast<int32_t*>(positions->data), positions->ne[0], 1);
    ggml_tensor* own_factors = nullptr;
    if (factors != nullptr) {
        own_factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, factors->ne[0]);
        ggml_backend_tensor_get(factors, own_factors->data, 0, ggml_nbytes(own_factors));
    }
    int no_sections[GGML_MROPE_SECTIONS] = {};
    const auto n_dims = static_cast<int>(op->op_params[1]);
    ggml_tensor* turned = sections ? ggml_rope_multi(ctx, x, positions, own_factors, n_dims, no_sections, mode, 0,
                                                     10000.0F, 1.0F, 0.0F, 1.0F, 0.0F, 0.0F)
                                   : ggml_rope_ext(ctx, x, positions, own_factors, n_dims, mode, 0, 10000.0F, 1.0F,
                                                   0.0F, 1.0F, 0.0F, 0.0F);
    std::memcpy(turned->op_params, op->op_params, sizeof turned->op_params);
    ggml_cgraph* graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, turned);
    const bool computed = ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS;
    if (computed) {
        const auto* result = static_cast<const float*>(turned->data);
        out.assign(result, result + channels * channels);
    }
    ggml_free(ctx);
    return computed ? Status{} : Status{StatusCode::internal, "the host's CPU back end failed to turn unit vectors"};
}

} // namespace

void RopeTrace::signature(std::vector<int32_t>& out) const {
    out.assign(1, static_cast<int32_t>(kind));
    for (const Part& part : parts) {
        out.push_back(part.first_channel);
        out.push_back(static_cast<int32_t>(part.op->ne[0]));
        out.push_back(part.op->src[2] != nullptr ? 1 : 0);
        out.insert(out.end(), part.op->op_params, part.op->op_params + 16); // all that a ROPE has
    }
}

void trace_rope(const ggml_tensor* set_rows, int head_size, RopeTrace& trace) {
    trace.parts.clear();
    trace.positions = nullptr;
    trace.kind = follow(set_rows->src[0], 0, head_size, trace);
    if (trace.kind != RopeTrace::Kind::turns) {
        trace.parts.clear();
    }
}

Status rope_pairs(const RopeTrace& trace, ggml_backend_t cpu, std::vector<RopePair>& pairs) {
    constexpr float kStill = 1e-9F; // half a turn after 3e9 positions
    pairs.clear();
    for (const RopeTrace::Part& part : trace.parts) {
        std::vector<float> turned;
        if (Status status = turn_units(part.op, cpu, turned); !status.ok()) {
            return status;
        }
        const auto channels = static_cast<size_t>(part.op->ne[0]);
        std::vector<bool> taken(channels);
        // e_first turns to (cos, sin) of (first, second), e_second to (-sin, cos): a positive entry off the diagonal
        // names the pair. Scaling (YaRN) changes both entries alike.
        for (size_t u = 0; u < channels; ++u) {
            size_t partner = u;
            float most = 0;
            for (size_t w = 0; w < channels; ++w) {
                if (w != u && turned[u * channels + w] > most) {
                    most = turned[u * channels + w];
                    partner = w;
                }
            }
            const float theta = std::atan2(most, turned[u * channels + u]);
            if (partner == u || theta < kStill || taken[u] || taken[partner]) {
                continue;
            }
            taken[u] = taken[partner] = true;
            pairs.push_back({static_cast<uint16_t>(static_cast<size_t>(part.first_channel) + u),
                             static_cast<uint16_t>(static_cast<size_t>(part.first_channel) + partner), theta});
        }
    }
    return {};
}

bool read_positions(const ggml_tensor* positions, int64_t n, std::vector<int32_t>& out) {
    constexpr int32_t kMost = 1 << 24;
    out.clear();
    if (positions == nullptr || positions->type != GGML_TYPE_I32 || n <= 0 ||
        (positions->ne[0] != n && positions->ne[0] != 4 * n) || ggml_nelements(positions) != positions->ne[0] ||
        (positions->buffer == nullptr && (positions->view_src == nullptr || positions->view_src->buffer == nullptr))) {
        return false;
    }
    out.resize(static_cast<size_t>(n));
    ggml_backend_tensor_get(positions, out.data(), 0, out.size() * sizeof(int32_t));
    if (std::any_of(out.begin(), out.end(), [](int32_t p) { return p < 0 || p > kMost; })) {
        out.clear();
        return false;
    }
    return true;
}

bool same_turns(const std::vector<RopePair>& a, const std::vector<RopePair>& b) {
    constexpr float kTolerance = 1e-3F;
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const RopePair& x, const RopePair& y) {
               return x.first == y.first && x.second == y.second &&
                      std::fabs(x.theta - y.theta) <= kTolerance * std::max(std::fabs(x.theta), std::fabs(y.theta));
           });
}

} // namespace turboquant::plugin
