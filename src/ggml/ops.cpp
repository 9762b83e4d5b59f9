#include "ops.h"

#include "host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <omp.h>

namespace turboquant::plugin {
namespace {

// The threads are OpenMP's, which ggml's CPU back end uses too: one pool, not two that spin against each other.
void run_openmp(void* context, int64_t n_tasks, ParallelFor::Task task, void* arg) {
    // NOLINTNEXTLINE(clang-analyzer-deadcode.DeadStores): the clause below reads it
    const int n_workers = *static_cast<const int*>(context);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_workers)
    for (int64_t i = 0; i < n_tasks; ++i) {
        task(arg, i, omp_get_thread_num());
    }
}

Status no_store(const KvTensor& tensor) {
    return {StatusCode::internal, tensor.name() + " is used before its head size was learned: update turboquant.cpp"};
}

int64_t index_at(const ggml_tensor* indices, int64_t i) {
    const char* at = static_cast<const char*>(indices->data) + static_cast<size_t>(i) * indices->nb[0];
    return indices->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t*>(at)
                                          : *reinterpret_cast<const int32_t*>(at);
}

float op_float(const ggml_tensor* op, int index) {
    float value = 0;
    std::memcpy(&value, op->op_params + index, sizeof value);
    return value;
}

constexpr uint16_t kHalfMinusInfinity = 0xFC00;
constexpr int64_t kFewRows = 16; // of a stream: written by one thread

// How many of the mask's columns are visible, counted until `enough`.
int64_t count_visible(const uint16_t* mask, int64_t n, int64_t enough) {
    constexpr int64_t kBlock = 64;
    int64_t visible = 0;
    for (int64_t begin = 0; begin < n && visible < enough; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, n);
        int count = 0;
        for (int64_t i = begin; i < end; ++i) {
            count += mask[i] != kHalfMinusInfinity;
        }
        visible += count;
    }
    return visible;
}

// Refuses to attend to a row that could not be restored.
Status check_damaged(const KvTensor& tensor, int64_t stream, const AttentionCall& call) {
    const int64_t first = stream * tensor.cells();
    for (auto row = tensor.damaged().lower_bound(first); row != tensor.damaged().end() && *row < first + call.n_rows;
         ++row) {
        for (int64_t i = 0; i < call.n_queries; ++i) {
            if (call.mask == nullptr || call.mask[i * call.mask_query_stride + *row - first] != kHalfMinusInfinity) {
                if (tensor.is_pending(*row)) {
                    return invalid(
                        tensor.name() + ": row " + std::to_string(*row) +
                        " was saved by a cache with other conditioning, and too few of its rows came with it to "
                        "know which: restore more of it or use the profile it was made with (TURBOQUANT_PROFILE), "
                        "or clear the sequence and read the prompt again");
                }
                return invalid(
                    tensor.name() + ": row " + std::to_string(*row) +
                    " could not be restored from the saved state (see the message above): clear the sequence and read "
                    "the prompt again");
            }
        }
    }
    return {};
}

} // namespace

OpContext::~OpContext() {
    if (cpu_ != nullptr) {
        ggml_backend_free(cpu_);
    }
}

ParallelFor OpContext::parallel() const {
    return {run_openmp, const_cast<int*>(&n_threads_), n_threads_};
}

Status OpContext::learn_rope(KvBuffer& buffer, KvTensor& tensor, const RopeTrace& trace) {
    RopeFacts& facts = tensor.rope();
    trace.signature(signature_);
    if (facts.known && facts.signature == signature_) {
        return {};
    }
    facts.kind = trace.kind;
    facts.pairs.clear();
    if (trace.kind == RopeTrace::Kind::turns) {
        ggml_backend_t cpu = this->cpu();
        if (cpu == nullptr) {
            facts.kind = RopeTrace::Kind::unknown;
        } else if (Status status = rope_pairs(trace, cpu, facts.pairs); !status.ok()) {
            return status;
        }
    }
    facts.signature = signature_;
    facts.known = true;
    Status status = tensor.key_source().see_turns(facts, tensor.stores(), parallel());
    report_sources(buffer);
    return status;
}

const int32_t* OpContext::batch_positions(const KvTensor& tensor, const RopeTrace& trace, int64_t n) {
    const bool again = std::find(written_.begin(), written_.end(), &tensor) != written_.end();
    const bool other_graph = trace.positions != nullptr && trace.positions != positions_tensor_;
    if (again || other_graph) {
        written_.clear();
        positions_.clear();
        positions_tensor_ = nullptr;
    }
    written_.push_back(&tensor);
    if (positions_tensor_ == nullptr && trace.positions != nullptr) {
        positions_tensor_ = trace.positions; // also if it cannot be read: later it would be less so
        read_positions(trace.positions, n, positions_);
    }
    return static_cast<int64_t>(positions_.size()) == n ? positions_.data() : nullptr;
}

Status OpContext::find_runs(const ggml_tensor* indices, int64_t n, KvTensor& tensor) {
    std::vector<Batch>& batches = this->batches(tensor.side());
    batches.resize(std::max(batches.size(), static_cast<size_t>(tensor.streams())));
    for (Batch& batch : batches) {
        batch.store = nullptr;
        batch.staged = false;
        batch.keys.clear();
        batch.positions.clear();
    }
    runs_.clear();
    cells_.clear();
    for (int64_t begin = 0; begin < n;) {
        const int64_t stream = index_at(indices, begin) / tensor.cells();
        if (stream < 0 || stream >= tensor.streams()) {
            return invalid(tensor.name() + ": row index " + std::to_string(index_at(indices, begin)) +
                           " is outside the cache");
        }
        int64_t end = begin;
        for (; end < n && index_at(indices, end) / tensor.cells() == stream; ++end) {
            cells_.push_back(index_at(indices, end) % tensor.cells());
        }
        const Store& store = *tensor.store(stream);
        Batch& batch = batches[static_cast<size_t>(stream)];
        // A single row needs no staging when there is a ring: after the write the ring is what the query is to see.
        // Nor can a stream that a batch visits twice be staged: its queries then see the ring as it is at the end.
        const bool first_visit = batch.store == nullptr;
        const bool ring = store.options().window > 0 || store.calibrating();
        const bool exact_rows = ring || store.options().sink_slots > 0;
        batch.staged = exact_rows && first_visit && (end - begin > 1 || !ring);
        if (first_visit) {
            batch.store = &store;
            batch.cells.clear();
        }
        batch.cells.insert(batch.cells.end(), cells_.begin() + begin, cells_.end());
        runs_.push_back({stream, begin, end, &batch, first_visit, {}});
        begin = end;
    }
    return {};
}

Status OpContext::set_rows(const ggml_tensor* op) {
    const KvRef kv = find_kv(op);
    const ggml_tensor* rows = op->src[0];
    const ggml_tensor* indices = op->src[1];
    const int64_t n = rows->ne[1];
    if (n == 0) {
        return {};
    }
    const std::lock_guard lock(kv.buffer->mutex);
    KvTensor& tensor = *kv.tensor;
    if (tensor.store(0) == nullptr) {
        return no_store(tensor);
    }
    const float* x = static_cast<const float*>(rows->data);
    int64_t stride = static_cast<int64_t>(rows->nb[1] / sizeof(float));
    if (rows->type == GGML_TYPE_F16) {
        rows_.resize(static_cast<size_t>(n * rows->ne[0]));
        for (int64_t i = 0; i < n; ++i) {
            ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t*>(static_cast<const char*>(rows->data) +
                                                                       static_cast<size_t>(i) * rows->nb[1]),
                                  rows_.data() + i * rows->ne[0], rows->ne[0]);
        }
        x = rows_.data();
        stride = rows->ne[0];
    }
    const int32_t* positions = nullptr;
    bool keep_keys = false;
    if (tensor.side() == Side::key) {
        trace_rope(op, tensor.head_size(), trace_);
        if (Status status = learn_rope(*kv.buffer, tensor, trace_); !status.ok()) {
            return {status.code(), tensor.name() + ": " + status.message()};
        }
        positions = batch_positions(tensor, trace_, n);
        keep_keys = tuning() || tensor.key_source().wants_rows();
    }
    if (Status status = find_runs(indices, n, tensor); !status.ok()) {
        return status;
    }
    const auto write = [&](Run& run, const ParallelFor& parallel) {
        Store& store = *tensor.store(run.stream);
        run.status = store.write(x + run.begin * stride, stride, cells_.data() + run.begin, run.end - run.begin,
                                 parallel, run.batch->staged ? &run.batch->staging : nullptr,
                                 positions != nullptr ? positions + run.begin : nullptr);
    };
    const bool once = std::all_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.first_visit; });
    const bool few_each = n < kFewRows * static_cast<int64_t>(runs_.size());
    if (once && few_each && runs_.size() > 1) { // stores are independent of each other
        parallel()(static_cast<int64_t>(runs_.size()),
                   [&](int64_t i, int) { write(runs_[static_cast<size_t>(i)], ParallelFor{}); });
    } else {
        for (Run& run : runs_) {
            write(run, parallel());
        }
    }
    for (const Run& run : runs_) {
        if (!run.status.ok()) {
            return {run.status.code(), tensor.name() + ": " + run.status.message()};
        }
        for (int64_t i = run.begin; i < run.end && !tensor.damaged().empty(); ++i) {
            tensor.mark_written(run.stream * tensor.cells() + cells_[static_cast<size_t>(i)]);
        }
        Batch& batch = *run.batch;
        for (int64_t i = run.begin; i < run.end && keep_keys; ++i) {
            batch.keys.insert(batch.keys.end(), x + i * stride, x + i * stride + tensor.elements());
            batch.positions.push_back(positions != nullptr ? positions[i]
                                                           : static_cast<int32_t>(cells_[static_cast<size_t>(i)]));
        }
    }
    return {};
}

Status OpContext::observe(const ggml_tensor* op, KvBuffer& buffer, KvTensor& tensor, int64_t first_stream) {
    KeySource& source = tensor.key_source();
    bool seen = false;
    const ggml_tensor* q = op->src[0];
    const int64_t n_streams = op->src[1]->ne[3];
    const int kv_heads = tensor.elements() / tensor.head_size();
    for (int64_t s = 0; s < n_streams; ++s) {
        Batch* batch = find_batch(Side::key, first_stream + s, tensor.store(first_stream + s), q->ne[1]);
        if (batch == nullptr || batch->keys.empty() || q->ne[2] % kv_heads != 0) {
            continue;
        }
        for (int64_t i = 0; i < q->ne[1]; ++i) {
            const SeenRow row = {.key = batch->keys.data() + i * tensor.elements(),
                                 .position = batch->positions[static_cast<size_t>(i)],
                                 .q = reinterpret_cast<const float*>(static_cast<const char*>(q->data) +
                                                                     static_cast<size_t>(s) * q->nb[3] +
                                                                     static_cast<size_t>(i) * q->nb[1]),
                                 .q_head_stride = static_cast<int64_t>(q->nb[2] / sizeof(float)),
                                 .n_heads = static_cast<int>(q->ne[2]),
                                 .scale = op_float(op, 0)};
            if (tuning()) {
                tune_row(tensor.layer(), tensor.head_size(), kv_heads, tensor.rope(), row);
            }
            source.add(row, tensor.head_size(), kv_heads);
        }
        batch->keys.clear();
        seen = true;
    }
    if (source.complete()) {
        std::vector<const Staging*> staging(static_cast<size_t>(tensor.streams()));
        for (size_t stream = 0; stream < staging.size(); ++stream) {
            const Batch& batch = batches(Side::key)[stream];
            staging[stream] = batch.staged && batch.store == tensor.stores()[stream].get() ? &batch.staging : nullptr;
        }
        if (Status status = source.finish(tensor.stores(), staging, parallel()); !status.ok()) {
            return {status.code(), tensor.name() + ": " + status.message()};
        }
    }
    if (seen && !source.wants_rows()) {
        for (Batch& batch : batches(Side::key)) {
            std::vector<float>().swap(batch.keys);
        }
        report_sources(buffer);
    }
    return {};
}

OpContext::Batch* OpContext::find_batch(Side side, int64_t stream, const Store* store, int64_t n_queries) {
    std::vector<Batch>& list = batches(side);
    if (static_cast<size_t>(stream) >= list.size()) {
        return nullptr;
    }
    Batch& batch = list[static_cast<size_t>(stream)];
    return batch.store == store && static_cast<int64_t>(batch.cells.size()) == n_queries ? &batch : nullptr;
}

// A sequence's first rows are those whose own query sees at most `sinks` columns of the mask: positions are not known
// here, and several sequences may share a stream.
Status OpContext::pin_first_rows(const ggml_tensor* mask, int64_t stream_in_batch, int64_t n_queries, int64_t n_rows,
                                 Store& k, Store* v, Batch* k_batch, Batch* v_batch, int sinks) {
    for (int64_t i = 0; i < n_queries; ++i) {
        if (mask != nullptr) {
            const auto* row = reinterpret_cast<const uint16_t*>(
                static_cast<const char*>(mask->data) + static_cast<size_t>(i) * mask->nb[1] +
                static_cast<size_t>(stream_in_batch % mask->ne[3]) * mask->nb[3]);
            if (count_visible(row, n_rows, sinks + 1) > sinks) {
                continue;
            }
        } else if (n_rows > sinks) {
            continue;
        }
        if (k_batch != nullptr) {
            if (Status status =
                    k.pin(k_batch->cells[static_cast<size_t>(i)], k_batch->staged ? &k_batch->staging : nullptr);
                !status.ok()) {
                return status;
            }
        }
        if (v != nullptr && v_batch != nullptr) {
            if (Status status =
                    v->pin(v_batch->cells[static_cast<size_t>(i)], v_batch->staged ? &v_batch->staging : nullptr);
                !status.ok()) {
                return status;
            }
        }
    }
    return {};
}

Status OpContext::flash_attention(const ggml_tensor* op) {
    const ggml_tensor* q = op->src[0];
    const ggml_tensor* k = op->src[1];
    const ggml_tensor* v = op->src[2];
    const ggml_tensor* mask = op->src[3];
    const ggml_tensor* sink_logits = op->src[4];
    const KvRef keys = find_kv(k);
    const KvRef values = find_kv(v);
    const bool shared = keys.tensor == values.tensor; // MLA: values are the first channels of the keys

    std::unique_lock lock(keys.buffer->mutex, std::defer_lock);
    std::unique_lock other(values.buffer->mutex, std::defer_lock);
    if (keys.buffer == values.buffer) {
        lock.lock();
    } else {
        std::lock(lock, other);
    }
    for (KvTensor* tensor : {keys.tensor, values.tensor}) {
        if (tensor->store(0) == nullptr) {
            return no_store(*tensor);
        }
    }
    const size_t stream_bytes = keys.tensor->row_bytes() * static_cast<size_t>(keys.tensor->cells());
    const int64_t first_stream = static_cast<int64_t>(k->view_offs / stream_bytes);
    if (k->view_offs % stream_bytes != 0 || first_stream + k->ne[3] > keys.tensor->streams() ||
        (shared && v->view_offs != k->view_offs) || k->ne[1] > keys.tensor->cells()) {
        return {StatusCode::unsupported, std::string("attention over a part of ") + keys.tensor->name() +
                                             " that does not start at its first row"};
    }

    // First rows are pinned before conditioning, which may take the ring they are in.
    const int sinks = keys.tensor->config().sinks;
    for (int64_t s = 0; s < k->ne[3] && sinks > 0; ++s) {
        const int64_t stream = first_stream + s;
        Store& k_store = *keys.tensor->store(stream);
        Store* v_store = shared ? nullptr : values.tensor->store(stream);
        if (k_store.options().sink_slots == 0) {
            continue;
        }
        Batch* k_batch = find_batch(Side::key, stream, &k_store, q->ne[1]);
        Batch* v_batch = shared ? nullptr : find_batch(Side::value, stream, v_store, q->ne[1]);
        if (Status status = pin_first_rows(mask, s, q->ne[1], k->ne[1], k_store, v_store, k_batch, v_batch, sinks);
            !status.ok()) {
            return status;
        }
    }
    if (Status status = observe(op, *keys.buffer, *keys.tensor, first_stream); !status.ok()) {
        return status;
    }
    jobs_.resize(static_cast<size_t>(k->ne[3]));
    for (int64_t s = 0; s < k->ne[3]; ++s) {
        const int64_t stream = first_stream + s;
        const Store& k_store = *keys.tensor->store(stream);
        const Store& v_store = *values.tensor->store(stream);
        AttentionJob& job = jobs_[static_cast<size_t>(s)];
        job = {&k_store, &v_store, {}};
        AttentionCall& call = job.call;
        call.n_queries = q->ne[1];
        call.n_heads = static_cast<int>(q->ne[2]);
        call.q = reinterpret_cast<const float*>(static_cast<const char*>(q->data) + static_cast<size_t>(s) * q->nb[3]);
        call.q_query_stride = static_cast<int64_t>(q->nb[1] / sizeof(float));
        call.q_head_stride = static_cast<int64_t>(q->nb[2] / sizeof(float));
        call.n_rows = k->ne[1];
        if (mask != nullptr) {
            call.mask = reinterpret_cast<const uint16_t*>(static_cast<const char*>(mask->data) +
                                                          static_cast<size_t>(s % mask->ne[3]) * mask->nb[3]);
            call.mask_query_stride = static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t));
        }
        call.scale = op_float(op, 0);
        call.max_bias = op_float(op, 1);
        call.softcap = op_float(op, 2);
        call.sink_logits = sink_logits == nullptr ? nullptr : static_cast<const float*>(sink_logits->data);
        call.out = reinterpret_cast<float*>(static_cast<char*>(op->data) + static_cast<size_t>(s) * op->nb[3]);
        call.out_head_stride = static_cast<int64_t>(op->nb[1] / sizeof(float));
        call.out_query_stride = static_cast<int64_t>(op->nb[2] / sizeof(float));
        call.value_size = shared ? static_cast<int>(v->ne[0]) : 0;

        for (const KvTensor* tensor : {keys.tensor, values.tensor}) {
            if (Status status = check_damaged(*tensor, stream, call); !status.ok()) {
                return status;
            }
        }
        Batch* k_batch = find_batch(Side::key, stream, &k_store, call.n_queries);
        Batch* v_batch = shared ? nullptr : find_batch(Side::value, stream, &v_store, call.n_queries);
        call.k_staging = k_batch != nullptr && k_batch->staged ? &k_batch->staging : nullptr;
        call.v_staging = shared ? call.k_staging : v_batch != nullptr && v_batch->staged ? &v_batch->staging : nullptr;
        // Layers that read these rows again without writing them see the stores as they are now.
        if (k_batch != nullptr) {
            k_batch->store = nullptr;
        }
        if (v_batch != nullptr) {
            v_batch->store = nullptr;
        }
    }
    if (Status status = attend_all(jobs_, workspace_, parallel(), keys.tensor->config().isa); !status.ok()) {
        return {status.code(), keys.tensor->name() + ": " + status.message()};
    }
    return {};
}

ggml_backend_t OpContext::cpu() {
    if (cpu_ == nullptr) {
        if (ggml_backend_dev_t device = cpu_device()) {
            cpu_ = ggml_backend_dev_init(device, nullptr);
        }
    }
    return cpu_;
}

Status OpContext::rope(const ggml_tensor* op) {
    const KvRef kv = find_kv(op);
    const ggml_tensor* view = op->src[0]; // [n_rot, heads, cells * streams], perhaps from a channel on
    const ggml_tensor* shifts = op->src[1];
    const ggml_tensor* factors = op->src[2];
    const std::lock_guard lock(kv.buffer->mutex);
    KvTensor& tensor = *kv.tensor;
    const int64_t n_rows = tensor.cells() * tensor.streams();
    if (view->ne[2] != n_rows || shifts->ne[0] != n_rows || shifts->type != GGML_TYPE_I32) {
        return {StatusCode::unsupported,
                tensor.name() + ": a shift of part of the cache, or with several positions a row"};
    }
    if (tensor.store(0) == nullptr) {
        return no_store(tensor);
    }
    const auto* shift = static_cast<const int32_t*>(shifts->data);
    const int64_t channels = view->ne[0];
    const int64_t heads = view->ne[1];
    const int64_t head_size = tensor.head_size();
    const int64_t first_channel = static_cast<int64_t>(view->view_offs / ggml_type_size(tensor.type()));
    if (heads * head_size != tensor.elements() || first_channel + channels > head_size) {
        return {StatusCode::unsupported, tensor.name() + ": a shift of heads that are not the cache's"};
    }
    ggml_backend_t cpu = this->cpu();
    if (cpu == nullptr) {
        return {StatusCode::unsupported, "the host has no CPU back end to turn keys with"};
    }

    constexpr int64_t kRows = 256; // bounds the scratch memory
    std::vector<int64_t> todo;
    for (int64_t row = 0; row < n_rows; ++row) {
        if (shift[row] != 0) {
            todo.push_back(row);
        }
    }
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    for (size_t begin = 0; begin < todo.size(); begin += kRows) {
        const int64_t n = std::min<int64_t>(kRows, static_cast<int64_t>(todo.size() - begin));
        const size_t bytes =
            static_cast<size_t>(n * heads * channels) * sizeof(float) + static_cast<size_t>(n) * sizeof(int32_t);
        ggml_context* ctx =
            ggml_init({bytes + 8 * ggml_tensor_overhead() + ggml_graph_overhead() + 4096, nullptr, false});
        if (ctx == nullptr) {
            return {StatusCode::out_of_memory, "no memory to shift the context"};
        }
        ggml_tensor* x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, channels, heads, n);
        ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = todo[begin + static_cast<size_t>(i)];
            static_cast<int32_t*>(positions->data)[i] = shift[row];
            Status status = tensor.store(row / tensor.cells())->read(row % tensor.cells(), values.data());
            if (!status.ok()) {
                ggml_free(ctx);
                return status;
            }
            for (int64_t h = 0; h < heads; ++h) {
                std::memcpy(static_cast<float*>(x->data) + (i * heads + h) * channels,
                            values.data() + h * head_size + first_channel,
                            static_cast<size_t>(channels) * sizeof(float));
            }
        }
        ggml_tensor* turned =
            ggml_rope_ext_inplace(ctx, x, positions, const_cast<ggml_tensor*>(factors), static_cast<int>(channels), 0,
                                  0, 10000.0F, 1.0F, 0.0F, 1.0F, 0.0F, 0.0F);
        std::memcpy(turned->op_params, op->op_params, sizeof turned->op_params);
        ggml_cgraph* graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, turned);
        const ggml_status computed = ggml_backend_graph_compute(cpu, graph);
        Status status;
        for (int64_t i = 0; i < n && computed == GGML_STATUS_SUCCESS && status.ok(); ++i) {
            const int64_t row = todo[begin + static_cast<size_t>(i)];
            Store& store = *tensor.store(row / tensor.cells());
            status = store.read(row % tensor.cells(), values.data());
            for (int64_t h = 0; h < heads; ++h) {
                std::memcpy(values.data() + h * head_size + first_channel,
                            static_cast<const float*>(x->data) + (i * heads + h) * channels,
                            static_cast<size_t>(channels) * sizeof(float));
            }
            if (status.ok()) {
                status = store.rewrite(row % tensor.cells(), values.data(), shift[row]);
            }
        }
        ggml_free(ctx);
        if (computed != GGML_STATUS_SUCCESS) {
            return {StatusCode::internal, "the host's CPU back end failed to turn the keys"};
        }
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

} // namespace turboquant::plugin
