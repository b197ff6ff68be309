// JSON as edgehp reads and writes it: strict, in one canonical form, checked against a schema.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace edgehp::json {

// What is wrong with a text or a value, without the file's name.
class Fault : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A JSON value. The members of an object keep their order: faults are reported in it.
struct Value {
    enum class Kind { null, boolean, integer, real, text, array, object };

    Kind kind = Kind::null;
    bool boolean = false;
    std::int64_t integer = 0;
    double real = 0;
    std::string text;
    std::vector<std::string> keys;  // of an object, as many as `items`
    std::vector<Value> items;       // of an array or an object

    static Value of(std::int64_t value);
    static Value of(double value);
    static Value of(std::string value);

    // The member called `key`, nullptr where there is none or this is no object.
    const Value* find(std::string_view key) const;
    // The same of a value that was checked: Fault where it is missing.
    const Value& operator[](std::string_view key) const;
    bool is_null() const { return kind == Kind::null; }
    double number() const { return kind == Kind::integer ? static_cast<double>(integer) : real; }
};

// Parse a JSON text in UTF-8. Fault: it is no JSON, a key appears twice, a number is not finite or
// beyond 64 bits, or it is nested deeper than 64 levels.
Value parse(const std::string& bytes);

// The canonical form that digests are made of: keys sorted, no blanks, numbers as Python writes
// them. `ascii` escapes every other character; `without` names a key to leave out at the top.
std::string canonical(const Value& value, bool ascii, std::string_view without = {});

// A number in the shortest form that reads back the same, as Python writes it: 0.1, 1e-06, 2.0.
std::string number(double value);
// A text in Python's quotes.
std::string quoted(const std::string& text);
// A text as a JSON string in ASCII.
std::string escaped(const std::string& text);

// Where a POSIX extended expression is found in `text`: the whole match, then its groups; nothing
// where it is not.
std::vector<std::string> search(const std::string& text, std::string pattern);

// What a schema cannot say of a record, by the record's title; it throws Fault.
using Rules = std::map<std::string, std::function<void(const Value&)>>;

// Check `value` against `schema` (the part of JSON Schema that manifest-schema.json uses) and
// `rules`. Fault: the first thing that does not fit, in the words of edgehp/files.py.
void check(const Value& value, const Value& schema, const Rules& rules);

}  // namespace edgehp::json
