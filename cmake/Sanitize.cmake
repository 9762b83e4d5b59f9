# -DTURBOQUANT_SANITIZE=address,undefined or thread: for the whole build. The presets use it for the core only, since
# an uninstrumented libllama would report its own.
set(TURBOQUANT_SANITIZE "" CACHE STRING "Sanitizers, as for -fsanitize=: 'address,undefined' or 'thread'")
set(TURBOQUANT_TEST_LAUNCHER "")
if(TURBOQUANT_SANITIZE)
    add_compile_options(-fsanitize=${TURBOQUANT_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    add_link_options(-fsanitize=${TURBOQUANT_SANITIZE})
    if(TURBOQUANT_SANITIZE MATCHES "undefined")
        add_compile_options(-fsanitize=float-cast-overflow) # NaN or a huge value turned into a code
    endif()
    # The thread sanitizer's fixed shadow addresses collide with kernels that randomise more than 28 bits of mmap.
    if(TURBOQUANT_SANITIZE MATCHES "thread")
        find_program(TURBOQUANT_SETARCH setarch)
        if(TURBOQUANT_SETARCH)
            execute_process(COMMAND ${TURBOQUANT_SETARCH} -R true RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
            if(NOT failed)
                set(TURBOQUANT_TEST_LAUNCHER ${TURBOQUANT_SETARCH} -R)
            endif()
            unset(failed)
        endif()
    endif()
endif()
