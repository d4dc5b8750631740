// act(gate) * up and its gradients on a run of one row; included by each.h once per vector width.
//
// The coefficients were fitted here, to the least maximum of the relative error in float64: e^f is within 0.1 rounding
// errors of float32 on |f| <= ln(2) / 2, the two halves of Phi (the normal distribution) within 0.2.

inline Floats select(Ints condition, Floats yes, Floats no) {
  return bits_as<Floats>((condition & bits_as<Ints>(yes)) | (~condition & bits_as<Ints>(no)));
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int count>
inline Floats polynomial(const float (&c)[count], Floats x) {
  Floats sum = splat(c[count - 1]);
  for (int i = count - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// 2^n for integers n in float, |n| <= 254; beyond a float's exponents it becomes infinite or subnormal, as it should.
inline Floats power_of_two(Floats n) {
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  return bits_as<Floats>((half + 127) << 23) * bits_as<Floats>((whole - half + 127) << 23);
}

inline Floats exponential(Floats x) {
  constexpr float kQuotient[] = {4.999999345e-01f, 1.666652069e-01f, 4.166838737e-02f, 8.368709843e-03f,
                                 1.381461298e-03f};
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  x = select(x < -110.0f, splat(-110.0f), x);
  x = select(x > 90.0f, splat(90.0f), x);
  const Floats n = (x * 1.44269504f + kRounding) - kRounding;
  const Floats f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first of few bits
  return (f * f * polynomial(kQuotient, f) + f + 1.0f) * power_of_two(n);
}

struct Sigmoid {
  Floats value, complement;  // 1 - value, without cancellation
};

inline Sigmoid sigmoid(Floats x) {
  const Ints negative = x < 0.0f;
  const Floats small = exponential(select(negative, x, -x)), larger = 1.0f / (1.0f + small), smaller = small * larger;
  return {select(negative, smaller, larger), select(negative, larger, smaller)};
}

struct Gate {
  Floats value, slope;
};

struct Silu {
  static Gate at(Floats x) {
    const Sigmoid sigma = sigmoid(x);
    const Floats value = x * sigma.value;
    return {value, sigma.value + value * sigma.complement};
  }
};

// x / 2 (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static Gate at(Floats x) {
    constexpr float kDouble = 1.595769122f, kCube = 0.044715f;
    const Floats square = x * x;
    const Sigmoid sigma = sigmoid(kDouble * x * (1.0f + kCube * square));
    const Floats value = x * sigma.value;
    return {value, sigma.value + value * sigma.complement * (kDouble + (3.0f * kDouble * kCube) * square)};
  }
};

// x Phi(x)
struct Gelu {
  static Gate at(Floats x) {
    constexpr float kCentre[] = {3.989422794e-01f, -6.649035742e-02f, 9.973410213e-03f, -1.186907263e-03f,
                                 1.148108686e-04f, -8.942562404e-06f, 4.527906272e-07f};  // (Phi(x) - 1/2) / x in x^2
    constexpr float kTail[] = {-1.628698655e-06f, 3.990931197e-01f, 9.917113111e-01f,  2.207801178e+00f,
                               1.894837006e+00f,  1.148852657e+01f, -4.829028810e+01f, 4.421734160e+01f};
    const Floats size = select(x < 0.0f, -x, x), bell = exponential(-0.5f * x * x);
    const Floats tail = bell * polynomial(kTail, 1.0f / (size + 2.5f));  // Phi(-|x|) from |x| = 1.3 on
    const Floats outside = select(x < 0.0f, tail, 1.0f - tail);
    const Floats phi = select(size < 1.3f, 0.5f + x * polynomial(kCentre, x * x), outside);
    return {x * phi, phi + x * bell * 0.3989422804f};
  }
};

template <class Visitor>
inline void with_activation(int activation, Visitor visit) {
  if (activation == kSilu) visit(Silu{});
  if (activation == kGelu) visit(Gelu{});
  if (activation == kGeluTanh) visit(GeluTanh{});
}

// Calls step(i, count) for whole vectors and for what is left.
template <class Step>
inline void for_vectors(int64_t columns, Step step) {
  int64_t i = 0;
  for (; i + kFloats <= columns; i += kFloats) step(i, std::integral_constant<int, kFloats>{});
  if (i < columns) step(i, static_cast<int>(columns - i));
}

template <class Type, class Count>
inline Floats load_some(const typename Type::Storage* source, Count count) {
  if (count == kFloats) return Type::load_floats(source);
  typename Type::Storage values[kFloats] = {};
  std::memcpy(values, source, count * sizeof values[0]);
  return Type::load_floats(values);
}

template <class Type, class Count>
inline void store_some(typename Type::Storage* target, Floats value, Count count) {
  if (count == kFloats) return Type::store_floats(target, value);
  typename Type::Storage values[kFloats];
  Type::store_floats(values, value);
  std::memcpy(target, values, count * sizeof values[0]);
}

inline void gated_forward_run(int activation, int dtype, const void* gate, const void* up, void* out, int64_t columns) {
  with_activation(activation, [&](auto act) {
    with_type(dtype, [&](auto type) {
      using Type = decltype(type);
      using Storage = typename Type::Storage;
      const auto *g = static_cast<const Storage*>(gate), *u = static_cast<const Storage*>(up);
      auto* h = static_cast<Storage*>(out);
      for_vectors(columns, [&](int64_t i, auto count) {
        const Gate act_of_gate = decltype(act)::at(load_some<Type>(g + i, count));
        store_some<Type>(h + i, act_of_gate.value * load_some<Type>(u + i, count), count);
      });
    });
  });
}

inline void gated_backward_run(int activation, int dtype, const void* grad_h, const void* gate, const void* up,
                               void* grad_gate, void* grad_up, int64_t columns) {
  with_activation(activation, [&](auto act) {
    with_type(dtype, [&](auto type) {
      using Type = decltype(type);
      using Storage = typename Type::Storage;
      const auto *g = static_cast<const Storage*>(gate), *u = static_cast<const Storage*>(up);
      const auto* dh = static_cast<const Storage*>(grad_h);
      auto *dg = static_cast<Storage*>(grad_gate), *du = static_cast<Storage*>(grad_up);
      for_vectors(columns, [&](int64_t i, auto count) {
        const Gate act_of_gate = decltype(act)::at(load_some<Type>(g + i, count));
        const Floats grad = load_some<Type>(dh + i, count);
        store_some<Type>(dg + i, grad * load_some<Type>(u + i, count) * act_of_gate.slope, count);
        store_some<Type>(du + i, grad * act_of_gate.value, count);
      });
    });
  });
}
