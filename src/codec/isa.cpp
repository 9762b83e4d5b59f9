// Which instruction sets this build has and this processor runs.
#include "turboquant/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace turboquant {

namespace {

constexpr Isa kAllIsas[] = {Isa::portable, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::avx512vbmi, Isa::neon};

#if defined(__x86_64__)
bool has_f16c() {
    // Not every compiler knows the name "f16c" in __builtin_cpu_supports.
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1U << 29)) != 0;
}

[[maybe_unused]] bool has_avxvnni() { // its registers are AVX2's
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1U << 4)) != 0;
}
#endif

std::vector<Isa> detect() {
    std::vector<Isa> isas = {Isa::portable};
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks whether the operating system saves the registers.
    __builtin_cpu_init();
#if defined(TURBOQUANT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        isas.push_back(Isa::avx2);
#if defined(TURBOQUANT_HAVE_AVXVNNI)
        if (has_avxvnni()) {
            isas.push_back(Isa::avxvnni);
        }
#endif
#if defined(TURBOQUANT_HAVE_AVX512)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni")) {
            isas.push_back(Isa::avx512);
#if defined(TURBOQUANT_HAVE_AVX512VBMI)
            if (__builtin_cpu_supports("avx512vbmi")) {
                isas.push_back(Isa::avx512vbmi);
            }
#endif
        }
#endif
    }
#endif
#elif defined(__aarch64__)
    isas.push_back(Isa::neon); // part of the AArch64 baseline
#endif
    return isas;
}

std::string names(const std::vector<Isa>& isas) {
    std::string list;
    for (const Isa isa : isas) {
        list += (list.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    return list;
}

struct Choice {
    Status status;
    Isa isa = Isa::portable;
};

Choice choose() {
    Choice choice;
    choice.isa = available_isas().back();
    const char* wanted = std::getenv("TURBOQUANT_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        return choice;
    }
    Isa isa = Isa::portable;
    choice.status = parse_isa(wanted, isa);
    if (!choice.status.ok()) {
        choice.status = invalid("TURBOQUANT_ISA: " + choice.status.message());
        return choice;
    }
    for (const Isa available : available_isas()) {
        if (available == isa) {
            choice.isa = isa;
            return choice;
        }
    }
    choice.status = {StatusCode::unsupported, "TURBOQUANT_ISA: " + std::string(isa_name(isa)) +
                                                  " cannot run here; use one of " + names(available_isas()) +
                                                  ", or unset it"};
    return choice;
}

} // namespace

std::string_view isa_name(Isa isa) {
    switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512vbmi: return "avx512vbmi";
    case Isa::neon: return "neon";
    }
    return "unknown";
}

const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> isas = detect();
    return isas;
}

Status default_isa(Isa& isa) {
    static const Choice choice = choose();
    if (choice.status.ok()) {
        isa = choice.isa;
    }
    return choice.status;
}

Status parse_isa(std::string_view name, Isa& isa) {
    for (const Isa known : kAllIsas) {
        if (isa_name(known) == name) {
            isa = known;
            return {};
        }
    }
    return invalid("unknown instruction set \"" + std::string(name.substr(0, 40)) + "\"; use one of " +
                   names({std::begin(kAllIsas), std::end(kAllIsas)}));
}

} // namespace turboquant
