# Tests of libturboquant_cuda: label `gpu`. Without a GPU they are skipped, in words; cuda_layout_test needs none.
tq_add_test(cuda_layout_test SOURCES cuda_layout_test.cpp LABELS core)
tq_add_test(cuda_test SOURCES cuda_encode_test.cpp cuda_attention_test.cpp cuda_prefill_test.cpp LABELS gpu
    LIBS turboquant_cuda CUDA::cudart_static)
