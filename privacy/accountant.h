/*
 * Rényi accounting of the Poisson-subsampled Gaussian mechanism, add/remove neighbours.
 *
 * q: sampling rate in (0, 1]; z: noise multiplier (noise standard deviation / clip), > 0; steps compose by addition.
 * Formulas: Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism" (2019), 3.3;
 * conversion: Canonne, Kamath, Steinke (2020), proposition 12, which is Balle et al. 2020, theorem 21. Pure functions;
 * any thread.
 *
 *     double epsilon, order;
 *     rc = accountant_epsilon(0.04, 1.712, 500, 1e-6, &epsilon, &order, &err);      3.0
 *     rc = accountant_calibrate(3.0, 1e-6, 0.04, 500, &z, &err);
 */
#ifndef PRIVACY_ACCOUNTANT_H
#define PRIVACY_ACCOUNTANT_H

#include "base/error.h"

#define RDP_ORDERS 156 /* 1.1 … 10.9 step 0.1, 11 … 63, 128, 256, 512, 1024 */

double rdp_order(size_t i); /* i < RDP_ORDERS */

/* ε(α) of one step, α > 1, any real; INFINITY where the series for a fractional α does not converge. Asserts the
 * ranges. */
double rdp_step(double q, double z, double alpha);
/* The whole grid for `steps` steps. */
void rdp_curve(double q, double z, uint64_t steps, double curve[RDP_ORDERS]);

/* ε at δ from RDP ε(α) at one order: rdp + log(1 − 1/α) − log(δα)/(α − 1), at least 0; INFINITY for α ≤ 1.01. */
double rdp_to_epsilon(double alpha, double rdp, double delta);
/* The RDP at order alpha that converts to exactly epsilon; negative when even no release would exceed it. */
double rdp_from_epsilon(double alpha, double epsilon, double delta);
/* The least ε over a grid; the order it was found at. */
double rdp_curve_epsilon(const double *orders, const double *curve, size_t count, double delta, double *ret_order);

/* ERR_CONFIG for parameters out of range or not finite. */
int MUST_USE accountant_epsilon(double q, double z, uint64_t steps, double delta, double *ret_epsilon,
                                double *ret_order, struct error *err);
/* The least z (to 1e-6) with ε ≤ epsilon. ERR_CONFIG when none below 1e4 reaches it. */
int MUST_USE accountant_calibrate(double epsilon, double delta, double q, uint64_t steps, double *ret_z,
                                  struct error *err);

#endif
