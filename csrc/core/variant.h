// Parameters of one step of the extended LSTM (variant_row.h has the passes). It adds to the LSTM:
//
// - Recurrent dropout: W_hh multiplies h_mask * h_{t-1}, with one mask for all steps (Gal & Ghahramani,
//   arXiv:1512.05287).
// - Zoneout: c_t = z_c c_{t-1} + (1 - z_c) c', h_t = z_h h_{t-1} + (1 - z_h) h', of the cell's own c' and h'
//   (Krueger et al., arXiv:1606.01305). z is a mask, or a constant: its mean.
// - Layer norm: z = gates_x + ln_hh LN(W_hh h_{t-1}), h' = o tanh(ln_c[0] LN(c') + ln_c[1]), where LN gives all 4H or H
//   values of a row mean 0 and variance 1 (Ba et al., arXiv:1607.06450, equations 20 to 22).
// - Projection: h' = W_hr (o tanh(c')), of P values (Sak et al., arXiv:1402.1128).
// - Reset: (t, b) begins a new sequence within sequence b: direction 0 comes to step t, and direction 1 to step t-1,
//   with h = c = 0.
//
// S is the tensors' type, A the accumulation type (recurrence.h), F the type of the operands of the products per step.
#pragma once

#include "recurrence.h"

namespace birnn {

// Parameters of both passes. Optional pointers may be null.
struct Variant : RecurrenceSizes {
  int64_t P;  // values of h: H, unless there is a projection
  bool projects;
  const int64_t* lengths;                 // (B), optional; as in recurrence.h
  const bool* reset;                      // (T, B), optional
  const void* h_mask;                     // S (D, B, P), optional
  const bool *zoneout_h, *zoneout_c;      // (T, B, D, P) and (T, B, D, H), optional: where the state stays as it was
  double zoneout_h_mean, zoneout_c_mean;  // z if there is no mask
  const void* ln_hh;                      // S (D, 4H), optional
  const void* ln_c;                       // S (D, 2, H), optional: factor and summand
  double eps;                             // added to variances
  int64_t s;                              // the iteration, 0 .. T-1
};

struct VariantForward : Variant {
  const void* gates_x;    // S (T, B, D, 4H)
  bool has_products;      // false: products are 0
  void* products;         // A (D, B, 4H): W_hh h_{t-1}; overwritten
  void* h;                // A (D, B, P): h_{t-1} -> h_t; sequences without this step keep theirs
  void* c;                // A (D, B, H): c_{t-1} -> c_t; sequences without this step keep theirs
  void* operand;          // F (D, B, P), optional: h_mask * h_t; without it W_hh multiplies h
  void* hidden;           // F (D, B, H): o tanh(c'), which W_hr multiplies; with a projection only
  const void* projected;  // A (D, B, P): W_hr hidden; with a projection only
  void* y;                // S (T, B, D, P)
  void* gates;   // S (T, B, D, 4H), optional; this and what follows is kept for the backward pass, 0 beyond ends
  void* cells;   // A (T, B, D, H), optional
  void* normed;  // S (T, B, D, 4H), optional: LN(W_hh h_{t-1})
  void* rstd;    // A (T, B, D), optional: 1 / standard deviation in that LN
};

struct VariantBackward : Variant {
  const void* c0;                             // S (D, B, H), optional
  const void *gates, *cells, *normed, *rstd;  // saved by the forward pass
  const void* dy;                             // S (T, B, D, P), optional
  const void* d_cells;                        // A (T, B, D, H), optional
  const void* dh_products;                    // A (D, B, P), optional: W_hh^T operand of the step before
  void* dh;                   // A (D, B, P): gradient of h_t -> of h_{t-1}, without the part through W_hh
  void* dc;                   // A (D, B, H): gradient of c_t -> of c_{t-1}
  void* d_hidden;             // A (D, B, H): gradient of o tanh(c'); with a projection W_hr^T d_projected_operand
  void* d_projected_operand;  // F (D, B, P): gradient of h'; this and what follows with a projection only
  void* d_projected;          // S (T, B, D, P): the same for all steps
  void* hidden;               // S (T, B, D, H): o tanh(c'), recomputed
  void* operand;              // F (D, B, 4H): gradient of W_hh h_{t-1}
  void* d_gates_x;            // S (T, B, D, 4H)
  void* d_products;  // S (T, B, D, 4H): operand for all steps; null if it equals d_gates_x (no ln_hh, no reset)
  void* d_ln_hh;     // A (D, B, 4H), with ln_hh only: each sequence's gradient, summed over the steps
  void* d_ln_c;      // A (D, B, 2, H), with ln_c only: the same sum
};

}  // namespace birnn
