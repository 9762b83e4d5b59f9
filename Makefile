# `make help` lists the goals. Each brings what it needs (scripts/setup) and is quick when nothing has changed.
#   PRESET=release|debug  PREFIX=/usr/local  JOBS=<cores>  CI=true: warnings are errors, sanitizers are part of `test`

PRESET ?= release
PREFIX ?= /usr/local
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
BUILD  := build/$(PRESET)
export CI

.DEFAULT_GOAL := build
.PHONY: build run test sanitize install cuda format lint setup clean help

build: setup ## set up and build everything
	@scripts/build $(PRESET) $(JOBS)

run: setup ## set up, build, and show it: one question with an f16 cache and with TurboQuant
	@scripts/build $(PRESET) $(JOBS) tq ggml-turboquant
	@$(BUILD)/bin/tq demo

test: ## set up, build and run all tests (with CI=true the sanitizers' as well)
	@scripts/setup test
	@scripts/test $(PRESET) $(JOBS)

sanitize: setup ## the core's tests under the address, undefined-behaviour and thread sanitizers
	@scripts/test asan-ubsan,tsan $(JOBS)

install: build ## install to PREFIX (default /usr/local; DESTDIR is honoured)
	@cmake --install $(BUILD) --prefix "$(PREFIX)"

cuda: ## compile the GPU library for sm_80 and sm_90a into build/cuda (nvcc from PyPI where there is none)
	@scripts/cuda $(JOBS)

format: ## rewrite the sources as .clang-format says
	@scripts/setup lint
	@scripts/lint --fix

lint: ## clang-format and clang-tidy, changing nothing; FILES="a.cpp ..." for some files only
	@scripts/setup lint
	@scripts/build $(PRESET) $(JOBS) --configure-only
	@scripts/lint $(FILES)

setup: ## only the packages, llama.cpp and the default model
	@scripts/setup run

clean: ## remove build/; what set-up made stays in the cache folder
	@rm -rf build

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
