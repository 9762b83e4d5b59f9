#include "llm/log_lines.h"

#include <cctype>
#include <cstdio>
#include <cstring>

namespace turboquant::llm {
namespace {

bool contains(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

// The number after "what" (which ends in '='), or false.
bool number_after(const std::string& text, const char* what, double& value) {
    const size_t at = text.find(what);
    return at != std::string::npos && std::sscanf(text.c_str() + at + std::strlen(what), "%lf", &value) == 1;
}

// "function: words" -> "words". Words of people may hold colons too: only a C identifier goes.
std::string without_function(const std::string& text) {
    size_t end = 0;
    while (end < text.size() && (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_')) {
        ++end;
    }
    if (end > 0 && text.compare(end, 2, ": ") == 0 && text.find('_') < end) {
        return text.substr(end + 2);
    }
    return text;
}

} // namespace

LoggedMemory read_memory_log(const std::vector<LogLine>& lines) {
    LoggedMemory memory;
    LoggedCache next;
    for (const LogLine& line : lines) {
        const std::string& text = line.text;
        double mib = 0;
        int layer = 0;
        if (contains(text, "SWA KV cache, size =")) {
            next = {};
            next.sliding = !contains(text, "non-SWA");
        } else if (contains(text, "llama_memory_recurrent")) {
            if (const size_t at = text.find("layer "); at != std::string::npos && contains(text, "dev =") &&
                                                       std::sscanf(text.c_str() + at, "layer %d", &layer) == 1) {
                memory.recurrent_layers.push_back(layer);
            } else if (number_after(text, "RS buffer size =", mib)) {
                memory.recurrent_mib += mib;
            }
        } else if (number_after(text, "KV buffer size =", mib)) {
            memory.kv_buffer_mib += mib;
        } else if (number_after(text, "compute buffer size =", mib)) {
            memory.compute_mib += mib;
        } else if (contains(text, "llama_kv_cache") && contains(text, "dev =")) {
            const size_t at = text.find("layer ");
            if (at != std::string::npos && std::sscanf(text.c_str() + at, "layer %d", &layer) == 1) {
                next.layers.push_back(layer);
            }
        } else if (contains(text, "llama_kv_cache") && contains(text, "size =") && contains(text, "cells,")) {
            char key_type[16] = {};
            char value_type[16] = {};
            long long cells = 0;
            const char* open = std::strchr(text.c_str(), '(');
            const char* key = std::strstr(text.c_str(), "K (");
            if (open != nullptr && key != nullptr && std::sscanf(open, "(%lld cells", &cells) == 1 &&
                std::sscanf(key, "K (%15[^)]): %lf MiB, V (%15[^)]): %lf MiB", key_type, &next.key_mib, value_type,
                            &next.value_mib) == 4) {
                next.cells = cells;
                next.key_type = key_type;
                next.value_type = value_type;
                memory.caches.push_back(next);
            }
            next = {};
        }
    }
    return memory;
}

std::string failure_reason(const std::vector<LogLine>& lines) {
    const LogLine* first = nullptr;
    const LogLine* plugin = nullptr;
    for (const LogLine& line : lines) {
        if (line.level == LogLevel::error && !line.text.empty()) {
            first = first == nullptr ? &line : first;
            if (plugin == nullptr && contains(line.text, "turboquant")) {
                plugin = &line;
            }
        }
    }
    const LogLine* chosen = plugin != nullptr ? plugin : first;
    return chosen == nullptr ? std::string() : without_function(chosen->text);
}

} // namespace turboquant::llm
