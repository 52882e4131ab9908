// Runs the CPU kernels without PyTorch, for sanitizers and emulated CPUs. Every buffer is its own allocation of the
// exact size, so that AddressSanitizer sees each access beyond it. Results are compared with a plain loop over time,
// units and weights. tools/native_test builds and runs this program.
#include "cpu/recurrence.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/cells.h"
#include "cpu/isa.h"

namespace birnn {
int cell_failures();  // cell_test.cpp
}

namespace {

using birnn::CellKind;
using birnn::DType;

std::mt19937 generator(1);

#if defined(__aarch64__)
using float16 = __fp16;
#else
using float16 = _Float16;
#endif

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(double x) {  // truncation is good enough for random inputs
    const auto single = static_cast<float>(x);
    uint32_t wide;
    std::memcpy(&wide, &single, sizeof(wide));
    bits = static_cast<uint16_t>(std::isnan(single) ? 0x7fc0 : wide >> 16);
  }
  operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float single;
    std::memcpy(&single, &wide, sizeof(single));
    return single;
  }
};

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Runs all threads at once, as OpenMP does. Sometimes there are fewer than asked for.
int64_t parallel(int64_t asked, const std::function<void(int64_t)>& work) {
  const int64_t got = asked > 2 && integer(0, 3) == 0 ? asked - 1 : asked;
  if (got < asked) return got;
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < got; ++k) threads.emplace_back([=, &work] { work(k); });
  for (auto& thread : threads) thread.join();
  return got;
}

template <class S>
std::unique_ptr<S[]> random(int64_t n, double scale) {
  auto values = std::make_unique<S[]>(n);
  for (int64_t k = 0; k < n; ++k) values[k] = static_cast<S>(uniform(-scale, scale));
  return values;
}

// Fills memory with a value that a test would notice if a kernel read it uninitialised.
template <class S>
std::unique_ptr<S[]> unset(int64_t n) {
  auto values = std::make_unique<S[]>(n);
  for (int64_t k = 0; k < n; ++k) values[k] = static_cast<S>(NAN);
  return values;
}

int failures = 0;

template <class S>
void compare(const char* name, const S* found, const std::vector<double>& expected, double tolerance) {
  double worst = 0;
  for (size_t k = 0; k < expected.size(); ++k) {
    const double difference = std::fabs(static_cast<double>(found[k]) - expected[k]);
    worst = difference <= worst ? worst : difference;  // NaN counts
  }
  if (!(worst <= tolerance)) {
    std::printf("FAILED %s: off by %g, tolerance %g\n", name, worst, tolerance);
    ++failures;
  }
}

// Checks one random problem in type S, with the accumulation type A. As a layer, it includes the input projection. The
// function is long because it follows one problem from its buffers to the comparison.
template <class S, class A>
void check(CellKind cell, DType dtype, double tolerance, bool as_layer = false) {
  const bool own_c = !birnn::state_is_output(cell), plain = !birnn::saves_values(cell);
  const int64_t G = birnn::gates_of(cell), V = birnn::values_of(cell), size = integer(0, 9);
  const bool large = size == 0, single = size > 7;  // a single step, with a row or three and whole vectors of features
  const int64_t T = large ? integer(20, 40) : single ? 1 : integer(1, 7), D = integer(1, 2);
  const int64_t B = integer(1, large ? 80 : single ? 3 : 15), H = integer(1, 40);
  const int64_t I = single ? 16 * integer(1, 5) : integer(1, 20), rows = T * B * D, states = D * B * H;
  const bool state = integer(0, 1), ragged = integer(0, 1), bias = integer(0, 1), recompute = as_layer && integer(0, 1);

  const auto w_hh = random<S>(D * G * H * H, 1 / std::sqrt(H)), w_ih = random<S>(D * G * H * I, 1 / std::sqrt(I));
  const auto b_ih = random<S>(D * G * H, 1), b_hh = random<S>(D * G * H, 1), x = random<S>(T * B * I, 1);
  const auto gates_x = random<S>(rows * G * H, 2), h0 = random<S>(states, 1), own_c0 = random<S>(states, 1);
  auto lengths = std::make_unique<int64_t[]>(B);
  for (int64_t b = 0; b < B; ++b) lengths[b] = ragged ? integer(0, T) : T;
  const auto y = unset<S>(rows * H), h_n = unset<S>(states), own_c_n = unset<S>(states), gates = unset<S>(rows * V * H);
  const auto own_cells = unset<A>(rows * H);
  const bool apart = V > G;
  const S* const c0 = own_c ? own_c0.get() : h0.get();
  S* const c_n = own_c ? own_c_n.get() : h_n.get();
  const auto cells = [&](int64_t k) { return own_c ? double(own_cells[k]) : double(y[k]); };

  const auto b_hh_alone = [&](int64_t j) { return !own_c && bias ? double(b_hh[j]) : 0; };
  if (as_layer)  // the kernels compute these themselves
    for (int64_t t = 0; t < T; ++t)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t d = 0; d < D; ++d)
          for (int64_t j = 0; j < G * H; ++j) {
            double z = bias ? double(b_ih[d * G * H + j]) + (own_c ? double(b_hh[d * G * H + j]) : 0) : 0;
            for (int64_t k = 0; k < I; ++k) z += double(w_ih[(d * G * H + j) * I + k]) * double(x[(t * B + b) * I + k]);
            gates_x[((t * B + b) * D + d) * G * H + j] = static_cast<S>(z);
          }
  birnn::InputProjection input{};
  if (as_layer) input = {x.get(), I, B * I, I, {}, {}, {}};
  birnn::ForwardParams forward{};
  static_cast<birnn::RecurrenceSizes&>(forward) = {T, B, D, H};
  for (int64_t d = 0; d < D; ++d) {
    forward.w_hh[d] = w_hh.get() + d * G * H * H;
    input.w_ih[d] = w_ih.get() + d * G * H * I;
    if (bias && as_layer) input.bias_ih[d] = b_ih.get() + d * G * H;
    if (bias && (as_layer || !own_c)) input.bias_hh[d] = b_hh.get() + d * G * H;
  }
  forward.input = input;
  if (!as_layer) forward.gates_x = gates_x.get();
  if (state) forward.h0 = h0.get(), forward.c0 = c0;
  if (ragged) forward.lengths = lengths.get();
  forward.h_n = h_n.get(), forward.c_n = c_n;
  const auto unsaved_y = unset<S>(rows * H);
  forward.y = unsaved_y.get();  // without anything saved
  birnn::cpu::recurrence_forward(cell, dtype, forward, integer(1, 5), parallel);
  forward.y = y.get();
  if (!plain) forward.gates = gates.get();
  if (own_c) forward.cells = own_cells.get();
  birnn::cpu::recurrence_forward(cell, dtype, forward, integer(1, 5), parallel);

  const auto dy = random<S>(rows * H, 1), dh_n = random<S>(states, 1), dc_n = random<S>(states, 1);
  const auto d_gates_x = unset<S>(rows * G * H), d_q = unset<S>(rows * H), dh0 = unset<S>(states),
             dc0 = unset<S>(states);
  const auto dw_ih = unset<S>(D * G * H * I), dw_hh = unset<S>(D * G * H * H), d_bias_ih = unset<S>(D * G * H),
             d_bias_hh = unset<S>(D * G * H);
  const auto dx = std::make_unique<S[]>(T * B * I);
  birnn::BackwardParams backward{};
  static_cast<birnn::RecurrenceSizes&>(backward) = {T, B, D, H};
  backward.input = input;
  for (int64_t d = 0; d < D; ++d) backward.w_hh[d] = forward.w_hh[d];
  if (state) backward.h0 = h0.get(), backward.c0 = c0;
  if (ragged) backward.lengths = lengths.get();
  if (plain || !recompute) backward.gates = plain ? y.get() : gates.get();
  backward.cells = own_c ? static_cast<const void*>(own_cells.get()) : y.get();
  backward.dy = dy.get(), backward.dh_n = dh_n.get();
  backward.dy_stride_t = B * D * H, backward.dy_stride_b = D * H;
  backward.dh0 = dh0.get();
  if (own_c) backward.dc_n = dc_n.get(), backward.dc0 = dc0.get();
  if (as_layer) {
    backward.y = y.get(), backward.dx = dx.get();
    for (int64_t d = 0; d < D; ++d) {
      backward.dw_ih[d] = dw_ih.get() + d * G * H * I;
      backward.dw_hh[d] = dw_hh.get() + d * G * H * H;
      backward.d_bias_ih[d] = d_bias_ih.get() + d * G * H;
      backward.d_bias_hh[d] = d_bias_hh.get() + d * G * H;
    }
  } else {
    backward.d_gates_x = d_gates_x.get();
    if (apart) backward.d_q = d_q.get();
  }
  birnn::cpu::recurrence_backward(cell, dtype, backward, integer(1, 5), parallel);

  // These plain loops compute the same. The backward loop reads the kernels' saved gates and cells, as the kernels do.
  std::vector<double> want_y(rows * H), want_h(states), want_c(states), want_dz(rows * G * H), want_dq(rows * H),
      want_dh(states), want_dc(states), want_dx(T * B * I), want_dw_ih(D * G * H * I), want_dw_hh(D * G * H * H),
      want_bias_ih(D * G * H), want_bias_hh(D * G * H);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(H), c(H), dh(H), dc(H);
      const int64_t s0 = (d * B + b) * H;
      const auto row = [&](int64_t s) { return ((d == 0 ? s : lengths[b] - 1 - s) * B + b) * D + d; };
      for (int64_t u = 0; u < H; ++u) h[u] = state ? double(h0[s0 + u]) : 0, c[u] = state ? double(c0[s0 + u]) : 0;
      for (int64_t s = 0; s < lengths[b]; ++s) {
        const std::vector<double> before = h;
        for (int64_t u = 0; u < H; ++u) {
          double z[4], q[4];  // input and recurrent parts
          for (int64_t g = 0; g < G; ++g) {
            z[g] = gates_x[row(s) * G * H + g * H + u];
            q[g] = b_hh_alone(d * G * H + g * H + u);
            for (int64_t k = 0; k < H; ++k) q[g] += double(w_hh[(d * G * H + g * H + u) * H + k]) * before[k];
          }
          if (plain) {
            h[u] = c[u] = cell == CellKind::rnn_tanh ? std::tanh(z[0] + q[0]) : std::fmax(z[0] + q[0], 0);
          } else if (!own_c) {
            const double r = sigmoid(z[0] + q[0]), keep = sigmoid(z[1] + q[1]);
            h[u] = c[u] = (1 - keep) * std::tanh(z[2] + r * q[2]) + keep * before[u];
          } else {
            c[u] = sigmoid(z[1] + q[1]) * c[u] + sigmoid(z[0] + q[0]) * std::tanh(z[2] + q[2]);
            h[u] = sigmoid(z[3] + q[3]) * std::tanh(c[u]);
          }
          want_y[row(s) * H + u] = h[u];
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        want_h[s0 + u] = h[u], want_c[s0 + u] = c[u];
        dh[u] = dh_n[s0 + u], dc[u] = own_c ? double(dc_n[s0 + u]) : 0;
      }
      for (int64_t s = lengths[b] - 1; s >= 0; --s) {
        const int64_t r = row(s), step = r / D;  // step counts (t, b)
        const auto saved = [&](int64_t value, int64_t u) { return double(gates[(r * V + value) * H + u]); };
        double* dz = &want_dz[r * G * H];
        for (int64_t u = 0; u < H; ++u) {
          const double c_before = s > 0 ? cells(row(s - 1) * H + u) : state ? double(c0[s0 + u]) : 0;
          const double dh_u = dh[u] + dy[r * H + u];
          if (plain) {
            const double h_u = cells(r * H + u);
            dz[u] = dh_u * (cell == CellKind::rnn_tanh ? 1 - h_u * h_u : h_u > 0);
            dh[u] = 0;
          } else if (!own_c) {
            const double reset = saved(0, u), keep = saved(1, u), n = saved(2, u);
            dz[2 * H + u] = dh_u * (1 - keep) * (1 - n * n);
            want_dq[r * H + u] = dz[2 * H + u] * reset;
            dz[u] = dz[2 * H + u] * saved(3, u) * reset * (1 - reset);
            dz[H + u] = dh_u * (c_before - n) * keep * (1 - keep);
            dh[u] = dh_u * keep;
          } else {
            const double i = saved(0, u), f = saved(1, u), g = saved(2, u), o = saved(3, u),
                         tanh_c = std::tanh(cells(r * H + u)), dc_u = dc[u] + dh_u * o * (1 - tanh_c * tanh_c);
            dz[u] = dc_u * g * i * (1 - i);
            dz[H + u] = dc_u * c_before * f * (1 - f);
            dz[2 * H + u] = dc_u * i * (1 - g * g);
            dz[3 * H + u] = dh_u * tanh_c * o * (1 - o);
            dc[u] = dc_u * f;
            dh[u] = 0;
          }
        }
        for (int64_t j = 0; j < G * H; ++j) {
          const int64_t weight = d * G * H + j;
          const double recurrent = apart && j >= 2 * H ? want_dq[r * H + j - 2 * H] : dz[j];
          want_bias_ih[weight] += dz[j];
          want_bias_hh[weight] += recurrent;
          for (int64_t k = 0; k < H; ++k) {
            dh[k] += double(w_hh[weight * H + k]) * recurrent;
            const double h_before = s > 0 ? double(y[row(s - 1) * H + k]) : state ? double(h0[s0 + k]) : 0;
            want_dw_hh[weight * H + k] += recurrent * h_before;
          }
          for (int64_t k = 0; k < I; ++k) {
            want_dx[step * I + k] += double(w_ih[weight * I + k]) * dz[j];
            want_dw_ih[weight * I + k] += dz[j] * double(x[step * I + k]);
          }
        }
      }
      for (int64_t u = 0; u < H; ++u) want_dh[s0 + u] = dh[u], want_dc[s0 + u] = dc[u];
    }
  compare("y", y.get(), want_y, tolerance);
  compare("y without saving", unsaved_y.get(), std::vector<double>(y.get(), y.get() + rows * H), 0);
  compare("h_n", h_n.get(), want_h, tolerance);
  compare("c_n", c_n, want_c, tolerance);
  compare("dh0", dh0.get(), want_dh, tolerance);
  if (own_c) compare("dc0", dc0.get(), want_dc, tolerance);
  if (!as_layer) {
    if (apart) compare("d_q", d_q.get(), want_dq, tolerance);
    return compare("d_gates_x", d_gates_x.get(), want_dz, tolerance);
  }
  const auto compare_sums = [&](const char* name, const S* found, const std::vector<double>& expected) {
    double largest = 1;  // these are sums over all steps and sequences
    for (double value : expected) largest = std::max(largest, std::fabs(value));
    compare(name, found, expected, tolerance * largest);
  };
  compare_sums("dx", dx.get(), want_dx);
  compare_sums("dw_ih", dw_ih.get(), want_dw_ih);
  compare_sums("dw_hh", dw_hh.get(), want_dw_hh);
  compare_sums("d_bias_ih", d_bias_ih.get(), want_bias_ih);
  compare_sums("d_bias_hh", d_bias_hh.get(), want_bias_hh);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--isas") {
    for (const std::string& isa : birnn::cpu::runnable_isas()) std::printf("%s\n", isa.c_str());
    return 0;
  }
  failures += birnn::cell_failures();
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  for (int round = 0; round < rounds; ++round)
    for (const CellKind cell : birnn::kCells)
      for (const bool as_layer : {false, true}) {
        check<double, double>(cell, DType::f64, 1e-12, as_layer);
        check<float, float>(cell, DType::f32, 2e-5, as_layer);
        check<float16, float>(cell, DType::f16, 4e-3, as_layer);
        check<bfloat16, float>(cell, DType::bf16, 3e-2, as_layer);
        if (birnn::cpu::has_high_precision()) check<float, float>(cell, DType::f32_high, 1e-4, as_layer);
      }
  std::printf("%s: %d rounds, %d failures\n", birnn::cpu::chosen_isa().c_str(), rounds, failures);
  return failures != 0;
}
