// tq bench: how fast attention, decoding, reading prompts, encoding and serving are, beside llama.cpp's own caches.
#include "bench.h"

#include <string>
#include <utility>
#include <vector>

namespace turboquant::app {

Command add_bench(CLI::App& program) {
    CLI::App* bench = program.add_subcommand(
        "bench",
        "how fast: attention (kernels beside ggml's), decode, prefill (tok/s at depths), encode, serve (load)");
    bench->require_subcommand(1);
    const std::vector<std::pair<std::string, Command>> commands = {{"attention", add_bench_attention(*bench)},
                                                                   {"decode", add_bench_decode(*bench)},
                                                                   {"prefill", add_bench_prefill(*bench)},
                                                                   {"encode", add_bench_encode(*bench)},
                                                                   {"serve", add_bench_serve(*bench)}};
    return [bench, commands] {
        for (const auto& [name, command] : commands) {
            if (bench->got_subcommand(name)) {
                return command();
            }
        }
        return 0;
    };
}

} // namespace turboquant::app
