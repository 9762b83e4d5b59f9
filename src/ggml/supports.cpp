// Which operations the device takes, and the words for those it cannot.
#include "host.h"
#include "ops.h"

#include <stdexcept>

namespace turboquant::plugin {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw std::runtime_error("turboquant: " + message);
}

constexpr const char* kNeedsFlashAttention = "TurboQuant needs flash attention, and it is off: turn it on (llama.cpp: "
                                             "-fa on; llama-cpp-python: flash_attn=True; libllama: "
                                             "flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED)";

void check(const Status& status) {
    if (!status.ok()) {
        refuse(status.message());
    }
}

void learn_head_size(const KvRef& kv, int64_t head_size) {
    if (kv.tensor == nullptr) {
        return; // only measured, nothing stored
    }
    const std::lock_guard lock(kv.buffer->mutex);
    check(kv.tensor->set_head_size(static_cast<int>(head_size)));
}

bool is_view(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

bool supports_set_rows(const ggml_tensor* op, const KvRef& target) {
    const ggml_tensor* rows = op->src[0];
    const ggml_tensor* indices = op->src[1];
    if (op->ne[0] == 1) {
        refuse(kNeedsFlashAttention); // the host writes V transposed, one element a row
    }
    if ((rows->type != GGML_TYPE_F32 && rows->type != GGML_TYPE_F16) ||
        (indices->type != GGML_TYPE_I64 && indices->type != GGML_TYPE_I32) || rows->ne[2] != 1 || rows->ne[3] != 1) {
        refuse(std::string("rows of type ") + ggml_type_name(rows->type) +
               " with more than two dimensions cannot be written to " + op->name);
    }
    if (target.tensor != nullptr && op->ne[0] != target.tensor->elements()) {
        refuse("the model writes rows of " + std::to_string(op->ne[0]) + " elements into " + target.tensor->name() +
               ", which holds rows of " + std::to_string(target.tensor->elements()));
    }
    return true;
}

bool supports_flash_attention(const ggml_tensor* op) {
    const ggml_tensor* q = op->src[0];
    const ggml_tensor* k = op->src[1];
    const ggml_tensor* v = op->src[2];
    const ggml_tensor* mask = op->src[3];
    const KvRef keys = find_kv(k);
    const KvRef values = find_kv(v);
    if (!keys.is_kv || !values.is_kv) {
        refuse("this model attends to keys and values of which only one is in the KV cache: run it without the "
               "TurboQuant device "
               "(--device none)");
    }
    if (q->type != GGML_TYPE_F32 || (mask != nullptr && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1))) {
        refuse("this model's attention has a query that is not fp32 or a mask for each head: run it without the "
               "TurboQuant device "
               "(--device none)");
    }
    learn_head_size(keys, k->ne[0]);
    if (values.tensor != keys.tensor) {
        learn_head_size(values, v->ne[0]);
    }
    return true;
}

} // namespace

bool supports_op(const ggml_tensor* op) {
    if (is_view(op->op)) {
        return true;
    }
    const KvRef target = find_kv(op);
    if (op->op == GGML_OP_SET_ROWS && target.is_kv) {
        return supports_set_rows(op, target);
    }
    bool reads_kv = false;
    for (const ggml_tensor* source : op->src) {
        reads_kv = reads_kv || (source != nullptr && find_kv(source).is_kv);
    }
    if (!reads_kv && !target.is_kv) {
        return false;
    }
    switch (op->op) {
    case GGML_OP_FLASH_ATTN_EXT: return supports_flash_attention(op);
    case GGML_OP_ROPE:
        if (target.is_kv) {
            return true;
        }
        break;
    case GGML_OP_MUL_MAT: refuse(kNeedsFlashAttention);
    default: break;
    }
    refuse(std::string("this model reads its KV cache with the operation ") + ggml_op_name(op->op) +
           ", which TurboQuant does not have: run it without the TurboQuant device (--device none)");
}

} // namespace turboquant::plugin
