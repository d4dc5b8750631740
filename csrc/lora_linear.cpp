// The whole of a small lora_linear in one call, base matmul included: there PyTorch's matmuls take longer to be called
// than to compute. All other sizes: lora_linear_group.cpp.
#include "buffer.h"
#include "cpu_kernels.h"
#include "tile_sizes.h"

#define PEFT_KERNELS_BODY "lora_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

// No less than what the pieces of either direction take together: of no side are there more than three matrices of each
// width, their rows rounded up to whole vectors, and the masks of x.
Buffer<float> small_buffer(const LoraSizes& sizes) {
  const auto rounded = [](int64_t columns) { return columns + 16; };
  const auto& [m, n, k, r] = sizes;
  return allocate<float>(3 * ((m + n + r) * rounded(k) + (m + k + r + 1) * rounded(n) + (m + n + k) * rounded(r)) +
                         m * (k + 128) + 16 * 16);
}

}  // namespace

void lora_small_forward(const SmallLayer& layer) {
  const auto buffer = small_buffer(layer.sizes);
  PEFT_KERNELS_DISPATCH(small_forward, layer, buffer.get());
}

void lora_small_backward(const SmallLayer& layer, const SmallGradients& grads) {
  const auto buffer = small_buffer(layer.sizes);
  PEFT_KERNELS_DISPATCH(small_backward, layer, grads, buffer.get());
}

}  // namespace peft_kernels
