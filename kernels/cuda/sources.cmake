# The kernels and the table over them, which nvcc compiles for a card and a C++ compiler for the shim.
set(cuda_sources
    arena.cu
    attention_backward.cu
    attention_forward.cu
    attention_plain.cu
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
