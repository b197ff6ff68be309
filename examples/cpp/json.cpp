#include "json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <unordered_set>

#include <regex.h>

#include <nlohmann/json.hpp>

namespace edgehp::json {
namespace {

using Kind = Value::Kind;

constexpr std::size_t deepest = 64;
// Where Python's own parser gives up, whatever follows.
constexpr std::size_t hopeless = 500;
constexpr std::size_t shown = 60;

[[noreturn]] void fail(const std::string& what) { throw Fault(what); }

// The first `count` characters of UTF-8 text.
std::string head(const std::string& text, std::size_t count) {
    std::size_t end = 0;
    for (; end < text.size(); ++end)
        if ((static_cast<unsigned char>(text[end]) & 0xC0) != 0x80 && count-- == 0) break;
    return text.substr(0, end);
}

// Builds a Value from the events of nlohmann's parser, which calls them in the text's order.
class Builder : public nlohmann::json_sax<nlohmann::json> {
public:
    Value root;
    std::size_t depth_reached = 0;

    explicit Builder(const std::string& bytes) : bytes_(bytes) {}

    bool null() override { return put({}); }
    bool boolean(bool value) override {
        Value v;
        v.kind = Kind::boolean;
        v.boolean = value;
        return put(std::move(v));
    }
    bool number_integer(number_integer_t value) override { return put(Value::of(value)); }
    bool number_unsigned(number_unsigned_t value) override {
        if (value > static_cast<number_unsigned_t>(std::numeric_limits<std::int64_t>::max()))
            fail(std::to_string(value) + " does not fit into 64 bits");
        return put(Value::of(static_cast<std::int64_t>(value)));
    }
    bool number_float(number_float_t value, const string_t& raw) override {
        if (raw.find_first_of(".eE") == std::string::npos)
            fail(head(raw, 40) + " does not fit into 64 bits");
        return put(Value::of(value));
    }
    bool string(string_t& value) override { return put(Value::of(std::move(value))); }
    bool binary(binary_t&) override { return false; }
    bool start_object(std::size_t) override { return open(Kind::object); }
    bool start_array(std::size_t) override { return open(Kind::array); }
    bool key(string_t& name) override {
        if (depth_ <= deepest) open_.back().keys.push_back(std::move(name));
        return true;
    }
    bool end_object() override {
        if (depth_ <= deepest) {
            std::unordered_set<std::string_view> seen;
            for (const auto& name : open_.back().keys)
                if (!seen.insert(name).second)
                    fail("key " + quoted(head(name, shown)) + " appears twice");
        }
        return close();
    }
    bool end_array() override { return close(); }
    bool parse_error(std::size_t at, const std::string& token,
                     const nlohmann::detail::exception& error) override {
        if (depth_reached > hopeless) fail("it is nested too deeply");
        if (error.id == 406) fail(head(token, 40) + " is not finite");
        // The error is at the first letter.
        for (const std::string_view name : {"NaN", "Infinity"})
            if (at > 0 && bytes_.compare(at - 1, name.size(), name) == 0)
                fail((token == "-I" ? "-" : "") + std::string(name) + " is no JSON number");
        fail("it is not JSON in UTF-8");
    }

private:
    const std::string& bytes_;
    std::vector<Value> open_;
    std::size_t depth_ = 0;

    bool open(Kind kind) {
        depth_reached = std::max(depth_reached, ++depth_);
        if (depth_ <= deepest) {
            open_.emplace_back();
            open_.back().kind = kind;
        }
        return true;
    }
    bool close() {
        if (depth_-- > deepest) return true;
        Value done = std::move(open_.back());
        open_.pop_back();
        return put(std::move(done));
    }
    bool put(Value value) {
        if (depth_ > deepest) return true;
        if (open_.empty())
            root = std::move(value);
        else
            open_.back().items.push_back(std::move(value));
        return true;
    }
};

struct Style {
    bool ascii;
    bool sorted;
    std::string_view comma, colon;
};

void write_text(std::string& out, const std::string& text, bool ascii) {
    char piece[16];
    out += '"';
    for (std::size_t i = 0; i < text.size();) {
        const auto c = static_cast<unsigned char>(text[i]);
        static constexpr std::string_view plain = "\"\\\b\f\n\r\t", names = "\"\\bfnrt";
        if (const auto known = plain.find(text[i]); known != plain.npos) {
            out += '\\';
            out += names[known];
            ++i;
        } else if (c < 0x20 || (ascii && c == 0x7F)) {
            std::snprintf(piece, sizeof piece, "\\u%04x", c);
            out += piece;
            ++i;
        } else if (c < 0x80 || !ascii) {
            out += text[i++];
        } else {
            const std::size_t more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
            unsigned code = c & (0x3Fu >> more);
            for (std::size_t k = 1; k <= more && i + k < text.size(); ++k)
                code = code << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3F);
            i += more + 1;
            if (code < 0x10000) {
                std::snprintf(piece, sizeof piece, "\\u%04x", code);
            } else {
                code -= 0x10000;
                std::snprintf(piece, sizeof piece, "\\u%04x\\u%04x", 0xD800 + (code >> 10),
                              0xDC00 + (code & 0x3FF));
            }
            out += piece;
        }
    }
    out += '"';
}

void write(std::string& out, const Value& value, const Style& style,
           std::string_view without = {}) {
    switch (value.kind) {
        case Kind::null: out += "null"; return;
        case Kind::boolean: out += value.boolean ? "true" : "false"; return;
        case Kind::integer: out += std::to_string(value.integer); return;
        case Kind::real: out += number(value.real); return;
        case Kind::text: write_text(out, value.text, style.ascii); return;
        case Kind::array:
        case Kind::object: break;
    }
    const bool object = value.kind == Kind::object;
    std::vector<std::size_t> order(value.items.size());
    std::iota(order.begin(), order.end(), 0);
    // The order of UTF-8 bytes is that of the characters they stand for.
    if (object && style.sorted)
        std::sort(order.begin(), order.end(),
                  [&](auto a, auto b) { return value.keys[a] < value.keys[b]; });
    out += object ? '{' : '[';
    bool first = true;
    for (const std::size_t i : order) {
        if (object && !without.empty() && value.keys[i] == without) continue;
        if (!first) out += style.comma;
        first = false;
        if (object) {
            write_text(out, value.keys[i], style.ascii);
            out += style.colon;
        }
        write(out, value.items[i], style);
    }
    out += object ? '}' : ']';
}

const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::null: return "null";
        case Kind::boolean: return "bool";
        case Kind::integer: return "int";
        case Kind::real: return "float";
        case Kind::text: return "str";
        case Kind::array: return "array";
        case Kind::object: return "object";
    }
    return "";
}

std::string show(const Value& value) {
    std::string text;
    if (value.kind == Kind::text)
        text = quoted(value.text);
    else
        write(text, value, {true, false, ", ", ": "});
    return head(text, shown) == text ? text : head(text, shown - 3) + "...";
}

// Walks a value and its schema together, as edgehp's reader does: members in the text's order,
// then the members that are missing, then the rule for the whole record.
class Checker {
    static constexpr const char* one_of_several = "\x01";

public:
    Checker(const Value& schema, const Rules& rules) : root_(schema), rules_(rules) {}

    void check(const Value& value, const Value& schema, const std::string& path,
               const std::string& or_null = "") const {
        if (const Value* reference = schema.find("$ref")) {
            const std::string name = reference->text.substr(reference->text.rfind('/') + 1);
            return check(value, root_["$defs"][name], path, or_null);
        }
        if (const Value* either = schema.find("anyOf")) {
            if (!value.is_null()) check(value, either->items.at(0), path, " | null");
            return;
        }
        if (const Value* choices = schema.find("enum")) return check_choice(value, *choices, path);
        const Value* type = schema.find("type");
        if (type == nullptr) return;  // anything
        static const std::map<std::string, Kind> kinds = {
            {"object", Kind::object},   {"array", Kind::array}, {"string", Kind::text},
            {"integer", Kind::integer}, {"number", Kind::real}, {"boolean", Kind::boolean}};
        const Kind wanted = kinds.at(type->text);
        const std::string what = name_of(wanted);
        if (value.kind != wanted && !(wanted == Kind::real && value.kind == Kind::integer))
            refuse(value, path, what + or_null, true);
        if (wanted == Kind::text) check_text(value, schema, path, what);
        if (wanted == Kind::integer || wanted == Kind::real)
            check_number(value, schema, path, what);
        if (wanted == Kind::array) check_array(value, schema, path, what);
        if (wanted == Kind::object) check_object(value, schema, path);
    }

private:
    const Value& root_;
    const Rules& rules_;

    // `wrong_type`: the kind of value is wrong, else its size, form or range.
    [[noreturn]] static void refuse(const Value& value, std::string path,
                                    const std::string& expected, bool wrong_type) {
        std::string found = show(value);
        if (const auto at = path.find(one_of_several); at != path.npos) {
            // Which of several values in a map is out of range, edgehp's reader does not know.
            path.replace(at, wrong_type ? 1 : path.npos, wrong_type ? "" : "*");
            if (!wrong_type) found = "'out of range'";
        }
        if (wrong_type && value.is_null()) found = "of the wrong type (null)";
        fail("key '" + path + "' is " + found + "; expected " + expected);
    }

    static void check_choice(const Value& value, const Value& choices, const std::string& path) {
        std::string known;
        for (const Value& choice : choices.items) {
            if (show(choice) == show(value) && choice.kind == value.kind) return;
            known += (known.empty() ? "" : ", ") + show(choice);
        }
        if (value.kind != choices.items.at(0).kind)
            refuse(value, path, name_of(choices.items.at(0).kind), true);
        refuse(value, path, "one of " + known, false);
    }

    static void check_text(const Value& value, const Value& schema, const std::string& path,
                           const std::string& what) {
        const auto length = static_cast<std::int64_t>(
            std::count_if(value.text.begin(), value.text.end(),
                          [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
        // Before the pattern, which must not be held against megabytes.
        if (const Value* most = schema.find("maxLength"); most && length > most->integer)
            refuse(value, path, what + " of length <= " + std::to_string(most->integer), false);
        const Value* pattern = schema.find("pattern");
        if (pattern && search(value.text, pattern->text).empty()) {
            std::string form = quoted(pattern->text);
            const std::string newline = R"((?!\\n))";
            for (std::size_t at; (at = form.find(newline)) != form.npos;)
                form.erase(at, newline.size());
            refuse(value, path, "the form " + form, false);
        }
    }

    static void check_number(const Value& value, const Value& schema, const std::string& path,
                             const std::string& what) {
        const auto limit = [&](const Value& bound) {
            return what == "int" ? std::to_string(bound.integer) : number(bound.number());
        };
        if (const Value* least = schema.find("minimum"); least && value.number() < least->number())
            refuse(value, path, what + " >= " + limit(*least), false);
        if (const Value* most = schema.find("maximum"); most && value.number() > most->number())
            refuse(value, path, what + " <= " + limit(*most), false);
    }

    void check_array(const Value& value, const Value& schema, const std::string& path,
                     const std::string& what) const {
        const auto size = static_cast<std::int64_t>(value.items.size());
        const Value* least = schema.find("minItems");
        const Value* most = schema.find("maxItems");
        if (least && most && least->integer == most->integer && size != least->integer)
            refuse(value, path, what + " of length " + std::to_string(least->integer), false);
        if (least && size < least->integer)
            refuse(value, path, what + " of length >= " + std::to_string(least->integer), false);
        if (most && size > most->integer)
            refuse(value, path, what + " of length <= " + std::to_string(most->integer), false);
        const Value* each = schema.find("items");
        const Value* firsts = schema.find("prefixItems");
        for (std::size_t i = 0; i < value.items.size(); ++i)
            check(value.items[i], firsts ? firsts->items.at(i) : *each,
                  path + "[" + std::to_string(i) + "]");
    }

    void check_object(const Value& value, const Value& schema, const std::string& path) const {
        const std::string before = path.empty() ? "" : path + ".";
        const Value* known = schema.find("properties");
        const Value* others = schema.find("additionalProperties");
        for (std::size_t i = 0; i < value.items.size(); ++i) {
            if (known != nullptr) {
                const Value* member = known->find(value.keys[i]);
                if (member == nullptr) {
                    std::string names;
                    for (const std::string& name : known->keys)
                        names += (names.empty() ? "" : ", ") + name;
                    fail("key '" + before + value.keys[i] + "' is not known; known: " + names);
                }
                check(value.items[i], *member, before + value.keys[i]);
            } else if (others != nullptr && others->kind == Kind::object) {
                check(value.items[i], *others,
                      before + (value.items.size() > 1 ? one_of_several : "") + value.keys[i]);
            }
        }
        if (const Value* required = schema.find("required"))
            for (const Value& name : required->items)
                if (value.find(name.text) == nullptr)
                    fail("key '" + before + name.text + "' is missing");
        if (const Value* title = schema.find("title"))
            if (const auto rule = rules_.find(title->text); rule != rules_.end())
                rule->second(value);
    }
};

}  // namespace

Value Value::of(std::int64_t value) {
    Value v;
    v.kind = Kind::integer;
    v.integer = value;
    return v;
}

Value Value::of(double value) {
    Value v;
    v.kind = Kind::real;
    v.real = value;
    return v;
}

Value Value::of(std::string value) {
    Value v;
    v.kind = Kind::text;
    v.text = std::move(value);
    return v;
}

const Value* Value::find(std::string_view key) const {
    for (std::size_t i = 0; i < keys.size(); ++i)
        if (keys[i] == key) return &items[i];
    return nullptr;
}

const Value& Value::operator[](std::string_view key) const {
    if (const Value* found = find(key)) return *found;
    throw Fault("key '" + std::string(key) + "' is missing");
}

Value parse(const std::string& bytes) {
    // nlohmann takes a zero byte for the end, and skips a byte order mark.
    if (bytes.find('\0') != bytes.npos || bytes.compare(0, 3, "\xEF\xBB\xBF") == 0)
        fail("it is not JSON in UTF-8");
    Builder builder(bytes);
    nlohmann::json::sax_parse(bytes, &builder);
    if (builder.depth_reached > deepest) fail("it is nested too deeply");
    return std::move(builder.root);
}

std::string canonical(const Value& value, bool ascii, std::string_view without) {
    std::string out;
    write(out, value, {ascii, true, ",", ":"}, without);
    return out;
}

std::string number(double value) {
    if (!std::isfinite(value)) return "null";
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value,
                                   std::chars_format::scientific).ptr;
    const std::string text(digits, end);
    const auto e = text.find('e');
    const int exponent = std::atoi(text.c_str() + e + 1);
    // Python's repr: positional from 1e-4 to below 1e16.
    if (exponent < -4 || exponent >= 16) return text;
    const auto fixed = std::to_chars(digits, digits + sizeof digits, value,
                                     std::chars_format::fixed).ptr;
    const std::string plain(digits, fixed);
    return plain.find('.') == plain.npos ? plain + ".0" : plain;
}

std::string quoted(const std::string& text) {
    const bool twice = text.find('\'') != text.npos && text.find('"') == text.npos;
    const char quote = twice ? '"' : '\'';
    std::string out(1, quote);
    char piece[8];
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == quote || c == '\\') {
            (out += '\\') += c;
        } else if (c == '\n' || c == '\r' || c == '\t') {
            (out += '\\') += c == '\n' ? 'n' : c == '\r' ? 'r' : 't';
        } else if (byte < 0x20 || byte == 0x7F) {
            std::snprintf(piece, sizeof piece, "\\x%02x", byte);
            out += piece;
        } else {
            out += c;
        }
    }
    return out + quote;
}

std::string escaped(const std::string& text) {
    std::string out;
    write_text(out, text, true);
    return out;
}

std::vector<std::string> search(const std::string& text, std::string pattern) {
    // Python's "$" would also match before a final newline, which its patterns rule out.
    const std::string no_newline = "(?!\\n)";
    if (const auto at = pattern.find(no_newline); at != pattern.npos)
        pattern.erase(at, no_newline.size());
    regex_t compiled{};
    if (regcomp(&compiled, pattern.c_str(), REG_EXTENDED) != 0)
        throw std::logic_error("no POSIX expression: " + pattern);
    regmatch_t spans[4];
    std::vector<std::string> groups;
    // A zero byte would end the text early.
    if (text.find('\0') == text.npos && regexec(&compiled, text.c_str(), 4, spans, 0) == 0)
        for (const regmatch_t& span : spans)
            groups.push_back(span.rm_so < 0 ? "" : text.substr(span.rm_so, span.rm_eo - span.rm_so));
    regfree(&compiled);
    return groups;
}

void check(const Value& value, const Value& schema, const Rules& rules) {
    Checker(schema, rules).check(value, schema, "");
}

}  // namespace edgehp::json
