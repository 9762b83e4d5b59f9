#include "llm/needles.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <random>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

constexpr std::array<const char*, 64> kCities = {
    "Amsterdam", "Ankara",     "Athens",    "Baghdad",   "Bangkok",  "Barcelona", "Beijing", "Belgrade",
    "Berlin",    "Bogota",     "Brussels",  "Bucharest", "Budapest", "Cairo",     "Caracas", "Chicago",
    "Cologne",   "Copenhagen", "Dakar",     "Damascus",  "Delhi",    "Denver",    "Dresden", "Dublin",
    "Edinburgh", "Florence",   "Geneva",    "Glasgow",   "Hamburg",  "Hanoi",     "Havana",  "Helsinki",
    "Istanbul",  "Jakarta",    "Kyoto",     "Lagos",     "Lima",     "Lisbon",    "London",  "Lyon",
    "Madrid",    "Manila",     "Marseille", "Melbourne", "Milan",    "Montreal",  "Moscow",  "Munich",
    "Nairobi",   "Naples",     "Oslo",      "Ottawa",    "Paris",    "Prague",    "Quito",   "Rome",
    "Santiago",  "Seoul",      "Seville",   "Stockholm", "Tokyo",    "Toronto",   "Vienna",  "Warsaw"};
constexpr size_t kValuesOfACity = 4;

// The same on every machine, unlike std::uniform_int_distribution.
uint64_t below(std::mt19937_64& random, uint64_t n) {
    return random() % n;
}

bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

NeedleQuestion make_question(const std::vector<Needle>& needles, const std::vector<size_t>& asked, bool several) {
    NeedleQuestion question;
    question.asked = asked;
    const std::string& city = needles[asked.front()].city;
    if (several) {
        question.text = fmt::format("Which magic numbers for {} does the text mention? List all of them.", city);
        question.opening = fmt::format("The magic numbers for {} are", city);
    } else {
        question.text = fmt::format("What is the magic number for {} that the text mentions?", city);
        question.opening = fmt::format("The magic number for {} is", city);
    }
    for (const size_t i : asked) {
        question.answer += (question.answer.empty() ? " " : ", ") + needles[i].number;
    }
    return question;
}

} // namespace

const size_t kMostNeedles = kCities.size();

std::string Needle::sentence() const {
    return fmt::format("The magic number for {} is {}.", city, number);
}

std::vector<double> even_depths(int64_t n) {
    std::vector<double> depths;
    for (int64_t i = 0; i < n; ++i) {
        depths.push_back(n == 1 ? 0.5 : static_cast<double>(i) / static_cast<double>(n - 1));
    }
    return depths;
}

std::vector<Haystack> make_haystacks(NeedleVariant variant, const std::vector<double>& depths, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::string> cities(kCities.begin(), kCities.end());
    for (size_t i = cities.size() - 1; i > 0; --i) {
        std::swap(cities[i], cities[below(random, i + 1)]);
    }
    const size_t n = depths.size();
    // multivalue: neighbours in depth belong to different cities.
    const size_t n_cities = variant == NeedleVariant::multivalue ? (n + kValuesOfACity - 1) / kValuesOfACity : n;
    std::vector<Needle> needles;
    while (needles.size() < n) {
        Needle needle{cities[needles.size() % n_cities], std::to_string(1000000 + below(random, 9000000)),
                      depths[needles.size()]};
        if (std::none_of(needles.begin(), needles.end(), [&](const Needle& o) { return o.number == needle.number; })) {
            needles.push_back(std::move(needle));
        }
    }
    std::vector<Haystack> haystacks;
    if (variant == NeedleVariant::single) {
        for (const Needle& needle : needles) {
            haystacks.push_back({{needle}, {make_question({needle}, {0}, false)}});
        }
        return haystacks;
    }
    haystacks.push_back({needles, {}});
    for (size_t city = 0; city < n_cities; ++city) {
        std::vector<size_t> asked;
        for (size_t i = city; i < n; i += n_cities) {
            asked.push_back(i);
        }
        haystacks.back().questions.push_back(make_question(needles, asked, variant == NeedleVariant::multivalue));
    }
    return haystacks;
}

std::string place_needles(std::string_view text, const std::vector<Needle>& needles) {
    std::string result;
    size_t from = 0;
    for (const Needle& needle : needles) {
        auto at = std::max(from, static_cast<size_t>(needle.depth * static_cast<double>(text.size())));
        if (at > 0) {
            // Behind the blank that ends the sentence; without one, at the end.
            while (at < text.size() &&
                   !(std::isspace(static_cast<unsigned char>(text[at])) != 0 &&
                     (text[at] == '\n' || text[at - 1] == '.' || text[at - 1] == '!' || text[at - 1] == '?'))) {
                ++at;
            }
            at = std::min(at + 1, text.size());
        }
        result += text.substr(from, at - from);
        if (!result.empty() && std::isspace(static_cast<unsigned char>(result.back())) == 0) {
            result += ' ';
        }
        result += needle.sentence() + ' ';
        from = at;
    }
    return result + std::string(text.substr(from));
}

bool answer_has(std::string_view answer, const std::string& number, bool first) {
    for (size_t at = 0; at < answer.size();) {
        if (!is_digit(answer[at])) {
            ++at;
            continue;
        }
        size_t end = at;
        while (end < answer.size() && is_digit(answer[end])) {
            ++end;
        }
        if (answer.substr(at, end - at) == number) {
            return true;
        }
        if (first) {
            return false;
        }
        at = end;
    }
    return false;
}

NeedleResult& NeedleResult::operator+=(const NeedleResult& other) {
    asked += other.asked;
    found += other.found;
    digits += other.digits;
    digits_right += other.digits_right;
    return *this;
}

} // namespace turboquant::llm
