// Codes to bytes by look-ups of 4 index bits. A decoder holds its tables, which fill() made once; line<SUB>() prepares a
// line of the first plane, SUB-th of the kRatio that share the line `upper` of the second plane; get<SUB, F>() gives the
// codes' integers (plus the offset) of field F. Included by int_kernels.inl's includers whose lookup() takes the lowest 4
// bits of a byte and wants the highest one to be 0.

inline Bytes load_table(const int8_t (&table)[64]) {
    return load_table16(table);
}

template <class Level>
inline void fill_table(int8_t (&table)[64], int offset, Level&& level) {
    for (int i = 0; i < 16; ++i) {
        table[i] = static_cast<int8_t>(level(i) + offset);
    }
}

inline Bytes low_nibble(Bytes v) {
    return v & splat_byte(15);
}
inline Bytes high_nibble(Bytes v) {
    return shift_right<4>(v) & splat_byte(15);
}

template <int BITS>
struct Decoder;

// Both halves of a nibble are codes.
template <>
struct Decoder<2> {
    static constexpr int kFields = 4, kRatio = 1;
    struct Line {
        Bytes low;
        Bytes high;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return t.value[i & 3]; });
        fill_table(t.decode[1], offset, [&](int i) { return t.value[i >> 2]; });
    }
    Decoder(const LevelTables& t, int) : even(load_table(t.decode[0])), odd(load_table(t.decode[1])) {}
    template <int SUB>
    Line line(Bytes low, Bytes) const {
        return {low_nibble(low), high_nibble(low)};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        return lookup(F % 2 == 0 ? even : odd, F < 2 ? l.low : l.high);
    }
    Bytes even;
    Bytes odd;
};

// Signs are put beside the magnitudes they belong to, in place of the neighbours' magnitudes:
//   bits          0-1  2-3  4-5  6-7
//   magnitudes     m0   m1   m2   m3
//   signs         (s1) (s0) (s3) (s2)    s0 in bit 2, s1 in bit 1, s2 in bit 6, s3 in bit 5
// so that fields 0 and 2 are a nibble of (m0 s0 m2 s2), fields 1 and 3 of (s1 m1 s3 m3).
template <>
struct Decoder<3> {
    static constexpr int kFields = 4, kRatio = 2;
    struct Line {
        Bytes even;
        Bytes odd;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return t.value[i & 7]; });
        fill_table(t.decode[1], offset, [&](int i) { return t.value[i >> 2 | (i & 2) << 1]; });
        fill_table(t.decode[2], 0, [](int i) { return (i & 1) << 2 | (i & 2) | (i & 4) << 4 | (i & 8) << 2; });
    }
    Decoder(const LevelTables& t, int)
        : even(load_table(t.decode[0])), odd(load_table(t.decode[1])), places(load_table(t.decode[2])) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        const Bytes signs = lookup(places, SUB == 0 ? low_nibble(upper) : high_nibble(upper));
        const Bytes mixed = choose(splat_byte(0x33), low, signs);
        return {mixed, mixed ^ low ^ signs};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        const Bytes two = F % 2 == 0 ? l.even : l.odd;
        return lookup(F % 2 == 0 ? even : odd, F < 2 ? low_nibble(two) : high_nibble(two));
    }
    Bytes even;
    Bytes odd;
    Bytes places;
};

template <>
struct Decoder<4> {
    static constexpr int kFields = 2, kRatio = 1;
    struct Line {
        Bytes low;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return t.value[i]; });
    }
    Decoder(const LevelTables& t, int) : table(load_table(t.decode[0])) {}
    template <int SUB>
    Line line(Bytes low, Bytes) const {
        return {low};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        return lookup(table, F == 0 ? low_nibble(l.low) : high_nibble(l.low));
    }
    Bytes table;
};

template <>
struct Decoder<5> {
    static constexpr int kFields = 2, kRatio = 4;
    struct Line {
        Bytes low;
        Bytes upper;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return t.magnitude[i]; });
        fill_table(t.decode[1], offset, [&](int i) { return -t.magnitude[i]; });
    }
    Decoder(const LevelTables& t, int) : positive(load_table(t.decode[0])), negative(load_table(t.decode[1])) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        return {low, upper};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        const Bytes index = F == 0 ? low_nibble(l.low) : high_nibble(l.low);
        return pick<2 * SUB + F>(l.upper, lookup(negative, index), lookup(positive, index));
    }
    Bytes positive;
    Bytes negative;
};

template <>
struct Decoder<6> {
    static constexpr int kFields = 2, kRatio = 2;
    struct Line {
        Bytes low;
        Bytes upper;
    };
    static void fill(LevelTables& t, int) {
        fill_table(t.decode[0], 0, [&](int i) { return t.magnitude[i]; });
        fill_table(t.decode[1], 0, [&](int i) { return t.magnitude[i + 16]; });
    }
    Decoder(const LevelTables& t, int o)
        : first(load_table(t.decode[0])), second(load_table(t.decode[1])), offset(splat_byte(o)) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        return {low, upper};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        const Bytes index = F == 0 ? low_nibble(l.low) : high_nibble(l.low);
        const Bytes level = pick<4 * SUB + 2 * F>(l.upper, lookup(second, index), lookup(first, index));
        return pick<4 * SUB + 2 * F + 1>(l.upper, subtract_bytes(offset, level), add_bytes(offset, level));
    }
    Bytes first;
    Bytes second;
    Bytes offset;
};

template <>
struct Decoder<8> {
    static constexpr int kFields = 1, kRatio = 1;
    struct Line {
        Bytes low;
    };
    static void fill(LevelTables&, int) {}
    Decoder(const LevelTables&, int o) : offset(splat_byte(o)) {}
    template <int SUB>
    Line line(Bytes low, Bytes) const {
        return {add_bytes(low, offset)};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        return l.low;
    }
    Bytes offset;
};
