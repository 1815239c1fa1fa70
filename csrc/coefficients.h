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
  GN_INLINE static float exp(float r) { return horner(r, 9.9999926e-1f, 9.99963409e-1f, 5.00043676e-1f, 1.67909031e-1f, 4.14578516e-2f); }

  // Phi(-a) exp(a^2 / 2), 0 <= a <= 13.3: relative error 3.6e-7
  GN_INLINE static float mills(float a) {
    return divide(horner(a, 4.99999828e-1f, 3.60613408e-1f, 1.18751661e-1f, 1.68625167e-2f), horner(a, 1.0f, 1.51909398f, 9.49704505e-1f, 2.97451489e-1f, 4.22735005e-2f));
  }
};

// For results that are rounded to 16 bits on a GPU.
struct Fast {
  using real = float;
  static constexpr bool has_centre = false;
  static constexpr bool is_fast = true;

  // Phi(-a) exp(a^2 / 2), 0 <= a <= 13.3: relative error 3.6e-7
  GN_INLINE static float mills(float a) {
    return horner(a, 4.99999828e-1f, 3.60613408e-1f, 1.18751661e-1f, 1.68625167e-2f) * fast_reciprocal(horner(a, 1.0f, 1.51909398f, 9.49704505e-1f, 2.97451489e-1f, 4.22735005e-2f));
  }
};

// For results in fp32.
struct Single {
  using real = float;
  static constexpr bool has_centre = true;
  static constexpr bool is_fast = false;

  // exp(r), |r| <= ln 2 / 2: relative error 3.1e-9
  GN_INLINE static float exp(float r) { return horner(r, 1.0f, 1.0f, 4.99999935e-1f, 1.66665207e-1f, 4.16683875e-2f, 8.36871066e-3f, 1.38146045e-3f); }

  // Phi(-a) exp(a^2 / 2), 1 <= a <= 13.3: relative error 2.9e-8
  GN_INLINE static float mills(float a) {
    return divide(horner(a, 4.99808614e-1f, 3.97611743e-1f, 1.4220767e-1f, 2.39897102e-2f), horner(a, 1.0f, 1.59119303f, 1.05844905f, 3.56377382e-1f, 6.01351096e-2f));
  }

  // (Phi(x) - 1/2) / x of s = x^2 <= 1: error of Phi 7.3e-9
  GN_INLINE static float centre(float s) { return horner(s, 3.98942199e-1f, -6.64887285e-2f, 9.96416125e-3f, -1.16534332e-3f, 9.24650685e-5f); }
};

// For results in fp64.
struct Double {
  using real = double;
  static constexpr bool has_centre = true;
  static constexpr bool is_fast = false;

  // exp(r), |r| <= ln 2 / 2: relative error 3.6e-18
  GN_INLINE static double exp(double r) { return horner(r, 1.0, 1.0, 5.0000000000000106e-1, 1.6666666666666412e-1, 4.1666666666530233e-2, 8.3333333334944871e-3, 1.388888894360722e-3, 1.9841269506601708e-4, 2.4801493126688886e-5, 2.7557586326203206e-6, 2.7630236972416749e-7, 2.500007577011112e-8); }

  // Phi(-a) exp(a^2 / 2), 1 <= a <= 37.7: relative error 7.1e-17
  GN_INLINE static double mills(double a) {
    return divide(horner(a, 5.0000000178126461e-1, 7.5757188380498597e-1, 5.6403011870130102e-1, 2.6426143075220404e-1, 8.459812425502454e-2, 1.8943134874641989e-2, 2.914966533238177e-3, 2.8583755565009925e-4, 1.4181779649862404e-5), horner(a, 1.0, 2.3130283591529955, 2.473589727742911, 1.6116095849041705, 7.084557120763309e-1, 2.1929168640691661e-1, 4.8199886108196874e-2, 7.3422859794095161e-3, 7.1648849896907729e-4, 3.5548449854806031e-5));
  }

  // (Phi(x) - 1/2) / x of s = x^2 <= 1: error of Phi 3.8e-18
  GN_INLINE static double centre(double s) { return horner(s, 3.989422804014326e-1, -6.649038006689948e-2, 9.9735570099064356e-3, -1.1873282141931533e-3, 1.1543468056964233e-4, -9.4446330410092421e-6, 6.6592128697212128e-7, -4.1163584285601576e-8, 2.2223269651361132e-9, -8.9261738874599135e-11); }
};

}  // namespace gn_kernels
