// The socket behind a request: httplib shows it to no handler, but waiting for an answer needs to know whether the client
// is still there.
#pragma once

#include <string>

namespace turboquant::serve {

// The descriptor of this process whose connection has these two ends; -1: none.
int find_connection(int local_port, const std::string& remote_address, int remote_port);

// The other side has closed (or shut down its sending side, which counts as gone: no HTTP client does that and waits).
bool peer_gone(int descriptor);

// Ends the connections of idle clients that keep them open for more requests, so that their threads end.
void end_connections(int local_port);

} // namespace turboquant::serve
