#include "serve/http/server.h"

#include "llm/error.h"
#include "serve/http/auth.h"
#include "serve/http/connection.h"
#include "serve/http/page.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <regex>
#include <thread>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

constexpr int kBacklog = 512;     // connections that the kernel keeps for us; httplib asks for 5
constexpr int kIdleSeconds = 5;   // a connection without a request
constexpr int kReadSeconds = 15;  // a client that stops in the middle of one
constexpr int kWriteSeconds = 15; // a client that does not read
constexpr size_t kRequestsAConnection = 1000;
constexpr size_t kLongestHeaders = 32u << 10;
constexpr std::chrono::seconds kFlush{3}; // for clients to take the end of their answers when the server stops

// httplib's server with its listening socket in reach.
class HttpServer : public httplib::Server {
public:
    void widen_backlog() { ::listen(svr_sock_, kBacklog); }
};

std::string new_id() {
    static thread_local std::mt19937_64 random{std::random_device{}() ^
                                               (static_cast<uint64_t>(std::random_device{}()) << 32)};
    return fmt::format("{:016x}", random());
}

bool same_name(std::string_view a, std::string_view b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](char x, char y) {
        return std::tolower(static_cast<unsigned char>(x)) == std::tolower(static_cast<unsigned char>(y));
    });
}

bool is_json(const httplib::Request& request) {
    const std::string type = request.get_header_value("Content-Type");
    return same_name(std::string_view(type).substr(0, type.find_first_of("; ")), "application/json");
}

// Who may use an endpoint, and when.
enum class Access { open, keyed }; // keyed: with an API key where there is one
enum class Needs { nothing, model };

} // namespace

RequestRecord& this_request() {
    static thread_local RequestRecord record;
    return record;
}

void set_json(httplib::Response& response, const nlohmann::json& json) {
    response.set_content(dump(json), "application/json");
}

struct Server::Impl {
    using Handler = std::function<void(const httplib::Request&, httplib::Response&)>;

    Impl(ServerOptions given, Metrics& counts, RequestLog& lines)
        : options(std::move(given)), metrics(counts), log(lines), auth(options.keys) {}

    void add_routes();
    void add(const char* method, const std::string& pattern, const char* name, Access access, Needs needs,
             Handler handler);
    void add_hooks();
    void check_origin(const httplib::Request& request) const;
    void add_cors(const httplib::Request& request, httplib::Response& response) const;
    void preflight(const httplib::Request& request, httplib::Response& response) const;
    void on_error(const httplib::Request& request, httplib::Response& response) const;
    const Service& loaded() const;
    // Name of the route in the metrics; "other" for paths that are none.
    std::string endpoint(const std::string& path) const;

    ServerOptions options;
    Metrics& metrics;
    RequestLog& log;
    Auth auth;
    HttpServer http;
    int port = 0;
    bool loopback = true;
    std::atomic<const Service*> service{nullptr};
    std::atomic<int> answering{0};
    struct Route {
        std::regex pattern;
        std::string name;
        std::vector<std::string> methods;
    };
    std::vector<Route> routes;
    std::thread thread;
};

const Service& Server::Impl::loaded() const {
    const Service* loaded = service;
    if (loaded == nullptr) {
        throw ApiError(503, "the model is still being loaded; try again soon", "server_error", "", "loading");
    }
    return *loaded;
}

std::string Server::Impl::endpoint(const std::string& path) const {
    for (const Route& route : routes) {
        if (path.size() < 512 && std::regex_match(path, route.pattern)) {
            return route.name;
        }
    }
    return "other";
}

// A page of another site must not use this server through its reader's browser: neither under a name of its own (DNS
// rebinding) nor by sending requests whose answers it could not read.
void Server::Impl::check_origin(const httplib::Request& request) const {
    const std::string host = request.get_header_value("Host");
    if (loopback && !host.empty() && !is_loopback(host_name(host))) {
        throw ApiError(403, "this server answers to localhost and loopback addresses only; --host opens it to others",
                       "invalid_request_error", "", "host_not_allowed");
    }
    const std::string origin = request.get_header_value("Origin");
    if (request.method == "GET" || origin.empty() || options.cors_origin == "*" || origin == options.cors_origin ||
        same_name(origin_host(origin), host)) {
        return;
    }
    throw ApiError(403, "pages of other origins may not use this server; --cors-origin allows one",
                   "invalid_request_error", "", "origin_not_allowed");
}

void Server::Impl::add_cors(const httplib::Request& request, httplib::Response& response) const {
    const std::string origin = request.get_header_value("Origin");
    if (options.cors_origin.empty() || origin.empty()) {
        return;
    }
    if (options.cors_origin == "*") {
        response.set_header("Access-Control-Allow-Origin", "*");
    } else if (origin == options.cors_origin) {
        response.set_header("Access-Control-Allow-Origin", origin);
        response.set_header("Vary", "Origin");
    }
}

void Server::Impl::preflight(const httplib::Request& request, httplib::Response& response) const {
    if (options.cors_origin.empty() || !request.has_header("Origin")) {
        throw ApiError(405, "OPTIONS is answered to browsers only, with --cors-origin", "invalid_request_error", "",
                       "method_not_allowed");
    }
    response.set_header("Access-Control-Allow-Methods", "GET, POST");
    // Clients send headers of their own (x-stainless-...): all that are plain words.
    const std::string wanted = request.get_header_value("Access-Control-Request-Headers");
    static const std::regex plain("[A-Za-z0-9, -]{1,1000}");
    response.set_header("Access-Control-Allow-Headers",
                        std::regex_match(wanted, plain) ? wanted : "Authorization, Content-Type");
    response.set_header("Access-Control-Max-Age", "600");
    response.status = 204;
}

void Server::Impl::add(const char* method, const std::string& pattern, const char* name, Access access, Needs needs,
                       Handler handler) {
    const auto known =
        std::find_if(routes.begin(), routes.end(), [&](const Route& route) { return route.name == name; });
    if (known == routes.end()) {
        routes.push_back({std::regex(pattern), name, {method}});
    } else {
        known->methods.emplace_back(method);
    }
    const bool posts = std::string_view(method) == "POST";
    auto guarded = [this, access, needs, posts, handler = std::move(handler)](const httplib::Request& request,
                                                                              httplib::Response& response) {
        ++answering;
        this_request().in_flight = std::shared_ptr<void>(this, [this](void*) { --answering; });
        try {
            check_origin(request);
            if (access == Access::keyed && !auth.allows(request.get_header_value("Authorization"))) {
                response.set_header("WWW-Authenticate", "Bearer");
                throw ApiError(401, "this server wants an API key: Authorization: Bearer KEY", "authentication_error",
                               "", "invalid_api_key");
            }
            // Without this type a browser lets any page send a body unasked. Programs may call it what they like: curl -d
            // calls everything a form.
            if (posts && request.has_header("Origin") && !is_json(request)) {
                throw ApiError(415, "send JSON with Content-Type: application/json", "invalid_request_error", "",
                               "unsupported_media_type");
            }
            if (needs == Needs::model) {
                loaded();
            }
            handler(request, response);
        } catch (const ApiError& error) {
            response.status = error.status();
            if (error.code() == "loading") {
                response.set_header("Retry-After", "1");
            }
            this_request().error = error.code().empty() ? error.what() : error.code();
            set_json(response, error.json());
        } catch (const std::exception& error) {
            log.failure(this_request().id, error.what());
            response.status = 500;
            set_json(response, ApiError(500, "the server failed on this request; its log says why", "server_error", "",
                                        "internal_error")
                                   .json());
        }
    };
    if (posts) {
        http.Post(pattern, guarded);
    } else {
        http.Get(pattern, guarded);
    }
}

void Server::Impl::add_routes() {
    using httplib::Request;
    using httplib::Response;
    for (const bool chat : {true, false}) {
        const std::string path = chat ? "/v1/chat/completions" : "/v1/completions";
        add("POST", path, path.c_str(), Access::keyed, Needs::model,
            [this, chat](const Request& request, Response& response) { complete(loaded(), chat, request, response); });
    }
    add("GET", "/v1/models", "/v1/models", Access::keyed, Needs::model,
        [this](const Request&, Response& response) { set_json(response, models_json(loaded())); });
    add("GET", "/v1/models/(.+)", "/v1/models/{id}", Access::keyed, Needs::model,
        [this](const Request& request, Response& response) {
            set_json(response, model_json(loaded(), request.matches[1]));
        });
    add("GET", "/props", "/props", Access::keyed, Needs::model,
        [this](const Request&, Response& response) { set_json(response, props_json(loaded())); });
    add("POST", "/tokenize", "/tokenize", Access::keyed, Needs::model,
        [this](const Request& request, Response& response) {
            set_json(response, tokenize_json(loaded(), request.body));
        });
    add("POST", "/detokenize", "/detokenize", Access::keyed, Needs::model,
        [this](const Request& request, Response& response) {
            set_json(response, detokenize_json(loaded(), request.body));
        });
    add("GET", "/health", "/health", Access::open, Needs::model, [](const Request&, Response& response) {
        set_json(response, {{"status", "ok"}});
    });
    add("GET", "/metrics", "/metrics", Access::keyed, Needs::nothing, [this](const Request&, Response& response) {
        const Service* now = service;
        EngineStatus status;
        if (now != nullptr) {
            status = now->engine.status();
        }
        response.set_content(metrics.text(now != nullptr ? &status : nullptr), "text/plain; version=0.0.4");
    });
    add("GET", "/", "/", Access::open, Needs::nothing, [](const Request&, Response& response) {
        const Page page = make_page();
        response.set_header("Content-Security-Policy", page.policy);
        response.set_header("Referrer-Policy", "no-referrer");
        response.set_header("X-Frame-Options", "DENY");
        response.set_header("Cache-Control", "no-store"); // the nonce is good once
        response.set_content(page.html, "text/html; charset=utf-8");
    });
}

// Errors that httplib found itself get a body of ours.
void Server::Impl::on_error(const httplib::Request& request, httplib::Response& response) const {
    if (!response.body.empty() || response.status == 204) {
        return;
    }
    int status = response.status;
    std::string message = "the request cannot be understood";
    std::string code = "bad_request";
    if (status == 404) {
        message = fmt::format("there is no {} here", request.path.substr(0, 200));
        code = "not_found";
        for (const Route& route : routes) {
            if (request.path.size() < 512 && std::regex_match(request.path, route.pattern)) {
                status = 405;
                message = fmt::format("{} takes {} only", route.name, route.methods.front());
                code = "method_not_allowed";
                response.set_header("Allow", route.methods.front());
            }
        }
    } else if (status == 411) {
        message = "send the body with a Content-Length, not in chunks";
        code = "length_required";
    } else if (status == 413) {
        message = request.has_header("Content-Type") && !is_json(request)
                      ? "the body is too large for a form; send JSON with Content-Type: application/json"
                      : fmt::format("the body is larger than {} bytes", options.body_limit);
        code = "body_too_large";
    } else if (status == 414) {
        message = "the address is too long";
        code = "uri_too_long";
    } else if (status == 415) {
        message = "send JSON that is not compressed, with Content-Type: application/json";
        code = "unsupported_media_type";
    } else if (status == 431) {
        message = "the request's headers are too long";
        code = "headers_too_long";
    }
    response.status = status;
    this_request().error = code;
    set_json(response, ApiError(status, message, "invalid_request_error", "", code).json());
}

void Server::Impl::add_hooks() {
    http.set_pre_routing_handler([this](const httplib::Request& request, httplib::Response& response) {
        RequestRecord& record = this_request();
        record = {};
        record.start = std::chrono::steady_clock::now();
        record.id = new_id();
        response.set_header("X-Request-Id", record.id);
        response.set_header("X-Content-Type-Options", "nosniff");
        add_cors(request, response);
        size_t bytes = 0;
        for (const auto& [name, value] : request.headers) {
            bytes += name.size() + value.size();
        }
        // What is refused here has not sent its body yet: on_logged ends the connection.
        if (bytes > kLongestHeaders) {
            response.status = 431;
        } else if (request.has_header("Content-Encoding")) {
            response.status = 415; // a small compressed body can be a huge one
        } else if (request.has_header("Transfer-Encoding")) {
            response.status = 411; // httplib would read such a body however long it is
        } else if (request.method == "OPTIONS") {
            try {
                check_origin(request);
                preflight(request, response);
            } catch (const ApiError& error) {
                response.status = error.status();
                set_json(response, error.json());
            }
        } else {
            return httplib::Server::HandlerResponse::Unhandled;
        }
        return httplib::Server::HandlerResponse::Handled;
    });
    http.set_error_handler(httplib::Server::Handler(
        [this](const httplib::Request& request, httplib::Response& response) { on_error(request, response); }));
    http.set_exception_handler([this](const httplib::Request&, httplib::Response& response, const std::exception_ptr&) {
        log.failure(this_request().id, "an exception that no handler expected");
        response.status = 500;
    });
    http.set_logger([this](const httplib::Request& request, const httplib::Response& response) {
        RequestRecord& record = this_request();
        if (record.id.empty()) { // not understood, so that no hook has seen it
            record.start = std::chrono::steady_clock::now();
            record.id = new_id();
        }
        record.method = request.method;
        record.path = request.path;
        record.remote = request.remote_addr;
        record.status = response.status;
        if (record.prompt_tokens && record.outcome.empty() && record.error.empty()) {
            record.outcome = "cancelled";
        }
        metrics.request(endpoint(request.path), response.status);
        if (request.path != "/health") { // asked every second by those who watch
            log.request(record);
        }
        if (response.status == 411 || response.status == 413 || response.status == 415 || response.status == 431) {
            const int descriptor = find_connection(request.local_port, request.remote_addr, request.remote_port);
            if (descriptor >= 0) {
                ::shutdown(descriptor, SHUT_RD); // what follows is the rest of a body, no request
            }
        }
        record = {};
    });
}

Server::Server(ServerOptions options, Metrics& metrics, RequestLog& log)
    : impl_(std::make_unique<Impl>(std::move(options), metrics, log)) {}

Server::~Server() {
    stop();
}

void Server::start() {
    Impl& impl = *impl_;
    HttpServer& http = impl.http;
    const ServerOptions& options = impl.options;
    impl.loopback = is_loopback(options.host);
    http.new_task_queue = [n = options.threads] { return new httplib::ThreadPool(static_cast<size_t>(n)); };
    http.set_payload_max_length(options.body_limit);
    http.set_keep_alive_max_count(kRequestsAConnection);
    http.set_keep_alive_timeout(kIdleSeconds);
    http.set_read_timeout(kReadSeconds);
    http.set_write_timeout(kWriteSeconds);
    http.set_tcp_nodelay(true);
    // Not SO_REUSEPORT, httplib's own choice: two servers would share a port without a word.
    http.set_socket_options([](int descriptor) {
        const int yes = 1;
        ::setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    impl.add_routes();
    impl.add_hooks();
    errno = 0;
    if (options.port == 0) {
        impl.port = http.bind_to_any_port(options.host);
    } else {
        impl.port = http.bind_to_port(options.host, options.port) ? options.port : -1;
    }
    if (impl.port <= 0) {
        const int reason = errno;
        throw llm::Error(fmt::format("{} port {}: cannot be listened on: {}; {}", options.host, options.port,
                                     reason != 0 ? std::strerror(reason) : "no such address",
                                     reason == EADDRINUSE ? "end the other server or use another --port"
                                                          : "check --host and --port"));
    }
    impl.thread = std::thread([&http] { http.listen_after_bind(); });
    while (!http.is_running()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    http.widen_backlog();
}

int Server::port() const {
    return impl_->port;
}

std::string Server::url() const {
    const std::string& host = impl_->options.host;
    const bool v6 = host.find(':') != std::string::npos;
    return fmt::format("http://{}:{}", v6 ? "[" + host + "]" : host, impl_->port);
}

void Server::ready(const Service& service) {
    impl_->service = &service;
}

void Server::stop() {
    if (!impl_->thread.joinable()) {
        return;
    }
    // The last events of streams are on their way: httplib cuts them off when it stops.
    for (auto end = std::chrono::steady_clock::now() + kFlush;
         impl_->answering > 0 && std::chrono::steady_clock::now() < end;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    impl_->http.stop();
    // Threads of answers are about to return; those of idle connections would wait for seconds.
    end_connections(impl_->port);
    impl_->thread.join();
}

} // namespace turboquant::serve
