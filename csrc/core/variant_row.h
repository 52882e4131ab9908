// One step of the extended LSTM (variant.h) for one row: one direction of one sequence. X visits the row's units: with
// a SIMD loop on the CPU, with the threads of a block on the GPU. cells/lstm.h has the cell's equations.
//
// Types S, A and F are those of variant.h. X has the types V (values of type A of some units) and M (their functions,
// see cells/lstm.h), and
// - each(n, f): calls f(u, count) for the units u .. u+count-1 of n, where count is all that V holds or what is left
// - load<T>(p, at, count), store<T>(p, at, v, count)
// - only(v, count): v with 0 for units beyond count
// - sum(v): the sum over all units of the row. On the GPU it is a barrier for the threads of the row, which all get it
// - store_one<T>(p, at, value)
// - inverse_root(a): 1 / sqrt(a)
#pragma once

#include "cells/lstm.h"
#include "inline.h"
#include "step_order.h"
#include "variant.h"

namespace birnn {

// The place of a row in a pass, as indices.
struct RowPlace {
  int64_t d, b, t;
  int64_t row;         // in (T, B, D)
  int64_t row_before;  // the same for the step before t
  int64_t state;       // in (D, B)
  bool active;         // the sequence has a step t
  bool first;          // t is its first step
  bool cleared;        // a reset: step t begins with h = c = 0
};

BIRNN_INLINE RowPlace row_place(const Variant& p, int64_t state, bool forward) {
  RowPlace at;
  at.state = state;
  at.d = state / p.B;
  at.b = state % p.B;
  const StepOrder order{at.d, p.T};
  at.t = forward ? order.forward(p.s) : order.backward(p.s);
  const int64_t before = order.before(at.t);
  at.row = (at.t * p.B + at.b) * p.D + at.d;
  at.row_before = (before * p.B + at.b) * p.D + at.d;
  const int64_t length = length_of(p.lengths, at.b, p.T);
  at.active = order.active(at.t, length);
  at.first = at.t == order.first(length);
  const int64_t begins = at.t > before ? at.t : before;  // reset marks the later one
  at.cleared = p.reset && begins < length && p.reset[begins * p.B + at.b];
  return at;
}

template <class X>
BIRNN_INLINE typename X::V zoneout(const X& x, const bool* mask, double mean, int64_t index, int64_t count) {
  using V = typename X::V;
  return mask ? x.template load<bool>(mask, index, count) : V{} + typename X::A(mean);
}

template <class T, class X>
BIRNN_INLINE void store_zeros(const X& x, void* p, int64_t at, int64_t n) {
  const typename X::V zeros{};
  if (p) x.each(n, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA { x.template store<T>(p, at + u, zeros, count); });
}

// Loads units at, at+1, ... of each gate; the gates' rows of H values are contiguous.
template <class T, class X>
BIRNN_INLINE void load_gates(const X& x, const void* p, int64_t at, int64_t H, int64_t count,
                             typename X::V (&gates)[Lstm::kGates]) {
  BIRNN_UNROLL
  for (int g = 0; g < Lstm::kGates; ++g) gates[g] = x.template load<T>(p, at + g * H, count);
}

template <class T, class X>
BIRNN_INLINE void store_gates(const X& x, void* p, int64_t at, int64_t H, const typename X::V (&gates)[Lstm::kGates],
                              int64_t count) {
  BIRNN_UNROLL
  for (int g = 0; g < Lstm::kGates; ++g) x.template store<T>(p, at + g * H, gates[g], count);
}

// Mean and inverse standard deviation of n values.
template <class A>
struct Moments {
  A mean, rstd;
};

// value(u, count) returns some of the n values.
template <class X, class F>
BIRNN_INLINE Moments<typename X::A> moments(const X& x, int64_t n, double eps, const F& value) {
  using A = typename X::A;
  using V = typename X::V;
  V sum{}, squares{};
  x.each(n, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA { sum = sum + x.only(value(u, count), count); });
  const A mean = x.sum(sum) / A(n);
  x.each(n, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    const V from_mean = x.only(value(u, count) - mean, count);
    squares = squares + from_mean * from_mean;
  });
  return {mean, x.inverse_root(x.sum(squares) / A(n) + A(eps))};
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Makes h_t from h' of some units, and stores it.
template <class S, class F, class X>
BIRNN_INLINE void store_output(const VariantForward& p, const X& x, const RowPlace& at, int64_t u, int64_t count,
                               typename X::V h) {
  using A = typename X::A;
  using V = typename X::V;
  const int64_t state = at.state * p.P + u, row = at.row * p.P + u;
  if (p.zoneout_h || p.zoneout_h_mean != 0) {
    const V z = zoneout(x, p.zoneout_h, p.zoneout_h_mean, row, count);
    const V h_prev = at.cleared ? V{} : x.template load<A>(p.h, state, count);
    h = z * h_prev + (A(1) - z) * h;
  }
  x.template store<A>(p.h, state, h, count);
  x.template store<S>(p.y, row, h, count);
  if (p.operand)
    x.template store<F>(p.operand, state, p.h_mask ? h * x.template load<S>(p.h_mask, state, count) : h, count);
}

// One step. With a projection it ends at o tanh(c'), and variant_forward_projected_row does the rest.
template <class S, class F, class X>
BIRNN_INLINE void variant_forward_row(const VariantForward& p, const X& x, int64_t state) {
  using A = typename X::A;
  using V = typename X::V;
  using M = typename X::M;
  const RowPlace at = row_place(p, state, true);
  const int64_t H = p.H, width = Lstm::kGates * H, in_gates = at.row * width;
  if (!at.active) {
    if (!p.projects) store_zeros<S>(x, p.y, at.row * p.P, p.P);
    store_zeros<S>(x, p.gates, in_gates, width);
    store_zeros<A>(x, p.cells, at.row * H, H);
    store_zeros<S>(x, p.normed, in_gates, width);
    if (p.rstd) x.template store_one<A>(p.rstd, at.row, A(0));
    return;
  }
  const int64_t products = state * width;
  const bool has_products = p.has_products && !at.cleared;
  Moments<A> of_products{A(0), x.inverse_root(A(p.eps))};
  if (p.ln_hh && has_products)
    of_products = moments(x, width, p.eps, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
      return x.template load<A>(p.products, products + u, count);
    });
  if (p.rstd) x.template store_one<A>(p.rstd, at.row, of_products.rstd);

  const auto hidden = [&](int64_t u, int64_t count, V value) BIRNN_INLINE_LAMBDA {
    if (p.projects)
      x.template store<F>(p.hidden, state * H + u, value, count);
    else
      store_output<S, F>(p, x, at, u, count, value);
  };
  x.each(H, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V input[Lstm::kGates], recurrent[Lstm::kGates] = {}, gates[Lstm::kGates];
    load_gates<S>(x, p.gates_x, in_gates + u, H, count, input);
    if (has_products) load_gates<A>(x, p.products, products + u, H, count, recurrent);
    if (p.ln_hh) {
      BIRNN_UNROLL
      for (int g = 0; g < Lstm::kGates; ++g) recurrent[g] = (recurrent[g] - of_products.mean) * of_products.rstd;
      if (p.normed) store_gates<S>(x, p.normed, in_gates + u, H, recurrent, count);
      V factor[Lstm::kGates];
      load_gates<S>(x, p.ln_hh, at.d * width + u, H, count, factor);
      BIRNN_UNROLL
      for (int g = 0; g < Lstm::kGates; ++g) recurrent[g] = recurrent[g] * factor[g];
    }
    BIRNN_UNROLL
    for (int g = 0; g < Lstm::kGates; ++g) gates[g] = input[g] + recurrent[g];
    Lstm::activate<M>(gates);
    const V c_prev = at.cleared ? V{} : x.template load<A>(p.c, state * H + u, count);
    V c = Lstm::state(gates, c_prev);
    if (p.gates) store_gates<S>(x, p.gates, in_gates + u, H, gates, count);
    if (p.ln_c) {  // c' and o wait in the products' place until the row's moments are known
      x.template store<A>(p.products, products + u, c, count);
      x.template store<A>(p.products, products + Lstm::o * H + u, gates[Lstm::o], count);
    } else {
      hidden(u, count, Lstm::output<M>(gates, c));
    }
    if (p.zoneout_c || p.zoneout_c_mean != 0) {
      const V z = zoneout(x, p.zoneout_c, p.zoneout_c_mean, at.row * H + u, count);
      c = z * c_prev + (A(1) - z) * c;
    }
    x.template store<A>(p.c, state * H + u, c, count);
    if (p.cells) x.template store<A>(p.cells, at.row * H + u, c, count);
  });
  if (!p.ln_c) return;
  const auto cell = [&](int64_t u, int64_t count)
                        BIRNN_INLINE_LAMBDA { return x.template load<A>(p.products, products + u, count); };
  const Moments<A> of_cell = moments(x, H, p.eps, cell);
  x.each(H, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V gates[Lstm::kGates] = {};
    gates[Lstm::o] = x.template load<A>(p.products, products + Lstm::o * H + u, count);
    const V c = (cell(u, count) - of_cell.mean) * of_cell.rstd * x.template load<S>(p.ln_c, at.d * 2 * H + u, count) +
                x.template load<S>(p.ln_c, (at.d * 2 + 1) * H + u, count);
    hidden(u, count, Lstm::output<M>(gates, c));
  });
}

// The second part of a step with a projection: h' -> h_t.
template <class S, class F, class X>
BIRNN_INLINE void variant_forward_projected_row(const VariantForward& p, const X& x, int64_t state) {
  using A = typename X::A;
  const RowPlace at = row_place(p, state, true);
  if (!at.active) return store_zeros<S>(x, p.y, at.row * p.P, p.P);
  x.each(p.P, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    store_output<S, F>(p, x, at, u, count, x.template load<A>(p.projected, state * p.P + u, count));
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

// Turns the gradient of h_t into those of h' and, by zoneout, of h_{t-1}.
template <class S, class F, class X>
BIRNN_INLINE void variant_backward_output_row(const VariantBackward& p, const X& x, int64_t state) {
  using A = typename X::A;
  using V = typename X::V;
  const RowPlace at = row_place(p, state, false);
  x.each(p.P, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    const int64_t in_state = state * p.P + u, in_row = at.row * p.P + u;
    V dh = x.template load<A>(p.dh, in_state, count), direct = dh;
    if (p.dh_products) {
      const V product = x.template load<A>(p.dh_products, in_state, count);
      direct = dh = dh + (p.h_mask ? product * x.template load<S>(p.h_mask, in_state, count) : product);
    }
    if (at.active) {
      if (p.dy) dh = dh + x.template load<S>(p.dy, in_row, count);
      const V z = zoneout(x, p.zoneout_h, p.zoneout_h_mean, in_row, count);
      direct = at.cleared ? V{} : z * dh;
      dh = (A(1) - z) * dh;
    } else {
      dh = V{};
    }
    x.template store<A>(p.dh, in_state, direct, count);
    if (p.projects) {
      x.template store<F>(p.d_projected_operand, in_state, dh, count);
      x.template store<S>(p.d_projected, in_row, dh, count);
    } else {
      x.template store<A>(p.d_hidden, in_state, dh, count);
    }
  });
}

// c_{t-1} of some units, as the cell read it.
template <class S, class X>
BIRNN_INLINE typename X::V cell_before(const VariantBackward& p, const X& x, const RowPlace& at, int64_t u,
                                       int64_t count) {
  if (at.cleared) return typename X::V{};
  const int64_t in_state = at.state * p.H + u;
  if (at.first) return p.c0 ? x.template load<S>(p.c0, in_state, count) : typename X::V{};
  return x.template load<typename X::A>(p.cells, at.row_before * p.H + u, count);
}

// If layer norm reads c', the gradient of c' needs these values of the whole row.
template <class A>
struct CellNorm {
  Moments<A> cell;          // of c'
  A mean_d, mean_d_normed;  // of the gradient d of LN(c'), and of d LN(c')
};

// Computes them, and adds this step's part to the gradients of ln_c.
template <class S, class X>
BIRNN_INLINE CellNorm<typename X::A> variant_backward_cell_norm(const VariantBackward& p, const X& x,
                                                                const RowPlace& at) {
  using A = typename X::A;
  using V = typename X::V;
  using M = typename X::M;
  const int64_t H = p.H, in_gates = at.row * Lstm::kGates * H, ln_c = at.d * 2 * H;
  const auto cell = [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V gates[Lstm::kGates];
    load_gates<S>(x, p.gates, in_gates + u, H, count, gates);
    return Lstm::state(gates, cell_before<S>(p, x, at, u, count));  // p.cells has c_t instead, which zoneout may hold
  };
  const Moments<A> of_cell = moments(x, H, p.eps, cell);
  V sum_d{}, sum_d_normed{};
  x.each(H, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V gates[Lstm::kGates];
    load_gates<S>(x, p.gates, in_gates + u, H, count, gates);
    const V normed = (cell(u, count) - of_cell.mean) * of_cell.rstd,
            factor = x.template load<S>(p.ln_c, ln_c + u, count);
    V d_o, dn;
    Lstm::output_backward<M>(gates, normed * factor + x.template load<S>(p.ln_c, ln_c + H + u, count),
                             x.template load<A>(p.d_hidden, at.state * H + u, count), d_o, dn);
    const int64_t sums = at.state * 2 * H + u;
    x.template store<A>(p.d_ln_c, sums, x.template load<A>(p.d_ln_c, sums, count) + dn * normed, count);
    x.template store<A>(p.d_ln_c, sums + H, x.template load<A>(p.d_ln_c, sums + H, count) + dn, count);
    const V d = x.only(dn * factor, count);
    sum_d = sum_d + d;
    sum_d_normed = sum_d_normed + d * normed;
  });
  const A mean_d = x.sum(sum_d) / A(H);
  return {of_cell, mean_d, x.sum(sum_d_normed) / A(H)};
}

// The gradient of W_hh h_{t-1} where layer norm reads it. The row has written dz to d_gates_x, and sums over all gates
// of dz ln_hh and of dz ln_hh LN(W_hh h_{t-1}).
template <class S, class F, class X>
BIRNN_INLINE void variant_backward_products_norm(const VariantBackward& p, const X& x, const RowPlace& at,
                                                 typename X::V sum_dz, typename X::V sum_dz_normed) {
  using A = typename X::A;
  using V = typename X::V;
  const int64_t H = p.H, width = Lstm::kGates * H, in_gates = at.row * width;
  const A mean_dz = x.sum(sum_dz) / A(width), mean_dz_normed = x.sum(sum_dz_normed) / A(width),
          rstd = static_cast<const A*>(p.rstd)[at.row];
  x.each(H, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V d[Lstm::kGates] = {};
    if (!at.cleared) {
      V dz[Lstm::kGates], normed[Lstm::kGates], factor[Lstm::kGates];
      load_gates<S>(x, p.d_gates_x, in_gates + u, H, count, dz);
      load_gates<S>(x, p.normed, in_gates + u, H, count, normed);
      load_gates<S>(x, p.ln_hh, at.d * width + u, H, count, factor);
      BIRNN_UNROLL
      for (int g = 0; g < Lstm::kGates; ++g) d[g] = (dz[g] * factor[g] - mean_dz - normed[g] * mean_dz_normed) * rstd;
    }
    store_gates<F>(x, p.operand, at.state * width + u, H, d, count);
    store_gates<S>(x, p.d_products, in_gates + u, H, d, count);
  });
}

// Turns the gradient of o tanh(c') into those of gates_x, of W_hh h_{t-1} and of c_{t-1}.
template <class S, class F, class X>
BIRNN_INLINE void variant_backward_row(const VariantBackward& p, const X& x, int64_t state) {
  using A = typename X::A;
  using V = typename X::V;
  using M = typename X::M;
  const RowPlace at = row_place(p, state, false);
  const int64_t H = p.H, width = Lstm::kGates * H, in_gates = at.row * width;
  if (!at.active) {
    store_zeros<S>(x, p.d_gates_x, in_gates, width);
    store_zeros<S>(x, p.d_products, in_gates, width);
    store_zeros<S>(x, p.hidden, at.row * H, H);
    store_zeros<F>(x, p.operand, state * width, width);
    return;
  }
  CellNorm<A> norm{};
  if (p.ln_c) norm = variant_backward_cell_norm<S>(p, x, at);

  const int64_t ln_c = at.d * 2 * H;
  V sum_dz{}, sum_dz_normed{};
  x.each(H, [&](int64_t u, int64_t count) BIRNN_INLINE_LAMBDA {
    V gates[Lstm::kGates], dz[Lstm::kGates];
    load_gates<S>(x, p.gates, in_gates + u, H, count, gates);
    const V c_prev = cell_before<S>(p, x, at, u, count), c = Lstm::state(gates, c_prev),
            d_hidden = x.template load<A>(p.d_hidden, state * H + u, count);
    V d_o, d_cell, read = c;  // tanh reads c', or its layer norm
    if (p.ln_c) {
      const V normed = (c - norm.cell.mean) * norm.cell.rstd, factor = x.template load<S>(p.ln_c, ln_c + u, count);
      read = normed * factor + x.template load<S>(p.ln_c, ln_c + H + u, count);
      Lstm::output_backward<M>(gates, read, d_hidden, d_o, d_cell);
      d_cell = (d_cell * factor - norm.mean_d - normed * norm.mean_d_normed) * norm.cell.rstd;
    } else {
      Lstm::output_backward<M>(gates, c, d_hidden, d_o, d_cell);
    }
    if (p.hidden) x.template store<S>(p.hidden, at.row * H + u, Lstm::output<M>(gates, read), count);
    V dc = x.template load<A>(p.dc, state * H + u, count);
    if (p.d_cells) dc = dc + x.template load<A>(p.d_cells, at.row * H + u, count);
    const V z = zoneout(x, p.zoneout_c, p.zoneout_c_mean, at.row * H + u, count);
    d_cell = d_cell + (A(1) - z) * dc;
    Lstm::state_backward<M>(gates, c_prev, d_o, d_cell, dz);
    x.template store<A>(p.dc, state * H + u, at.cleared ? V{} : d_cell + z * dc, count);
    store_gates<S>(x, p.d_gates_x, in_gates + u, H, dz, count);
    if (p.ln_hh) {
      V normed[Lstm::kGates], factor[Lstm::kGates], sums[Lstm::kGates];
      load_gates<S>(x, p.normed, in_gates + u, H, count, normed);
      load_gates<S>(x, p.ln_hh, at.d * width + u, H, count, factor);
      load_gates<A>(x, p.d_ln_hh, state * width + u, H, count, sums);
      V more[Lstm::kGates];
      BIRNN_UNROLL
      for (int g = 0; g < Lstm::kGates; ++g) {
        more[g] = dz[g] * normed[g];
        sums[g] = sums[g] + more[g];
      }
      V of_gates = dz[0] * factor[0], of_gates_normed = more[0] * factor[0];
      BIRNN_UNROLL
      for (int g = 1; g < Lstm::kGates; ++g) {
        of_gates = of_gates + dz[g] * factor[g];
        of_gates_normed = of_gates_normed + more[g] * factor[g];
      }
      store_gates<A>(x, p.d_ln_hh, state * width + u, H, sums, count);
      sum_dz = sum_dz + x.only(of_gates, count);
      sum_dz_normed = sum_dz_normed + x.only(of_gates_normed, count);
    } else {
      BIRNN_UNROLL
      for (int g = 0; g < Lstm::kGates; ++g) dz[g] = at.cleared ? V{} : dz[g];
      store_gates<F>(x, p.operand, state * width + u, H, dz, count);
      if (p.d_products) store_gates<S>(x, p.d_products, in_gates + u, H, dz, count);
    }
  });
  if (p.ln_hh) variant_backward_products_norm<S, F>(p, x, at, sum_dz, sum_dz_normed);
}

}  // namespace birnn
