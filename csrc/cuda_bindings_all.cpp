// All bindings of peft_kernels._cuda as one file to compile: reading pybind11's headers takes longer than anything in them.
#include "cuda_bindings.cpp"
#include "cuda_bindings_bitmap.cpp"
#include "cuda_bindings_csr.cpp"
#include "cuda_bindings_multi_lora.cpp"
#include "cuda_bindings_nf4.cpp"
