// The update rule, once, for every kernel: gradients are centralized, if at all; RAdam; Lookahead,
// with or without momentum; bounds.
//
// Only + - * / and the square root, each correctly rounded and in this order. Compile without
// contraction (-ffp-contract=off, nvcc -fmad=false): a fused multiply-add rounds once where the
// contract rounds twice. Nothing here loads or stores memory.
#pragma once

#include "portable.h"
#include "schedule.h"

namespace ranger {

// One element's values between load and store.
template <typename T>
struct Element {
  T p;            // parameter
  T m;            // exp_avg
  T v;            // exp_avg_sq
  T root = T(0);  // of the new v
};

// The sum of a slice is that of so many lanes: element i is added to lane i % kLanes, in order and
// from zero; then the upper half of the lanes to the lower, until one is left. Whoever has whole
// lanes has the same bits, however many threads these are.
constexpr int kLanes = 128;

// Gradient centralization (arXiv:2004.01461, equation (1)).
template <typename T>
RANGER_HOST_DEVICE T mean(T sum, int64_t slice) {
  return sum / static_cast<T>(slice);
}
template <typename T>
RANGER_HOST_DEVICE T centralized(T g, T mean) {
  return g - mean;
}

// RAdam (arXiv:1908.03265, Algorithm 2). `l2` and `rectified` are the same for a whole tensor.
template <typename T>
RANGER_HOST_DEVICE Element<T> radam(Element<T> x, T g, const Coefficients<T>& c, bool l2,
                                    bool rectified) {
  g = g * c.grad_scale;
  if (l2) g = g + c.weight_decay * x.p;               // L2, not decoupled
  x.m = c.beta1 * x.m + c.one_minus_beta1 * g;        // line 6: first moment
  x.v = c.beta2 * x.v + c.one_minus_beta2 * (g * g);  // line 5: second moment
  x.root = square_root(x.v);
  T u = x.m;                                  // line 14: un-adapted momentum
  if (rectified) u = x.m / (x.root + c.eps);  // line 12: adaptive
  x.p = x.p * c.decay - c.step_size * u;      // step_size has r_t and the bias terms
  return x;
}

// Lookahead (arXiv:1907.08610, Algorithm 1): the new slow weight, which the fast one goes on from.
// alpha = 1 takes the fast weight itself; slow + (p - slow) may miss it by a rounding.
template <typename T>
RANGER_HOST_DEVICE T lookahead(T p, T slow, T alpha) {
  return alpha == T(1) ? p : slow + alpha * (p - slow);
}

// Lookahead with momentum: SGD's step of the slow weight, whose gradient is the way back to it from
// the fast one (SNOO, arXiv:2510.15830, Algorithm 1). `b`: outer_momentum_buffer.
template <typename T>
RANGER_HOST_DEVICE T outer_step(T p, T slow, T& b, const Coefficients<T>& c) {
  const T d = slow - p;
  b = c.outer_momentum * b + d;
  const T u = c.outer_nesterov != T(0) ? d + c.outer_momentum * b : b;
  return slow - c.alpha * u;
}

// Where a group's bounds leave a parameter. A NaN stays one, as in torch.clamp.
template <typename T>
RANGER_HOST_DEVICE T bounded(T p, const Coefficients<T>& c) {
  return p < c.low ? c.low : p > c.high ? c.high : p;
}

}  // namespace ranger
