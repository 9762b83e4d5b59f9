// Lines from the user: edited, with history kept between runs (libedit), or plain where stdin is no terminal.
#pragma once

#include <memory>
#include <string>

namespace turboquant::app {

class LineEditor {
public:
    enum class Result { line, end, interrupted };

    // history_file: created with its folders when the first line is kept; empty: none.
    explicit LineEditor(const std::string& history_file);
    ~LineEditor();
    LineEditor(const LineEditor&) = delete;
    LineEditor& operator=(const LineEditor&) = delete;

    bool interactive() const;
    // One line without its newline. interrupted: Ctrl-C while typing; end: Ctrl-D on an empty line, or end of file.
    Result read(const std::string& prompt, std::string& line);
    void remember(const std::string& line);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// $XDG_STATE_HOME/turboquant/chat_history, else under ~/.local/state; empty if there is no home.
std::string history_path();

} // namespace turboquant::app
