# The kernels and the table over them, which nvcc compiles for a card and a C++ compiler for the shim.
set(cuda_sources
    arena.cu
    attention_backward.cu
    attention_forward.cu
    attention_plain.cu
    attention_wgmma.cu
    backend.cu
    decode.cu
    dequantise.cu
    gradients.cu
    head.cu
    noise.cu
    rows.cu
    segments.cu
    serve.cu
    weights.cu)

# cuda.h: the host may choose what only code for sm_90a has.
if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
  add_compile_definitions($<$<COMPILE_LANGUAGE:CUDA>:CUDA_SM_90A>)
endif()
