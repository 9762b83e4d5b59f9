// Needles in a haystack: made-up facts put into a long text, and questions that only the text answers. The variants are
// those of RULER (Hsieh et al. 2024, arXiv:2404.06654): one needle; several of which one is asked for; several values of
// one key, all asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

enum class NeedleVariant { single, multikey, multivalue };

struct Needle {
    std::string city;
    std::string number; // 7 digits, the first not 0
    double depth = 0;   // 0: the text's start, 1: its end
    std::string sentence() const;
};

struct NeedleQuestion {
    std::string text;          // for the user's turn
    std::string opening;       // how the assistant's answer begins
    std::string answer;        // what comes next, with its leading space
    std::vector<size_t> asked; // needles, in the order of `answer`
};

struct Haystack {
    std::vector<Needle> needles; // in the text, ascending in depth
    std::vector<NeedleQuestion> questions;
};

// Needles at `depths` (ascending, 0..1): single: a haystack for each; multikey: one haystack with a city at each depth;
// multivalue: one haystack, a number at each depth, up to 4 of them a city's. The same seed gives the same needles.
// At most kMostNeedles depths.
std::vector<Haystack> make_haystacks(NeedleVariant variant, const std::vector<double>& depths, uint64_t seed);
extern const size_t kMostNeedles;

// 0, 1/(n-1), ..., 1; 0.5 for one.
std::vector<double> even_depths(int64_t n);

// The text with each needle's sentence after the first sentence that ends at its depth or later.
std::string place_needles(std::string_view text, const std::vector<Needle>& needles);

// Whether the number stands in the answer by itself. first: as its first number.
bool answer_has(std::string_view answer, const std::string& number, bool first);

struct NeedleResult {
    int64_t asked = 0;
    int64_t found = 0;  // answers with the right number
    int64_t digits = 0; // teacher-forced
    int64_t digits_right = 0;

    NeedleResult& operator+=(const NeedleResult& other);
    double found_share() const { return asked > 0 ? static_cast<double>(found) / static_cast<double>(asked) : 0; }
    double digit_share() const {
        return digits > 0 ? static_cast<double>(digits_right) / static_cast<double>(digits) : 0;
    }
};

} // namespace turboquant::llm
