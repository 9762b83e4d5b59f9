// A host process of its own, run by tests that expect a refusal or measure memory.
//
//   plugin_child context MODEL [no-flash] [type=q8_0] [layers=N] [no-offload] [tokens=N] [stock]
//   plugin_child memory MODEL plugin|stock TOKENS
//
// Exit status: 0 worked; 2 usage; what said no in an orderly way: 3 the plug-in's load, 4 the model's, 5 the context's,
// 6 decoding. Anything else is a crash.
#include "plugin_host.h"

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>

namespace {

using namespace tqtest;

int try_context(const std::string& path, const std::vector<std::string>& options) {
    auto has = [&](const char* option) {
        for (const std::string& o : options) {
            if (o == option) {
                return true;
            }
        }
        return false;
    };
    auto value = [&](const std::string& name, const std::string& otherwise) {
        for (const std::string& o : options) {
            if (o.rfind(name + "=", 0) == 0) {
                return o.substr(name.size() + 1);
            }
        }
        return otherwise;
    };
    // The plug-in is loaded even for a stock model: what it says then is tested, too.
    if (ggml_backend_load(environment("TQ_TEST_PLUGIN").c_str()) == nullptr) {
        return 3;
    }
    llama_backend_init();
    ggml_backend_dev_t device = ggml_backend_dev_by_name("TQ0");
    if (device == nullptr) {
        return 3;
    }
    ggml_backend_dev_t devices[2] = {has("stock") ? nullptr : device, nullptr};
    llama_model_params mp = llama_model_default_params();
    mp.devices = devices;
    mp.n_gpu_layers = std::stoi(value("layers", "999"));
    const Model model(llama_model_load_from_file(path.c_str(), mp));
    if (!model) {
        return 4;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = 256;
    cp.n_batch = 256;
    cp.n_threads = cp.n_threads_batch = 1;
    cp.flash_attn_type = has("no-flash") ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    cp.offload_kqv = !has("no-offload");
    const std::string type = value("type", "f16");
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const char* name = ggml_type_name(static_cast<ggml_type>(t));
        if (name != nullptr && type == name) {
            cp.type_k = cp.type_v = static_cast<ggml_type>(t);
        }
    }
    const Context context(llama_init_from_model(model.get(), cp));
    if (!context) {
        return 5;
    }
    const int n = std::stoi(value("tokens", "40"));
    const Logits logits = decode(context.get(), random_tokens(n, vocabulary_of(model.get()), 1), {.chunk = 8});
    if (logits.empty()) {
        return 6;
    }
    double sum = 0;
    for (const float x : logits) {
        sum += x;
    }
    std::printf("decoded %d tokens, sum of logits %.6g\n", n, sum);
    return 0;
}

long resident_kib() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmRSS:", 0) == 0) {
            return std::stol(line.substr(6));
        }
    }
    return -1;
}

// Four sequences fill the context: as many rows as one long sequence, and a quarter of the time.
constexpr int kSequences = 4;

int measure_memory(const std::string& path, const std::string& host, int tokens) {
    const Model model = load_model(path, host == "plugin" ? Host::plugin : Host::stock);
    if (!model) {
        return 4;
    }
    const Cache cache{"4/4", 32, 4};
    const long before = resident_kib();
    const Context context = make_context(
        model.get(), {.n_ctx = static_cast<uint32_t>(tokens), .n_ubatch = 256, .n_seq_max = kSequences}, cache);
    if (!context) {
        return 5;
    }
    const Tokens all = random_tokens(tokens, vocabulary_of(model.get()), 3);
    for (int begin = 0; begin < tokens; begin += 256) {
        llama_batch batch = llama_batch_init(256, 0, 1);
        for (int i = 0; i < 256 && begin + i < tokens; ++i) {
            batch.token[i] = all[static_cast<size_t>(begin + i)];
            batch.pos[i] = (begin + i) % (tokens / kSequences);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = (begin + i) / (tokens / kSequences);
            batch.logits[i] = 0;
            batch.n_tokens = i + 1;
        }
        batch.logits[batch.n_tokens - 1] = 1;
        const int status = llama_decode(context.get(), batch);
        llama_batch_free(batch);
        if (status != 0) {
            return 6;
        }
    }
    std::printf("rss_before_kib %ld\nrss_after_kib %ld\n", before, resident_kib());
    return 0;
}

} // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.size() >= 2 && arguments[0] == "context") {
        return try_context(arguments[1], {arguments.begin() + 2, arguments.end()});
    }
    if (arguments.size() == 4 && arguments[0] == "memory") {
        return measure_memory(arguments[1], arguments[2], std::stoi(arguments[3]));
    }
    std::cerr << "usage: plugin_child context MODEL [options] | memory MODEL plugin|stock TOKENS\n";
    return 2;
}
