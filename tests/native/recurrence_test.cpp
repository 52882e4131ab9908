// The CPU kernels without PyTorch: for sanitizers, and for CPUs that are only emulated. Every buffer is its own
// allocation of the exact size, so that AddressSanitizer sees each access beyond one. Results are compared with a plain
// loop over time, units and weights. tools/native_test builds and runs it.
#include "cpu/recurrence.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/isa.h"

namespace {

using birnn::DType;

std::mt19937 generator(1);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Threads as PyTorch would lend them: tasks dealt to three of them.
void parallel_for(int64_t n, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < 3; ++first)
    threads.emplace_back([=, &task] {
      for (int64_t k = first; k < n; k += 3) task(k);
    });
  for (auto& thread : threads) thread.join();
}

template <class S>
std::unique_ptr<S[]> random(int64_t n, double scale) {
  auto values = std::make_unique<S[]>(n);
  for (int64_t k = 0; k < n; ++k) values[k] = static_cast<S>(uniform(-scale, scale));
  return values;
}

// What uninitialised memory must not look like.
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

// One random problem in type S (A: its accumulation type).
template <class S, class A>
void check(DType dtype, double tolerance) {
  const int64_t T = integer(1, 7), B = integer(1, 15), D = integer(1, 2), H = integer(1, 40);
  const bool state = integer(0, 1), ragged = integer(0, 1);
  const int64_t rows = T * B * D, states = D * B * H;

  const auto gates_x = random<S>(rows * 4 * H, 2), w_hh = random<S>(D * 4 * H * H, 1 / std::sqrt(H));
  const auto h0 = random<S>(states, 1), c0 = random<S>(states, 1);
  auto lengths = std::make_unique<int64_t[]>(B);
  for (int64_t b = 0; b < B; ++b) lengths[b] = ragged ? integer(0, T) : T;
  const auto y = unset<S>(rows * H), h_n = unset<S>(states), c_n = unset<S>(states), gates = unset<S>(rows * 4 * H);
  const auto cells = unset<A>(rows * H);

  birnn::ForwardParams forward{{T, B, D, H},
                               gates_x.get(),
                               w_hh.get(),
                               state ? h0.get() : nullptr,
                               state ? c0.get() : nullptr,
                               ragged ? lengths.get() : nullptr,
                               y.get(),
                               h_n.get(),
                               c_n.get(),
                               gates.get(),
                               cells.get()};
  birnn::cpu::recurrence_forward(dtype, forward, integer(1, 5), parallel_for);

  const auto dy = random<S>(rows * H, 1), dh_n = random<S>(states, 1), dc_n = random<S>(states, 1);
  const auto d_gates_x = unset<S>(rows * 4 * H), dh0 = unset<S>(states), dc0 = unset<S>(states);
  birnn::BackwardParams backward{{T, B, D, H},
                                 w_hh.get(),
                                 state ? c0.get() : nullptr,
                                 ragged ? lengths.get() : nullptr,
                                 gates.get(),
                                 cells.get(),
                                 dy.get(),
                                 dh_n.get(),
                                 dc_n.get(),
                                 d_gates_x.get(),
                                 dh0.get(),
                                 dc0.get()};
  birnn::cpu::recurrence_backward(dtype, backward, integer(1, 5), parallel_for);

  // The same, plainly. In backward the saved gates and cells are the truth, as they are for the kernels.
  std::vector<double> want_y(rows * H), want_h(states), want_c(states), want_dz(rows * 4 * H), want_dh(states),
      want_dc(states);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(H), c(H), dh(H), dc(H);
      const int64_t s0 = (d * B + b) * H;
      const auto row = [&](int64_t s) { return ((d == 0 ? s : lengths[b] - 1 - s) * B + b) * D + d; };
      for (int64_t u = 0; u < H; ++u) h[u] = state ? double(h0[s0 + u]) : 0, c[u] = state ? double(c0[s0 + u]) : 0;
      for (int64_t s = 0; s < lengths[b]; ++s) {
        const std::vector<double> before = h;
        for (int64_t u = 0; u < H; ++u) {
          double z[4];
          for (int g = 0; g < 4; ++g) {
            z[g] = gates_x[row(s) * 4 * H + g * H + u];
            for (int64_t k = 0; k < H; ++k) z[g] += double(w_hh[(d * 4 * H + g * H + u) * H + k]) * before[k];
          }
          c[u] = sigmoid(z[1]) * c[u] + sigmoid(z[0]) * std::tanh(z[2]);
          h[u] = sigmoid(z[3]) * std::tanh(c[u]);
          want_y[row(s) * H + u] = h[u];
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        want_h[s0 + u] = h[u], want_c[s0 + u] = c[u];
        dh[u] = dh_n[s0 + u], dc[u] = dc_n[s0 + u];
      }
      for (int64_t s = lengths[b] - 1; s >= 0; --s) {
        const int64_t r = row(s);
        double* dz = &want_dz[r * 4 * H];
        for (int64_t u = 0; u < H; ++u) {
          const double i = gates[r * 4 * H + u], f = gates[r * 4 * H + H + u], g = gates[r * 4 * H + 2 * H + u],
                       o = gates[r * 4 * H + 3 * H + u], tanh_c = std::tanh(double(cells[r * H + u]));
          const double c_before = s > 0 ? double(cells[row(s - 1) * H + u]) : state ? double(c0[s0 + u]) : 0;
          const double dh_u = dh[u] + dy[r * H + u], dc_u = dc[u] + dh_u * o * (1 - tanh_c * tanh_c);
          dz[u] = dc_u * g * i * (1 - i);
          dz[H + u] = dc_u * c_before * f * (1 - f);
          dz[2 * H + u] = dc_u * i * (1 - g * g);
          dz[3 * H + u] = dh_u * tanh_c * o * (1 - o);
          dc[u] = dc_u * f;
        }
        for (int64_t k = 0; k < H; ++k) {
          dh[k] = 0;
          for (int64_t j = 0; j < 4 * H; ++j) dh[k] += double(w_hh[(d * 4 * H + j) * H + k]) * dz[j];
        }
      }
      for (int64_t u = 0; u < H; ++u) want_dh[s0 + u] = dh[u], want_dc[s0 + u] = dc[u];
    }
  compare("y", y.get(), want_y, tolerance);
  compare("h_n", h_n.get(), want_h, tolerance);
  compare("c_n", c_n.get(), want_c, tolerance);
  compare("d_gates_x", d_gates_x.get(), want_dz, tolerance);
  compare("dh0", dh0.get(), want_dh, tolerance);
  compare("dc0", dc0.get(), want_dc, tolerance);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  for (int round = 0; round < rounds; ++round) {
    check<double, double>(DType::f64, 1e-12);
    check<float, float>(DType::f32, 2e-5);
    check<_Float16, float>(DType::f16, 2e-2);
  }
  std::printf("%s: %d rounds, %d failures\n", birnn::cpu::chosen_kernels().isa, rounds, failures);
  return failures != 0;
}
