# What scripts/setup found or made: llama.cpp, the Python environment, the models. The presets point TURBOQUANT_ENV at
# the file it writes; without one (plain `cmake -B ...`) everything is found, or given with -D, as usual.

set(TURBOQUANT_ENV "" CACHE FILEPATH "The file that scripts/setup wrote (build/env.cmake)")
set(TURBOQUANT_DEFAULT_MODEL "" CACHE FILEPATH "GGUF that tq loads when the user names none")

set(TURBOQUANT_ENV_LLAMA_DIR "") # folder of llama-config.cmake
set(TURBOQUANT_ENV_GGML_DIR "")
set(TURBOQUANT_ENV_PYTHON "")    # has llama_cpp, numpy, and for the tests gguf and pytest
set(TURBOQUANT_ENV_SMOLLM2 "")   # models
set(TURBOQUANT_ENV_GEMMA "")
set(TURBOQUANT_ENV_LLAMA_SERVER "")
set(TURBOQUANT_ENV_OPENAI_PYTHON "") # has the openai client
set(TURBOQUANT_ENV_TORCH_PYTHON "")  # has PyTorch
if(TURBOQUANT_ENV AND EXISTS "${TURBOQUANT_ENV}")
    include("${TURBOQUANT_ENV}") # ninja configures anew when it changes
endif()

# Results of find_package live in the cache: forget them when set-up has moved to another llama.cpp.
if(NOT "${TURBOQUANT_ENV_LLAMA_DIR}" STREQUAL "" AND
   NOT "${TURBOQUANT_ENV_LLAMA_DIR}" STREQUAL "${TURBOQUANT_LAST_LLAMA_DIR}")
    unset(llama_LIBRARY CACHE)
    set(llama_DIR "${TURBOQUANT_ENV_LLAMA_DIR}" CACHE PATH "" FORCE)
    set(ggml_DIR "${TURBOQUANT_ENV_GGML_DIR}" CACHE PATH "" FORCE)
    set(TURBOQUANT_LAST_LLAMA_DIR "${TURBOQUANT_ENV_LLAMA_DIR}" CACHE INTERNAL "")
endif()
if(NOT "${TURBOQUANT_ENV_SMOLLM2}" STREQUAL "${TURBOQUANT_LAST_MODEL}")
    set(TURBOQUANT_DEFAULT_MODEL "${TURBOQUANT_ENV_SMOLLM2}" CACHE FILEPATH "" FORCE)
    set(TURBOQUANT_LAST_MODEL "${TURBOQUANT_ENV_SMOLLM2}" CACHE INTERNAL "")
endif()

# Run by ctest before the tests; an environment variable that is already set wins.
set(TURBOQUANT_TEST_ENVIRONMENT "${PROJECT_BINARY_DIR}/test_environment.cmake")
set(content "")
foreach(name IN ITEMS PYTHON SMOLLM2 GEMMA LLAMA_SERVER OPENAI_PYTHON TORCH_PYTHON)
    if(TURBOQUANT_ENV_${name})
        string(APPEND content "if(NOT DEFINED ENV{TQ_TEST_${name}})\n"
                              "  set(ENV{TQ_TEST_${name}} [==[${TURBOQUANT_ENV_${name}}]==])\n"
                              "endif()\n")
    endif()
endforeach()
file(WRITE "${TURBOQUANT_TEST_ENVIRONMENT}" "${content}")
unset(content)
