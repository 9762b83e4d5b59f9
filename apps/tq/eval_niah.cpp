// tq eval niah: needles in a haystack, found with each cache.
#include "eta.h"
#include "eval.h"
#include "heat_map.h"
#include "options.h"
#include "terminal.h"

#include "llm/chat_template.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/needles.h"
#include "llm/session.h"
#include "llm/sysinfo.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

struct NeedleFlags {
    EvalFlags eval;
    std::string variant = "multikey";
    std::vector<int64_t> lengths;
    int64_t depths = 11;
    int64_t haystacks = 1;
    uint64_t seed = 1;
    std::string plot;
};

constexpr int64_t kDefaultLongest = 8192;
constexpr int64_t kAnswerTokens = 16; // a number and the words around it, of each value asked for
constexpr const char* kTask =
    "Read the text below. It mentions magic numbers of cities, and you will be asked for them.";

llm::NeedleVariant parse_variant(const std::string& name) {
    if (name == "single") {
        return llm::NeedleVariant::single;
    }
    if (name == "multikey") {
        return llm::NeedleVariant::multikey;
    }
    if (name == "multivalue") {
        return llm::NeedleVariant::multivalue;
    }
    throw llm::UsageError(fmt::format("--variant {}: use single, multikey or multivalue", name));
}

class NeedleRun {
public:
    explicit NeedleRun(const NeedleFlags& flags) : flags_(flags), variant_(parse_variant(flags.variant)) {
        check_flags(flags.eval);
        check_range("--depths", flags.depths, 1, static_cast<int64_t>(llm::kMostNeedles));
        check_range("--haystacks", flags.haystacks, 1, 1000);
        settings_ = llm::parse_settings(flags.eval.kv, flags.eval.window, flags.eval.sinks);
        if (settings_.front().label != "f16") {
            settings_.erase(std::remove_if(settings_.begin(), settings_.end(),
                                           [](const llm::Setting& setting) { return setting.label == "f16"; }),
                            settings_.end());
            settings_.insert(settings_.begin(), llm::parse_settings("f16", {}, {}).front());
        }
        llm::install_log(flags.eval.verbose);
        catch_interrupts();
        model_ = std::make_unique<EvalModel>(flags.eval);
        lengths_ = flags.lengths;
        if (lengths_.empty()) {
            const int64_t longest = std::min<int64_t>(model_->plan().trained_context, kDefaultLongest);
            lengths_ = {longest / 4, longest / 2, longest};
        }
        std::sort(lengths_.begin(), lengths_.end());
        lengths_.erase(std::unique(lengths_.begin(), lengths_.end()), lengths_.end());
        for (const int64_t length : lengths_) {
            if (length < 1 || length > (1 << 24)) {
                throw llm::UsageError(fmt::format("--lengths {}: use numbers of tokens from 1", length));
            }
            for (const llm::Setting& setting : settings_) {
                model_->cache_plan(length, setting.kv);
            }
        }
        depths_ = llm::even_depths(flags.depths);
    }

    int run() {
        const EvalText text = read_text(flags_.eval);
        text_name_ = text.name;
        const llm::Model& host = model_->load(false);
        template_ = std::make_unique<llm::ChatTemplate>(host);
        const std::vector<llm::Token> tokens = host.tokenize(text.text, false, false);
        const std::vector<Job> jobs = make_jobs(host, tokens);
        double work = 0;
        for (const Job& job : jobs) {
            work += job.work;
        }
        model_->use_profile(settings_);
        Eta eta(static_cast<int>(settings_.size()));
        for (size_t i = 0; i < settings_.size(); ++i) {
            eta.begin(settings_[i].label, work, work * static_cast<double>(settings_.size() - i - 1));
            const llm::Progress progress = eta.progress();
            double done = 0;
            for (const Job& job : jobs) {
                run_job(job, i, [&](double fraction) {
                    if (progress) {
                        progress((done + fraction * job.work) / work);
                    }
                });
                done += job.work;
            }
            llm::NeedleResult total;
            for (const int64_t length : lengths_) {
                total += over_depths(i, length);
            }
            eta.done(
                fmt::format("{} of {} found, {:.1f} % of digits", total.found, total.asked, 100 * total.digit_share()));
        }
        print();
        if (!flags_.plot.empty()) {
            write_plot();
        }
        return 0;
    }

private:
    // Haystacks of one length that one session reads one after the other.
    struct Job {
        int64_t length = 0;
        double work = 0; // tokens to read, about
        struct Reading {
            llm::Haystack haystack;
            std::string text; // needles placed
        };
        std::vector<Reading> readings;
    };

    std::string prompt(const std::string& text, const llm::NeedleQuestion& question) const {
        std::vector<llm::Message> messages;
        if (!template_->default_system().empty()) {
            messages.push_back({"system", template_->default_system()});
        }
        messages.push_back({"user", fmt::format("{}\n\n{}\n\n{}", kTask, text, question.text)});
        const bool plain = template_->kind() == llm::ChatTemplate::Kind::none;
        return template_->render(messages, true) + (plain ? "\n" : "") + question.opening;
    }

    static int64_t answer_room(const llm::NeedleQuestion& question) {
        return kAnswerTokens * static_cast<int64_t>(question.asked.size());
    }

    // A piece of the text from token `from` on such that the longest prompt has at most `length` tokens.
    std::string fill(const llm::Model& model, const std::vector<llm::Token>& tokens, double place, int64_t length,
                     const llm::Haystack& haystack) const {
        int64_t overhead = 0;
        for (const llm::NeedleQuestion& question : haystack.questions) {
            const auto n = static_cast<int64_t>(
                model.tokenize(prompt(llm::place_needles("", haystack.needles), question), true).size());
            overhead = std::max(overhead, n + answer_room(question));
        }
        // Cut in other places, a text can have some tokens more than before.
        overhead += 8 + 2 * static_cast<int64_t>(haystack.needles.size());
        const int64_t n = length - overhead;
        if (n < 4 * static_cast<int64_t>(haystack.needles.size())) {
            throw llm::UsageError(fmt::format("--lengths {}: {} needles and their question take {} tokens; use longer "
                                              "ones or fewer --depths",
                                              length, haystack.needles.size(), overhead));
        }
        const auto size = static_cast<int64_t>(tokens.size());
        if (n > size) {
            throw llm::UsageError(fmt::format("the text has {} tokens, a haystack of {} needs {}; give a longer one "
                                              "(--file) or use shorter --lengths",
                                              size, length, n));
        }
        const auto from = static_cast<int64_t>(place * static_cast<double>(size - n));
        std::string text;
        for (int64_t i = from; i < from + n; ++i) {
            text += model.piece(tokens[static_cast<size_t>(i)]);
        }
        // Whole words, and so whole characters.
        const size_t begin = text.find_first_of(" \n");
        const size_t end = text.find_last_of(" \n");
        return begin == std::string::npos || end <= begin ? text : text.substr(begin + 1, end - begin - 1);
    }

    std::vector<Job> make_jobs(const llm::Model& model, const std::vector<llm::Token>& tokens) const {
        std::vector<Job> jobs;
        for (const int64_t length : lengths_) {
            for (int64_t i = 0; i < flags_.haystacks; ++i) {
                const double place = (static_cast<double>(i) + 0.5) / static_cast<double>(flags_.haystacks);
                Job job;
                job.length = length;
                for (const llm::Haystack& haystack :
                     llm::make_haystacks(variant_, depths_, flags_.seed + static_cast<uint64_t>(i))) {
                    const std::string text = fill(model, tokens, place, length, haystack);
                    job.readings.push_back({haystack, llm::place_needles(text, haystack.needles)});
                }
                // From the deepest needle up, haystacks of one text share what lies before theirs.
                std::reverse(job.readings.begin(), job.readings.end());
                job.work = static_cast<double>(length) * (1 + 0.5 * static_cast<double>(job.readings.size() - 1));
                jobs.push_back(std::move(job));
            }
        }
        return jobs;
    }

    void run_job(const Job& job, size_t setting, const llm::Progress& progress) {
        const llm::KvChoice& kv = settings_[setting].kv;
        const llm::Model& model = model_->load(kv.turboquant());
        llm::SessionOptions options;
        options.kv = kv;
        options.plan = model_->cache_plan(job.length, kv);
        options.threads = flags_.eval.threads;
        options.full_cache = true;
        options.interrupt = &interrupt_flag();
        llm::Session session(model, options);
        for (size_t i = 0; i < job.readings.size(); ++i) {
            const auto begin = static_cast<double>(i);
            const auto n = static_cast<double>(job.readings.size());
            for (const llm::NeedleQuestion& question : job.readings[i].haystack.questions) {
                const bool first = &question == &job.readings[i].haystack.questions.front();
                ask(session, job, job.readings[i], question, setting,
                    [&](double fraction) { progress((begin + (first ? fraction : 1)) / n); });
            }
        }
    }

    void ask(llm::Session& session, const Job& job, const Job::Reading& reading, const llm::NeedleQuestion& question,
             size_t setting, const llm::Progress& progress) {
        const llm::Model& model = session.model();
        const std::string text = prompt(reading.text, question);
        const std::vector<llm::Token> tokens = model.tokenize(text, true);
        if (!session.read(tokens, progress)) {
            throw llm::Error("stopped by Ctrl-C");
        }
        llm::SamplingOptions likeliest;
        likeliest.temp = 0;
        const llm::Sampler sampler = llm::make_sampler(likeliest);
        const llm::Answer answer = session.generate(sampler.get(), answer_room(question), {}, {});
        if (answer.stop == llm::Stop::interrupted) {
            throw llm::Error("stopped by Ctrl-C");
        }

        // Teacher-forced: the right answer is read, and each of its digits compared with what the model would have said.
        const std::vector<llm::Token> full = model.tokenize(text + question.answer, true);
        const auto same = static_cast<size_t>(
            std::mismatch(tokens.begin(), tokens.end(), full.begin(), full.end()).first - tokens.begin());
        std::vector<int64_t> wanted;
        std::vector<int64_t> digits; // of the token after each wanted position
        for (size_t i = same; i < full.size(); ++i) {
            const std::string piece = model.piece(full[i]);
            const auto n = std::count_if(piece.begin(), piece.end(), [](char c) { return c >= '0' && c <= '9'; });
            if (n > 0) {
                wanted.push_back(static_cast<int64_t>(i) - 1);
                digits.push_back(n);
            }
        }
        std::vector<llm::NeedleResult> results(question.asked.size());
        int64_t seen = 0;
        const auto digits_of_number = static_cast<int64_t>(reading.haystack.needles.front().number.size());
        const int64_t vocabulary = llama_vocab_n_tokens(model.vocab());
        const bool read = session.score(
            full, wanted,
            [&](size_t first, size_t n, const float* logits) {
                for (size_t i = 0; i < n; ++i) {
                    const llm::Token right = full[static_cast<size_t>(wanted[first + i]) + 1];
                    const bool hit = llm::argmax(logits + static_cast<int64_t>(i) * vocabulary, vocabulary) == right;
                    const auto number = std::min(static_cast<size_t>(seen / digits_of_number), results.size() - 1);
                    results[number].digits += digits[first + i];
                    results[number].digits_right += hit ? digits[first + i] : 0;
                    seen += digits[first + i];
                }
            },
            {});
        if (!read) {
            throw llm::Error("stopped by Ctrl-C");
        }
        for (size_t i = 0; i < results.size(); ++i) {
            const llm::Needle& needle = reading.haystack.needles[question.asked[i]];
            results[i].asked = 1;
            results[i].found = llm::answer_has(answer.text, needle.number, question.asked.size() == 1) ? 1 : 0;
            results_[{setting, job.length, needle.depth}] += results[i];
        }
    }

    llm::NeedleResult over_depths(size_t setting, int64_t length) const {
        llm::NeedleResult total;
        for (const double depth : depths_) {
            total += results_.at({setting, length, depth});
        }
        return total;
    }

    void print() const {
        std::vector<nlohmann::ordered_json> rows;
        for (size_t i = 0; i < settings_.size(); ++i) {
            for (const int64_t length : lengths_) {
                const llm::Footprint size =
                    llm::footprint(model_->cache_plan(length, settings_[i].kv), settings_[i].kv);
                for (const double depth : depths_) {
                    const llm::NeedleResult& result = results_.at({i, length, depth});
                    nlohmann::ordered_json row = setting_json(*model_, settings_[i], size);
                    row["variant"] = flags_.variant;
                    row["text"] = text_name_;
                    row["length"] = length;
                    row["depth"] = depth;
                    row["asked"] = result.asked;
                    row["found"] = result.found;
                    row["exact"] = result.found_share();
                    row["digit_accuracy"] = result.digit_share();
                    row["seed"] = flags_.seed;
                    row["threads"] = flags_.eval.threads > 0 ? flags_.eval.threads : llm::default_threads();
                    rows.push_back(row);
                }
            }
        }
        if (flags_.eval.output == "json") {
            print_json(rows);
        } else if (flags_.eval.output == "csv") {
            print_csv(rows);
        } else {
            print_table();
        }
    }

    void print_table() const {
        fmt::print(
            "{}, {}, {}: {} depths, {} haystack{} a length; found (digits right when the answer is given away)\n\n",
            model_->label(), flags_.variant, text_name_, flags_.depths, flags_.haystacks,
            flags_.haystacks == 1 ? "" : "s");
        std::string head = "| cache | bits |";
        std::string line = "|---|--:|";
        for (const int64_t length : lengths_) {
            head += fmt::format(" {} tokens |", length);
            line += "--:|";
        }
        fmt::print("{} all |\n{}--:|\n", head, line);
        const auto cell = [](const llm::NeedleResult& result) {
            return fmt::format(" {}/{} ({:.1f} %) |", result.found, result.asked, 100 * result.digit_share());
        };
        for (size_t i = 0; i < settings_.size(); ++i) {
            const llm::Footprint size =
                llm::footprint(model_->cache_plan(lengths_.front(), settings_[i].kv), settings_[i].kv);
            std::string row = fmt::format("| {} | {:.2f} |", settings_[i].label, size.bits_per_value);
            llm::NeedleResult all;
            for (const int64_t length : lengths_) {
                const llm::NeedleResult total = over_depths(i, length);
                row += cell(total);
                all += total;
            }
            fmt::print("{}{}\n", row, cell(all));
        }
    }

    void write_plot() const {
        HeatMap map;
        map.title = fmt::format("{}: numbers found, % ({})", model_->label(), flags_.variant);
        map.x_label = "tokens";
        map.y_label = "depth of the needle";
        for (const int64_t length : lengths_) {
            map.columns.push_back(std::to_string(length));
        }
        for (const double depth : depths_) {
            map.rows.push_back(fmt::format("{:.0f} %", 100 * depth));
        }
        for (size_t i = 0; i < settings_.size(); ++i) {
            HeatMap::Panel panel{settings_[i].label, {}};
            for (const double depth : depths_) {
                std::vector<double> row;
                for (const int64_t length : lengths_) {
                    row.push_back(results_.at({i, length, depth}).found_share());
                }
                panel.cells.push_back(row);
            }
            map.panels.push_back(panel);
        }
        const std::string svg = to_svg(map);
        std::FILE* file = std::fopen(flags_.plot.c_str(), "wb");
        const bool written = file != nullptr && std::fwrite(svg.data(), 1, svg.size(), file) == svg.size();
        if (file == nullptr || std::fclose(file) != 0 || !written) {
            throw llm::Error(fmt::format("{}: cannot be written: {}; choose another --plot file", flags_.plot,
                                         std::strerror(errno)));
        }
    }

    struct Cell {
        size_t setting;
        int64_t length;
        double depth;
        bool operator<(const Cell& other) const {
            return std::tie(setting, length, depth) < std::tie(other.setting, other.length, other.depth);
        }
    };

    NeedleFlags flags_;
    llm::NeedleVariant variant_;
    std::vector<llm::Setting> settings_;
    std::unique_ptr<EvalModel> model_;
    std::unique_ptr<llm::ChatTemplate> template_;
    std::vector<int64_t> lengths_;
    std::vector<double> depths_;
    std::string text_name_;
    std::map<Cell, llm::NeedleResult> results_;
};

} // namespace

Command add_eval_niah(CLI::App& eval) {
    auto flags = std::make_shared<NeedleFlags>();
    flags->eval.kv = "f16,q4_0,tq4,tq3";
    CLI::App* command =
        eval.add_subcommand("niah", "needles in a haystack: facts in a long text, asked for with each cache");
    add_eval_flags(*command, flags->eval);
    command
        ->add_option("--variant", flags->variant,
                     "single: one needle a haystack; multikey: one at each depth, each asked for; multivalue: "
                     "several numbers a city, all asked for (default multikey)")
        ->type_name("KIND");
    command
        ->add_option("--lengths", flags->lengths,
                     "tokens of haystack, question and answer, with commas between (default: a quarter, half and all "
                     "of the model's context, at most 8192)")
        ->delimiter(',')
        ->type_name("LIST");
    command->add_option("--depths", flags->depths, "depths, evenly spaced from start to end (default 11)")
        ->type_name("N");
    command
        ->add_option("--haystacks", flags->haystacks, "haystacks of each length, each with other needles (default 1)")
        ->type_name("N");
    command->add_option("--seed", flags->seed, "of cities and numbers (default 1)")->type_name("N");
    command->add_option("--plot", flags->plot, "a heat map of what was found, as SVG")->type_name("FILE");
    return [flags] { return NeedleRun(*flags).run(); };
}

} // namespace turboquant::app
