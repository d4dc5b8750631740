// All bindings of peft_kernels._cpu as one file to compile: reading pybind11's headers takes longer than anything in them.
#include "cpu_bindings.cpp"
#include "cpu_bindings_block.cpp"
#include "cpu_bindings_csr.cpp"
#include "cpu_bindings_mask.cpp"
#include "cpu_bindings_multi_lora.cpp"
#include "cpu_bindings_nf4.cpp"
#include "cpu_bindings_sparse_delta.cpp"
