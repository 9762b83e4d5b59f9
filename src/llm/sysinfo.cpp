#include "llm/sysinfo.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <sstream>

#include <sched.h>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

std::optional<int64_t> read_number(const std::string& path) {
    std::ifstream file(path);
    int64_t value = 0;
    if (file >> value) {
        return value;
    }
    return std::nullopt; // absent, or the word "max"
}

// "key value" lines, as in memory.stat; /proc/meminfo has "key: value kB".
std::optional<int64_t> read_field(const std::string& path, const std::string& key) {
    std::ifstream file(path);
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string name;
        int64_t value = 0;
        if (words >> name >> value && name == key) {
            return value;
        }
    }
    return std::nullopt;
}

// Room left below one group's limit. Pages of files can be dropped, so they do not count as used.
std::optional<int64_t> group_room(const std::string& dir, bool v2) {
    const auto limit = read_number(dir + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
    const auto used = read_number(dir + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
    if (!limit || !used || *limit >= std::numeric_limits<int64_t>::max() / 2) {
        return std::nullopt;
    }
    int64_t droppable = 0;
    for (const char* key : {"inactive_file", "active_file"}) {
        droppable += read_field(dir + "/memory.stat", std::string(v2 ? "" : "total_") + key).value_or(0);
    }
    return std::max<int64_t>(0, *limit - std::max<int64_t>(0, *used - droppable));
}

} // namespace

FreeMemory free_memory(const std::string& root) {
    FreeMemory result{-1, "free memory"};
    if (const auto kib = read_field(root + "/proc/meminfo", "MemAvailable:")) {
        result.bytes = *kib * 1024;
    }
    const auto lower = [&](std::optional<int64_t> room) {
        if (room && (result.bytes < 0 || *room < result.bytes)) {
            result = {*room, "the memory limit of this container"};
        }
    };
    // Lines are "id:controllers:path"; v2 has id 0 and no controllers. A limit may stand at any ancestor.
    std::ifstream groups(root + "/proc/self/cgroup");
    std::string line;
    while (std::getline(groups, line)) {
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) {
            continue;
        }
        const std::string controllers = fmt::format(",{},", line.substr(first + 1, second - first - 1));
        const bool v2 = controllers == ",,";
        if (!v2 && controllers.find(",memory,") == std::string::npos) {
            continue;
        }
        const std::string base = root + "/sys/fs/cgroup" + (v2 ? "" : "/memory");
        std::string path = line.substr(second + 1);
        while (!path.empty() && path != "/") {
            lower(group_room(base + path, v2));
            path = path.substr(0, path.find_last_of('/'));
        }
        lower(group_room(base, v2));
    }
    return result;
}

int default_threads() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        return 1;
    }
    std::set<std::string> cores;
    int threads = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) {
            continue;
        }
        ++threads;
        std::ifstream file(fmt::format("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cpu));
        std::string siblings;
        cores.insert(std::getline(file, siblings) ? siblings : fmt::format("cpu{}", cpu));
    }
    int result = std::max(1, cores.empty() ? threads : static_cast<int>(cores.size()));
    // A container's quota ("quota period" in microseconds, or "max period").
    std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
    double quota = 0;
    double period = 0;
    if (quota_file >> quota >> period && quota > 0 && period > 0) {
        result = std::min(result, std::max(1, static_cast<int>(std::ceil(quota / period))));
    }
    return result;
}

} // namespace turboquant::llm
