#include "llm/profile_cache.h"

#include "llm/error.h"
#include "llm/user_cache.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFolder = "profiles";
constexpr const char* kExtension = ".tqp";

} // namespace

std::string model_fingerprint(const std::string& model_path) {
    std::error_code unreadable; // sample_identity says why
    const uint64_t size = fs::file_size(model_path, unreadable);
    return sample_identity(model_path, 16, size);
}

fs::path cached_profile_path(const std::string& model_path) {
    return user_cache_folder(kFolder) / (model_fingerprint(model_path) + kExtension);
}

TemporaryProfile::TemporaryProfile() {
    std::error_code failed;
    const fs::path folder = fs::temp_directory_path(failed);
    std::string name = (folder / "tq-XXXXXX.tqp").string();
    const int file = failed ? -1 : ::mkstemps(name.data(), static_cast<int>(std::strlen(kExtension)));
    if (file < 0) {
        throw Error(fmt::format("{}: no temporary file can be made: {}; set TMPDIR to a folder that can be written",
                                name, failed ? failed.message() : std::strerror(errno)));
    }
    ::close(file);
    path_ = name;
}

TemporaryProfile::~TemporaryProfile() {
    std::error_code ignored;
    fs::remove(path_, ignored);
}

Profile load_profile(const std::string& path, const CachePlan& plan) {
    Profile profile;
    if (const Status status = read_profile(path, profile); !status.ok()) {
        throw Error(status.message());
    }
    const auto fits = [&](const CacheLayer& layer) {
        const LayerProfile* found = profile.find(layer.index);
        // Where libllama's rows are not understood (f16_scale), the plug-in alone can tell.
        return found != nullptr &&
               (plan.f16_scale != 1 || (found->head_size == layer.key_size && found->kv_heads == layer.kv_heads));
    };
    const auto wrong = std::find_if_not(plan.layers.begin(), plan.layers.end(), fits);
    if (wrong != plan.layers.end() || profile.layers.size() != plan.layers.size()) {
        const std::string where =
            wrong == plan.layers.end()
                ? fmt::format("it has {} layers, the model {}", profile.layers.size(), plan.layers.size())
                : fmt::format("its layer {} is not the model's", wrong->index);
        throw Error(fmt::format("profile '{}': of another model ({}): {}; make one of this model with `tq tune`", path,
                                profile.model, where));
    }
    return profile;
}

void use_profile(const std::string& path, const Profile& profile, KvChoice& kv) {
    kv.profile = path;
    if (!kv.automatic) {
        return;
    }
    if (!profile.has_bits()) {
        throw Error(fmt::format("--kv auto: profile '{}' has no bits; choose them with `tq tune --budget BITS`", path));
    }
    kv.mean_bits = profile.bits;
    for (const LayerProfile& layer : profile.layers) {
        kv.layer_bits[layer.layer] = {layer.key_bits != 0 ? layer.key_bits : kv.key_bits,
                                      layer.value_bits != 0 ? layer.value_bits : kv.value_bits};
    }
}

bool find_profile(const std::string& model_path, const ProfileFlags& flags, const CachePlan& plan, KvChoice& kv,
                  const Notice& notice) {
    kv.profile.clear();
    if (!kv.turboquant() || kv.pass_through() || plan.layers.empty()) {
        return true;
    }
    if (flags.off || kv.calibrate) {
        if (kv.automatic) {
            throw UsageError("--kv auto: takes its bits from a profile; leave out --no-profile or choose a preset");
        }
        return true;
    }
    std::string path = flags.path;
    if (path.empty()) {
        try {
            path = cached_profile_path(model_path).string();
        } catch (const Error&) { // no folder: none in it
            path.clear();
        }
        std::error_code ignored;
        if (path.empty() || !fs::exists(path, ignored)) {
            if (kv.automatic) {
                throw Error(fmt::format(
                    "--kv auto: {} has no profile yet; choose its bits with `tq tune --budget BITS`", model_path));
            }
            return false;
        }
    }
    try {
        use_profile(path, load_profile(path, plan), kv);
    } catch (const Error& error) {
        if (!flags.path.empty() || kv.automatic) {
            throw;
        }
        kv.profile.clear();
        if (notice) {
            notice(fmt::format("{} (done now)", error.what()));
        }
        return false;
    }
    return true;
}

} // namespace turboquant::llm
