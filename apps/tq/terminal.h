// What goes to people: colours, progress, Ctrl-C. Everything here writes to stderr.
#pragma once

#include "llm/model.h"

#include <atomic>
#include <string>

namespace turboquant::app {

// stderr is a terminal, NO_COLOR is not set and TERM is not "dumb".
bool colours();
std::string dim(const std::string& text);
std::string bold(const std::string& text);
std::string red(const std::string& text);

// "tq: message" on stderr.
void print_error(const std::string& message);
// A dim line on stderr.
void print_note(const std::string& message);

// "what 43%", redrawn in place and wiped at the end; nothing where stderr is no terminal.
llm::Progress progress(const std::string& what);

// Ctrl-C sets the flag; a second one before take_interrupt() ends the program.
void catch_interrupts();
const std::atomic<bool>& interrupt_flag();
// Readable after a Ctrl-C, until take_interrupt(): for poll(). -1 before catch_interrupts().
int interrupt_fd();
// Was there one? Clears it, unless the program is to end.
bool take_interrupt();

// SIGTERM and SIGHUP (the terminal is gone) count as a Ctrl-C that lasts and end the input, so that what is to be saved can be. A
// second one ends the program. After catch_interrupts().
void catch_termination();
bool termination_requested();

} // namespace turboquant::app
