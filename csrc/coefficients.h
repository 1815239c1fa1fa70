// Written by coefficients.py, which says what is fitted and how. Do not edit.
// clang-format off
#pragma once

namespace gn_kernels {

// For results that are rounded to 16 bits.
struct Half {
  using real = float;
  static constexpr bool has_centre = false;
  static constexpr bool is_fast = false;

  // exp(r), |r| <= ln 2 / 2: relative error 2.6e-6
  template <class T>
  GN_INLINE static T exp(T r) { return horner(r, 9.9999926e-1f, 9.99963409e-1f, 5.00043676e-1f, 1.67909031e-1f, 4.14578516e-2f); }

  // Phi(-a) exp(a^2 / 2), 0 <= a <= 13.3: relative error 3.6e-7
  template <class T>
  GN_INLINE static T mills(T a) {
    return divide(horner(a, 4.99999828e-1f, 3.60613408e-1f, 1.18751661e-1f, 1.68625167e-2f), horner(a, 1.0f, 1.51909398f, 9.49704505e-1f, 2.97451489e-1f, 4.22735005e-2f));
  }
};

// For results that are rounded to 16 bits on a GPU.
struct Fast {
  using real = float;
  static constexpr bool has_centre = false;
  static constexpr bool is_fast = true;

  // Phi(-a) exp(a^2 / 2), 0 <= a <= 13.3: relative error 3.6e-7
  template <class T>
  GN_INLINE static T mills(T a) {
    return horner(a, 4.99999828e-1f, 3.60613408e-1f, 1.18751661e-1f, 1.68625167e-2f) * fast_reciprocal(horner(a, 1.0f, 1.51909398f, 9.49704505e-1f, 2.97451489e-1f, 4.22735005e-2f));
  }
};

// For results in fp32.
struct Single {
  using real = float;
  static constexpr bool has_centre = true;
  static constexpr bool is_fast = false;

  // exp(r), |r| <= ln 2 / 2: relative error 3.1e-9
  template <class T>
  GN_INLINE static T exp(T r) { return horner(r, 1.0f, 1.0f, 4.99999935e-1f, 1.66665207e-1f, 4.16683875e-2f, 8.36871066e-3f, 1.38146045e-3f); }

  // Phi(-a) exp(a^2 / 2), 1 <= a <= 13.3: relative error 2.9e-8
  template <class T>
  GN_INLINE static T mills(T a) {
    return divide(horner(a, 4.99808614e-1f, 3.97611743e-1f, 1.4220767e-1f, 2.39897102e-2f), horner(a, 1.0f, 1.59119303f, 1.05844905f, 3.56377382e-1f, 6.01351096e-2f));
  }

  // (Phi(x) - 1/2) / x of s = x^2 <= 1: error of Phi 7.3e-9
  template <class T>
  GN_INLINE static T centre(T s) { return horner(s, 3.98942199e-1f, -6.64887285e-2f, 9.96416125e-3f, -1.16534332e-3f, 9.24650685e-5f); }
};

// For results in fp64.
struct Double {
  using real = double;
  static constexpr bool has_centre = false;
  static constexpr bool is_fast = false;

  // exp(r), |r| <= ln 2 / 2: relative error 3.6e-18
  template <class T>
  GN_INLINE static T exp(T r) { return horner(r, 1.0, 1.0, 5.0000000000000106e-1, 1.6666666666666412e-1, 4.1666666666530233e-2, 8.3333333334944871e-3, 1.388888894360722e-3, 1.9841269506601708e-4, 2.4801493126688886e-5, 2.7557586326203206e-6, 2.7630236972416749e-7, 2.500007577011112e-8); }

  // Phi(-a) exp(a^2 / 2), 0 <= a <= 37.7: relative error 4.7e-17
  template <class T>
  GN_INLINE static T mills(T a) {
    return divide(horner(a, 4.9999999999999998e-1, 7.7418792917954426e-1, 5.930552170656984e-1, 2.8862658481128412e-1, 9.7383278529488195e-2, 2.3526128076142283e-2, 4.0689220903985724e-3, 4.8747852051237019e-4, 3.6988302590356676e-5, 1.373921111834984e-6), horner(a, 1.0, 2.3462604191619445, 2.5581553982038741, 1.7111971766667908, 7.8004165375808475e-1, 2.5411751047934754e-1, 6.0186297901885014e-2, 1.0291991072200345e-2, 1.2253713525136778e-3, 9.271592510124539e-5, 3.443909506049576e-6));
  }
};

}  // namespace gn_kernels
