// Runs the persistent kernels in a program without PyTorch, for tests that the operators can't express:
//   rows      runs every kernel of the tables once, against the cell's equations in double precision
//   steps     runs one pass each way, of an LSTM or a GRU. With -DBIRNN_WITHOUT_BARRIER, which drops the barriers
//   between steps, a race
//             detector must report it
//   passes    runs grid with fewer groups than there are, which must give the same bits as all at once
//   resident  prints how many CTAs of a multiprocessor, and clusters, the device can run of what was compiled
// tests/test_cuda_persistent.py runs this program.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/cells/gru.h"
#include "core/cells/lstm.h"
#include "core/step_order.h"
#include "cuda/persistent/kernels.h"

using namespace birnn;
using namespace birnn::cuda;

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct HostMath {
  using Scalar = double;
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double tanh(double x) { return std::tanh(x); }
};

// Numbers on the device and, rounded to the type, on the host. They are never freed, as the program is short.
template <class S>
struct Numbers {
  S* device = nullptr;
  std::vector<double> host;

  Numbers(size_t count, double scale) : host(count) {
    std::vector<S> values(count);
    static unsigned state = 1;
    for (size_t i = 0; i < count; ++i) {
      state = state * 1664525 + 1013904223;
      values[i] = S(float(scale * ((state >> 8) / double(1 << 23) - 1)));
      host[i] = double(float(values[i]));
    }
    check(cudaMalloc(&device, count * sizeof(S) + 1), "cudaMalloc");
    check(cudaMemcpy(device, values.data(), count * sizeof(S), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  // Returns what the device holds now, as numbers; bits() returns its bits.
  std::vector<double> now() const {
    std::vector<S> values(host.size());
    check(cudaMemcpy(values.data(), device, values.size() * sizeof(S), cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::vector<double> numbers(values.size());
    for (size_t i = 0; i < values.size(); ++i) numbers[i] = double(float(values[i]));
    return numbers;
  }
};

template <class Plan>
int resident(DType dtype, const Plan& plan) {
  int count = 0;
  check(persistent_resident(dtype, plan, &count), "persistent_resident");
  return count;
}

template <class Cell>
constexpr CellKind kKind = std::is_same_v<Cell, Lstm> ? CellKind::lstm : CellKind::gru;

// A layer's arguments and results: y, h_n, c_n, gates, cells; d_gates_x, dh0, dc0, d_q. Where a cell's state is its
// output, c0 is h0, y has the cells, and there are no c_n, dc_n and dc0.
template <class S, class Cell>
struct Layer {
  static constexpr int kSize = sizeof(S), kGates = Cell::kGates, kValues = Cell::kValues;
  static constexpr bool kStateIsOutput = Cell::kStateIsOutput;
  DType dtype;
  RecurrenceSizes n;
  size_t outputs, states;
  std::vector<int64_t> lengths;
  int64_t* device_lengths = nullptr;
  Numbers<S> gates_x, w_hh, bias_ih, bias_hh, h0, c0, dy, dh_n, dc_n;
  std::vector<std::vector<double>> results;

  Layer(DType type, int64_t T, int64_t B, int64_t D, int64_t H, bool ragged)
      : dtype(type),
        n{T, B, D, H},
        outputs(T * B * D * H),
        states(D * B * H),
        gates_x(outputs * kGates, 1),
        w_hh(D * kGates * H * H, 1.5 / std::sqrt(double(H))),
        bias_ih(D * kGates * H, 0.5),
        bias_hh(D * kGates * H, 0.5),
        h0(states, 1),
        c0(states, 1),
        dy(outputs, 1),
        dh_n(states, 1),
        dc_n(states, kStateIsOutput ? 0 : 1) {
    if (kStateIsOutput) c0 = h0;
    if (!ragged) return;
    for (int64_t b = 0; b < B; ++b) lengths.push_back((b * 7 + 3) % (T + 1));
    check(cudaMalloc(&device_lengths, B * 8), "cudaMalloc");
    check(cudaMemcpy(device_lengths, lengths.data(), B * 8, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  // Limits a plan's groups of CTAs to `most`, if that is given.
  template <class Params>
  void place(Params& p, int turns, int sequences, int most, int64_t bytes) const {
    p.groups = int(n.D * divide_up(n.B, turns * sequences));
    if (most && p.groups > most) p.groups = most;
    p.access = kPiece;
    while (n.H * kSize % p.access) p.access /= 2;
    p.full_float32 = true;
    p.lengths = device_lengths;
    for (int d = 0; d < n.D; ++d) p.w_hh[d] = w_hh.device + d * kGates * n.H * n.H;
    if (p.plan.exchange != Exchange::grid) return;
    const int64_t groups = int64_t(p.groups) * turns;
    check(cudaMalloc(&p.grid.buffers, groups * 2 * bytes), "cudaMalloc");
    check(cudaMalloc(&p.grid.arrivals, groups * kCounter), "cudaMalloc");
    check(cudaMemset(p.grid.arrivals, 0, groups * kCounter), "cudaMemset");
    p.grid.bytes = int(bytes);
  }

  void run(const ForwardPlan& forward, const BackwardPlan& backward, int most_groups = 0) {
    if (!resident(dtype, forward) || !resident(dtype, backward)) check(cudaErrorInvalidConfiguration, "resident");
    Numbers<S> y(outputs, 0), h_n(states, 0), c_n(states, 0), gates(outputs * kValues, 0);
    Numbers<float> cells(outputs, 0);
    PersistentForward f{};
    static_cast<RecurrenceSizes&>(f) = n;
    f.gates_x = gates_x.device, f.h0 = h0.device, f.c0 = c0.device;
    for (int d = 0; d < n.D; ++d) {
      f.input.bias_ih[d] = bias_ih.device + d * kGates * n.H;
      f.input.bias_hh[d] = bias_hh.device + d * kGates * n.H;
    }
    f.y = y.device, f.h_n = h_n.device, f.c_n = kStateIsOutput ? h_n.device : c_n.device, f.gates = gates.device;
    f.cells = kStateIsOutput ? nullptr : cells.device;
    f.plan = forward;
    f.weights_aligned = n.H * kSize % 8 == 0;
    const ForwardRow& forward_row = row_of(kSize, forward);
    const int sequences = forward_row.sequences();
    place(f, forward_row.turns, sequences, most_groups, h_stride(forward.h_blocks, sequences, kSize));
    check(persistent_forward(dtype, f, nullptr), "forward");
    check(cudaDeviceSynchronize(), "forward");

    Numbers<S> d_gates_x(outputs * kGates, 0), dh0(states, 0), dc0(states, 0), d_q(outputs, 0);
    PersistentBackward b{};
    static_cast<RecurrenceSizes&>(b) = n;
    b.c0 = c0.device, b.gates = gates.device, b.cells = kStateIsOutput ? (void*)y.device : cells.device,
    b.dy = dy.device;
    b.dy_stride_t = n.B * n.D * n.H, b.dy_stride_b = n.D * n.H;
    b.dh_n = dh_n.device, b.d_gates_x = d_gates_x.device, b.dh0 = dh0.device;
    if (!kStateIsOutput) b.dc_n = dc_n.device, b.dc0 = dc0.device;
    if (kValues > kGates) b.d_q = d_q.device;
    b.plan = backward;
    const BackwardRow& row = row_of(kSize, backward);
    place(b, row.turns, row.sequences(), most_groups,
          int64_t(backward.ctas) * received_bytes(backward.ctas * row.splits, row.own_tiles(kSize), row.eights));
    check(persistent_backward(dtype, b, nullptr), "backward");
    check(cudaDeviceSynchronize(), "backward");
    results = {y.now(),
               h_n.now(),
               kStateIsOutput ? h_n.now() : c_n.now(),
               gates.now(),
               kStateIsOutput ? y.now() : cells.now(),
               d_gates_x.now(),
               dh0.now(),
               dc0.now(),
               d_q.now()};
  }

  // Computes the largest difference of forward and backward from the equations in double precision.
  void errors(double (&largest)[2]) const {
    largest[0] = largest[1] = 0;
    const auto note = [&](int pass, double found, double expected) {
      const double difference = std::fabs(found - expected);
      if (!(difference <= largest[pass])) largest[pass] = difference;
    };
    const int64_t H = n.H, G = kGates * H;
    for (int64_t d = 0; d < n.D; ++d)
      for (int64_t b = 0; b < n.B; ++b) {
        const StepOrder order{d, n.T};
        const int64_t length = lengths.empty() ? n.T : lengths[b], state = (d * n.B + b) * H;
        const double* const w = w_hh.host.data() + d * G * H;
        const auto at = [&](int64_t t) { return ((t * n.B + b) * n.D + d) * H; };
        std::vector<double> h(h0.host.begin() + state, h0.host.begin() + state + H),
            c(c0.host.begin() + state, c0.host.begin() + state + H);
        std::vector<std::vector<double>> saved(n.T, std::vector<double>(kValues * H)),
            cell(n.T, std::vector<double>(H));
        for (int64_t s = 0; s < n.T; ++s) {
          const int64_t t = order.forward(s);
          if (!order.active(t, length)) {
            for (int64_t u = 0; u < H; ++u) note(0, results[0][at(t) + u], 0), note(0, results[4][at(t) + u], 0);
            continue;
          }
          std::vector<double> next(H);
          for (int64_t u = 0; u < H; ++u) {
            double z[kValues] = {};
            for (int k = 0; k < kGates; ++k) {
              const int64_t row = k * H + u;
              z[Cell::input_value(k)] += gates_x.host[at(t) * kGates + row] + bias_ih.host[d * G + row];
              double& sum = z[Cell::recurrent_value(k)];
              sum += bias_hh.host[d * G + row];
              for (int64_t j = 0; j < H; ++j) sum += w[row * H + j] * h[j];
            }
            next[u] = Cell::template forward<HostMath>(z, c[u]);
            for (int k = 0; k < kValues; ++k)
              saved[t][k * H + u] = z[k], note(0, results[3][at(t) * kValues + k * H + u], z[k]);
            cell[t][u] = c[u];
            note(0, results[0][at(t) + u], next[u]);
            note(0, results[4][at(t) + u], c[u]);
          }
          h = next;
        }
        for (int64_t u = 0; u < H; ++u) note(0, results[1][state + u], h[u]), note(0, results[2][state + u], c[u]);

        std::vector<double> dh(dh_n.host.begin() + state, dh_n.host.begin() + state + H),
            dc(dc_n.host.begin() + state, dc_n.host.begin() + state + H);
        for (int64_t s = 0; s < n.T; ++s) {
          const int64_t t = order.backward(s);
          std::vector<double> dz(kValues * H), before(H);  // of the values
          const bool active = order.active(t, length);
          for (int64_t u = 0; u < H && active; ++u) {
            double values[kValues], of_unit[kValues];
            for (int k = 0; k < kValues; ++k) values[k] = saved[t][k * H + u];
            const double c_before = t == order.first(length) ? c0.host[state + u] : cell[order.before(t)][u];
            Cell::template backward<HostMath>(values, cell[t][u], c_before, dh[u] + dy.host[at(t) + u], dc[u], of_unit);
            for (int k = 0; k < kValues; ++k) dz[k * H + u] = of_unit[k];
          }
          for (int64_t k = 0; k < G; ++k) note(1, results[5][at(t) * kGates + k], dz[k]);  // gates' input parts
          for (int64_t k = G; k < kValues * H; ++k) note(1, results[8][at(t) + k - G], dz[k]);
          if (!active) continue;
          for (int k = 0; k < kGates; ++k)
            for (int64_t u = 0; u < H; ++u)
              for (int64_t j = 0; j < H; ++j)
                before[j] += w[(k * H + u) * H + j] * dz[Cell::recurrent_value(k) * H + u];
          dh = before;
        }
        for (int64_t u = 0; u < H; ++u) {
          note(1, results[6][state + u], kStateIsOutput ? dh[u] + dc[u] : dh[u]);
          if (!kStateIsOutput) note(1, results[7][state + u], dc[u]);
        }
      }
  }
};

struct Device {
  int capability, multiprocessors, shared_memory;
  Device() {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
    check(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "device");
    capability = major * 10 + minor;
  }
  template <class Plan>
  bool runs(const Plan& plan, int64_t D) const {
    const int most = plan.exchange == Exchange::cta       ? 1
                     : plan.exchange == Exchange::cluster ? kMaxCluster
                                                          : multiprocessors / int(D);
    return capability >= (plan.exchange == Exchange::cluster ? 90 : 80) && plan.bytes <= shared_memory &&
           plan.ctas <= most;
  }
};

// Returns a plan of some row for H units, with the fewest CTAs that the row allows, or one with more.
ForwardPlan some_forward(const Device& device, CellKind cell, int size, int64_t H, Exchange exchange, int row = -1,
                         bool more = false) {
  for (int k = 0; k < kForwardCounts[size == 4]; ++k) {
    const ForwardEntry& entry = size == 2 ? kForwardRows16[k] : kForwardRows32[k];
    if (entry.exchange != exchange || entry.row.cell != cell || (row >= 0 && k != row)) continue;
    for (int shares = entry.row.warps / entry.row.splits; shares > 0; --shares) {
      const ForwardPlan plan = forward_plan(size, H, k, shares * entry.row.blocks());
      if (!device.runs(plan, 2)) continue;
      const ForwardPlan other = forward_plan(size, H, k, (shares + 1) / 2 * entry.row.blocks());
      return more && device.runs(other, 2) ? other : plan;
    }
  }
  return {exchange, -1};
}
BackwardPlan some_backward(const Device& device, CellKind cell, int size, int64_t H, Exchange exchange, int row = -1) {
  for (int k = 0; k < kBackwardCounts[size == 4]; ++k) {
    const BackwardEntry& entry = size == 2 ? kBackwardRows16[k] : kBackwardRows32[k];
    if (entry.exchange != exchange || entry.row.cell != cell || (row >= 0 && k != row)) continue;
    if (divide_up(H, kTile) > entry.row.most_tiles()) continue;
    const BackwardPlan plan = backward_plan(size, H, k);
    if (device.runs(plan, 2)) return plan;
  }
  return {exchange, -1};
}

// The rows of a table that are of this cell.
template <class Entries>
std::vector<int> rows_of(const Entries& entries, CellKind cell) {
  std::vector<int> rows;
  for (int k = 0; k < int(std::size(entries)); ++k)
    if (entries[k].row.cell == cell) rows.push_back(k);
  return rows;
}

// Runs every kernel at least once, with sizes that fill it and sizes that do not.
template <class S, class Cell>
bool rows(DType dtype, const Device& device, int pick) {
  constexpr int kSize = sizeof(S);
  constexpr CellKind cell = kKind<Cell>;
  const double tolerance = kSize == 4 ? 2e-5 : dtype == DType::f16 ? 1e-2 : 8e-2;
  bool good = true;
  const auto fs = kSize == 2 ? rows_of(kForwardRows16, cell) : rows_of(kForwardRows32, cell);
  const auto bs = kSize == 2 ? rows_of(kBackwardRows16, cell) : rows_of(kBackwardRows32, cell);
  for (size_t k = 0; k < fs.size() || k < bs.size(); ++k)
    for (const int64_t H : {9, 50, 64, 100, 192}) {
      if (pick >= 0 && int(k) != pick) continue;
      const bool has_f = k < fs.size(), has_b = k < bs.size();
      const Exchange fx = has_f ? (kSize == 2 ? kForwardRows16 : kForwardRows32)[fs[k]].exchange : Exchange::grid;
      const Exchange bx = has_b ? (kSize == 2 ? kBackwardRows16 : kBackwardRows32)[bs[k]].exchange : Exchange::grid;
      const ForwardPlan f = some_forward(device, cell, kSize, H, fx, has_f ? fs[k] : -1, H % 2 == 0);
      const BackwardPlan b = some_backward(device, cell, kSize, H, bx, has_b ? bs[k] : -1);
      if (f.row < 0 || b.row < 0) continue;
      const int64_t B = row_of(kSize, f).batch() > 16 || row_of(kSize, b).batch() > 16 ? 19 : 11;
      Layer<S, Cell> layer(dtype, 5, B, 2, H, H % 3 == 0);  // one step more than a ring has stages
      layer.run(f, b);
      double largest[2];
      layer.errors(largest);
      const bool right = largest[0] < tolerance && largest[1] < 5 * tolerance;
      std::printf("cell %d, %d bytes, H %d, forward row %d (P %d), backward row %d (P %d): errors %.1e, %.1e%s\n",
                  int(cell), kSize, int(H), f.row, f.ctas, b.row, b.ctas, largest[0], largest[1],
                  right ? "" : " WRONG");
      std::fflush(stdout);
      good = good && right;
    }
  return good;
}

template <class S, class Cell>
bool passes(DType dtype, const Device& device) {
  constexpr int kSize = sizeof(S);
  bool good = true;
  for (int k = 0; k < kForwardCounts[kSize == 4]; ++k)
    for (int64_t T = 1; T <= 4; ++T) {
      const ForwardPlan f = some_forward(device, kKind<Cell>, kSize, 48, Exchange::grid, k);
      BackwardPlan b = some_backward(device, kKind<Cell>, kSize, 48, Exchange::grid, k % kBackwardCounts[kSize == 4]);
      if (f.row < 0) break;
      if (b.row < 0) b = some_backward(device, kKind<Cell>, kSize, 48, Exchange::grid);
      Layer<S, Cell> layer(dtype, T, 70, 2, 48, false);
      layer.run(f, b);
      const auto expected = layer.results;
      for (const int groups : {2, 4}) {
        layer.run(f, b, groups);
        const bool same = layer.results == expected;
        std::printf("%d bytes, forward row %d, backward row %d, T %d, %d groups: %s\n", kSize, f.row, b.row, int(T),
                    groups, same ? "the same" : "DIFFERENT");
        good = good && same;
      }
    }
  return good;
}

// f(type, its name, cell) of every type and cell that the tables have.
template <class F>
void each_type(const F& f) {
  const auto both = [&](auto type, DType dtype) { f(type, dtype, Lstm()), f(type, dtype, Gru()); };
  both(float(), DType::f32), both(__half(), DType::f16), both(__nv_bfloat16(), DType::bf16);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const Device device;
  if (what == "rows") {
    const int pick = argc > 2 ? std::atoi(argv[2]) : -1;
    bool good = true;
    each_type([&](auto type, DType dtype, auto cell) {
      good = rows<decltype(type), decltype(cell)>(dtype, device, pick) && good;
    });
    return good ? 0 : 1;
  }
  if (what == "steps") {
    const auto run = [&](auto cell) {
      constexpr CellKind kind = kKind<decltype(cell)>;
      Layer<float, decltype(cell)> layer(DType::f32, 5, 16, 2, 64, false);
      layer.run(some_forward(device, kind, 4, 64, Exchange::cta), some_backward(device, kind, 4, 64, Exchange::cta));
    };
    argc > 2 ? run(Gru()) : run(Lstm());
    return 0;
  }
  if (what == "passes") {
    bool good = true;
    each_type([&](auto type, DType dtype, auto cell) {
      good = passes<decltype(type), decltype(cell)>(dtype, device) && good;
    });
    return good ? 0 : 1;
  }
  if (what == "resident") {
    for (const auto& [name, exchange] : {std::pair{"cta", Exchange::cta}, {"cluster", Exchange::cluster}})
      for (int k = 0; k < kForwardCounts[1]; ++k)
        if (kForwardRows32[k].exchange == exchange) {  // whether or not the device can run it
          std::printf("%s %d\n", name, resident(DType::f32, forward_plan(4, 64, k, exchange == Exchange::cta ? 8 : 4)));
          break;
        }
    return 0;
  }
  std::printf("usage: %s rows [ROW]|steps [gru]|passes|resident\n", argv[0]);
  return 2;
}
