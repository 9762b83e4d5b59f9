#include "serve/http/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace turboquant::serve {
namespace {

using namespace prometheus;

Counter& counter(Registry& registry, const char* name, const char* help) {
    return BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

Gauge& gauge(Registry& registry, const char* name, const char* help) {
    return BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

Histogram& histogram(Registry& registry, const char* name, const char* help, const Histogram::BucketBoundaries& at) {
    return BuildHistogram().Name(name).Help(help).Register(registry).Add({}, at);
}

} // namespace

struct Metrics::Impl {
    Registry registry;
    Family<Counter>& requests = BuildCounter()
                                    .Name("turboquant_requests_total")
                                    .Help("HTTP requests answered, by endpoint and status")
                                    .Register(registry);
    Family<Counter>& answers = BuildCounter()
                                   .Name("turboquant_answers_total")
                                   .Help("Completions that ended: stop, length, cancelled, timeout, failed")
                                   .Register(registry);
    Counter& prompt_tokens = counter(registry, "turboquant_prompt_tokens_total", "Tokens of prompts");
    Counter& cached_tokens =
        counter(registry, "turboquant_prompt_tokens_cached_total", "Of them, found in a cache and not read again");
    Counter& answer_tokens = counter(registry, "turboquant_completion_tokens_total", "Tokens of answers");
    Gauge& waiting = gauge(registry, "turboquant_requests_waiting", "Requests that wait for a slot");
    Gauge& slots = gauge(registry, "turboquant_slots", "Conversations that can be answered at once");
    Gauge& busy = gauge(registry, "turboquant_slots_busy", "Slots that are answering");
    Gauge& context = gauge(registry, "turboquant_context_tokens", "Tokens that one slot holds");
    Gauge& cached = gauge(registry, "turboquant_cached_tokens", "Tokens in all slots' caches");
    Gauge& kv_used = gauge(registry, "turboquant_kv_used_bytes", "KV cache that these tokens take");
    Gauge& kv_capacity = gauge(registry, "turboquant_kv_capacity_bytes", "KV cache of all slots when full");
    Gauge& f16_used = gauge(registry, "turboquant_kv_f16_used_bytes", "What the cached tokens would take in f16");
    Gauge& f16_capacity = gauge(registry, "turboquant_kv_f16_capacity_bytes", "What all slots would take in f16");
    Histogram& first =
        histogram(registry, "turboquant_time_to_first_token_seconds", "From a request's arrival to its first token",
                  {0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60});
    Histogram& between = histogram(registry, "turboquant_inter_token_seconds", "Between two tokens of an answer",
                                   {0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2});
};

Metrics::Metrics() : impl_(std::make_unique<Impl>()) {}
Metrics::~Metrics() = default;

void Metrics::prompt_placed(int64_t tokens, int64_t cached) {
    impl_->prompt_tokens.Increment(static_cast<double>(tokens));
    impl_->cached_tokens.Increment(static_cast<double>(cached));
}

void Metrics::first_token(double seconds) {
    impl_->first.Observe(seconds);
    impl_->answer_tokens.Increment();
}

void Metrics::next_token(double seconds) {
    impl_->between.Observe(seconds);
    impl_->answer_tokens.Increment();
}

void Metrics::answer_over(std::string_view outcome) {
    impl_->answers.Add({{"outcome", std::string(outcome)}}).Increment();
}

void Metrics::request(const std::string& endpoint, int status) {
    impl_->requests.Add({{"endpoint", endpoint}, {"status", std::to_string(status)}}).Increment();
}

std::string Metrics::text(const EngineStatus* engine) {
    if (engine != nullptr) {
        impl_->waiting.Set(static_cast<double>(engine->waiting));
        impl_->slots.Set(engine->slots);
        impl_->busy.Set(engine->busy);
        impl_->context.Set(static_cast<double>(engine->context));
        impl_->cached.Set(static_cast<double>(engine->cached_tokens));
        impl_->kv_used.Set(static_cast<double>(engine->share(engine->kv_bytes, engine->cached_tokens)));
        impl_->kv_capacity.Set(static_cast<double>(engine->kv_bytes));
        impl_->f16_used.Set(static_cast<double>(engine->share(engine->kv_f16_bytes, engine->cached_tokens)));
        impl_->f16_capacity.Set(static_cast<double>(engine->kv_f16_bytes));
    }
    return TextSerializer().Serialize(impl_->registry.Collect());
}

} // namespace turboquant::serve
