// Takes the place of csrc/simd/each.h in a copy of the sources (avx512_model.py): one body, that of AVX-512, whose
// instructions are what the vendor's manual says of them, lane by lane. It runs on processors with AVX2.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "../numeric.h"
#include "../philox.h"

namespace peft_kernels::model {

template <class T, class Vector>
struct Lanes {
  T lane[sizeof(Vector) / sizeof(T)];

  Lanes() = default;
  explicit Lanes(Vector value) { std::memcpy(lane, &value, sizeof value); }
  Vector vector() const {
    Vector value;
    std::memcpy(&value, lane, sizeof value);
    return value;
  }
};

// VPMOVZXBD
inline __m512i cvtepu8_epi32(__m128i bytes) {
  const Lanes<uint8_t, __m128i> from(bytes);
  Lanes<uint32_t, __m512i> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = from.lane[i];
  return to.vector();
}

// VPERMPS: the low 4 bits of an index count.
inline __m512 permutexvar_ps(__m512i index, __m512 values) {
  const Lanes<uint32_t, __m512i> at(index);
  const Lanes<float, __m512> from(values);
  Lanes<float, __m512> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = from.lane[at.lane[i] & 15];
  return to.vector();
}

// VPERMT2PS: the low 4 bits of an index, and the next one for which of the two.
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  const Lanes<uint32_t, __m512i> at(index);
  const Lanes<float, __m512> from_a(a), from_b(b);
  Lanes<float, __m512> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = (at.lane[i] & 16 ? from_b : from_a).lane[at.lane[i] & 15];
  return to.vector();
}

// VPERMW: the low 5 bits of an index count.
inline __m512i permutexvar_epi16(__m512i index, __m512i values) {
  const Lanes<uint16_t, __m512i> at(index), from(values);
  Lanes<uint16_t, __m512i> to;
  for (int i = 0; i < 32; ++i) to.lane[i] = from.lane[at.lane[i] & 31];
  return to.vector();
}

// VPMULUDQ
inline __m512i mul_epu32(__m512i a, __m512i b) {
  const Lanes<uint64_t, __m512i> left(a), right(b);
  Lanes<uint64_t, __m512i> to;
  for (int i = 0; i < 8; ++i) to.lane[i] = (left.lane[i] & 0xFFFFFFFFu) * (right.lane[i] & 0xFFFFFFFFu);
  return to.vector();
}

// VCVTPH2PS and VCVTPS2PH, all lanes, round to nearest.
inline __m512 maskz_cvtph_ps(unsigned, __m256i halves) {
  const Lanes<uint16_t, __m256i> from(halves);
  Lanes<float, __m512> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = float_from_float16(from.lane[i]);
  return to.vector();
}
inline __m256i maskz_cvtps_ph(unsigned, __m512 values, int) {
  const Lanes<float, __m512> from(values);
  Lanes<uint16_t, __m256i> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = float16_from_float(from.lane[i]);
  return to.vector();
}

// VINSERTF32X8 and VEXTRACTF32X8, all lanes: the low bit of `half` counts.
inline __m512 insertf32x8(__m512 values, __m256 part, int half) {
  Lanes<__m256, __m512> to(values);
  to.lane[half & 1] = part;
  return to.vector();
}
inline __m256 maskz_extractf32x8_ps(unsigned, __m512 values, int half) {
  return Lanes<__m256, __m512>(values).lane[half & 1];
}

template <class... Ints>
inline __m512i setr_epi32(Ints... values) {
  Lanes<int32_t, __m512i> to{};
  int i = 0;
  ((to.lane[i++] = values), ...);
  return to.vector();
}

}  // namespace peft_kernels::model

#undef _mm512_maskz_cvtps_ph
#undef _mm512_setr_epi32
#undef _mm512_insertf32x8
#undef _mm512_maskz_extractf32x8_ps
#define _mm512_cvtepu8_epi32 ::peft_kernels::model::cvtepu8_epi32
#define _mm512_permutexvar_ps ::peft_kernels::model::permutexvar_ps
#define _mm512_permutex2var_ps ::peft_kernels::model::permutex2var_ps
#define _mm512_permutexvar_epi16 ::peft_kernels::model::permutexvar_epi16
#define _mm512_mul_epu32 ::peft_kernels::model::mul_epu32
#define _mm512_maskz_cvtph_ps ::peft_kernels::model::maskz_cvtph_ps
#define _mm512_maskz_cvtps_ph ::peft_kernels::model::maskz_cvtps_ph
#define _mm512_insertf32x8 ::peft_kernels::model::insertf32x8
#define _mm512_maskz_extractf32x8_ps ::peft_kernels::model::maskz_extractf32x8_ps
#define _mm512_setr_epi32 ::peft_kernels::model::setr_epi32

#define PEFT_KERNELS_VECTOR_BYTES 64
namespace peft_kernels::avx512 {
#include "vector.h"
#include PEFT_KERNELS_BODY
}  // namespace peft_kernels::avx512

#undef PEFT_KERNELS_DISPATCH
#define PEFT_KERNELS_DISPATCH(function, ...) avx512::function(__VA_ARGS__)
