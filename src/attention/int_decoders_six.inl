// Codes to bytes by look-ups of 6 index bits (the highest two of a byte are ignored), which leave hardly anything to mask
// off: tables repeat their entries over the bits that do not count. Interface as in int_decoders.inl. The includer has
// load_table64.

inline Bytes load_table(const int8_t (&table)[64]) {
    return load_table64(table);
}

template <class Level>
inline void fill_table(int8_t (&table)[64], int offset, Level&& level) {
    for (int i = 0; i < 64; ++i) {
        table[i] = static_cast<int8_t>(level(i) + offset);
    }
}

template <int BITS>
struct Decoder;

template <>
struct Decoder<2> {
    static constexpr int kFields = 4, kRatio = 1;
    struct Line {
        Bytes low;
    };
    static void fill(LevelTables& t, int offset) {
        for (int f = 0; f < 3; ++f) {
            fill_table(t.decode[f], offset, [&](int i) { return t.value[i >> 2 * f & 3]; });
        }
    }
    Decoder(const LevelTables& t, int)
        : tables{load_table(t.decode[0]), load_table(t.decode[1]), load_table(t.decode[2])} {}
    template <int SUB>
    Line line(Bytes low, Bytes) const {
        return {low};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        return F < 3 ? lookup(tables[F % 3], l.low) : lookup(tables[0], shift_right<6>(l.low));
    }
    Bytes tables[3];
};

// Signs beside their magnitudes as in int_decoders.inl's.
template <>
struct Decoder<3> {
    static constexpr int kFields = 4, kRatio = 2;
    struct Line {
        Bytes even;
        Bytes odd;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return t.value[i & 7]; });
        fill_table(t.decode[1], offset, [&](int i) { return t.value[(i >> 2 & 3) | (i & 2) << 1]; });
        fill_table(t.decode[2], 0, [](int i) { return (i & 1) << 2 | (i & 2) | (i & 4) << 4 | (i & 8) << 2; });
    }
    Decoder(const LevelTables& t, int)
        : even(load_table(t.decode[0])), odd(load_table(t.decode[1])), places(load_table(t.decode[2])) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        const Bytes signs = lookup(places, SUB == 0 ? upper : shift_right<4>(upper));
        const Bytes own = splat_byte(0x33);
        return {choose(own, low, signs), choose(own, signs, low)};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        const Bytes two = F % 2 == 0 ? l.even : l.odd;
        return lookup(F % 2 == 0 ? even : odd, F < 2 ? two : shift_right<4>(two));
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
        fill_table(t.decode[0], offset, [&](int i) { return t.value[i & 15]; });
    }
    Decoder(const LevelTables& t, int) : table(load_table(t.decode[0])) {}
    template <int SUB>
    Line line(Bytes low, Bytes) const {
        return {low};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        return lookup(table, F == 0 ? l.low : shift_right<4>(l.low));
    }
    Bytes table;
};

// What is left of a nibble's byte takes the bits of the second plane: field 0 gets them above the nibble, field 1 below it.
// upper's bits from FROM on, moved to bit TO on.
template <int FROM, int TO>
inline Bytes move_bits(Bytes upper) {
    if constexpr (FROM < TO) {
        return shift_left<TO - FROM>(upper);
    } else if constexpr (FROM > TO) {
        return shift_right<FROM - TO>(upper);
    } else {
        return upper;
    }
}

template <>
struct Decoder<5> {
    static constexpr int kFields = 2, kRatio = 4;
    struct Line {
        Bytes low;
        Bytes upper;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset,
                   [&](int i) { return (i & 16) != 0 ? -t.magnitude[i & 15] : t.magnitude[i & 15]; });
        fill_table(t.decode[1], offset,
                   [&](int i) { return (i & 2) != 0 ? -t.magnitude[i >> 2] : t.magnitude[i >> 2]; });
    }
    Decoder(const LevelTables& t, int) : first(load_table(t.decode[0])), second(load_table(t.decode[1])) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        return {low, upper};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        if constexpr (F == 0) {
            return lookup(first, choose(splat_byte(0x0f), l.low, move_bits<2 * SUB, 4>(l.upper)));
        } else {
            return lookup(second, choose(splat_byte(0x3c), shift_right<2>(l.low), move_bits<2 * SUB, 0>(l.upper)));
        }
    }
    Bytes first;
    Bytes second;
};

template <>
struct Decoder<6> {
    static constexpr int kFields = 2, kRatio = 2;
    struct Line {
        Bytes low;
        Bytes upper;
    };
    static void fill(LevelTables& t, int offset) {
        fill_table(t.decode[0], offset, [&](int i) { return level(t, i); });
        fill_table(t.decode[1], offset, [&](int i) { return level(t, i >> 2 | (i & 3) << 4); });
    }
    Decoder(const LevelTables& t, int) : first(load_table(t.decode[0])), second(load_table(t.decode[1])) {}
    template <int SUB>
    Line line(Bytes low, Bytes upper) const {
        return {low, upper};
    }
    template <int SUB, int F>
    Bytes get(const Line& l) const {
        if constexpr (F == 0) {
            return lookup(first, choose(splat_byte(0x0f), l.low, move_bits<4 * SUB, 4>(l.upper)));
        } else {
            return lookup(second, choose(splat_byte(0x3c), shift_right<2>(l.low), move_bits<4 * SUB + 2, 0>(l.upper)));
        }
    }
    static int level(const LevelTables& t, int code) {
        return (code & 32) != 0 ? -t.magnitude[code & 31] : t.magnitude[code & 31];
    }
    Bytes first;
    Bytes second;
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
