// The C interface of prefill.
#include "cuda/capi.h"
#include "cuda/offsets.h"
#include "cuda/prefill.h"

#include <algorithm>

namespace turboquant::cuda {

namespace {

constexpr int64_t kMostItems = 65535; // of a launch: the grid's second dimension
constexpr int64_t kMostSplits = 32;   // the merging kernel's warp

struct PrefillPlan {
    int64_t items = 0;
    int64_t query_blocks = 0;
    int64_t code_images = 0;
    int64_t exact_images = 0;
    int64_t splits = 1;
    size_t image_part = 0; // of item_bytes
    size_t offset_part = 0;
    size_t partial_part = 0;
    size_t item_bytes = 0; // of workspace
};

int64_t whole_tiles(int64_t tokens) { // in images
    return (tokens + kMostTileTokens - 1) / kMostTileTokens * (kMostTileTokens / kImageTokens);
}

std::string plan_prefill(const tq_cuda_cache& c, const tq_cuda_attention& a, PrefillPlan& plan) {
    if (a.q_len < 1) {
        return "q_len " + std::to_string(a.q_len) + " is not positive";
    }
    if (std::string problem = heads_problem(c, a); !problem.empty()) {
        return problem;
    }
    if (a.max_length < 1 || a.max_length > 1 << 30) {
        return "max_length " + std::to_string(a.max_length) + " is not in 1..2^30";
    }
    plan.items = int64_t{a.batch} * c.kv_heads;
    const int64_t rows = int64_t{a.q_len} * (a.heads / c.kv_heads);
    if (rows + kPrefillRows > 1 << 28) {
        return "q_len " + std::to_string(a.q_len) + " is too large";
    }
    plan.query_blocks = (rows + kPrefillRows - 1) / kPrefillRows;
    plan.code_images = whole_tiles(a.max_length);
    const int64_t latest = c.window > 0 ? std::min<int64_t>(c.ring, int64_t{c.window} + a.q_len - 1) : 0;
    plan.exact_images = whole_tiles(c.sinks + latest);
    plan.image_part = static_cast<size_t>(plan.code_images + plan.exact_images) * image_bytes(c.head_size);
    const auto whole = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
    plan.offset_part = whole(static_cast<size_t>(rows) * static_cast<size_t>(std::max(c.mu_blocks, 0)) * sizeof(float));
    // Fewer blocks than the device has room for: a row's tiles are split, eight or more to a part.
    int64_t room = a.n_blocks;
    if (room <= 0) {
        int device = 0;
        int processors = 0;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
            return "no CUDA device";
        }
        room = processors;
    }
    const int64_t tiles = (plan.code_images + plan.exact_images) / (kMostTileTokens / kImageTokens);
    plan.splits = std::clamp<int64_t>(std::min(room / (plan.items * plan.query_blocks), tiles / 8), 1, kMostSplits);
    if (plan.splits > 1) {
        plan.partial_part = whole(static_cast<size_t>(plan.splits) * static_cast<size_t>(rows) *
                                  static_cast<size_t>(c.head_size + 1) * sizeof(float));
    }
    plan.item_bytes = plan.image_part + plan.offset_part + plan.partial_part;
    return {};
}

// Rows can be moved 16 bytes at a time, wherever one begins.
bool vectors(const void* p, int32_t type, int64_t batch, int64_t query, int64_t head) {
    const int64_t elements = type == TQ_CUDA_F32 ? 4 : 8;
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && batch % elements == 0 && query % elements == 0 &&
           head % elements == 0;
}

} // namespace

} // namespace turboquant::cuda

using namespace turboquant::cuda;

tq_status tq_cuda_prefill_workspace_bytes(const tq_cuda_cache* cache, const tq_cuda_attention* attention, size_t* least,
                                          size_t* all) {
    static const char* const kCall = "tq_cuda_prefill_workspace_bytes";
    if (cache == nullptr || attention == nullptr || least == nullptr || all == nullptr) {
        return invalid(kCall, "a null argument");
    }
    if (const std::string problem = shape_problem(*cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    PrefillPlan plan;
    if (const std::string problem = plan_prefill(*cache, *attention, plan); !problem.empty()) {
        return invalid(kCall, problem);
    }
    *least = plan.item_bytes;
    *all = plan.item_bytes * static_cast<size_t>(plan.items);
    return TQ_OK;
}

tq_status tq_cuda_prefill(const tq_cuda_cache* cache, const tq_cuda_attention* attention, void* stream) {
    static const char* const kCall = "tq_cuda_prefill";
    if (const std::string problem = cache_problem(cache); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (attention == nullptr || attention->struct_size != sizeof(tq_cuda_attention)) {
        return invalid(kCall, "attention is null or its struct_size is not that of this version");
    }
    const tq_cuda_cache& c = *cache;
    const tq_cuda_attention& a = *attention;
    PrefillPlan plan;
    if (const std::string problem = plan_prefill(c, a, plan); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (const std::string problem = attention_problem(c, a); !problem.empty()) {
        return invalid(kCall, problem);
    }
    if (a.scale < 0) {
        return invalid(kCall, "scale must not be negative");
    }
    if (a.workspace == nullptr || reinterpret_cast<uintptr_t>(a.workspace) % 256 != 0 ||
        a.workspace_size < plan.item_bytes) {
        return invalid(kCall, "the workspace is null, not 256-byte aligned, or its " +
                                  std::to_string(a.workspace_size) + " bytes are less than the " +
                                  std::to_string(plan.item_bytes) + " needed");
    }
    PrefillArgs args{};
    fill_call_args(c, a, args);
    args.images = static_cast<uint8_t*>(a.workspace);
    args.group_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + args.group - 1) / args.group);
    args.max_length = a.max_length;
    args.query_blocks = static_cast<int32_t>(plan.query_blocks);
    args.code_images = static_cast<int32_t>(plan.code_images);
    args.exact_images = static_cast<int32_t>(plan.exact_images);
    args.q_vectors = vectors(a.q, a.type, a.q_batch, a.q_query, a.q_head) ? 1 : 0;
    args.out_vectors = vectors(a.out, a.type, a.out_batch, a.out_query, a.out_head) ? 1 : 0;
    // As many items at a time as the workspace holds images of.
    const auto fits = static_cast<int64_t>(a.workspace_size / plan.item_bytes);
    const int64_t step =
        std::min({fits, kMostItems, (int64_t{1} << 30) / (plan.query_blocks * plan.splits), plan.items});
    auto* const behind = args.images + static_cast<size_t>(step) * (plan.image_part + plan.offset_part);
    args.splits = static_cast<int32_t>(plan.splits);
    args.partial = reinterpret_cast<float*>(behind);
    args.partial_log2 = args.partial + step * plan.splits * a.q_len * args.group * c.head_size;
    OffsetArgs offsets{};
    if (args.mu_blocks > 0) {
        offsets = offset_args(c, a, args.images + static_cast<size_t>(step) * plan.image_part, args.scale_log2);
        args.offsets = offsets.offsets;
    }
    for (int64_t first = 0; first < plan.items; first += step) {
        args.first_item = static_cast<int32_t>(first);
        args.items = static_cast<int32_t>(std::min(step, plan.items - first));
        cudaError_t error = cudaSuccess;
        if (args.offsets != nullptr) {
            offsets.first_item = args.first_item;
            offsets.items = args.items;
            error = launch_offsets(offsets, c.head_size, static_cast<cudaStream_t>(stream));
            if (error != cudaSuccess) {
                return cuda_status(kCall, error);
            }
        }
        error = launch_prefill(args, c.head_size, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) {
            return cuda_status(kCall, error);
        }
    }
    return TQ_OK;
}
