// Making profiles: a text is read through the plug-in, which adds up keys and queries of every layer.
#pragma once

#include "llm/model.h"
#include "llm/plan.h"
#include "llm/profile_cache.h"

#include <turboquant/profile.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace turboquant::llm {

constexpr int64_t kLeastTuningTokens = 256;
constexpr int64_t kTuningTokens = 2048;
constexpr const char* kBuiltInText = "built-in text";

// Prose and source code in several languages, by this project; about 3,000 tokens.
std::string_view calibration_text();

struct TuneOptions {
    std::string text_name;          // for the profile's note: "built-in text", a path
    int64_t tokens = kTuningTokens; // at most so many of the text are read, spread over it
    bool hurry = false;             // a user waits: stop after some seconds on slow machines
    int threads = 0;                // 0: default_threads()
    const std::atomic<bool>* interrupt = nullptr;
    Progress progress;
};

struct Tuned {
    Profile profile;
    int64_t tokens = 0; // that were read
    double seconds = 0;
};

// Reads the text and returns the profile. Not while another tuning runs in this process. The model must have been loaded
// with turboquant. Error: the text is too short, the plug-in refuses, or "stopped by Ctrl-C".
Tuned tune(const Model& model, const ModelPlan& plan, std::string_view text, const TuneOptions& options);

// The profile that a session of `model` should use: found (find_profile) or, where there is none, made from the built-in
// text and kept in the cache folder, with a notice. Sets kv.profile. Where it cannot be kept the notice says why, and it
// is a temporary file that lives as long as what is returned (else null). The options say how; not which text.
std::unique_ptr<TemporaryProfile> prepare_profile(const Model& model, const ModelPlan& plan, const ProfileFlags& flags,
                                                  const TuneOptions& options, KvChoice& kv, const Notice& notice);

// Writes a profile to the cache folder; the path.
std::string keep_profile(const Model& model, const Profile& profile);

} // namespace turboquant::llm
