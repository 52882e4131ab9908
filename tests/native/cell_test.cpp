// Runs a cell of three gates on the CPU kernels, which otherwise run only the LSTM. So code that assumes four gates
// fails here. The forward pass is compared with a plain loop, and the gradients with differences of the forward pass.
#define BIRNN_ISA of_three_gates
#define BIRNN_ISA_BYTES 16
#define BIRNN_ISA_ROWS 3
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/recurrence_kernel.h"

namespace birnn::cpu::of_three_gates {
namespace {

// The LSTM with coupled gates, i = 1 - f, so its gates are f, g, o.
struct Coupled {
  static constexpr int kGates = 3, kValues = 3;
  static constexpr bool kAddsParts = true;

  template <class M, class V>
  static INLINE void activate(V (&values)[kValues]) {
    values[0] = M::sigmoid(values[0]);
    values[1] = M::tanh(values[1]);
    values[2] = M::sigmoid(values[2]);
  }
  template <class M, class V>
  static INLINE V forward(V (&values)[kValues], V& c) {
    activate<M>(values);
    c = values[0] * c + (1. - values[0]) * values[1];
    return values[2] * M::tanh(c);
  }
  template <class M, class V>
  static INLINE void backward(const V (&values)[kValues], V c, V c_prev, V dh, V& dc, V (&dz)[kGates]) {
    const V f = values[0], g = values[1], o = values[2], tanh_c = M::tanh(c);
    dc += dh * o * (1. - tanh_c * tanh_c);
    dz[0] = dc * (c_prev - g) * f * (1. - f);
    dz[1] = dc * (1. - f) * (1. - g * g);
    dz[2] = dh * tanh_c * o * (1. - o);
    dc = dc * f;
  }
  template <class V>
  static INLINE V recurrent(const V (&)[kValues], const V (&dz)[kGates], int gate) {
    return dz[gate];
  }
};

using Values = std::vector<double>;

constexpr int64_t T = 4, B = 5, D = 2, H = 5, I = 3, G = Coupled::kGates, L = kLanes<double>;
constexpr int64_t kBlocks = (H + L - 1) / L, kPanels = (G * kBlocks + kTileVectors - 1) / kTileVectors;
constexpr int64_t kStepsAtOnce = 2, kRowsOfT = T * B * D, kStates = D * B * H;
constexpr int64_t lengths[B] = {4, 0, 2, 4, 1}, longest_first[B] = {0, 3, 2, 4, 1};
constexpr int64_t offsets[T + 1] = {0, 4, 7, 9, 11};  // of slots: the steps of all sequences before t
constexpr int64_t kCount = offsets[T], kCapacity = kCount + 1;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<double, Free> aligned(int64_t values) {  // filled with NaN, to find values that nobody writes
  auto* p = static_cast<double*>(std::aligned_alloc(64, static_cast<size_t>(round_up(values, 8) * 8)));
  for (int64_t k = 0; k < round_up(values, 8); ++k) p[k] = NAN;
  return std::unique_ptr<double, Free>(p);
}

std::mt19937 generator(1);
Values random(int64_t n) {
  Values values(static_cast<size_t>(n));
  for (double& value : values) value = std::uniform_real_distribution<double>(-1, 1)(generator);
  return values;
}

struct Problem {
  Values w_ih = random(D * G * H * I), w_hh = random(D * G * H * H), b_ih = random(D * G * H), b_hh = random(D * G * H);
  Values x = random(T * B * I), h0 = random(kStates), c0 = random(kStates);

  InputProjection input() const {
    InputProjection p{x.data(), I, B * I, I, {}, {}, {}};
    for (int64_t d = 0; d < D; ++d) {
      p.w_ih[d] = &w_ih[d * G * H * I];
      p.bias_ih[d] = &b_ih[d * G * H];
      p.bias_hh[d] = &b_hh[d * G * H];
    }
    return p;
  }
};

// Packs the weights of a direction.
struct Packed {
  bool not_finite = false;
  std::unique_ptr<double, Free> ih = aligned(G * kBlocks * L * packed_rows<double>(I)),
                                hh = aligned(G * kBlocks * L * packed_rows<double>(H)),
                                ih_t = aligned(G * kBlocks * L * round_up(I, L)),
                                hh_t = aligned(G * kBlocks * L * round_up(H, L));
  Panels panels{ih.get(), hh.get(), hh_t.get(), &not_finite, ih_t.get()};

  Packed(const Problem& problem, int64_t d) {
    const double *w_ih = &problem.w_ih[d * G * H * I], *w_hh = &problem.w_hh[d * G * H * H];
    for (int64_t block = 0; block < kBlocks; ++block) {
      pack<Coupled, double>(w_ih, H, I, block, ih.get());
      pack<Coupled, double>(w_hh, H, H, block, hh.get());
    }
    for (int64_t v = 0; v * L < I; ++v) pack_transposed<Coupled, double>(w_ih, H, I, v, ih_t.get());
    for (int64_t v = 0; v * L < H; ++v) pack_transposed<Coupled, double>(w_hh, H, H, v, hh_t.get());
  }
};

struct Results {
  Values y = Values(kRowsOfT * H), h_n = Values(kStates), c_n = Values(kStates), gates = Values(kRowsOfT * G * H),
         cells = Values(kRowsOfT * H);
};

Results forward(const Problem& problem, bool packs_w_ih) {
  Results results;
  ForwardParams p{};
  static_cast<RecurrenceSizes&>(p) = {T, B, D, H};
  p.input = problem.input();
  p.h0 = problem.h0.data(), p.c0 = problem.c0.data(), p.lengths = lengths;
  p.y = results.y.data(), p.h_n = results.h_n.data(), p.c_n = results.c_n.data();
  p.gates = results.gates.data(), p.cells = results.cells.data();
  Barrier barrier;
  const Member member{0, 1, &barrier};
  for (int64_t d = 0; d < D; ++d) {
    Packed packed(problem, d);
    if (!packs_w_ih) packed.panels.ih = nullptr;
    const auto scratch = aligned(Forward<Coupled, double>::scratch(p, B, kStepsAtOnce) / 8);
    const Chain chain{d, longest_first, B, 0, 1, scratch.get()};
    Forward<Coupled, double>(p, chain, packed.panels, kStepsAtOnce, member).run(kStepsAtOnce);
  }
  return results;
}

Results plain_forward(const Problem& p) {
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  Results results;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t b = 0; b < B; ++b) {
      double *h = &results.h_n[(d * B + b) * H], *c = &results.c_n[(d * B + b) * H];
      for (int64_t u = 0; u < H; ++u) h[u] = p.h0[(d * B + b) * H + u], c[u] = p.c0[(d * B + b) * H + u];
      for (int64_t s = 0; s < lengths[b]; ++s) {
        const int64_t t = d == 0 ? s : lengths[b] - 1 - s, row = (t * B + b) * D + d;
        const Values before(h, h + H);
        for (int64_t u = 0; u < H; ++u) {
          double z[G];
          for (int64_t g = 0; g < G; ++g) {
            const int64_t j = (d * G + g) * H + u;
            z[g] = p.b_ih[j] + p.b_hh[j];
            for (int64_t k = 0; k < I; ++k) z[g] += p.w_ih[j * I + k] * p.x[(t * B + b) * I + k];
            for (int64_t k = 0; k < H; ++k) z[g] += p.w_hh[j * H + k] * before[k];
          }
          c[u] = sigmoid(z[0]) * c[u] + (1 - sigmoid(z[0])) * std::tanh(z[1]);
          results.y[row * H + u] = h[u] = sigmoid(z[2]) * std::tanh(c[u]);
        }
      }
    }
  return results;
}

struct Gradients {  // the gradients of sum(y dy) + sum(h_n dh_n) + sum(c_n dc_n)
  Values w_ih = Values(D * G * H * I), w_hh = Values(D * G * H * H), bias = Values(D * G * H), x = Values(T * B * I),
         h0 = Values(kStates), c0 = Values(kStates), d_gates_x = Values(kRowsOfT * G * H, NAN);
};

Gradients backward(const Problem& problem, const Results& results, const Values& dy, const Values& dh_n,
                   const Values& dc_n) {
  Gradients gradients;
  BackwardParams p{};
  static_cast<RecurrenceSizes&>(p) = {T, B, D, H};
  p.input = problem.input();
  p.h0 = problem.h0.data(), p.c0 = problem.c0.data(), p.lengths = lengths;
  p.y = results.y.data(), p.cells = results.cells.data();
  p.dy = dy.data(), p.dy_stride_t = B * D * H, p.dy_stride_b = D * H;
  p.dh_n = dh_n.data(), p.dc_n = dc_n.data();
  p.dh0 = gradients.h0.data(), p.dc0 = gradients.c0.data();
  Barrier barrier;
  const Member member{0, 1, &barrier};
  for (int64_t d = 0; d < D; ++d) {
    Packed packed(problem, d);
    const auto dz = aligned(kPanels * kCapacity * kTileVectors * L);
    const auto run = [&](const Slots& slots) {
      const auto scratch = aligned(Backward<Coupled, double>::scratch(p, B, kStepsAtOnce) / 8);
      const Chain chain{d, longest_first, B, 0, 1, scratch.get()};
      Backward<Coupled, double>(p, chain, packed.panels, slots, kStepsAtOnce, member).run(kStepsAtOnce, 0, T);
    };
    p.gates = results.gates.data(), p.d_gates_x = gradients.d_gates_x.data();
    run(Slots{});
    p.gates = nullptr, p.d_gates_x = nullptr;  // as for a layer: gates are recomputed, dz becomes panels
    run(Slots{dz.get(), kCapacity, 0, offsets});

    std::vector<const void*> x_rows, h_rows;
    std::vector<void*> dx_rows;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < offsets[t + 1] - offsets[t]; ++k) {
        const int64_t b = longest_first[k], before = d == 0 ? t - 1 : t + 1;
        x_rows.push_back(&problem.x[(t * B + b) * I]);
        dx_rows.push_back(&gradients.x[(t * B + b) * I]);
        h_rows.push_back(before >= 0 && before < lengths[b] ? &results.y[((before * B + b) * D + d) * H]
                                                            : &problem.h0[(d * B + b) * H]);
      }
    const int64_t tiles = column_tiles(I, H);
    const auto sums = aligned(tiles * kRows * kPanels * kTileVectors * L);
    const WeightGradient work{dz.get(), kCapacity, kCount, x_rows.data(), h_rows.data(), I,
                              H,        0,         tiles,  sums.get(),    true};
    const WeightGradients<Coupled, double> products{work};
    products.add(nullptr);
    products.store(&gradients.w_ih[d * G * H * I], &gradients.w_hh[d * G * H * H], &gradients.bias[d * G * H]);
    input_gradient<Coupled, double>(dz.get(), kCapacity, H, I, packed.ih_t.get(), true, dx_rows.data(), 0, kCount);
  }
  return gradients;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t k = 0; k < a.size(); ++k) sum += a[k] * b[k];
  return sum;
}

int compare(const char* name, const Values& found, const Values& expected, double tolerance) {
  double worst = 0;
  for (size_t k = 0; k < expected.size(); ++k) {
    const double difference = std::fabs(found[k] - expected[k]);
    worst = difference <= worst ? worst : difference;  // NaN counts
  }
  if (worst <= tolerance) return 0;
  std::printf("FAILED three gates, %s: off by %g, tolerance %g\n", name, worst, tolerance);
  return 1;
}

}  // namespace

int failures() {
  Problem problem;
  const Values dy = random(kRowsOfT * H), dh_n = random(kStates), dc_n = random(kStates);
  const Results expected = plain_forward(problem);
  int failed = 0;
  for (const bool packs_w_ih : {false, true}) {
    const Results results = forward(problem, packs_w_ih);
    failed += compare("y", results.y, expected.y, 1e-12);
    failed += compare("h_n", results.h_n, expected.h_n, 1e-12);
    failed += compare("c_n", results.c_n, expected.c_n, 1e-12);
  }
  const Gradients gradients = backward(problem, forward(problem, true), dy, dh_n, dc_n);
  const auto differences = [&](Values& values) {
    Values slopes;
    for (double& value : values) {
      const double kept = value, step = 1e-5;
      double losses[2];
      for (int k = 0; k < 2; ++k) {
        value = kept + (k == 0 ? step : -step);
        const Results results = forward(problem, true);
        losses[k] = dot(results.y, dy) + dot(results.h_n, dh_n) + dot(results.c_n, dc_n);
      }
      value = kept;
      slopes.push_back((losses[0] - losses[1]) / (2 * step));
    }
    return slopes;
  };
  failed += compare("dw_ih", gradients.w_ih, differences(problem.w_ih), 1e-7);
  failed += compare("dw_hh", gradients.w_hh, differences(problem.w_hh), 1e-7);
  failed += compare("d_bias", gradients.bias, differences(problem.b_hh), 1e-7);
  failed += compare("dx", gradients.x, differences(problem.x), 1e-7);
  failed += compare("dh0", gradients.h0, differences(problem.h0), 1e-7);
  failed += compare("dc0", gradients.c0, differences(problem.c0), 1e-7);
  Values summed(D * G * H);
  for (int64_t row = 0; row < T * B; ++row)
    for (int64_t j = 0; j < D * G * H; ++j) summed[j] += gradients.d_gates_x[row * D * G * H + j];
  return failed + compare("d_gates_x", summed, gradients.bias, 1e-12);
}

}  // namespace birnn::cpu::of_three_gates
