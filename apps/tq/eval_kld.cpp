// tq eval kld, tq eval ppl: chunks of a text through each cache.
#include "eta.h"
#include "eval.h"
#include "options.h"
#include "terminal.h"

#include "llm/base_cache.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/session.h"
#include "llm/sysinfo.h"

#include <cmath>
#include <limits>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

struct ChunkFlags {
    EvalFlags eval;
    int64_t context = 2048;
    int64_t chunks = 4;
    int64_t stride = 1;
};

// fp16 rows through the plug-in: what is left of the difference when nothing is compressed.
constexpr const char* kFloor = "16/16:w0:s0";

void add_chunk_flags(CLI::App& command, ChunkFlags& flags) {
    add_eval_flags(command, flags.eval);
    command.add_option("-c,--ctx", flags.context, "tokens of a chunk; its second half is scored (default 2048)")
        ->type_name("N");
    command.add_option("--chunks", flags.chunks, "chunks, evenly spaced over the text (default 4)")->type_name("N");
    command.add_option("--stride", flags.stride, "score every N-th position only (large vocabularies; default 1)")
        ->type_name("N");
}

struct Row {
    llm::Setting setting;
    llm::Footprint size;
    llm::Figures figures;
};

class ChunkRun {
public:
    explicit ChunkRun(const ChunkFlags& flags) : flags_(flags) {
        check_flags(flags.eval);
        check_range("--ctx", flags.context, 1, 1 << 24);
        check_range("--chunks", flags.chunks, 1, 1 << 20);
        check_range("--stride", flags.stride, 1, 1 << 24);
        settings_ = llm::parse_settings(flags.eval.kv, flags.eval.window, flags.eval.sinks);
        llm::install_log(flags.eval.verbose);
        catch_interrupts();
        model_ = std::make_unique<EvalModel>(flags.eval);
        for (const llm::Setting& setting : settings_) { // before anything that takes time
            model_->cache_plan(flags.context, setting.kv);
        }
        const EvalText text = read_text(flags.eval);
        text_name_ = text.name;
        const llm::Model& host = model_->load(false);
        chunks_ = llm::make_chunks(host, text.text, flags.context, flags.chunks, flags.stride);
        vocabulary_ = llama_vocab_n_tokens(host.vocab());
        model_->use_profile(settings_);
    }

    int kld() {
        const llm::KvChoice f16 = llm::parse_kv("f16");
        settings_.insert(settings_.begin(), llm::parse_settings(kFloor, {}, {}).front());
        settings_.front().label = "16/16";
        const std::string key = llm::base_key(model_->load(false), chunks_);
        const std::filesystem::path path = llm::base_path(key);
        const auto rows = static_cast<int64_t>(chunks_.tokens.size() * chunks_.positions.size());
        bool damaged = false;
        std::unique_ptr<llm::BaseFile> base = llm::BaseFile::open(path, key, vocabulary_, rows, damaged);
        Eta eta(static_cast<int>(settings_.size()) + (base ? 0 : 1));
        if (damaged) {
            print_note(fmt::format("{}: damaged, made again", path.string()));
        }
        if (!base) {
            eta.begin("base (f16)", 1, static_cast<double>(settings_.size()));
            make_base(path, key, rows, read_options(f16, eta));
            base = llm::BaseFile::open(path, key, vocabulary_, rows, damaged);
            if (!base) {
                throw llm::Error(fmt::format("{}: cannot be read back; check the disk", path.string()));
            }
            eta.done(fmt::format("{} on disk, reused by later runs",
                                 llm::format_bytes(static_cast<int64_t>(std::filesystem::file_size(path)))));
        }
        measure(eta, [&](size_t chunk, size_t index, llm::Token next, const float* logits) {
            const auto row = static_cast<int64_t>(chunk * chunks_.positions.size() + index);
            return llm::compare(base->row(row), logits, vocabulary_, next);
        });
        print(true);
        return 0;
    }

    int ppl() {
        Eta eta(static_cast<int>(settings_.size()));
        measure(eta, [&](size_t, size_t, llm::Token next, const float* logits) {
            llm::Score score;
            score.nll = llm::negative_log_likelihood(logits, vocabulary_, next);
            return score;
        });
        print(false);
        return 0;
    }

private:
    llm::ReadOptions read_options(const llm::KvChoice& kv, Eta& eta) const {
        llm::ReadOptions options;
        options.kv = kv;
        options.plan = model_->cache_plan(flags_.context, kv);
        options.threads = flags_.eval.threads;
        options.interrupt = &interrupt_flag();
        options.progress = eta.progress();
        return options;
    }

    void make_base(const std::filesystem::path& path, const std::string& key, int64_t rows,
                   const llm::ReadOptions& options) {
        llm::BaseWriter writer(path, key, vocabulary_, rows);
        const size_t scored = chunks_.positions.size();
        const auto row_values = static_cast<size_t>(vocabulary_);
        std::vector<llm::BaseRow> heads(scored);
        const size_t slots = std::min(scored, static_cast<size_t>(llm::kBatch));
        std::vector<uint16_t> log_probs(slots * row_values); // of one batch: its indices follow each other
        llm::read_chunks(
            model_->load(false), chunks_, options,
            [&](size_t, size_t index, llm::Token next, const float* logits) {
                heads[index] =
                    llm::make_base_row(logits, vocabulary_, next, log_probs.data() + index % slots * row_values);
            },
            [&](size_t, size_t first, size_t n) {
                for (size_t i = first; i < first + n; ++i) {
                    writer.add(heads[i]);
                }
            });
        writer.finish();
    }

    template <class ScoreOf>
    void measure(Eta& eta, const ScoreOf& score_of) {
        for (size_t i = 0; i < settings_.size(); ++i) {
            const llm::Setting& setting = settings_[i];
            std::vector<std::vector<llm::Score>> scores(chunks_.tokens.size(),
                                                        std::vector<llm::Score>(chunks_.positions.size()));
            eta.begin(setting.label, 1, static_cast<double>(settings_.size() - i - 1));
            const llm::ReadOptions options = read_options(setting.kv, eta);
            llm::read_chunks(model_->load(setting.kv.turboquant()), chunks_, options,
                             [&](size_t chunk, size_t index, llm::Token next, const float* logits) {
                                 scores[chunk][index] = score_of(chunk, index, next, logits);
                             },
                             {});
            rows_.push_back({setting, llm::footprint(options.plan, setting.kv), llm::summarise(scores)});
            const llm::Figures& figures = rows_.back().figures;
            eta.done(figures.ppl_base > 1 ? fmt::format("KLD {:.6f}, ppl {:.3f}", figures.kld_mean, figures.ppl)
                                          : fmt::format("ppl {:.3f}", figures.ppl));
        }
    }

    void print(bool kld) const {
        std::vector<nlohmann::ordered_json> rows;
        for (const Row& row : rows_) {
            nlohmann::ordered_json json = setting_json(*model_, row.setting, row.size);
            const llm::Figures& figures = row.figures;
            json["text"] = text_name_;
            json["positions"] = figures.positions;
            if (kld) {
                json["kld_mean"] = figures.kld_mean;
                json["kld_se"] = figures.kld_se;
                json["kld_median"] = figures.kld_median;
                json["kld_p99"] = figures.kld_p99;
                json["kld_max"] = figures.kld_max;
                json["top1"] = figures.top1;
            }
            json["ppl"] = figures.ppl;
            json["ppl_se"] = figures.ppl_se;
            if (kld) {
                json["ppl_base"] = figures.ppl_base;
            }
            json["threads"] = threads();
            json["ctx"] = flags_.context;
            json["chunks"] = flags_.chunks;
            json["stride"] = flags_.stride;
            if (kld) {
                json["kld_chunks"] = figures.kld_chunks;
            }
            rows.push_back(json);
        }
        if (flags_.eval.output == "json") {
            print_json(rows);
        } else if (flags_.eval.output == "csv") {
            print_csv(rows);
        } else {
            print_table(kld);
        }
    }

    int threads() const { return flags_.eval.threads > 0 ? flags_.eval.threads : llm::default_threads(); }

    void print_table(bool kld) const {
        const llm::Figures& first = rows_.front().figures;
        fmt::print("{}, {}: {} chunks of {} tokens, {} positions scored, {} threads\n\n", model_->label(), text_name_,
                   flags_.chunks, flags_.context, llm::format_count(first.positions), threads());
        const auto plus_minus = [](double value) { return std::isnan(value) ? "" : fmt::format(" ± {:.2g}", value); };
        if (kld) {
            fmt::print(
                "| cache | bits | bytes/token | exact | KLD ± se | median | p99 | max | top-1 % | ppl | ppl of f16 |\n"
                "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
        } else {
            fmt::print("| cache | bits | bytes/token | exact | ppl ± se |\n|---|--:|--:|--:|--:|\n");
        }
        for (size_t i = 0; i < rows_.size(); ++i) {
            const Row& row = rows_[i];
            const llm::Figures& figures = row.figures;
            fmt::print("| {}{} | {:.2f} | {:.0f} | {} |", row.setting.label, kld && i == 0 ? " (floor)" : "",
                       row.size.bits_per_value, row.size.bytes_per_token,
                       row.size.exact_bytes > 0 ? llm::format_bytes(row.size.exact_bytes) : "-");
            if (kld) {
                fmt::print(" {:.3g}{} | {:.3g} | {:.3g} | {:.3g} | {:.2f} | {:.3f} | {:.3f} |\n", figures.kld_mean,
                           plus_minus(figures.kld_se), figures.kld_median, figures.kld_p99, figures.kld_max,
                           100 * figures.top1, figures.ppl, figures.ppl_base);
            } else {
                fmt::print(" {:.3f}{} |\n", figures.ppl, plus_minus(figures.ppl_se));
            }
        }
        fmt::print(
            "\nbits: codes and scales of a value. bytes/token: all layers, as allocated. exact: rows kept in fp16 "
            "besides (window and sinks), whatever the length.\n");
        if (kld) {
            fmt::print("floor: fp16 rows through the plug-in; KLDs that are not well above it measure nothing{}.\n",
                       flags_.eval.f32_weights ? "" : " (--f32-weights lowers it)");
        }
    }

    ChunkFlags flags_;
    std::vector<llm::Setting> settings_;
    std::unique_ptr<EvalModel> model_;
    std::string text_name_;
    llm::Chunks chunks_;
    int64_t vocabulary_ = 0;
    std::vector<Row> rows_;
};

} // namespace

Command add_eval_kld(CLI::App& eval) {
    auto flags = std::make_shared<ChunkFlags>();
    CLI::App* command =
        eval.add_subcommand("kld", "how far each cache moves the model's predictions from an f16 cache");
    add_chunk_flags(*command, *flags);
    return [flags] { return ChunkRun(*flags).kld(); };
}

Command add_eval_ppl(CLI::App& eval) {
    auto flags = std::make_shared<ChunkFlags>();
    flags->eval.kv = "f16," + flags->eval.kv;
    CLI::App* command = eval.add_subcommand("ppl", "perplexity of a text with each cache");
    add_chunk_flags(*command, *flags);
    return [flags] { return ChunkRun(*flags).ppl(); };
}

} // namespace turboquant::app
