// Load an artifact: edgehp/artifact/check.py in C++, in the same order and with the same words.
//
// An engine file is executable code, so everything is checked against the device and the bytes
// before any engine opens: manifest, state, device, files.
#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <system_error>

#include <openssl/evp.h>

#include "edgehp.hpp"

// The text of manifest-schema.json, put in by CMake.
extern const char* const edgehp_manifest_schema;

namespace edgehp {
namespace {

namespace fs = std::filesystem;
using json::Value;

constexpr std::int64_t schema_version = 2;
constexpr std::size_t largest_manifest = 4 << 20;
const std::string manifest_name = "manifest.json";
// Modules of one target that differ in nothing an engine sees, as targets/*.toml lists them.
const std::map<std::string, std::set<std::string>> same_modules = {
    {"orin-agx-64gb", {"p3701-0005", "p3701-0000"}},
    {"orin-nano-8gb", {"p3767-0003", "p3767-0005"}},
};

[[noreturn]] void incompatible(const std::string& what) { throw Error(EDGEHP_INCOMPATIBLE, what); }

class Sha256 {
public:
    Sha256() { check(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr)); }
    void update(const void* data, std::size_t size) {
        check(EVP_DigestUpdate(context_.get(), data, size));
    }
    std::string hex() {
        std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
        unsigned size = 0;
        check(EVP_DigestFinal_ex(context_.get(), digest.data(), &size));
        std::string text;
        for (unsigned i = 0; i < size; ++i)
            for (const int nibble : {digest[i] >> 4, digest[i] & 15})
                text += "0123456789abcdef"[nibble];
        return text;
    }

private:
    std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_{EVP_MD_CTX_new(),
                                                               EVP_MD_CTX_free};
    static void check(bool done) {
        if (!done) throw Error(EDGEHP_ENVIRONMENT, "OpenSSL cannot compute SHA-256");
    }
};

std::string sha256(const std::string& bytes) {
    Sha256 digest;
    digest.update(bytes.data(), bytes.size());
    return digest.hex();
}

std::string sha256_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> piece(1 << 20);
    Sha256 digest;
    while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())), file.gcount() > 0)
        digest.update(piece.data(), static_cast<std::size_t>(file.gcount()));
    if (!file.eof()) throw Error(EDGEHP_DATA, path + ": cannot be read");
    return digest.hex();
}

// At most `limit` bytes of a file, nothing where it cannot be read.
std::optional<std::string> read_file(const std::string& path, std::size_t limit) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return std::nullopt;
    std::string bytes(limit, '\0');
    file.read(bytes.data(), static_cast<std::streamsize>(limit));
    bytes.resize(static_cast<std::size_t>(file.gcount()));
    return bytes;
}

// A regular file that is reached over no symbolic link inside the artifact.
struct stat require_plain(const std::string& root, const std::string& name) {
    struct stat status {};
    std::string step = root;
    for (const fs::path& part : fs::path(name)) {
        step += "/" + part.string();
        if (lstat(step.c_str(), &status) != 0)
            incompatible(step + ": missing (" + std::generic_category().message(errno) +
                         "), expected the artifact's file; copy the artifact again or build it "
                         "again");
        if (S_ISLNK(status.st_mode))
            incompatible(step + ": found a symbolic link, expected a file inside the artifact; "
                                "copy the artifact again, following links");
    }
    if (!S_ISREG(status.st_mode))
        incompatible(step + ": expected a regular file; build the artifact again");
    return status;
}

const Value& schema() {
    static const Value parsed = json::parse(edgehp_manifest_schema);
    return parsed;
}

// A specification of preprocessing with the keys that it leaves out, every number but the size a
// float: what its digest is of.
Value completed(const Value& spec) {
    Value whole;
    whole.kind = Value::Kind::object;
    const Value& known = schema()["$defs"]["Preprocessing"]["properties"];
    for (std::size_t i = 0; i < known.keys.size(); ++i) {
        const Value* found = spec.find(known.keys[i]);
        Value value = found ? *found : known.items[i]["default"];
        if (known.keys[i] == "box_scale") value = Value::of(value.number());
        for (Value& item : value.items) item = Value::of(item.number());
        whole.keys.push_back(known.keys[i]);
        whole.items.push_back(std::move(value));
    }
    return whole;
}

// Refuse a specification that no photo can satisfy.
Preprocessing preprocessing_of(const Value& spec) {
    const Value whole = completed(spec);
    const std::int64_t size = whole["size"].integer;
    const std::string colour = whole["colour"].text;
    const std::size_t channels = colour == "GREY" ? 1 : 3;
    Preprocessing found{0, whole["resize"].text, whole["box_rule"].text, whole["box_scale"].real};
    const auto require = [](bool fits, const std::string& otherwise) {
        if (!fits) throw json::Fault(otherwise);
    };
    require(size >= 16 && size <= 1024,
            "input size " + std::to_string(size) + " is outside 16..1024 pixels");
    require(colour == "RGB" || colour == "BGR" || colour == "GREY",
            "colour order " + json::quoted(colour) + " is none of RGB, BGR, GREY");
    require(whole["mean"].items.size() == channels && whole["std"].items.size() == channels,
            colour + " needs " + std::to_string(channels) + " values of mean and std");
    for (const Value& value : whole["std"].items)
        require(value.real > 0, "every std must be positive");
    require(found.resize == "area" || found.resize == "linear",
            "resize " + json::quoted(found.resize) + " is neither 'area' nor 'linear'");
    require(found.box_rule == "stretch" || found.box_rule == "square",
            "box rule " + json::quoted(found.box_rule) + " is none of stretch, square");
    require(found.box_scale >= 0.1 && found.box_scale <= 10,
            "box scale " + json::number(found.box_scale) + " is outside 0.1..10");
    found.size = static_cast<int>(size);
    return found;
}

// What concerns several keys of the manifest: the checks of edgehp/artifact/manifest.py.
void check_document(const Value& m) {
    const Value& how = m["preprocessing"];
    if (sha256(json::canonical(completed(how["spec"]), true)) != how["digest"].text)
        throw json::Fault("preprocessing.digest does not fit preprocessing.spec");
    const Value& spec = m["network"]["spec"];
    if (!spec.is_null() && sha256(json::canonical(spec, true)) != m["network"]["digest"].text)
        throw json::Fault("network.digest does not fit network.spec");
    const Value& engine = m["engine"];
    if ((m["state"].text == "complete") == engine.is_null())
        throw json::Fault("state " + m["state"].text + " with" + (engine.is_null() ? "out" : "") +
                          " an engine");
    std::set<std::string> listed, lower;
    for (const Value& file : m["files"].items) {
        std::string path = file["path"].text;
        listed.insert(path);
        std::transform(path.begin(), path.end(), path.begin(),
                       [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
        if (!lower.insert(path).second) throw json::Fault("files: a path is listed twice");
    }
    if (listed.count(manifest_name))
        throw json::Fault("files: " + manifest_name + " cannot list itself");
    const auto require_listed = [&](const std::string& key, const Value& path) {
        if (!path.is_null() && !listed.count(path.text))
            throw json::Fault(key + ": " + path.text + " is not listed under files");
    };
    require_listed("graph", m["graph"]);
    require_listed("golden.file", m["golden"]["file"]);
    if (!engine.is_null())
        for (std::size_t i = 0; i < engine["files"].items.size(); ++i)
            require_listed("engine.files[" + std::to_string(i) + "]", engine["files"].items[i]);
    if (const Value& calibration = m["calibration"]; !calibration.is_null()) {
        require_listed("calibration.list", calibration["list"]);
        require_listed("calibration.table", calibration["table"]);
    }
}

const json::Rules rules = {
    {"Preprocessing", [](const Value& spec) { preprocessing_of(spec); }},
    {"EngineRecord",
     [](const Value& engine) {
         const auto best = engine["best_batch"].integer;
         if (engine["min_batch"].integer > best || best > engine["max_batch"].integer)
             throw json::Fault("key 'engine': expected min_batch <= best_batch <= max_batch");
     }},
    {"Golden",
     [](const Value& golden) {
         if (golden["angles"].items.size() != golden["spread"].items.size())
             throw json::Fault("key 'golden': as many spreads as angles expected");
     }},
    {"_Document", check_document},
};

// A version of the format that this program does not read, said before anything else of it.
void check_schema_version(const Value& values, const std::string& where) {
    const Value* version = values.find("schema_version");
    if (version == nullptr || version->kind != Value::Kind::integer ||
        version->integer == schema_version)
        return;
    const std::string found = where + ": found manifest schema " +
                              std::to_string(version->integer);
    const std::string expected = std::to_string(schema_version);
    if (version->integer < schema_version)
        incompatible(found + ", expected " + expected + ": made by an older edgehp: build it again");
    const Value* by = values.find("edgehp_version");
    incompatible(found + ", this edgehp reads up to " + expected +
                 "; it was written by edgehp " + (by ? by->text.substr(0, 40) : "None") +
                 ": install that version or build the artifact again");
}

const char* python_name(Value::Kind kind) {
    switch (kind) {
        case Value::Kind::null: return "NoneType";
        case Value::Kind::boolean: return "bool";
        case Value::Kind::integer: return "int";
        case Value::Kind::real: return "float";
        case Value::Kind::text: return "str";
        default: return "list";
    }
}

Value read_manifest(const std::string& root) {
    std::error_code ignored;
    if (!fs::is_directory(root, ignored))
        throw Error(EDGEHP_DATA, root + ": no such artifact directory; make one with 'edgehp build', "
                                        "or name one that holds a " + manifest_name);
    require_plain(root, manifest_name);
    const std::string where = root + "/" + manifest_name;
    const auto bytes = read_file(where, largest_manifest + 1);
    if (!bytes) throw Error(EDGEHP_DATA, where + ": cannot be read");
    if (bytes->size() > largest_manifest)
        incompatible(where + ": " + std::to_string(bytes->size()) + " bytes, expected at most " +
                     std::to_string(largest_manifest) + "; build the artifact again");
    Value values;
    try {
        values = json::parse(*bytes);
        if (values.kind != Value::Kind::object)
            throw json::Fault("found a JSON " + std::string(python_name(values.kind)) +
                              ", expected an object");
        check_schema_version(values, where);
        json::check(values, schema(), rules);
    } catch (const json::Fault& fault) {
        incompatible(where + " is not a manifest of this version of edgehp: " + fault.what() +
                     "; build or copy the artifact again");
    }
    const std::string found = sha256(json::canonical(values, false, "digest"));
    const std::string& said = values["digest"].text;
    if (found != said)
        incompatible(where + ": the manifest was altered: its digest is " + found.substr(0, 16) +
                     "..., it says " + said.substr(0, 16) +
                     "...; build the artifact again or copy it again");
    return values;
}

// The release in a version: 10.14.1.48.post1 gives 10, 14, 1, 48. Trailing zeros do not count, nor
// what follows a hyphen, as in OpenVINO's 2026.4.0-21-abc.
std::vector<unsigned long long> parse_version(const std::string& text) {
    // As the packaging standard for Python has it (PEP 440), in lower case.
    std::string whole = text.substr(0, text.find('-'));
    for (char& c : whole) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const auto found = json::search(
        whole, "^[ \t]*v?([0-9]+!)?([0-9]+([.][0-9]+)*)"
               "([._]?(alpha|beta|preview|pre|rc|a|b|c)[._]?[0-9]*)?([._]?(post|rev|r)[._]?[0-9]*)?"
               "([._]?dev[._]?[0-9]*)?([+][a-z0-9]+([._][a-z0-9]+)*)?[ \t]*$");
    if (found.empty())
        throw Error(EDGEHP_DATA, "version " + json::quoted(text) +
                                     " is not numbers joined by dots, such as '10.3.0'");
    std::vector<unsigned long long> release;
    std::istringstream parts(found[2]);
    for (std::string part; std::getline(parts, part, '.');)
        release.push_back(std::strtoull(part.c_str(), nullptr, 10));
    while (!release.empty() && release.back() == 0) release.pop_back();
    return release;
}

// The part number of a Jetson's module; every other number in a device tree is a carrier's.
std::optional<std::string> module_part(const std::string& text) {
    const auto found = json::search(text, "\\b(p(3701|3767|3834)-[0-9]{4})([^0-9]|$)");
    if (found.empty()) return std::nullopt;
    return found[1];
}

bool same_module(const std::string& target, const std::string& built,
                 const std::optional<std::string>& here) {
    const auto a = module_part(built), b = module_part(here.value_or(""));
    if (!a || !b) return here == built;
    const auto parts = same_modules.find(target);
    return a == b || (parts != same_modules.end() && parts->second.count(*a) &&
                      parts->second.count(*b));
}

void check_version(const Value& engine, const Device& device, const std::string& where,
                   const std::string& rebuild) {
    const std::string& kind = engine["kind"].text;
    const Value* said = engine["versions"].find(kind);
    if (said == nullptr)
        incompatible(where + ": the manifest does not say which " + kind + " built the engine; " +
                     rebuild);
    const std::string& built = said->text;
    const auto here = device.version(kind);
    if (!here)
        throw Error(EDGEHP_ENVIRONMENT, where + " needs " + kind + " " + built +
                                            ", which is not installed; run 'edgehp doctor'");
    // These read what an older release wrote; the others need the very same version.
    if (kind == "openvino" || kind == "onnxruntime") {
        if (parse_version(*here) < parse_version(built))
            incompatible(where + " was built with " + kind + " " + built + "; found the older " +
                         *here + ": install " + built + " or newer, or " + rebuild);
        return;
    }
    // On a Jetson, TensorRT's Python package leaves out the number of the build: 10.3.0.
    std::string same = *here;
    if (std::count(built.begin(), built.end(), '.') == 2 &&
        std::count(same.begin(), same.end(), '.') == 3)
        same.resize(same.rfind('.'));
    if (parse_version(same) != parse_version(built)) {
        incompatible(where + " was built with " + kind + " " + built + "; found " + same +
                     ", and its engines need exactly the same version: install it, or " + rebuild);
    }
}

void check_device(const Value& manifest, const Device& device, const std::string& where) {
    const Value& target = manifest["target"];
    const std::string& name = target["name"].text;
    const std::string rebuild = "build it here: edgehp build --target " + name + " --precision " +
                                manifest["precision"]["asked"].text;
    std::string wanted;
    std::set<std::string> capabilities;
    if (const Value* found = target.find("compute_capabilities"))
        for (const Value& capability : found->items) {
            wanted += (wanted.empty() ? "" : " or ") + capability.text;
            capabilities.insert(capability.text);
        }
    if (!capabilities.empty()) {
        std::vector<Device::Gpu> gpus;
        try {
            gpus = device.gpus();
        } catch (const Error& error) {
            throw Error(error.status, where + " needs a GPU of compute capability " + wanted +
                                          " (target " + name + "): " + error.what());
        }
        // The first GPU is the one a runtime takes unless told otherwise.
        if (gpus.empty() || !capabilities.count(gpus[0].compute_capability))
            incompatible(where + " was built for a GPU of compute capability " + wanted +
                         " (target " + name + "); this machine has " +
                         (gpus.empty() ? "no NVIDIA GPU"
                                       : gpus[0].name + " (compute capability " +
                                             gpus[0].compute_capability + ")") +
                         ": use it on the right device, or build one for this one with 'edgehp "
                         "build --target ...' (see 'edgehp targets')");
    }
    if (const Value* module = target.find("module"); module && !module->is_null()) {
        const auto here = device.module();
        if (!same_module(name, module->text, here))
            incompatible(where + " was built on " + json::quoted(module->text) + "; this is " +
                         json::quoted(here.value_or("no Jetson")) +
                         ", whose clocks, memory and number of SMs differ; " + rebuild);
    }
    check_version(manifest["engine"], device, where, rebuild);
}

void check_files(const std::string& root, const Value& manifest) {
    const std::string remedy = "; copy the artifact again or build it again";
    std::set<std::string> listed = {manifest_name};
    for (const Value& file : manifest["files"].items) {
        const std::string& name = file["path"].text;
        const auto size = require_plain(root, name).st_size;
        if (size != file["size"].integer)
            incompatible(root + "/" + name + ": found " + std::to_string(size) +
                         " bytes, the manifest says " + std::to_string(file["size"].integer) +
                         remedy);
        listed.insert(name);
    }
    for (const Value& file : manifest["files"].items) {
        const std::string path = root + "/" + file["path"].text, &said = file["sha256"].text;
        const std::string found = sha256_file(path);
        if (found != said)
            incompatible(path + " was changed: found SHA-256 " + found.substr(0, 16) +
                         "..., the manifest says " + said.substr(0, 16) + "..." + remedy);
    }
    std::set<fs::path> unlisted;
    const auto options = fs::directory_options::skip_permission_denied;
    for (const auto& entry : fs::recursive_directory_iterator(root, options)) {
        const fs::path name = entry.path().lexically_relative(root);
        const bool folder = fs::is_directory(entry.symlink_status());
        // Reports are written beside the listed files later, and never opened.
        if (!folder && *name.begin() != "reports" && !listed.count(name.string()))
            unlisted.insert(name);
    }
    if (!unlisted.empty())
        incompatible(root + "/" + unlisted.begin()->string() +
                     ": a file that the manifest does not list; remove it, or build the artifact "
                     "again");
}

// The path as edgehp writes it: without "." and doubled or final slashes.
std::string tidy(const std::string& path) {
    fs::path out;
    for (const fs::path& part : fs::path(path))
        if (!part.empty() && part != ".") out /= part;
    return out.empty() ? "." : out.string();
}

}  // namespace

std::string Artifact::engine_path() const {
    return path + "/" + manifest["engine"]["files"].items.at(0).text;
}

Artifact load_artifact(const std::string& path, const Device& device) {
    const std::string root = tidy(path);
    Value manifest = read_manifest(root);
    if (manifest["state"].text != "complete")
        incompatible(root + " is deferred: its engine is not built yet; finish it on the device (" +
                     manifest["target"]["name"].text + ") with: edgehp build --finish " + root);
    check_device(manifest, device, root);
    check_files(root, manifest);
    const Preprocessing how = preprocessing_of(manifest["preprocessing"]["spec"]);
    return {root, std::move(manifest), how};
}

std::vector<Device::Gpu> Device::gpus() const {
    const auto fail = [](const std::string& what) -> void {
        throw Error(EDGEHP_ENVIRONMENT, what);
    };
    // Loaded here, so that a program for the processor needs no driver. It is never unloaded.
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == nullptr)
        fail("no NVIDIA driver found (" + std::string(dlerror()) +
             "); install it, or use a processor engine");
    const auto call = [&](const char* name, auto... arguments) {
        const auto function = reinterpret_cast<int (*)(decltype(arguments)...)>(
            dlsym(driver, name));
        const int status = function ? function(arguments...) : 500;  // CUDA_ERROR_NOT_FOUND
        if (status == 0) return;
        const char* text = nullptr;
        if (const auto explain = reinterpret_cast<int (*)(int, const char**)>(
                dlsym(driver, "cuGetErrorString")))
            explain(status, &text);
        fail("the NVIDIA driver failed: " + std::string(name) + " returned " +
             std::to_string(status) + ": " + (text ? text : "unknown error") +
             "; check nvidia-smi and the permissions of /dev/nvidia*");
    };
    int count = 0;
    call("cuInit", 0u);
    call("cuDeviceGetCount", &count);
    if (count == 0) fail("the NVIDIA driver is there but finds no GPU");
    std::vector<Gpu> found;
    for (int index = 0; index < count; ++index) {
        int device = 0, major = 0, minor = 0;
        std::array<char, 256> name{};
        call("cuDeviceGet", &device, index);
        call("cuDeviceGetName", name.data(), static_cast<int>(name.size()), device);
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
        call("cuDeviceGetAttribute", &major, 75, device);
        call("cuDeviceGetAttribute", &minor, 76, device);
        found.push_back({name.data(), std::to_string(major) + "." + std::to_string(minor)});
    }
    return found;
}

std::optional<std::string> Device::module() const {
    const auto text = [](const char* path) {
        std::string found = read_file(path, 1 << 16).value_or("");
        while (!found.empty() && (found.back() == '\0' || found.back() == '\n')) found.pop_back();
        return found;
    };
    std::string compatible = text("/proc/device-tree/compatible");
    std::replace(compatible.begin(), compatible.end(), '\0', ' ');
    if ((" " + compatible).find(" nvidia,tegra") == std::string::npos) return std::nullopt;
    std::string model = text("/proc/device-tree/model");
    if (model.empty()) model = "unnamed Jetson";
    const auto part = module_part(compatible);
    return part ? model + " (" + *part + ")" : model;
}

std::optional<std::string> Device::version(const std::string& kind) const {
    return runtime_version(kind);
}

}  // namespace edgehp
