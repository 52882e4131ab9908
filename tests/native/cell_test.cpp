// Runs one step of one unit of each cell (csrc/core/cells) in double. Values are compared with the equations of
// PyTorch's documentation, and gradients with differences.
#include <cmath>
#include <cstdio>
#include <random>

#include "core/cells.h"

namespace birnn {
namespace {

struct Math {
  using Scalar = double;
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double tanh(double x) { return std::tanh(x); }
};

// What a step starts from.
template <class Cell>
struct Start {
  double input[Cell::kGates], recurrent[Cell::kGates], c;
};

struct State {
  double h, c;
};

State equations(const Start<Lstm>& s) {
  const auto z = [&](int gate) { return s.input[gate] + s.recurrent[gate]; };
  const double c = Math::sigmoid(z(1)) * s.c + Math::sigmoid(z(0)) * std::tanh(z(2));
  return {Math::sigmoid(z(3)) * std::tanh(c), c};
}

State equations(const Start<Gru>& s) {
  const double r = Math::sigmoid(s.input[0] + s.recurrent[0]), z = Math::sigmoid(s.input[1] + s.recurrent[1]);
  const double h = (1 - z) * std::tanh(s.input[2] + r * s.recurrent[2]) + z * s.c;
  return {h, h};
}

template <CellKind kCell>
State equations(const Start<Rnn<kCell>>& s) {
  const double z = s.input[0] + s.recurrent[0];
  const double h = kCell == CellKind::rnn_tanh ? std::tanh(z) : std::fmax(z, 0);
  return {h, h};
}

int check(const char* cell, const char* name, double found, double expected, double tolerance) {
  if (std::fabs(found - expected) <= tolerance) return 0;
  std::printf("FAILED %s, %s: %g, expected %g\n", cell, name, found, expected);
  return 1;
}

template <class Cell>
int failures_of(std::mt19937& generator) {
  const char* const name = Cell::kName;
  const auto random = [&] { return std::uniform_real_distribution<double>(-2, 2)(generator); };
  Start<Cell> start;
  for (double* part : {start.input, start.recurrent})
    for (int g = 0; g < Cell::kGates; ++g) part[g] = random();
  start.c = random();
  const double dh = random(), dc = random();

  int failed = check(name, "name_of", name_of(Cell::kKind) != name, 0, 0);
  double values[Cell::kValues] = {}, c = start.c;
  for (int g = 0; g < Cell::kGates; ++g) {
    values[Cell::input_value(g)] += start.input[g];
    values[Cell::recurrent_value(g)] += start.recurrent[g];
  }
  const double h = Cell::template forward<Math>(values, c);
  failed += check(name, "h", h, equations(start).h, 1e-14);
  failed += check(name, "c", c, equations(start).c, 1e-14);

  double dz[Cell::kValues], dc_before = dc;
  Cell::template backward<Math>(values, c, start.c, dh, dc_before, dz);
  const auto slope = [&](double& at) {  // of dh h + dc c
    const double kept = at, step = 1e-5;
    at = kept + step;
    const State above = equations(start);
    at = kept - step;
    const State below = equations(start);
    at = kept;
    return (dh * (above.h - below.h) + dc * (above.c - below.c)) / (2 * step);
  };
  for (int g = 0; g < Cell::kGates; ++g) {
    failed += check(name, "gradient of an input part", dz[Cell::input_value(g)], slope(start.input[g]), 1e-9);
    failed +=
        check(name, "gradient of a recurrent part", dz[Cell::recurrent_value(g)], slope(start.recurrent[g]), 1e-9);
  }
  return failed + check(name, "gradient of the state", dc_before, slope(start.c), 1e-9);
}

}  // namespace

int cell_failures() {
  std::mt19937 generator(1);
  int failed = 0;
  for (int round = 0; round < 20; ++round)
    for (const CellKind cell : kCells)
      failed += with_cell(cell, [&](auto of) { return failures_of<decltype(of)>(generator); });
  return failed;
}

}  // namespace birnn
