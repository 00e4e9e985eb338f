// Steps plans through the emulated kernels and through a plain loop over the same rule, and
// compares every byte of every buffer after every step: elements, the gaps of strided layouts, what
// lies before and behind, and gradients, which nothing may write. Prints the first difference and
// exits with 1. The argument "brief" leaves out what takes long with a sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "memory_and_plans.h"
#include "rule/radam_lookahead.h"

namespace ranger {
namespace {

class Check {
 public:
  Check(const Case& of, uint32_t seed) : case_(of), random_(seed) {
    for (int i = 0; i < of.groups; ++i) hypers_.push_back(draw_group());
    for (int i = 0; i < of.rows; ++i) add_row();
  }

  // What differs first; nothing if all is as it should be.
  std::string run() {
    for (step_ = 1; step_ <= case_.steps; ++step_) {
      draw_gradients();
      draw_signals();
      const bool alone = step_ % 5 == 4;  // the interpolation, as after another optimizer's step
      for (cuda::Launcher& launcher : alone ? alone_ : fused_) {
        const Devices devices(step_);
        launcher.prepare(all_);
        const Buffer scratch(0, launcher.scratch_size());
        launcher.launch(all_, hypers_, signals_, scratch.data(), nullptr);
        const std::string found = devices.difference(launcher.device());
        if (!found.empty()) return found;
      }
      for (int i = 0; i < case_.rows; ++i) expect_step(i, alone);
      std::string found = difference(alone ? "interpolation" : "step");
      if (found.empty() && step_ % 7 == 3) {
        for (cuda::Launcher& launcher : alone ? alone_ : fused_) {
          const Devices devices(step_);
          launcher.swap(nullptr);
          found = devices.difference(launcher.device());
          if (!found.empty()) return found;
        }
        for (int i = 0; i < case_.rows; ++i) expect_swap(i);
        found = difference("swap");
      }
      if (!found.empty()) return found;
    }
    const Devices devices(0);
    for (cuda::Launcher& launcher : fused_) launcher = cuda::Launcher(Rule::kRadam, 0, 0);
    return devices.difference(0);
  }

 private:
  Hyperparameters draw_group() {
    Hyperparameters h = {};
    h.beta1 = random_.of({0.0, 0.9, 0.95});
    h.beta2 = random_.of({0.5, 0.99, 0.999});
    h.eps = random_.of({1e-8, 1e-5});
    h.weight_decay = random_.of({0.0, 0.01, 0.3});
    h.rho_threshold = random_.of({4.0, 5.0});
    h.alpha = random_.of({0.0, 0.3, 0.5, 1.0});
    h.k = random_.of<int64_t>({0, 1, 2, 5});
    h.outer_momentum = random_.of({0.0, 0.0, 0.5, 0.9});
    h.outer_nesterov = random_.one_in(2);
    h.low = random_.of<double>({-INFINITY, -INFINITY, -0.5, 0.0});
    h.high = random_.of<double>({INFINITY, INFINITY, 0.25, 1.0});
    h.max_grad_norm = random_.of<double>({INFINITY, 0.5, 1e6});
    h.decoupled_weight_decay = random_.one_in(2);
    h.maximize = random_.one_in(3);
    return h;
  }

  void add_row() {
    TensorRow row;
    row.launcher =
        case_.mixed && random_.one_in(4) ? static_cast<int32_t>(random_.below(3)) - 1 : 0;
    row.group = static_cast<int32_t>(random_.below(case_.groups));
    row.format = case_.mixed && random_.one_in(3) ? FormatId::kFloat64 : FormatId::kFloat32;
    row.grad_dtype = case_.mixed && random_.one_in(2)
                         ? static_cast<DType>(random_.below(kGradDTypes))
                         : info_of(row.format).value;
    const bool strided = random_.below(3) < case_.strided;
    Layout layout;
    if (strided) {
      for (int64_t dim = 2 + random_.below(3); dim > 0; --dim) {
        const int64_t most = case_.max_numel > 0 ? 8 : 2;
        layout.sizes.push_back(random_.one_in(30) ? 0 : 1 + random_.below(most));
      }
    } else {
      const int64_t chunks = cuda::kChunkSize * random_.below(5);
      const int64_t any = random_.below(case_.max_numel);
      const int64_t drawn = random_.of<int64_t>({0, 1, 3, 7, any, any, chunks, chunks + any % 9});
      layout.sizes = {std::min(drawn, case_.max_numel)};
    }
    row.numel = 1;
    for (int64_t size : layout.sizes) row.numel *= size;
    const bool has_slow = hypers_[row.group].k > 0 && !random_.one_in(6);
    const int64_t slices = strided ? layout.sizes[0] : 1 + random_.below(5);
    if (random_.one_in(3) && row.numel > 0 && row.numel % slices == 0) {
      row.slice = row.numel / slices;
    }

    Parameter parameter;
    // All streams on a boundary, all beside it alike, one of them otherwise, or each as it comes.
    const int64_t kind = random_.below(4);
    const int64_t alike = kind == 0 ? 0 : random_.below(4);
    parameter.misalignment.fill(alike);
    if (kind == 2) parameter.misalignment[random_.below(kStreams)] = alike + 1;
    if (kind == 3) {
      for (int64_t& misalignment : parameter.misalignment) misalignment = random_.below(4);
    }
    const bool has_momentum = has_slow && hypers_[row.group].outer_momentum != 0.0;
    const auto has = [&](int stream) {
      return stream == kSlowParam ? has_slow : stream != kOuterMomentumBuffer || has_momentum;
    };
    constexpr Stream kOfState[] = {kParam, kExpAvg, kExpAvgSq, kSlowParam, kOuterMomentumBuffer};
    for (int stream : kOfState) {
      const bool otherwise = strided && has(stream) && random_.one_in(2);
      if (otherwise) layout.strides[stream] = draw_strides(random_, layout, false);
    }
    if (strided) {
      layout.strides[kGrad] = draw_strides(random_, layout, true);
      row.layout = std::make_shared<Layout>(layout);
    }
    for (int stream : kOfState) {
      if (has(stream)) make_stream(row, parameter, stream);
    }
    parameter.step = Buffer(0, sizeof(float));
    const float step = random_.of({0.0f, 0.0f, 4.0f, 1000.0f});
    std::memcpy(parameter.step.expected(), &step, sizeof(step));
    parameter.step.publish();
    row.step = reinterpret_cast<float*>(parameter.step.data());
    rows_.push_back(std::move(row));
    parameters_.push_back(std::move(parameter));
  }

  // New memory with new values for a stream.
  void make_stream(TensorRow& row, Parameter& parameter, int stream) {
    const std::vector<int64_t> offsets = element_offsets(row, stream);
    int64_t extent = 0;
    for (int64_t offset : offsets) extent = std::max(extent, offset + 1);
    const DType dtype = stored(row, stream);
    const int64_t item = info_of(dtype).item_size;
    const int64_t beside = parameter.misalignment[stream] * item;
    Buffer buffer(beside % 16, extent * item);
    for (int64_t offset : offsets) {
      double value = random_.number();
      if (stream == kExpAvgSq) value = std::fabs(value);
      if (dtype == DType::kFloat64) {
        reinterpret_cast<double*>(buffer.expected())[offset] = value;
      } else if (dtype == DType::kFloat32) {
        reinterpret_cast<float*>(buffer.expected())[offset] = static_cast<float>(value);
      } else {  // any bits but those of infinity and NaN
        const auto bits = static_cast<uint16_t>(random_.below(0x7800) | random_.below(2) << 15);
        reinterpret_cast<uint16_t*>(buffer.expected())[offset] = bits;
      }
    }
    buffer.publish();
    row.data[stream] = buffer.data();
    parameter.streams[stream] = std::move(buffer);
  }

  // Elsewhere in every step. A row without one keeps the address of the last: nothing is there.
  void draw_gradients() {
    for (size_t i = 0; i < rows_.size(); ++i) {
      Parameter& parameter = parameters_[i];
      rows_[i].active = !random_.one_in(5);
      if (rows_[i].active) {
        if (rows_[i].layout && random_.one_in(40)) {
          Layout layout = *rows_[i].layout;
          layout.strides[kGrad] = draw_strides(random_, layout, true);
          rows_[i].layout = std::make_shared<Layout>(layout);
          ++all_.version;
        }
        make_stream(rows_[i], parameter, kGrad);
      } else {
        parameter.streams[kGrad] = Buffer();
      }
    }
  }

  cuda::DeviceScalar on_device(double value, bool as_float64) {
    scalars_.emplace_back(0, as_float64 ? sizeof(double) : sizeof(float));
    const float rounded = static_cast<float>(value);
    std::memcpy(scalars_.back().expected(),
                as_float64 ? static_cast<void*>(&value) : const_cast<float*>(&rounded),
                as_float64 ? sizeof(double) : sizeof(float));
    scalars_.back().publish();
    return {scalars_.back().data(), as_float64};
  }

  void draw_signals() {
    scalars_.clear();
    signals_ = {};
    found_inf_ = false;
    unscale_ = 1.0;
    if (step_ % 3 == 0) {
      const float loss_scale = random_.of({0.25f, 1024.0f, 3.0f});
      signals_.grad_scale = on_device(loss_scale, random_.one_in(2));
      unscale_ = 1.0 / static_cast<double>(loss_scale);
    }
    if (step_ % 2 == 0) {
      found_inf_ = step_ % 4 == 2;
      signals_.found_inf = on_device(found_inf_ ? 1.0 : 0.0, false);
    }
    const bool as_float64 = random_.one_in(2);
    norm_ = random_.of({0.01, 0.7, 123.0});
    signals_.norm = on_device(norm_, as_float64);
    if (!as_float64) norm_ = static_cast<double>(static_cast<float>(norm_));
    for (Hyperparameters& hyper : hypers_) {
      const int64_t kind = random_.below(3);
      const double lr = random_.of({1e-3, 0.03, 0.3});
      hyper.lr = kind == 2 ? lr : NAN;  // not to be used where the device has one
      signals_.lr.push_back(kind == 2 ? cuda::DeviceScalar() : on_device(lr, kind == 1));
    }
  }

  // --- the same without kernels ------------------------------------------------------------------

  Hyperparameters hyper_of(int i) const {
    Hyperparameters hyper = hypers_[rows_[i].group];
    const cuda::DeviceScalar& lr = signals_.lr[rows_[i].group];
    if (lr.data != nullptr) hyper.lr = lr.read();
    return hyper;
  }

  void expect_step(int i, bool alone) {
    if (rows_[i].launcher == kNobody || !rows_[i].active || found_inf_) return;
    float step;
    std::memcpy(&step, parameters_[i].step.expected(), sizeof(step));
    step += 1.0f;
    std::memcpy(parameters_[i].step.expected(), &step, sizeof(step));
    rows_[i].format == FormatId::kFloat64 ? expect_elements<double>(i, step, alone)
                                          : expect_elements<float>(i, step, alone);
  }

  template <typename T>
  void expect_elements(int i, float step, bool alone) {
    const Hyperparameters hyper = hyper_of(i);
    const Schedule now = ranger::schedule(hyper, static_cast<int64_t>(step));
    const auto c = coefficients<T>(hyper, now, grad_scale(hyper, unscale_, norm_));
    const bool sync = now.sync && parameters_[i].streams[kSlowParam];
    std::array<std::vector<int64_t>, kStreams> at;
    for (int stream = 0; stream < kStreams; ++stream) at[stream] = offsets_of(i, stream);
    const auto element = [&](int stream, int64_t index) -> T& {
      return reinterpret_cast<T*>(parameters_[i].streams[stream].expected())[at[stream][index]];
    };
    const auto gradient = [&](int64_t index) {
      return by_grad_dtype(rows_[i].grad_dtype, [&](auto zero) {
        using Stored = decltype(zero);
        const char* const bytes = parameters_[i].streams[kGrad].expected();
        Stored value;
        std::memcpy(&value, bytes + at[kGrad][index] * sizeof(value), sizeof(value));
        return Plain<Stored>::template decode<T>(value);
      });
    };
    const int64_t slice = rows_[i].slice;
    T mean = T(0);
    for (int64_t index = 0; index < rows_[i].numel; ++index) {
      T& p = element(kParam, index);
      if (!alone) {
        if (slice != 0 && index % slice == 0) {
          T lanes[kLanes] = {};
          for (int64_t j = 0; j < slice; ++j) lanes[j % kLanes] += gradient(index + j);
          for (int left = kLanes / 2; left > 0; left /= 2) {
            for (int lane = 0; lane < left; ++lane) lanes[lane] += lanes[left + lane];
          }
          mean = ranger::mean(lanes[0], slice);
        }
        const T g = slice != 0 ? ranger::centralized(gradient(index), mean) : gradient(index);
        T& m = element(kExpAvg, index);
        T& v = element(kExpAvgSq, index);
        const Element<T> x =
            ranger::radam(Element<T>{p, m, v}, g, c, c.weight_decay != T(0), now.rectified);
        p = x.p;
        m = x.m;
        v = x.v;
      }
      if (sync) {
        const T slow = element(kSlowParam, index);
        p = parameters_[i].streams[kOuterMomentumBuffer]
                ? ranger::outer_step(p, slow, element(kOuterMomentumBuffer, index), c)
                : ranger::lookahead(p, slow, c.alpha);
      }
      if (!alone) p = ranger::bounded(p, c);
      if (sync) element(kSlowParam, index) = p;
    }
  }

  void expect_swap(int i) {
    const TensorRow& row = rows_[i];
    Parameter& parameter = parameters_[i];
    if (row.launcher == kNobody || !parameter.streams[kSlowParam]) return;
    const size_t item = info_of(stored(row, kParam)).item_size;
    const std::vector<int64_t> p = offsets_of(i, kParam), slow = offsets_of(i, kSlowParam);
    for (int64_t index = 0; index < row.numel; ++index) {
      char* const a = parameter.streams[kParam].expected() + p[index] * item;
      std::swap_ranges(a, a + item, parameter.streams[kSlowParam].expected() + slow[index] * item);
    }
  }

  std::vector<int64_t> offsets_of(int i, int stream) const {
    return element_offsets(rows_[i], stream);
  }

  // --- comparison --------------------------------------------------------------------------------

  std::string difference(const char* after) const {
    for (int i = 0; i < case_.rows; ++i) {
      const TensorRow& row = rows_[i];
      const auto at = [&](const char* stream) {
        return std::string(case_.name) + ", step " + std::to_string(step_) + ", after the " +
               after + ", row " + std::to_string(i) + " (launcher " + std::to_string(row.launcher) +
               ", " + info_of(row.format).name + ", gradient " + info_of(row.grad_dtype).name +
               ", " + std::to_string(row.numel) + " elements" +
               (cuda::is_strided(row) ? ", strided" : "") +
               (row.slice != 0 ? ", slices of " + std::to_string(row.slice) : "") + "), " + stream +
               ": ";
      };
      for (int stream = 0; stream < kStreams; ++stream) {
        const std::string found = parameters_[i].streams[stream].difference();
        if (!found.empty()) return at(kStreamNames[stream]) + found;
      }
      const std::string found = parameters_[i].step.difference();
      if (!found.empty()) return at("step") + found;
    }
    for (const Buffer& scalar : scalars_) {
      if (!scalar.difference().empty()) return "a scalar was written";
    }
    return "";
  }

  const Case case_;
  Random random_;
  std::vector<Hyperparameters> hypers_;
  Rows all_;
  std::vector<TensorRow>& rows_ = all_.rows;
  std::vector<Parameter> parameters_;
  std::array<cuda::Launcher, 2> fused_ = {cuda::Launcher(Rule::kRadam, 0, 0),
                                          cuda::Launcher(Rule::kRadam, 1, 1)};
  std::array<cuda::Launcher, 2> alone_ = {cuda::Launcher(Rule::kLookahead, 0, 0),
                                          cuda::Launcher(Rule::kLookahead, 1, 1)};

  int step_ = 0;
  std::vector<Buffer> scalars_;
  cuda::Signals signals_;
  bool found_inf_ = false;
  double unscale_ = 1.0;
  double norm_ = 0.0;
};

// Rows of all kinds, and arguments of each size: more groups, and more rows, than a schedule takes,
// and a few words more than fit the smallest.
constexpr Case kCases[] = {
    {"kinds", 60, 4, 20, true, 1, 5 * cuda::kChunkSize},
    {"few", 44, 1, 15, false, 1, 2 * cuda::kChunkSize},
    {"groups", 600, 400, 5, true, 1, 20},
    {"rows", 4200, 2, 3, false, 0, 1},
    {"strided", 100, 2, 3, false, 3, 0},
};
constexpr Case kBriefCases[] = {{"brief", 40, 35, 15, true, 1, 3 * cuda::kChunkSize}};

template <size_t kCount>
int run(const Case (&cases)[kCount]) {
  uint32_t seed = 0;
  for (const Case& of : cases) {
    const std::string found = Check(of, seed++).run();
    if (found.empty()) continue;
    std::printf("%s\n", found.c_str());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace ranger

int main(int argc, char** argv) {
  try {
    const bool brief = argc > 1 && std::strcmp(argv[1], "brief") == 0;
    return brief ? ranger::run(ranger::kBriefCases) : ranger::run(ranger::kCases);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
