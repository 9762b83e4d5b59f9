#include "bench.h"

#include "eval.h"
#include "options.h"

#include "llm/error.h"
#include "llm/evaluation.h"

#include <turboquant/isa.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <numeric>

#include <fmt/format.h>

namespace turboquant::app {

void add_bench_flags(CLI::App& command, BenchFlags& flags) {
    command.add_option("-t,--threads", flags.threads, "threads, with commas between (default: physical cores)")
        ->type_name("LIST");
    command.add_option("-r,--rounds", flags.rounds, "rounds, of which medians are shown (default 5)")->type_name("N");
    command.add_option("-o,--output", flags.output, "md, csv or json (default md)")->type_name("FORMAT");
    command.add_flag("--verbose", flags.verbose, "show libllama's log");
}

void check_flags(const BenchFlags& flags) {
    if (flags.output != "md" && flags.output != "csv" && flags.output != "json") {
        throw llm::UsageError(fmt::format("-o {}: use md, csv or json", flags.output));
    }
    check_range("--rounds", flags.rounds, 1, 10000);
    if (!flags.threads.empty()) {
        parse_numbers("--threads", flags.threads, 1, 512);
    }
}

std::vector<std::string> parse_words(const std::string& flag, const std::string& list) {
    std::vector<std::string> words;
    for (size_t at = 0; at <= list.size();) {
        const size_t end = std::min(list.find(',', at), list.size());
        words.push_back(list.substr(at, end - at));
        if (words.back().empty()) {
            throw llm::UsageError(
                fmt::format("{} '{}': nothing between two commas; give a list such as a,b", flag, list));
        }
        at = end + 1;
    }
    return words;
}

std::vector<int64_t> parse_numbers(const std::string& flag, const std::string& list, int64_t least, int64_t most) {
    std::vector<int64_t> numbers;
    for (const std::string& word : parse_words(flag, list)) {
        int64_t number = 0;
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), number);
        if (error != std::errc() || end != word.data() + word.size() || number < least || number > most) {
            throw llm::UsageError(
                fmt::format("{} {}: '{}' is no number from {} to {}; give one, or several with commas between", flag,
                            list, word, least, most));
        }
        numbers.push_back(number);
    }
    return numbers;
}

Spread spread_of(const std::vector<double>& rounds) {
    Spread spread;
    spread.median = llm::quantile(rounds, 0.5);
    if (rounds.size() > 1) {
        const auto n = static_cast<double>(rounds.size());
        const double mean = std::accumulate(rounds.begin(), rounds.end(), 0.0) / n;
        double squares = 0;
        for (const double value : rounds) {
            squares += (value - mean) * (value - mean);
        }
        spread.deviation = std::sqrt(squares / (n - 1));
        if (spread.median > 0) {
            spread.interquartile = (llm::quantile(rounds, 0.75) - llm::quantile(rounds, 0.25)) / spread.median;
        }
    }
    return spread;
}

void print_table(const std::vector<std::vector<std::string>>& rows, size_t numbers) {
    std::vector<size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()), 1);
        for (size_t i = 0; i < row.size(); ++i) {
            // Characters, not bytes: continuation bytes of UTF-8 take no place.
            const auto width = static_cast<size_t>(
                std::count_if(row[i].begin(), row[i].end(), [](char c) { return (c & 0xC0) != 0x80; }));
            widths[i] = std::max(widths[i], width);
        }
    }
    for (size_t r = 0; r < rows.size(); ++r) {
        std::string line = "|";
        for (size_t i = 0; i < rows[r].size(); ++i) {
            // fmt pads by what a terminal shows, not by bytes.
            line += i < numbers ? fmt::format(" {:<{}} |", rows[r][i], widths[i])
                                : fmt::format(" {:>{}} |", rows[r][i], widths[i]);
        }
        fmt::print("{}\n", line);
        if (r == 0) {
            std::string rule = "|";
            for (size_t i = 0; i < widths.size(); ++i) {
                rule += i < numbers ? fmt::format(" {:-<{}} |", "", widths[i])
                                    : fmt::format(" {:-<{}}: |", "", widths[i] - 1);
            }
            fmt::print("{}\n", rule);
        }
    }
}

void print_results(const BenchFlags& flags, const std::vector<nlohmann::ordered_json>& objects,
                   const std::vector<std::vector<std::string>>& table, size_t numbers) {
    if (flags.output == "json") {
        print_json(objects);
    } else if (flags.output == "csv") {
        print_csv(objects);
    } else {
        print_table(table, numbers);
    }
}

std::vector<Isa> choose_isas(const std::string& list) {
    if (list == "all") {
        return available_isas();
    }
    std::vector<Isa> isas(1);
    if (list.empty()) {
        if (const Status status = default_isa(isas.front()); !status.ok()) {
            throw llm::UsageError(status.message());
        }
        return isas;
    }
    isas.clear();
    for (const std::string& word : parse_words("--isa", list)) {
        Isa isa = Isa::portable;
        const Status status = parse_isa(word, isa);
        const auto& there = available_isas();
        if (!status.ok() || std::find(there.begin(), there.end(), isa) == there.end()) {
            std::string names = "all";
            for (const Isa known : there) {
                names += ' ' + std::string(isa_name(known));
            }
            throw llm::UsageError(fmt::format("--isa {}: not one that this processor runs; use {}", word, names));
        }
        isas.push_back(isa);
    }
    return isas;
}

std::string machine_words() {
    std::string name = "unknown processor";
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos) {
            name = line.substr(line.find(": ") + 2);
            break;
        }
    }
    std::string isas;
    for (const Isa isa : available_isas()) {
        isas += ' ' + std::string(isa_name(isa));
    }
    return name + ',' + isas;
}

} // namespace turboquant::app
