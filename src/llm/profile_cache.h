// Which profile (turboquant/profile.h) a model's cache uses: the one that was named, else the one in the user's cache
// folder.
#pragma once

#include "llm/kv_choice.h"
#include "llm/plan.h"

#include <turboquant/profile.h>

#include <filesystem>
#include <functional>
#include <string>

namespace turboquant::llm {

struct ProfileFlags {
    std::string path; // --profile, else TURBOQUANT_PROFILE; empty: look in the cache folder
    bool off = false; // --no-profile: none, the cache calibrates itself
};

// One line for the user.
using Notice = std::function<void(const std::string&)>;

// Tells models apart by their files' contents: length and samples of 64 KiB. Copying a file keeps it, so a profile stays
// good. A model in several files goes by the first, which holds the metadata. Error when the file cannot be read.
std::string model_fingerprint(const std::string& model_path);

// <cache folder>/profiles/<fingerprint>.tqp; the folder is made. Error when it cannot be.
std::filesystem::path cached_profile_path(const std::string& model_path);

// A file of this process that is gone when the object is: where a profile lies that the cache folder has no place for.
class TemporaryProfile {
public:
    // Error when no temporary file can be made.
    TemporaryProfile();
    ~TemporaryProfile();
    TemporaryProfile(const TemporaryProfile&) = delete;
    TemporaryProfile& operator=(const TemporaryProfile&) = delete;
    const std::string& path() const { return path_; }

private:
    std::string path_;
};

// Reads a profile and checks that it is of a model with these layers. Error in one line that names the path.
Profile load_profile(const std::string& path, const CachePlan& plan);

// Sets what `kv` takes from a profile: its path and, for `auto`, the layers' bits. Error: `auto`, and it has no bits.
void use_profile(const std::string& path, const Profile& profile, KvChoice& kv);

// Finds the profile of a model and uses it. False: there is none yet, and one would help. True: found, or none is wanted
// (host types, pass-through, --no-profile). Needs no loaded model. A damaged file in the cache folder counts as none, with
// a notice (may be empty); one that was named is an error, and so is `auto` without any.
bool find_profile(const std::string& model_path, const ProfileFlags& flags, const CachePlan& plan, KvChoice& kv,
                  const Notice& notice);

} // namespace turboquant::llm
