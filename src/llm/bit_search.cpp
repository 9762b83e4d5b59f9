#include "llm/bit_search.h"

#include "llm/bit_allocation.h"
#include "llm/error.h"
#include "llm/evaluation.h"
#include "llm/profile_cache.h"
#include "llm/tuning.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

// The widest errors stand out best from the floor.
constexpr int kProbeBits = 2;
// Where weights are quantised, activations are rounded on their way, and the slightest change moves some of them: whatever
// touches a layer costs as much as a width that does no harm of its own, here 8 bits. That floor belongs to no side. It
// depends on how many layers follow, smoothly, so a few layers tell it.
constexpr int kHarmlessBits = 8;
constexpr size_t kFloorLayers = 5;
constexpr int kExactBits = 16;
constexpr int kCautiousBits = 3;
constexpr int64_t kProbeContext = 384; // read twice for every layer, so it must be short
constexpr int64_t kProbeChunks = 1;
constexpr int64_t kFinalContext = 512;
constexpr int64_t kFinalChunks = 3;
constexpr int64_t kFirstScored = 64; // earlier positions attend to little
constexpr int64_t kBaseBytes = int64_t{128} << 20;

// Chunks of a text, and what exact rows say at their positions.
class Yardstick {
public:
    Yardstick(const Model& model, const ModelPlan& plan, const std::vector<Token>& tokens, int64_t context,
              int64_t most_chunks, const BitSearchOptions& options)
        : model_(model), options_(options), vocabulary_(llama_vocab_n_tokens(model.vocab())) {
        const auto there = static_cast<int64_t>(tokens.size());
        chunks_.context = std::min({context, there, static_cast<int64_t>(model.trained_context())});
        const int64_t n = std::clamp<int64_t>(there / chunks_.context, 1, most_chunks);
        const int64_t first = std::min(kFirstScored, chunks_.context / 2);
        const int64_t positions = chunks_.context - 1 - first;
        const int64_t row_bytes = vocabulary_ * static_cast<int64_t>(sizeof(uint16_t));
        chunks_.stride = 1 + n * positions * row_bytes / kBaseBytes; // large vocabularies: fewer positions
        for (int64_t p = first; p + 1 < chunks_.context; p += chunks_.stride) {
            chunks_.positions.push_back(p);
        }
        for (const int64_t start : chunk_starts(there, chunks_.context, n)) {
            chunks_.tokens.emplace_back(tokens.begin() + start, tokens.begin() + start + chunks_.context);
            if (llama_vocab_get_add_bos(model.vocab())) {
                chunks_.tokens.back().front() = llama_vocab_bos(model.vocab());
            }
        }
        cache_ = full_cache_plan(plan.plan(chunks_.context));
    }

    int64_t tokens() const { return chunks_.context * static_cast<int64_t>(chunks_.tokens.size()); }
    int64_t positions() const { return static_cast<int64_t>(chunks_.positions.size() * chunks_.tokens.size()); }

    void read_base(const Progress& progress) {
        const KvChoice exact = parse_kv("16/16");
        const size_t scored = chunks_.positions.size();
        base_.resize(chunks_.tokens.size() * scored);
        log_probs_.resize(base_.size() * static_cast<size_t>(vocabulary_));
        read(exact, progress, [&](size_t chunk, size_t index, Token next, const float* logits) {
            const size_t row = chunk * scored + index;
            base_[row] =
                make_base_row(logits, vocabulary_, next, log_probs_.data() + row * static_cast<size_t>(vocabulary_));
        });
    }

    struct Mean {
        double kld = 0;
        double error = 0; // standard
    };
    // Divergence with the bits of this profile.
    Mean kld(Profile profile, const Progress& progress) const {
        profile.bits = 1; // says only that there are some
        const TemporaryProfile file;
        if (const Status status = write_profile(file.path(), profile); !status.ok()) {
            throw Error(status.message());
        }
        KvChoice kv = parse_kv("auto");
        kv.window = 0;
        use_profile(file.path(), profile, kv);
        const size_t scored = chunks_.positions.size();
        std::vector<double> klds(base_.size());
        read(kv, progress, [&](size_t chunk, size_t index, Token next, const float* logits) {
            klds[chunk * scored + index] = compare(base_[chunk * scored + index], logits, vocabulary_, next).kld;
        });
        return {std::accumulate(klds.begin(), klds.end(), 0.0) / static_cast<double>(klds.size()),
                standard_error(klds)};
    }

private:
    void read(const KvChoice& kv, const Progress& progress, const OnRow& row) const {
        ReadOptions options;
        options.kv = kv;
        options.plan = cache_;
        options.threads = options_.threads;
        options.interrupt = options_.interrupt;
        options.progress = progress;
        read_chunks(model_, chunks_, options, row, {});
    }

    const Model& model_;
    const BitSearchOptions& options_;
    int64_t vocabulary_;
    Chunks chunks_;
    CachePlan cache_;
    std::vector<BaseRow> base_;
    std::vector<uint16_t> log_probs_;
};

// Progress over several readings.
class Steps {
public:
    Steps(const Progress& progress, int64_t total) : progress_(progress), total_(static_cast<double>(total)) {}
    Progress next(int64_t tokens) {
        const double before = done_;
        done_ += static_cast<double>(tokens);
        return [this, before, tokens](double fraction) {
            if (progress_) {
                progress_((before + fraction * static_cast<double>(tokens)) / total_);
            }
        };
    }

private:
    const Progress& progress_;
    double total_;
    double done_ = 0;
};

// Sides in order: keys and (where it has any) values of each layer.
struct Side {
    size_t layer = 0; // of the profile
    bool value = false;
};

std::vector<LayerBits> layer_bits(const std::vector<Side>& sides, const std::vector<int>& widths, size_t n_layers) {
    std::vector<LayerBits> bits(n_layers);
    for (size_t i = 0; i < sides.size(); ++i) {
        (sides[i].value ? bits[sides[i].layer].value : bits[sides[i].layer].key) = widths[i];
    }
    return bits;
}

void set_bits(Profile& profile, const std::vector<LayerBits>& bits) {
    for (size_t i = 0; i < bits.size(); ++i) {
        profile.layers[i].key_bits = bits[i].key;
        profile.layers[i].value_bits = bits[i].value;
    }
}

std::vector<int> uniform_widths(const std::vector<Side>& sides, int key, int value) {
    std::vector<int> widths;
    widths.reserve(sides.size());
    for (const Side& side : sides) {
        widths.push_back(side.value ? value : key);
    }
    return widths;
}

double predicted(const std::vector<SideCost>& costs, const std::vector<int>& widths) {
    double sum = 0;
    for (size_t i = 0; i < costs.size(); ++i) {
        sum += cost_at(costs[i], widths[i]);
    }
    return sum;
}

// At most n of 0..size-1, evenly spaced, both ends among them.
std::vector<size_t> spread(size_t size, size_t n) {
    std::vector<size_t> chosen;
    n = std::min(n, size);
    chosen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        chosen.push_back(n == 1 ? 0 : i * (size - 1) / (n - 1));
    }
    return chosen;
}

// Linear between neighbours. at: ascending.
Yardstick::Mean between(const std::vector<size_t>& at, const std::vector<Yardstick::Mean>& values, size_t wanted) {
    const auto next = static_cast<size_t>(std::lower_bound(at.begin(), at.end(), wanted) - at.begin());
    if (at[next] == wanted) {
        return values[next];
    }
    const double share = static_cast<double>(wanted - at[next - 1]) / static_cast<double>(at[next] - at[next - 1]);
    return {std::lerp(values[next - 1].kld, values[next].kld, share),
            std::lerp(values[next - 1].error, values[next].error, share)};
}

struct Plan {
    std::string name;
    std::vector<int> widths;
};

// The best uniform pair, the best with as many bits for keys as for values, and mixes.
std::vector<Plan> make_plans(const std::vector<Side>& sides, const std::vector<SideCost>& costs, double budget) {
    constexpr double kRounding = 1e-9;
    Plan pair;
    Plan equal;
    double most = 0;
    for (const int key : kWidths) {
        for (const int value : kWidths) {
            const Plan plan{fmt::format("{}/{}", key, value), uniform_widths(sides, key, value)};
            const double bits = mean_bits(costs, plan.widths);
            if (bits > budget + kRounding) {
                continue;
            }
            equal = key == value ? plan : equal;
            if (bits > most + kRounding ||
                (bits > most - kRounding && predicted(costs, plan.widths) < predicted(costs, pair.widths))) {
                pair = plan;
                most = bits;
            }
        }
    }
    std::vector<Plan> plans = {equal, pair, {"mix", allocate_bits(costs, budget, kWidths.front())}};
    if (budget >= kCautiousBits) { // 2 bits in many places may come to more than their sum
        plans.push_back({"mix, 3 or more", allocate_bits(costs, budget, kCautiousBits)});
    }
    std::vector<Plan> distinct;
    for (Plan& plan : plans) {
        if (std::none_of(distinct.begin(), distinct.end(), [&](const Plan& p) { return p.widths == plan.widths; })) {
            distinct.push_back(std::move(plan));
        }
    }
    return distinct;
}

} // namespace

BitSearch search_bits(const Model& model, const ModelPlan& plan, std::string_view text, const BitSearchOptions& options,
                      Profile& profile) {
    if (!(options.budget >= kWidths.front() && options.budget <= kWidths.back())) {
        throw UsageError(fmt::format("--budget {}: use a number of bits from {} to {}", options.budget, kWidths.front(),
                                     kWidths.back()));
    }
    const std::vector<Token> tokens = model.tokenize(text, false, false);
    if (static_cast<int64_t>(tokens.size()) < kLeastTuningTokens) {
        throw Error(fmt::format("the text has {} tokens, the search needs {} or more; use a longer one", tokens.size(),
                                kLeastTuningTokens));
    }
    const CachePlan shapes = plan.plan(1);
    std::vector<Side> sides;
    std::vector<SideCost> costs;
    for (size_t i = 0; i < profile.layers.size(); ++i) {
        const CacheLayer& layer = *std::find_if(shapes.layers.begin(), shapes.layers.end(), [&](const CacheLayer& l) {
            return l.index == profile.layers[i].layer; // is there: load_profile has compared them
        });
        sides.push_back({i, false});
        costs.push_back({int64_t{layer.key_size} * layer.kv_heads, 0, kProbeBits, 0});
        if (layer.value_size > 0) {
            sides.push_back({i, true});
            costs.push_back({int64_t{layer.value_size} * layer.kv_heads, 0, kProbeBits, 0});
        }
    }

    auto probe = std::make_unique<Yardstick>(model, plan, tokens, kProbeContext, kProbeChunks, options);
    Yardstick final(model, plan, tokens, kFinalContext, kFinalChunks, options);
    constexpr int64_t kMostPlans = 4;
    const std::vector<size_t> floor_layers = spread(profile.layers.size(), kFloorLayers);
    Steps steps(options.progress, probe->tokens() * static_cast<int64_t>(1 + floor_layers.size() + sides.size()) +
                                      final.tokens() * (1 + kMostPlans));
    probe->read_base(steps.next(probe->tokens()));
    Profile trial = profile;
    const auto alone = [&](size_t side, int bits) {
        std::vector<int> widths(sides.size(), kExactBits);
        widths[side] = bits;
        set_bits(trial, layer_bits(sides, widths, profile.layers.size()));
        return probe->kld(trial, steps.next(probe->tokens()));
    };
    std::vector<Yardstick::Mean> floors;
    for (const size_t layer : floor_layers) {
        const auto keys = std::find_if(sides.begin(), sides.end(), [&](const Side& s) { return s.layer == layer; });
        floors.push_back(alone(static_cast<size_t>(keys - sides.begin()), kHarmlessBits));
    }
    BitSearch result;
    for (size_t i = 0; i < sides.size(); ++i) {
        const Yardstick::Mean measured = alone(i, kProbeBits);
        const Yardstick::Mean floor = between(floor_layers, floors, sides[i].layer);
        costs[i].error = std::hypot(measured.error, floor.error);
        costs[i].kld = std::max(measured.kld - floor.kld, costs[i].error / 2); // a cost below nothing is noise
        result.sides.push_back({profile.layers[sides[i].layer].layer, sides[i].value, kProbeBits, measured.kld,
                                measured.error, floor.kld});
    }
    probe.reset(); // its base takes memory

    for (const bool value : {false, true}) {
        std::vector<SideCost*> kind;
        for (size_t i = 0; i < sides.size(); ++i) {
            if (sides[i].value == value) {
                kind.push_back(&costs[i]);
            }
        }
        shrink_costs(kind);
    }
    result.positions = final.positions();
    final.read_base(steps.next(final.tokens()));
    for (const Plan& p : make_plans(sides, costs, options.budget)) {
        const std::vector<LayerBits> bits = layer_bits(sides, p.widths, profile.layers.size());
        set_bits(trial, bits);
        result.measured.push_back({p.name, mean_bits(costs, p.widths), final.kld(trial, steps.next(final.tokens())).kld,
                                   predicted(costs, p.widths), bits});
    }
    std::stable_sort(result.measured.begin(), result.measured.end(),
                     [](const BitCandidate& a, const BitCandidate& b) { return a.kld < b.kld; });
    set_bits(profile, result.measured.front().layers);
    profile.bits = result.measured.front().bits;
    if (options.progress) {
        options.progress(1);
    }
    return result;
}

} // namespace turboquant::llm
