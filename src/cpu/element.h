// Rows of any dtype as floats and back, element by element: for what is too little work for an instruction set.
#pragma once

#define STROBE_ISA baseline
#include "cpu/simd.h"
#undef STROBE_ISA

namespace strobe::cpu {

inline i64 element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Calls f with a null pointer to elements of dtype.
template <class F>
void with_element_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f16:
      return f(static_cast<baseline::f16*>(nullptr));
    case DType::bf16:
      return f(static_cast<baseline::bf16*>(nullptr));
  }
}

inline void load_row(DType dtype, const void* from, i64 n, float* to) {
  with_element_type(dtype, [&]<class T>(T*) {
    for (i64 c = 0; c < n; ++c) to[c] = baseline::widen(static_cast<const T*>(from)[c]);
  });
}

inline void store_row(DType dtype, const float* from, i64 n, void* to) {
  with_element_type(dtype, [&]<class T>(T*) {
    for (i64 c = 0; c < n; ++c) baseline::narrow(static_cast<T*>(to)[c], from[c]);
  });
}

}  // namespace strobe::cpu
