/* CRC-32 as zlib defines it. With the processor's carry-less multiplication where there is one:
 * "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Gopal et al., 2009.
 * Its constants are powers of x modulo the polynomial, for folding 512, 128 and 64 bits. */
#ifndef EXPBUF_CRC_H
#define EXPBUF_CRC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint32_t crc_table[8][256];

static void
crc_prepare(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
        crc_table[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (uint32_t i = 0; i < 256; i++)
            crc_table[k][i] =
                (crc_table[k - 1][i] >> 8) ^ crc_table[0][crc_table[k - 1][i] & 0xFF];
}

/* `state` is inverted here and below, as it goes through the bytes. */
static uint32_t
crc_by_table(uint32_t state, const uint8_t *at, size_t size)
{
    while (size >= 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        word ^= state;
        state = crc_table[7][word & 0xFF] ^ crc_table[6][(word >> 8) & 0xFF] ^
                crc_table[5][(word >> 16) & 0xFF] ^ crc_table[4][(word >> 24) & 0xFF] ^
                crc_table[3][(word >> 32) & 0xFF] ^ crc_table[2][(word >> 40) & 0xFF] ^
                crc_table[1][(word >> 48) & 0xFF] ^ crc_table[0][word >> 56];
        at += 8;
        size -= 8;
    }
    while (size--)
        state = (state >> 8) ^ crc_table[0][(state ^ *at++) & 0xFF];
    return state;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLD(x, k, y)                                                                              \
    _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00),                                  \
                                _mm_clmulepi64_si128(x, k, 0x11)),                                 \
                  y)

/* Of at least 64 bytes, a multiple of 16. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t
crc_by_folding(uint32_t state, const uint8_t *at, size_t size)
{
    const __m128i by_four = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_one = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i to_64 = _mm_set_epi64x(0, 0x0163cd6124);
    const __m128i polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
    const __m128i *from = (const __m128i *)at;
    __m128i a = _mm_xor_si128(_mm_loadu_si128(from), _mm_cvtsi32_si128((int)state));
    __m128i b = _mm_loadu_si128(from + 1);
    __m128i c = _mm_loadu_si128(from + 2);
    __m128i d = _mm_loadu_si128(from + 3);
    for (from += 4, size -= 64; size >= 64; from += 4, size -= 64) {
        a = FOLD(a, by_four, _mm_loadu_si128(from));
        b = FOLD(b, by_four, _mm_loadu_si128(from + 1));
        c = FOLD(c, by_four, _mm_loadu_si128(from + 2));
        d = FOLD(d, by_four, _mm_loadu_si128(from + 3));
    }
    a = FOLD(a, by_one, b);
    a = FOLD(a, by_one, c);
    a = FOLD(a, by_one, d);
    for (; size >= 16; from++, size -= 16)
        a = FOLD(a, by_one, _mm_loadu_si128(from));
    /* 128 bits to 64, to 32 (Barrett). */
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_one, 0x10));
    b = _mm_srli_si128(a, 4);
    a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), to_64, 0x00), b);
    b = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(a, low), polynomial, 0x10), low);
    a = _mm_xor_si128(a, _mm_clmulepi64_si128(b, polynomial, 0x00));
    return (uint32_t)_mm_extract_epi32(a, 1);
}

static int
crc_folds(void)
{
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}
#else
static uint32_t
crc_by_folding(uint32_t state, const uint8_t *at, size_t size)
{
    return crc_by_table(state, at, size);
}

static int
crc_folds(void)
{
    return 0;
}
#endif

static int crc_is_folded; /* set with the tables */

/* Of these bytes, behind others whose CRC is `crc` (0: none). */
static uint32_t
crc32_of(uint32_t crc, const void *bytes, size_t size)
{
    const uint8_t *at = bytes;
    uint32_t state = ~crc;
    if (crc_is_folded && size >= 64) {
        size_t whole = size & ~(size_t)15;
        state = crc_by_folding(state, at, whole);
        at += whole;
        size -= whole;
    }
    return ~crc_by_table(state, at, size);
}

#endif
