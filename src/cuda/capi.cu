// The C interface: every argument is checked here, in words, before a kernel sees it.
#include "cuda/capi.h"

#include "codec/codec_tables.h"
#include "cuda/decode.h"
#include "cuda/encode.h"
#include "cuda/offsets.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace turboquant::cuda {

namespace {

thread_local std::string last_error;

constexpr bool one_of(int x, std::initializer_list<int> allowed) {
    return std::find(allowed.begin(), allowed.end(), x) != allowed.end();
}

} // namespace

const std::string& error_of_this_thread() {
    return last_error;
}

tq_status fail(tq_status status, std::string message) {
    last_error = std::move(message);
    return status;
}
tq_status invalid(const char* call, const std::string& what) {
    return fail(TQ_INVALID_ARGUMENT, std::string(call) + ": " + what);
}
tq_status cuda_status(const char* call, cudaError_t error) {
    if (error == cudaSuccess) {
        return TQ_OK;
    }
    const tq_status status = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
                                 ? TQ_UNSUPPORTED
                                 : TQ_INTERNAL;
    return fail(status, std::string(call) + ": CUDA says: " + cudaGetErrorString(error));
}

std::string shape_problem(const tq_cuda_cache& c) {
    if (!one_of(c.page_size, {16, 32, 64, 128, 256})) {
        return "page_size " + std::to_string(c.page_size) + " is not 16, 32, 64, 128 or 256";
    }
    if (!one_of(c.head_size, {64, 128, 256})) {
        return "head_size " + std::to_string(c.head_size) + " is not 64, 128 or 256";
    }
    if (c.kv_heads < 1 || c.kv_heads > 65535) {
        return "kv_heads " + std::to_string(c.kv_heads) + " is not in 1..65535";
    }
    for (const auto& [name, bits] : {std::pair{"key_bits", c.key_bits}, {"value_bits", c.value_bits}}) {
        if (!one_of(bits, {2, 3, 4, 8})) {
            return std::string(name) + " " + std::to_string(bits) + " is not 2, 3, 4 or 8";
        }
    }
    return {};
}

std::string cache_problem(const tq_cuda_cache* cache) {
    if (cache == nullptr || cache->struct_size != sizeof(tq_cuda_cache)) {
        return "cache is null or its struct_size is not that of this version";
    }
    const tq_cuda_cache& c = *cache;
    if (std::string problem = shape_problem(c); !problem.empty()) {
        return problem;
    }
    if (c.pages == nullptr || c.n_pages < 1) {
        return "no pages";
    }
    if (reinterpret_cast<uintptr_t>(c.pages) % 16 != 0) {
        return "pages are not 16-byte aligned";
    }
    if (c.mu_blocks < 0 || c.mu_blocks > 65536) {
        return "mu_blocks " + std::to_string(c.mu_blocks) + " is not in 0..65536";
    }
    if (c.sinks < 0 || c.ring < 0 || c.window < 0) {
        return "sinks, ring and window must not be negative";
    }
    const bool exact = c.sinks > 0 || c.ring > 0;
    if (exact && (c.exact_keys == nullptr || c.exact_values == nullptr)) {
        return "sinks or ring without exact_keys and exact_values";
    }
    if (c.window > c.ring) {
        return "window " + std::to_string(c.window) + " is larger than the ring of " + std::to_string(c.ring);
    }
    return {};
}

int cache_tile_bytes(const tq_cuda_cache& c) {
    return tile_bytes(c.head_size, c.key_bits, c.value_bits);
}

OffsetArgs offset_args(const tq_cuda_cache& c, const tq_cuda_attention& a, void* offsets, float scale_log2) {
    OffsetArgs args{};
    args.q = a.q;
    args.mu = c.mu;
    args.lengths = a.lengths;
    args.offsets = static_cast<float*>(offsets);
    args.q_batch = a.q_batch;
    args.q_query = a.q_query;
    args.q_head = a.q_head;
    args.type = a.type;
    args.items = a.batch * c.kv_heads;
    args.q_len = a.q_len;
    args.kv_heads = c.kv_heads;
    args.group = a.heads / c.kv_heads;
    args.mu_blocks = c.mu_blocks;
    args.scale_log2 = scale_log2;
    return args;
}

int page_shift(const tq_cuda_cache& c) {
    int shift = 0;
    while (1 << shift < c.page_size) {
        ++shift;
    }
    return shift;
}

std::string heads_problem(const tq_cuda_cache& c, const tq_cuda_attention& a) {
    if (a.batch < 1) {
        return "batch " + std::to_string(a.batch) + " is not positive";
    }
    if (a.heads < 1 || a.heads % c.kv_heads != 0 || a.heads / c.kv_heads > 16) {
        return "heads " + std::to_string(a.heads) + " is not 1 to 16 times kv_heads " + std::to_string(c.kv_heads);
    }
    return {};
}

std::string attention_problem(const tq_cuda_cache& c, const tq_cuda_attention& a) {
    if (!type_ok(a.type)) {
        return "type " + std::to_string(a.type) + " is none of tq_cuda_type";
    }
    if (a.q == nullptr || a.out == nullptr || a.page_table == nullptr || a.lengths == nullptr) {
        return "q, out, page_table or lengths is null";
    }
    if ((c.sinks > 0 || c.ring > 0) && a.sequence_slots == nullptr) {
        return "a cache with exact rows needs sequence_slots";
    }
    if (a.softcap < 0 || a.sliding_window < 0 || !std::isfinite(a.scale)) {
        return "softcap and sliding_window must not be negative, scale must be finite";
    }
    return {};
}

void rotation_signs(int head_size, uint32_t (&signs)[8]) {
    for (int channel = 0; channel < head_size; ++channel) {
        if (turboquant::rotation_sign(head_size, channel) < 0) {
            signs[channel / 32] |= 1U << (channel % 32);
        }
    }
}

void fill_call_args(const tq_cuda_cache& c, const tq_cuda_attention& a, CallArgs& args) {
    args.pages = static_cast<const uint8_t*>(c.pages);
    args.mu = c.mu_blocks > 0 ? nullptr : c.mu; // with blocks its part of the scores depends on the token
    args.lambda = c.lambda;
    args.exact_keys = static_cast<const uint16_t*>(c.exact_keys);
    args.exact_values = static_cast<const uint16_t*>(c.exact_values);
    args.q = a.q;
    args.out = a.out;
    args.page_table = a.page_table;
    args.lengths = a.lengths;
    args.sequence_slots = a.sequence_slots;
    args.sink_logits = a.sink_logits;
    args.q_batch = a.q_batch;
    args.q_query = a.q_query;
    args.q_head = a.q_head;
    args.out_batch = a.out_batch;
    args.out_query = a.out_query;
    args.out_head = a.out_head;
    args.page_table_stride = a.page_table_stride;
    args.page_bytes = static_cast<int64_t>(tq_cuda_page_bytes(&c));
    args.type = a.type;
    args.q_len = a.q_len;
    args.kv_heads = c.kv_heads;
    args.group = a.heads / c.kv_heads;
    args.page_size = c.page_size;
    args.page_shift = page_shift(c);
    args.key_bits = c.key_bits;
    args.value_bits = c.value_bits;
    args.tile_bytes = cache_tile_bytes(c);
    args.sinks = c.sinks;
    args.ring = c.ring;
    args.window = c.window;
    args.sliding_window = a.sliding_window;
    args.mu_blocks = c.mu != nullptr ? c.mu_blocks : 0;
    args.causal = a.not_causal == 0 ? 1 : 0;
    rotation_signs(c.head_size, args.signs);
    const double log2e = 1.4426950408889634;
    const double scale = a.scale != 0 ? a.scale : 1.0 / std::sqrt(static_cast<double>(c.head_size));
    args.scale_log2 = static_cast<float>(a.softcap > 0 ? scale / a.softcap : scale * log2e);
    args.softcap_log2 = a.softcap > 0 ? static_cast<float>(a.softcap * log2e) : 0;
}

bool type_ok(int32_t type) {
    return type >= TQ_CUDA_F32 && type <= TQ_CUDA_BF16;
}

namespace {

SideTable side_table(int bits, turboquant::ScaleRule rule, int head_size) {
    const turboquant::EncodeTable& from = turboquant::encode_table(bits);
    SideTable table{};
    table.bits = bits;
    table.rule = static_cast<int32_t>(turboquant::kernel_rule(rule));
    table.first_level = from.first_level;
    for (int k = 0; k < from.n_thresholds; ++k) {
        table.threshold[k] = from.threshold[k];
        table.step[k] = from.step[k];
    }
    table.range_scale = from.range_scale;
    // As codec/kernels.inc computes them, rounded after every operation.
    const float size = std::sqrt(std::sqrt(static_cast<float>(head_size) / 64.0F));
    table.stretch_per_peak = from.stretch_slope / size;
    const float growth = from.stretch_growth * size;
    table.stretch_from = from.stretch_origin + growth;
    return table;
}

PagesArgs pages_args(const tq_cuda_cache& c) {
    PagesArgs p{};
    p.pages = static_cast<uint8_t*>(c.pages);
    p.mu = c.mu;
    p.lambda = c.lambda;
    p.mu_blocks = c.mu != nullptr ? c.mu_blocks : 0;
    p.n_slots = c.n_pages * c.page_size;
    p.page_bytes = static_cast<int64_t>(tq_cuda_page_bytes(&c));
    p.page_size = c.page_size;
    p.page_shift = page_shift(c);
    p.kv_heads = c.kv_heads;
    p.tile_bytes = cache_tile_bytes(c);
    rotation_signs(c.head_size, p.signs);
    p.side[0] = side_table(c.key_bits, turboquant::ScaleRule::unbiased, c.head_size);
    p.side[1] = side_table(c.value_bits, turboquant::ScaleRule::matched, c.head_size);
    return p;
}

// What an attention's shape comes to; "" or what is wrong with it.
struct Plan {
    LaunchShape shape{};
    int group = 0;
    int query_blocks = 0;
    int blocks = 0;
    int64_t items = 0;
    size_t partial_bytes = 0;
    size_t offsets_at = 0; // in the workspace, where there are mu_blocks
    size_t workspace = 0;
};

std::string plan_attention(const tq_cuda_cache& c, const tq_cuda_attention& a, Plan& plan) {
    if (a.q_len < 1 || a.q_len > 16) {
        return "q_len " + std::to_string(a.q_len) + " is not in 1..16";
    }
    if (std::string problem = heads_problem(c, a); !problem.empty()) {
        return problem;
    }
    plan.group = a.heads / c.kv_heads;
    plan.shape = launch_shape(c.head_size, c.key_bits, c.value_bits, plan.group * a.q_len);
    if (plan.shape.stages < 1) {
        return "the device has too little shared memory a block for this shape";
    }
    plan.query_blocks = (plan.group * a.q_len + plan.shape.rows - 1) / plan.shape.rows;
    plan.blocks = a.n_blocks;
    if (plan.blocks <= 0) {
        int device = 0;
        int processors = 0;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
            return "no CUDA device";
        }
        plan.blocks = processors * plan.shape.blocks_per_sm;
    }
    plan.items = static_cast<int64_t>(a.batch) * c.kv_heads * plan.query_blocks;
    plan.partial_bytes = static_cast<size_t>(2 * plan.blocks) * static_cast<size_t>(plan.shape.rows) *
                         static_cast<size_t>(c.head_size + 4) * sizeof(float);
    plan.partial_bytes = (plan.partial_bytes + 255) / 256 * 256;
    plan.workspace = plan.partial_bytes + static_cast<size_t>(plan.items) * sizeof(int32_t);
    plan.offsets_at = (plan.workspace + 255) / 256 * 256;
    if (c.mu_blocks > 0) {
        plan.workspace = plan.offsets_at + static_cast<size_t>(a.batch) * static_cast<size_t>(a.heads) *
                                               static_cast<size_t>(a.q_len) * static_cast<size_t>(c.mu_blocks) *
                                               sizeof(float);
    }
    return {};
}

} // namespace

} // namespace turboquant::cuda

using namespace turboquant::cuda;

const char* tq_cuda_last_error(void) {
    return error_of_this_thread().c_str();
}

size_t tq_cuda_page_bytes(const tq_cuda_cache* cache) {
    if (cache == nullptr || !shape_problem(*cache).empty()) {
        return 0;
    }
    return static_cast<size_t>(cache->kv_heads) * static_cast<size_t>(cache->page_size / kTileTokens) *
           static_cast<size_t>(cache_tile_bytes(*cache));
}

tq_status tq_cuda_encode(const tq_cuda_cache* cache, const tq_cuda_write* write, void* stream) {
    static const char* const kCall = "tq_cuda_encode";
    if (const std::string problem = cache_problem(cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (write == nullptr || write->struct_size != sizeof(tq_cuda_write)) {
        return invalid(kCall, "write is null or its struct_size is not that of this version");
    }
    if (!type_ok(write->type)) {
        return invalid(kCall, "type " + std::to_string(write->type) + " is none of tq_cuda_type");
    }
    if (write->n < 0 ||
        (write->n > 0 && (write->keys == nullptr || write->values == nullptr || write->slots == nullptr))) {
        return invalid(kCall, "keys, values or slots are null, or n is negative");
    }
    if (write->exact_rows != nullptr && cache->exact_keys == nullptr) {
        return invalid(kCall, "exact_rows for a cache without exact rows");
    }
    if (write->n == 0) {
        return TQ_OK;
    }
    if (cache->mu != nullptr && cache->mu_blocks > 0 && write->positions == nullptr) {
        return invalid(kCall, "a cache with mu_blocks needs positions");
    }
    EncodeArgs args{};
    args.cache = pages_args(*cache);
    args.x[0] = write->keys;
    args.x[1] = write->values;
    args.stride[0] = write->key_stride;
    args.stride[1] = write->value_stride;
    args.head_stride[0] = write->key_head_stride;
    args.head_stride[1] = write->value_head_stride;
    args.n = write->n;
    args.slots = write->slots;
    args.exact_rows = write->exact_rows;
    args.positions = write->positions;
    args.exact[0] = static_cast<uint16_t*>(cache->exact_keys);
    args.exact[1] = static_cast<uint16_t*>(cache->exact_values);
    args.type = write->type;
    args.norm = 1.0F / std::sqrt(static_cast<float>(cache->head_size));
    const int64_t width = write->type == TQ_CUDA_F32 ? 4 : 2;
    for (int side = 0; side < 2; ++side) {
        args.vectors[side] = reinterpret_cast<uintptr_t>(args.x[side]) % static_cast<uintptr_t>(4 * width) == 0 &&
                                     args.stride[side] % 4 == 0 && args.head_stride[side] % 4 == 0
                                 ? 1
                                 : 0;
    }
    args.condition_vectors =
        (reinterpret_cast<uintptr_t>(args.cache.mu) | reinterpret_cast<uintptr_t>(args.cache.lambda)) % 16 == 0 ? 1 : 0;
    for (int pair = 0; pair < cache->head_size / 8; ++pair) {
        for (int w = 0; w < 4; ++w) {
            for (int i = 0; i < 2; ++i) {
                const int channel = pair / 2 * 16 + 4 * w + pair % 2 * 2 + i;
                const uint32_t negative = args.cache.signs[channel / 32] >> (channel % 32) & 1U;
                args.pair_signs[pair / 16][w] |= negative << (pair % 16 + 16 * i);
            }
        }
    }
    return cuda_status(kCall, launch_encode(args, cache->head_size, static_cast<cudaStream_t>(stream)));
}

tq_status tq_cuda_read(const tq_cuda_cache* cache, const int64_t* slots, const int64_t* positions, int64_t n,
                       void* codes, void* scales, void* rows, int32_t type, int32_t rotated, void* stream) {
    static const char* const kCall = "tq_cuda_read";
    if (const std::string problem = cache_problem(cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (n < 0 || (n > 0 && slots == nullptr)) {
        return invalid(kCall, "slots are null, or n is negative");
    }
    if (rows != nullptr && !type_ok(type)) {
        return invalid(kCall, "type " + std::to_string(type) + " is none of tq_cuda_type");
    }
    if (n == 0) {
        return TQ_OK;
    }
    if (rows != nullptr && rotated == 0 && cache->mu != nullptr && cache->mu_blocks > 0 && positions == nullptr) {
        return invalid(kCall, "plain rows of a cache with mu_blocks need positions");
    }
    ReadArgs args{};
    args.cache = pages_args(*cache);
    args.slots = slots;
    args.positions = positions;
    args.n = n;
    args.codes = static_cast<uint8_t*>(codes);
    args.scales = static_cast<uint16_t*>(scales);
    args.rows = rows;
    args.type = type;
    args.rotated = rotated;
    return cuda_status(kCall, launch_read(args, cache->head_size, static_cast<cudaStream_t>(stream)));
}

tq_status tq_cuda_workspace_bytes(const tq_cuda_cache* cache, const tq_cuda_attention* attention, size_t* bytes) {
    static const char* const kCall = "tq_cuda_workspace_bytes";
    if (cache == nullptr || attention == nullptr || bytes == nullptr) {
        return invalid(kCall, "a null argument");
    }
    if (const std::string problem = shape_problem(*cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    Plan plan;
    if (const std::string problem = plan_attention(*cache, *attention, plan); !problem.empty()) {
        return invalid(kCall, problem);
    }
    *bytes = plan.workspace;
    return TQ_OK;
}

tq_status tq_cuda_attend(const tq_cuda_cache* cache, const tq_cuda_attention* attention, void* stream) {
    static const char* const kCall = "tq_cuda_attend";
    if (const std::string problem = cache_problem(cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (attention == nullptr || attention->struct_size != sizeof(tq_cuda_attention)) {
        return invalid(kCall, "attention is null or its struct_size is not that of this version");
    }
    const tq_cuda_cache& c = *cache;
    const tq_cuda_attention& a = *attention;
    Plan plan;
    if (const std::string problem = plan_attention(c, a, plan); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (const std::string problem = attention_problem(c, a); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (c.window > 0 && c.ring < c.window + a.q_len - 1) {
        return invalid(kCall, "ring " + std::to_string(c.ring) +
                                  " is less than window + q_len - 1 = " + std::to_string(c.window + a.q_len - 1));
    }
    if (a.workspace == nullptr || a.workspace_size < plan.workspace) {
        return invalid(kCall, "the workspace has " + std::to_string(a.workspace_size) + " bytes, " +
                                  std::to_string(plan.workspace) + " are needed");
    }
    AttendArgs args{};
    fill_call_args(c, a, args);
    args.partial = static_cast<float*>(a.workspace);
    args.counters = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(a.workspace) + plan.partial_bytes);
    args.batch = a.batch;
    args.heads = a.heads;
    args.query_blocks = plan.query_blocks;
    args.stages = plan.shape.stages;
    if (args.mu_blocks > 0) {
        const OffsetArgs offsets =
            offset_args(c, a, static_cast<uint8_t*>(a.workspace) + plan.offsets_at, args.scale_log2);
        args.offsets = offsets.offsets;
        const cudaError_t error = launch_offsets(offsets, c.head_size, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) {
            return cuda_status(kCall, error);
        }
    }
    return cuda_status(kCall,
                       launch_attend(args, c.head_size, plan.shape, plan.blocks, static_cast<cudaStream_t>(stream)));
}
