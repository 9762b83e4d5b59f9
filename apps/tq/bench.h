// What the commands below `tq bench` share: lists of numbers, rounds, tables.
#pragma once

#include "commands.h"

#include <turboquant/isa.h>

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace turboquant::app {

// Flags of every bench.
struct BenchFlags {
    std::string threads; // list; empty: all physical cores
    int rounds = 5;
    std::string output = "md";
    bool verbose = false;
};
void add_bench_flags(CLI::App& command, BenchFlags& flags);
void check_flags(const BenchFlags& flags);

// "0,4096" into numbers from `least` to `most`. UsageError that names the flag.
std::vector<int64_t> parse_numbers(const std::string& flag, const std::string& list, int64_t least, int64_t most);
// "a,b" into words; none of them empty. UsageError that names the flag.
std::vector<std::string> parse_words(const std::string& flag, const std::string& list);

// "all", names, or "" for the one that kernels use by themselves. UsageError: one that does not run here.
std::vector<Isa> choose_isas(const std::string& list);

// Of one figure over the rounds.
struct Spread {
    double median = 0;
    double deviation = 0;     // standard deviation of the rounds; 0 for one round
    double interquartile = 0; // distance of the quartiles, over the median
};
Spread spread_of(const std::vector<double>& rounds);

// A Markdown table whose columns line up. The first row holds the titles; the columns from `numbers` on are right-aligned.
void print_table(const std::vector<std::vector<std::string>>& rows, size_t numbers);

// -o csv and json from `objects`, else the table.
void print_results(const BenchFlags& flags, const std::vector<nlohmann::ordered_json>& objects,
                   const std::vector<std::vector<std::string>>& table, size_t numbers);

// "AMD EPYC 9B45, avx2 avx512": the processor and the instruction sets that our kernels can use on it.
std::string machine_words();

Command add_bench_attention(CLI::App& bench);
Command add_bench_decode(CLI::App& bench);
Command add_bench_prefill(CLI::App& bench);
Command add_bench_encode(CLI::App& bench);
Command add_bench_serve(CLI::App& bench);

} // namespace turboquant::app
