// Loops whose turns compilers may take several at once, although sums come out a little different.
//
//     float sum = 0;
//     CMG_SIMD(reduction(+ : sum))
//     for (size_t i = 0; ...
//
// MSVC takes no such pragma beside OpenMP, and vectorises what it can without.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define CMG_SIMD(clauses)
#else
#define CMG_PRAGMA(text) _Pragma(#text)
#define CMG_SIMD(clauses) CMG_PRAGMA(omp simd clauses)
#endif
