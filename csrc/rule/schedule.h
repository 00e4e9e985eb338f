// Per-step scalars of RAdam and Lookahead, in float64 from the integer step.
//
// RAdam: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020
// (arXiv:1908.03265), Algorithm 2. Lookahead: Zhang et al., "Lookahead Optimizer: k steps forward,
// 1 step back", NeurIPS 2019 (arXiv:1907.08610), Algorithm 1.
//
// ranger_cuda/backends/schedule.py is the same in Python: the same operations in the same order.
#pragma once

#include <cstdint>

#include "portable.h"

namespace ranger {

// Of one parameter group: ranger_cuda.state.hyperparameters.Hyperparameters, packed into 8 bytes
// each.
struct Hyperparameters {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double rho_threshold;   // rectify above this length of the approximated SMA
  double alpha;           // Lookahead interpolation factor
  double outer_momentum;  // of the slow weights; 0: none
  double low;             // bounds of the parameter; infinite: none
  double high;
  int64_t k;             // Lookahead period in steps; 0: no Lookahead
  double max_grad_norm;  // clip the gradients' total norm to this; infinity: no clipping
  int64_t decoupled_weight_decay;
  int64_t maximize;
  int64_t outer_nesterov;  // 1 or 0
  int64_t seed;
};

// What changes from step to step, for one parameter at its own step t >= 1.
struct Schedule {
  double step_size;  // multiplies the update direction u
  double decay;      // multiplies the parameter: decoupled weight decay
  bool rectified;    // whether the variance of the adaptive learning rate is tractable
  bool sync;         // whether this step ends a Lookahead cycle
};

// base^exponent by multiplications only: pow() differs between host and device.
RANGER_HOST_DEVICE double ipow(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

RANGER_HOST_DEVICE Schedule schedule(const Hyperparameters& h, int64_t step) {
  const double t = static_cast<double>(step);
  const double beta1_t = ipow(h.beta1, step);
  const double beta2_t = ipow(h.beta2, step);
  const double rho_inf = 2.0 / (1.0 - h.beta2) - 1.0;
  const double rho_t = rho_inf - 2.0 * t * beta2_t / (1.0 - beta2_t);
  Schedule s;
  s.rectified = rho_t > h.rho_threshold;
  if (s.rectified) {
    const double r_t = square_root((rho_t - 4.0) * (rho_t - 2.0) * rho_inf /
                                   ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t));
    s.step_size = h.lr * r_t * square_root(1.0 - beta2_t) / (1.0 - beta1_t);
  } else {
    s.step_size = h.lr / (1.0 - beta1_t);
  }
  s.decay = h.decoupled_weight_decay ? 1.0 - h.lr * h.weight_decay : 1.0;
  s.sync = h.k > 0 && step % h.k == 0;
  return s;
}

// What gradients are multiplied by: loss unscale, clip coefficient and sign. `norm` is that of all
// gradients as they are, and a NaN in it is not hidden, as in torch.nn.utils.clip_grad_norm_.
RANGER_HOST_DEVICE double grad_scale(const Hyperparameters& h, double unscale, double norm) {
  double scale = unscale;
  if (h.max_grad_norm < INFINITY) {
    const double coefficient = h.max_grad_norm / (norm * unscale + 1e-6);
    scale = coefficient >= 1.0 ? scale : scale * coefficient;
  }
  return h.maximize ? -scale : scale;
}

// Every scalar of the update rule, each rounded once to the type of the arithmetic. In 8 bytes
// each: they are read where they were written, whatever the type.
template <typename T>
struct Coefficients {
  alignas(8) T grad_scale;
  alignas(8) T weight_decay;  // added to the gradient (L2); 0 when decoupled or off
  alignas(8) T beta1;
  alignas(8) T one_minus_beta1;
  alignas(8) T beta2;
  alignas(8) T one_minus_beta2;
  alignas(8) T eps;
  alignas(8) T decay;
  alignas(8) T step_size;
  alignas(8) T alpha;
  alignas(8) T outer_momentum;
  alignas(8) T outer_nesterov;  // 1 or 0
  alignas(8) T low;
  alignas(8) T high;
};

template <typename T>
RANGER_HOST_DEVICE Coefficients<T> coefficients(const Hyperparameters& h, const Schedule& s,
                                                double grad_scale) {
  return {static_cast<T>(grad_scale),
          static_cast<T>(h.decoupled_weight_decay ? 0.0 : h.weight_decay),
          static_cast<T>(h.beta1),
          static_cast<T>(1.0 - h.beta1),
          static_cast<T>(h.beta2),
          static_cast<T>(1.0 - h.beta2),
          static_cast<T>(h.eps),
          static_cast<T>(s.decay),
          static_cast<T>(s.step_size),
          static_cast<T>(h.alpha),
          static_cast<T>(h.outer_momentum),
          static_cast<T>(h.outer_nesterov),
          static_cast<T>(h.low),
          static_cast<T>(h.high)};
}

}  // namespace ranger
