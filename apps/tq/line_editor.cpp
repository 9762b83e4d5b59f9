#include "line_editor.h"

#include "options.h"
#include "terminal.h"

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cwchar>
#include <filesystem>
#include <iostream>

#include <poll.h>
#include <unistd.h>

#include <histedit.h>

namespace turboquant::app {

namespace fs = std::filesystem;

struct LineEditor::Impl {
    EditLine* editor = nullptr;
    History* history = nullptr;
    std::string history_file;
    std::string prompt;

    static char* show_prompt(EditLine* editor) {
        void* self = nullptr;
        el_get(editor, EL_CLIENTDATA, &self);
        return static_cast<Impl*>(self)->prompt.data();
    }

    // One character. libedit's own way to read would miss a Ctrl-C that comes just before it waits.
    static int read_character(EditLine* /*editor*/, wchar_t* character) {
        std::mbstate_t state{};
        for (;;) {
            pollfd files[2] = {{STDIN_FILENO, POLLIN, 0}, {interrupt_fd(), POLLIN, 0}};
            const int ready = poll(files, 2, -1);
            if (ready < 0) {
                if (errno == EINTR) {
                    continue; // Ctrl-C has made the pipe readable by now; other signals are none of ours
                }
                return -1;
            }
            if (files[1].revents != 0) {
                errno = EINTR;
                return -1;
            }
            char byte = 0;
            const ssize_t n = ::read(STDIN_FILENO, &byte, 1);
            if (n <= 0) {
                return static_cast<int>(n);
            }
            const size_t length = std::mbrtowc(character, &byte, 1, &state);
            if (length == static_cast<size_t>(-1)) {
                state = {}; // no character of this encoding: skip the byte
            } else if (length != static_cast<size_t>(-2)) {
                return 1;
            }
        }
    }
};

LineEditor::LineEditor(const std::string& history_file) : impl_(std::make_unique<Impl>()) {
    impl_->history_file = history_file;
    if (isatty(STDIN_FILENO) == 0 || (isatty(STDERR_FILENO) == 0 && isatty(STDOUT_FILENO) == 0)) {
        return;
    }
    // Line editing counts characters in the terminal's encoding; everything else stays in the C locale.
    if (std::setlocale(LC_CTYPE, "") == nullptr || std::string(std::setlocale(LC_CTYPE, nullptr)) == "C") {
        std::setlocale(LC_CTYPE, "C.UTF-8");
    }
    FILE* echo = isatty(STDERR_FILENO) != 0 ? stderr : stdout; // stdout is for answers where it can be
    impl_->editor = el_init("tq", stdin, echo, stderr);
    impl_->history = history_init();
    if (impl_->editor == nullptr || impl_->history == nullptr) {
        return;
    }
    HistEvent event;
    history(impl_->history, &event, H_SETSIZE, 1000);
    history(impl_->history, &event, H_SETUNIQUE, 1);
    std::error_code ignored;
    if (!history_file.empty() && fs::exists(history_file, ignored)) {
        history(impl_->history, &event, H_LOAD, history_file.c_str());
    }
    el_set(impl_->editor, EL_CLIENTDATA, impl_.get());
    el_set(impl_->editor, EL_PROMPT, &Impl::show_prompt);
    el_set(impl_->editor, EL_EDITOR, "emacs");
    el_set(impl_->editor, EL_HIST, ::history, impl_->history);
    el_set(impl_->editor, EL_GETCFN, &Impl::read_character);
    el_source(impl_->editor, nullptr);
}

LineEditor::~LineEditor() {
    if (impl_->history != nullptr) {
        history_end(impl_->history);
    }
    if (impl_->editor != nullptr) {
        el_end(impl_->editor);
    }
}

bool LineEditor::interactive() const {
    return impl_->editor != nullptr && impl_->history != nullptr;
}

LineEditor::Result LineEditor::read(const std::string& prompt, std::string& line) {
    line.clear();
    if (!interactive()) {
        return std::getline(std::cin, line) ? Result::line : Result::end;
    }
    impl_->prompt = prompt;
    int count = 0;
    // Before the prompt, not after it as libedit does: what is typed in between would be echoed twice.
    el_set(impl_->editor, EL_PREP_TERM, 1);
    errno = 0;
    const char* text = el_gets(impl_->editor, &count);
    if (text == nullptr || count <= 0) {
        const bool interrupted = count < 0 && errno == EINTR;
        el_reset(impl_->editor);
        std::fputs("\n", stderr);
        return interrupted ? Result::interrupted : Result::end;
    }
    line.assign(text, static_cast<size_t>(count));
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) {
        line.pop_back();
    }
    return Result::line;
}

void LineEditor::remember(const std::string& line) {
    if (!interactive() || line.find_first_not_of(" \t") == std::string::npos) {
        return;
    }
    HistEvent event;
    history(impl_->history, &event, H_ENTER, line.c_str());
    if (impl_->history_file.empty()) {
        return;
    }
    // Saved line by line, so that nothing is lost however the program ends. Failing to is no reason to stop talking.
    std::error_code ignored;
    const fs::path file(impl_->history_file);
    if (fs::create_directories(file.parent_path(), ignored)) {
        fs::permissions(file.parent_path(), fs::perms::owner_all, ignored);
    }
    history(impl_->history, &event, H_SAVE, impl_->history_file.c_str());
}

std::string history_path() {
    if (const auto state = environment("XDG_STATE_HOME")) {
        return *state + "/turboquant/chat_history";
    }
    const auto home = environment("HOME");
    return home ? *home + "/.local/state/turboquant/chat_history" : std::string();
}

} // namespace turboquant::app
